"""A market in the J-Quants columns whose Bayes-optimal score is known.

Returns are simple and built per session: O_t = C_{t-1} (1 + overnight_t), C_t = O_t (1 + intraday_t), where
intraday_{t+1} = mu_t + noise. Only what is public at the close of t decides mu_t. All noise has mean zero, and the
overnight return is noise alone. So E[O_{t+2} / O_{t+1} - 1 | close of t] = mu_t: that is `truth`.

Every session draws from its own stream, keyed by (seed, kind, session). So a longer market begins with the shorter one.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from atft_pipeline.errors import InputError
from atft_pipeline.market import calendar
from atft_pipeline.storage.atomic import replacing

Array = NDArray[np.float64]

FIRST_SESSION = dt.date(2022, 4, 4)
"""First session of Tokyo's market segments Prime, Standard and Growth."""
MAX_SESSIONS = 10_000
"""Forty years: beyond them the holidays of a calendar are guesses."""

SECTORS: tuple[tuple[str, str], ...] = tuple(
    (sector33, sector17)
    for sector17, members in {
        "1": "0050 3050", "2": "1050 3300", "3": "2050", "4": "3100 3150 3200 3400 3550", "5": "3250",
        "6": "3350 3700", "7": "3450 3500", "8": "3600", "9": "3650 3750", "10": "3800 5250 9050", "11": "4050",
        "12": "5050 5100 5150 5200", "13": "6050", "14": "6100", "15": "7050", "16": "7100 7150 7200", "17": "8050",
    }.items()
    for sector33 in members.split()
)  # fmt: skip
"""(Sector33Code, Sector17Code) of the exchange."""

SECTIONS: tuple[tuple[str, str], ...] = (("0111", "TSEPrime"), ("0112", "TSEStandard"), ("0113", "TSEGrowth"))
INVESTORS: tuple[str, ...] = (
    "Proprietary", "Brokerage", "Total", "Individuals", "Foreigners", "SecuritiesCos", "InvestmentTrusts",
    "BusinessCos", "OtherCos", "InsuranceCos", "CityBKsRegionalBKsEtc", "TrustBanks", "OtherFinancialInstitutions",
)  # fmt: skip
INVESTOR_SHARES: dict[str, float] = {
    "Individuals": 0.22, "Foreigners": 0.62, "SecuritiesCos": 0.01, "InvestmentTrusts": 0.03, "BusinessCos": 0.03,
    "OtherCos": 0.01, "InsuranceCos": 0.01, "CityBKsRegionalBKsEtc": 0.02, "TrustBanks": 0.04,
    "OtherFinancialInstitutions": 0.01,
}  # fmt: skip
"""Shares of the brokered turnover; the ten investor types that together are `Brokerage`."""

DRIFT_STD = 0.00165
"""Cross-sectional standard deviation of mu, set so that truth has a daily IC of about 0.11 against target_1d."""
SIMPLE_WEIGHTS: dict[str, float] = {
    "reversal": 0.60, "reversal_week": 0.45, "overnight": 0.45, "surprise": 0.30, "sector_momentum": 0.65,
}  # fmt: skip
HARD_WEIGHTS: dict[str, float] = {
    "reversal": 0.40, "reversal_week": 0.25, "overnight": 0.35, "surprise": 0.25, "sector_momentum": 0.45,
    "neighbours": 0.50, "volume_shock": 0.35, "regime": 0.40,
}  # fmt: skip
"""Weights of the terms, each of about unit variance."""
SIMPLE_STD, HARD_STD = 1.17, 1.0
"""Measured standard deviation of the weighted sum, for weights of unit norm. Dividing by it makes both markets equally
strong."""

