"""The features' inputs: dense matrices of one market, and shared intermediates, each computed once.

Shapes: T sessions of the whole history, S rows of the present panels (the last S sessions), N stocks, G sectors, E
publications. Rows from `fresh` on are to be computed; features look back on the rows before them. Recursive averages
and the sectors' series cannot be recomputed from a few rows, so they are continued from `state`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from atft_pipeline.features.trace import Trace, is_trace
from atft_pipeline.features.vocabulary.averages import exponential, seen_at_least, series_ema
from atft_pipeline.features.vocabulary.cross_section import chained, group_median, of_group
from atft_pipeline.features.vocabulary.elementwise import change, either, positive, rise, strength
from atft_pipeline.features.vocabulary.events import document_in_force, of_event, weekly_zscores
from atft_pipeline.features.vocabulary.windows import (
    Regression,
    carry,
    lag,
    returns,
    rolling_mean_std,
    rolling_regression,
    rolling_std,
)
from atft_pipeline.market.disclosures import EXPIRY_DAYS, Disclosures, FlowReleases
from atft_pipeline.market.price_panel import QUOTES, Matrix

P = ParamSpec("P")
R = TypeVar("R")

BETA_WINDOW = 60
WEEKS_IN_YEAR = 52

State = Mapping[str, Any]
"""By name: an `Average`, a count `[N]`, or a series of the sectors `[T, G]`, after one session."""


def shared(compute: Callable[Concatenate[Market, P], R]) -> Callable[Concatenate[Market, P], R]:
    """Computes a method once per market and arguments, also when several threads call it at once."""

    @wraps(compute)
    def once(market: Market, *args: P.args, **kwargs: P.kwargs) -> R:
        key = (compute.__name__, *args)
        with market.lock:
            result = market.memo.get(key)
            is_first = result is None
            if result is None:
                result = market.memo[key] = Future()
        if is_first:
            try:
                result.set_result(compute(market, *args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - threads that wait for the result must raise it too
                result.set_exception(error)
        return result.result()

    return once


@dataclass
class Market:
    """Raw values of one market and the intermediates that several features use: matrices `[S, N]`, series `[T]`."""

    sessions: NDArray[np.datetime64]
    codes: Sequence[str]
    days_per_year: int
    quotes: Mapping[str, Matrix]
    """`QUOTES` by name, adjusted forward; null on an untraded session."""
    index_close: Matrix
    """[T], null where the index has no row."""
    investable: NDArray[np.bool_]
    sector_of: NDArray[np.int32]
    """[S, N] sector as known at the close, −1 without one."""
    sectors: int
    section_of: NDArray[np.int32]
    """[S, N] column of `releases.latest`, −1 where the section has no releases."""
    releases: FlowReleases
    documents: Disclosures
    """Its grid `latest` is `[S, N]`."""
    fresh: int = 0
    state: State = field(default_factory=dict, repr=False)
    """State after the sessions before row `fresh`; empty at the start of the data."""
    new_state: dict[str, Any] = field(default_factory=dict, repr=False)
    """State after the last row, filled in as features are computed."""
    memo: dict[tuple[Any, ...], Future[Any]] = field(default_factory=dict, repr=False)
    lock: Any = field(default_factory=threading.Lock, repr=False)

    @property
    def rows(self) -> int:
        return 0 if is_trace(self.investable) else len(self.investable)

    def span(self, start: int, stop: int, overlap: int) -> Market:
        """The market as of row `stop` − 1: rows from `start` on are fresh, with at most `overlap` rows before them."""
        first, later = max(0, start - overlap), self.rows - stop
        cut = len(self.sessions) - later
        return replace(
            self,
            sessions=self.sessions[:cut],
            quotes={name: panel[first:stop] for name, panel in self.quotes.items()},
            index_close=self.index_close[:cut],
            investable=self.investable[first:stop],
            sector_of=self.sector_of[first:stop],
            section_of=self.section_of[first:stop],
            releases=replace(self.releases, latest=self.releases.latest[:cut], since=self.releases.since[:cut]),
            documents=replace(self.documents, latest=self.documents.latest[first:stop]),
            fresh=start - first,
            memo={},
            lock=threading.Lock(),
        )

    def recent(self, overlap: int) -> Market:
        """The market with at most `overlap` rows before the fresh ones; it fills the same `new_state`."""
        return self if overlap >= self.fresh else self.span(self.fresh, self.rows, overlap)

    # --- raw ---

    @property
    def open(self) -> Matrix:
        return self.quotes["Open"]

    @property
    def high(self) -> Matrix:
        return self.quotes["High"]

    @property
    def low(self) -> Matrix:
        return self.quotes["Low"]

    @property
    def close(self) -> Matrix:
        return self.quotes["Close"]

    @shared
    def volume(self) -> Matrix:
        """Shares traded; null where it is 0, an untraded session."""
        return positive(self.quotes["Volume"])

    @shared
    def turnover(self) -> Matrix:
        """Traded value; Close · Volume where the table states none, a product that no adjustment changes."""
        return either(self.quotes["TurnoverValue"], self.close * self.volume())

    def on_rows(self, series: Matrix) -> Matrix:
        """The last S rows of a series: `[T]` as a column `[S, 1]`, `[T, G]` as `[S, G]`."""
        if is_trace(series):
            return series
        rows = series[len(series) - self.rows :]
        return rows[:, None] if rows.ndim == 1 else rows

    # --- recursions, continued from the state ---

    def averaged(self, name: str, x: Matrix, alpha: float, first: int) -> Matrix:
        """Exponential average of a panel, continued from the state under `name`."""
        values, self.new_state[name] = exponential(x, alpha, first, self.state.get(name), self.fresh)
        return values

    def history(self, name: str, rows: Matrix) -> Matrix:
        """`[S, G]` values as a series `[T, G]`: the history in the state under `name`, then the fresh rows."""
        if is_trace(rows):
            return cast(Trace, rows).kept()  # type: ignore[return-value]
        before = self.state.get(name)
        fresh = rows[self.fresh :]
        self.new_state[name] = fresh if before is None else np.concatenate([before, fresh])
        return self.new_state[name]

    # --- stocks ---

    @shared
    def carried(self) -> Matrix:
        return carry(self.close)

    @shared
    def ret(self, sessions: int) -> Matrix:
        """R_h of each stock."""
        return returns(self.close, self.carried(), sessions)

    def volatility(self, window: int) -> Matrix:
        """std(R_1, window) · √D."""
        return rolling_std(self.ret(1), window) * np.sqrt(self.days_per_year)

    @shared
    def ema(self, span: int) -> Matrix:
        return self.averaged(f"ema_{span}", self.close, 2.0 / (span + 1), span)

    @shared
    def ma_gap(self) -> Matrix:
        return change(self.ema(5), self.ema(20))

    @shared
    def bands(self) -> tuple[Matrix, Matrix]:
        """Middle and σ (ddof 0) of the Bollinger bands. Source: John Bollinger, Bollinger on Bollinger Bands (2001)."""
        return rolling_mean_std(self.close, 20, 0)

    def macd_histogram(self) -> Matrix:
        """MACD minus its signal, EMA_9; each average starts with the mean of its own first values."""
        macd = self.ema(12) - self.ema(26)
        return macd - self.averaged("macd_signal", macd, 2.0 / 10, 9)

    @shared
    def steps(self) -> tuple[Matrix, Matrix]:
        """Rise and fall of the close since the last one."""
        last = lag(self.carried(), 1)
        return rise(self.close, last), rise(last, self.close)

    def rsi(self, window: int) -> Matrix:
        """Relative strength index in [0, 100]; 50 where the price has not moved.

        Gains and losses are averaged with alpha = 1 / window, starting as the mean of the first `window` changes.
        Source: J. Welles Wilder, New Concepts in Technical Trading Systems (1978), section VI.
        """
        gains, losses = (
            self.averaged(f"{name}_{window}", step, 1.0 / window, window)
            for name, step in zip(("gains", "losses"), self.steps(), strict=True)
        )
        return strength(gains, losses, self.close)

    def has_traded(self, sessions: int) -> Matrix:
        """1 from the stock's n-th traded session on."""
        values, self.new_state["traded"] = seen_at_least(self.close, sessions, self.state.get("traded"), self.fresh)
        return values

    # --- market ---

    @shared
    def mkt_ret(self, sessions: int) -> Matrix:
        return returns(self.index_close, carry(self.index_close), sessions)

    @shared
    def mkt_ema(self, span: int) -> Matrix:
        return series_ema(self.index_close, span)

    @shared
    def mkt_ma_gap(self) -> Matrix:
        return change(self.mkt_ema(5), self.mkt_ema(20))

    @shared
    def mkt_volatility(self) -> Matrix:
        return rolling_std(self.mkt_ret(1), 20) * np.sqrt(self.days_per_year)

    @shared
    def mkt_bands(self) -> tuple[Matrix, Matrix]:
        return rolling_mean_std(self.index_close, 20, 0)

    @shared
    def mkt_regression(self) -> Regression:
        """Regression of R_1 on the market's R_1 over 60 sessions."""
        return rolling_regression(self.ret(1), self.on_rows(self.mkt_ret(1)), BETA_WINDOW)

    def alpha(self, sessions: int) -> Matrix:
        """R_h − β · R_h of the market."""
        return self.ret(sessions) - self.mkt_regression().beta * self.on_rows(self.mkt_ret(sessions))

    # --- sectors ---

    @shared
    def sector_ret(self, sessions: int) -> Matrix:
        """Median R_h over the universe members of each sector, `[T, G]`."""
        medians = group_median(self.ret(sessions), self.investable, self.sector_of, self.sectors)
        return self.history(f"sector_ret_{sessions}", medians)

    @shared
    def sector_index(self) -> Matrix:
        """Level of each sector's chained median R_1, `[T, G]`."""
        return chained(self.sector_ret(1))

    def of_sector(self, values: Matrix) -> Matrix:
        """`[T, G]` values given to the stocks of each sector, `[S, N]`."""
        return of_group(self.on_rows(values), self.sector_of)

    def sector_alpha(self) -> Matrix:
        """R_1 − β_sector · sector R_1; each session uses the sector that the stock was in."""
        sector = self.of_sector(self.sector_ret(1))
        return self.ret(1) - rolling_regression(self.ret(1), sector, BETA_WINDOW).beta * sector

    # --- investor flows ---

    def by_section(self, values: Matrix) -> Matrix:
        """`[E]` values of releases given to the stocks of each market section, `[S, N]`."""
        return of_group(self.on_rows(of_event(values, self.releases.latest)), self.section_of)

    @shared
    def since_release(self) -> Matrix:
        return of_group(self.on_rows(self.releases.since), self.section_of)

    @shared
    def smart_weeks(self) -> Matrix:
        """52-week z of foreign minus that of individual net flows, last 4 weeks, `[E, 4]`, newest last."""
        flows = self.releases
        return weekly_zscores(flows.foreign_net, WEEKS_IN_YEAR, 4) - weekly_zscores(
            flows.individual_net, WEEKS_IN_YEAR, 4
        )

    # --- statements ---

    def stmt(self, name: str) -> Matrix:
        """`[E]` figure by document: the company's record once the document was public."""
        return self.documents.values[name]

    def in_force(self, values: Matrix, kind: str = "results") -> Matrix:
        """`[E]` values as known at each close, `[S, N]`; null once the results, forecast or document expired."""
        return document_in_force(
            values, _day_numbers(self.documents.disclosed[kind]), self.documents.latest, self._days, EXPIRY_DAYS
        )

    def sessions_since_document(self) -> Matrix:
        """Sessions since the latest document was first known, 0 at that session, null once it expired."""
        row = np.arange(len(self.sessions), dtype=np.float64)[-self.rows :, None]
        return row - self.in_force(self.documents.known_at, "document")

    def document_age(self, kind: str) -> Matrix:
        """Calendar days since the disclosure of the latest document, or of the results or forecast in force."""
        return self._days[:, None] - self.in_force(_day_numbers(self.documents.disclosed[kind]), kind)

    @property
    def _days(self) -> Matrix:
        return _day_numbers(self.sessions[-self.rows :])


