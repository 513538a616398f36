"""Which code decides a result: a hash of the packages that compute it.

A dataset continued, or a run resumed, by other code would mix two definitions. A word fixed in a report, a dashboard or
a command decides nothing, so the packages `diagnostics`, `monitoring`, `ensemble` and `cli` count for neither.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Literal

Result = Literal["dataset", "run"]

PACKAGES: dict[Result, tuple[str, ...]] = {
    "dataset": ("market", "features", "dataset"),
    "run": ("config", "storage", "dataset", "graph", "batches", "model", "evaluation", "runs", "verdict", "training"),
}
"""Packages that decide the values of prices and dataset, and those that decide a run on a given dataset and graph.

Configuration is part of both keys by its values, so a new field of training leaves the datasets as they are. A run
depends on the data layer through the fingerprint of its dataset.
"""

LIBRARIES: dict[Result, tuple[str, ...]] = {"dataset": ("numpy", "numba", "polars", "exchange_calendars"), "run": ()}
"""Libraries whose versions decide a result. A run keeps those of its own in run.json and goes on with others."""


@cache
def code_revision(result: Result, library: Path = Path(__file__).parents[1]) -> str:
    """Hash of what decides `result`, 16 hex digits: what ran, also where there is no git.

    Read once per process: files edited later are not the code that this process runs.
    """
    digest = hashlib.sha256()
    for package in PACKAGES[result]:
        for source in sorted((library / package).rglob("*.py")):
            digest.update(source.relative_to(library).as_posix().encode())
            digest.update(source.read_bytes())
    digest.update(" ".join(f"{name} {version(name)}" for name in LIBRARIES[result]).encode())
    return digest.hexdigest()[:16]
