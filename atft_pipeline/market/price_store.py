"""The adjusted prices of a source on disk, by month: an update continues the pass from the first month that changed.

An artifact at PATH: `PATH/YYYY-MM.parquet` in `PRICES_COLUMNS`; `PATH.memory/YYYY-MM.npz`, the states after the months
from which the pass can be continued; `PATH.quarantine.parquet`; and a manifest. Digests of the raw rows by month show
what has changed in a source. The pass continues from the newest state before the first month that differs.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from atft_pipeline.config.overrides import to_dict
from atft_pipeline.config.schema import DatasetConfig
from atft_pipeline.errors import InputError
from atft_pipeline.market.adjustment import StockState
from atft_pipeline.market.contracts import (
    NO_UNIVERSE,
    CheckedTables,
    ContractReport,
    check_prices,
    check_table,
    joined_report,
)
from atft_pipeline.market.price_panel import PricePanel
from atft_pipeline.market.sources import Source, in_time
from atft_pipeline.market.universe import PricesResult, UniverseState, build_prices
from atft_pipeline.storage.artifact import sha256_of, write_manifest
from atft_pipeline.storage.atomic import load_arrays, replacing, save_arrays
from atft_pipeline.storage.code_version import code_revision
from atft_pipeline.storage.monthly import (
    Days,
    Earlier,
    PartitionWriter,
    beside,
    is_whole,
    month_digests,
    partition_path,
    sessions_by_month,
    spans,
    writing_partitions,
)

KIND = "prices"
CELLS_AT_A_TIME = 4_000_000
"""Sessions times codes of a span of months; it limits the memory of a pass."""
STATE, QUARANTINE = "memory", "quarantine.parquet"
SIDECARS = (STATE, QUARANTINE)
"""Files and folders beside the prices."""


def update_prices(
    source: Source,
    others: CheckedTables,
    out: Path,
    config: DatasetConfig,
    previous: Path | None = None,
    *,
    advance: Callable[[str, int, int], None] = lambda *_: None,
) -> tuple[dict[str, Any], ContractReport]:
    """Builds the adjusted prices of the source at `out`; returns their manifest, and the report on the written rows.

    others: the source's other tables. previous: an earlier artifact; if it has the same configuration and code, its
    months before the first changed one are kept, and the pass continues from there. `changes` in the manifest says in
    which month each input first differed. advance: called with the months done and all months.

    Raises: InputError when raw rows break their contract, or fewer than two common stocks trade.
    """
    whole = previous is not None and is_whole(beside(previous, QUARANTINE))
    earlier = Earlier.of(previous if whole else None, KIND, config=to_dict(config), code=code_revision("dataset"))
    listed = others.tables["listed"]
    raw = _RawFiles.of(source, earlier)
    until = _end_of(others.tables["index"])
    digests = {"prices": raw.months, "listed": _listed_digests(listed, earlier)}
    changes = earlier.changes({**digests, "index": until}, STATE, [""])
    partitions: dict[str, Any] = {month: earlier.parts[month] for month in changes.kept}
    state, quarantine, late = None, [], set[str]()
    if changes.kept:
        state = _load_state(earlier.path, changes.kept[-1])
        quarantine.append(_decided_by(earlier.path, state.sessions[-1]))
        late |= {*earlier.manifest["late_codes"]}
    reports = []
    with writing_partitions(out, [STATE], earlier) as writer:
        for month in changes.kept:
            writer.take_over(month)
        for result in _passes(raw, others.tables, config, state, advance):
            partitions |= _write(writer, result)
            reports.append(check_prices(result.prices, needs_universe=False))
            quarantine.append(result.quarantine)
            late |= _late_codes(result)
            state = result.state
    assert state is not None
    hits = pl.concat(quarantine).sort("Date", "Code", "rule")
    with replacing(beside(out, QUARANTINE)) as temporary:
        hits.write_parquet(temporary, compression="zstd")
    manifest = {
        "kind": KIND,
        "fingerprint": sha256_of({"config": to_dict(config), "content": [partitions, frame_digest(hits)]}),
        "source": raw.added_to(others.record),
        "config": to_dict(config),
        "code": code_revision("dataset"),
        "parts": partitions,
        "session_dates": state.sessions.astype(str).tolist(),
        "stocks": int((state.stocks.history > 0).sum()),
        "raw": raw.record(),
        # Without an earlier version the raw rows are counted during the pass, so their digests exist only now.
        "inputs": {"prices": raw.months, "index": until, "listed": month_digests(listed, "Date")},
        "late_codes": sorted(late),
        "late_digest": _earliest_digest(listed, late),
        "changes": changes.record(partitions),
    }
    write_manifest(out, manifest)
    return manifest, joined_report("prices (adjusted)", reports, _no_universe(partitions))


def _no_universe(partitions: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The sentence of check_prices for a whole table without an investable row."""
    if any(month["investable_rows"] for month in partitions.values()):
        return []
    return [NO_UNIVERSE]


