"""The vocabulary that features are written in: pure functions of dense panels, one definition each.

Shapes: T sessions, N series (stocks, sectors, or one market series), G groups. A panel is float64 `[T, N]` in C order,
NaN is missing; a series `[T]` is a panel of one. A value at row t uses rows up to t alone.

Null policy, everywhere unless a definition says otherwise: a rolling window counts sessions, the current one included,
and needs two thirds of them non-null; a zero denominator gives null. Every window is summed afresh, oldest first: a
running sum would make a value depend, in its last digits, on where the series starts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Panel = NDArray[np.float64]

CARRY_SESSIONS = 5
"""Sessions for which the last close stands in for a missing one, to form a return and for nothing else."""
FLAT = 1e-12
"""Relative difference below which two prices are the same price: dividing by a split's factor leaves about 1e-16,
while one tick is at least 1e-7."""
NORMALISE_LEAST = 10
"""Values that a session needs for a cross-sectional statistic."""
CLIP_MAD = 5.0
CLIP_STD = 5.0
MAD_TO_STD = 1.4826
"""Ratio of standard deviation to median absolute deviation of a normal distribution."""
TS_WINDOW, TS_LEAST = 252, 60
"""Sessions of a trailing z-score, and the observations it needs."""
GROUP_LEAST = 5
"""Members with a value that a sector needs."""

# Stocks per tile: the longest window, 252 sessions x 64 stocks x 8 bytes, stays in the second-level cache.
_TILE = 64


def least_of(window: int) -> int:
    """Observations that a window of `window` sessions needs: two thirds, rounded up."""
    return -(-2 * window // 3)


def ratio(numerator: Panel, denominator: Panel) -> Panel:
    """numerator / denominator, null where the denominator is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator != 0.0, numerator / denominator, np.nan)


def log_ratio(numerator: Panel, denominator: Panel) -> Panel:
    """ln(numerator / denominator), null where either is not positive."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((numerator > 0.0) & (denominator > 0.0), np.log(numerator / denominator), np.nan)


def change(new: Panel, old: Panel) -> Panel:
    """new / old − 1; a difference below `FLAT` is rounding left by a split's factor and reads as 0."""
    relative = ratio(new, old) - 1.0
    relative[np.abs(relative) < FLAT] = 0.0
    return relative


def growth(new: Panel, old: Panel) -> Panel:
    """(new − old) / abs(old): the sign is that of the improvement, also from a loss."""
    return ratio(new - old, np.abs(old))


def flag(condition: NDArray[np.bool_], *known: Panel) -> Panel:
    """1 where the condition holds and 0 where not, null where one of `known` is."""
    values = condition.astype(np.float64)
    for panel in known:
        values = np.where(np.isnan(panel), np.nan, values)
    return values


def exceeds(x: Panel, threshold: float, *, or_equal: bool = False) -> Panel:
    """1 where x is above the threshold, or at it, 0 elsewhere, null where x is."""
    return flag(x >= threshold if or_equal else x > threshold, x)


def above(x: Panel, level: Panel) -> Panel:
    """1 where x is above the level by more than rounding, 0 elsewhere, null where either is."""
    return exceeds(change(x, level), 0.0)


def same_sign(x: Panel, y: Panel) -> Panel:
    """1 where both are positive, both negative or both 0, else 0, null where either is."""
    return flag(np.sign(x) == np.sign(y), x, y)


def is_known(x: Panel) -> Panel:
    """1 where there is a value, else 0: a mask is never null."""
    return np.where(np.isnan(x), 0.0, 1.0)


def log(x: Panel) -> Panel:
    """ln x, null where x is not positive."""
    return log_ratio(x, np.ones_like(x))


def lag(x: Panel, sessions: int) -> Panel:
    """The value `sessions` earlier, null before the first."""
    if sessions == 0:
        return x
    out = np.full_like(x, np.nan)
    out[sessions:] = x[:-sessions]
    return out


def carry(x: Panel) -> Panel:
    """The last non-null value, at most `CARRY_SESSIONS` old."""
    out = x.copy()
    for sessions in range(1, CARRY_SESSIONS + 1):
        np.copyto(out, lag(x, sessions), where=np.isnan(out))
    return out


