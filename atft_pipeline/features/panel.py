"""Prices and the other tables in, `ml_dataset` out: densify, compute, normalise, keep the rows, describe them.

Shapes: T sessions, N stocks, F features, R rows of the dataset (session-major, then code). Per-stock expressions come
first, the cross-sectional pass second; float64 throughout, float32 at the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from atft_pipeline.config import HORIZONS, DatasetConfig, to_dict
from atft_pipeline.dataset import MEMBERSHIP_COLUMNS, TARGETS, sha256_of
from atft_pipeline.errors import InputError
from atft_pipeline.features import expressions as ex
from atft_pipeline.features.market import Market
from atft_pipeline.features.registry import FEATURE_COUNT, FEATURE_NAMES, REGISTRY, Feature, registry_fingerprint
from atft_pipeline.point_in_time import SECTION_OF_MARKET, Days, disclosures, flow_releases
from atft_pipeline.targets import forward_return
from atft_pipeline.trading_calendar import market_facts

Panel = NDArray[np.float64]

OPTIONAL_TABLES: tuple[str, ...] = ("investor_flows", "statements")
MASK_TARGET = "mask_target"
"""Quarantine decision: the row stays a row, and no target may enter or leave at its prices."""
RECENT_SESSIONS = 5
"""A stock has a row while it traded within this many sessions, the current one included."""
NO_SECTOR: tuple[str, ...] = ("9999", "-", "")
"""Sector33Code of funds and of stocks that were delisted before the snapshot: no industry, so no sector to share."""
INDEX_CODE = "0000"
"""TOPIX in the J-Quants columns."""

_PRICE_COLUMNS = ("Open", "High", "Low", "Close", "Volume", "TurnoverValue")


@dataclass(frozen=True)
class Rows:
    """Where each row of the prices table lies in a `[T, N]` panel."""

    sessions: Days
    codes: list[str]
    t: NDArray[np.int64]
    n: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.sessions), len(self.codes)

    def dense(self, column: pl.Series) -> Panel:
        """`[T, N]` float64, NaN where there is no row or no value."""
        panel = np.full(self.shape, np.nan)
        panel[self.t, self.n] = column.cast(pl.Float64).fill_null(np.nan).to_numpy()
        return panel

    def dense_flag(self, column: pl.Series) -> NDArray[np.bool_]:
        panel = np.zeros(self.shape, np.bool_)
        panel[self.t, self.n] = column.fill_null(value=False).to_numpy()
        return panel

    def dense_category(self, column: pl.Series, categories: Mapping[str, int]) -> NDArray[np.int32]:
        """`[T, N]` number of each row's category, −1 where there is no row or the category has none."""
        panel = np.full(self.shape, -1, np.int32)
        numbers = column.cast(pl.String).replace_strict(categories, default=-1, return_dtype=pl.Int32)
        panel[self.t, self.n] = numbers.fill_null(-1).to_numpy()
        return panel


@dataclass(frozen=True)
class FeaturePanel:
    """All 82 features on the dataset's rows."""

    rows: Rows
    market: Market
    kept: NDArray[np.int64]
    """[R] flat position `t * N + n` of each row of the dataset, ascending."""
    values: NDArray[np.float32]
    """[F, R] in registry order, NaN where missing."""

    def column(self, name: str) -> NDArray[np.float32]:
        return self.values[FEATURE_NAMES.index(name)]

    def dense(self, name: str) -> NDArray[np.float32]:
        """`[T, N]`, NaN where missing or where the dataset has no row."""
        panel = np.full(self.rows.shape, np.nan, np.float32)
        panel.reshape(-1)[self.kept] = self.column(name)
        return panel


