"""The vocabulary that features are written in: compiled functions of dense panels, one definition each.

Shapes: T sessions, N series (stocks, sectors, or one market series), G groups. A panel is float64 `[T, N]` in C order,
NaN is missing; a series `[T]` is a panel of one. A value at row t uses rows up to t alone.

Null policy, everywhere unless a definition says otherwise: a rolling window counts sessions, the current one included,
and needs two thirds of them non-null; a zero denominator gives null. Every window is summed afresh, oldest first: a
running sum would make a value depend, in its last digits, on where the series starts.

Kernels release the GIL, so features are computed side by side in threads, and hand rows on as slices: an index such as
`x[s, first + j]` might be negative for all the compiler knows, which costs a factor of three.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from atft_pipeline.features.trace import word

Panel = NDArray[np.float64]

CARRY_SESSIONS = 5
"""Sessions for which the last close stands in for a missing one, to form a return and for nothing else."""
FLAT = 1e-12
"""Relative difference below which two prices are the same price: dividing by a split's factor leaves about 1e-16,
while one tick is at least 1e-7."""
STILL = 1e-6
"""Average move per session, relative to the price, that is none. Gains and losses of a price that stands still decay
at one pace, so their ratio would remember for ever what was before; a tick is at least 1e-5 of a price."""
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
EMA_SPANS_TO_FORGET = 5
"""Spans after which an exponential average has forgotten its start: its weight is then e^-10."""
SESSIONS_IN_WEEK = 5

_TILE = 64
"""Stocks per tile: the longest window, 252 sessions x 64 stocks x 8 bytes, stays in the second-level cache."""


def least_of(window: int) -> int:
    """Observations that a window of `window` sessions needs: two thirds, rounded up."""
    return -(-2 * window // 3)


# --- value by value ---------------------------------------------------------------------------------------------------


def elementwise(scalar: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function of numbers one of panels, series and constants, broadcast against each other.

    As numba's `vectorize`, whose cache keeps no wrappers: making those anew costs a twentieth of a second a word at
    every start. The loop is compiled from text because its cache tells functions apart by file, name and line.
    """
    name, operands = scalar.__name__, list(signature(scalar).parameters)
    values = ", ".join(f"{operand}[i]" for operand in operands)
    text = f"def {name}_each({', '.join(operands)}, out):\n for i in range(out.size):\n  out[i] = {name}({values})"
    scope: dict[str, Any] = {name: njit(error_model="numpy")(scalar), "__name__": __name__}
    exec(compile(text, __file__, "exec"), scope)
    each: Any = njit(cache=True, nogil=True, error_model="numpy")(scope[f"{name}_each"])

    @wraps(scalar)
    def apply(*values: Any, out: Panel | None = None) -> Any:
        shape = np.broadcast_shapes(*map(np.shape, values))
        panels = (value if np.shape(value) == shape else np.full(shape, value, np.float64) for value in values)
        result = np.empty(shape) if out is None else out
        if result.shape != shape or not result.flags.c_contiguous:
            raise ValueError(f"{name}: expected out of shape {shape} in C order, found {result.shape}")
        each(*(np.ascontiguousarray(panel, np.float64).reshape(-1) for panel in panels), result.reshape(-1))
        return result

    return apply


@word()
@elementwise
def ratio(numerator: Any, denominator: Any) -> Any:
    """numerator / denominator, null where the denominator is zero."""
    return numerator / denominator if denominator != 0.0 else np.nan


@word()
@elementwise
def change(new: Any, old: Any) -> Any:
    """new / old − 1; a difference below `FLAT` is rounding left by a split's factor and reads as 0."""
    relative = new / old - 1.0 if old != 0.0 else np.nan
    return 0.0 if abs(relative) < FLAT else relative


@word()
@elementwise
def growth(new: Any, old: Any) -> Any:
    """(new − old) / abs(old): the sign is that of the improvement, also from a loss."""
    return (new - old) / abs(old) if old != 0.0 else np.nan


@word()
@elementwise
def exceeds(x: Any, threshold: Any) -> Any:
    """1 where x is above the threshold, 0 elsewhere, null where either is."""
    return np.nan if x != x or threshold != threshold else (1.0 if x > threshold else 0.0)


