"""Functions of publications: the weekly history of a release, and the document in force at each close."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from atft_pipeline.features.trace import word
from atft_pipeline.features.vocabulary.elementwise import FLAT, min_observations, ratio
from atft_pipeline.market.price_panel import Matrix

SESSIONS_IN_WEEK = 5


@word(lambda weeks: (weeks - 1) * SESSIONS_IN_WEEK)
def weekly_mean(history: Matrix, weeks: int) -> Matrix:
    """Mean of the newest `weeks` of each history `[E, W]`, newest last; null unless two thirds of them are non-null."""
    window = history[:, -weeks:]
    count = np.sum(~np.isnan(window), axis=1)
    return np.where(count >= min_observations(weeks), np.nansum(window, axis=1) / np.maximum(count, 1), np.nan)


@word(lambda weeks, newest: (weeks + newest - 2) * SESSIONS_IN_WEEK)
def weekly_zscores(history: Matrix, weeks: int, newest: int) -> Matrix:
    """z-score (ddof 1) of each of the last `newest` weeks within the `weeks` that end with it, `[E, newest]`."""
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
def of_event(values: Matrix, latest: NDArray[np.int32]) -> Matrix:
    """`[E]` values of the latest event, in the shape of `latest`; null where it is −1, before the first event."""
    return np.where(latest >= 0, values[np.maximum(latest, 0)] if len(values) else np.nan, np.nan)


@njit(cache=True, nogil=True)
def _in_force(values: Any, day: Any, latest: Any, sessions: Any, expiry: Any, out: Any) -> None:
    T, N = latest.shape
    for t in range(T):
        events, result = latest[t], out[t]
        for j in range(N):
            e = events[j]
            is_in_force = e >= 0 and sessions[t] - day[e] <= expiry
            result[j] = values[e] if is_in_force else np.nan


@word()
def document_in_force(
    values: Matrix, day: Matrix, latest: NDArray[np.int32], sessions: Matrix, expiry_days: int
) -> Matrix:
    """`[E]` values of the latest document known at each close, `[T, N]`; null once its `day` is over `expiry_days` ago.

    day: `[E]`, NaN where a document states no such figure; sessions: `[T]`; both in days since 1970.
    """
    out = np.empty(latest.shape)
    _in_force(np.ascontiguousarray(values), day, latest, sessions, expiry_days, out)
    return out
