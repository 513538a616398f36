"""The 82 features, one row each. A new feature is one row of `REGISTRY`; `FEATURE_COUNT` fixes their number.

A row is: name, family, norm, window, columns, formula, expression, lag. `validated` checks it against its own
expression when this module is imported. `window_sessions` counts the sessions that the expression looks back over
before normalisation, the current one included; `ts` adds 252. An exponential average never forgets entirely: its window
is five spans, after which its start weighs e^-10. It skips nulls, so its window counts the sessions in which the stock
traded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np

from atft_pipeline.errors import InputError
from atft_pipeline.features.inputs import (
    DOCUMENT,
    INVESTOR_BALANCES,
    RELEASE,
    UNIVERSE,
    WEEKS_IN_YEAR,
    Market,
    Matrix,
    traced_market,
)
from atft_pipeline.features.trace import Trace
from atft_pipeline.features.vocabulary.averages import EMA_SPANS_TO_FORGET, series_ema
from atft_pipeline.features.vocabulary.cross_section import share_of
from atft_pipeline.features.vocabulary.elementwise import (
    above,
    band_position,
    band_width,
    change,
    exceeds,
    growth,
    is_known,
    log,
    log_ratio,
    ratio,
    reaches,
    same_sign,
    unit_position,
)
from atft_pipeline.features.vocabulary.events import SESSIONS_IN_WEEK, weekly_mean, weekly_zscores
from atft_pipeline.features.vocabulary.windows import (
    CARRY_SESSIONS,
    lag,
    rolling_max,
    rolling_mean,
    rolling_min,
    rolling_std,
    rolling_sum,
    ts_zscore,
)
from atft_pipeline.storage.artifact import sha256_of

NORMS: tuple[str, ...] = ("cs", "ts", "raw")
FEATURE_COUNT = 82


@dataclass(frozen=True)
class Publication:
    lag_sessions: int
    """Sessions from a row's date until it may be used; no feature that reads the table may have a shorter lag."""
    rule: str


PUBLICATION: dict[str, Publication] = {
    "prices": Publication(0, "close of the session"),
    "index": Publication(0, "close of the session"),
    "listed": Publication(0, "latest snapshot at or before the session"),
    "investor_flows": Publication(1, "session after PublishedDate"),
    "statements": Publication(0, "the session if disclosed before its close, else the next; expires after 400 days"),
}
"""The tables that a feature may read, and from when a row of each counts."""


@dataclass(frozen=True)
class Feature:
    name: str
    family: str
    norm: str
    window_sessions: int
    reads: tuple[str, ...]
    """`table.column` of every raw value that goes in."""
    formula: str
    expression: Callable[[Market], Matrix]
    """Gives `[S, N]`, or a series where the value is the same for every stock."""
    lag_sessions: int = 0
    """Sessions from the newest input's date to the session of the value; a lag above the tables' rules delays it."""

    @property
    def tables(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(column.split(".")[0] for column in self.reads))

    @property
    def publication_lag(self) -> int:
        return max(PUBLICATION[table].lag_sessions for table in self.tables)

    @property
    def publication(self) -> str:
        """From when the newest input counts, by table."""
        return "; ".join(dict.fromkeys(PUBLICATION[table].rule for table in self.tables))

    @cached_property
    def trace(self) -> Trace:
        """What the expression reads, found by evaluating it on traces."""
        return cast(Trace, self.compute(traced_market()))

    def compute(self, market: Market) -> Matrix:
        """Values before normalisation, `[S, N]` or a series; rows before `market.fresh` are undefined."""
        return lag(self.expression(market), self.lag_sessions - self.publication_lag)


def _emas(*spans: int) -> int:
    """Window of exponential averages in sequence."""
    return sum(EMA_SPANS_TO_FORGET * span for span in spans)