@word()
@elementwise
def reaches(x: Any, threshold: Any) -> Any:
    """1 where x is at the threshold or above it, 0 elsewhere, null where either is."""
    return np.nan if x != x or threshold != threshold else (1.0 if x >= threshold else 0.0)


@word()
@elementwise
def above(x: Any, level: Any) -> Any:
    """1 where x is above the level by more than rounding, 0 elsewhere, null where either is."""
    relative = x / level - 1.0 if level != 0.0 else np.nan
    return np.nan if relative != relative else (1.0 if relative >= FLAT else 0.0)


@word()
@elementwise
def same_sign(x: Any, y: Any) -> Any:
    """1 where both are positive, both negative or both 0, else 0, null where either is."""
    return np.nan if x != x or y != y else (1.0 if np.sign(x) == np.sign(y) else 0.0)


@word()
@elementwise
def is_known(x: Any) -> Any:
    """1 where there is a value, else 0: a mask is never null."""
    return 1.0 if x == x else 0.0


@word()
@elementwise
def positive(x: Any) -> Any:
    """x, null where it is not above 0."""
    return x if x > 0.0 else np.nan


@word()
@elementwise
def either(x: Any, otherwise: Any) -> Any:
    """x, the other where x is null."""
    return x if x == x else otherwise


@word()
@elementwise
def rise(new: Any, old: Any) -> Any:
    """new − old where it is positive, else 0, null where either is; a rise by rounding is none."""
    step = new - old
    return step if step != step else (step if step >= FLAT * new else 0.0)


@word()
@elementwise
def strength(gain: Any, loss: Any, price: Any) -> Any:
    """100 · gain / (gain + loss), 50 where both together are under `STILL` of the price: it has stood still."""
    total = gain + loss
    return 50.0 if total <= STILL * price else 100.0 * gain / total


@word()
@elementwise
def unit_position(x: Any, low: Any, high: Any) -> Any:
    """(x − low) / (high − low), in the middle, 0.5, where low and high are the same price."""
    width = high - low
    if width <= FLAT * abs(high):
        return 0.5 if x == x else np.nan
    return (x - low) / width


@word()
@elementwise
def band_position(x: Any, middle: Any, std: Any) -> Any:
    """Bollinger's %B: where x lies between middle − 2 std (0) and middle + 2 std (1), 0.5 where the bands touch."""
    low, high = middle - 2.0 * std, middle + 2.0 * std
    width = high - low
    if width <= FLAT * abs(high):
        return 0.5 if x == x else np.nan
    return (x - low) / width


def log(x: Panel) -> Panel:
    """ln x, null where x is not positive."""
    return np.log(positive(x))


def log_ratio(numerator: Panel, denominator: Panel) -> Panel:
    """ln(numerator / denominator), null where either is not positive."""
    return np.log(ratio(positive(numerator), positive(denominator)))


def band_width(middle: Panel, std: Panel) -> Panel:
    """Distance between the bands over the middle."""
    return ratio(4.0 * std, middle)


# --- earlier sessions -------------------------------------------------------------------------------------------------


@word(lambda sessions: sessions)
def lag(x: Panel, sessions: int) -> Panel:
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
            there = row[j] == row[j]
            age[j] = 0 if there else age[j] + 1
            result[j] = row[j] if there else (before[j] if age[j] <= longest and t > 0 else np.nan)


@word(CARRY_SESSIONS)
def carry(x: Panel) -> Panel:
    """The last non-null value, at most `CARRY_SESSIONS` old."""
    panel = _panel(x)
    out = np.empty_like(panel)
    _carry(panel, CARRY_SESSIONS, out)
    return out.reshape(x.shape)


@word(lambda sessions: sessions)
def returns(close: Panel, carried: Panel, sessions: int) -> Panel:
    """R_h: the close over the one `sessions` earlier, minus 1, both carried; R_1 is null on an untraded session."""
    out = np.full_like(close, np.nan)
    new = close if sessions == 1 else carried
    change(new[sessions:], carried[: max(len(close) - sessions, 0)], out=out[sessions:])
    return out


# --- windows ----------------------------------------------------------------------------------------------------------


def _panel(x: Panel) -> Panel:
    """`[T, N]` in C order: a series is a panel of one."""
    return np.ascontiguousarray(x.reshape(len(x), -1))


