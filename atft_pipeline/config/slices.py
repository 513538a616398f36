"""The slices of the universe by name: what `all` and `liquid` are called, and which column marks their rows.

What makes a stock liquid is decided in market/liquidity.py.
"""

from __future__ import annotations

from typing import Literal

Slice = Literal["all", "liquid"]
DEFAULT_SLICE: Slice = "liquid"
SLICES: dict[Slice, str] = {"all": "is_investable", "liquid": "is_liquid"}
"""Column of a predictions table that marks the rows of a slice."""