_STEP = 2 + CARRY_SESSIONS
"""Sessions that R_1 reads: its own, the one before, and those over which a close is carried."""
_WEEKS = 60 * SESSIONS_IN_WEEK
"""Sessions that span 55 weeks of releases, with room for holidays."""
_YEARS = 560
"""Sessions that span results up to 400 days old and those of a year earlier."""
_BETA_EPSILON = 1e-6
_YEAR = 252
_PARKINSON = 4.0 * np.log(2.0)


def _prices(*columns: str) -> tuple[str, ...]:
    return tuple(f"prices.{column}" for column in columns)


def _flows(*columns: str) -> tuple[str, ...]:
    return (*RELEASE, *(f"investor_flows.{column}" for column in columns), "listed.MarketCode")


def _statements(*columns: str) -> tuple[str, ...]:
    return (*DOCUMENT, *(f"statements.{column}" for column in columns))


def _forecasts(figure: str) -> tuple[str, ...]:
    return (f"Forecast{figure}", f"NextYearForecast{figure}")


_CLOSE = _prices("Close")
_BARS = _prices("High", "Low", "Close")
_INDEX = ("index.Close",)
_BOTH = (*_CLOSE, *_INDEX)
_SECTOR = UNIVERSE
_FOREIGN, _INDIVIDUAL = ("ForeignersBalance", "ForeignersTotal"), ("IndividualsBalance", "IndividualsTotal")
_SMART = _flows(*_FOREIGN, *_INDIVIDUAL)

