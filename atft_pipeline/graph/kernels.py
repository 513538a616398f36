"""Exact nearest neighbours by trailing correlation: one BLAS product in blocks, compiled selection, several threads.

The product of a block of targets with all sources only nominates candidates: every pair whose product is within
rounding of the last place. `_dot` then computes their correlations exactly. So the result depends neither on the BLAS,
nor on the blocks, nor on the number of threads, and corr[i, j] equals corr[j, i] to the last bit.

Shapes: W sessions of the window, N stocks of the panel, n candidate nodes padded with empty ones to a multiple of
`BLOCK`, k neighbours. Kernels slice rows before they index them: with `x[s, first + j]` in the inner loop numba checks
for a negative index and does not vectorise, which is three times slower.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

BLOCK: int = 128
"""Targets per product: the product's matrix, 2 MB at 4,000 stocks, stays in the cache of the core that selects from it.
It is also the number of groups whose maxima bound the k-th largest value from below."""

FLAT: float = 1e-7
"""Standard deviation below which a series counts as constant: far below any real residual (about 1e-2), far above
rounding."""


class Edges(NamedTuple):
    """Edges `[E]`, sorted by target, -corr, source; source and target are positions in the window's columns."""

    source: NDArray[np.int32]
    target: NDArray[np.int32]
    corr: NDArray[np.float32]


