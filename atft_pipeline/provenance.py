"""Which code made a product: parts made by other code, or by other versions of what computes, are not continued."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

_MODULES: tuple[str, ...] = (
    "adjustment", "dataset_rows", "point_in_time", "price_panel", "sources", "targets", "trading_calendar", "universe",
)  # fmt: skip
"""Modules that shape the values of prices and dataset, beside those of `features`."""
_LIBRARIES: tuple[str, ...] = ("numpy", "numba", "polars", "exchange_calendars")


@cache
def code_fingerprint() -> str:
    """Hash of the data layer's code and of the libraries that compute with it."""
    library = Path(__file__).parent
    files = [*sorted((library / "features").glob("*.py")), *(library / f"{name}.py" for name in _MODULES)]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    digest.update(" ".join(f"{name} {version(name)}" for name in _LIBRARIES).encode())
    return digest.hexdigest()
