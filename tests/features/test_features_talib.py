"""The technical indicators compared with TA-Lib, an independent implementation, on a stock without gaps.

TA-Lib has no nulls: it starts when its window is full, while a feature starts at two thirds of it. Values are compared
from TA-Lib's first one on. Where a definition differs, the test says how and shows it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import talib
from markets.eventful_market import events
from markets.market_factory import QUIET, panels_of

from atft_pipeline.features.registry import FEATURE_NAMES, REGISTRY

Array = Any
YEAR_ROOT = np.sqrt(245)


@dataclass(frozen=True)
class Quotes:
    """One stock without a gap, and the index, as TA-Lib takes them."""

    open: Array
    high: Array
    low: Array
    close: Array
    volume: Array
    turnover: Array
    index: Array

    @property
    def ret(self) -> Array:
        return talib.ROCP(self.close, 1)

    @property
    def mkt_ret(self) -> Array:
        return talib.ROCP(self.index, 1)


def quotes(market: str) -> tuple[int, Quotes]:
    """The first stock that trades on every session, and its column."""
    dense = panels_of(market)
    n = int(np.flatnonzero(~np.isnan(dense.close).any(axis=0))[0])
    columns = ("Open", "High", "Low", "Close", "Volume", "TurnoverValue")
    return n, Quotes(*(np.ascontiguousarray(dense.quotes[c][:, n]) for c in columns), dense.index_close.copy())


def sample_std(x: Array, window: int) -> Array:
    """TA-Lib's STDDEV divides by n; a volatility here divides by n − 1."""
    return talib.STDDEV(x, window) * np.sqrt(window / (window - 1))


def from_second(indicator: Callable[[Array], Array], x: Array) -> Array:
    """TA-Lib's sums never recover from a leading null: the indicator runs without it and is put back."""
    return np.concatenate([[np.nan], indicator(np.ascontiguousarray(x[1:]))])


def percent_b(x: Array) -> Array:
    upper, _, lower = talib.BBANDS(x, 20, 2.0, 2.0)
    return (x - lower) / (upper - lower)


def width(x: Array) -> Array:
    upper, middle, lower = talib.BBANDS(x, 20, 2.0, 2.0)
    return (upper - lower) / middle


def gap(x: Array) -> Array:
    return talib.EMA(x, 5) / talib.EMA(x, 20) - 1


def correlation(q: Quotes) -> Array:
    found = talib.CORREL(np.ascontiguousarray(q.mkt_ret[1:]), np.ascontiguousarray(q.ret[1:]), 60)
    return np.concatenate([[np.nan], found])


STOCK: dict[str, Callable[[Quotes], Array]] = {
    **{f"returns_{h}d": lambda q, h=h: talib.ROCP(q.close, h) for h in (1, 5, 10, 20, 60)},
    **{
        f"volatility_{w}d": lambda q, w=w: from_second(lambda r: sample_std(r, w), q.ret) * YEAR_ROOT
        for w in (5, 10, 20, 60)
    },
    "parkinson_volatility_20d": lambda q: (
        np.sqrt(talib.SMA(np.log(q.high / q.low) ** 2, 20) / (4 * np.log(2))) * YEAR_ROOT
    ),
    # Both start an EMA as the mean of its first span.
    **{f"price_to_ema_{w}": lambda q, w=w: q.close / talib.EMA(q.close, w) - 1 for w in (5, 20, 200)},
    "ma_gap_5_20": lambda q: gap(q.close),
    "price_to_sma_60": lambda q: q.close / talib.SMA(q.close, 60) - 1,
    "momentum_12_1": lambda q: np.concatenate([np.full(21, np.nan), talib.ROCP(q.close, 231)[:-21]]),
    "bb_position": lambda q: percent_b(q.close),
    "bb_width": lambda q: width(q.close),
    # Both seed Wilder's average with the mean of the first changes.
    **{f"rsi_{w}": lambda q, w=w: talib.RSI(q.close, w) for w in (2, 14)},
    "stoch_k_14": lambda q: talib.STOCHF(q.high, q.low, q.close, 14, 1)[0] / 100,
    "close_location": lambda q: talib.STOCHF(q.high, q.low, q.close, 1, 1)[0] / 100,
    "high_52w_ratio": lambda q: q.close / talib.MAX(q.high, 252),
    **{f"volume_ratio_{w}": lambda q, w=w: np.log(q.volume / talib.SMA(q.volume, w)) for w in (5, 20)},
    "amihud_illiquidity_20d": lambda q: np.log(from_second(lambda x: talib.SMA(x, 20), np.abs(q.ret) / q.turnover)),
    # TA-Lib's BETA takes prices, makes simple returns of them, and regresses the second on the first.
    "beta_60d": lambda q: talib.BETA(q.index, q.close, 60),
    "corr_mkt_60d": correlation,
    "alpha_1d": lambda q: q.ret - talib.BETA(q.index, q.close, 60) * q.mkt_ret,
    "trend_align_mkt": lambda q: np.where(np.isnan(gap(q.close)), np.nan, gap(q.close) * gap(q.index) > 0),
}
INDEX: dict[str, Callable[[Quotes], Array]] = {
    **{f"mkt_returns_{h}d": lambda q, h=h: talib.ROCP(q.index, h) for h in (1, 5, 10, 20)},
    "mkt_ma_gap_5_20": lambda q: gap(q.index),
    "mkt_ema20_slope_3": lambda q: talib.ROCP(talib.EMA(q.index, 20), 3),
    "mkt_volatility_20d": lambda q: from_second(lambda r: sample_std(r, 20), q.mkt_ret) * YEAR_ROOT,
    "mkt_bull_200": lambda q: np.where(
        np.isnan(talib.EMA(q.index, 200)), np.nan, q.index > talib.EMA(q.index, 200)
    ),
    "mkt_drawdown": lambda q: q.index / talib.MAX(q.index, 252) - 1,
    "mkt_bb_width": lambda q: width(q.index),
    "mkt_bb_position": lambda q: percent_b(q.index),
}  # fmt: skip


