"""All 82 features against slow plain Python: loops over sessions, None for null, straight from docs/features.md.

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
from markets.eventful_market import PERIODS, events
from markets.market_factory import CONFIG, QUIET, panels_of, prices_of, sample_market, sessions_of, tables_of

from atft_pipeline.features.compute import normalised
from atft_pipeline.features.registry import REGISTRY, Feature
from atft_pipeline.market.calendar import close_time
from atft_pipeline.market.market_facts import MARKETS

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


def ema(series: Series, sessions: int, first: int, alpha: float | None = None) -> list[Value]:
    """Mean of the first `first` values, then alpha = 2 / (first + 1) unless given; null on a null session."""
    alpha = 2 / (first + 1) if alpha is None else alpha
    state: Value = None
    start: list[float] = []
    averages: list[Value] = []
    for s in range(sessions):
        value = series(s)
        if value is not None and state is None:
            start.append(value)
            state = mean(start) if len(start) == first else None
        elif value is not None:
            state = alpha * value + (1 - alpha) * state  # type: ignore[operator]
        averages.append(None if value is None else state)
    return averages


def flag(condition: Callable[..., bool], *values: Value) -> Value:
    return None if any(v is None for v in values) else float(condition(*values))


class Slow:
    """A market, cell by cell."""

    def __init__(self, market: str) -> None:
        prices = prices_of(market).prices
        self.tables = tables_of(market)
        dates = sessions_of(prices)
        between = [day for day in self.tables["index"]["Date"].to_list() if dates[0] <= day <= dates[-1]]
        self.sessions: list[dt.date] = sorted({*dates, *between})
        self.codes = prices["Code"].unique().sort().to_list()
        self.cells = {(row["Code"], row["Date"]): row for row in prices.iter_rows(named=True)}
        self.index_close = dict(self.tables["index"].select("Date", "Close").iter_rows())
        self.documents: dict[str, list[dict[str, Any]]] = {}
        for row in self.tables["statements"].iter_rows(named=True):
            self.documents.setdefault(row["LocalCode"], []).append(row)
        self.averages: dict[Any, list[Value]] = {}
        self.ret = cache(self._ret)
        self.mkt = cache(self._mkt)
        self.mkt_volatility = cache(self._mkt_volatility)
        self.beta = cache(lambda n, t: self.regression(n, t, self.mkt_series(1))[0])
        self.sector_median = cache(self._sector_median)
        self.sector_volatility = cache(self._sector_volatility)
        self.sector_levels = cache(self._sector_levels)
        self.known = cache(self._known)
        self.flow_weeks = cache(self._flow_weeks)

    def ema(self, key: tuple[Any, ...], series: Series, first: int, alpha: float | None = None) -> Series:
        """The average of a series, run once over all sessions; `key` names the series."""
        if (*key, first, alpha) not in self.averages:
            self.averages[(*key, first, alpha)] = ema(series, len(self.sessions), first, alpha)
        found = self.averages[(*key, first, alpha)]
        return lambda t: found[t] if t >= 0 else None

    def close_ema(self, n: int, span: int) -> Series:
        return self.ema(("close", n), self.series(n, "Close"), span)

    def index_ema(self, span: int) -> Series:
        return self.ema(("index",), self.index, span)

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

    def carried_index(self, t: int) -> Value:
        return next((c for k in range(6) if (c := self.index(t - k)) is not None), None)

    def _mkt(self, h: int, t: int) -> Value:
        return change(self.index(t) if h == 1 else self.carried_index(t), self.carried_index(t - h))

    def _mkt_volatility(self, t: int) -> Value:
        sigma = std(window(self.mkt_series(1), t, 20))
        return None if sigma is None else sigma * YEAR_ROOT

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

    def _sector_volatility(self, sector: Any, t: int) -> Value:
        return std(window(lambda s: self.sector_median(sector, 1, s), t, 20))

    def _sector_levels(self, sector: Any) -> list[Value]:
        """The sector's chained median R_1: a null session changes nothing and is null itself."""
        level, levels = 1.0, []
        for t in range(len(self.sessions)):
            step = self.sector_median(sector, 1, t)
            level *= 1 + (step or 0.0)
            levels.append(None if step is None else level)
        return levels

    # --- raw tables, row by row ---

    def _flow_weeks(self, section: str, t: int) -> tuple[dict[int, dict[str, Any]], int]:
        """By calendar week its last publication before session t, and sessions since the newest week was first out."""
        today = self.sessions[t]
        table = self.tables["investor_flows"].iter_rows(named=True)
        rows = [r for r in table if r["Section"] == section and r["PublishedDate"] < today]
        weeks: dict[int, dict[str, Any]] = {}
        first: dict[int, dt.date] = {}
        for row in sorted(rows, key=lambda r: r["PublishedDate"]):
            week = (row["EndDate"] - MONDAY).days // 7
            weeks[week] = row
            first.setdefault(week, row["PublishedDate"])
        if not weeks:
            return weeks, 0
        following = first[max(weeks)] + dt.timedelta(days=1)
        before = np.busday_count(following, max(self.sessions[0], following))
        return weeks, sum(following <= day <= today for day in self.sessions) + int(before)

    def _known(self, n: int, t: int) -> list[dict[str, Any]]:
        """Documents of the stock public at the close of session t, in order of disclosure."""
        found = []
        for row in self.documents.get(self.codes[n], []):
            time = dt.time.fromisoformat(row["DisclosedTime"] or "23:59:59")
            at = dt.datetime.combine(dt.date.fromisoformat(row["DisclosedDate"]), time)
            if at < dt.datetime.combine(self.sessions[t], close_time("tokyo", self.sessions[t])):
                found.append(row | {"day": at.date(), "at": at})
        return sorted(found, key=lambda d: (d["at"], d.get("DisclosureNumber", "")))


