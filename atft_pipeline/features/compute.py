"""Computes the 82 normalised features of the dataset's rows from prices and the other tables.

Shapes: T sessions of the whole history, S sessions of the present panels, N stocks, F features, R rows of the dataset
(session-major, then code). Threads compute the features in parallel, one span of sessions at a time, so that a span's
matrices stay in the cache. The state that continues the recursions from day to day also continues them between spans.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from atft_pipeline.config.schema import DatasetConfig
from atft_pipeline.errors import InputError
from atft_pipeline.features.inputs import Market
from atft_pipeline.features.registry import FEATURE_NAMES, REGISTRY, Feature
from atft_pipeline.features.vocabulary.averages import Average
from atft_pipeline.features.vocabulary.cross_section import cs_normalise
from atft_pipeline.features.vocabulary.windows import carry, returns, ts_zscore
from atft_pipeline.market.disclosures import disclosures, flow_releases
from atft_pipeline.market.market_facts import INDEX_CODE, NO_SECTOR, SECTION_OF_MARKET, market_facts
from atft_pipeline.market.price_panel import Matrix, PricePanel, day_array
from atft_pipeline.storage.monthly import Days

RECENT_SESSIONS = 5
"""A stock has a row while it traded within this many sessions, the current one included."""
OVERLAP_SESSIONS = max(feature.trace.overlap_sessions + feature.lag_sessions for feature in REGISTRY)
"""Most rows before the fresh ones that any feature looks back on."""
OVERLAPS: tuple[int, ...] = (7, 26, 66, 125, OVERLAP_SESSIONS)
"""Classes of overlap. Features of one class share their intermediates; so for most features one more session costs the
computation of few rows."""
CELLS_AT_A_TIME = 1_500_000
"""Cells of a span's matrix, 12 MB: a larger one does not fit the cache, and each new one gets fresh pages."""
THREADS = 2


@dataclass(frozen=True)
class FeatureState:
    """State of the features after a session: the last prices, and the state of each recursion."""

    tail: PricePanel
    """Prices of at most the last `OVERLAP_SESSIONS` sessions."""
    sessions: Days
    """All sessions so far."""
    sectors: tuple[str, ...]
    values: Mapping[str, Any]
    """`Market.state` of the stocks of `tail` and of `sectors`."""

    def values_of(self, codes: Sequence[str], sectors: Sequence[str]) -> dict[str, Any]:
        """Widens the values to `codes` and `sectors`, which contain its own; new ones start without history."""
        stock = np.searchsorted(np.array(codes), np.array(self.tail.codes))
        sector = np.searchsorted(np.array(sectors), np.array(self.sectors))

        def wider(value: Any) -> Any:
            if isinstance(value, Average):
                return Average(*(wider(part) for part in value))
            if value.ndim == 1:
                out, columns = np.zeros(len(codes)), stock
            else:
                out, columns = np.full((len(value), len(sectors)), np.nan), sector
            out[..., columns] = value
            return out

        return {name: wider(value) for name, value in self.values.items()}


@dataclass(frozen=True)
class FeaturePanel:
    """All 82 features on the dataset's rows."""

    prices: PricePanel
    """Prices of the computed sessions, and of those before them that features look back on."""
    first: int
    """First row of `prices` that was computed."""
    kept: NDArray[np.int64]
    """[R] flat position `t * N + n` in `prices` of each row of the dataset, ascending."""
    values: NDArray[np.float32]
    """[F, R] in registry order, NaN where missing."""
    return_1d: Matrix
    """R_1 of every cell of `prices`; null before the computed rows."""
    state: FeatureState

    def column(self, name: str) -> NDArray[np.float32]:
        return self.values[FEATURE_NAMES.index(name)]

    def dense(self, name: str) -> NDArray[np.float32]:
        """`[S, N]`, NaN where missing or where the dataset has no row."""
        panel = np.full(self.prices.shape, np.nan, np.float32)
        panel.reshape(-1)[self.kept] = self.column(name)
        return panel


def build_market(
    prices: PricePanel, tables: Mapping[str, pl.DataFrame], config: DatasetConfig, before: FeatureState | None = None
) -> Market:
    """Prices and the other tables as dense panels over the exchange's sessions.

    tables: `index`, and `investor_flows` and `statements` where they exist. before: state to continue; the prices are
    then those after its last session, and its last prices are put before them.

    Raises: InputError when there is no row or no index, or when the index has several codes and none is TOPIX's.
    """
    if before is None and not prices.has_row.any():
        raise InputError("prices: no row is left after quarantine; check the source's prices and listed tables")
    sectors = sorted({*prices.sector.names, *(before.sectors if before else ())} - set(NO_SECTOR))
    sessions = prices.sessions if before is None else np.concatenate([before.sessions, prices.sessions])
    panel = prices if before is None else before.tail.followed_by(prices)
    first = len(sessions) - len(panel.sessions)
    releases = flow_releases(tables.get("investor_flows"), sessions)
    sections = {
        code: releases.sections.index(section)
        for code, section in SECTION_OF_MARKET.items()
        if section in releases.sections
    }
    return Market(
        sessions=sessions,
        codes=panel.codes,
        days_per_year=market_facts(config.market).days_per_year,
        quotes=panel.quotes,
        index_close=_on_sessions(_index_close(tables), sessions),
        investable=panel.is_investable,
        sector_of=panel.sector.numbered({code: g for g, code in enumerate(sectors)}),
        sectors=len(sectors),
        section_of=panel.section.numbered(sections),
        releases=releases,
        documents=disclosures(tables.get("statements"), sessions, panel.codes, config.market, first=first),
        fresh=0 if before is None else len(before.tail.sessions),
        state={} if before is None else before.values_of(panel.codes, sectors),
    )