def computed(name: str, market: str = QUIET) -> tuple[Array, Quotes]:
    """The feature's own values, of the stock where it has one column a stock."""
    n, q = quotes(market)
    values = REGISTRY[FEATURE_NAMES.index(name)].compute(panels_of(market))
    return (values if values.ndim == 1 else values[:, n]), q


@pytest.mark.parametrize("name", [*STOCK, *INDEX])
def test_feature_equals_talib_where_the_definition_is_the_same(name: str) -> None:
    found, q = computed(name)
    expected = (STOCK | INDEX)[name](q)
    there = ~np.isnan(expected)
    assert there.sum() > 150, "TA-Lib must have values to compare"
    # STDDEV and BETA subtract sums of squares, which leaves some 1e-12 of a price's square.
    np.testing.assert_allclose(found[there], expected[there], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "event"),
    [
        *[(f"price_to_ema_{w}", event) for w in (5, 20, 200) for event in ("no_trade", "halt_with_empty_rows")],
        *[(name, event) for name in ("rsi_2", "rsi_14") for event in ("no_trade", "halt")],
        ("ma_gap_5_20", "stop_and_return"),
    ],
)
def test_average_that_steps_over_halts_equals_talib_on_the_sessions_with_a_price(name: str, event: str) -> None:
    """An RSI does so over as many sessions as a close is carried: over a longer halt it has no change to count."""
    dense = panels_of("segments")
    n = dense.codes.index(next(e.code for e in events("segments") if e.name == event))
    close = dense.close[:, n]
    traded = np.flatnonzero(~np.isnan(close))
    assert len(traded) < len(close) - 1
    q = Quotes(*[np.ascontiguousarray(close[traded])] * 7)
    expected = STOCK[name](q)
    found = REGISTRY[FEATURE_NAMES.index(name)].compute(dense)[:, n]
    there = ~np.isnan(expected)
    np.testing.assert_allclose(found[traded][there], expected[there], rtol=1e-9, atol=1e-9)
    assert np.isnan(found[np.isnan(close)]).all()


def test_features_start_at_two_thirds_of_a_window_where_talib_waits_for_all_of_it() -> None:
    found, q = computed("price_to_sma_60")
    expected = STOCK["price_to_sma_60"](q)
    assert np.flatnonzero(~np.isnan(found))[0] == 39
    assert np.flatnonzero(~np.isnan(expected))[0] == 59


def test_macd_has_another_start_than_talib_and_converges() -> None:
    """TA-Lib starts both averages on the 26th session, the fast one as the mean of the 12 sessions before it. Here each
    EMA starts as the mean of its own first span, as every other EMA does, and the signal 8 sessions after the 26th."""
    found, q = computed("macd_histogram")
    expected = talib.MACD(q.close, 12, 26, 9)[2] / q.close
    first = 26 - 1 + 9 - 1
    assert np.flatnonzero(~np.isnan(found))[0] == np.flatnonzero(~np.isnan(expected))[0] == first
    difference = np.abs(found - expected)
    assert difference[first] > 1e-7, "the starts differ"
    # The slowest of what remains is the fast average, 11/13 a session, seen through the signal.
    assert np.nanmax(difference[first + 150 :]) < 1e-9
    np.testing.assert_allclose(found[first + 200 :], expected[first + 200 :], atol=1e-12)


def test_macd_equals_talib_where_its_parts_are_composed() -> None:
    found, q = computed("macd_histogram")
    macd = talib.EMA(q.close, 12) - talib.EMA(q.close, 26)
    signal = np.concatenate([np.full(25, np.nan), talib.EMA(np.ascontiguousarray(macd[25:]), 9)])
    expected = (macd - signal) / q.close
    assert np.isnan(found[:33]).all()
    np.testing.assert_allclose(found[33:], expected[33:], rtol=1e-9, atol=1e-12)


def test_rsi_and_stochastic_at_nothing_over_nothing_have_a_middle_where_talib_has_an_end() -> None:
    """On a price that never moves TA-Lib answers 0; here nothing over nothing is the middle."""
    dense = panels_of(QUIET)
    flat = np.full((60, 1), 100.0)
    quotes = dict.fromkeys(dense.quotes, flat)
    still = dataclasses.replace(dense, quotes=quotes, memo={})
    rows = {row.name: row for row in REGISTRY}
    assert rows["rsi_14"].compute(still)[-1, 0] == 50.0
    assert talib.RSI(flat[:, 0], 14)[-1] == 0.0
    assert rows["stoch_k_14"].compute(still)[-1, 0] == 0.5
    assert talib.STOCHF(flat[:, 0], flat[:, 0], flat[:, 0], 14, 1)[0][-1] == 0.0
    assert rows["bb_position"].compute(still)[-1, 0] == 0.5
