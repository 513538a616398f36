"""The market as the features see it: dense panels, and the intermediates they share, each computed once.

Shapes: T sessions, N stocks, G sectors, S market sections. Every access to raw data is noted under the table it comes
from, so that an expression that reads a table it does not declare is found out when it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from atft_pipeline.features import expressions as ex
from atft_pipeline.point_in_time import EXPIRY_DAYS, Disclosures, FlowReleases

Panel = NDArray[np.float64]
P = ParamSpec("P")
R = TypeVar("R")

BETA_WINDOW = 60
WEEKS_IN_YEAR = 52


def shared(compute: Callable[Concatenate[Market, P], R]) -> Callable[Concatenate[Market, P], R]:
    """Computes once per market and arguments, and remembers which tables went into it."""

    @wraps(compute)
    def once(market: Market, *args: P.args, **kwargs: P.kwargs) -> R:
        key = (compute.__name__, *args)
        if key not in market.memo:
            outer, market.tables_read = market.tables_read, set()
            try:
                market.memo[key] = (compute(market, *args, **kwargs), market.tables_read)
            finally:
                market.tables_read = outer
        value, tables = market.memo[key]
        market.tables_read |= tables
        return value

    return once


@dataclass
class Market:
    """Raw panels of one market and the intermediates that several features use. Panels are `[T, N]`, series `[T]`."""

    sessions: NDArray[np.datetime64]
    codes: Sequence[str]
    days_per_year: int
    raw: Mapping[str, Panel]
    """Open, High, Low, Close, Volume, TurnoverValue, adjusted forward; null on an untraded session."""
    index_close: Panel
    """[T], null where the index has no row."""
    investable: NDArray[np.bool_]
    sector_of: NDArray[np.int32]
    """[T, N] sector as known at the close, −1 without one."""
    sectors: int
    section_of: NDArray[np.int32]
    """[T, N] column of `releases.latest`, −1 where the section has no releases."""
    releases: FlowReleases
    documents: Disclosures
    memo: dict[tuple[Any, ...], tuple[Any, set[str]]] = field(default_factory=dict, repr=False)
    tables_read: set[str] = field(default_factory=set, repr=False)

    # --- raw, by table ---

    def price(self, column: str) -> Panel:
        self.tables_read.add("prices")
        return self.raw[column]

    @property
    def open(self) -> Panel:
        return self.price("Open")

    @property
    def high(self) -> Panel:
        return self.price("High")

    @property
    def low(self) -> Panel:
        return self.price("Low")

    @property
    def close(self) -> Panel:
        return self.price("Close")

    @property
    def volume(self) -> Panel:
        """Shares; a volume of 0 is an untraded session and null."""
        return np.where(self.price("Volume") > 0.0, self.price("Volume"), np.nan)

    @property
    def turnover(self) -> Panel:
        """Money; Close · Volume where the table has none, which no adjustment changes."""
        value = self.price("TurnoverValue")
        return np.where(np.isnan(value), self.close * self.volume, value)

    @property
    def index(self) -> Panel:
        self.tables_read.add("index")
        return self.index_close

    @property
    def universe(self) -> NDArray[np.bool_]:
        """Investable stocks of each session: decided from their own prices and from what they are listed as."""
        self.tables_read |= {"prices", "listed"}
        return self.investable

    @property
    def sector(self) -> NDArray[np.int32]:
        self.tables_read.add("listed")
        return self.sector_of

    @property
    def flows(self) -> FlowReleases:
        self.tables_read.add("investor_flows")
        return self.releases

    @property
    def statements(self) -> Disclosures:
        self.tables_read.add("statements")
        return self.documents

    # --- stocks ---

    @shared
    def carried(self) -> Panel:
        return ex.carry(self.close)

    @shared
    def ret(self, sessions: int) -> Panel:
        """R_h of each stock."""
        return ex.returns(self.close, self.carried(), sessions)

    def volatility(self, window: int) -> Panel:
        """std(R_1, window) · √D."""
        return ex.rolling_std(self.ret(1), window) * np.sqrt(self.days_per_year)

    @shared
    def ema(self, span: int) -> Panel:
        return ex.ema(self.close, span)

    @shared
    def ma_gap(self) -> Panel:
        return ex.change(self.ema(5), self.ema(20))

    @shared
    def bands(self) -> tuple[Panel, Panel]:
        """Middle and σ (ddof 0) of the Bollinger bands. Source: John Bollinger, Bollinger on Bollinger Bands (2001)."""
        return ex.rolling_mean_std(self.close, 20, 0)

    @shared
    def macd(self) -> Panel:
        return ex.ema(self.close, 12) - ex.ema(self.close, 26)

    # --- market ---

    @shared
    def mkt_ret(self, sessions: int) -> Panel:
        return ex.returns(self.index, ex.carry(self.index), sessions)

    @shared
    def mkt_ema(self, span: int) -> Panel:
        return ex.ema(self.index, span)

    @shared
    def mkt_ma_gap(self) -> Panel:
        return ex.change(self.mkt_ema(5), self.mkt_ema(20))

    @shared
    def mkt_volatility(self) -> Panel:
        return ex.rolling_std(self.mkt_ret(1), 20) * np.sqrt(self.days_per_year)

    @shared
    def mkt_bands(self) -> tuple[Panel, Panel]:
        return ex.rolling_mean_std(self.index, 20, 0)

    @shared
    def mkt_regression(self) -> tuple[Panel, Panel, Panel]:
        """Beta, correlation and residual std of R_1 on the market's, over 60 sessions."""
        return ex.rolling_regression(self.ret(1), self.mkt_ret(1), BETA_WINDOW)

    def alpha(self, sessions: int) -> Panel:
        """R_h − β · R_h of the market."""
        return self.ret(sessions) - self.mkt_regression()[0] * self.mkt_ret(sessions)[:, None]

    # --- sectors ---

    @shared
    def sector_ret(self, sessions: int) -> Panel:
        """Median R_h over the universe members of each sector, `[T, G]`."""
        return ex.group_median(self.ret(sessions), self.universe, self.sector, self.sectors)

    @shared
    def sector_index(self) -> Panel:
        """Level of each sector's chained median R_1, `[T, G]`."""
        return ex.chained(self.sector_ret(1))

    def of_sector(self, values: Panel) -> Panel:
        """`[T, G]` values given to the stocks of each sector, `[T, N]`."""
        return ex.of_group(values, self.sector)

    def sector_alpha(self) -> Panel:
        """R_1 − β_sector · sector R_1, each session with the sector that the stock was in."""
        sector = self.of_sector(self.sector_ret(1))
        return self.ret(1) - ex.rolling_regression(self.ret(1), sector, BETA_WINDOW)[0] * sector

    # --- investor flows ---

    def by_section(self, values: Panel) -> Panel:
        """`[E]` values of releases given to the stocks of each market section, `[T, N]`."""
        return self._spread(self._at_release(values))

    @shared
    def since_release(self) -> Panel:
        return self._spread(self.flows.since)

    @shared
    def smart_weeks(self) -> Panel:
        """Foreign minus individual 52-week z of the last 4 weeks, `[E, 4]`, newest last."""
        flows = self.flows
        return ex.weekly_zscores(flows.foreign_net, WEEKS_IN_YEAR, 4) - ex.weekly_zscores(
            flows.individual_net, WEEKS_IN_YEAR, 4
        )

    def _at_release(self, values: Panel) -> Panel:
        latest = self.flows.latest
        return np.where(latest >= 0, values[np.maximum(latest, 0)] if len(values) else np.nan, np.nan)

    def _spread(self, by_section: Panel) -> Panel:
        self.tables_read.add("listed")
        return ex.of_group(by_section, self.section_of)

    # --- statements ---

    @shared
    def stmt(self, name: str) -> Panel:
        """Figure in force at each close, null once its disclosure is more than 400 days old."""
        source = "forecast" if name.endswith(("_forecast", "_forecast_before")) else "results"
        return self._unexpired(source, self._of_document(self.statements.values[name]))

    @shared
    def document_age(self, kind: str) -> Panel:
        """Calendar days since the disclosure of the latest document, or of the results or forecast in force."""
        day = self.statements.disclosed[kind].astype(np.float64)
        day[np.isnat(self.statements.disclosed[kind])] = np.nan
        return self.sessions.astype(np.float64)[:, None] - self._of_document(day)

    def sessions_since_document(self) -> Panel:
        """Sessions since the latest document was first known, 0 at that session, null once it expired."""
        age = np.arange(len(self.sessions), dtype=np.float64)[:, None] - self._of_document(self.statements.known_at)
        return self._unexpired("document", age)

    def result_age(self) -> Panel:
        """Calendar days since the disclosure of the results in force, null once they expired."""
        return self._unexpired("results", self.document_age("results"))

    def unexpired_age(self) -> Panel:
        """Calendar days since the disclosure of the latest document of any kind, null once it expired."""
        return self._unexpired("document", self.document_age("document"))

    def _unexpired(self, kind: str, values: Panel) -> Panel:
        return np.where(self.document_age(kind) <= EXPIRY_DAYS, values, np.nan)

    def _of_document(self, values: Panel) -> Panel:
        latest = self.statements.latest
        return np.where(latest >= 0, values[np.maximum(latest, 0)] if len(values) else np.nan, np.nan)
