"""One evaluation for everything: every epoch of a run, the baselines, an ensemble, and any table of predictions.

T sessions, N stocks in ascending code order. `scores[t]` is known at the close of session t, `targets[t]` is the raw
forward return from the execution price, NaN where missing. Scores that cannot be ranked (constant or not finite) are
never ranked: the evaluation comes back invalid with its reason. A panel that cannot be evaluated is an InputError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atft_pipeline.config.schema import EvaluationConfig
from atft_pipeline.errors import InputError
from atft_pipeline.evaluation import metrics
from atft_pipeline.evaluation.portfolio import DailyPortfolio, jpx_spread_returns, long_short, long_short_tranches
from atft_pipeline.storage.json_values import finite_or_none

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

DAILY_SERIES: tuple[str, ...] = ("ic", "rank_ic", "gross", "net", "turnover", "jpx_spread", "stocks")
"""What an evaluation has one value of per session."""

SPLITS: tuple[str, ...] = ("validation", "test")
"""Splits that a model is evaluated on: those it was not fitted to."""

_NO_DISPERSION = 1e-12


@dataclass(frozen=True)
class EvaluationPanel:
    """What scores are held against, on T sessions and N codes."""

    sessions: NDArray[np.datetime64]
    """[T] ascending."""
    codes: Sequence[str] | NDArray[Any]
    """[N] ascending."""
    targets: NDArray[np.floating]
    """[T, N] forward returns, NaN where missing."""
    days_per_year: int
    """Sessions of a year, which annualise; Tokyo has 245."""
    member: NDArray[np.bool_] | None = None
    """[T, N] cells that are evaluated, the slice. Without it a cell counts as soon as it has a score or a target, so a
    target whose score is NaN makes the evaluation invalid; give the universe where a NaN score means "not in it"."""
    horizon_sessions: int = 1
    """Sessions that a target spans; above 1 the portfolio is held in tranches, which needs `returns_1d`."""
    returns_1d: NDArray[np.floating] | None = None
    """[T, N] one-session forward returns."""


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
    """Keys `DAILY_SERIES`, each [T]; NaN where a session has no value, throughout when the evaluation is invalid."""
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


def evaluate_panel(
    scores: NDArray[np.floating],
    panel: EvaluationPanel,
    config: EvaluationConfig,
    *,
    bootstrap: bool = False,
    trials: int = 1,
) -> Evaluation:
    """Evaluation of `scores` [T, N] against the panel's targets, over its member cells.

    Every member cell with a target needs a finite score; cells without a target are dropped before ranking and counted
    in `dropped_targets`. A session whose scores are all equal (range within 1e-12 of their size) among at least two
    stocks makes the evaluation invalid. `bootstrap` adds the interval of the Sharpe, which needs `arch`. `trials` is
    the number of models tried, for the deflated Sharpe.

    Raises InputError: shapes that differ, codes or sessions out of order, infinite targets, no target at all, fewer
    than two sessions in which at least two stocks have a target, a horizon above 1 without `returns_1d`, a year
    without days, no trial.
    """
    if trials < 1:
        raise InputError(f"evaluation: trials must be at least 1, found {trials}; the model evaluated is one of them")
    panel = _with_arrays(panel)
    score: NDArray[np.float64] = np.asarray(scores, np.float64)
    target: NDArray[np.float64] = np.asarray(panel.targets, np.float64)
    _require_shapes(panel, {"scores": score, "targets": target, "members": panel.member})
    member = ~np.isnan(score) | ~np.isnan(target) if panel.member is None else panel.member
    _require_targets(target, panel, member)
    due = member & ~np.isnan(target)
    dropped = int((member & np.isnan(target)).sum())
    if reason := _unrankable(score, due, panel.sessions):
        return invalid(panel.sessions, due, dropped, reason)
    score, target = np.where(member, score, np.nan), np.where(member, target, np.nan)
    portfolio = _portfolio(score, target, member, panel, config)
    daily = _daily_series(score, target, portfolio)
    without_portfolio = int((member.any(axis=1) & ~np.isfinite(portfolio.gross)).sum())
    statistics = _statistics(
        _portfolio_estimates(daily, panel.days_per_year, trials)
        | _score_estimates(daily)
        | _interval(portfolio.gross, config.bootstrap_samples if bootstrap else 0)
        | {
            "sessions_without_portfolio": (float(without_portfolio), math.nan),
            "dropped_targets": (float(dropped), math.nan),
        }
    )
    notes = () if statistics["sharpe_daily"].value is not None else (_no_sharpe(config, portfolio),)
    return Evaluation(panel.sessions, daily, statistics, True, "", notes)


def _with_arrays(panel: EvaluationPanel) -> EvaluationPanel:
    return replace(panel, sessions=np.asarray(panel.sessions, "datetime64[D]"), codes=np.asarray(panel.codes))


def _require_shapes(panel: EvaluationPanel, cells_by_name: Mapping[str, NDArray[Any] | None]) -> None:
    """Raises InputError for a panel whose axes or cells do not fit together."""
    if panel.days_per_year < 1:
        raise InputError(f"evaluation: days_per_year must be at least 1, found {panel.days_per_year}; Tokyo has 245")
    shape = (len(panel.sessions), len(panel.codes))
    for name, cells in cells_by_name.items():
        if cells is not None and cells.shape != shape:
            raise InputError(f"evaluation: expected {name} of shape {shape} (sessions, codes), found {cells.shape}")
    sessions, codes = panel.sessions, np.asarray(panel.codes)
    if (codes[1:] <= codes[:-1]).any() or (sessions[1:] <= sessions[:-1]).any():
        raise InputError("evaluation: sessions and codes must be in ascending order, each once; sort the panel first")
    if panel.horizon_sessions > 1 and panel.returns_1d is None:
        raise InputError(
            f"evaluation: a horizon of {panel.horizon_sessions} sessions overlaps and is held in tranches; it needs the"
            " one-session forward returns beside its own target"
        )


def _require_targets(targets: NDArray[np.float64], panel: EvaluationPanel, member: NDArray[np.bool_]) -> None:
    """Raises InputError where the member cells have too few targets to rank on, or an infinite one."""
    sessions = panel.sessions
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


def _portfolio(
    scores: NDArray[np.float64],
    targets: NDArray[np.float64],
    member: NDArray[np.bool_],
    panel: EvaluationPanel,
    config: EvaluationConfig,
) -> DailyPortfolio:
    costs = {"quantile": config.quantile, "cost_bps": config.cost_bps}
    if panel.horizon_sessions > 1 and panel.returns_1d is not None:
        returns_1d = np.where(member, panel.returns_1d, np.nan)
        return long_short_tranches(scores, returns_1d, panel.horizon_sessions, **costs)
    return long_short(scores, targets, **costs)


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
    """The evaluation of scores that were not ranked: counts, and None for every other statistic."""
    daily = {name: np.full(len(sessions), np.nan) for name in DAILY_SERIES}
    daily["stocks"] = due.sum(axis=1).astype(np.float64)
    statistics = {name: Statistic(None, unit) for name, unit in STATISTICS.items()}
    statistics["sessions"] = Statistic(0.0, STATISTICS["sessions"])
    statistics["dropped_targets"] = Statistic(float(dropped), STATISTICS["dropped_targets"])
    return Evaluation(sessions, daily, statistics, False, reason)


def _daily_series(
    scores: NDArray[np.float64], targets: NDArray[np.float64], portfolio: DailyPortfolio
) -> dict[str, NDArray[np.float64]]:
    return {
        "ic": metrics.information_coefficient(scores, targets),
        "rank_ic": metrics.rank_information_coefficient(scores, targets),
        "gross": portfolio.gross,
        "net": portfolio.net,
        "turnover": portfolio.turnover,
        "jpx_spread": jpx_spread_returns(scores, targets),
        "stocks": portfolio.stocks.astype(np.float64),
    }


Estimates = dict[str, tuple[float, float]]
"""Statistic -> value and standard error; NaN where there is none."""


def _score_estimates(daily: Mapping[str, NDArray[np.float64]]) -> Estimates:
    ic, rank_ic = daily["ic"], daily["rank_ic"]
    return {
        "ic_mean": metrics.mean_and_error(ic),
        "icir": _ratio(ic),
        "rank_ic_mean": metrics.mean_and_error(rank_ic),
        "rank_icir": _ratio(rank_ic),
    }


def _portfolio_estimates(daily: Mapping[str, NDArray[np.float64]], days_per_year: int, trials: int) -> Estimates:
    gross = daily["gross"]
    ratio, error = _ratio(gross)
    year = math.sqrt(days_per_year)
    lo = metrics.lo_annualised_sharpe(gross, days_per_year)
    return {
        "sharpe_daily": (ratio, error),
        "sharpe_daily_net": _ratio(daily["net"]),
        "sharpe_annualised": (ratio * year, error * year),
        "sharpe_annualised_lo": (lo, error * lo / ratio if ratio else math.nan),
        "jpx_spread_sharpe": _ratio(daily["jpx_spread"]),
        "max_drawdown": (metrics.max_drawdown(gross), math.nan),
        "turnover_mean": metrics.mean_and_error(daily["turnover"]),
        "sharpe_se": (error, math.nan),
        "psr_0": (metrics.probabilistic_sharpe(gross), math.nan),
        "deflated_sharpe": (metrics.deflated_sharpe(gross, trials), math.nan),
        "min_track_record_sessions": (metrics.minimum_track_record(gross), math.nan),
        "sessions": (float(np.isfinite(gross).sum()), math.nan),
    }


def _interval(gross: NDArray[np.float64], samples: int) -> Estimates:
    """The Sharpe's bootstrap interval; NaN without samples."""
    low, high = math.nan, math.nan
    if samples:
        low, high = metrics.bootstrap_interval(gross, samples=samples, seed=metrics.BOOTSTRAP_SEED)
    return {"sharpe_ci_low": (low, math.nan), "sharpe_ci_high": (high, math.nan)}


def _ratio(daily: NDArray[np.float64]) -> tuple[float, float]:
    """Mean over standard deviation, with its error: the Sharpe of returns, the ICIR of ICs."""
    return metrics.sharpe(daily), metrics.sharpe_standard_error(daily)


def _statistics(estimates: Estimates) -> dict[str, Statistic]:
    return {
        name: Statistic(finite_or_none(estimates[name][0]), unit, finite_or_none(estimates[name][1]))
        for name, unit in STATISTICS.items()
    }


def _no_sharpe(config: EvaluationConfig, portfolio: DailyPortfolio) -> str:
    sessions = int(np.isfinite(portfolio.gross).sum())
    if not sessions:
        needed = math.ceil(1.0 / config.quantile)
        return f"no session has the {needed} stocks that one stock a side needs (largest: {portfolio.stocks.max()})"
    return f"the {sessions} daily returns of the portfolio have no standard deviation"