REGIME_SCALE = (0.8, 1.7)
REGIME_LEAVE = (1 / 80, 1 / 40)
MARKET_VOL_SPLIT = 0.0085
"""Trailing 20-session std of the index return: below it, the hard market's regime term takes the market as calm."""
PEER_SLOPE = 0.4
"""Measured slope of the peers' mean return on the stock's own. It is subtracted, since otherwise the stock's own return
would carry half of the peers' signal."""
TAIL_FREEDOM = 5.0
"""Degrees of freedom of the Student t that daily returns follow: single stocks have 3 to 4, indices about 6."""
STATEMENT_HALF_LIFE_SESSIONS = 15.0
WARMUP_QUARTERS = 9
WARMUP_WEEKS = 65
ETFS = 3

_STATIC, _SESSION, _QUARTER, _WEEK = range(4)


@dataclass(frozen=True)
class SyntheticMarket:
    tables: dict[str, pl.DataFrame]
    """The five raw tables by name, as a J-Quants download has them."""
    truth: pl.DataFrame
    """Date, Code, expected_target_1d: E[O_{t+2}/O_{t+1} - 1] given the close of t, for common stocks that traded."""
    groups: pl.DataFrame
    """Code, group: the true peers, which share a return factor that no table names."""


@dataclass(frozen=True)
class _Stocks:
    """Properties of each stock that do not change over time, one entry per stock."""

    codes: list[str]
    sector: NDArray[np.int64]
    group: NDArray[np.int64]
    section: NDArray[np.int64]
    beta: Array
    vol: Array
    log_turnover: Array
    no_trade: Array
    first: NDArray[np.int64]
    last: NDArray[np.int64]
    price: Array
    profit: Array
    margin: Array
    fiscal_month: NDArray[np.int64]


@dataclass
class _Days:
    """Columns of the prices table under construction: each is a list of one [N] array per session."""

    columns: dict[str, list[Array]] = field(default_factory=dict)

    def add(self, **values: Array) -> None:
        for name, value in values.items():
            self.columns.setdefault(name, []).append(value)

    def frame(self, sessions: NDArray[np.datetime64], codes: list[str]) -> pl.DataFrame:
        keys = {
            "Date": pl.Series(np.repeat(sessions.astype("datetime64[ms]"), len(codes))).cast(pl.Date),
            "Code": pl.Series(codes * len(sessions), dtype=pl.String),
        }
        return pl.DataFrame(keys | {name: np.concatenate(days) for name, days in self.columns.items()})


def write_market(
    out_dir: Path,
    *,
    stocks: int = 200,
    sessions: int = 750,
    seed: int = 0,
    hard: bool = False,
    strength: float = 1.0,
    tail_freedom: float = TAIL_FREEDOM,
) -> dict[str, Any]:
    """Writes the five raw tables and truth.parquet into `out_dir`; returns row counts and the market's arguments."""
    arguments: dict[str, Any] = {
        "stocks": stocks, "sessions": sessions, "seed": seed, "hard": hard, "strength": strength,
        "tail_freedom": tail_freedom,
    }  # fmt: skip
    market = generate_market(**arguments)
    write_tables(market, Path(out_dir))
    rows = {name: table.height for name, table in market.tables.items()}
    return {"path": str(out_dir), **arguments, "rows": rows, "truth_rows": market.truth.height}


