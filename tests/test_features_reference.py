"""All 82 features against slow plain Python: loops over sessions, None for null, straight from FEATURES.md.

The prices table is read cell by cell, flows and statements row by row from the raw tables, so nothing is shared with
the code under test but its inputs.
"""

from __future__ import annotations

import datetime as dt
import math
import statistics
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from market_factory import CONFIG, raw_tables, sample, sample_market, sessions_of

from atft_pipeline.features.panel import normalised
from atft_pipeline.features.registry import REGISTRY, Feature
from atft_pipeline.trading_calendar import MARKETS, close_time

Value = float | None
Series = Callable[[int], Value]
YEAR_ROOT = math.sqrt(MARKETS[CONFIG.market].days_per_year)


def window(series: Series, t: int, length: int, least: int | None = None) -> list[float] | None:
    """Non-null values of the last `length` sessions, None when fewer than two thirds are there."""
    values = [v for s in range(max(0, t - length + 1), t + 1) if (v := series(s)) is not None]
    needed = math.ceil(length * 2 / 3) if least is None else least
    return values if len(values) >= needed else None


def divided(a: Value, b: Value) -> Value:
    return None if a is None or b is None or b == 0 else a / b


def minus(a: Value, b: Value) -> Value:
    return None if a is None or b is None else a - b


def change(a: Value, b: Value) -> Value:
    return minus(divided(a, b), 1.0)


def mean(values: Sequence[float] | None) -> Value:
    return None if not values else math.fsum(values) / len(values)


def std(values: Sequence[float] | None, ddof: int = 1) -> Value:
    if not values or len(values) <= ddof:
        return None
    return statistics.stdev(values) if ddof else statistics.pstdev(values)


def zscore(series: Series, t: int, length: int = 252, least: int | None = 60) -> Value:
    values = window(series, t, length, least)
    return divided(minus(series(t), mean(values)), std(values))


def ema(series: Series, t: int, first: int, alpha: float | None = None) -> Value:
    """Mean of the first `first` values, then alpha = 2 / (first + 1) unless given; null on a null session."""
    alpha = 2 / (first + 1) if alpha is None else alpha
    state, start = None, []
    for s in range(t + 1):
        value = series(s)
        if value is None:
            continue
        if state is None:
            start.append(value)
            state = mean(start) if len(start) == first else None
        else:
            state = alpha * value + (1 - alpha) * state
    return state if series(t) is not None else None


def flag(condition: Callable[..., bool], *values: Value) -> Value:
    return None if any(v is None for v in values) else float(condition(*values))