# fmt: off
REGISTRY: tuple[Feature, ...] = (
    Feature("returns_1d", "returns", "cs", _STEP, _CLOSE, "R_1 = C_t / C_{t-1} − 1", lambda m: m.ret(1)),
    Feature("returns_5d", "returns", "cs", 4 + _STEP, _CLOSE, "R_5", lambda m: m.ret(5)),
    Feature("returns_10d", "returns", "cs", 9 + _STEP, _CLOSE, "R_10", lambda m: m.ret(10)),
    Feature("returns_20d", "returns", "cs", 19 + _STEP, _CLOSE, "R_20", lambda m: m.ret(20)),
    Feature("overnight_return_1d", "returns", "cs", _STEP, _prices("Open", "Close"), "O_t / C_{t-1} − 1",
            lambda m: change(m.open, lag(m.carried(), 1))),

    Feature("volatility_5d", "volatility", "cs", 4 + _STEP, _CLOSE, "std(R_1, 5) · √D", lambda m: m.volatility(5)),
    Feature("volatility_10d", "volatility", "cs", 9 + _STEP, _CLOSE, "std(R_1, 10) · √D", lambda m: m.volatility(10)),
    Feature("volatility_20d", "volatility", "cs", 19 + _STEP, _CLOSE, "std(R_1, 20) · √D", lambda m: m.volatility(20)),
    Feature("volatility_60d", "volatility", "cs", 59 + _STEP, _CLOSE, "std(R_1, 60) · √D", lambda m: m.volatility(60)),
    Feature("parkinson_volatility_20d", "volatility", "cs", 20, _prices("High", "Low"),
            "√(mean_20 ln²(H/L) / (4 ln 2)) · √D",
            lambda m: np.sqrt(rolling_mean(log_ratio(m.high, m.low) ** 2, 20) / _PARKINSON * m.days_per_year)),

    Feature("price_to_ema_5", "trend", "cs", _emas(5), _CLOSE, "C / EMA_5 − 1",
            lambda m: change(m.close, m.ema(5))),
    Feature("price_to_ema_20", "trend", "cs", _emas(20), _CLOSE, "C / EMA_20 − 1",
            lambda m: change(m.close, m.ema(20))),
    Feature("price_to_ema_200", "trend", "cs", _emas(200), _CLOSE, "C / EMA_200 − 1",
            lambda m: change(m.close, m.ema(200))),
    Feature("ma_gap_5_20", "trend", "cs", _emas(20), _CLOSE, "EMA_5 / EMA_20 − 1", lambda m: m.ma_gap()),
    Feature("price_to_sma_60", "trend", "cs", 60, _CLOSE, "C / SMA_60 − 1",
            lambda m: change(m.close, rolling_mean(m.close, 60))),
    Feature("returns_60d", "trend", "cs", 59 + _STEP, _CLOSE, "R_60", lambda m: m.ret(60)),
    Feature("momentum_12_1", "trend", "cs", 251 + _STEP, _CLOSE, "C_{t-21} / C_{t-252} − 1",
            lambda m: change(lag(m.carried(), 21), lag(m.carried(), 252))),

    Feature("bb_position", "oscillators", "cs", 20, _CLOSE, "%B: (C − SMA_20 + 2σ) / 4σ, σ with ddof 0, 0.5 at 0/0",
            lambda m: band_position(m.close, *m.bands())),
    Feature("bb_width", "oscillators", "cs", 20, _CLOSE, "4σ / SMA_20", lambda m: band_width(*m.bands())),
    Feature("rsi_2", "oscillators", "cs", _emas(3) + _STEP, _CLOSE,
            "Wilder's RSI over 2 changes, 50 where the price stood still",
            lambda m: m.rsi(2)),
    Feature("rsi_14", "oscillators", "cs", _emas(27) + _STEP, _CLOSE,
            "Wilder's RSI over 14 changes, 50 where the price stood still",
            lambda m: m.rsi(14)),
    Feature("macd_histogram", "oscillators", "cs", _emas(26, 9), _CLOSE,
            "(MACD − EMA_9(MACD)) / C, MACD = EMA_12 − EMA_26",
            lambda m: ratio(m.macd_histogram(), m.close)),
    Feature("stoch_k_14", "oscillators", "cs", 14, _BARS, "(C − min(L, 14)) / (max(H, 14) − min(L, 14)), 0.5 at 0/0",
            lambda m: unit_position(m.close, rolling_min(m.low, 14), rolling_max(m.high, 14))),
    Feature("close_location", "oscillators", "cs", 1, _BARS, "(C − L) / (H − L), 0.5 where H = L",
            lambda m: unit_position(m.close, m.low, m.high)),
    Feature("high_52w_ratio", "oscillators", "cs", _YEAR, _prices("High", "Close"), "C / max(H, 252)",
            lambda m: ratio(m.close, rolling_max(m.high, _YEAR))),

    Feature("volume_ratio_5", "liquidity", "cs", 5, _prices("Volume"), "ln(V / mean(V, 5))",
            lambda m: log_ratio(m.volume(), rolling_mean(m.volume(), 5))),
    Feature("volume_ratio_20", "liquidity", "cs", 20, _prices("Volume"), "ln(V / mean(V, 20))",
            lambda m: log_ratio(m.volume(), rolling_mean(m.volume(), 20))),
    Feature("amihud_illiquidity_20d", "liquidity", "cs", 19 + _STEP, _prices("Close", "Volume", "TurnoverValue"),
            "ln mean_20(abs(R_1) / turnover value), null where the mean is 0",
            lambda m: log(rolling_mean(ratio(np.abs(m.ret(1)), m.turnover()), 20))),

    Feature("mkt_returns_1d", "market", "ts", _STEP, _INDEX, "R_1 of the index", lambda m: m.mkt_ret(1)),
    Feature("mkt_returns_5d", "market", "ts", 4 + _STEP, _INDEX, "R_5 of the index", lambda m: m.mkt_ret(5)),
    Feature("mkt_returns_10d", "market", "ts", 9 + _STEP, _INDEX, "R_10 of the index", lambda m: m.mkt_ret(10)),
    Feature("mkt_returns_20d", "market", "ts", 19 + _STEP, _INDEX, "R_20 of the index", lambda m: m.mkt_ret(20)),
    Feature("mkt_ma_gap_5_20", "market", "ts", _emas(20), _INDEX, "EMA_5 / EMA_20 − 1 of the index",
            lambda m: m.mkt_ma_gap()),
    Feature("mkt_ema20_slope_3", "market", "ts", _emas(20) + 3, _INDEX, "EMA20_t / EMA20_{t-3} − 1 of the index",
            lambda m: change(m.mkt_ema(20), lag(m.mkt_ema(20), 3))),
    Feature("mkt_volatility_20d", "market", "ts", 19 + _STEP, _INDEX, "std(R_1, 20) · √D of the index",
            lambda m: m.mkt_volatility()),
    Feature("mkt_bull_200", "market", "raw", _emas(200), _INDEX, "1 where the index is above its EMA_200",
            lambda m: above(m.index_close, m.mkt_ema(200))),
    Feature("mkt_high_vol", "market", "raw", 251 + 19 + _STEP, _INDEX,
            "1 where the 252-session z of mkt_volatility_20d > 1",
            lambda m: exceeds(ts_zscore(m.mkt_volatility()), 1.0)),
    Feature("mkt_breadth_200", "market", "raw", _emas(200), _SECTOR, "share of the universe above its EMA_200",
            lambda m: share_of(above(m.close, m.ema(200)), m.investable)),
    Feature("mkt_drawdown", "market", "ts", _YEAR, _INDEX, "C / max(C, 252) − 1 of the index",
            lambda m: change(m.index_close, rolling_max(m.index_close, _YEAR))),
    Feature("mkt_bb_width", "market", "ts", 20, _INDEX, "4σ / SMA_20 of the index",
            lambda m: band_width(*m.mkt_bands())),
    Feature("mkt_bb_position", "market", "ts", 20, _INDEX, "%B of the index",
            lambda m: band_position(m.index_close, *m.mkt_bands())),

    Feature("beta_60d", "stock and market", "cs", 59 + _STEP, _BOTH, "cov(R_1, R_1 of the index) / var, 60 sessions",
            lambda m: m.mkt_regression().beta),
    Feature("beta_stability_60d", "stock and market", "cs", 118 + _STEP, _BOTH, "1 / (std(beta_60d, 60) + 1e-6)",
            lambda m: 1.0 / (rolling_std(m.mkt_regression().beta, 60) + _BETA_EPSILON)),
    Feature("alpha_1d", "stock and market", "cs", 59 + _STEP, _BOTH, "R_1 − β · R_1 of the index",
            lambda m: m.alpha(1)),
    Feature("alpha_5d", "stock and market", "cs", 59 + _STEP, _BOTH, "R_5 − β · R_5 of the index",
            lambda m: m.alpha(5)),
    Feature("corr_mkt_60d", "stock and market", "cs", 59 + _STEP, _BOTH, "corr(R_1, R_1 of the index), 60 sessions",
            lambda m: m.mkt_regression().corr),
    Feature("idio_volatility_60d", "stock and market", "cs", 59 + _STEP, _BOTH,
            "std of R_1 − β · R_1 of the index over 60 sessions, β the current one",
            lambda m: m.mkt_regression().residual_std),
    Feature("trend_align_mkt", "stock and market", "raw", _emas(20), _BOTH,
            "1 where ma_gap_5_20 of stock and index have the same sign",
            lambda m: same_sign(m.ma_gap(), m.on_rows(m.mkt_ma_gap()))),

    Feature("sec_mom_20", "sector", "cs", 19 + _STEP, _SECTOR, "20-session sum of the sector's median R_1",
            lambda m: m.of_sector(rolling_sum(m.sector_ret(1), 20))),
    Feature("sec_ret_5d", "sector", "cs", 4 + _STEP, _SECTOR, "sector median R_5",
            lambda m: m.of_sector(m.sector_ret(5))),
    Feature("sec_vol_20_z", "sector", "cs", 251 + 19 + _STEP, _SECTOR, "252-session z of std(sector median R_1, 20)",
            lambda m: m.of_sector(ts_zscore(rolling_std(m.sector_ret(1), 20)))),
    Feature("sec_gap_5_20", "sector", "cs", _emas(20) + _STEP, _SECTOR,
            "EMA_5 / EMA_20 − 1 of the sector's chained median R_1",
            lambda m: m.of_sector(change(series_ema(m.sector_index(), 5), series_ema(m.sector_index(), 20)))),
    Feature("alpha_vs_sec_1d", "sector", "cs", 59 + _STEP, _SECTOR, "R_1 − β_sector · sector median R_1, 60 sessions",
            lambda m: m.sector_alpha()),

    Feature("flow_foreign_net_ratio", "investor flow", "raw", _WEEKS, _flows(*_FOREIGN),
            "ForeignersBalance / ForeignersTotal of the section's newest week",
            lambda m: m.by_section(m.releases.foreign_net[:, -1]), lag_sessions=1),
    Feature("flow_individual_net_ratio", "investor flow", "raw", _WEEKS, _flows(*_INDIVIDUAL),
            "IndividualsBalance / IndividualsTotal",
            lambda m: m.by_section(m.releases.individual_net[:, -1]), lag_sessions=1),
    Feature("flow_activity_ratio", "investor flow", "raw", _WEEKS, _flows("TotalTotal"),
            "TotalTotal / its 52-week mean",
            lambda m: m.by_section(ratio(m.releases.total[:, -1], weekly_mean(m.releases.total, WEEKS_IN_YEAR))),
            lag_sessions=1),
    Feature("flow_breadth_pos", "investor flow", "raw", _WEEKS, (*RELEASE, *INVESTOR_BALANCES, "listed.MarketCode"),
            "share of investor types with Balance > 0",
            lambda m: m.by_section(m.releases.buying_share), lag_sessions=1),
    Feature("flow_foreign_net_z", "investor flow", "raw", _WEEKS, _flows(*_FOREIGN),
            "52-week z of flow_foreign_net_ratio",
            lambda m: m.by_section(weekly_zscores(m.releases.foreign_net, WEEKS_IN_YEAR, 1)[:, -1]), lag_sessions=1),
    Feature("flow_individual_net_z", "investor flow", "raw", _WEEKS, _flows(*_INDIVIDUAL),
            "52-week z of flow_individual_net_ratio",
            lambda m: m.by_section(weekly_zscores(m.releases.individual_net, WEEKS_IN_YEAR, 1)[:, -1]),
            lag_sessions=1),
    Feature("flow_activity_z", "investor flow", "raw", _WEEKS, _flows("TotalTotal"), "52-week z of TotalTotal",
            lambda m: m.by_section(weekly_zscores(m.releases.total, WEEKS_IN_YEAR, 1)[:, -1]), lag_sessions=1),
    Feature("flow_smart_idx", "investor flow", "raw", _WEEKS, _SMART, "flow_foreign_net_z − flow_individual_net_z",
            lambda m: m.by_section(m.smart_weeks()[:, -1]), lag_sessions=1),
    Feature("flow_smart_mom4", "investor flow", "raw", _WEEKS, _SMART, "flow_smart_idx − its 4-week mean",
            lambda m: m.by_section(m.smart_weeks()[:, -1] - weekly_mean(m.smart_weeks(), 4)), lag_sessions=1),
    Feature("flow_shock_flag", "investor flow", "raw", _WEEKS, _SMART, "1 where abs(flow_smart_idx) ≥ 2",
            lambda m: m.by_section(reaches(np.abs(m.smart_weeks()[:, -1]), 2.0)), lag_sessions=1),
    Feature("flow_impulse", "investor flow", "raw", _WEEKS, _flows(),
            "1 at the first session that may use a release, halved each session",
            lambda m: 0.5 ** (m.since_release() - 1.0), lag_sessions=1),
    Feature("flow_days_since", "investor flow", "raw", _WEEKS, _flows(), "sessions since the release / 5",
            lambda m: m.since_release() / 5.0, lag_sessions=1),

    Feature("stmt_yoy_sales", "statements", "cs", _YEARS, _statements("NetSales"),
            "(NetSales − that of the same period a year ago) / abs(that)",
            lambda m: m.in_force(growth(m.stmt("NetSales"), m.stmt("NetSales_year_ago")))),
    Feature("stmt_yoy_op", "statements", "cs", _YEARS, _statements("OperatingProfit"), "the same of OperatingProfit",
            lambda m: m.in_force(growth(m.stmt("OperatingProfit"), m.stmt("OperatingProfit_year_ago")))),
    Feature("stmt_yoy_np", "statements", "cs", _YEARS, _statements("Profit"), "the same of Profit",
            lambda m: m.in_force(growth(m.stmt("Profit"), m.stmt("Profit_year_ago")))),
    Feature("stmt_opm", "statements", "cs", _YEARS, _statements("OperatingProfit", "NetSales"),
            "OperatingProfit / NetSales",
            lambda m: m.in_force(ratio(m.stmt("OperatingProfit"), m.stmt("NetSales")))),
    Feature("stmt_npm", "statements", "cs", _YEARS, _statements("Profit", "NetSales"), "Profit / NetSales",
            lambda m: m.in_force(ratio(m.stmt("Profit"), m.stmt("NetSales")))),
    Feature("stmt_progress_op", "statements",
            "cs", _YEARS, _statements("OperatingProfit", *_forecasts("OperatingProfit")),
            "OperatingProfit so far / full-year forecast in force",
            lambda m: m.in_force(ratio(m.stmt("OperatingProfit"), m.stmt("OperatingProfit_full_year")))),
    Feature("stmt_progress_np", "statements", "cs", _YEARS, _statements("Profit", *_forecasts("Profit")),
            "Profit so far / full-year forecast in force",
            lambda m: m.in_force(ratio(m.stmt("Profit"), m.stmt("Profit_full_year")))),
    Feature("stmt_rev_fore_op", "statements", "cs", _YEARS, _statements(*_forecasts("OperatingProfit")),
            "(forecast − the one before for the same year) / abs(that), OperatingProfit",
            lambda m: m.in_force(growth(m.stmt("OperatingProfit_forecast"),
                                   m.stmt("OperatingProfit_forecast_before")), "forecast")),
    Feature("stmt_rev_fore_np", "statements", "cs", _YEARS, _statements(*_forecasts("Profit")), "the same of Profit",
            lambda m: m.in_force(growth(m.stmt("Profit_forecast"), m.stmt("Profit_forecast_before")), "forecast")),
    Feature("stmt_roe", "statements", "cs", _YEARS, _statements("Profit", "Equity"), "Profit / Equity",
            lambda m: m.in_force(ratio(m.stmt("Profit"), m.stmt("Equity")))),
    Feature("stmt_roa", "statements", "cs", _YEARS, _statements("Profit", "TotalAssets"), "Profit / TotalAssets",
            lambda m: m.in_force(ratio(m.stmt("Profit"), m.stmt("TotalAssets")))),
    Feature("stmt_recent_flag", "statements", "raw", _YEARS, _statements(),
            "1 in the first 5 sessions that know the latest document",
            lambda m: 1.0 - reaches(m.sessions_since_document(), 5.0)),
    Feature("stmt_days_since", "statements", "cs", _YEARS, _statements(), "calendar days since the latest document",
            lambda m: m.document_age("document")),

    Feature("is_flow_valid", "masks", "raw", _WEEKS, _flows(), "1 where the section has a release",
            lambda m: is_known(m.since_release()), lag_sessions=1),
    Feature("is_stmt_valid", "masks", "raw", _YEARS, _statements(), "1 where results no older than 400 days are known",
            lambda m: is_known(m.document_age("results"))),
    Feature("is_ma_valid", "masks", "raw", _emas(200), _CLOSE, "1 from the 200th traded session on",
            lambda m: m.has_traded(200)),
    Feature("is_sector_valid", "masks", "raw", _STEP, _SECTOR, "1 where 5 members of the sector have an R_1",
            lambda m: is_known(m.of_sector(m.sector_ret(1)))),
)
# fmt: on