def build_market(
    prices: pl.DataFrame, tables: Mapping[str, pl.DataFrame], config: DatasetConfig
) -> tuple[Rows, Market]:
    """The prices table and the others as dense panels over the exchange's sessions.

    prices: one row per session and code, prices adjusted forward, with the universe's flags and each row's sector and
    market section as known at its close. tables: `index`, and `investor_flows` and `statements` where there are.

    Raises: InputError when there is no row, no index, or an index table with several codes and none of TOPIX's.
    """
    if prices.is_empty():
        raise InputError("prices: no row is left after quarantine; check the source's prices and listed tables")
    index = _index_close(tables)
    rows = _rows(prices, index)
    listed_sectors = prices["Sector33Code"].cast(pl.String).unique().drop_nulls().sort().to_list()
    sectors = {code: g for g, code in enumerate(c for c in listed_sectors if c not in NO_SECTOR)}
    releases = flow_releases(tables.get("investor_flows"), rows.sessions)
    sections = {
        code: releases.sections.index(section)
        for code, section in SECTION_OF_MARKET.items()
        if section in releases.sections
    }
    market = Market(
        sessions=rows.sessions,
        codes=rows.codes,
        days_per_year=market_facts(config.market).days_per_year,
        raw={name: rows.dense(prices[name]) for name in _PRICE_COLUMNS},
        index_close=_on_sessions(index, rows.sessions),
        investable=rows.dense_flag(prices["is_investable"]),
        sector_of=rows.dense_category(prices["Sector33Code"], sectors),
        sectors=len(sectors),
        section_of=rows.dense_category(prices["MarketCode"], sections),
        releases=releases,
        documents=disclosures(tables.get("statements"), rows.sessions, rows.codes, config.market),
    )
    return rows, market


def normalised(feature: Feature, values: Panel, market: Market) -> Panel:
    """The feature's own normalisation of its values, `[T, N]` or `[T]` as they come."""
    if feature.norm == "ts":
        return ex.ts_zscore(values)
    return ex.cs_normalise(values, market.investable) if feature.norm == "cs" else values