@njit(cache=True, nogil=True, error_model="numpy")
def _moments(x: Any, window: Any, least: Any, ddof: Any, two_pass: Any, mean: Any, std: Any) -> None:
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
                    there = row[j] == row[j]
                    total[j] += row[j] if there else 0.0
                    seen[j] += 1.0 if there else 0.0
            result = mean[t, first : first + width]
            for j in range(width):
                centre[j] = total[j] / seen[j]
                result[j] = centre[j] if seen[j] >= least else np.nan
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
                # Equal values leave rounding of their mean: that is no spread.
                spread = 0.0 if spread <= FLAT * abs(centre[j]) else spread
                result[j] = spread if seen[j] >= least else np.nan


def _rolling(x: Panel, window: int, least: int, ddof: int, *, two_pass: bool) -> tuple[Panel, Panel]:
    panel = _panel(x)
    mean = np.empty_like(panel)
    std = np.empty_like(panel) if two_pass else np.empty((0, 0))
    _moments(panel, window, least, ddof, two_pass, mean, std)
    return mean.reshape(x.shape), std.reshape(x.shape) if two_pass else std


@word(lambda window: window - 1)
def rolling_mean(x: Panel, window: int) -> Panel:
    """Mean of the window's non-null values."""
    return _rolling(x, window, least_of(window), 0, two_pass=False)[0]


@word(lambda window: window - 1)
def rolling_sum(x: Panel, window: int) -> Panel:
    """Sum of the window's non-null values."""
    return _counted(x, window) * _rolling(x, window, least_of(window), 0, two_pass=False)[0]


@word(lambda window: window - 1, results=2)
def rolling_mean_std(x: Panel, window: int, ddof: int) -> tuple[Panel, Panel]:
    """Mean and standard deviation of the window's non-null values."""
    return _rolling(x, window, least_of(window), ddof, two_pass=True)


@word(lambda window: window - 1)
def rolling_std(x: Panel, window: int) -> Panel:
    """Standard deviation, ddof 1, of the window's non-null values."""
    return _rolling(x, window, least_of(window), 1, two_pass=True)[1]


@word(TS_WINDOW - 1)
def ts_zscore(x: Panel) -> Panel:
    """Trailing z-score over 252 sessions, ddof 1, at least 60 observations; null where the series did not move."""
    mean, std = _rolling(x, TS_WINDOW, TS_LEAST, 1, two_pass=True)
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


def _counted(x: Panel, window: int) -> Panel:
    """Non-null values in the window; whole numbers, which a running count adds exactly."""
    panel = _panel(x)
    out = np.empty_like(panel)
    _count(panel, window, out)
    return out.reshape(x.shape)


def _extreme(x: Panel, window: int, larger: Any) -> Panel:
    """`larger` of two is that of their windows: each doubling of the width is one pass, and two cover the rest."""
    top, width = x, 1
    while width < window:
        step = min(width, window - width)
        wider = top.copy()
        larger(top[step:], top[: max(len(top) - step, 0)], out=wider[step:])
        top, width = wider, width + step
    return np.where(_counted(x, window) >= least_of(window), top, np.nan)


@word(lambda window: window - 1)
def rolling_max(x: Panel, window: int) -> Panel:
    """Largest of the window's non-null values."""
    return _extreme(x, window, np.fmax)


@word(lambda window: window - 1)
def rolling_min(x: Panel, window: int) -> Panel:
    """Smallest of the window's non-null values."""
    return _extreme(x, window, np.fmin)


@njit(cache=True, nogil=True, error_model="numpy")
def _regress(y: Any, x: Any, window: Any, least: Any, beta: Any, corr: Any, residual: Any) -> None:
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
                    there = (a[j] == a[j]) & (b[j] == b[j])
                    n[j] += 1.0 if there else 0.0
                    mx[j] += a[j] if there else 0.0
                    my[j] += b[j] if there else 0.0
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
                    there = (dx == dx) & (dy == dy)
                    sxx[j] += dx * dx if there else 0.0
                    sxy[j] += dx * dy if there else 0.0
                    syy[j] += dy * dy if there else 0.0
            betas, corrs = beta[t, first : first + width], corr[t, first : first + width]
            for j in range(width):
                moved = sxx[j] > n[j] * (FLAT * mx[j]) ** 2
                slope[j] = sxy[j] / sxx[j] if moved and n[j] >= least else np.nan
                both = moved and syy[j] > n[j] * (FLAT * my[j]) ** 2
                found = sxy[j] / np.sqrt(sxx[j] * syy[j])
                betas[j] = slope[j]
                corrs[j] = min(max(found, -1.0), 1.0) if both and slope[j] == slope[j] else np.nan
            # The residuals are summed themselves: syy − slope * sxy cancels when the fit is close.
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

    beta: Panel
    corr: Panel
    residual_std: Panel