def returns(close: Panel, carried: Panel, sessions: int) -> Panel:
    """R_h: the close over the one `sessions` earlier, minus 1, both carried; R_1 is null on an untraded session."""
    return change(close if sessions == 1 else carried, lag(carried, sessions))


def unit_position(x: Panel, low: Panel, high: Panel) -> Panel:
    """(x − low) / (high − low), in the middle, 0.5, where low and high are the same price."""
    width = high - low
    flat = width <= FLAT * np.abs(high)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(flat & ~np.isnan(x), 0.5, (x - low) / width)


def band_position(x: Panel, middle: Panel, std: Panel) -> Panel:
    """Bollinger's %B: where x lies between middle − 2 std (0) and middle + 2 std (1), 0.5 where the bands touch."""
    return unit_position(x, middle - 2.0 * std, middle + 2.0 * std)


def band_width(middle: Panel, std: Panel) -> Panel:
    """Distance between the bands over the middle."""
    return ratio(4.0 * std, middle)


@njit(cache=True, error_model="numpy")
def _moments(x: Any, window: Any, least: Any, ddof: Any, two_pass: Any, count: Any, mean: Any, std: Any) -> None:
    T, N = x.shape
    total = np.empty(_TILE)
    seen = np.empty(_TILE)
    for first in range(0, N, _TILE):
        width = min(_TILE, N - first)
        for t in range(T):
            oldest = max(0, t - window + 1)
            total[:] = 0.0
            seen[:] = 0.0
            for s in range(oldest, t + 1):
                for j in range(width):
                    value = x[s, first + j]
                    there = value == value
                    total[j] += value if there else 0.0
                    seen[j] += 1.0 if there else 0.0
            for j in range(width):
                count[t, first + j] = seen[j]
                mean[t, first + j] = total[j] / seen[j] if seen[j] >= least else np.nan
            if not two_pass:
                continue
            total[:] = 0.0
            for s in range(oldest, t + 1):
                for j in range(width):
                    deviation = x[s, first + j] - mean[t, first + j]
                    total[j] += deviation * deviation if deviation == deviation else 0.0
            for j in range(width):
                centre = mean[t, first + j]
                spread = np.sqrt(total[j] / (seen[j] - ddof)) if seen[j] > ddof else np.nan
                # Equal values leave rounding of their mean: that is no spread.
                spread = 0.0 if spread <= FLAT * abs(centre) else spread
                std[t, first + j] = spread if centre == centre else np.nan


def _rolling(x: Panel, window: int, least: int, ddof: int, two_pass: bool) -> tuple[Panel, Panel, Panel]:
    panel = np.ascontiguousarray(x.reshape(len(x), -1), dtype=np.float64)
    count, mean = np.empty_like(panel), np.empty_like(panel)
    std = np.empty_like(panel) if two_pass else np.empty((0, 0))
    _moments(panel, window, least, ddof, two_pass, count, mean, std)
    return count.reshape(x.shape), mean.reshape(x.shape), std.reshape(x.shape) if two_pass else std


def rolling_mean(x: Panel, window: int) -> Panel:
    """Mean of the window's non-null values."""
    return _rolling(x, window, least_of(window), 0, two_pass=False)[1]


def rolling_sum(x: Panel, window: int) -> Panel:
    """Sum of the window's non-null values."""
    count, mean, _ = _rolling(x, window, least_of(window), 0, two_pass=False)
    return count * mean


def rolling_mean_std(x: Panel, window: int, ddof: int) -> tuple[Panel, Panel]:
    """Mean and standard deviation of the window's non-null values."""
    return _rolling(x, window, least_of(window), ddof, two_pass=True)[1:]


def rolling_std(x: Panel, window: int) -> Panel:
    """Standard deviation, ddof 1, of the window's non-null values."""
    return rolling_mean_std(x, window, 1)[1]