def _end_of(index: pl.DataFrame) -> dict[str, str]:
    """The last day of the index by its month; it may be a session without a quote."""
    last = str(index["Date"].max())
    return {last[:7]: last}


def table_digests(source: Source, others: CheckedTables) -> dict[str, str]:
    """sha256 of each table of the source in its present state."""
    digests = {name: entry["sha256"] for name, entry in others.record["tables"].items()}
    return {"prices": source.fingerprint("prices"), **digests}


def read_months(path: Path, months: Sequence[str], sessions: Days) -> PricePanel:
    """The panel of consecutive months over their `sessions`. Raises InputError when a partition is missing."""
    return PricePanel.from_frame(read_frame(path, months), sessions)


def read_frame(path: Path, months: Sequence[str]) -> pl.DataFrame:
    """The long table of `months`. Raises InputError when a partition is missing."""
    files = [partition_path(path, month) for month in months]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise InputError(f"{path}: partition {missing.name} is missing; build the prices again")
    return pl.concat([pl.read_parquet(file, glob=False) for file in files])


def read_quarantine(path: Path) -> pl.DataFrame:
    return pl.read_parquet(beside(path, QUARANTINE), glob=False)


def frame_digest(frame: pl.DataFrame) -> str:
    """Hash of a table's rows in order; the fixed seed makes it the same in every process."""
    return hashlib.sha256(frame.hash_rows(seed=0).to_numpy().tobytes()).hexdigest()


# --- the raw files ----------------------------------------------------------------------------------------------------


@dataclass
class _File:
    """What is recorded of one file of raw prices; it shows which months a change of the file affects."""

    sha256: str
    first: str
    last: str
    rows: int = 0
    months: dict[str, int] = field(default_factory=dict)
    null_texts: dict[str, int] = field(default_factory=dict)