MONDAY = dt.date(1970, 1, 5)
SLOW = cache(Slow)
SECTIONS = {
    "0101": "TSE1st", "0102": "TSE2nd", "0104": "TSEMothers", "0106": "TSEJASDAQ",
    "0111": "TSEPrime", "0112": "TSEStandard", "0113": "TSEGrowth",
}  # fmt: skip
PERIODS_OF_A_YEAR = ("1Q", "2Q", "3Q", "4Q", "5Q", "FY")


def number(row: dict[str, Any] | None, column: str) -> Value:
    return float(row[column]) if row is not None and row[column].strip() not in ("", "-", "*") else None


def growth(a: Value, b: Value) -> Value:
    return divided(minus(a, b), None if b is None else abs(b))


def year_end(document: dict[str, Any]) -> int:
    """The month in which the fiscal year ends, counted from the year 0."""
    day = dt.date.fromisoformat(document["CurrentFiscalYearEndDate"])
    return day.year * 12 + day.month


def statements(m: Slow, n: int, t: int) -> dict[str, Value]:
    """The 13 statement features, from everything the company had said by the close.

    The newest period is compared with the one a year before, each as last stated. A revision has forecasts only.
    """
    documents, today = m.known(n, t), m.sessions[t]
    results: dict[tuple[int, int], dict[str, Any]] = {}
    for d in documents:
        figures = [number(d, column) for column in ("NetSales", "OperatingProfit", "Profit")]
        if "Revision" not in d["TypeOfDocument"] and any(v is not None for v in figures):
            results[year_end(d), PERIODS_OF_A_YEAR.index(d["TypeOfCurrentPeriod"])] = d
    newest = max(results, default=None)
    last = results[newest] if newest and (today - results[newest]["day"]).days <= 400 else None
    ago = None
    if newest is not None and last is not None:
        near = [results.get((newest[0] - months, newest[1])) for months in (12, 11, 13)]
        ago = next((d for d in near if d is not None), None)
    out: dict[str, Value] = {"is_stmt_valid": float(last is not None)}
    for short, column in (("sales", "NetSales"), ("op", "OperatingProfit"), ("np", "Profit")):
        out[f"stmt_yoy_{short}"] = growth(number(last, column), number(ago, column))
    sales = number(last, "NetSales")
    out["stmt_opm"], out["stmt_npm"] = (divided(number(last, c), sales) for c in ("OperatingProfit", "Profit"))
    out["stmt_roe"] = divided(number(last, "Profit"), number(last, "Equity"))
    out["stmt_roa"] = divided(number(last, "Profit"), number(last, "TotalAssets"))
    said: dict[str, list[tuple[int, float]]] = {"OperatingProfit": [], "Profit": []}  # (year's end, forecast)
    said_on = None
    period, full_years = (0, 0), set[int]()  # newest period, and years whose full results were known, so far
    for d in documents:
        own = (year_end(d), PERIODS_OF_A_YEAR.index(d["TypeOfCurrentPeriod"]))
        has_results = own in results and "Revision" not in d["TypeOfDocument"]
        is_correction = has_results and own < period
        if has_results:
            period = max(period, own)
            full_years |= {own[0]} if d["TypeOfCurrentPeriod"] == "FY" else set()
        for column, forecasts in said.items():
            for months, prefix in ((12, "NextYearForecast"), (0, "Forecast")):
                # A correction repeats the forecast of its time, and one of a year that is over says nothing new.
                if is_correction or year_end(d) + months in full_years:
                    continue
                if (v := number(d, f"{prefix}{column}")) is not None:
                    forecasts.append((year_end(d) + months, v))
                    said_on = d["day"]
    for short, column in (("op", "OperatingProfit"), ("np", "Profit")):
        in_force = [v for end, v in said[column] if last is not None and end == year_end(last)]
        out[f"stmt_progress_{short}"] = divided(number(last, column), in_force[-1] if in_force else None)
        same_year = [v for end, v in said[column] if end == said[column][-1][0]]
        in_time = said_on is not None and (today - said_on).days <= 400
        out[f"stmt_rev_fore_{short}"] = growth(*same_year[:-3:-1]) if in_time and len(same_year) > 1 else None
    age = (today - documents[-1]["day"]).days if documents else 401
    recent = t >= 5 and len(m.known(n, t - 5)) < len(documents)
    out["stmt_days_since"] = float(age) if age <= 400 else None
    out["stmt_recent_flag"] = float(recent) if age <= 400 else None
    return out