def ts_zscore(x: Panel) -> Panel:
    """Trailing z-score over 252 sessions, ddof 1, at least 60 observations; null where the series did not move."""
    _, mean, std = _rolling(x, TS_WINDOW, TS_LEAST, 1, two_pass=True)
    return ratio(x - mean, std)


@njit(cache=True, error_model="numpy")
def _maximum(x: Any, window: Any, least: Any, out: Any) -> None:
    T, N = x.shape
    top = np.empty(_TILE)
    seen = np.empty(_TILE)
    for first in range(0, N, _TILE):
        width = min(_TILE, N - first)
        for t in range(T):
            top[:] = -np.inf
            seen[:] = 0.0
            for s in range(max(0, t - window + 1), t + 1):
                for j in range(width):
                    value = x[s, first + j]
                    top[j] = value if value > top[j] else top[j]
                    seen[j] += 1.0 if value == value else 0.0
            for j in range(width):
                out[t, first + j] = top[j] if seen[j] >= least else np.nan


def rolling_max(x: Panel, window: int) -> Panel:
    """Largest of the window's non-null values."""
    panel = np.ascontiguousarray(x.reshape(len(x), -1), dtype=np.float64)
    out = np.empty_like(panel)
    _maximum(panel, window, least_of(window), out)
    return out.reshape(x.shape)


def rolling_min(x: Panel, window: int) -> Panel:
    """Smallest of the window's non-null values."""
    return -rolling_max(-x, window)


@njit(cache=True, error_model="numpy")
def _smooth(x: Any, alpha: Any, first: Any, out: Any) -> None:
    T, N = x.shape
    state = np.zeros(N)
    seen = np.zeros(N)
    for t in range(T):
        for j in range(N):
            value = x[t, j]
            out[t, j] = np.nan
            if value == value:
                seen[j] += 1.0
                if seen[j] <= first:
                    state[j] += value / first
                else:
                    state[j] += alpha * (value - state[j])
                if seen[j] >= first:
                    out[t, j] = state[j]


def _exponential(x: Panel, alpha: float, first: int) -> Panel:
    panel = np.ascontiguousarray(x.reshape(len(x), -1), dtype=np.float64)
    out = np.empty_like(panel)
    _smooth(panel, alpha, first, out)
    return out.reshape(x.shape)


def ema(x: Panel, span: int) -> Panel:
    """Exponential average, alpha = 2 / (span + 1), that starts as the mean of the first `span` non-null values.

    It steps over nulls: a null session changes nothing and is null itself.
    """
    return _exponential(x, 2.0 / (span + 1), span)


def wilder_rsi(close: Panel, carried: Panel, window: int) -> Panel:
    """Relative strength index in [0, 100], 50 where nothing moved.

    Gains and losses are averaged with alpha = 1 / window, starting as the mean of the first `window` changes.
    Source: J. Welles Wilder, New Concepts in Technical Trading Systems (1978), section VI.
    """
    step = close - lag(carried, 1)
    step[np.abs(step) < FLAT * close] = 0.0
    gain = _exponential(np.maximum(step, 0.0), 1.0 / window, window)
    loss = _exponential(np.maximum(-step, 0.0), 1.0 / window, window)
    total = gain + loss
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(total == 0.0, 50.0, 100.0 * gain / total)


