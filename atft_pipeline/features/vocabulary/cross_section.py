"""Functions across the stocks of a session: group medians, shares, and the normalisation of the inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from atft_pipeline.features.trace import word
from atft_pipeline.features.vocabulary.elementwise import FLAT
from atft_pipeline.market.price_panel import Matrix

NORMALISE_MIN_VALUES = 10
"""Fewest values in a session for a cross-sectional statistic."""
CLIP_MAD = 5.0
CLIP_STD = 5.0
MAD_TO_STD = 1.4826
"""Ratio of standard deviation to median absolute deviation of a normal distribution."""
GROUP_MIN_MEMBERS = 5
"""Fewest members with a value for a statistic of a sector."""


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

    One branchless pass keeps the values within `reach` of a guess, such as the previous session's median; the search
    then covers these few. Where the guess was wrong, it covers all values. The result does not depend on the guess.
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
def _by_group(x: Any, member: Any, group: Any, groups: Any, min_members: Any, out: Any) -> None:
    T, N = x.shape
    sorted_values, work = np.empty(N), np.empty(N + 1)
    stop = np.empty(groups, np.int64)
    for t in range(T):
        row, is_member, group_of = x[t], member[t], group[t]
        stop[:] = 0
        for j in range(N):
            if is_member[j] and group_of[j] >= 0 and row[j] == row[j]:
                stop[group_of[j]] += 1
        total = 0
        for g in range(groups):
            total, stop[g] = total + stop[g], total
        for j in range(N):
            if is_member[j] and group_of[j] >= 0 and row[j] == row[j]:
                sorted_values[stop[group_of[j]]] = row[j]
                stop[group_of[j]] += 1
        start = 0
        for g in range(groups):
            enough = stop[g] - start >= min_members
            out[t, g] = _median(sorted_values[start : stop[g]], work, 0.0, np.inf) if enough else np.nan
            start = stop[g]


@word()
def group_median(x: Matrix, member: NDArray[np.bool_], group: NDArray[np.int32], groups: int) -> Matrix:
    """Median over the members of each group and session, `[T, G]`; null below `GROUP_MIN_MEMBERS` non-null members.

    group: `[T, N]`, −1 where a stock has none.
    """
    out = np.empty((len(x), groups))
    _by_group(np.ascontiguousarray(x), member, group, groups, GROUP_MIN_MEMBERS, out)
    return out


@njit(cache=True, nogil=True)
def _of_group(x: Any, group: Any, out: Any) -> None:
    T, N = out.shape
    for t in range(T):
        row, group_of, result = x[t], group[t], out[t]
        for j in range(N):
            result[j] = row[group_of[j]] if group_of[j] >= 0 else np.nan


@word()
def of_group(x: Matrix, group: NDArray[np.int32]) -> Matrix:
    """`[T, G]` values given to the stocks of each group and session, `[T, N]`; null for a stock without a group."""
    out = np.empty(group.shape)
    _of_group(np.ascontiguousarray(x), group, out)
    return out


@word()
def chained(step: Matrix) -> Matrix:
    """Index level of a series of returns, starting at 1; a null session changes nothing and is null itself."""
    level = np.cumprod(1.0 + np.nan_to_num(step), axis=0)
    return np.where(np.isnan(step), np.nan, level)


@word()
def share_of(condition: Matrix, member: NDArray[np.bool_]) -> Matrix:
    """Share of the members whose flag is 1, `[T]`; null below `NORMALISE_MIN_VALUES` members with a flag."""
    has_flag = member & ~np.isnan(condition)
    count = has_flag.sum(axis=1)
    share = np.where(has_flag, condition, 0.0).sum(axis=1) / np.maximum(count, 1)
    return np.where(count >= NORMALISE_MIN_VALUES, share, np.nan)


@njit(cache=True, nogil=True)
def _sum(values: Any) -> Any:
    """Sum in 16 interleaved parts: the compiler may vectorise it, and the order of addition is always the same."""
    sums = np.zeros(16)
    whole = len(values) // 16 * 16
    for start in range(0, whole, 16):
        block = values[start : start + 16]
        for j in range(16):
            sums[j] += block[j]
    total = 0.0
    for j in range(16):
        total += sums[j]
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
        row, is_member, wanted = x[t], member[t], kept[t]
        n = 0
        for j in range(N):
            values[n] = row[j]
            n += is_member[j] & (row[j] == row[j])
        rows = 0
        for j in range(N):
            rows += wanted[j]
        result = out[start : start + rows]
        start += rows
        if n < NORMALISE_MIN_VALUES:
            result[:] = np.nan
            continue
        members, spread = values[:n], work[:n]
        centre = _median(members, buffer, centre, 0.25 * deviation)
        for i in range(n):
            spread[i] = abs(members[i] - centre)
        deviation = _median(spread, buffer, deviation, 0.25 * deviation)
        reach = CLIP_MAD * MAD_TO_STD * deviation
        low, high = (centre - reach, centre + reach) if reach > 0.0 else (-np.inf, np.inf)
        for i in range(n):
            members[i] = min(max(members[i], low), high)
        mean = _sum(members) / n
        for i in range(n):
            spread[i] = (members[i] - mean) * (members[i] - mean)
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
    x: Matrix, member: NDArray[np.bool_], kept: NDArray[np.bool_] | None = None, out: NDArray[Any] | None = None
) -> NDArray[Any]:
    """Per session: clipped at median ± 5 · 1.4826 · MAD (not where MAD is 0), standardised with ddof 0, clipped to ±5.

    The statistics are those of the members. A stock outside the universe is put on their scale and affects none.
    Null in sessions with fewer than 10 member values or no spread among them. With `kept` `[T, N]`, only its cells are
    written into `out`, session by session; else the whole panel is returned.
    """
    if kept is not None and out is not None:
        _standardise(x, member, kept, out)
        return out
    panel = np.empty_like(x)
    _standardise(np.ascontiguousarray(x), member, np.ones(x.shape, np.bool_), panel.reshape(-1))
    return panel