def normalised(feature: Feature, values: Matrix, market: Market) -> Matrix:
    """Values normalised as the feature declares, in float64; `[S, N]`, or a series."""
    if feature.norm == "ts":
        return ts_zscore(values)
    return cs_normalise(values, market.investable) if feature.norm == "cs" else values


def build_features(
    prices: PricePanel, tables: Mapping[str, pl.DataFrame], config: DatasetConfig, before: FeatureState | None = None
) -> FeaturePanel:
    """All features of every stock that traded within the last 5 sessions. Inputs and errors: `build_market`."""
    market = build_market(prices, tables, config, before)
    panel = prices if before is None else before.tail.followed_by(prices)
    is_kept = _recently_traded(market.close)
    is_kept[: market.fresh] = False
    kept = np.flatnonzero(is_kept)
    values = np.empty((len(REGISTRY), len(kept)), np.float32)
    state = market.state
    with ThreadPoolExecutor(THREADS) as pool:
        for start, stop in _spans(market.fresh, market.rows, len(market.codes)):
            span = replace(market.span(start, stop, OVERLAP_SESSIONS), state=state, new_state={})
            columns = slice(*np.searchsorted(kept, (start * len(market.codes), stop * len(market.codes))))
            _compute(span, is_kept[start:stop], values[:, columns], pool)
            state = span.new_state
    sectors = tuple(sorted({*panel.sector.names} - set(NO_SECTOR)))
    return FeaturePanel(
        prices=panel,
        first=market.fresh,
        kept=kept,
        values=values,
        return_1d=returns(market.close, carry(market.close), 1),
        state=FeatureState(panel.last(OVERLAP_SESSIONS), market.sessions, sectors, state),
    )


def _recently_traded(close: Matrix) -> NDArray[np.bool_]:
    traded = ~np.isnan(close)
    recent = traded.copy()
    for sessions in range(1, RECENT_SESSIONS):
        recent[sessions:] |= traded[: max(len(traded) - sessions, 0)]
    return recent


def _spans(first: int, rows: int, stocks: int) -> Iterator[tuple[int, int]]:
    """Cuts the rows from `first` up to `rows` into spans of at most CELLS_AT_A_TIME cells, but at least one session."""
    length = max(1, CELLS_AT_A_TIME // max(stocks, 1))
    for start in range(first, rows, length):
        yield start, min(start + length, rows)


def _compute(span: Market, kept: NDArray[np.bool_], values: NDArray[np.float32], pool: ThreadPoolExecutor) -> None:
    """Fills `values: [F, R]` with the features of the fresh rows of `span`, on the cells `kept: [S, N]`."""
    by_overlap = {overlap: span.recent(overlap) for overlap in OVERLAPS}
    session = np.repeat(np.arange(len(kept)), kept.sum(axis=1))

    def fill(number: int) -> None:
        feature, out = REGISTRY[number], values[number]
        needed = feature.trace.overlap_sessions
        market = by_overlap[next(overlap for overlap in OVERLAPS if overlap >= needed)]
        result = feature.compute(market)
        if feature.norm == "cs":
            cs_normalise(result[market.fresh :], market.investable[market.fresh :], kept, out)
            return
        if feature.norm == "ts":
            result = ts_zscore(result)
        fresh = result[len(result) - len(kept) :]
        out[:] = fresh[session] if fresh.ndim == 1 else fresh[kept]
        out[np.isnan(out)] = np.nan  # one bit pattern for missing, because values are hashed

    # The longest first: at the end, one of them alone would leave the other thread idle.
    order = sorted(range(len(REGISTRY)), key=lambda number: -REGISTRY[number].trace.overlap_sessions)
    list(pool.map(fill, order))


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


def _on_sessions(index: pl.DataFrame, sessions: Days) -> Matrix:
    series = np.full(len(sessions), np.nan)
    days = day_array(index["Date"])
    row = np.searchsorted(sessions, days)
    is_session = (row < len(sessions)) & (sessions[np.minimum(row, len(sessions) - 1)] == days)
    series[row[is_session]] = index["Close"].to_numpy()[is_session]
    return series