def validated(rows: tuple[Feature, ...]) -> tuple[Feature, ...]:
    """Checks each row against what its own expression reads, and returns the rows.

    Raises: InputError that names the row. Faults are: a wrong count, a repeated name, an unknown norm or table,
    a column read but not declared, a column declared but not read, a window shorter than the expression looks back, and
    a lag shorter than the tables' publication rule.
    """
    names = [row.name for row in rows]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(f"registry.py: {repeated[0]} is there twice; rename one")
    if len(rows) != FEATURE_COUNT:
        raise InputError(f"registry.py: expected {FEATURE_COUNT} features, found {len(rows)}")
    for row in rows:
        fault = _fault(row)
        if fault:
            raise InputError(f"registry.py: {row.name}: {fault}")
    return rows


def _fault(row: Feature) -> str | None:
    """The first fault of one row, as a sentence; None without a fault."""
    if row.norm not in NORMS:
        return f"expected a norm of {', '.join(NORMS)}, found {row.norm!r}"
    unknown = sorted(set(row.tables) - set(PUBLICATION))
    if unknown or not row.reads:
        return f"expected columns of the tables {', '.join(PUBLICATION)}, found {', '.join(row.reads) or 'none'}"
    if row.lag_sessions < row.publication_lag:
        late = next(table for table in row.tables if PUBLICATION[table].lag_sessions > row.lag_sessions)
        rule = PUBLICATION[late]
        return (
            f"lag of {row.lag_sessions} sessions, but {late} counts from the {rule.rule}; set lag_sessions to at least"
            f" {rule.lag_sessions}"
        )
    try:
        columns = row.trace.columns
    except (InputError, TypeError, AttributeError, ValueError, IndexError) as error:
        return f"{error}; write its expression in the words of vocabulary/"
    undeclared = sorted(columns - set(row.reads))
    if undeclared:
        return f"reads column {undeclared[0]} and does not declare it; add it to what it reads"
    idle = [column for column in row.reads if column not in row.trace.columns]
    if idle:
        return f"declares column {idle[0]} and never reads it; leave it out"
    if row.window_sessions < row.trace.window_sessions:
        return (
            f"window of {row.window_sessions} sessions, but its expression looks back over"
            f" {row.trace.window_sessions}; declare at least those"
        )
    return None


validated(REGISTRY)

FEATURE_NAMES: tuple[str, ...] = tuple(feature.name for feature in REGISTRY)


def registry_fingerprint() -> str:
    """Hash of every row's declared definition (names, windows, tables, formula texts), not of its code.

    Dataset, run and checkpoint carry it. A change of code alone shows in the dataset's own fingerprint, which hashes
    values.
    """
    return sha256_of([_definition(feature) for feature in REGISTRY])


def _definition(feature: Feature) -> list[Any]:
    return [
        feature.name,
        feature.family,
        feature.norm,
        feature.window_sessions,
        list(feature.reads),
        feature.formula,
        feature.lag_sessions,
    ]


def markdown_table() -> str:
    """The registry as docs/features.md shows it."""
    header = ["#", "name", "family", "formula", "window", "tables", "norm"]
    lines = [header, ["---"] * len(header)]
    for number, row in enumerate(REGISTRY, start=1):
        formula = re.sub(r"([|_*])", r"\\\1", row.formula)
        lines.append(
            [
                str(number),
                f"`{row.name}`",
                row.family,
                formula,
                str(row.window_sessions),
                ", ".join(row.tables),
                row.norm,
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
