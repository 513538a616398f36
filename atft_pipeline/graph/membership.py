"""The inputs of a stock graph: windows of a dataset's membership table, read and digested by calendar month.

A dataset by month has the partitions `PATH.membership/YYYY-MM.parquet`. Its manifest carries `session_dates` and, in
`parts`, each month's `membership_sha256`. So the inputs of a refresh are known before any partition is read. Shapes: T
sessions, N stocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from atft_pipeline.config.overrides import to_dict
from atft_pipeline.config.schema import GraphConfig
from atft_pipeline.config.slices import SLICES
from atft_pipeline.dataset.layout import read_membership
from atft_pipeline.errors import InputError
from atft_pipeline.storage.artifact import read_artifact, resolved, sha256_of

MINIMUM_SESSIONS: int = 60
"""Sessions of history before the first graph. With fewer, correlations are chance; with more, the first year would have
no graph."""

DEFINITION: int = 2
"""Raise it when the same membership gives other edges. It enters every digest, so earlier partitions are not reused."""


Window = tuple[int, int]
"""First session and refresh session of a graph: positions in the dataset's sessions, both included."""


@dataclass(frozen=True)
class Membership:
    """Rows of a membership table, as dense arrays over the sessions that were read."""

    sessions: NDArray[np.datetime64]
    """[T] ascending days."""
    codes: NDArray[np.str_]
    """[N] ascending."""
    returns: NDArray[np.float32]
    """[T, N], NaN where missing."""
    member: NDArray[np.bool_]
    """[T, N], whether the stock is in the graph's universe at that session."""
    sector: NDArray[np.int32]
    """[T, N], the same number for the same sector, negative where unknown."""
    market: NDArray[np.int32]


@dataclass(frozen=True)
class Month:
    """The refreshes of one calendar month and their inputs."""

    name: str
    windows: list[Window]
    covered: list[str]
    """Months in which the windows have sessions, ascending; the last is the month itself."""
    inputs: str | None
    """Digest of all that decides the month's edges; None where the membership has no digests by month."""


def windows(sessions: int, config: GraphConfig) -> list[Window]:
    """The windows of every `refresh_sessions`-th session, counted from the first, that has enough history."""
    first_allowed = min(MINIMUM_SESSIONS, config.lookback_sessions) - 1
    refreshes = [t for t in range(0, sessions, config.refresh_sessions) if t >= first_allowed]
    return [(max(0, t + 1 - config.lookback_sessions), t) for t in refreshes]


def months_of(sessions: NDArray[np.datetime64]) -> NDArray[np.str_]:
    """`YYYY-MM` of each session."""
    return sessions.astype("datetime64[M]").astype(np.str_)


@dataclass(frozen=True)
class Rows:
    """A dataset's membership as its manifest describes it, before any month is read."""

    dataset: Path
    config: GraphConfig
    sessions: NDArray[np.datetime64]
    """[T] all sessions of the dataset."""
    digests: dict[str, str]
    """Digest of each month's membership; empty for a dataset in one file."""
    whole: Membership | None
    """The membership of a dataset in one file."""

    @classmethod
    def of(cls, dataset: Path, manifest: Mapping[str, Any], config: GraphConfig) -> Rows:
        """Raises InputError when the manifest's `session_dates` and `parts` do not fit together."""
        if "parts" not in manifest or resolved(dataset).is_file():
            whole = read_members(dataset, config)
            return cls(dataset, config, whole.sessions, {}, whole)
        sessions = _session_dates(dataset, manifest["session_dates"])
        digests = {month: part["membership_sha256"] for month, part in manifest["parts"].items()}
        odd = sorted(set(months_of(sessions)) ^ set(digests))
        if odd:
            raise InputError(f"{dataset}: parts and session_dates of its manifest differ in {odd[0]}; build it again")
        return cls(dataset, config, sessions, digests, None)

    def months(self) -> list[Month]:
        """The months with a refresh, ascending."""
        month_at = months_of(self.sessions)
        grouped: dict[str, list[Window]] = {}
        for window in windows(len(self.sessions), self.config):
            grouped.setdefault(str(month_at[window[1]]), []).append(window)
        planned = []
        for name, month_windows in grouped.items():
            covered = np.unique(month_at[month_windows[0][0] : month_windows[-1][1] + 1]).tolist()
            inputs = self._digest(month_windows, {m: self.digests[m] for m in covered}) if self.digests else None
            planned.append(Month(name, month_windows, covered, inputs))
        return planned

    def read(self, needed: Sequence[Month]) -> Membership:
        """Reads the membership for `needed`. Raises InputError when its sessions are not those of the manifest."""
        if self.whole is not None:
            return self.whole
        if not needed:
            return _NOTHING
        covered = sorted({name for month in needed for name in month.covered})
        membership = read_members(self.dataset, self.config, covered)
        odd = np.setxor1d(membership.sessions, self.sessions[np.isin(months_of(self.sessions), covered)])
        if len(odd):
            raise InputError(
                f"{self.dataset}: its membership and its manifest differ in session {odd[0]}; build it again"
            )
        return membership

    def local(self, membership: Membership, window: Window) -> Window:
        """`window` as positions in the sessions that were read; all sessions between its ends are among them."""
        first, last = np.searchsorted(membership.sessions, self.sessions[list(window)]).tolist()
        return first, last

    def refresh_digests(self, membership: Membership, month: Month) -> dict[str, str]:
        """By refresh day of `month`, the digest of all that decides its edges; later sessions of the month change none.

        Earlier months enter by their digests, the month itself by its rows up to the refresh. Empty without digests.
        """
        if not self.digests:
            return {}
        month_at, by_refresh = months_of(self.sessions), {}
        rows_so_far, refreshes = hashlib.sha256(), {window[1]: window for window in month.windows}
        for t in np.flatnonzero(month_at == month.name).tolist():
            _update(rows_so_far, membership, int(np.searchsorted(membership.sessions, self.sessions[t])))
            if t in refreshes:
                earlier = np.unique(month_at[refreshes[t][0] : t + 1])[:-1].tolist()
                rows = {name: self.digests[name] for name in earlier} | {month.name: rows_so_far.hexdigest()}
                by_refresh[str(self.sessions[t])] = self._digest([refreshes[t]], rows)
        return by_refresh

    def _digest(self, used_windows: list[Window], rows: Mapping[str, str]) -> str:
        first, last = used_windows[0][0], used_windows[-1][1]
        return sha256_of(
            {
                "definition": DEFINITION,
                "config": to_dict(self.config),
                "sessions": self.sessions[first : last + 1].astype(np.str_).tolist(),
                "windows": [[str(self.sessions[a]), str(self.sessions[b])] for a, b in used_windows],
                "rows": dict(rows),
            }
        )


