"""Functions over time: lags, carried values, and the moments, extremes and regressions of trailing windows."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from atft_pipeline.features.trace import word
from atft_pipeline.features.vocabulary.elementwise import FLAT, change, min_observations, ratio
from atft_pipeline.market.price_panel import Matrix

CARRY_SESSIONS = 5
"""Sessions for which the last close replaces a missing one; used for returns only."""
TS_WINDOW, TS_MIN_OBSERVATIONS = 252, 60
"""Sessions of a trailing z-score, and its fewest observations."""

_TILE = 64
"""Stocks per tile: the longest window, 252 sessions x 64 stocks x 8 bytes, stays in the second-level cache."""


def as_matrix(x: Matrix) -> Matrix:
    """`[T, N]` in C order; a series `[T]` becomes one column."""
    return np.ascontiguousarray(x.reshape(len(x), -1))


# --- earlier sessions -------------------------------------------------------------------------------------------------


@word(lambda sessions: sessions)
def lag(x: Matrix, sessions: int) -> Matrix:
    """The value `sessions` earlier, null before the first."""
    if sessions == 0:
        return x
    out = np.empty_like(x)
    out[:sessions] = np.nan
    out[sessions:] = x[:-sessions]
    return out


@njit(cache=True, nogil=True)
def _carry(x: Any, longest: Any, out: Any) -> None:
    T, N = x.shape
    age = np.full(N, longest)
    for t in range(T):
        row, result, before = x[t], out[t], out[max(t - 1, 0)]
        for j in range(N):
            has_value = row[j] == row[j]
            age[j] = 0 if has_value else age[j] + 1
            result[j] = row[j] if has_value else (before[j] if age[j] <= longest and t > 0 else np.nan)


@word(CARRY_SESSIONS)
def carry(x: Matrix) -> Matrix:
    """The last non-null value, at most `CARRY_SESSIONS` old."""
    panel = as_matrix(x)
    out = np.empty_like(panel)
    _carry(panel, CARRY_SESSIONS, out)
    return out.reshape(x.shape)


@word(lambda sessions: sessions)
def returns(close: Matrix, carried: Matrix, sessions: int) -> Matrix:
    """R_h: the close over the one `sessions` earlier, minus 1, both carried. R_1 is null on an untraded session."""
    out = np.full_like(close, np.nan)
    new = close if sessions == 1 else carried
    change(new[sessions:], carried[: max(len(close) - sessions, 0)], out=out[sessions:])
    return out


# --- windows ----------------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True, error_model="numpy")
def _moments(x: Any, window: Any, min_count: Any, ddof: Any, two_pass: Any, mean: Any, std: Any) -> None:
    T, N = x.shape
    total, seen, centre = np.empty(_TILE), np.empty(_TILE), np.empty(_TILE)
    for first in range(0, N, _TILE):
        width = min(_TILE, N - first)
        for t in range(T):
            oldest = max(0, t - window + 1)
            total[:] = 0.0
            seen[:] = 0.0
            for s in range(oldest, t + 1):
                row = x[s, first : first + width]
                for j in range(width):
                    has_value = row[j] == row[j]
                    total[j] += row[j] if has_value else 0.0
                    seen[j] += 1.0 if has_value else 0.0
            result = mean[t, first : first + width]
            for j in range(width):
                centre[j] = total[j] / seen[j]
                result[j] = centre[j] if seen[j] >= min_count else np.nan
            if not two_pass:
                continue
            total[:] = 0.0
            for s in range(oldest, t + 1):
                row = x[s, first : first + width]
                for j in range(width):
                    deviation = row[j] - centre[j]
                    total[j] += deviation * deviation if deviation == deviation else 0.0
            result = std[t, first : first + width]
            for j in range(width):
                spread = np.sqrt(total[j] / (seen[j] - ddof)) if seen[j] > ddof else np.nan
                # Equal values deviate from their mean by rounding alone: that is no spread.
                spread = 0.0 if spread <= FLAT * abs(centre[j]) else spread
                result[j] = spread if seen[j] >= min_count else np.nan


def _rolling(x: Matrix, window: int, min_count: int, ddof: int, *, two_pass: bool) -> tuple[Matrix, Matrix]:
    panel = as_matrix(x)
    mean = np.empty_like(panel)
    std = np.empty_like(panel) if two_pass else np.empty((0, 0))
    _moments(panel, window, min_count, ddof, two_pass, mean, std)
    return mean.reshape(x.shape), std.reshape(x.shape) if two_pass else std


@word(lambda window: window - 1)
def rolling_mean(x: Matrix, window: int) -> Matrix:
    """Mean of the window's non-null values."""
    return _rolling(x, window, min_observations(window), 0, two_pass=False)[0]


@word(lambda window: window - 1)
def rolling_sum(x: Matrix, window: int) -> Matrix:
    """Sum of the window's non-null values."""
    return _counted(x, window) * _rolling(x, window, min_observations(window), 0, two_pass=False)[0]


@word(lambda window: window - 1, results=2)
def rolling_mean_std(x: Matrix, window: int, ddof: int) -> tuple[Matrix, Matrix]:
    """Mean and standard deviation of the window's non-null values."""
    return _rolling(x, window, min_observations(window), ddof, two_pass=True)


@word(lambda window: window - 1)
def rolling_std(x: Matrix, window: int) -> Matrix:
    """Standard deviation, ddof 1, of the window's non-null values."""
    return _rolling(x, window, min_observations(window), 1, two_pass=True)[1]