class Slow:
    """The sample market, cell by cell."""

    def __init__(self) -> None:
        prices = sample()[0].prices
        self.tables = raw_tables()
        self.sessions = sessions_of(prices)
        self.codes = prices["Code"].unique().sort().to_list()
        self.cells = {(row["Code"], row["Date"]): row for row in prices.iter_rows(named=True)}
        self.index_close = dict(self.tables["index"].select("Date", "Close").iter_rows())
        self.ret = cache(self._ret)
        self.mkt = cache(self._mkt)
        self.beta = cache(lambda n, t: self.regression(n, t, self.mkt_series(1))[0])
        self.sector_median = cache(self._sector_median)
        self.known = cache(self._known)
        self.flow_weeks = cache(self._flow_weeks)

    def cell(self, n: int, t: int, column: str) -> Any:
        if t < 0:
            return None
        row = self.cells.get((self.codes[n], self.sessions[t]))
        return None if row is None else row[column]

    def series(self, n: int, column: str) -> Series:
        return lambda t: self.cell(n, t, column)

    def carried(self, n: int, t: int) -> Value:
        return next((c for k in range(6) if (c := self.cell(n, t - k, "Close")) is not None), None)

    def _ret(self, n: int, h: int, t: int) -> Value:
        return change(self.cell(n, t, "Close") if h == 1 else self.carried(n, t), self.carried(n, t - h))

    def returns(self, n: int, h: int = 1) -> Series:
        return lambda t: self.ret(n, h, t)

    def index(self, t: int) -> Value:
        return self.index_close.get(self.sessions[t]) if t >= 0 else None

    def _mkt(self, h: int, t: int) -> Value:
        return change(self.index(t), self.index(t - h))

    def mkt_series(self, h: int) -> Series:
        return lambda t: self.mkt(h, t)

    def regression(self, n: int, t: int, x: Series) -> tuple[Value, Value, Value]:
        both = [(x(s), self.ret(n, 1, s)) for s in range(max(0, t - 59), t + 1)]
        pairs = [(a, b) for a, b in both if a is not None and b is not None]
        if len(pairs) < 40:
            return None, None, None
        xs, ys = zip(*pairs, strict=True)
        slope = statistics.covariance(xs, ys) / statistics.variance(xs)
        residual = std([b - slope * a for a, b in pairs])
        return slope, statistics.correlation(xs, ys), residual

    def sector(self, n: int, t: int) -> Any:
        return self.cell(n, t, "Sector33Code")

    def _sector_median(self, sector: Any, h: int, t: int) -> Value:
        values = [
            r for n in range(len(self.codes))
            if self.cell(n, t, "is_investable") and self.sector(n, t) == sector and (r := self.ret(n, h, t)) is not None
        ]  # fmt: skip
        return statistics.median(values) if len(values) >= 5 else None

    # --- raw tables, row by row ---

    def _flow_weeks(self, section: str, t: int) -> tuple[list[dict[str, Any]], int]:
        """Weeks published before session t, oldest first, and sessions since the newest one was."""
        today = self.sessions[t]
        table = self.tables["investor_flows"].iter_rows(named=True)
        rows = [r for r in table if r["Section"] == section and r["PublishedDate"] < today]
        rows.sort(key=lambda r: r["EndDate"])
        # The sample market publishes each week once and misses none.
        assert len({r["EndDate"] for r in rows}) == len(rows)
        published = rows[-1]["PublishedDate"]
        before = np.busday_count(
            published + dt.timedelta(days=1), max(self.sessions[0], published + dt.timedelta(days=1))
        )
        return rows, sum(published < day <= today for day in self.sessions) + int(before)

    def _known(self, n: int, t: int) -> list[dict[str, Any]]:
        """Documents of the stock public at the close of session t, in order of disclosure."""
        found = []
        for row in self.tables["statements"].iter_rows(named=True):
            day = dt.date.fromisoformat(row["DisclosedDate"])
            if row["LocalCode"] == self.codes[n] and (
                day < self.sessions[t]
                or (day == self.sessions[t] and dt.time.fromisoformat(row["DisclosedTime"]) < close_time("tokyo", day))
            ):
                found.append(row | {"day": day})
        return found


SLOW = cache(Slow)


def number(row: dict[str, Any] | None, column: str) -> Value:
    return float(row[column]) if row is not None and row[column] not in ("", "-", "*") else None


def growth(a: Value, b: Value) -> Value:
    return divided(minus(a, b), None if b is None else abs(b))