def rolling_regression(y: Panel, x: Panel, window: int) -> Regression:
    """The regression of y on x over each window.

    A session counts where both are non-null. x: `[T, N]`, or `[T, 1]` for the same regressor everywhere. Null where x
    did not move; the correlation also where y did not.
    """
    return Regression(*_regression(y, x, window))


@word(lambda window: window - 1, results=3)
def _regression(y: Panel, x: Panel, window: int) -> tuple[Panel, Panel, Panel]:
    beta, corr, residual = np.empty_like(y), np.empty_like(y), np.empty_like(y)
    regressor = np.ascontiguousarray(np.broadcast_to(x, y.shape))
    _regress(np.ascontiguousarray(y), regressor, window, least_of(window), beta, corr, residual)
    return beta, corr, residual


# --- recursions, which continue from what they remember ---------------------------------------------------------------


class Average(NamedTuple):
    """An exponential average after a session: the average so far `[N]`, and the values seen `[N]`."""

    state: Panel
    seen: Panel

    @staticmethod
    def unstarted(N: int) -> Average:
        return Average(np.zeros(N), np.zeros(N))


@njit(cache=True, nogil=True, error_model="numpy")
def _smooth(x: Any, alpha: Any, first: Any, fresh: Any, state: Any, seen: Any, out: Any) -> None:
    T, N = x.shape
    out[:fresh] = np.nan
    for t in range(fresh, T):
        row, result = x[t], out[t]
        for j in range(N):
            value = row[j]
            there = value == value
            seen[j] += 1.0 if there else 0.0
            started = seen[j] > first
            step = alpha * (value - state[j]) if started else value / first
            state[j] += step if there else 0.0
            result[j] = state[j] if there and seen[j] >= first else np.nan


@word(lambda alpha: EMA_SPANS_TO_FORGET * round(2 / alpha - 1) - 1, results=2, remembers=True)
def exponential(x: Panel, alpha: float, first: int, before: Average | None, fresh: int) -> tuple[Panel, Average]:
    """Exponential average that starts as the mean of its first `first` non-null values, and where it stands at the end.

    It steps over nulls: a null session changes nothing and is null itself. before: where it stood after the session
    before row `fresh`, None at the start of the data; earlier rows are null.
    """
    panel = _panel(x)
    state, seen = (array.copy() for array in before or Average.unstarted(panel.shape[1]))
    out = np.empty_like(panel)
    _smooth(panel, alpha, first, fresh, state, seen, out)
    return out.reshape(x.shape), Average(state, seen)


def ema(x: Panel, span: int) -> Panel:
    """`exponential` with alpha = 2 / (span + 1) of a series that is kept whole."""
    values, _ = exponential(x, 2.0 / (span + 1), span, None, 0)
    return values


@word(lambda least: least - 1, results=2, remembers=True)
def seen_at_least(x: Panel, least: int, before: Panel | None, fresh: int) -> tuple[Panel, Panel]:
    """1 from the `least`-th non-null value on, else 0; and the values seen `[N]`. before, fresh: as `exponential`."""
    seen = np.cumsum(~np.isnan(x[fresh:]), axis=0, dtype=np.float64) + (0.0 if before is None else before)
    out = np.full_like(x, np.nan)
    out[fresh:] = seen >= least
    return out, seen[-1]


# --- groups and cross-sections ----------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def _select(values: Any, k: Any) -> Any:
    """The k-th smallest, counted from 0; reorders the values (Hoare's selection)."""
    low, high = 0, len(values) - 1
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
    return values[k]


