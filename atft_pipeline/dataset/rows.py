"""Rows of `ml_dataset` from computed features: tables ready to be written, and the manifest that describes them.

Shapes: S sessions at hand, N stocks, F features, R rows (session-major, then code).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from atft_pipeline.config.overrides import to_dict
from atft_pipeline.config.schema import HORIZONS, DatasetConfig
from atft_pipeline.dataset.layout import MEMBERSHIP_COLUMNS, TARGETS
from atft_pipeline.dataset.targets import forward_return
from atft_pipeline.features.compute import FeaturePanel, build_features
from atft_pipeline.features.registry import FEATURE_COUNT, FEATURE_NAMES, REGISTRY, registry_fingerprint
from atft_pipeline.features.statistics import Statistics, drift
from atft_pipeline.market.market_facts import market_facts
from atft_pipeline.market.price_panel import PricePanel
from atft_pipeline.storage.artifact import sha256_of
from atft_pipeline.storage.code_version import code_revision
from atft_pipeline.storage.monthly import Days, sessions_by_month

OPTIONAL_TABLES: tuple[str, ...] = ("investor_flows", "statements")
MASK_TARGET = "mask_target"
"""Quarantine decision: the row stays a row, and no target may enter or leave at its prices."""


@dataclass(frozen=True)
class DatasetRows:
    """The dataset's rows of the sessions that a feature panel computed."""

    panel: FeaturePanel
    targets: Mapping[str, NDArray[np.float32]]
    """[R] each."""

    @property
    def months(self) -> dict[str, slice]:
        """Rows of each month."""
        sessions = self.panel.prices.sessions
        starts = np.searchsorted(self.panel.kept // len(self.panel.prices.codes), np.arange(len(sessions) + 1))
        fresh = sessions_by_month(sessions[self.panel.first :])
        return {
            month: slice(int(starts[self.panel.first + rows.start]), int(starts[self.panel.first + rows.stop]))
            for month, rows in fresh.items()
        }

    def features(self, rows: slice = slice(None)) -> pa.Table:
        """Date, Code, the features and the targets."""
        columns = {name: self.panel.values[number, rows] for number, name in enumerate(FEATURE_NAMES)}
        targets = {name: values[rows] for name, values in self.targets.items()}
        return pa.table(self._keys(rows) | {name: nullable(values) for name, values in (columns | targets).items()})

    def membership(self, rows: slice = slice(None)) -> pa.Table:
        """`MEMBERSHIP_COLUMNS` of the same rows."""
        prices, cells = self.panel.prices, self.panel.kept[rows]
        columns: dict[str, Any] = {
            **self._keys(rows),
            **{name: getattr(prices, name).reshape(-1)[cells] for name in ("is_traded", "is_investable", "is_liquid")},
            "return_1d": nullable(self.panel.return_1d.reshape(-1)[cells]),
            **{name: nullable(prices.quotes[name].reshape(-1)[cells]) for name in ("Open", "Close")},
            "Sector33Code": prices.sector.series("Sector33Code", cells).to_arrow().cast(pa.string()),
            "MarketCode": prices.section.series("MarketCode", cells).to_arrow().cast(pa.string()),
        }
        return pa.table({name: columns[name] for name in MEMBERSHIP_COLUMNS})

    def statistics(self, rows: slice = slice(None)) -> Statistics:
        return Statistics.of(self.panel.values[:, rows])

    def _keys(self, rows: slice) -> dict[str, pa.Array]:
        prices = self.panel.prices
        t, n = np.divmod(self.panel.kept[rows], len(prices.codes))
        days = prices.sessions.astype("datetime64[D]").astype(np.int32)
        return {
            "Date": pa.array(days[t], pa.int32()).cast(pa.date32()),
            "Code": pa.array(prices.codes, pa.string()).take(pa.array(n)),
        }


def dataset_rows(
    panel: FeaturePanel, quarantine: pl.DataFrame, config: DatasetConfig, later: PricePanel | None = None
) -> DatasetRows:
    """The rows of `panel`; `later` are prices after it, in which its last targets leave."""
    prices, first = panel.prices, panel.first
    forward = forward_returns(prices, quarantine, config, first=first, later=later)
    cells = panel.kept - first * len(prices.codes)
    return DatasetRows(panel, {name: values.reshape(-1)[cells] for name, values in forward.items()})


def forward_returns(
    prices: PricePanel,
    quarantine: pl.DataFrame,
    config: DatasetConfig,
    *,
    first: int = 0,
    later: PricePanel | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Targets of every cell from row `first` on, `[S - first, N]` float32 each."""
    own = len(prices.sessions) - first
    sessions, opens, closes = prices.sessions[first:], prices.quotes["Open"][first:], prices.quotes["Close"][first:]
    if later is not None:
        ahead = later.of_codes(sorted({*later.codes, *prices.codes}))
        columns = np.searchsorted(np.array(ahead.codes), np.array(prices.codes))
        sessions = np.concatenate([sessions, ahead.sessions])
        opens, closes = (
            np.concatenate([own_, ahead.quotes[name][:, columns]])
            for own_, name in ((opens, "Open"), (closes, "Close"))
        )
    masked = _masked(sessions, prices.codes, quarantine)
    return {
        name: forward_return(opens, closes, horizon, config.execution, masked)[:own].astype(np.float32)
        for name, horizon in zip(TARGETS, HORIZONS, strict=True)
    }


def _masked(sessions: Days, codes: Sequence[str], quarantine: pl.DataFrame) -> NDArray[np.bool_]:
    masked = np.zeros((len(sessions), len(codes)), np.bool_)
    hits = quarantine.filter(pl.col("decision") == MASK_TARGET).select(pl.col("Date").cast(pl.Date), "Code")
    row_of = {day: t for t, day in enumerate(sessions.tolist())}
    column_of = {code: n for n, code in enumerate(codes)}
    for day, code in hits.iter_rows():
        if day in row_of and code in column_of:
            masked[row_of[day], column_of[code]] = True
    return masked


def build_dataset(
    prices: PricePanel,
    quarantine: pl.DataFrame,
    tables: Mapping[str, pl.DataFrame],
    config: DatasetConfig,
    source: Mapping[str, Any],
) -> tuple[pa.Table, pa.Table, dict[str, Any]]:
    """Features with targets, membership, and the manifest, in memory, ready for `layout.write_dataset`.

    quarantine: `rule, decision, Date, Code`; a row decided `mask_target` nulls the targets that would enter or leave
    there. source: `path`, and by table its rows, dates and sha256, recorded as given.
    """
    rows = dataset_rows(build_features(prices, tables, config), quarantine, config)
    features, membership = rows.features(), rows.membership()
    parts = {month: partition_record(_of(features, span), _of(membership, span)) for month, span in rows.months.items()}
    statistics = Statistics.total((rows.statistics(span) for span in rows.months.values()), FEATURE_COUNT)
    manifest = dataset_manifest(
        parts=parts,
        statistics=statistics,
        session_dates=prices.sessions,
        stocks=len(np.unique(rows.panel.kept % len(prices.codes))),
        listed_backfilled_rows=int(prices.is_listed_backfilled.sum()),
        quarantine=quarantine,
        absent_tables=[name for name in OPTIONAL_TABLES if name not in tables or tables[name].is_empty()],
        config=config,
        source=source,
    )
    return features, membership, manifest


def _of(table: pa.Table, rows: slice) -> pa.Table:
    return table.slice(rows.start, rows.stop - rows.start)


def partition_record(features: pa.Table, membership: pa.Table) -> dict[str, Any]:
    """What the manifest says of a month: its rows, and digests of its values, whatever file format holds them."""
    held = features.drop_columns(list(TARGETS))
    return {
        "rows": features.num_rows,
        "features_sha256": content_digest(held),
        "targets_sha256": content_digest(features.select(TARGETS)),
        "membership_sha256": content_digest(membership),
    }


def content_digest(table: pa.Table) -> str:
    """Hash of every value: the same digest means the same numbers, whatever code made them."""
    digest = hashlib.sha256()
    for name in table.column_names:
        column = table[name].combine_chunks()
        digest.update(name.encode())
        if pa.types.is_string(column.type):
            # Numbered in order of appearance, which the content alone decides.
            encoded = column.dictionary_encode()
            digest.update("\0".join(map(str, encoded.dictionary.to_pylist())).encode())
            column = encoded.indices.fill_null(-1)
        elif pa.types.is_date32(column.type):
            column = column.cast(pa.int32())
        digest.update(column.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def nullable(values: NDArray[np.floating[Any]]) -> pa.Array:
    """NaN as null; the numbers are not copied."""
    return pa.array(values, from_pandas=True)


# --- the manifest -----------------------------------------------------------------------------------------------------


def dataset_manifest(
    *,
    parts: Mapping[str, Mapping[str, Any]],
    statistics: Statistics,
    session_dates: Days,
    stocks: int,
    listed_backfilled_rows: int,
    quarantine: pl.DataFrame,
    absent_tables: Sequence[str],
    config: DatasetConfig,
    source: Mapping[str, Any],
) -> dict[str, Any]:
    """The description of a dataset, its fingerprint included: a hash of market, configuration, registry and values."""
    live = [
        feature.name
        for number, feature in enumerate(REGISTRY)
        if statistics.has_values(number, above_zero=feature.family == "masks")
    ]
    filled = [month for month, part in parts.items() if part["rows"]]
    days = session_dates.astype("datetime64[D]").astype(str).tolist()
    with_rows = [day for day in days if parts.get(day[:7], {"rows": 0})["rows"]]
    manifest = {
        "kind": "ml_dataset",
        "source": dict(source),
        "config": to_dict(config),
        "market": config.market,
        "days_per_year": market_facts(config.market).days_per_year,
        "execution": config.execution,
        "code": code_revision("dataset"),
        "registry_fingerprint": registry_fingerprint(),
        "features": list(FEATURE_NAMES),
        "live_features": live,
        "feature_stats": {name: statistics.describe(number) for number, name in enumerate(FEATURE_NAMES)},
        "rows": sum(parts[month]["rows"] for month in filled),
        "sessions": len(with_rows),
        "stocks": stocks,
        "first_date": with_rows[0] if with_rows else None,
        "last_date": with_rows[-1] if with_rows else None,
        "session_dates": days,
        "parts": {month: dict(part) for month, part in parts.items()},
        "quarantine": dict(quarantine.group_by("rule").len().sort("rule").iter_rows()),
        "listed_backfilled_rows": listed_backfilled_rows,
        "warnings": list(_warnings(live, absent_tables, config, listed_backfilled_rows)),
    }
    manifest["fingerprint"] = sha256_of(
        {
            "market": manifest["market"],
            "config": manifest["config"],
            "registry": manifest["registry_fingerprint"],
            "content": {
                month: {name: value for name, value in part.items() if name.endswith("_sha256")}
                for month, part in parts.items()
            },
        }
    )
    return manifest


def with_drift(manifest: dict[str, Any], previous: Mapping[str, Any] | None) -> dict[str, Any]:
    """The manifest with what changed against an earlier one: `drift` by feature, and the fingerprint compared with.

    A manifest of another registry has other features under the same names: there is nothing to compare.
    """
    if previous is None or previous.get("registry_fingerprint") != manifest["registry_fingerprint"]:
        return manifest | {"drift_against": None, "drift": {}}
    before = previous["feature_stats"]
    moved = {name: drift(now, before[name]) for name, now in manifest["feature_stats"].items()}
    return manifest | {"drift_against": previous["fingerprint"], "drift": moved}


def _warnings(live: Sequence[str], absent: Sequence[str], config: DatasetConfig, backfilled: int) -> Iterator[str]:
    dead = [feature.name for feature in REGISTRY if feature.name not in live and not set(feature.tables) & set(absent)]
    reasons = []
    if absent:
        many = len(absent) > 1
        reasons.append(f"table{'s' * many} {', '.join(absent)} {'are' if many else 'is'} missing")
    if dead:
        reasons.append(f"no value in {', '.join(dead)}")
    if reasons:
        yield f"{len(live)} of {FEATURE_COUNT} live: {'; '.join(reasons)}"
    if backfilled:
        yield f"listed: {backfilled} price rows precede every snapshot; sector and section are back-filled"
    if config.execution == "same_close":
        yield "execution same_close: not tradeable, the score needs the close at which it would trade"