def statements(m: Slow, n: int, t: int) -> dict[str, Value]:
    """The 13 statement features: every document of the sample has results, periods come in order."""
    documents = m.known(n, t)
    last = documents[-1] if documents and (m.sessions[t] - documents[-1]["day"]).days <= 400 else None
    out: dict[str, Value] = {"is_stmt_valid": float(last is not None)}
    year = last and last["CurrentFiscalYearEndDate"]
    ago = None
    if last is not None:
        same = [d for d in documents if d["TypeOfCurrentPeriod"] == last["TypeOfCurrentPeriod"]]
        ago = next((d for d in same if int(d["CurrentFiscalYearEndDate"][:4]) == int(year[:4]) - 1), None)
    for short, column in (("sales", "NetSales"), ("op", "OperatingProfit"), ("np", "Profit")):
        out[f"stmt_yoy_{short}"] = growth(number(last, column), number(ago, column))
    sales = number(last, "NetSales")
    out["stmt_opm"], out["stmt_npm"] = (divided(number(last, c), sales) for c in ("OperatingProfit", "Profit"))
    for short, column in (("op", "OperatingProfit"), ("np", "Profit")):
        forecasts = []  # (fiscal year's end, forecast), as they appeared
        for d in documents:
            end = d["CurrentFiscalYearEndDate"]
            following = f"{int(end[:4]) + 1}{end[4:]}"
            forecasts += [(following, v)] if (v := number(d, f"NextYearForecast{column}")) is not None else []
            forecasts += [(end, v)] if (v := number(d, f"Forecast{column}")) is not None else []
        in_force = [v for end, v in forecasts if last is not None and end[:7] == year[:7]]
        out[f"stmt_progress_{short}"] = divided(number(last, column), in_force[-1] if in_force else None)
        revised = [v for end, v in forecasts if end[:7] == forecasts[-1][0][:7]] if forecasts else []
        out[f"stmt_rev_fore_{short}"] = growth(revised[-1], revised[-2]) if last and len(revised) > 1 else None
    out["stmt_roe"] = divided(number(last, "Profit"), number(last, "Equity"))
    out["stmt_roa"] = divided(number(last, "Profit"), number(last, "TotalAssets"))
    out["stmt_days_since"] = float((m.sessions[t] - last["day"]).days) if last else None
    recent = t >= 5 and len(m.known(n, t - 5)) < len(documents)
    out["stmt_recent_flag"] = float(recent) if last else None
    return out


def flows(m: Slow, n: int, t: int) -> dict[str, Value]:
    section = {"0111": "TSEPrime", "0112": "TSEStandard", "0113": "TSEGrowth"}[m.cell(n, t, "MarketCode")]
    rows, since = m.flow_weeks(section, t)
    types = [c.removesuffix("Balance") for c in rows[0] if c.endswith("Balance")]
    investors = [name for name in types if name not in ("Total", "Proprietary", "Brokerage")]
    assert len(investors) == 10

    def weekly(name: str) -> Series:
        return lambda w: divided(rows[w][f"{name}Balance"], rows[w][f"{name}Total"]) if w >= 0 else None

    def total(w: int) -> Value:
        return rows[w]["TotalTotal"]

    def smart(w: int) -> Value:
        return minus(zscore(weekly("Foreigners"), w, 52, None), zscore(weekly("Individuals"), w, 52, None))

    now = len(rows) - 1
    return {
        "flow_foreign_net_ratio": weekly("Foreigners")(now),
        "flow_individual_net_ratio": weekly("Individuals")(now),
        "flow_activity_ratio": divided(total(now), mean(window(total, now, 52))),
        "flow_breadth_pos": sum(rows[now][f"{name}Balance"] > 0 for name in investors) / len(investors),
        "flow_foreign_net_z": zscore(weekly("Foreigners"), now, 52, None),
        "flow_individual_net_z": zscore(weekly("Individuals"), now, 52, None),
        "flow_activity_z": zscore(total, now, 52, None),
        "flow_smart_idx": smart(now),
        "flow_smart_mom4": minus(smart(now), mean([smart(now - k) for k in range(4)])),  # type: ignore[misc]
        "flow_shock_flag": flag(lambda x: abs(x) >= 2, smart(now)),
        "flow_impulse": 0.5 ** (since - 1),
        "flow_days_since": since / 5,
        "is_flow_valid": 1.0,
    }


def bands(series: Series, t: int) -> tuple[Value, Value]:
    """%B and band width."""
    values, price = window(series, t, 20), series(t)
    middle, sigma = mean(values), std(values, ddof=0)
    if middle is None or sigma is None:
        return None, None
    position = None if price is None else 0.5 if sigma == 0 else (price - (middle - 2 * sigma)) / (4 * sigma)
    return position, 4 * sigma / middle