def _update(digest: Any, membership: Membership, t: int) -> None:
    """Adds the rows of session t; of sectors and markets only which stocks share one, since names do not matter."""
    returns, member, sector, market = (
        rows[t] for rows in (membership.returns, membership.member, membership.sector, membership.market)
    )
    used = np.isfinite(returns) | member | (sector >= 0) | (market >= 0)
    digest.update("\n".join([str(membership.sessions[t]), *membership.codes[used].tolist()]).encode())
    digest.update(returns[used].tobytes())
    digest.update(member[used].tobytes())
    for label in (sector, market):
        names, numbers = np.unique(label[used], return_inverse=True)
        digest.update((numbers - (names[:1] < 0).sum()).astype(np.int32).tobytes())


def read_members(dataset: Path, config: GraphConfig, only: Sequence[str] | None = None) -> Membership:
    """The dataset's membership as dense arrays, of all months or of those in `only`."""
    flag = SLICES[config.universe]
    names = ["Date", "Code", "return_1d", flag, "Sector33Code", "MarketCode"]
    table = read_membership(dataset, names) if only is None else read_membership_months(dataset, only, names)
    sessions = np.sort(pc.unique(table["Date"]).to_numpy(zero_copy_only=False).astype("datetime64[D]"))
    t = np.searchsorted(sessions, table["Date"].to_numpy().astype("datetime64[D]"))
    codes, (i,) = coded([table["Code"]])
    _, (sector,) = coded([table["Sector33Code"]])
    _, (market,) = coded([table["MarketCode"]])
    cells = t * len(codes) + i

    def dense(values: NDArray[Any], absent: Any) -> NDArray[Any]:
        filled = np.full((len(sessions), len(codes)), absent, dtype=values.dtype)
        filled.reshape(-1)[cells] = values
        return filled

    return Membership(
        sessions=sessions,
        codes=codes,
        returns=dense(table["return_1d"].to_numpy().astype(np.float32), np.nan),
        member=dense(table[flag].to_numpy().astype(bool), False),
        sector=dense(sector, -1),
        market=dense(market, -1),
    )


def read_membership_months(dataset: Path, only: Sequence[str], columns: Sequence[str]) -> pa.Table:
    """Rows of the months `only` (`YYYY-MM`, ascending) of a dataset with its membership by month.

    Raises InputError when a partition or a column is missing.
    """
    folder = resolved(dataset).with_name(f"{resolved(dataset).name}.membership")
    return pa.concat_tables([read_artifact(folder / f"{month}.parquet", columns) for month in only])


def _session_dates(dataset: Path, dates: Any) -> NDArray[np.datetime64]:
    try:
        sessions = np.array(dates, dtype="datetime64[D]")
    except (TypeError, ValueError) as error:
        raise InputError(f"{dataset}: session_dates of its manifest are no dates ({error}); build it again") from error
    if not (np.diff(sessions) > np.timedelta64(0, "D")).all():
        raise InputError(f"{dataset}: session_dates of its manifest are not ascending; build it again")
    return sessions


def coded(columns: list[pa.ChunkedArray]) -> tuple[NDArray[np.str_], list[NDArray[np.int32]]]:
    """The distinct strings of all columns, ascending, and each column as positions among them; null is -1."""
    dictionaries = [column.combine_chunks().dictionary_encode() for column in columns]
    distinct = [np.array(d.dictionary.to_pylist(), dtype=np.str_) for d in dictionaries]
    values = np.unique(np.concatenate(distinct))
    positions = []
    for encoded, texts in zip(dictionaries, distinct, strict=True):
        lookup = np.append(np.searchsorted(values, texts), -1).astype(np.int32)
        positions.append(lookup[encoded.indices.fill_null(-1).to_numpy()])
    return values, positions


_NOTHING = Membership(
    sessions=np.empty(0, "datetime64[D]"),
    codes=np.empty(0, np.str_),
    returns=np.empty((0, 0), np.float32),
    member=np.empty((0, 0), np.bool_),
    sector=np.empty((0, 0), np.int32),
    market=np.empty((0, 0), np.int32),
)
