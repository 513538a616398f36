"""Statistics of daily returns and of scores against returns.

Standard deviations have ddof 1. NaN is a session without a value and is skipped; a statistic that cannot be computed
from what is left (fewer than two values, no dispersion) is NaN, never 0. Sharpe ratios are per session unless the name
says annualised. T sessions, N stocks.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from atft_pipeline.storage.json_values import finite_or_none

_NORMAL = NormalDist()
_NO_DISPERSION = 1e-12  # relative to the largest value: by rounding, the std of a constant series is not 0
_MIN_BOOTSTRAP_SESSIONS = 20
BOOTSTRAP_SEED = 20
"""Seed of every reported bootstrap interval, so that the same returns have the same interval."""

Series = NDArray[np.floating]


def _finite_values(values: Series) -> NDArray[np.float64]:
    wide: NDArray[np.float64] = np.asarray(values, np.float64)
    return wide[np.isfinite(wide)]


def information_coefficient(scores: Series, targets: Series) -> NDArray[np.float64]:
    """Pearson correlation of score and target across stocks, per session: [T, N], [T, N] -> [T].

    Pairs with a missing side are left out; NaN with fewer than two pairs or without dispersion on either side.
    """
    usable = np.isfinite(scores) & np.isfinite(targets)
    return _row_correlation(np.asarray(scores, np.float64), np.asarray(targets, np.float64), usable)


def rank_information_coefficient(scores: Series, targets: Series) -> NDArray[np.float64]:
    """Spearman correlation per session: Pearson correlation of average ranks. [T, N], [T, N] -> [T]; NaN as for IC."""
    usable = np.isfinite(scores) & np.isfinite(targets)
    return _row_correlation(average_ranks(scores, usable), average_ranks(targets, usable), usable)


def average_ranks(values: Series, usable: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Ranks [T, N] from 1 within each session, equal values sharing their mean rank; NaN where not usable."""
    T, N = values.shape
    keys = np.where(usable, np.asarray(values, np.float64), np.inf)
    order = np.argsort(keys, axis=1, kind="stable")
    ordered = np.take_along_axis(keys, order, axis=1)
    starts = np.ones((T, N), bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group = np.cumsum(starts.ravel()) - 1  # a row always opens a group, so none spans two sessions
    position = np.broadcast_to(np.arange(1.0, N + 1.0), (T, N)).ravel()
    mean = np.bincount(group, weights=position) / np.bincount(group)
    ranks = np.empty((T, N))
    np.put_along_axis(ranks, order, mean[group].reshape(T, N), axis=1)
    return np.where(usable, ranks, np.nan)


def _row_correlation(a: Series, b: Series, usable: NDArray[np.bool_]) -> NDArray[np.float64]:
    a, b = _standardised(a, usable), _standardised(b, usable)
    defined = (usable.sum(axis=1) >= 2) & a.any(axis=1) & b.any(axis=1)
    correlation = np.where(defined, (a * b).sum(axis=1), np.nan)
    return np.clip(correlation, -1.0, 1.0)


def _standardised(values: Series, usable: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Rows centred on their usable cells and of length 1; all zero without dispersion."""
    values = np.where(usable, values, 0.0)
    size = np.abs(values).max(axis=1, keepdims=True, initial=0.0)
    values = values / np.where(size > 0.0, size, 1.0)  # squares of tiny scores would underflow
    mean = values.sum(axis=1, keepdims=True) / np.maximum(usable.sum(axis=1, keepdims=True), 1)
    centred = np.where(usable, values - mean, 0.0)
    length = np.sqrt((centred * centred).sum(axis=1, keepdims=True))
    return np.where(length > _NO_DISPERSION, centred / np.where(length > 0.0, length, 1.0), 0.0)


def mean_and_error(values: Series, horizon_sessions: int = 1) -> tuple[float, float]:
    """Mean over sessions and its standard error: std (ddof 1) / sqrt(n), which takes sessions as independent.

    Values of a longer horizon h share h - 1 sessions of returns with the next. Their error takes the long-run variance,
    with Bartlett weights over 2(h - 1) lags, which miss a sixth of it; h - 1 lags would miss a third.
    Source: Newey and West (1987), eq. 5.
    """
    values = _finite_values(values)
    count = len(values)
    if count == 0:
        return math.nan, math.nan
    if count == 1:
        return float(values[0]), math.nan
    variance, centred = float(values.var(ddof=1)), values - values.mean()
    lags = min(2 * (horizon_sessions - 1), count - 1)
    for k in range(1, lags + 1):
        variance += 2.0 * (1.0 - k / (lags + 1)) * float(centred[k:] @ centred[:-k]) / (count - 1)
    return float(values.mean()), math.sqrt(max(variance, 0.0) / count)


def sharpe(returns: Series) -> float:
    """Mean / std (ddof 1) over sessions, not annualised; NaN with fewer than two sessions or without dispersion.

    The same ratio of a daily IC is its ICIR.
    """
    returns = _finite_values(returns)
    if len(returns) < 2 or np.ptp(returns) <= _NO_DISPERSION * np.abs(returns).max():
        return math.nan
    return float(returns.mean() / returns.std(ddof=1))


def _skew_and_kurtosis(returns: NDArray[np.float64]) -> tuple[float, float]:
    centred = returns - returns.mean()
    variance = (centred**2).mean()
    return float((centred**3).mean() / variance**1.5), float((centred**4).mean() / variance**2)


def _error_numerator(returns: NDArray[np.float64], ratio: float) -> float:
    """1 - skew * SR + (kurtosis - 1) / 4 * SR^2; moment ratios without correction, kurtosis 3 for a normal law."""
    skew, kurtosis = _skew_and_kurtosis(returns)
    return max(1.0 - skew * ratio + 0.25 * (kurtosis - 1.0) * ratio * ratio, 0.0)


def sharpe_standard_error(returns: Series) -> float:
    """Standard error of `sharpe`, allowing for skew and fat tails: sqrt((1 - g3 SR + (g4 - 1)/4 SR^2) / (n - 1)).

    With normal returns it is Lo's sqrt((1 + SR^2/2) / (n - 1)): 0.063 at 250 sessions.
    Source: Mertens (2002); Bailey and Lopez de Prado (2012), eq. 4; Lo (2002) for the normal case.
    """
    returns, ratio = _finite_values(returns), sharpe(returns)
    return math.sqrt(_error_numerator(returns, ratio) / (len(returns) - 1)) if math.isfinite(ratio) else math.nan


def lo_annualised_sharpe(returns: Series, days_per_year: int, lags: int | None = None) -> float:
    """Annualised Sharpe corrected for autocorrelation: SR * q / sqrt(q + 2 sum_k (q - k) rho_k), q days per year.

    Lo sums k to q - 1; here to `lags`, by default floor(4 (n/100)^(2/9)), the Newey-West rule, because 244
    autocorrelations cannot be estimated from a few hundred sessions. NaN where the estimated variance is not positive.
    Source: Lo (2002), eq. 20 and 21.
    """
    returns, ratio = _finite_values(returns), sharpe(returns)
    if not math.isfinite(ratio):
        return math.nan
    chosen = math.floor(4.0 * (len(returns) / 100.0) ** (2.0 / 9.0)) if lags is None else lags
    centred = returns - returns.mean()
    total = float(centred @ centred)
    variance = float(days_per_year)
    for k in range(1, min(chosen, len(returns) - 1, days_per_year - 1) + 1):
        variance += 2.0 * (days_per_year - k) * float(centred[k:] @ centred[:-k]) / total
    return ratio * days_per_year / math.sqrt(variance) if variance > 0.0 else math.nan


def probabilistic_sharpe(returns: Series, benchmark: float = 0.0) -> float:
    """Probability that the true per-session Sharpe is above `benchmark`: the normal law at (`sharpe` - it) / its error.

    Source: Bailey and Lopez de Prado (2012), eq. 8.
    """
    error = sharpe_standard_error(returns)
    return _NORMAL.cdf((sharpe(returns) - benchmark) / error) if error > 0.0 else math.nan


def expected_best_sharpe(trials: int, sharpe_std: float) -> float:
    """Sharpe that the best of `trials` independent worthless models is expected to show; 0 for one model.

    `sharpe_std` is the standard deviation of their Sharpes. The approximation is 8 % low for two trials and 2 % high
    for ten.
    Source: Bailey and Lopez de Prado (2014), eq. 5.
    """
    if trials == 1:
        return 0.0
    quantiles = (_NORMAL.inv_cdf(1.0 - 1.0 / n) for n in (trials, trials * math.e))
    weights = (1.0 - np.euler_gamma, np.euler_gamma)
    return sharpe_std * sum(weight * quantile for weight, quantile in zip(weights, quantiles, strict=True))


def deflated_sharpe(returns: Series, trials: int, sharpe_std: float | None = None) -> float:
    """PSR against the Sharpe that the best of `trials` worthless models would show; PSR(0) for one trial.

    `sharpe_std` is the standard deviation of the trials' Sharpes, by default what chance alone gives, 1 / sqrt(n - 1).
    NaN below 3 sessions.
    Source: Bailey and Lopez de Prado (2014).
    """
    if trials == 1:
        return probabilistic_sharpe(returns)
    returns = _finite_values(returns)
    if len(returns) < 3:
        return math.nan
    spread = 1.0 / math.sqrt(len(returns) - 1) if sharpe_std is None else sharpe_std
    return probabilistic_sharpe(returns, expected_best_sharpe(trials, spread))


def minimum_track_record(returns: Series, benchmark: float = 0.0, confidence: float = 0.95) -> float:
    """Sessions needed for PSR(`benchmark`) to reach `confidence` if the moments stay; NaN when the Sharpe is not above.

    Source: Bailey and Lopez de Prado (2012), eq. 11.
    """
    returns, ratio = _finite_values(returns), sharpe(returns)
    if not ratio > benchmark:
        return math.nan
    return 1.0 + _error_numerator(returns, ratio) * (_NORMAL.inv_cdf(confidence) / (ratio - benchmark)) ** 2


def max_drawdown(returns: Series) -> float:
    """Largest loss from a peak of compounded wealth, the start included: between -1 and 0; NaN without a session."""
    returns = _finite_values(returns)
    if len(returns) == 0:
        return math.nan
    wealth = np.concatenate([[1.0], np.cumprod(np.maximum(1.0 + returns, 0.0))])
    return float((wealth / np.maximum.accumulate(wealth) - 1.0).min())


def bootstrap_interval(
    returns: Series,
    *,
    samples: int,
    seed: int,
    confidence: float = 0.95,
    statistic: Callable[[Series], float] = sharpe,
) -> tuple[float, float]:
    """Percentile interval of `statistic` under the stationary bootstrap with the data-driven mean block length.

    NaN below 20 sessions, for a constant series and where a resample has no value. Imports `arch` only when called, as
    a training machine may lack it.
    Source: Politis and Romano (1994); block length: Politis and White (2004), Patton et al. (2009).
    """
    returns = _finite_values(returns)
    if len(returns) < _MIN_BOOTSTRAP_SESSIONS or not math.isfinite(sharpe(returns)):
        return math.nan, math.nan
    from arch.bootstrap import StationaryBootstrap, optimal_block_length

    block = float(optimal_block_length(returns)["stationary"].iloc[0])
    sessions = max(round(block), 1) if math.isfinite(block) else 1
    bootstrap = StationaryBootstrap(sessions, returns, seed=seed)
    low, high = bootstrap.conf_int(
        lambda draw: np.array([statistic(draw)]), samples, method="percentile", size=confidence
    )[:, 0]
    return float(low), float(high)


def can_bootstrap() -> bool:
    """Whether `arch` is installed; a training machine may lack it and then reports no intervals."""
    return importlib.util.find_spec("arch") is not None


def paired_difference(
    ours: Series, theirs: Series, *, samples: int, seed: int = BOOTSTRAP_SEED, horizon_sessions: int = 1
) -> dict[str, float | int | None]:
    """`difference` of two daily series, mean over the sessions that both have; `se`, `ci_low`, `ci_high`, `sessions`.

    The interval is the stationary bootstrap's; None where it cannot be computed.
    """
    daily = _finite_values(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))
    mean, error = mean_and_error(daily, horizon_sessions)
    low, high = math.nan, math.nan
    if can_bootstrap():
        low, high = bootstrap_interval(daily, samples=samples, seed=seed, statistic=_mean)
    figures = {"difference": mean, "se": error, "ci_low": low, "ci_high": high}
    return {**{name: finite_or_none(value) for name, value in figures.items()}, "sessions": len(daily)}


def _mean(values: Series) -> float:
    return float(np.mean(values))