def rsi(m: Slow, n: int, t: int, length: int) -> Value:
    def step(s: int) -> Value:
        return minus(m.cell(n, s, "Close"), m.carried(n, s - 1))

    def side(sign: int) -> Series:
        return lambda s: None if (d := step(s)) is None else max(sign * d, 0.0)

    gain, loss = ema(side(1), t, length, 1 / length), ema(side(-1), t, length, 1 / length)
    if gain is None or loss is None:
        return None
    return 50.0 if gain + loss == 0 else 100 * gain / (gain + loss)


def position(price: Value, low: Value, high: Value) -> Value:
    if price is None or low is None or high is None:
        return None
    return 0.5 if high == low else (price - low) / (high - low)


def gap(series: Series, t: int) -> Value:
    return change(ema(series, t, 5), ema(series, t, 20))


def stock(m: Slow, n: int, t: int) -> dict[str, Value]:
    close, high, low, volume = (m.series(n, name) for name in ("Close", "High", "Low", "Volume"))
    r = m.returns(n)
    out: dict[str, Value] = {f"returns_{h}d": m.ret(n, h, t) for h in (1, 5, 10, 20, 60)}
    out["overnight_return_1d"] = change(m.cell(n, t, "Open"), m.carried(n, t - 1))
    for w in (5, 10, 20, 60):
        sigma = std(window(r, t, w))
        out[f"volatility_{w}d"] = None if sigma is None else sigma * YEAR_ROOT

    def squared_range(s: int) -> Value:
        return None if high(s) is None else math.log(high(s) / low(s)) ** 2  # type: ignore[operator]

    parkinson = mean(window(squared_range, t, 20))
    out["parkinson_volatility_20d"] = (
        None if parkinson is None else math.sqrt(parkinson / (4 * math.log(2))) * YEAR_ROOT
    )
    for span in (5, 20, 200):
        out[f"price_to_ema_{span}"] = change(close(t), ema(close, t, span))
    out["ma_gap_5_20"] = gap(close, t)
    out["price_to_sma_60"] = change(close(t), mean(window(close, t, 60)))
    out["momentum_12_1"] = change(m.carried(n, t - 21), m.carried(n, t - 252))
    out["bb_position"], out["bb_width"] = bands(close, t)
    out["rsi_2"], out["rsi_14"] = rsi(m, n, t, 2), rsi(m, n, t, 14)

    def macd(s: int) -> Value:
        return minus(ema(close, s, 12), ema(close, s, 26))

    remembered = cache(macd)
    out["macd_histogram"] = divided(minus(remembered(t), ema(remembered, t, 9)), close(t))
    highs, lows, year = window(high, t, 14), window(low, t, 14), window(high, t, 252)
    out["stoch_k_14"] = position(close(t), min(lows) if lows else None, max(highs) if highs else None)
    out["close_location"] = position(close(t), low(t), high(t))
    out["high_52w_ratio"] = divided(close(t), max(year) if year else None)
    for w in (5, 20):
        relative = divided(volume(t), mean(window(volume, t, w)))
        out[f"volume_ratio_{w}"] = None if not relative else math.log(relative)

    def impact(s: int) -> Value:
        return divided(None if r(s) is None else abs(r(s)), m.cell(n, s, "TurnoverValue"))  # type: ignore[arg-type]

    amihud = mean(window(impact, t, 20))
    out["amihud_illiquidity_20d"] = None if not amihud else math.log(amihud)
    out["is_ma_valid"] = float(sum(close(s) is not None for s in range(t + 1)) >= 200)
    return out


