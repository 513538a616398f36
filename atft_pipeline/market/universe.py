"""Adjusted prices on the exchange's sessions: which rows are investable, which are quarantined, and why.

Every decision on session t uses only what was public at its close: prices and factors up to t, and `listed` as of t.
Where no snapshot precedes, a later one is used, and the row is flagged as back-filled. There is one other exception,
`mask_target`: a jump that reverts later nulls forward returns at the bad row and changes no price, flag or membership.

Adjustment is forward: P~_t = P_t / prod_{s<=t} AdjustmentFactor_s, V~_t = V_t * prod_{s<=t} AdjustmentFactor_s.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from atft_pipeline.config.schema import DatasetConfig
from atft_pipeline.errors import InputError
from atft_pipeline.market import calendar
from atft_pipeline.market.adjustment import Passed, StockState, pass_through
from atft_pipeline.market.liquidity import liquid_rows
from atft_pipeline.market.listed import Listed
from atft_pipeline.market.market_facts import market_facts
from atft_pipeline.market.price_panel import (
    QUOTES,
    Matrix,
    PricePanel,
    compacted,
    day_array,
    positions,
    scattered,
)
from atft_pipeline.market.quarantine import as_quarantine_rows, quarantine_rows
from atft_pipeline.storage.monthly import Days

RAW_QUOTES = (*QUOTES, "AdjustmentFactor")


@dataclass(frozen=True)
class UniverseState:
    """State after a session: from it, later sessions continue as if all had been passed at once."""

    sessions: Days
    """All sessions so far."""
    codes: tuple[str, ...]
    """Every code so far, kept or dropped, ascending."""
    stocks: StockState
    turnover: Matrix
    """[S, N] turnover of the last S sessions; S is the window of the median minus one."""
    factors_stated: bool
    """Whether any row so far has a stated AdjustmentFactor."""

    @staticmethod
    def empty() -> UniverseState:
        return UniverseState(np.empty(0, "datetime64[D]"), (), StockState.of(0), np.empty((0, 0)), False)

    def of_codes(self, codes: Sequence[str]) -> UniverseState:
        """Widens the state to `codes`, which contain its own."""
        turnover = np.full((len(self.turnover), len(codes)), np.nan)
        turnover[:, np.isin(codes, self.codes)] = self.turnover
        stocks = self.stocks.aligned(self.codes, codes)
        return UniverseState(self.sessions, tuple(codes), stocks, turnover, self.factors_stated)


@dataclass(frozen=True)
class PricesResult:
    panel: PricePanel
    """Cells of the sessions of this pass and of the stocks that have ever traded."""
    quarantine: pl.DataFrame
    """rule, decision, Date, Code, detail, known_from; one row per hit, or per code where the whole code is dropped.
    known_from: the session at whose close it was decided, after Date where only a later session shows the fault."""
    state: UniverseState

    @cached_property
    def prices(self) -> pl.DataFrame:
        """The panel as a long table, sorted by Date and Code."""
        return self.panel.frame()

    @cached_property
    def summary(self) -> dict[str, Any]:
        """rows, sessions, stocks, listed_backfilled_rows, quarantine (hits per rule), warnings."""
        rows, backfilled = int(self.panel.has_row.sum()), int(self.panel.is_listed_backfilled.sum())
        late = f"listed: sector and market of {backfilled:,} of {rows:,} rows come from a later snapshot"
        return {
            "rows": rows,
            "sessions": int(self.panel.has_row.any(axis=1).sum()),
            "stocks": int(self.panel.has_row.any(axis=0).sum()),
            "listed_backfilled_rows": backfilled,
            "quarantine": dict(self.quarantine.group_by("rule").len().sort("rule").iter_rows()),
            "warnings": [late] if backfilled else [],
        }


def build_prices(
    tables: Mapping[str, pl.DataFrame],
    config: DatasetConfig,
    before: UniverseState | None = None,
    until: dt.date | None = None,
) -> PricesResult:
    """Builds adjusted prices and universe from `tables`: prices, listed and index as `Source.read` gives them.

    Investable at t: common stock, at least `min_history_sessions` traded sessions up to t, last traded close at or
    above the market's price floor, traded within 5 sessions. Liquid: investable, and the median turnover of the
    trailing 20 sessions at or above the market's floor; the median leaves out untraded sessions and needs two thirds.

    before: state to continue; the prices are then those after its last session. until: the last day whose sessions
    count, by default the last day of prices or index, since the index may have sessions without a trade.

    Raises: InputError when fewer than two common stocks trade.
    """
    facts = market_facts(config.market)
    before = before or UniverseState.empty()
    prices = tables["prices"]
    until = until or last_day(prices, tables["index"])
    sessions, row_session, closed = _on_exchange_days(prices, config.market, before.sessions, until)
    codes = sorted({*before.codes, *prices["Code"].unique().to_list()})
    state = before.of_codes(codes)
    raw, present = _dense(prices, row_session, positions(prices["Code"], codes), (len(sessions), len(codes)))
    stated = np.flatnonzero(np.isfinite(raw["AdjustmentFactor"]).any(axis=1))
    factors_from = 0 if state.factors_stated else int(stated[0]) if len(stated) else len(sessions)
    listed = Listed.of(tables["listed"], codes, sessions, config.market)
    passed, hits = pass_through(
        raw,
        present,
        listed.listings,
        state.stocks,
        first_session=len(before.sessions),
        factors_from=factors_from,
        price_floor=facts.price_floor,
        min_history_sessions=config.min_history_sessions,
    )
    all_sessions = np.concatenate([before.sessions, sessions])
    quarantine = pl.concat([closed, *quarantine_rows(hits, all_sessions, len(before.sessions), codes, listed)])
    traded = state.stocks.history > 0
    _require_stocks(np.array(codes)[traded], quarantine)
    turnover = np.concatenate([state.turnover, raw["TurnoverValue"]])
    is_liquid = passed.is_investable & liquid_rows(turnover, len(state.turnover), facts)
    return PricesResult(
        _panel(sessions, codes, raw, passed, is_liquid, listed, traded),
        quarantine.sort("Date", "Code", "rule"),
        UniverseState(
            sessions=all_sessions,
            codes=tuple(codes),
            stocks=state.stocks,
            turnover=turnover[len(turnover) - min(len(turnover), facts.turnover_window_sessions - 1) :].copy(),
            factors_stated=state.factors_stated or len(stated) > 0,
        ),
    )


def last_day(prices: pl.DataFrame, index: pl.DataFrame) -> dt.date:
    """The last day of both tables together."""
    days = pl.concat([prices["Date"], index["Date"]]).max()
    assert isinstance(days, dt.date)
    return days


def _require_stocks(codes: NDArray[np.str_], quarantine: pl.DataFrame) -> None:
    if len(codes) == 0:
        counts = ", ".join(f"{rule} {n}" for rule, n in quarantine.group_by("rule").len().sort("rule").iter_rows())
        raise InputError(
            f"prices: no traded row of a common stock is left ({counts or 'Volume is 0 throughout'}); check Code"
            " against the table listed, and prices and Volume"
        )
    if len(codes) == 1:
        raise InputError(
            f"prices: one stock only (Code {codes[0]}) is left of the common stocks; a cross-section needs several"
        )


def _panel(
    sessions: Days,
    codes: Sequence[str],
    raw: Mapping[str, Matrix],
    passed: Passed,
    is_liquid: NDArray[np.bool_],
    listed: Listed,
    traded: NDArray[np.bool_],
) -> PricePanel:
    """The panel of the stocks that have ever traded; funds and unlisted codes get no columns."""

    columns = np.flatnonzero(traded)

    def kept(cells: NDArray[Any]) -> NDArray[Any]:
        return compacted(cells, columns)

    listing = kept(passed.listing)
    return PricePanel(
        sessions=sessions,
        codes=tuple(np.array(codes)[traded].tolist()),
        quotes={name: kept(raw[name]) for name in QUOTES},
        cumulative_factor=kept(passed.cumulative_factor),
        is_traded=kept(passed.is_traded),
        is_investable=kept(passed.is_investable),
        is_liquid=kept(is_liquid),
        is_listed_backfilled=kept(passed.is_backfilled),
        has_row=kept(passed.has_row),
        sector=listed.sector.at(listing),
        section=listed.section.at(listing),
    )


# --- rows -------------------------------------------------------------------------------------------------------------


def _on_exchange_days(
    prices: pl.DataFrame, market: str, before: Days, until: dt.date
) -> tuple[Days, NDArray[np.int64], pl.DataFrame]:
    """Sessions, the session of each row (−1 on a closed day), and a hit per closed day that has rows.

    A session is a day with a trade, or a session of the exchange's calendar, with or without rows: in Tokyo nothing
    traded on 2020-10-01. Outside the calendar's range only days with a trade are sessions.

    Raises: InputError where something traded on a day that the calendar calls closed: the data are another market's.
    """
    volume = pl.col("Volume")
    priced = pl.any_horizontal(pl.col("Open", "High", "Low", "Close").is_finite().fill_null(value=False))
    by_day = prices.group_by("Date").agg(rows=pl.len(), traded=volume.ne(0).fill_null(priced).any()).sort("Date")
    days = day_array(by_day["Date"])
    first = before[-1] + 1 if len(before) else days[0]
    calendar_sessions = calendar.known_sessions(market, first, until)
    traded = days[by_day["traded"].to_numpy()]
    calendar.require_sessions(market, traded)
    sessions = np.union1d(traded, calendar_sessions)
    row = np.searchsorted(sessions, days)
    is_session = np.isin(days, sessions)
    closed = by_day.filter(~pl.Series(is_session)).with_columns(Code=pl.lit(""), known_from=pl.col("Date"))
    hits = as_quarantine_rows("no_trade_date", closed, pl.format("{} rows", "rows"))
    day_of_row = np.searchsorted(days, day_array(prices["Date"]))
    return sessions, np.where(is_session, row, -1)[day_of_row], hits


def _dense(
    prices: pl.DataFrame, t: NDArray[np.int64], n: NDArray[np.int32], shape: tuple[int, int]
) -> tuple[dict[str, Matrix], NDArray[np.bool_]]:
    """`RAW_QUOTES` as `[T, N]`, and where there is a row."""
    kept = None if (t >= 0).all() else np.flatnonzero(t >= 0)
    cells = t * shape[1] + n
    cells = cells if kept is None else cells[kept]

    def values(name: str) -> Matrix:
        column = prices[name].cast(pl.Float64).to_numpy()
        return column if kept is None else column[kept]

    raw = {name: scattered(values(name), cells, shape, np.nan) for name in RAW_QUOTES}
    return raw, scattered(np.ones(len(cells), np.bool_), cells, shape, absent=False)