@njit(cache=True, nogil=True)
def _median(values: Any, work: Any, guess: Any, reach: Any) -> Any:
    """Median of non-null values.

    One branchless pass keeps those within `reach` of a guess, such as the session before, and the few of them are
    searched; where the guess was wrong, all are. The result does not depend on the guess.
    """
    n = len(values)
    k = n // 2
    low, high = guess - reach, guess + reach
    below, inside = 0, 0
    for i in range(n):
        value = values[i]
        work[inside] = value
        below += value < low
        inside += (value >= low) & (value <= high)
    if not (below <= k < below + inside):
        below, inside = 0, n
        work[:n] = values
    upper = _select(work[:inside], k - below)
    if n % 2 == 1:
        return upper
    smaller, lower = 0, -np.inf
    for i in range(n):
        less = values[i] < upper
        smaller += less
        lower = max(lower, values[i] if less else -np.inf)
    return 0.5 * ((upper if smaller < k else lower) + upper)


@njit(cache=True, nogil=True)
def _by_group(x: Any, member: Any, group: Any, groups: Any, least: Any, out: Any) -> None:
    T, N = x.shape
    sorted_values, work = np.empty(N), np.empty(N + 1)
    stop = np.empty(groups, np.int64)
    for t in range(T):
        row, inside, of = x[t], member[t], group[t]
        stop[:] = 0
        for j in range(N):
            if inside[j] and of[j] >= 0 and row[j] == row[j]:
                stop[of[j]] += 1
        total = 0
        for g in range(groups):
            total, stop[g] = total + stop[g], total
        for j in range(N):
            if inside[j] and of[j] >= 0 and row[j] == row[j]:
                sorted_values[stop[of[j]]] = row[j]
                stop[of[j]] += 1
        start = 0
        for g in range(groups):
            enough = stop[g] - start >= least
            out[t, g] = _median(sorted_values[start : stop[g]], work, 0.0, np.inf) if enough else np.nan
            start = stop[g]


@word()
def group_median(x: Panel, member: NDArray[np.bool_], group: NDArray[np.int32], groups: int) -> Panel:
    """Median over the members of each group and session, `[T, G]`, null under `GROUP_LEAST` non-null members.

    group: `[T, N]`, −1 where a stock has none.
    """
    out = np.empty((len(x), groups))
    _by_group(np.ascontiguousarray(x), member, group, groups, GROUP_LEAST, out)
    return out


@njit(cache=True, nogil=True)
def _of_group(x: Any, group: Any, out: Any) -> None:
    T, N = out.shape
    for t in range(T):
        row, of, result = x[t], group[t], out[t]
        for j in range(N):
            result[j] = row[of[j]] if of[j] >= 0 else np.nan


@word()
def of_group(x: Panel, group: NDArray[np.int32]) -> Panel:
    """`[T, G]` values given to each stock by the group it has in that session, `[T, N]`, null without one."""
    out = np.empty(group.shape)
    _of_group(np.ascontiguousarray(x), group, out)
    return out


@word()
def chained(step: Panel) -> Panel:
    """Index level of a series of returns, 1 before the first; a null session changes nothing and is null itself."""
    level = np.cumprod(1.0 + np.nan_to_num(step), axis=0)
    return np.where(np.isnan(step), np.nan, level)


@word()
def share_of(condition: Panel, member: NDArray[np.bool_]) -> Panel:
    """Share of the members whose flag is 1, `[T]`, null under `NORMALISE_LEAST` members with a flag."""
    there = member & ~np.isnan(condition)
    count = there.sum(axis=1)
    share = np.where(there, condition, 0.0).sum(axis=1) / np.maximum(count, 1)
    return np.where(count >= NORMALISE_LEAST, share, np.nan)


@njit(cache=True, nogil=True)
def _sum(values: Any) -> Any:
    """Sum in 16 interleaved parts, which the compiler may add side by side, and always in the same order."""
    parts = np.zeros(16)
    whole = len(values) // 16 * 16
    for start in range(0, whole, 16):
        block = values[start : start + 16]
        for j in range(16):
            parts[j] += block[j]
    total = 0.0
    for j in range(16):
        total += parts[j]
    for i in range(whole, len(values)):
        total += values[i]
    return total