def build_features(prices: pl.DataFrame, tables: Mapping[str, pl.DataFrame], config: DatasetConfig) -> FeaturePanel:
    """All features of every stock that traded within the last 5 sessions. Inputs and errors: `build_market`."""
    rows, market = build_market(prices, tables, config)
    traded = ~np.isnan(market.raw["Close"])
    recent = traded.copy()
    for sessions in range(1, RECENT_SESSIONS):
        recent[sessions:] |= traded[:-sessions]
    has_row = np.zeros(rows.shape, np.bool_)
    has_row[rows.t, rows.n] = True
    kept = np.flatnonzero(recent & has_row)
    values = np.empty((len(REGISTRY), len(kept)), np.float32)
    for column, feature in zip(values, REGISTRY, strict=True):
        result = normalised(feature, feature.compute(market), market)
        column[:] = result[kept // len(rows.codes)] if result.ndim == 1 else result.reshape(-1)[kept]
    market.memo.clear()
    return FeaturePanel(rows, market, kept, values)


def build_dataset(
    prices: pl.DataFrame,
    quarantine: pl.DataFrame,
    tables: Mapping[str, pl.DataFrame],
    config: DatasetConfig,
    source: Mapping[str, Any],
) -> tuple[pa.Table, pa.Table, dict[str, Any]]:
    """Features with targets, membership, and the manifest, ready for `dataset.write_dataset`.

    quarantine: `rule, decision, Date, Code`; a row decided `mask_target` nulls the targets that would enter or leave
    there. source: `path`, and by table its rows, dates and sha256, recorded as given.
    """
    panel = build_features(prices, tables, config)
    keys = _keys(panel)
    targets = _targets(panel, quarantine, config)
    columns = {name: _nullable(panel.column(name)) for name in FEATURE_NAMES}
    features = pa.table(keys | columns | {name: _nullable(values) for name, values in targets.items()})
    membership = _membership(panel, prices, keys)
    manifest = _manifest(panel, prices, quarantine, tables, config, source)
    manifest["fingerprint"] = sha256_of(
        {
            "market": manifest["market"],
            "config": manifest["config"],
            "registry": manifest["registry_fingerprint"],
            "content": _content_hash(features, membership),
        }
    )
    return features, membership, manifest


def _index_close(tables: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    if "index" not in tables:
        raise InputError("index: the table is missing; add index.parquet with Date, Code and Close to the source")
    index = tables["index"]
    codes = index["Code"].cast(pl.String).unique().to_list()
    if len(codes) > 1:
        if INDEX_CODE not in codes:
            raise InputError(f"index: {len(codes)} codes and none is {INDEX_CODE}; keep the market's own index only")
        index = index.filter(pl.col("Code").cast(pl.String) == INDEX_CODE)
    return index.select(pl.col("Date").cast(pl.Date), pl.col("Close").cast(pl.Float64)).drop_nulls().sort("Date")


def _rows(prices: pl.DataFrame, index: pl.DataFrame) -> Rows:
    """Sessions are the dates of the prices and, between the first and the last of them, of the index."""
    dates = prices["Date"].unique()
    between = index["Date"].filter(index["Date"].is_between(dates.min(), dates.max()))
    sessions = pl.concat([dates, between]).unique().sort().to_numpy().astype("datetime64[D]")
    codes = prices["Code"].unique().sort().to_list()
    return Rows(
        sessions,
        codes,
        t=np.searchsorted(sessions, prices["Date"].to_numpy().astype("datetime64[D]")),
        n=prices["Code"].cast(pl.Enum(codes)).to_physical().to_numpy().astype(np.int64),
    )


def _on_sessions(index: pl.DataFrame, sessions: Days) -> Panel:
    series = np.full(len(sessions), np.nan)
    days = index["Date"].to_numpy().astype("datetime64[D]")
    at = np.searchsorted(sessions, days)
    there = (at < len(sessions)) & (sessions[np.minimum(at, len(sessions) - 1)] == days)
    series[at[there]] = index["Close"].to_numpy()[there]
    return series


def _keys(panel: FeaturePanel) -> dict[str, pa.Array]:
    N = len(panel.rows.codes)
    days = panel.rows.sessions.astype(np.int64).astype(np.int32)
    codes = pa.array(panel.rows.codes, pa.string())
    return {
        "Date": pa.array(days[panel.kept // N], pa.int32()).cast(pa.date32()),
        "Code": codes.take(pa.array(panel.kept % N)),
    }


def _targets(panel: FeaturePanel, quarantine: pl.DataFrame, config: DatasetConfig) -> dict[str, NDArray[np.float32]]:
    masked = _masked(panel.rows, quarantine)
    raw = panel.market.raw
    return {
        name: forward_return(raw["Open"], raw["Close"], horizon, config.execution, masked)
        .reshape(-1)[panel.kept]
        .astype(np.float32)
        for name, horizon in zip(TARGETS, HORIZONS, strict=True)
    }


def _masked(rows: Rows, quarantine: pl.DataFrame) -> NDArray[np.bool_]:
    masked = np.zeros(rows.shape, np.bool_)
    hits = quarantine.filter(pl.col("decision") == MASK_TARGET).select(pl.col("Date").cast(pl.Date), "Code")
    row_of = {day: t for t, day in enumerate(rows.sessions.tolist())}
    column_of = {code: n for n, code in enumerate(rows.codes)}
    for day, code in hits.iter_rows():
        if day in row_of and code in column_of:
            masked[row_of[day], column_of[code]] = True
    return masked


def _membership(panel: FeaturePanel, prices: pl.DataFrame, keys: Mapping[str, pa.Array]) -> pa.Table:
    """One row per row of the dataset, in its order, from the prices table itself."""
    # Position of the price row behind each cell: the prices table need not be sorted for the answer to be right.
    source = np.full(panel.rows.shape, -1, np.int64)
    source[panel.rows.t, panel.rows.n] = np.arange(prices.height)
    rows = prices[source.reshape(-1)[panel.kept]]
    close = panel.market.raw["Close"]
    columns: dict[str, pa.Array] = {
        **keys,
        **{name: rows[name].fill_null(value=False).to_arrow() for name in ("is_traded", "is_investable", "is_liquid")},
        "return_1d": _nullable(ex.returns(close, ex.carry(close), 1).reshape(-1)[panel.kept]),
        **{name: _nullable(panel.market.raw[name].reshape(-1)[panel.kept]) for name in ("Open", "Close")},
        **{name: rows[name].cast(pl.String).to_arrow().cast(pa.string()) for name in ("Sector33Code", "MarketCode")},
    }
    return pa.table({name: columns[name] for name in MEMBERSHIP_COLUMNS})


def _manifest(
    panel: FeaturePanel,
    prices: pl.DataFrame,
    quarantine: pl.DataFrame,
    tables: Mapping[str, pl.DataFrame],
    config: DatasetConfig,
    source: Mapping[str, Any],
) -> dict[str, Any]:
    live = [feature.name for feature in REGISTRY if _is_live(feature, panel.column(feature.name))]
    t = np.unique(panel.kept // len(panel.rows.codes))
    backfilled = int(prices["is_listed_backfilled"].fill_null(value=False).sum())
    counts = quarantine.group_by("rule").len().sort("rule")
    return {
        "kind": "ml_dataset",
        "source": dict(source),
        "config": to_dict(config),
        "market": config.market,
        "days_per_year": market_facts(config.market).days_per_year,
        "execution": config.execution,
        "registry_fingerprint": registry_fingerprint(),
        "features": list(FEATURE_NAMES),
        "live_features": live,
        "feature_stats": {name: _statistics(panel.column(name)) for name in FEATURE_NAMES},
        "rows": len(panel.kept),
        "sessions": len(t),
        "stocks": len(np.unique(panel.kept % len(panel.rows.codes))),
        "first_date": str(panel.rows.sessions[t[0]]) if len(t) else None,
        "last_date": str(panel.rows.sessions[t[-1]]) if len(t) else None,
        "quarantine": dict(counts.iter_rows()),
        "listed_backfilled_rows": backfilled,
        "warnings": list(_warnings(live, tables, config, backfilled)),
    }


def _is_live(feature: Feature, values: NDArray[np.float32]) -> bool:
    """Whether any row has a value; a mask that is 0 everywhere says that its features have none."""
    return bool(np.any(values > 0.0)) if feature.family == "masks" else bool(np.any(np.isfinite(values)))


def _warnings(
    live: list[str], tables: Mapping[str, pl.DataFrame], config: DatasetConfig, backfilled: int
) -> Iterator[str]:
    missing = [name for name in OPTIONAL_TABLES if name not in tables or tables[name].is_empty()]
    dead = [feature.name for feature in REGISTRY if feature.name not in live and not set(feature.tables) & set(missing)]
    reasons = []
    if missing:
        reasons.append(
            f"table{'s' * (len(missing) > 1)} {', '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing"
        )
    if dead:
        reasons.append(f"no value in {', '.join(dead)}")
    if reasons:
        yield f"{len(live)} of {FEATURE_COUNT} live: {'; '.join(reasons)}"
    if backfilled:
        yield f"listed: {backfilled} price rows precede every snapshot; sector and section are back-filled"
    if config.execution == "same_close":
        yield "execution same_close: not tradeable, the score needs the close at which it would trade"


def _statistics(values: NDArray[np.float32]) -> dict[str, float | None]:
    finite = values[np.isfinite(values)]
    null_share = 1.0 - len(finite) / len(values) if len(values) else 1.0
    if len(finite) == 0:
        return {"null_share": null_share, "mean": None, "std": None, "p01": None, "p99": None}
    last = len(finite) - 1
    low, high = round(0.01 * last), round(0.99 * last)
    ordered = np.partition(finite, (low, high))
    return {
        "null_share": null_share,
        "mean": float(finite.mean(dtype=np.float64)),
        "std": float(finite.std(dtype=np.float64)),
        "p01": float(ordered[low]),
        "p99": float(ordered[high]),
    }


def _nullable(values: NDArray[np.floating[Any]]) -> pa.Array:
    """NaN as null; the numbers are not copied."""
    return pa.array(values, from_pandas=True)


def _content_hash(*tables: pa.Table) -> str:
    """Hash of every value: the same fingerprint means the same numbers, whatever code made them."""
    digest = hashlib.sha256()
    for table in tables:
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
