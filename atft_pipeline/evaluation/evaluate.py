"""One evaluation for everything: every epoch of a run, the baselines, and any table of predictions.

T sessions, N stocks in ascending code order. `scores[t]` is known at the close of session t, `targets[t]` is the raw
forward return from the execution price, NaN missing. What cannot be ranked (constant or non-finite scores) is never
ranked: the evaluation comes back invalid with its reason. What cannot be evaluated at all is an InputError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atft_pipeline.config.schema import EvaluationConfig
from atft_pipeline.errors import InputError
from atft_pipeline.evaluation import metrics
from atft_pipeline.evaluation.portfolio import DailyPortfolio, jpx_spread_returns, long_short, long_short_tranches

STATISTICS: dict[str, str] = {
    "ic_mean": "correlation",
    "icir": "ratio",
    "rank_ic_mean": "correlation",
    "rank_icir": "ratio",
    "sharpe_daily": "per session",
    "sharpe_daily_net": "per session",
    "sharpe_annualised": "per year",
    "sharpe_annualised_lo": "per year",
    "jpx_spread_sharpe": "per session",
    "max_drawdown": "fraction",
    "turnover_mean": "sum of |weight changes|",
    "sharpe_se": "per session",
    "psr_0": "probability",
    "deflated_sharpe": "probability",
    "min_track_record_sessions": "sessions",
    "sharpe_ci_low": "per session",
    "sharpe_ci_high": "per session",
    "sessions": "sessions",
    "sessions_without_portfolio": "sessions",
    "dropped_targets": "rows",
}
"""Every statistic and its unit."""

DAILY: tuple[str, ...] = ("ic", "rank_ic", "gross", "net", "turnover", "jpx_spread", "stocks")

_NO_DISPERSION = 1e-12
_BOOTSTRAP_SEED = 20


@dataclass(frozen=True)
class Statistic:
    value: float | None
    """None where it cannot be computed."""
    unit: str
    se: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Statistics of one set of scores, with the daily series they summarise."""

    sessions: NDArray[np.datetime64]
    daily: dict[str, NDArray[np.float64]]
    """Keys `DAILY`, each [T]; NaN where a session has no value, throughout when the evaluation is invalid."""
    statistics: dict[str, Statistic]
    """Keys `STATISTICS`."""
    valid: bool
    reason: str
    """Why the evaluation is invalid; empty when it is valid."""
    notes: tuple[str, ...] = ()

    def value(self, name: str) -> float | None:
        return self.statistics[name].value

    def values(self) -> dict[str, float | None]:
        return {name: statistic.value for name, statistic in self.statistics.items()}

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON: the statistics at the top level, with `valid`, `reason` and `notes`."""
        return {**self.values(), "valid": self.valid, "reason": self.reason, "notes": list(self.notes)}


def evaluate(
    scores: NDArray[np.floating],
    targets: NDArray[np.floating],
    sessions: NDArray[np.datetime64],
    codes: Sequence[str] | NDArray[Any],
    config: EvaluationConfig,
    *,
    days_per_year: int,
    bootstrap: bool,
    trials: int = 1,
    member: NDArray[np.bool_] | None = None,
    horizon_sessions: int = 1,
    returns_1d: NDArray[np.floating] | None = None,
) -> Evaluation:
    """Evaluation of `scores` against `targets`, both [T, N], over the cells of `member` [T, N].

    Without `member` a cell counts as soon as it has a score or a target, so a target whose score is NaN makes the
    evaluation invalid; pass the universe when NaN scores mean "not in it". Every `member` cell with a target needs a
    finite score; cells without a target are dropped before ranking and counted in `dropped_targets`. A session whose
    scores are all equal (range within 1e-12 of their size) among at least two stocks makes the evaluation invalid.
    The portfolio of a horizon above 1 is held in tranches on `returns_1d` [T, N], the one-session forward returns.
    `trials` is the number of models tried, for the deflated Sharpe.

    Raises InputError: shapes that differ, codes out of order, infinite targets, no target at all, fewer than two
    sessions in which at least two stocks have a target, a horizon above 1 without `returns_1d`, a year without days,
    no trial.
    """
    if days_per_year < 1:
        raise InputError(f"evaluation: days_per_year must be at least 1, found {days_per_year}; Tokyo has 245")
    if trials < 1:
        raise InputError(f"evaluation: trials must be at least 1, found {trials}; the model evaluated is one of them")
    score: NDArray[np.float64] = np.asarray(scores, np.float64)
    target: NDArray[np.float64] = np.asarray(targets, np.float64)
    sessions, codes = np.asarray(sessions, "datetime64[D]"), np.asarray(codes)
    shape = (len(sessions), len(codes))
    for name, cells in (("scores", score), ("targets", target), ("members", member)):
        if cells is not None and cells.shape != shape:
            raise InputError(f"evaluation: expected {name} of shape {shape} (sessions, codes), found {cells.shape}")
    if member is None:
        member = ~np.isnan(score) | ~np.isnan(target)
    _require_usable(target, sessions, codes, member)
    if horizon_sessions > 1 and returns_1d is None:
        raise InputError(
            f"evaluation: a horizon of {horizon_sessions} sessions overlaps and is held in tranches; it needs the"
            " one-session forward returns beside its own target"
        )
    due = member & ~np.isnan(target)
    dropped = int((member & np.isnan(target)).sum())
    reason = _unrankable(score, due, sessions)
    if reason:
        return invalid(sessions, due, dropped, reason)
    score, target = np.where(member, score, np.nan), np.where(member, target, np.nan)
    costs = {"quantile": config.quantile, "cost_bps": config.cost_bps}
    if horizon_sessions > 1 and returns_1d is not None:
        held = np.where(member, returns_1d, np.nan)
        portfolio = long_short_tranches(score, held, horizon_sessions, **costs)
    else:
        portfolio = long_short(score, target, **costs)
    daily = {
        "ic": metrics.information_coefficient(score, target),
        "rank_ic": metrics.rank_information_coefficient(score, target),
        "gross": portfolio.gross,
        "net": portfolio.net,
        "turnover": portfolio.turnover,
        "jpx_spread": jpx_spread_returns(score, target),
        "stocks": portfolio.stocks.astype(np.float64),
    }
    statistics = _statistics(daily, portfolio, config, days_per_year, bootstrap, trials, dropped, member)
    notes = () if statistics["sharpe_daily"].value is not None else (_no_sharpe(config, portfolio),)
    return Evaluation(sessions, daily, statistics, True, "", notes)


def _require_usable(
    targets: NDArray[np.float64],
    sessions: NDArray[np.datetime64],
    codes: NDArray[Any],
    member: NDArray[np.bool_],
) -> None:
    if (codes[1:] <= codes[:-1]).any() or (sessions[1:] <= sessions[:-1]).any():
        raise InputError("evaluation: sessions and codes must be in ascending order, each once; sort the panel first")
    if np.isinf(targets[member]).any():
        day = sessions[np.isinf(np.where(member, targets, 0.0)).any(axis=1)][0]
        raise InputError(f"evaluation: a target is infinite on {day}; leave it null where the return is unknown")
    stocks = (member & ~np.isnan(targets)).sum(axis=1)
    if not stocks.any():
        raise InputError(
            "evaluation: no row has a target; evaluate sessions whose forward returns are known already"
            if member.any()
            else "evaluation: no row to evaluate; check the universe and the split"
        )
    if stocks.max() < 2:
        raise InputError("evaluation: no session has two stocks with a target; a ranking needs at least two")
    if (stocks >= 2).sum() < 2:
        day = sessions[stocks >= 2][0]
        raise InputError(
            f"evaluation: only one session ({day}) has two stocks with a target; a standard deviation over sessions"
            " needs at least two"
        )


def _unrankable(scores: NDArray[np.float64], due: NDArray[np.bool_], sessions: NDArray[np.datetime64]) -> str:
    """Why these scores cannot be ranked, or an empty string."""
    broken = due & ~np.isfinite(scores)
    if broken.any():
        first = sessions[broken.any(axis=1)][0]
        return (
            f"scores are not finite: {int(broken.sum())} of {int(due.sum())} rows with a target have none or an"
            f" infinite one, first on {first}"
        )
    constant = constant_sessions(scores, due)
    if constant.any():
        ranked = int((due.sum(axis=1) >= 2).sum())
        return (
            f"scores are constant: in {int(constant.sum())} of {ranked} sessions every stock has the same score,"
            f" first on {sessions[constant][0]}"
        )
    return ""


def constant_sessions(scores: NDArray[np.float64], due: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[T] sessions with at least two stocks in `due` whose scores do not differ by more than 1e-12 of their size."""
    high = np.where(due, scores, -np.inf).max(axis=1, initial=-np.inf)
    low = np.where(due, scores, np.inf).min(axis=1, initial=np.inf)
    ranked = due.sum(axis=1) >= 2
    size = np.maximum(np.abs(high), np.abs(low))
    flat = np.zeros(len(scores), bool)
    flat[ranked] = high[ranked] - low[ranked] <= _NO_DISPERSION * size[ranked]
    return flat