def _day_numbers(days: Any) -> Matrix:
    """Days since 1970, NaN for NaT."""
    if is_trace(days):
        return cast(Matrix, days)
    numbers: Matrix = days.astype(np.float64)
    numbers[np.isnat(days)] = np.nan
    return numbers


# --- what expressions read --------------------------------------------------------------------------------------------

RELEASE: tuple[str, ...] = tuple(f"investor_flows.{name}" for name in ("PublishedDate", "EndDate", "Section"))
"""Columns that say which section and week a row of flows is about, and since when it is known."""
INVESTOR_BALANCES: tuple[str, ...] = tuple(
    f"investor_flows.{name}Balance"
    for name in (
        "Individuals", "Foreigners", "SecuritiesCos", "InvestmentTrusts", "BusinessCos", "OtherCos", "InsuranceCos",
        "CityBKsRegionalBKsEtc", "TrustBanks", "OtherFinancialInstitutions",
    )
)  # fmt: skip
DOCUMENT: tuple[str, ...] = tuple(
    f"statements.{name}"
    for name in ("LocalCode", "DisclosedDate", "DisclosedTime", "TypeOfDocument", "TypeOfCurrentPeriod")
)
"""Columns that say whose document it is, for which period, and since when it is known."""
UNIVERSE: tuple[str, ...] = ("prices.Close", "prices.Volume", "listed.MarketCode", "listed.Sector33Code")
"""Columns that decide whether a stock is investable."""
_EXPIRY_SESSIONS = 286
"""Sessions within `EXPIRY_DAYS` calendar days."""
_YEAR_SESSIONS = 262


