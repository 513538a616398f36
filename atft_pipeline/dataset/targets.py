"""Forward returns from the price at which a score of session t can be traded."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from atft_pipeline.config.schema import EXECUTION_DELAY_SESSIONS, Execution
from atft_pipeline.market.price_panel import Matrix


def forward_return(
    open_: Matrix, close: Matrix, horizon_sessions: int, execution: Execution, masked: NDArray[np.bool_] | None = None
) -> Matrix:
    """Return of a position taken at the execution price after session t and left `horizon_sessions` later, `[T, N]`.

    next_open: O_{t+1+h} / O_{t+1} − 1. next_close: C_{t+1+h} / C_{t+1} − 1. same_close: C_{t+h} / C_t − 1, which needs
    the close that the score itself is made from and cannot be traded. Prices are forward-adjusted, so a split between
    entry and exit moves nothing.

    Null where the entry or the exit price is missing (a halt, a delisting, the end of the data): nobody could trade
    there, and a carried price would be a return that nobody earned. Null too where either row is `masked`.
    """
    price = open_ if execution == "next_open" else close
    if masked is not None:
        price = np.where(masked, np.nan, price)
    entry = _lead(price, EXECUTION_DELAY_SESSIONS[execution])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(entry > 0.0, _lead(entry, horizon_sessions) / entry - 1.0, np.nan)


def _lead(x: Matrix, sessions: int) -> Matrix:
    out = np.full_like(x, np.nan)
    out[: max(len(x) - sessions, 0)] = x[sessions:]
    return out