@njit(cache=True, error_model="numpy")
def _regress(y: Any, x: Any, window: Any, least: Any, beta: Any, corr: Any, residual: Any) -> None:
    T, N = y.shape
    n, mx, my = np.empty(_TILE), np.empty(_TILE), np.empty(_TILE)
    sxx, sxy, syy = np.empty(_TILE), np.empty(_TILE), np.empty(_TILE)
    for first in range(0, N, _TILE):
        width = min(_TILE, N - first)
        for t in range(T):
            oldest = max(0, t - window + 1)
            n[:] = 0.0
            mx[:] = 0.0
            my[:] = 0.0
            for s in range(oldest, t + 1):
                for j in range(width):
                    a, b = x[s, first + j], y[s, first + j]
                    there = (a == a) & (b == b)
                    n[j] += 1.0 if there else 0.0
                    mx[j] += a if there else 0.0
                    my[j] += b if there else 0.0
            for j in range(width):
                mx[j] /= n[j]
                my[j] /= n[j]
            sxx[:] = 0.0
            sxy[:] = 0.0
            syy[:] = 0.0
            for s in range(oldest, t + 1):
                for j in range(width):
                    a, b = x[s, first + j] - mx[j], y[s, first + j] - my[j]
                    there = (a == a) & (b == b)
                    sxx[j] += a * a if there else 0.0
                    sxy[j] += a * b if there else 0.0
                    syy[j] += b * b if there else 0.0
            for j in range(width):
                moved = sxx[j] > n[j] * (FLAT * mx[j]) ** 2
                slope = sxy[j] / sxx[j] if moved and n[j] >= least else np.nan
                both = moved and syy[j] > n[j] * (FLAT * my[j]) ** 2
                beta[t, first + j] = slope
                corr[t, first + j] = sxy[j] / np.sqrt(sxx[j] * syy[j]) if both and slope == slope else np.nan
            # The residuals are summed themselves: syy − slope * sxy cancels when the fit is close.
            syy[:] = 0.0
            for s in range(oldest, t + 1):
                for j in range(width):
                    e = (y[s, first + j] - my[j]) - beta[t, first + j] * (x[s, first + j] - mx[j])
                    syy[j] += e * e if e == e else 0.0
            for j in range(width):
                known = beta[t, first + j] == beta[t, first + j]
                residual[t, first + j] = np.sqrt(syy[j] / (n[j] - 1.0)) if known else np.nan


def rolling_regression(y: Panel, x: Panel, window: int) -> tuple[Panel, Panel, Panel]:
    """Slope cov(y, x) / var(x), correlation, and standard deviation (ddof 1) of y − slope · x over the window.

    A session counts where both are non-null. x: `[T, N]`, or `[T]` for the same regressor everywhere. Null where x did
    not move; the correlation also where y did not.
    """
    regressor = np.broadcast_to(x if x.ndim == y.ndim else x[:, None], y.shape)
    beta, corr, residual = np.empty_like(y), np.empty_like(y), np.empty_like(y)
    _regress(np.ascontiguousarray(y), np.ascontiguousarray(regressor), window, least_of(window), beta, corr, residual)
    return beta, np.clip(corr, -1.0, 1.0), residual