class Search:
    """Threads with their buffers, and a BLAS limited to one thread each; one `open` serves any number of windows."""

    def __init__(self, pool: ThreadPoolExecutor, threads: int) -> None:
        self._pool, self._threads = pool, threads

    @classmethod
    @contextmanager
    def open(cls, threads: int | None = None) -> Iterator[Search]:
        """threads: by default all of the machine's; the result is the same for any number."""
        threads = threads or os.cpu_count() or 1
        with ThreadPoolExecutor(max(threads - 1, 1)) as pool, _blas().limit(limits=1, user_api="blas"):
            yield cls(pool, threads)

    def demeaned(
        self, returns: NDArray[np.float32], member: NDArray[np.bool_], sector: NDArray[np.int32], min_members: int
    ) -> NDArray[np.float32]:
        """Returns minus the session's mean over the sector's members; over all members in sectors below `min_members`.

        All `[T, N]`; a negative sector is unknown. Each session depends on its own rows alone.
        """
        residual = np.empty_like(returns)
        groups = int(sector.max(initial=-1)) + 2
        self._each(len(returns), 32, lambda a, b: _demean(returns, member, sector, groups, min_members, residual, a, b))
        return residual

    def nearest(self, window: NDArray[np.float32], members: NDArray[np.int64], neighbours: int, clip: float) -> Edges:
        """The `neighbours` largest positive correlations of each of `members` with the others.

        window: `[W, N]`, NaN where missing. members: columns of the window, ascending.
        """
        n = -(-len(members) // BLOCK) * BLOCK
        z = np.zeros((n, len(window)), dtype=np.float32)
        present = np.zeros((n, len(window)), dtype=np.bool_)
        missing = np.full(n, -1, dtype=np.int32)

        def standardise(a: int, b: int) -> None:
            _standardise(window, members[a:b], clip, z[a:b], present[a:b], missing[a:b])

        self._each(len(members), BLOCK, standardise)
        source = np.empty((n, neighbours), dtype=np.int32)
        corr = np.empty((n, neighbours), dtype=np.float32)
        count = np.zeros(n, dtype=np.int64)

        def select(a: int, b: int, products: NDArray[np.float32]) -> None:
            np.matmul(z[a:b], z.T, out=products)
            _select(products, a, z, present, missing, source[a:b], corr[a:b], count[a:b])

        self._each(n, BLOCK, select, buffer=(BLOCK, n))
        used = np.arange(neighbours) < count[:, None]
        target = np.repeat(members.astype(np.int32), count[: len(members)])
        return Edges(members.astype(np.int32)[source[used]], target, corr[used])

    def _each(self, rows: int, step: int, work: Callable[..., None], buffer: tuple[int, int] | None = None) -> None:
        """Calls `work(start, stop)` for every `step` rows on all threads; each thread adds its `buffer`, if any."""
        starts = iter(range(0, rows, step))  # taking from a range's iterator is atomic

        def worker() -> None:
            buffers = () if buffer is None else (np.empty(buffer, dtype=np.float32),)
            for start in starts:
                work(start, min(start + step, rows), *buffers)

        # The calling thread works too: if it only waited, a helper would take its core and leave another one idle.
        helpers = [self._pool.submit(worker) for _ in range(self._threads - 1)]
        worker()
        for helper in helpers:
            helper.result()


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()  # searches the loaded libraries, in milliseconds; numpy's BLAS is loaded by now


@njit(cache=True, nogil=True, error_model="numpy")
def _demean(
    returns: Any, member: Any, sector: Any, groups: Any, min_members: Any, residual: Any, first: Any, last: Any
) -> None:
    total = np.empty(groups)
    count = np.empty(groups, dtype=np.int64)
    mean = np.empty(groups, dtype=np.float32)
    for t in range(first, last):
        row, used, group, out = returns[t], member[t], sector[t], residual[t]
        total[:] = 0.0
        count[:] = 0
        for j in range(len(row)):
            if used[j] and np.isfinite(row[j]):
                g = max(group[j], -1) + 1
                total[g] += row[j]
                count[g] += 1
        mean[:] = total.sum() / max(count.sum(), 1)
        for g in range(1, groups):
            if count[g] >= min_members:
                mean[g] = total[g] / count[g]
        for j in range(len(row)):
            out[j] = row[j] - mean[max(group[j], -1) + 1]


@njit(cache=True, nogil=True, error_model="numpy")
def _standardise(window: Any, columns: Any, clip: Any, z: Any, present: Any, missing: Any) -> None:
    """Fills z `[b, W]` (unit norm, 0 where missing), present and the number of missing sessions of `columns: [b]`.

    A stock without returns in two thirds of the window, or without variance, stays empty: z is 0, missing is -1.
    """
    W, b = len(window), len(columns)
    x = np.empty((W, b), dtype=np.float32)
    count, mean = np.zeros(b), np.zeros(b)
    square, norm = np.zeros(b), np.zeros(b)
    for s in range(W):
        row, returns = window[s], x[s]
        for j in range(b):
            returns[j] = row[columns[j]]
        for j in range(b):
            finite = np.isfinite(returns[j])
            count[j] += 1.0 if finite else 0.0
            mean[j] += returns[j] if finite else 0.0
    for j in range(b):
        mean[j] /= max(count[j], 1.0)
    for s in range(W):
        returns = x[s]
        for j in range(b):
            deviation = returns[j] - mean[j] if np.isfinite(returns[j]) else 0.0
            square[j] += deviation * deviation
    for j in range(b):
        std = np.sqrt(square[j] / max(count[j], 1.0))
        square[j] = 1.0 / std if 3.0 * count[j] >= 2.0 * W and std > FLAT else 0.0
    for s in range(W):
        returns = x[s]
        for j in range(b):
            score = min(max((returns[j] - mean[j]) * square[j], -clip), clip) if np.isfinite(returns[j]) else 0.0
            norm[j] += score * score
    for j in range(b):
        if square[j] > 0.0:
            missing[j] = W - int(count[j])
            _fill(x[:, j], mean[j], square[j], clip, 1.0 / np.sqrt(norm[j]), z[j], present[j])


@njit(cache=True, nogil=True, error_model="numpy")
def _fill(x: Any, mean: Any, per_std: Any, clip: Any, per_norm: Any, z: Any, present: Any) -> None:
    for s in range(len(x)):
        present[s] = np.isfinite(x[s])
        z[s] = min(max((x[s] - mean) * per_std, -clip), clip) * per_norm if present[s] else 0.0


@njit(cache=True, nogil=True, error_model="numpy")
def _select(products: Any, first: Any, z: Any, present: Any, missing: Any, source: Any, corr: Any, count: Any) -> None:
    """Fills source and corr `[b, k]` and count `[b]` with the best neighbours of targets first, first + 1, ... of z.

    products: `[b, n]` the targets' products with all sources, exact to `slack`; the diagonal is overwritten.
    """
    b, n = products.shape
    W, k = z.shape[1], source.shape[1]
    slack = np.float32((W + 8) * 2.0**-23)  # twice the rounding error of a product of unit columns, summed in any order
    best = np.empty(BLOCK, dtype=np.float32)
    for r in range(b):
        i = first + r
        if missing[i] < 0:
            continue
        row = products[r]
        row[i] = -1.0
        _group_maxima(row, best)
        places = k
        while True:
            floor = _floor(best, places)
            certain = 0
            count[r] = 0
            for g in range(BLOCK):
                if best[g] < floor - slack:
                    continue
                for j in range(g, n, BLOCK):
                    if row[j] >= floor - slack and _comparable(i, j, present, missing):
                        certain += row[j] >= floor
                        count[r] = _insert(_dot(z[i], z[j]), j, source[r], corr[r], count[r])
            # Pairs with too few common sessions are no candidates: lower the floor until k are certain.
            if certain >= k or floor <= 0.0:
                break
            places *= 2


@njit(cache=True, nogil=True, error_model="numpy")
def _group_maxima(row: Any, best: Any) -> None:
    """best[g] is the maximum of row[g], row[g + BLOCK], ..."""
    best[:] = -1.0
    for start in range(0, len(row), BLOCK):
        group_values = row[start : start + BLOCK]
        for g in range(BLOCK):
            best[g] = group_values[g] if group_values[g] > best[g] else best[g]


@njit(cache=True, nogil=True, error_model="numpy")
def _floor(best: Any, places: Any) -> Any:
    """A value that at least `places` of `best` reach, near the largest such, by bisection; 0 when none is found."""
    low, high = np.float32(0.0), np.float32(1.0)
    for _ in range(10):
        middle = np.float32(0.5) * (low + high)
        reached = 0
        for g in range(BLOCK):
            reached += best[g] >= middle
        if reached >= places:
            low = middle
        else:
            high = middle
    return low


@njit(cache=True, nogil=True, error_model="numpy")
def _comparable(i: Any, j: Any, present: Any, missing: Any) -> Any:
    """Whether both are nodes with half of the window in common; counted only where their gaps could exceed the rest."""
    if missing[j] < 0:
        return False
    W = present.shape[1]
    if 2 * (missing[i] + missing[j]) <= W:
        return True
    common = 0
    one, two = present[i], present[j]
    for s in range(W):
        common += one[s] & two[s]
    return 2 * common >= W


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})
def _dot(one: Any, two: Any) -> Any:
    """Inner product: the same float32 for any order of summation.

    Products of float32 are exact in float64, and the sum is rounded once.
    """
    total = 0.0
    for s in range(len(one)):
        total += np.float64(one[s]) * np.float64(two[s])
    return np.float32(total)


@njit(cache=True, nogil=True, error_model="numpy")
def _insert(value: Any, j: Any, source: Any, corr: Any, count: Any) -> Any:
    """Inserts a value among the largest positive ones, best first, ties by source; returns how many are kept now."""
    k = len(corr)
    if value <= 0.0 or (count == k and (value < corr[k - 1] or (value == corr[k - 1] and j > source[k - 1]))):
        return count
    position = min(count, k - 1)
    while position > 0 and (corr[position - 1] < value or (corr[position - 1] == value and source[position - 1] > j)):
        corr[position], source[position] = corr[position - 1], source[position - 1]
        position -= 1
    corr[position], source[position] = value, j
    return min(count + 1, k)