def write_tables(market: SyntheticMarket, out_dir: Path) -> None:
    """Writes each table of `market` as a file of `out_dir`, whole or not at all; leaves other files alone."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, table in {**market.tables, "truth": market.truth}.items():
        with replacing(out_dir / f"{name}.parquet") as temporary:
            table.write_parquet(temporary)


def generate_market(
    *,
    stocks: int = 200,
    sessions: int = 750,
    seed: int = 0,
    hard: bool = False,
    strength: float = 1.0,
    tail_freedom: float = TAIL_FREEDOM,
    first_session: dt.date = FIRST_SESSION,
) -> SyntheticMarket:
    """Generates the market in memory; its arguments alone decide every value.

    `hard` adds three terms at the same overall strength: one that only a stock's peers carry, a product of two signals,
    and one whose sign follows the market's volatility regime. `strength` multiplies the expected returns: the
    daily IC of the truth is about 0.11 times it, and at 0 there is nothing to learn. `tail_freedom`: degrees of freedom
    of the returns' Student t.

    Raises: InputError for fewer than 4 or too many stocks, fewer than 2 or too many sessions, a negative seed or
    strength, and for tails without a variance.
    """
    if not (4 <= stocks <= 7000 and 2 <= sessions <= MAX_SESSIONS and seed >= 0):
        raise InputError(
            f"synthetic market: expected 4 to 7000 stocks, at least 2 sessions (at most {MAX_SESSIONS}) and a seed of"
            f" at least 0, found {stocks} stocks, {sessions} sessions, seed {seed}"
        )
    if strength < 0 or tail_freedom <= 2:
        raise InputError(
            f"synthetic market: expected a strength of at least 0 and tails of more than 2 degrees of freedom, found"
            f" {strength} and {tail_freedom}"
        )
    days = _sessions(first_session, sessions)
    listed = _draw_stocks(stocks, _rng(seed, _STATIC, 0))
    statements, surprise = _statements(listed, days, seed)
    prices, truth, market_close = _simulate(listed, days, surprise, seed, hard, strength, tail_freedom)
    index = _index_table(market_close, days)
    funds = _fund_prices(index, prices, listed.codes[0], seed)
    return SyntheticMarket(
        tables={
            "prices": pl.concat([prices, funds]).sort("Date", "Code"),
            "listed": _listed_table(listed, days),
            "index": index,
            "investor_flows": _flows(days, market_close["Close"], seed),
            "statements": statements,
        },
        truth=truth,
        groups=pl.DataFrame({"Code": listed.codes, "group": listed.group}),
    )


def _rng(seed: int, kind: int, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, kind, index])


def _sessions(first: dt.date, count: int) -> NDArray[np.datetime64]:
    last = first + dt.timedelta(days=int(count * 1.55) + 30)
    return calendar.sessions("tokyo", first, last)[:count]


def _draw_stocks(N: int, rng: np.random.Generator) -> _Stocks:
    sectors = int(np.clip(N // 15, 2, len(SECTORS)))
    sector = rng.permutation(np.arange(N) % sectors)
    rank = np.array([np.sum(sector[:i] == sector[i]) for i in range(N)])
    group = np.unique(np.stack([sector, rank // 5]), axis=1, return_inverse=True)[1]
    log_turnover = rng.normal(np.log(4e8), 1.3, N)
    size = np.argsort(np.argsort(-log_turnover)) / N
    thin = log_turnover < np.quantile(log_turnover, 0.08)
    first = np.where(rng.random(N) < 0.05, rng.integers(40, 700, N), 0)
    delisted = (rng.random(N) < 0.03) & (first == 0)
    step = max(1, 7000 // N)
    return _Stocks(
        codes=[f"{2000 + step * i}0" for i in range(N)],
        sector=sector,
        group=group.reshape(-1),
        section=np.digitize(size, [0.6, 0.85]),
        beta=rng.normal(1.0, 0.25, N),
        vol=np.exp(rng.normal(0.0, 0.25, N)),
        log_turnover=log_turnover,
        no_trade=np.where(thin, rng.uniform(0.03, 0.15, N), 0.0),
        first=first,
        last=np.where(delisted, rng.integers(150, 900, N), np.iinfo(np.int64).max),
        price=np.exp(rng.normal(np.log(1800), 0.6, N)),
        profit=np.exp(rng.normal(np.log(2e9), 1.0, N)) * np.where(rng.random(N) < 0.05, -1, 1),
        margin=rng.uniform(0.02, 0.12, N),
        fiscal_month=rng.choice([3, 3, 3, 3, 3, 3, 3, 12, 12, 6], N),
    )


def _heavy(rng: np.random.Generator, size: int, freedom: float) -> Array:
    """Student t of `freedom` degrees, scaled to unit variance; clipped symmetrically, so its mean stays 0."""
    return np.clip(rng.standard_t(freedom, size) / np.sqrt(freedom / (freedom - 2)), -6.0, 6.0)


# --- prices -----------------------------------------------------------------------------------------------------------


def _simulate(
    listed: _Stocks,
    days: NDArray[np.datetime64],
    surprise: Array,
    seed: int,
    hard: bool,
    strength: float,
    tail_freedom: float,
) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, Array]]:
    """Prices table, truth and index.

    `surprise`: [T, N], the signal of the statements that are public at the close of t.
    """
    N, T = len(listed.codes), len(days)
    table, truths = _Days(), []
    close, cumulative = listed.price.copy(), np.ones(N)  # close is on the first session's share base
    drift, regime, volume_state = np.zeros(N), 0, np.zeros(N)
    signals = _Signals(listed)
    market: dict[str, list[float]] = {name: [] for name in ("Open", "High", "Low", "Close")}
    level = 1000.0
    for t in range(T):
        rng = _rng(seed, _SESSION, t)
        regime = 1 - regime if rng.random() < REGIME_LEAVE[regime] else regime
        shocks = _Shocks.draw(listed, rng, REGIME_SCALE[regime], tail_freedom)
        open_ = close * (1 + shocks.overnight)
        new_close = open_ * (1 + drift + shocks.intraday)
        wick = np.abs(rng.standard_normal((2, N))) * 0.004 * listed.vol * REGIME_SCALE[regime]
        high = np.maximum(open_, new_close) * (1 + wick[0])
        low = np.minimum(open_, new_close) * (1 - wick[1])

        factor = _corporate_action(close * cumulative, rng, tradable=listed.no_trade == 0)
        if t == 0:
            factor = np.ones(N)
        cumulative = cumulative * factor
        present = (listed.first <= t) & (t <= listed.last) & (rng.random(N) >= listed.no_trade)
        volume_shock, volume_state = _volume_shock(volume_state, new_close / close - 1, listed.vol, rng)
        raw = {
            "Open": _tick(open_ * cumulative),
            "High": _tick(high * cumulative),
            "Low": _tick(low * cumulative),
            "Close": _tick(new_close * cumulative),
        }
        vwap = (raw["High"] + raw["Low"] + raw["Close"]) / 3
        volume = np.maximum(np.round(np.exp(listed.log_turnover + volume_shock) / vwap / 100), 1) * 100
        table.add(**raw, Volume=volume, TurnoverValue=np.round(volume * vwap), AdjustmentFactor=factor)
        table.add(present=present.astype(float))

        level_open, level_close = (
            level * (1 + shocks.market[0]),
            level * (1 + shocks.market[0]) * (1 + shocks.market[1]),
        )
        wicks = np.abs(rng.standard_normal(2)) * 0.002
        market["Open"].append(level_open)
        market["High"].append(max(level_open, level_close) * (1 + wicks[0]))
        market["Low"].append(min(level_open, level_close) * (1 - wicks[1]))
        market["Close"].append(level_close)
        signals.update(
            new_close / close - 1, open_ / close - 1, level_close / level - 1, volume_shock, listed.first <= t
        )
        close, level = new_close, level_close
        drift = strength * DRIFT_STD * signals.combine(surprise[t], hard)
        truths.append(drift)

    frame = table.frame(days, listed.codes).with_columns(expected_target_1d=np.concatenate(truths))
    frame = frame.filter(pl.col("present") == 1.0).drop("present")
    prices = frame.drop("expected_target_1d")
    truth = frame.select("Date", "Code", "expected_target_1d")
    return prices, truth, {name: np.round(np.array(values), 2) for name, values in market.items()}


@dataclass(frozen=True)
class _Shocks:
    """Mean-zero returns of one session: the market's (overnight, intraday), and each stock's sum of all factors [N]."""

    market: tuple[float, float]
    overnight: Array
    intraday: Array

    @staticmethod
    def draw(listed: _Stocks, rng: np.random.Generator, scale: float, freedom: float) -> _Shocks:
        # Daily std in percent of the overnight and the intraday leg, by source of risk.
        legs = []
        for market_std, sector_std, group_std, own_std in ((0.40, 0.40, 0.45, 0.40), (0.65, 0.70, 0.75, 0.70)):
            market = 0.01 * scale * market_std * _heavy(rng, 1, freedom)[0]
            sector = 0.01 * scale * sector_std * _heavy(rng, len(SECTORS), freedom)[listed.sector]
            group = 0.01 * scale * group_std * _heavy(rng, len(listed.codes), freedom)[listed.group]
            idiosyncratic = 0.01 * scale * own_std * listed.vol * _heavy(rng, len(listed.codes), freedom)
            legs.append((market, listed.beta * market + sector + group + idiosyncratic))
        return _Shocks((legs[0][0], legs[1][0]), legs[0][1], legs[1][1])


class _Signals:
    """Signals known at the close of each session, one [N] vector a term, each of about unit variance."""

    def __init__(self, listed: _Stocks) -> None:
        self.listed = listed
        self.size = np.bincount(listed.sector)
        self.group_size = np.bincount(listed.group)
        self.residuals: list[Array] = []
        self.sectors: list[Array] = []
        self.market: list[float] = []
        self.overnight = self.volume_shock = np.zeros(len(listed.codes))

    def update(self, ret: Array, overnight: Array, market: float, volume_shock: Array, is_listed: NDArray[Any]) -> None:
        sector = np.bincount(self.listed.sector, ret) / self.size
        scale = 100 / self.listed.vol
        gap = overnight - (np.bincount(self.listed.sector, overnight) / self.size)[self.listed.sector]
        # Before its listing a stock has no public return, so none of its signals may read one.
        self.residuals = [*self.residuals[-4:], np.where(is_listed, (ret - sector[self.listed.sector]) * scale, 0.0)]
        self.overnight = np.where(is_listed, gap * scale, 0.0)
        self.sectors = [*self.sectors[-19:], sector - market]
        self.market = [*self.market[-19:], market]
        self.volume_shock = volume_shock

    def combine(self, surprise: Array, hard: bool) -> Array:
        """mu, in units of its own standard deviation."""
        weights = HARD_WEIGHTS if hard else SIMPLE_WEIGHTS
        norm = (HARD_STD if hard else SIMPLE_STD) * np.sqrt(sum(w * w for w in weights.values()))
        terms = self.terms(surprise)
        return np.asarray(sum(w / norm * np.clip(terms[name], -3.5, 3.5) for name, w in weights.items()))

    def terms(self, surprise: Array) -> dict[str, Array]:
        latest, week = self.residuals[-1], np.sum(self.residuals, axis=0)
        peers = np.bincount(self.listed.group, latest)[self.listed.group] - latest
        others = self.group_size[self.listed.group] - 1
        momentum = np.sum(self.sectors, axis=0)
        calm = np.std(self.market) < MARKET_VOL_SPLIT
        return {
            "reversal": -latest / 1.35,
            "reversal_week": -week / 2.7,
            "overnight": -self.overnight / 0.69,
            "surprise": surprise * 2.35,
            "sector_momentum": momentum[self.listed.sector] / 0.055,
            "neighbours": np.where(others > 0, peers / np.maximum(others, 1) - PEER_SLOPE * latest, 0.0) / 0.8,
            "volume_shock": latest * np.clip(self.volume_shock, -2, 2) / 0.87,
            "regime": week / 2.7 * (1.0 if calm else -1.0),
        }


def _volume_shock(state: Array, ret: Array, vol: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Log turnover relative to its level, and its persistent component, which the next session continues.

    Turnover is higher on days of large moves.
    """
    state = 0.7 * state + 0.2 * rng.standard_normal(len(ret))
    move = np.minimum(np.abs(ret) / (0.018 * vol), 4.0)
    return state + 0.35 * (move - 0.75) + 0.25 * rng.standard_normal(len(ret)), state