class _Values(dict[str, Trace]):
    """Traces of the documents' values by name."""

    def __missing__(self, name: str) -> Trace:
        figure = name.split("_")[0]
        forecast = (f"statements.Forecast{figure}", f"statements.NextYearForecast{figure}")
        columns = (f"statements.{figure}",) if name == figure or name.endswith("_year_ago") else forecast
        sessions = _YEAR_SESSIONS if name.endswith("_year_ago") else 0
        return _document_trace(*columns).reaching(sessions)


def _document_trace(*columns: str) -> Trace:
    return Trace(frozenset((*DOCUMENT, *columns)), is_series=True).reaching(_EXPIRY_SESSIONS - 1)


def _release_trace(*columns: str) -> Trace:
    return Trace(frozenset((*RELEASE, *(f"investor_flows.{name}" for name in columns))), is_series=True)


def traced_market() -> Market:
    """A market of traces: an expression evaluated on it returns what it reads."""
    document, panel = _document_trace(), Trace()
    traces: Any = {
        "quotes": {name: Trace(frozenset({f"prices.{name}"})) for name in QUOTES},
        "index_close": Trace(frozenset({"index.Close"}), is_series=True),
        "investable": Trace(frozenset(UNIVERSE)),
        "sector_of": Trace(frozenset({"listed.Sector33Code"})),
        "section_of": Trace(frozenset({"listed.MarketCode"})),
        "releases": FlowReleases(
            sections=(),
            foreign_net=_release_trace("ForeignersBalance", "ForeignersTotal"),  # type: ignore[arg-type]
            individual_net=_release_trace("IndividualsBalance", "IndividualsTotal"),  # type: ignore[arg-type]
            total=_release_trace("TotalTotal"),  # type: ignore[arg-type]
            buying_share=Trace(frozenset((*RELEASE, *INVESTOR_BALANCES)), is_series=True),  # type: ignore[arg-type]
            latest=_release_trace(),  # type: ignore[arg-type]
            since=_release_trace(),  # type: ignore[arg-type]
        ),
        "documents": Disclosures(
            latest=panel,  # type: ignore[arg-type]
            known_at=document,  # type: ignore[arg-type]
            values=_Values(),  # type: ignore[arg-type]
            disclosed=dict.fromkeys(("document", "results", "forecast"), document),  # type: ignore[arg-type]
        ),
    }
    return Market(np.empty(0, "datetime64[D]"), (), days_per_year=1, sectors=0, **traces)