@njit(cache=True, nogil=True, error_model="numpy")
def _standardise(x: Any, member: Any, kept: Any, out: Any) -> None:
    T, N = x.shape
    values, work, buffer = np.empty(N), np.empty(N), np.empty(N + 1)
    centre, deviation = 0.0, np.inf
    start = 0
    for t in range(T):
        row, inside, wanted = x[t], member[t], kept[t]
        n = 0
        for j in range(N):
            values[n] = row[j]
            n += inside[j] & (row[j] == row[j])
        rows = 0
        for j in range(N):
            rows += wanted[j]
        result = out[start : start + rows]
        start += rows
        if n < NORMALISE_LEAST:
            result[:] = np.nan
            continue
        there, spread = values[:n], work[:n]
        centre = _median(there, buffer, centre, 0.25 * deviation)
        for i in range(n):
            spread[i] = abs(there[i] - centre)
        deviation = _median(spread, buffer, deviation, 0.25 * deviation)
        reach = CLIP_MAD * MAD_TO_STD * deviation
        low, high = (centre - reach, centre + reach) if reach > 0.0 else (-np.inf, np.inf)
        for i in range(n):
            there[i] = min(max(there[i], low), high)
        mean = _sum(there) / n
        for i in range(n):
            spread[i] = (there[i] - mean) * (there[i] - mean)
        std = np.sqrt(_sum(spread) / n)
        if std <= FLAT * abs(mean):
            result[:] = np.nan
            continue
        for j in range(N):
            values[j] = min(max((min(max(row[j], low), high) - mean) / std, -CLIP_STD), CLIP_STD)
        k = 0
        for j in range(N):
            buffer[k] = values[j] if row[j] == row[j] else np.nan
            k += wanted[j]
        result[:] = buffer[:rows]


def cs_normalise(
    x: Panel, member: NDArray[np.bool_], kept: NDArray[np.bool_] | None = None, out: NDArray[Any] | None = None
) -> NDArray[Any]:
    """Per session: clipped at median ± 5 · 1.4826 · MAD (not where MAD is 0), standardised with ddof 0, clipped to ±5.

    The statistics are the members'; a stock outside the universe is placed on their scale and moves nothing. Null in
    sessions with fewer than 10 member values or no spread among them. With kept `[T, N]`, its cells alone are written
    into `out`, session by session; else the whole panel is returned.
    """
    if kept is not None and out is not None:
        _standardise(x, member, kept, out)
        return out
    panel = np.empty_like(x)
    _standardise(np.ascontiguousarray(x), member, np.ones(x.shape, np.bool_), panel.reshape(-1))
    return panel


# --- weekly histories and documents -----------------------------------------------------------------------------------


@word(lambda weeks: (weeks - 1) * SESSIONS_IN_WEEK)
def weekly_mean(history: Panel, weeks: int) -> Panel:
    """Mean of the newest `weeks` of each history `[E, W]`, newest last; two thirds of them non-null, else null."""
    window = history[:, -weeks:]
    count = np.sum(~np.isnan(window), axis=1)
    return np.where(count >= least_of(weeks), np.nansum(window, axis=1) / np.maximum(count, 1), np.nan)


@word(lambda weeks, newest: (weeks + newest - 2) * SESSIONS_IN_WEEK)
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


@word()
def of_event(values: Panel, latest: NDArray[np.int32]) -> Panel:
    """`[E]` values of the latest event, in the shape of `latest`, null where it is −1: there is none yet."""
    return np.where(latest >= 0, values[np.maximum(latest, 0)] if len(values) else np.nan, np.nan)


@njit(cache=True, nogil=True)
def _in_force(values: Any, day: Any, latest: Any, sessions: Any, expiry: Any, out: Any) -> None:
    T, N = latest.shape
    for t in range(T):
        events, result = latest[t], out[t]
        for j in range(N):
            e = events[j]
            known = e >= 0 and sessions[t] - day[e] <= expiry
            result[j] = values[e] if known else np.nan


@word()
def in_force(values: Panel, day: Panel, latest: NDArray[np.int32], sessions: Panel, expiry_days: int) -> Panel:
    """`[E]` values of the latest document known at each close, `[T, N]`, null once its `day` is over `expiry_days` ago.

    day: `[E]` and sessions: `[T]`, in days since 1970, NaN where a document says nothing of the kind.
    """
    out = np.empty(latest.shape)
    _in_force(np.ascontiguousarray(values), day, latest, sessions, expiry_days, out)
    return out
