"""What makes a stock liquid: the trailing median of its turnover value reaches the market's floor.

The floor and the window of each market stand in market_facts.py. config/slices.py names the slice and the column that
this decides, `is_liquid`. universe.py also asks for what makes a stock investable.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from atft_pipeline.market.market_facts import MarketFacts
from atft_pipeline.market.price_panel import Flags, Matrix


def liquid_rows(turnover: Matrix, first: int, facts: MarketFacts) -> Flags:
    """Whether each stock is liquid at each session from row `first` on: `turnover [T, N]` in currency units."""
    return median_reaches(turnover, facts.turnover_floor, facts.turnover_window_sessions, first)


@njit(cache=True, nogil=True)
def _median_reaches(turnover: Any, first: Any, window: Any, least: Any, floor: Any, out: Any) -> None:
    T, N = turnover.shape
    seen, high = np.zeros(N, np.int64), np.zeros(N, np.int64)
    for t in range(T):
        new, old = turnover[t], turnover[max(t - window, 0)]
        for n in range(N):
            seen[n] += new[n] == new[n]
            high[n] += new[n] >= floor
            if t >= window:
                seen[n] -= old[n] == old[n]
                high[n] -= old[n] >= floor
        if t < first:
            continue
        for n in range(N):
            reaches = 2 * high[n] > seen[n]
            if seen[n] > 0 and 2 * high[n] == seen[n]:
                # Half at or above the floor, half below it: the median is the mean of the two in the middle.
                lower, upper = -np.inf, np.inf
                for s in range(max(0, t - window + 1), t + 1):
                    value = turnover[s, n]
                    if value >= floor:
                        upper = min(upper, value)
                    elif value == value:
                        lower = max(lower, value)
                reaches = 0.5 * (lower + upper) >= floor
            out[t - first, n] = reaches and seen[n] >= least


def median_reaches(turnover: Matrix, floor: float, window: int, first: int) -> Flags:
    """Whether the median of the trailing `window` sessions' turnover is at or above the floor, for rows from `first`.

    Untraded sessions are left out, and two thirds of the window are needed. Counting who is above the floor answers
    it without sorting.
    """
    out = np.empty((len(turnover) - first, turnover.shape[1]), np.bool_)
    _median_reaches(turnover, first, window, math.ceil(window * 2 / 3), floor, out)
    return out