@dataclass
class _RawFiles:
    """The raw prices, file by file. A file with the bytes of the earlier version is not read to count its rows."""

    source: Source
    files: dict[str, _File]
    digested: bool
    """Whether the files' rows have been counted; if not, the pass counts them."""

    @staticmethod
    def of(source: Source, earlier: Earlier) -> _RawFiles:
        recorded = {name: _File(**record) for name, record in earlier.manifest.get("raw", {}).items()}
        files = {}
        for name, sha256 in source.file_fingerprints("prices").items():
            if name in recorded and recorded[name].sha256 == sha256:
                files[name] = recorded[name]
            else:
                days = _alone(source, name).dates("prices")
                # One of several files may be empty: it has no days.
                first, last = (str(days[0]), str(days[-1])) if len(days) else ("9999-12-31", "0001-01-01")
                files[name] = _File(sha256, first, last)
        raw = _RawFiles(source, files, digested=bool(earlier.parts))
        if raw.digested:
            for name, record in files.items():
                if not record.rows and record.last >= record.first:
                    for start, stop in _years(record.first, record.last):
                        raw._count(name, start, stop)
        return raw

    @property
    def months(self) -> dict[str, int]:
        """Digest of each month's rows over all files."""
        totals: Counter[str] = Counter()
        for record in self.files.values():
            totals.update(record.months)
        return {month: total % 2**64 for month, total in sorted(totals.items())}

    def dates(self, after: np.datetime64 | None) -> Days:
        """Days that have rows, all of them or those after a session; files without such days are not opened."""
        start = "" if after is None else str(after + 1)
        files = tuple(self.source.folder / name for name, record in self.files.items() if record.last >= start)
        if not files:
            return np.empty(0, "datetime64[D]")
        days = replace(self.source, files={**self.source.files, "prices": files}).dates("prices")
        return days if after is None else days[days > after]

    def read(self, first: dt.date, last: dt.date) -> pl.DataFrame:
        """Rows of the days from first to last; files that cannot have such rows are not opened."""
        named = [name for name, record in self.files.items() if record.first <= str(last) and record.last >= str(first)]
        named = named or [min(self.files)]
        frames = [self._count(name, first, last, is_counted=self.digested) for name in named]
        return pl.concat(in_time(frames, "Date"))

    def record(self) -> dict[str, Any]:
        return {name: vars(record) for name, record in self.files.items()}

    def added_to(self, others: Mapping[str, Any]) -> dict[str, Any]:
        """The source's record with an entry for prices, in the form of `contracts.read_checked`."""
        files = self.files.values()
        texts = sum((Counter(record.null_texts) for record in files), Counter[str]())
        entry = {
            "rows": sum(record.rows for record in files),
            "first_date": min(record.first for record in files),
            "last_date": max(record.last for record in files),
            "sha256": hashlib.sha256(b"".join(bytes.fromhex(record.sha256) for record in files)).hexdigest(),
            "null_texts": dict(sorted(texts.items())),
        }
        return {**others, "tables": {"prices": entry, **others["tables"]}}

    def _count(self, name: str, first: dt.date, last: dt.date, *, is_counted: bool = False) -> pl.DataFrame:
        read = _alone(self.source, name).read_counted("prices", first=first, last=last)
        if not is_counted:
            record = self.files[name]
            record.rows += read.frame.height
            record.null_texts = dict(Counter(record.null_texts) + Counter(read.null_texts))
            sums = Counter(record.months) + Counter(month_digests(read.frame, "Date"))
            record.months = {month: total % 2**64 for month, total in sorted(sums.items())}
        return read.frame


def _alone(source: Source, name: str) -> Source:
    """The source with one of its files of prices only."""
    return replace(source, files={**source.files, "prices": (source.folder / name,)})


def _years(first: str, last: str) -> Iterator[tuple[dt.date, dt.date]]:
    for year in range(int(first[:4]), int(last[:4]) + 1):
        yield dt.date(year, 1, 1), dt.date(year, 12, 31)


# --- listed snapshots that arrive late --------------------------------------------------------------------------------


def _listed_digests(listed: pl.DataFrame, earlier: Earlier) -> dict[str, int]:
    """Digests by month.

    The first month counts as changed where a back-filled snapshot has changed, since it reaches the earliest prices.
    """
    digests = month_digests(listed, "Date")
    before = earlier.manifest
    if before and _earliest_digest(listed, before["late_codes"]) != before["late_digest"]:
        digests[min(before["parts"])] = -1
    return digests


def _earliest_digest(listed: pl.DataFrame, codes: Any) -> int:
    """Digest of the earliest snapshots of `codes`."""
    earliest = listed.filter(pl.col("Code").is_in(list(codes))).sort("Code", "Date").unique("Code", keep="first")
    return sum(month_digests(earliest, "Date").values()) % 2**64