def _corporate_action(price: Array, rng: np.random.Generator, *, tradable: NDArray[np.bool_]) -> Array:
    """AdjustmentFactor of the session: splits of expensive stocks, consolidations of cheap ones, else 1.

    Only stocks that trade every session have such actions: on an ex-date without a row the factor would be lost.
    """
    draw, choice = rng.random(len(price)), rng.integers(0, 3, len(price))
    split = tradable & (price > 1500) & (draw < 6e-4)
    merge = tradable & (price < 350) & (draw < 2e-3)
    return np.where(
        split, 1 / np.array([2.0, 3.0, 5.0])[choice], np.where(merge, np.array([5.0, 10.0, 10.0])[choice], 1.0)
    )


def _tick(price: Array) -> Array:
    """Rounds to the exchange's tick: 1 yen up to 3,000, 5 up to 5,000, 10 above.

    Under 300 the tick is 0.1, because 1 yen would be a large move there.
    """
    tick = np.select([price < 300, price < 3000, price < 5000], [0.1, 1.0, 5.0], 10.0)
    return np.maximum(np.round(np.round(price / tick) * tick, 1), tick)


def _index_table(market: dict[str, Array], days: NDArray[np.datetime64]) -> pl.DataFrame:
    dates = pl.Series(days.astype("datetime64[ms]")).cast(pl.Date)
    return pl.DataFrame({"Date": dates, "Code": ["0000"] * len(days), **market})