def market(m: Slow, t: int) -> dict[str, Value]:
    out: dict[str, Value] = {f"mkt_returns_{h}d": m.mkt(h, t) for h in (1, 5, 10, 20)}
    out["mkt_ma_gap_5_20"] = gap(m.index, t)
    out["mkt_ema20_slope_3"] = change(ema(m.index, t, 20), ema(m.index, t - 3, 20))

    def volatility(s: int) -> Value:
        sigma = std(window(m.mkt_series(1), s, 20))
        return None if sigma is None else sigma * YEAR_ROOT

    out["mkt_volatility_20d"] = volatility(t)
    out["mkt_bull_200"] = flag(lambda c, e: c > e, m.index(t), ema(m.index, t, 200))
    out["mkt_high_vol"] = flag(lambda z: z > 1, zscore(volatility, t))
    above = [
        flag(lambda c, e: c > e, m.cell(n, t, "Close"), ema(m.series(n, "Close"), t, 200))
        for n in range(len(m.codes)) if m.cell(n, t, "is_investable")
    ]  # fmt: skip
    known = [value for value in above if value is not None]
    out["mkt_breadth_200"] = mean(known) if len(known) >= 10 else None
    year = window(m.index, t, 252)
    out["mkt_drawdown"] = change(m.index(t), max(year) if year else None)
    out["mkt_bb_position"], out["mkt_bb_width"] = bands(m.index, t)
    return out


def stock_and_market(m: Slow, n: int, t: int) -> dict[str, Value]:
    beta, corr, idio = m.regression(n, t, m.mkt_series(1))
    spread = std(window(lambda s: m.beta(n, s), t, 60))
    alphas = {
        f"alpha_{h}d": minus(m.ret(n, h, t), None if beta is None or m.mkt(h, t) is None else beta * m.mkt(h, t))  # type: ignore[operator]
        for h in (1, 5)
    }
    signs = flag(lambda a, b: np.sign(a) == np.sign(b), gap(m.series(n, "Close"), t), gap(m.index, t))
    return alphas | {
        "beta_60d": beta,
        "beta_stability_60d": None if spread is None else 1 / (spread + 1e-6),
        "corr_mkt_60d": corr,
        "idio_volatility_60d": idio,
        "trend_align_mkt": signs,
    }


def sector(m: Slow, n: int, t: int) -> dict[str, Value]:
    own = m.sector(n, t)

    def step(s: int) -> Value:
        return m.sector_median(own, 1, s)

    def own_step(s: int) -> Value:
        return m.sector_median(m.sector(n, s), 1, s) if s >= 0 and m.sector(n, s) else None

    @cache
    def level(s: int) -> Value:
        return None if step(s) is None else math.prod(1 + (step(k) or 0.0) for k in range(s + 1))

    month = window(step, t, 20)
    beta = m.regression(n, t, own_step)[0]
    expected = None if beta is None or own_step(t) is None else beta * own_step(t)  # type: ignore[operator]
    return {
        "sec_mom_20": math.fsum(month) if month else None,
        "sec_ret_5d": m.sector_median(own, 5, t),
        "sec_vol_20_z": zscore(cache(lambda s: std(window(step, s, 20))), t),
        "sec_gap_5_20": gap(level, t),
        "alpha_vs_sec_1d": minus(m.ret(n, 1, t), expected),
        "is_sector_valid": float(step(t) is not None),
    }


@cache
def reference(n: int, t: int) -> dict[str, Value]:
    m = SLOW()
    parts = [f(m, n, t) for f in (stock, stock_and_market, sector, flows, statements)]
    return market(m, t) | {name: value for part in parts for name, value in part.items()}


@cache
def sampled_cells() -> tuple[tuple[int, int], ...]:
    """Two stocks at early, middle and late sessions, the thinnest stock, and a session in which it did not trade."""
    closes = sample_market().close
    thinnest = int(np.argmax(np.isnan(closes[-200:]).sum(axis=0) * ~np.isnan(closes[-200]) * ~np.isnan(closes[-1])))
    quiet = 229 + int(np.flatnonzero(np.isnan(closes[230:, thinnest]))[0]) + 1
    assert np.isnan(closes[quiet, thinnest])
    ordinary = [n for n in (3, 20) if n != thinnest]
    times = (4, 70, 205, 330, len(closes) - 1)
    return (*((n, t) for n in ordinary for t in times), (thinnest, quiet), (thinnest, len(closes) - 1))


