"""Recursions over time that a later call continues: exponential averages, and counts of values so far."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from atft_pipeline.features.trace import word
from atft_pipeline.features.vocabulary.windows import as_matrix
from atft_pipeline.market.price_panel import Matrix

EMA_SPANS_TO_FORGET = 5
"""Spans after which an exponential average has forgotten its start: the start's weight is then e^-10."""


class Average(NamedTuple):
    """State of an exponential average after a session: the average and the number of values so far, both `[N]`."""

    state: Matrix
    seen: Matrix

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
            has_value = value == value
            seen[j] += 1.0 if has_value else 0.0
            started = seen[j] > first
            step = alpha * (value - state[j]) if started else value / first
            state[j] += step if has_value else 0.0
            result[j] = state[j] if has_value and seen[j] >= first else np.nan


@word(lambda alpha: EMA_SPANS_TO_FORGET * round(2 / alpha - 1) - 1, results=2, remembers=True)
def exponential(x: Matrix, alpha: float, first: int, before: Average | None, fresh: int) -> tuple[Matrix, Average]:
    """Exponential average that starts as the mean of its first `first` non-null values, and its state at the end.

    It skips nulls: a null session changes nothing and is null itself. before: its state after the session before row
    `fresh`, None at the start of the data; earlier rows are null.
    """
    panel = as_matrix(x)
    state, seen = (array.copy() for array in before or Average.unstarted(panel.shape[1]))
    out = np.empty_like(panel)
    _smooth(panel, alpha, first, fresh, state, seen, out)
    return out.reshape(x.shape), Average(state, seen)


def series_ema(x: Matrix, span: int) -> Matrix:
    """`exponential` with alpha = 2 / (span + 1), of a series whose whole history is kept."""
    values, _ = exponential(x, 2.0 / (span + 1), span, None, 0)
    return values


@word(lambda count: count - 1, results=2, remembers=True)
def seen_at_least(x: Matrix, count: int, before: Matrix | None, fresh: int) -> tuple[Matrix, Matrix]:
    """1 from the `count`-th non-null value on, else 0; and the number of values so far `[N]`.

    before, fresh: as in `exponential`.
    """
    seen = np.cumsum(~np.isnan(x[fresh:]), axis=0, dtype=np.float64) + (0.0 if before is None else before)
    out = np.full_like(x, np.nan)
    out[fresh:] = seen >= count
    return out, seen[-1]