def _fund_prices(index: pl.DataFrame, prices: pl.DataFrame, share: str, seed: int) -> pl.DataFrame:
    """Prices that a universe of common stocks must leave out: index funds, and a preferred share of one stock."""
    funds = []
    for i, code in enumerate(_fund_codes()):
        scale = _rng(seed, _STATIC, 1 + i).uniform(1.0, 3.0)
        fund = index.with_columns(
            (pl.col("Open", "High", "Low", "Close") * scale).round(1),
            Code=pl.lit(code),
            Volume=pl.lit(1e6),
            AdjustmentFactor=pl.lit(1.0),
        )
        funds.append(fund.with_columns(TurnoverValue=(pl.col("Close") * 1e6).round(0)).select(prices.columns))
    preferred = prices.filter(pl.col("Code") == share).with_columns(Code=pl.lit(share[:4] + "5"))
    return pl.concat([*funds, preferred])


def _fund_codes() -> list[str]:
    return [f"{1306 + 2 * i}0" for i in range(ETFS)]


def _listed_table(listed: _Stocks, days: NDArray[np.datetime64]) -> pl.DataFrame:
    """Snapshots of the listed securities, on each month's first session and on every day of a new listing."""
    months = days.astype("datetime64[M]")
    monthly = [t for t in range(len(days)) if t == 0 or months[t] != months[t - 1]]
    listings = [int(t) for t in listed.first if t < len(days)]
    rows: list[tuple[Any, ...]] = []
    for t in sorted({*monthly, *listings}):
        day = days[t].item()
        rows += [(day, code, f"Fund {code}", "99", "9999", "0109") for code in _fund_codes()]
        for i, code in enumerate(listed.codes):
            if listed.first[i] <= t <= listed.last[i]:
                sector33, sector17 = SECTORS[listed.sector[i]]
                section = SECTIONS[listed.section[i]][0]
                rows.append((day, code, f"Company {code[:4]}", sector17, sector33, section))
                if i == 0:
                    rows.append((day, f"{code[:4]}5", f"Company {code[:4]} pref.", sector17, sector33, section))
    names = ("Date", "Code", "CompanyName", "Sector17Code", "Sector33Code", "MarketCode")
    schema = {name: pl.Date if name == "Date" else pl.String for name in names}
    return pl.DataFrame(rows, schema=schema, orient="row").sort("Date", "Code")