FLOWS = [feature.name for feature in REGISTRY if feature.family == "investor flow"]


def flows(m: Slow, n: int, t: int) -> dict[str, Value]:
    weeks, since = m.flow_weeks(SECTIONS[m.cell(n, t, "MarketCode")], t)
    if not weeks:
        return dict.fromkeys(FLOWS) | {"is_flow_valid": 0.0}
    now = max(weeks)
    types = [c.removesuffix("Balance") for c in weeks[now] if c.endswith("Balance")]
    investors = [name for name in types if name not in ("Total", "Proprietary", "Brokerage")]
    assert len(investors) == 10

    def weekly(name: str) -> Series:
        return lambda w: divided(weeks[w][f"{name}Balance"], weeks[w][f"{name}Total"]) if w in weeks else None

    def total(w: int) -> Value:
        return weeks[w]["TotalTotal"] if w in weeks else None

    def smart(w: int) -> Value:
        return minus(zscore(weekly("Foreigners"), w, 52, None), zscore(weekly("Individuals"), w, 52, None))

    return {
        "flow_foreign_net_ratio": weekly("Foreigners")(now),
        "flow_individual_net_ratio": weekly("Individuals")(now),
        "flow_activity_ratio": divided(total(now), mean(window(total, now, 52))),
        "flow_breadth_pos": sum(weeks[now][f"{name}Balance"] > 0 for name in investors) / len(investors),
        "flow_foreign_net_z": zscore(weekly("Foreigners"), now, 52, None),
        "flow_individual_net_z": zscore(weekly("Individuals"), now, 52, None),
        "flow_activity_z": zscore(total, now, 52, None),
        "flow_smart_idx": smart(now),
        "flow_smart_mom4": minus(smart(now), mean(window(smart, now, 4))),
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

    gain, loss = (m.ema(("side", sign, n), side(sign), length, 1 / length)(t) for sign in (1, -1))
    if gain is None or loss is None:
        return None
    return 50.0 if gain + loss <= 1e-6 * m.cell(n, t, "Close") else 100 * gain / (gain + loss)


def position(price: Value, low: Value, high: Value) -> Value:
    if price is None or low is None or high is None:
        return None
    return 0.5 if high == low else (price - low) / (high - low)


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
        out[f"price_to_ema_{span}"] = change(close(t), m.close_ema(n, span)(t))
    out["ma_gap_5_20"] = change(m.close_ema(n, 5)(t), m.close_ema(n, 20)(t))
    out["price_to_sma_60"] = change(close(t), mean(window(close, t, 60)))
    out["momentum_12_1"] = change(m.carried(n, t - 21), m.carried(n, t - 252))
    out["bb_position"], out["bb_width"] = bands(close, t)
    out["rsi_2"], out["rsi_14"] = rsi(m, n, t, 2), rsi(m, n, t, 14)

    def macd(s: int) -> Value:
        return minus(m.close_ema(n, 12)(s), m.close_ema(n, 26)(s))

    out["macd_histogram"] = divided(minus(macd(t), m.ema(("macd", n), macd, 9)(t)), close(t))
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
    out["mkt_ma_gap_5_20"] = change(m.index_ema(5)(t), m.index_ema(20)(t))
    out["mkt_ema20_slope_3"] = change(m.index_ema(20)(t), m.index_ema(20)(t - 3))
    out["mkt_volatility_20d"] = m.mkt_volatility(t)
    out["mkt_bull_200"] = flag(lambda c, e: c > e, m.index(t), m.index_ema(200)(t))
    out["mkt_high_vol"] = flag(lambda z: z > 1, zscore(m.mkt_volatility, t))
    above = [
        flag(lambda c, e: c > e, m.cell(n, t, "Close"), m.close_ema(n, 200)(t))
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
    gaps = [change(average(5)(t), average(20)(t)) for average in (lambda span: m.close_ema(n, span), m.index_ema)]
    signs = flag(lambda a, b: np.sign(a) == np.sign(b), *gaps)
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

    def level_ema(span: int) -> Series:
        return m.ema(("sector", own), m.sector_levels(own).__getitem__, span)

    month = window(step, t, 20)
    beta = m.regression(n, t, own_step)[0]
    expected = None if beta is None or own_step(t) is None else beta * own_step(t)  # type: ignore[operator]
    return {
        "sec_mom_20": math.fsum(month) if month else None,
        "sec_ret_5d": m.sector_median(own, 5, t),
        "sec_vol_20_z": zscore(lambda s: m.sector_volatility(own, s), t),
        "sec_gap_5_20": change(level_ema(5)(t), level_ema(20)(t)),
        "alpha_vs_sec_1d": minus(m.ret(n, 1, t), expected),
        "is_sector_valid": float(step(t) is not None),
    }


@cache
def reference(market_name: str, n: int, t: int) -> dict[str, Value]:
    m = SLOW(market_name)
    parts = [f(m, n, t) for f in (stock, stock_and_market, sector, flows, statements)]
    return market(m, t) | {name: value for part in parts for name, value in part.items()}


Cell = tuple[str, int, int]


@cache
def quiet_cells() -> tuple[Cell, ...]:
    """Two stocks at early, middle and late sessions, the thinnest stock, and a session in which it did not trade."""
    closes = sample_market().close
    thinnest = int(np.argmax(np.isnan(closes[-200:]).sum(axis=0) * ~np.isnan(closes[-200]) * ~np.isnan(closes[-1])))
    quiet = 229 + int(np.flatnonzero(np.isnan(closes[230:, thinnest]))[0]) + 1
    assert np.isnan(closes[quiet, thinnest])
    ordinary = [n for n in (3, 20) if n != thinnest]
    times = (4, 70, 205, 330, len(closes) - 1)
    cells = (*((n, t) for n in ordinary for t in times), (thinnest, quiet), (thinnest, len(closes) - 1))
    return tuple((QUIET, n, t) for n, t in cells)


@cache
def eventful_cells() -> tuple[Cell, ...]:
    """Every stock with an event on its session, the ones around it, and later while windows still hold it; an event of
    the whole market is seen by a stock of each section."""
    found: dict[Cell, None] = {}
    for period in PERIODS:
        m = SLOW(period)
        for event in events(period):
            stocks = [m.codes.index(event.code)] if event.code in m.codes else [] if event.code else [10, 12, 33, 44]
            at = m.sessions.index(event.session)
            for n in stocks:
                cells = [(period, n, at + k) for k in (-1, 0, 1, 4, 5, 15, 45) if at + k < len(m.sessions)]
                found |= dict.fromkeys(cell for cell in cells if m.cell(n, cell[2], "is_traded") is not None)
    assert len(found) >= 150
    return tuple(found)


def assert_equals_reference(feature: Feature, cells: Sequence[Cell]) -> int:
    """Cells with a value, all of them equal to the slow reference's; the others null in both."""
    compared = 0
    for market_name, n, t in cells:
        values = feature.compute(panels_of(market_name))
        expected = reference(market_name, n, t)[feature.name]
        found = values[t] if values.ndim == 1 else values[t, n]
        where = f"{feature.name} of {SLOW(market_name).codes[n]} on {SLOW(market_name).sessions[t]}"
        assert np.isnan(found) == (expected is None), f"{where}: {found}, expected {expected}"
        if expected is not None:
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-12), where
            compared += 1
    return compared


@pytest.mark.parametrize("feature", REGISTRY, ids=lambda feature: feature.name)
def test_feature_equals_its_slow_reference(feature: Feature) -> None:
    assert assert_equals_reference(feature, quiet_cells()) >= 2, "the sample must hold values to compare"


@pytest.mark.parametrize("feature", REGISTRY, ids=lambda feature: feature.name)
@pytest.mark.slow(reason="slow references on eventful markets")
def test_feature_equals_its_slow_reference_around_every_event(feature: Feature) -> None:
    assert assert_equals_reference(feature, eventful_cells()) >= 40, "the events must leave values to compare"


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