@pytest.mark.parametrize("feature", REGISTRY, ids=lambda feature: feature.name)
def test_feature_equals_its_slow_reference(feature: Feature) -> None:
    market_panels = sample_market()
    values = feature.compute(market_panels)
    compared = 0
    for n, t in sampled_cells():
        expected = reference(n, t)[feature.name]
        found = values[t] if values.ndim == 1 else values[t, n]
        assert np.isnan(found) == (expected is None), f"{feature.name} at {n}, {t}: {found}, expected {expected}"
        if expected is not None:
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-12), f"{feature.name} at stock {n}, session {t}"
            compared += 1
    assert compared >= 2, "the sample must hold values to compare"


def slow_cs(values: np.ndarray, member: np.ndarray) -> np.ndarray:
    inside = np.array([v for v, is_member in zip(values, member, strict=True) if is_member and not math.isnan(v)])
    if len(inside) < 10:
        return np.full(len(values), np.nan)
    centre = np.median(inside)
    mad = np.median(np.abs(inside - centre))
    low, high = (centre - 5 * 1.4826 * mad, centre + 5 * 1.4826 * mad) if mad > 0 else (-np.inf, np.inf)
    clipped = np.clip(inside, low, high)
    if clipped.std() < 1e-12:
        return np.full(len(values), np.nan)
    return np.clip((np.clip(values, low, high) - clipped.mean()) / clipped.std(), -5, 5)


@pytest.mark.parametrize("feature", REGISTRY, ids=lambda feature: feature.name)
def test_normalisation_equals_its_slow_reference(feature: Feature) -> None:
    panels = sample_market()
    values = feature.compute(panels)
    found = normalised(feature, values, panels)
    for t in (4, 61, 205, 330, len(values) - 1):
        if feature.norm == "raw":
            np.testing.assert_array_equal(found[t], values[t])
        elif feature.norm == "cs":
            expected = slow_cs(values[t], panels.investable[t])
            np.testing.assert_allclose(found[t], expected, rtol=1e-9, atol=1e-9)
        else:
            expected = zscore(lambda s: None if np.isnan(values[s]) else float(values[s]), t)
            np.testing.assert_allclose(found[t], np.nan if expected is None else expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("values", "members", "expected"),
    [
        ([1.0] * 12, 12, "null"),  # no spread
        ([0.1 + 0.2] * 6 + [0.3] * 6, 12, "null"),  # no spread but rounding
        ([float(k) for k in range(9)], 9, "null"),  # fewer than 10
        ([0.0] * 11 + [1.0], 12, "value"),  # MAD is 0: not clipped away
        ([*map(float, range(11)), 1e9], 12, "value"),
    ],
)
def test_cross_section_at_its_edges(values: list[float], members: int, expected: str) -> None:
    feature = next(f for f in REGISTRY if f.norm == "cs")

    class Universe:
        investable = np.arange(len(values))[None, :] < members

    found = normalised(feature, np.array([values]), Universe())[0]  # type: ignore[arg-type]
    assert np.isnan(found).all() == (expected == "null")
    np.testing.assert_allclose(found, slow_cs(np.array(values), Universe.investable[0]), atol=1e-12)


def test_stock_outside_the_universe_is_placed_on_its_scale_and_moves_nothing() -> None:
    feature = next(f for f in REGISTRY if f.norm == "cs")

    class Universe:
        investable = np.array([[True] * 12 + [False]])

    def scores(outside: float) -> np.ndarray:
        return normalised(feature, np.array([[*map(float, range(12)), outside]]), Universe())[0]  # type: ignore[arg-type]

    np.testing.assert_array_equal(scores(3.0)[:12], scores(1e6)[:12])
    assert scores(3.0)[12] == scores(3.0)[3]
    assert scores(1e6)[12] == 5.0
