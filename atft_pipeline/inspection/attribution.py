"""Where a long-short return comes from and what it would cost: costs, periods, capacity, exposures.

T sessions, N stocks in ascending code order. The portfolio is the one that `portfolio.long_short` holds for the same
scores. Its weights are shares of one leg's capital, which is what "capital" means here. A session is that of the score:
its return is earned after it (portfolio.py). A missing input is a `Missing` with its reason, never a zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from atft_pipeline.config.schema import EvaluationConfig
from atft_pipeline.errors import InputError
from atft_pipeline.evaluation import metrics
from atft_pipeline.evaluation.evaluate import EvaluationPanel, evaluate_panel
from atft_pipeline.evaluation.portfolio import COSTS_BPS, Book, after_costs, long_short_book
from atft_pipeline.evaluation.predictions_table import ScorePanel
from atft_pipeline.storage.json_values import plain_json

Array = NDArray[np.float64]
Days = NDArray[np.datetime64]

PARTICIPATIONS: tuple[float, ...] = (0.01, 0.05)
"""Shares of a stock's daily turnover value at which a trade starts to move the price it gets."""
UNKNOWN_SECTOR = "unknown"
LIQUIDITY_BUCKETS = 5
TURNOVER_WINDOW_SESSIONS = 20
LEAST_OBSERVED = 2 / 3
"""Share of the window's sessions that need a turnover value, as for the slice `liquid`."""


@dataclass(frozen=True)
class Missing:
    """A figure that cannot be computed, and why."""

    reason: str


@dataclass(frozen=True)
class Estimate:
    value: float
    """NaN where the sessions do not give one."""
    se: float
    sessions: int


@dataclass(frozen=True)
class Bucket:
    """Trades that enter, leave or reverse a name, of one fifth of their session's by liquidity."""

    name: str
    trades: int
    median_turnover_value: float
    """Trailing 20-session median of the daily turnover value of the median name, in the market's currency."""
    share_per_million: float
    """Share of that turnover value which one million of capital trades in the median name."""
    capital_at: dict[float, float]
    """Participation -> capital at which the median name's trade reaches it."""


@dataclass(frozen=True)
class Capacity:
    buckets: tuple[Bucket, ...]
    """Least liquid fifth first, then all names together."""
    unknown: int
    """Trades in names whose turnover value is not known; they are in no bucket."""


@dataclass(frozen=True)
class MarketExposure:
    """Regression of the long-short return on the equal-weight return of the investable stocks in the same interval."""

    beta: Estimate
    """Standard error robust to unequal variance (HC1)."""
    correlation: float
    market: Array = field(repr=False)
    """[T] the market's returns."""


@dataclass(frozen=True)
class SectorWeight:
    name: str
    mean_net: float
    """Long minus short, mean over sessions."""
    mean_absolute: float
    largest: float
    """Net weight, with its sign, of the session where its size was largest."""
    largest_on: str


@dataclass(frozen=True)
class SectorExposure:
    sectors: tuple[SectorWeight, ...]
    """Largest mean absolute net weight first."""
    mean_absolute: float
    """Over sessions and sectors."""

    @property
    def largest(self) -> SectorWeight:
        return max(self.sectors, key=lambda sector: abs(sector.largest))


@dataclass(frozen=True)
class SizeTilt:
    """Mean rank by turnover value, from 0 (least) to 1 (most traded), of the long minus the short leg."""

    tilt: Estimate
    by_session: Array = field(repr=False)
    """[T]; NaN in a session without a portfolio."""


