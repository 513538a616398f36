"""Functions of numbers, applied to each value of matrices, series and constants: ratios, changes, comparisons."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

import numpy as np
from numba import njit

from atft_pipeline.features.trace import word
from atft_pipeline.market.price_panel import Matrix

FLAT = 1e-12
"""Relative difference below which two prices count as equal: dividing by a split's factor leaves about 1e-16, while one
tick is at least 1e-7."""
STILL = 1e-6
"""Average move per session, relative to the price, below which a price counts as still. Averaged gains and losses of a
still price decay at the same pace, so their ratio would keep its last value for ever. A tick is at least 1e-5 of a
price."""


def min_observations(window: int) -> int:
    """Fewest observations for a statistic over `window` sessions: two thirds, rounded up."""
    return -(-2 * window // 3)


def elementwise(scalar: Callable[..., Any]) -> Callable[..., Any]:
    """Turns a function of numbers into one of panels, series and constants, broadcast against each other.

    It replaces numba's `vectorize`, whose cache keeps no wrappers: rebuilding them would cost a twentieth of a second a
    word at every start. The loop is compiled from text, because numba's cache tells functions apart by file, name and
    line.
    """
    name, operands = scalar.__name__, list(signature(scalar).parameters)
    values = ", ".join(f"{operand}[i]" for operand in operands)
    text = f"def {name}_each({', '.join(operands)}, out):\n for i in range(out.size):\n  out[i] = {name}({values})"
    scope: dict[str, Any] = {name: njit(error_model="numpy")(scalar), "__name__": __name__}
    exec(compile(text, __file__, "exec"), scope)
    each: Any = njit(cache=True, nogil=True, error_model="numpy")(scope[f"{name}_each"])

    @wraps(scalar)
    def apply(*values: Any, out: Matrix | None = None) -> Any:
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
    """(new − old) / abs(old): positive for an improvement, also from a loss; null where old is zero."""
    return (new - old) / abs(old) if old != 0.0 else np.nan


@word()
@elementwise
def exceeds(x: Any, threshold: Any) -> Any:
    """1 where x is above the threshold, 0 elsewhere, null where either is."""
    return np.nan if x != x or threshold != threshold else (1.0 if x > threshold else 0.0)


@word()
@elementwise
def reaches(x: Any, threshold: Any) -> Any:
    """1 where x is at or above the threshold, 0 elsewhere, null where either is."""
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
    """x, or `otherwise` where x is null."""
    return x if x == x else otherwise


@word()
@elementwise
def rise(new: Any, old: Any) -> Any:
    """new − old where it is positive, else 0, null where either is; a rise within rounding counts as 0."""
    step = new - old
    return step if step != step else (step if step >= FLAT * new else 0.0)


@word()
@elementwise
def strength(gain: Any, loss: Any, price: Any) -> Any:
    """100 · gain / (gain + loss), 50 where their sum is within `STILL` of the price: it has not moved."""
    total = gain + loss
    return 50.0 if total <= STILL * price else 100.0 * gain / total


@word()
@elementwise
def unit_position(x: Any, low: Any, high: Any) -> Any:
    """(x − low) / (high − low); 0.5, the middle, where low and high are the same price."""
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


def log(x: Matrix) -> Matrix:
    """ln x, null where x is not positive."""
    return np.log(positive(x))


def log_ratio(numerator: Matrix, denominator: Matrix) -> Matrix:
    """ln(numerator / denominator), null where either is not positive."""
    return np.log(ratio(positive(numerator), positive(denominator)))


def band_width(middle: Matrix, std: Matrix) -> Matrix:
    """Distance between the bands, over the middle."""
    return ratio(4.0 * std, middle)