def invalid(sessions: NDArray[np.datetime64], due: NDArray[np.bool_], dropped: int, reason: str) -> Evaluation:
    daily = {name: np.full(len(sessions), np.nan) for name in DAILY}
    daily["stocks"] = due.sum(axis=1).astype(np.float64)
    statistics = {name: Statistic(None, unit) for name, unit in STATISTICS.items()}
    statistics["sessions"] = Statistic(0.0, STATISTICS["sessions"])
    statistics["dropped_targets"] = Statistic(float(dropped), STATISTICS["dropped_targets"])
    return Evaluation(sessions, daily, statistics, False, reason)


def _statistics(
    daily: dict[str, NDArray[np.float64]],
    portfolio: DailyPortfolio,
    config: EvaluationConfig,
    days_per_year: int,
    bootstrap: bool,
    trials: int,
    dropped: int,
    member: NDArray[np.bool_],
) -> dict[str, Statistic]:
    gross, net = portfolio.gross, portfolio.net
    held = np.isfinite(gross)
    year = math.sqrt(days_per_year)
    ratio, error = metrics.sharpe(gross), metrics.sharpe_standard_error(gross)
    lo = metrics.lo_annualised_sharpe(gross, days_per_year)
    interval = (math.nan, math.nan)
    if bootstrap:
        interval = metrics.bootstrap_interval(gross, samples=config.bootstrap_samples, seed=_BOOTSTRAP_SEED)
    ic, rank_ic = daily["ic"], daily["rank_ic"]
    values: dict[str, tuple[float, float]] = {
        "ic_mean": metrics.mean_and_error(ic),
        "icir": (metrics.sharpe(ic), metrics.sharpe_standard_error(ic)),
        "rank_ic_mean": metrics.mean_and_error(rank_ic),
        "rank_icir": (metrics.sharpe(rank_ic), metrics.sharpe_standard_error(rank_ic)),
        "sharpe_daily": (ratio, error),
        "sharpe_daily_net": (metrics.sharpe(net), metrics.sharpe_standard_error(net)),
        "sharpe_annualised": (ratio * year, error * year),
        "sharpe_annualised_lo": (lo, error * lo / ratio if ratio else math.nan),
        "jpx_spread_sharpe": (metrics.sharpe(daily["jpx_spread"]), metrics.sharpe_standard_error(daily["jpx_spread"])),
        "max_drawdown": (metrics.max_drawdown(gross), math.nan),
        "turnover_mean": metrics.mean_and_error(portfolio.turnover),
        "sharpe_se": (error, math.nan),
        "psr_0": (metrics.probabilistic_sharpe(gross), math.nan),
        "deflated_sharpe": (metrics.deflated_sharpe(gross, trials), math.nan),
        "min_track_record_sessions": (metrics.minimum_track_record(gross), math.nan),
        "sharpe_ci_low": (interval[0], math.nan),
        "sharpe_ci_high": (interval[1], math.nan),
        "sessions": (float(held.sum()), math.nan),
        "sessions_without_portfolio": (float((member.any(axis=1) & ~held).sum()), math.nan),
        "dropped_targets": (float(dropped), math.nan),
    }
    return {
        name: Statistic(metrics.finite_or_none(v), STATISTICS[name], metrics.finite_or_none(se))
        for name, (v, se) in values.items()
    }


def _no_sharpe(config: EvaluationConfig, portfolio: DailyPortfolio) -> str:
    if not (held := int(np.isfinite(portfolio.gross).sum())):
        needed = math.ceil(1.0 / config.quantile)
        return f"no session has the {needed} stocks that one stock a side needs (largest: {portfolio.stocks.max()})"
    return f"the {held} daily returns of the portfolio have no standard deviation"