def _late_codes(result: PricesResult) -> set[str]:
    """Codes that have rows before their first snapshot, or no snapshot: a later snapshot changes their earlier rows.

    They include dropped codes, since the earliest snapshot alone may say that a code is a fund.
    """
    backfilled = result.panel.is_listed_backfilled.any(axis=0)
    absent = result.quarantine.filter(pl.col("rule").is_in(["not_listed", "not_common_stock"]))["Code"]
    return {*np.array(result.panel.codes)[backfilled].tolist(), *absent.to_list()}


# --- the pass ---------------------------------------------------------------------------------------------------------


def _passes(
    raw: _RawFiles,
    others: Mapping[str, pl.DataFrame],
    config: DatasetConfig,
    state: UniverseState | None,
    advance: Callable[[str, int, int], None],
) -> Iterator[PricesResult]:
    """The prices and universe of one span of months after another, continued from `state`."""
    after = None if state is None else state.sessions[-1]
    # The index may have sessions after the last quote.
    known_to = np.datetime64(str(others["index"]["Date"].max()), "D")
    days = raw.dates(after)
    days = np.union1d(days, [known_to]) if after is None or known_to > after else days
    months = sessions_by_month(days)
    codes = len(raw.source.codes("prices") if state is None else state.codes)
    for span in spans(months, min(months, default=""), max(1, CELLS_AT_A_TIME // codes)):
        first, last = days[months[span[0]].start].item(), days[months[span[-1]].stop - 1].item()
        frame = raw.read(first, last)
        if frame.height or state is None:
            check_table("prices", frame, where=str(raw.source.where("prices")), is_whole=False).require()
        # Sessions of the exchange count up to the end of the span's month, in the last one up to the end of the data.
        is_last = months[span[-1]].stop == len(days)
        following = (np.datetime64(span[-1]) + 1).astype("datetime64[D]").item()
        until = None if is_last else following - dt.timedelta(days=1)
        result = build_prices({**others, "prices": frame}, config, state, until)
        yield result
        state = result.state
        advance("prices", list(months).index(span[-1]) + 1, len(months))


def _write(writer: PartitionWriter, result: PricesResult) -> dict[str, dict[str, Any]]:
    """Writes the months of a pass and the state after it; returns the manifest's entry of each month."""
    starts = np.append(0, np.cumsum(result.panel.has_row.sum(axis=1)))
    partitions = {}
    for month, rows in sessions_by_month(result.panel.sessions).items():
        frame = result.prices[int(starts[rows.start]) : int(starts[rows.stop])]
        frame.write_parquet(partition_path(writer.folders[""], month), compression="lz4")
        partitions[month] = {
            "rows": frame.height,
            "sha256": frame_digest(frame),
            **{
                f"{name}_rows": int(frame[f"is_{name}"].sum()) for name in ("investable", "liquid", "listed_backfilled")
            },
        }
    if partitions:  # none where all rows are of closed days
        save_arrays(partition_path(writer.folders[STATE], max(partitions), "npz"), _to_arrays(result.state))
    return partitions


def _decided_by(path: Path, session: np.datetime64) -> pl.DataFrame:
    """Quarantine rows that were decided at or before the close of `session`."""
    return read_quarantine(path).filter(pl.col("known_from") <= session.item())


def _to_arrays(state: UniverseState) -> dict[str, Any]:
    return {
        "sessions": state.sessions.astype(np.int64),
        "codes": np.array(state.codes, dtype=np.str_),
        "turnover": state.turnover,
        "factors_stated": state.factors_stated,
        **{f"stocks.{name}": array for name, array in state.stocks.arrays().items()},
    }


def _load_state(path: Path, month: str) -> UniverseState:
    arrays = load_arrays(partition_path(beside(path, STATE), month, "npz"))
    stocks = {name.removeprefix("stocks."): array for name, array in arrays.items() if name.startswith("stocks.")}
    return UniverseState(
        sessions=arrays["sessions"].astype("datetime64[D]"),
        codes=tuple(arrays["codes"].tolist()),
        stocks=StockState(**stocks),
        turnover=arrays["turnover"],
        factors_stated=bool(arrays["factors_stated"]),
    )