@word(TS_WINDOW - 1)
def ts_zscore(x: Matrix) -> Matrix:
    """Trailing z-score over 252 sessions, ddof 1, at least 60 observations; null where the series did not move."""
    mean, std = _rolling(x, TS_WINDOW, TS_MIN_OBSERVATIONS, 1, two_pass=True)
    return ratio(x - mean, std)


@njit(cache=True, nogil=True)
def _count(x: Any, window: Any, out: Any) -> None:
    T, N = x.shape
    seen = np.zeros(N)
    for t in range(T):
        new, old, result = x[t], x[max(t - window, 0)], out[t]
        leaves = t >= window
        for j in range(N):
            seen[j] += 1.0 if new[j] == new[j] else 0.0
            seen[j] -= 1.0 if leaves and old[j] == old[j] else 0.0
            result[j] = seen[j]


def _counted(x: Matrix, window: int) -> Matrix:
    """Number of non-null values in the window; a running count is exact, since they are whole numbers."""
    panel = as_matrix(x)
    out = np.empty_like(panel)
    _count(panel, window, out)
    return out.reshape(x.shape)


def _extreme(x: Matrix, window: int, larger: Any) -> Matrix:
    """Extreme of each window, where `larger` takes the extreme of two values.

    One pass doubles the width, since two adjacent windows make one; in the last pass the two windows overlap.
    """
    top, width = x, 1
    while width < window:
        step = min(width, window - width)
        wider = top.copy()
        larger(top[step:], top[: max(len(top) - step, 0)], out=wider[step:])
        top, width = wider, width + step
    return np.where(_counted(x, window) >= min_observations(window), top, np.nan)


@word(lambda window: window - 1)
def rolling_max(x: Matrix, window: int) -> Matrix:
    """Largest of the window's non-null values."""
    return _extreme(x, window, np.fmax)


@word(lambda window: window - 1)
def rolling_min(x: Matrix, window: int) -> Matrix:
    """Smallest of the window's non-null values."""
    return _extreme(x, window, np.fmin)


@njit(cache=True, nogil=True, error_model="numpy")
def _regress(y: Any, x: Any, window: Any, min_count: Any, beta: Any, corr: Any, residual: Any) -> None:
    T, N = y.shape
    n, mx, my = np.empty(_TILE), np.empty(_TILE), np.empty(_TILE)
    sxx, sxy, syy, slope = np.empty(_TILE), np.empty(_TILE), np.empty(_TILE), np.empty(_TILE)
    for first in range(0, N, _TILE):
        width = min(_TILE, N - first)
        for t in range(T):
            oldest = max(0, t - window + 1)
            n[:] = 0.0
            mx[:] = 0.0
            my[:] = 0.0
            for s in range(oldest, t + 1):
                a, b = x[s, first : first + width], y[s, first : first + width]
                for j in range(width):
                    has_both = (a[j] == a[j]) & (b[j] == b[j])
                    n[j] += 1.0 if has_both else 0.0
                    mx[j] += a[j] if has_both else 0.0
                    my[j] += b[j] if has_both else 0.0
            for j in range(width):
                mx[j] /= n[j]
                my[j] /= n[j]
            sxx[:] = 0.0
            sxy[:] = 0.0
            syy[:] = 0.0
            for s in range(oldest, t + 1):
                a, b = x[s, first : first + width], y[s, first : first + width]
                for j in range(width):
                    dx, dy = a[j] - mx[j], b[j] - my[j]
                    has_both = (dx == dx) & (dy == dy)
                    sxx[j] += dx * dx if has_both else 0.0
                    sxy[j] += dx * dy if has_both else 0.0
                    syy[j] += dy * dy if has_both else 0.0
            betas, corrs = beta[t, first : first + width], corr[t, first : first + width]
            for j in range(width):
                moved = sxx[j] > n[j] * (FLAT * mx[j]) ** 2
                slope[j] = sxy[j] / sxx[j] if moved and n[j] >= min_count else np.nan
                both = moved and syy[j] > n[j] * (FLAT * my[j]) ** 2
                correlation = sxy[j] / np.sqrt(sxx[j] * syy[j])
                betas[j] = slope[j]
                corrs[j] = min(max(correlation, -1.0), 1.0) if both and slope[j] == slope[j] else np.nan
            # The residuals are summed directly, because syy − slope * sxy cancels when the fit is close.
            syy[:] = 0.0
            for s in range(oldest, t + 1):
                a, b = x[s, first : first + width], y[s, first : first + width]
                for j in range(width):
                    e = (b[j] - my[j]) - slope[j] * (a[j] - mx[j])
                    syy[j] += e * e if e == e else 0.0
            result = residual[t, first : first + width]
            for j in range(width):
                result[j] = np.sqrt(syy[j] / (n[j] - 1.0)) if slope[j] == slope[j] else np.nan


class Regression(NamedTuple):
    """Slope cov(y, x) / var(x), correlation, and standard deviation (ddof 1) of y − slope · x."""

    beta: Matrix
    corr: Matrix
    residual_std: Matrix


def rolling_regression(y: Matrix, x: Matrix, window: int) -> Regression:
    """The regression of y on x over each window.

    A session counts where both are non-null. x: `[T, N]`, or `[T, 1]` for the same regressor everywhere. Null where x
    did not move; the correlation also where y did not.
    """
    return Regression(*_regression(y, x, window))


@word(lambda window: window - 1, results=3)
def _regression(y: Matrix, x: Matrix, window: int) -> tuple[Matrix, Matrix, Matrix]:
    beta, corr, residual = np.empty_like(y), np.empty_like(y), np.empty_like(y)
    regressor = np.ascontiguousarray(np.broadcast_to(x, y.shape))
    _regress(np.ascontiguousarray(y), regressor, window, min_observations(window), beta, corr, residual)
    return beta, corr, residual