@dataclass(frozen=True)
class Attribution:
    """Where the return of one set of scores comes from, and what it would cost."""

    sessions: Days = field(repr=False)
    gross: Array = field(repr=False)
    """[T] daily long-short returns."""
    costs: dict[float, Estimate]
    """Cost in bps -> daily Sharpe after it; 0 is gross."""
    turnover: Estimate
    """Mean sum of |weight changes| per session."""
    by_year: dict[str, Estimate]
    """Gross daily Sharpe of a calendar year's sessions."""
    by_month: dict[str, Estimate]
    capacity: Capacity | Missing
    market: MarketExposure | Missing
    sectors: SectorExposure | Missing
    size: SizeTilt | Missing

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON without the daily series; NaN and infinity as null."""
        return {name: plain_json(_fields(getattr(self, name))) for name in _REPORTED}


_REPORTED = ("costs", "turnover", "by_year", "by_month", "capacity", "market", "sectors", "size")


def _fields(value: Any) -> dict[str, Any]:
    """A reported value by its fields, the daily series left out."""
    if isinstance(value, Missing):
        return {"not_assessable": value.reason}
    if isinstance(value, Mapping):
        return {key: _fields(item) for key, item in value.items()}
    return {name: item for name, item in asdict(value).items() if not isinstance(item, np.ndarray)}


@dataclass(frozen=True)
class Surroundings:
    """Market data beside the portfolio, on its sessions and codes."""

    market: Array | Missing
    """[T] return of the market in the interval of the targets."""
    sector: NDArray[np.int64] | Missing
    """[T, N] number of the sector in `sector_names`, -1 where unknown."""
    sector_names: tuple[str, ...]
    median_turnover: Array | Missing
    """[T, N] trailing median of the daily turnover value, known at the close of the session."""


def attribute(panel: ScorePanel, around: Surroundings, config: EvaluationConfig) -> Attribution:
    """Attribution of the scores' long-short portfolio.

    Raises InputError for scores that the evaluation does not rank, with its reason.
    """
    # Nothing reported here is annualised: any number of days does.
    evaluated = EvaluationPanel(panel.sessions, panel.codes, panel.targets, days_per_year=1)
    evaluation = evaluate_panel(panel.scores, evaluated, config)
    if not evaluation.valid:
        raise InputError(evaluation.reason)
    gross, turnover = evaluation.daily["gross"], evaluation.daily["turnover"]
    book = long_short_book(panel.scores, panel.targets, quantile=config.quantile)
    return Attribution(
        sessions=panel.sessions,
        gross=gross,
        costs=sharpe_after_costs(gross, turnover),
        turnover=_mean(turnover),
        by_year=sharpe_by_period(gross, panel.sessions, "Y"),
        by_month=sharpe_by_period(gross, panel.sessions, "M"),
        capacity=_unless_missing(around.median_turnover, lambda turnover_value: capacity(book, turnover_value)),
        market=_unless_missing(around.market, lambda market: market_exposure(gross, market)),
        sectors=_unless_missing(
            around.sector,
            lambda number: sector_exposure(book.weights, number, around.sector_names, panel.sessions),
        ),
        size=_unless_missing(around.median_turnover, lambda turnover_value: size_tilt(book, turnover_value)),
    )


def _unless_missing(given: Any, computed: Callable[[Any], Any]) -> Any:
    return given if isinstance(given, Missing) else computed(given)


def _mean(values: Array) -> Estimate:
    return Estimate(*metrics.mean_and_error(values), int(np.isfinite(values).sum()))


def _sharpe(returns: Array) -> Estimate:
    return Estimate(metrics.sharpe(returns), metrics.sharpe_standard_error(returns), int(np.isfinite(returns).sum()))


# Costs and periods -----------------------------------------------------------------------------------------------


def sharpe_after_costs(gross: Array, turnover: Array, costs_bps: Sequence[float] = COSTS_BPS) -> dict[float, Estimate]:
    """Daily Sharpe of gross - cost_bps/1e4 * turnover for each cost; both [T], NaN in a session without a portfolio."""
    return {bps: _sharpe(after_costs(gross, turnover, bps)) for bps in costs_bps}


def sharpe_by_period(gross: Array, sessions: Days, unit: Literal["Y", "M"]) -> dict[str, Estimate]:
    """Daily Sharpe, standard error and sessions of each calendar year ("2014") or month ("2014-03"), in order.

    A month has some twenty sessions, so its standard error is about 0.22: months show spread, not skill.
    """
    period = sessions.astype(f"datetime64[{unit}]")
    return {str(one): _sharpe(gross[period == one]) for one in np.unique(period)}


# Capacity and size -----------------------------------------------------------------------------------------------


def trailing_median(values: Array, window: int = TURNOVER_WINDOW_SESSIONS) -> Array:
    """[T, N] median of the `window` sessions that end with t, NaN cells left out; NaN below two thirds of a window."""
    T = len(values)
    medians = np.full(values.shape, np.nan)
    min_observations = math.ceil(window * LEAST_OBSERVED)
    for t in range(T):
        ordered = np.sort(values[max(0, t - window + 1) : t + 1], axis=0)  # NaN last
        count = np.isfinite(ordered).sum(axis=0)
        middle = np.maximum(count - 1, 0)
        low, high = (np.take_along_axis(ordered, k[None], axis=0)[0] for k in (middle // 2, (middle + 1) // 2))
        medians[t] = np.where(count >= min_observations, 0.5 * (low + high), np.nan)
    return medians


def capacity(book: Book, median_turnover: Array, buckets: int = LIQUIDITY_BUCKETS) -> Capacity | Missing:
    """How much capital the names take that the portfolio enters, leaves or reverses, by their liquidity.

    Each session's such names are ranked by `median_turnover` [T, N] and cut into `buckets` of equal number. Left out
    are the small trades that bring a name kept on its side back to equal weight: they say nothing about capacity, and
    with them the median name would be one that hardly trades. A name whose median turnover value is 0 takes no capital.
    """
    before = book.weights - book.trades
    traded = (book.trades != 0.0) & (book.weights * before <= 0.0)
    counted = traded & np.isfinite(median_turnover)
    if not counted.any():
        return Missing("the turnover value of none of the traded names is known")
    bucket = np.full(counted.shape, -1)
    for t in np.flatnonzero(counted.any(axis=1)):
        names = np.flatnonzero(counted[t])
        order = np.argsort(median_turnover[t, names], kind="stable")
        bucket[t, names[order]] = np.arange(len(names)) * buckets // len(names)
    with np.errstate(divide="ignore"):
        share = np.abs(book.trades[counted]) / median_turnover[counted]
    turnover, number = median_turnover[counted], bucket[counted]
    rows = [
        _bucket(f"{k + 1} of {buckets}", share[number == k], turnover[number == k])
        for k in range(buckets)
        if (number == k).any()
    ]
    return Capacity((*rows, _bucket("all", share, turnover)), int((traded & ~counted).sum()))


def _bucket(name: str, share: Array, turnover: Array) -> Bucket:
    middle = float(np.median(share))
    capital = {participation: participation / middle for participation in PARTICIPATIONS}
    return Bucket(name, len(share), float(np.median(turnover)), 1e6 * middle, capital)


def size_tilt(book: Book, median_turnover: Array) -> SizeTilt | Missing:
    """Mean rank by turnover value of the long minus the short names; it stands in for size, as there are no shares.

    Ranks are (average rank - 1) / (n - 1) over the session's ranked stocks whose turnover value is known, so equal legs
    differ by 0 and opposite ends by almost 1. Names without one are left out.
    """
    ranked = book.ranked & np.isfinite(median_turnover)
    count = ranked.sum(axis=1, keepdims=True)
    rank = (metrics.average_ranks(median_turnover, ranked) - 1.0) / np.maximum(count - 1, 1)
    tilts = _leg_mean(rank, ranked & (book.weights > 0.0)) - _leg_mean(rank, ranked & (book.weights < 0.0))
    if not np.isfinite(tilts).any():
        return Missing("no session has a name with a known turnover value in both legs")
    return SizeTilt(_mean(tilts), tilts)


def _leg_mean(values: Array, leg: NDArray[np.bool_]) -> Array:
    count = leg.sum(axis=1)
    total = np.where(leg, values, 0.0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


# Market and sectors ----------------------------------------------------------------------------------------------


def market_exposure(gross: Array, market: Array) -> MarketExposure | Missing:
    """Slope of gross [T] on market [T] by least squares, with White's HC1 standard error, over sessions with both.

    Source: MacKinnon and White (1985).
    """
    both = np.isfinite(gross) & np.isfinite(market)
    n = int(both.sum())
    if n < 3:
        return Missing(f"{n} sessions have both a portfolio and a market return; a slope and its error need 3")
    x, y = market[both] - market[both].mean(), gross[both] - gross[both].mean()
    spread = float(x @ x)
    if not spread > 0.0:
        return Missing("the market's return is the same in every session")
    beta = float(x @ y) / spread
    residual = y - beta * x
    se = math.sqrt(n / (n - 2) * float((x * x) @ (residual * residual))) / spread
    length = math.sqrt(spread * float(y @ y))
    return MarketExposure(Estimate(beta, se, n), float(x @ y) / length if length > 0.0 else math.nan, market)


def sector_exposure(
    weights: Array, number: NDArray[np.int64], names: Sequence[str], sessions: Days
) -> SectorExposure | Missing:
    """Net weight (long minus short) per sector over the sessions that hold a portfolio.

    weights [T, N]; number [T, N] indexes `names`. -1 is a stock of unknown sector: those make a group of their own.
    """
    held = weights.any(axis=1)
    if not held.any():
        return Missing("no session has a portfolio")
    weights, number, sessions = weights[held], number[held], sessions[held]
    if not (number[weights != 0.0] >= 0).any():
        return Missing("the sector of none of the names held is known")
    sectors = []
    for k, name in enumerate([*names, UNKNOWN_SECTOR]):
        of_sector = number == (k if k < len(names) else -1)
        if (of_sector & (weights != 0.0)).any():
            net = np.where(of_sector, weights, 0.0).sum(axis=1)
            at = int(np.abs(net).argmax())
            sectors.append(
                SectorWeight(name, float(net.mean()), float(np.abs(net).mean()), float(net[at]), str(sessions[at]))
            )
    sectors.sort(key=lambda sector: -sector.mean_absolute)
    return SectorExposure(tuple(sectors), float(np.mean([sector.mean_absolute for sector in sectors])))