# --- investor flows ---------------------------------------------------------------------------------------------------


def _flows(days: NDArray[np.datetime64], index_close: Array, seed: int) -> pl.DataFrame:
    """Weekly turnover by investor type and section in thousand yen, published on the Thursday after the week."""
    first, last = days[0].item(), days[-1].item()
    monday = first - dt.timedelta(days=first.weekday() + 7 * WARMUP_WEEKS)
    rows: list[dict[str, Any]] = []
    appetite = np.zeros(len(SECTIONS))
    while monday + dt.timedelta(days=10) <= last:
        rng = _rng(seed, _WEEK, monday.toordinal() // 7)
        in_week = (days >= np.datetime64(monday)) & (days <= np.datetime64(monday + dt.timedelta(days=4)))
        closes = index_close[in_week]
        week_return = closes[-1] / closes[0] - 1 if len(closes) > 1 else 0.0
        appetite = 0.6 * appetite + 0.03 * rng.standard_normal(len(SECTIONS)) + 0.5 * week_return
        for s, (_, section) in enumerate(SECTIONS):
            total = (1.6e10, 4e8, 6e8)[s] * np.exp(0.15 * rng.standard_normal())
            rows.append(
                {
                    "PublishedDate": monday + dt.timedelta(days=10),
                    "StartDate": monday,
                    "EndDate": monday + dt.timedelta(days=4),
                    "Section": section,
                }
                | _week_of_section(total, float(appetite[s]), rng)
            )
        monday += dt.timedelta(days=7)
    return pl.DataFrame(rows).sort("PublishedDate", "Section")


def _week_of_section(total: float, appetite: float, rng: np.random.Generator) -> dict[str, float]:
    """Sales, purchases, total and balance of each type; foreigners buy with `appetite`, individuals against it."""
    volumes: dict[str, tuple[float, float]] = {}
    for name, share in INVESTOR_SHARES.items():
        amount = total * 0.9 * share * np.exp(0.1 * rng.standard_normal())
        lean = {"Foreigners": appetite, "Individuals": -appetite}.get(name, 0.0) + 0.05 * rng.standard_normal()
        balance = amount * float(np.clip(lean, -0.9, 0.9))
        volumes[name] = ((amount - balance) / 2, (amount + balance) / 2)
    brokered = tuple(sum(side[i] for side in volumes.values()) for i in (0, 1))
    # Every sale has a buyer: the exchange members' own account takes the other side.
    proprietary = total * 0.1
    gap = brokered[0] - brokered[1]
    volumes["Brokerage"] = (brokered[0], brokered[1])
    volumes["Proprietary"] = ((proprietary + max(-gap, 0)), (proprietary + max(gap, 0)))
    volumes["Total"] = (brokered[0] + volumes["Proprietary"][0], brokered[1] + volumes["Proprietary"][1])
    return {
        f"{name}{column}": float(np.round(value))
        for name in INVESTORS
        for sales, purchases in (np.round(volumes[name]),)
        for column, value in (
            ("Sales", sales), ("Purchases", purchases), ("Total", sales + purchases), ("Balance", purchases - sales)
        )
    }  # fmt: skip


# --- statements -------------------------------------------------------------------------------------------------------

STATEMENT_FIGURES = (
    "NetSales", "OperatingProfit", "OrdinaryProfit", "Profit", "TotalAssets", "Equity", "ForecastNetSales",
    "ForecastOperatingProfit", "ForecastOrdinaryProfit", "ForecastProfit", "NextYearForecastNetSales",
    "NextYearForecastOperatingProfit", "NextYearForecastOrdinaryProfit", "NextYearForecastProfit",
)  # fmt: skip


def _statements(listed: _Stocks, days: NDArray[np.datetime64], seed: int) -> tuple[pl.DataFrame, Array]:
    """Quarterly disclosures as strings, and their surprise [T, N] as known at each close.

    The surprise halves every 15 sessions. Figures accumulate within the fiscal year. Profit grows by 5 % + 25 % of the
    surprise from year to year.
    """
    N, T = len(listed.codes), len(days)
    quarter = days[0].item().year * 4 + (days[0].item().month - 1) // 3 - WARMUP_QUARTERS
    history: dict[int, Array] = {}
    rows: list[dict[str, str]] = []
    surprise = np.zeros((T, N))
    age = np.arange(T)
    while _quarter_end(quarter) < days[-1].item():
        rng = _rng(seed, _QUARTER, quarter)
        news, jitter = np.clip(rng.standard_normal(N), -2.5, 2.5), rng.standard_normal((5, N))
        lag, hour = rng.integers(28, 46, N), rng.integers(0, 10, N)
        month = _quarter_end(quarter).month
        period = ((month - listed.fiscal_month) % 12) // 3
        base = history.get(quarter - 4, listed.profit * np.where(period == 0, 4, period) / 4)
        profit = base + np.abs(base) * (0.05 + 0.25 * news)
        history[quarter] = profit
        for i, code in enumerate(listed.codes):
            day = _next_weekday(_quarter_end(quarter) + dt.timedelta(days=int(lag[i])))
            time = ("15:00:00", "15:00:00", "15:00:00", "15:30:00", "16:00:00", "15:15:00", "15:40:00", "11:30:00",
                    "13:00:00", "14:00:00")[hour[i]]  # fmt: skip
            first_close = _known_from(day, time, days)
            if first_close < T:
                surprise[first_close:, i] = news[i] * 0.5 ** (age[: T - first_close] / STATEMENT_HALF_LIFE_SESSIONS)
            if day <= days[-1].item():
                figures = _figures(profit[i], base[i], listed.margin[i], int(period[i]), jitter[:, i])
                rows.append(_document(code, day, time, quarter, int(period[i]), figures))
        quarter += 1
    return pl.DataFrame(rows).sort("DisclosedDate", "DisclosedTime", "LocalCode"), surprise


def _known_from(day: dt.date, time: str, days: NDArray[np.datetime64]) -> int:
    """First session at whose close the disclosure is public; 0 for a disclosure before the first session."""
    t = int(np.searchsorted(days, np.datetime64(day)))
    if t < len(days) and days[t] == np.datetime64(day):
        return t if dt.time.fromisoformat(time) < calendar.close_time("tokyo", day) else t + 1
    return t


def _figures(profit: float, base: float, margin: float, period: int, jitter: Array) -> dict[str, float]:
    sales = abs(base) / margin * (1 + 0.3 * (profit - base) / abs(base) + 0.02 * jitter[0])
    operating, ordinary = profit / 0.65 * (1 + 0.12 * jitter[1]), profit / 0.67
    year = 4 / (period or 4)
    growth = year * (1.03 + 0.04 * jitter[2])
    actual = {"NetSales": sales, "OperatingProfit": operating, "OrdinaryProfit": ordinary, "Profit": profit}
    prefix = "Forecast" if period else "NextYearForecast"
    equity = abs(base) * year * 11 * (1 + 0.02 * jitter[3])
    forecast = {f"{prefix}{name}": value * growth for name, value in actual.items()}
    # Operating figures and leverage vary by themselves: as multiples of the profit, features would copy each other.
    forecast[f"{prefix}OperatingProfit"] *= 1 + 0.04 * jitter[4]
    return actual | {"TotalAssets": equity * (1.6 + 10 * margin), "Equity": equity} | forecast


def _document(
    code: str, day: dt.date, time: str, quarter: int, period: int, figures: dict[str, float]
) -> dict[str, str]:
    name = ("FY", "1Q", "2Q", "3Q")[period]
    year_end = quarter + (4 - period) % 4
    return {
        "DisclosedDate": day.isoformat(),
        "DisclosedTime": time,
        "LocalCode": code,
        "TypeOfDocument": f"{name}FinancialStatements_Consolidated_JP",
        "TypeOfCurrentPeriod": name,
        "CurrentPeriodEndDate": _quarter_end(quarter).isoformat(),
        "CurrentFiscalYearEndDate": _quarter_end(year_end).isoformat(),
    } | {column: str(round(figures[column])) if column in figures else "" for column in STATEMENT_FIGURES}


def _quarter_end(quarter: int) -> dt.date:
    following = quarter + 1
    return dt.date(following // 4, following % 4 * 3 + 1, 1) - dt.timedelta(days=1)


def _next_weekday(day: dt.date) -> dt.date:
    return day + dt.timedelta(days=max(0, 7 - day.weekday()) if day.weekday() >= 5 else 0)