@njit(cache=True, error_model="numpy")
def _median(values: Any) -> Any:
    """Median of non-null values; reorders them (Hoare's selection)."""
    n = len(values)
    k = n // 2
    low, high = 0, n - 1
    while low < high:
        pivot = values[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while values[i] < pivot:
                i += 1
            while values[j] > pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if k <= j:
            high = j
        elif k >= i:
            low = i
        else:
            break
    if n % 2 == 1:
        return values[k]
    below = values[0]
    for i in range(1, k):
        below = max(below, values[i])
    return 0.5 * (below + values[k])


@njit(cache=True, error_model="numpy")
def _by_group(x: Any, member: Any, group: Any, groups: Any, least: Any, out: Any) -> None:
    T, N = x.shape
    sorted_values = np.empty(N)
    stop = np.empty(groups, np.int64)
    for t in range(T):
        stop[:] = 0
        for j in range(N):
            if member[t, j] and group[t, j] >= 0 and x[t, j] == x[t, j]:
                stop[group[t, j]] += 1
        total = 0
        for g in range(groups):
            total, stop[g] = total + stop[g], total
        for j in range(N):
            if member[t, j] and group[t, j] >= 0 and x[t, j] == x[t, j]:
                sorted_values[stop[group[t, j]]] = x[t, j]
                stop[group[t, j]] += 1
        start = 0
        for g in range(groups):
            out[t, g] = _median(sorted_values[start : stop[g]]) if stop[g] - start >= least else np.nan
            start = stop[g]


def group_median(x: Panel, member: NDArray[np.bool_], group: NDArray[np.int32], groups: int) -> Panel:
    """Median over the members of each group and session, `[T, G]`, null under `GROUP_LEAST` non-null members.

    group: `[T, N]`, −1 where a stock has none.
    """
    out = np.empty((len(x), groups))
    _by_group(np.ascontiguousarray(x), member, group, groups, GROUP_LEAST, out)
    return out


def of_group(x: Panel, group: NDArray[np.int32]) -> Panel:
    """`[T, G]` values given to each stock by the group it has in that session, `[T, N]`, null without one."""
    if x.shape[1] == 0:
        return np.full(group.shape, np.nan)
    return np.where(group >= 0, np.take_along_axis(x, np.maximum(group, 0), axis=1), np.nan)


def chained(step: Panel) -> Panel:
    """Index level of a series of returns, 1 before the first; a null session changes nothing and is null itself."""
    level = np.cumprod(1.0 + np.nan_to_num(step), axis=0)
    return np.where(np.isnan(step), np.nan, level)


def share_of(condition: Panel, member: NDArray[np.bool_]) -> Panel:
    """Share of the members whose flag is 1, `[T]`, null under `NORMALISE_LEAST` members with a flag."""
    there = member & ~np.isnan(condition)
    count = there.sum(axis=1)
    return np.where(
        count >= NORMALISE_LEAST, np.where(there, condition, 0.0).sum(axis=1) / np.maximum(count, 1), np.nan
    )


@njit(cache=True, error_model="numpy")
def _standardise(x: Any, member: Any, out: Any) -> None:
    T, N = x.shape
    kept = np.empty(N)
    work = np.empty(N)
    for t in range(T):
        out[t, :] = np.nan
        n = 0
        for j in range(N):
            if member[t, j] and x[t, j] == x[t, j]:
                kept[n] = x[t, j]
                n += 1
        if n < NORMALISE_LEAST:
            continue
        work[:n] = kept[:n]
        centre = _median(work[:n])
        for i in range(n):
            work[i] = abs(kept[i] - centre)
        reach = CLIP_MAD * MAD_TO_STD * _median(work[:n])
        low, high = (centre - reach, centre + reach) if reach > 0.0 else (-np.inf, np.inf)
        mean = 0.0
        for i in range(n):
            kept[i] = min(max(kept[i], low), high)
            mean += kept[i]
        mean /= n
        variance = 0.0
        for i in range(n):
            variance += (kept[i] - mean) ** 2
        std = np.sqrt(variance / n)
        if std <= FLAT * abs(mean):
            continue
        for j in range(N):
            value = x[t, j]
            if value == value:
                score = (min(max(value, low), high) - mean) / std
                out[t, j] = min(max(score, -CLIP_STD), CLIP_STD)


def cs_normalise(x: Panel, member: NDArray[np.bool_]) -> Panel:
    """Per session: clipped at median ± 5 · 1.4826 · MAD (not where MAD is 0), standardised with ddof 0, clipped to ±5.

    The statistics are the members'; a stock outside the universe is placed on their scale and moves nothing. Null in
    sessions with fewer than 10 member values or no spread among them.
    """
    out = np.empty_like(x)
    _standardise(np.ascontiguousarray(x), member, out)
    return out


def weekly_mean(history: Panel, weeks: int) -> Panel:
    """Mean of the newest `weeks` of each history `[E, W]`, newest last; two thirds of them non-null, else null."""
    window = history[:, -weeks:]
    count = np.sum(~np.isnan(window), axis=1)
    return np.where(count >= least_of(weeks), np.nansum(window, axis=1) / np.maximum(count, 1), np.nan)


def weekly_zscores(history: Panel, weeks: int, newest: int) -> Panel:
    """z-score (ddof 1) of each of the `newest` last weeks within the `weeks` that end with it, `[E, newest]`."""
    W = history.shape[1]
    columns = []
    for end in range(W - newest + 1, W + 1):
        window = history[:, end - weeks : end]
        count = np.sum(~np.isnan(window), axis=1)
        mean = weekly_mean(window, weeks)
        std = np.sqrt(np.nansum((window - mean[:, None]) ** 2, axis=1) / np.maximum(count - 1, 1))
        std[std <= FLAT * np.abs(mean)] = 0.0
        columns.append(ratio(window[:, -1] - mean, std))
    return np.stack(columns, axis=1)
