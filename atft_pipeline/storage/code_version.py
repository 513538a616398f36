"""Which code decides a result: a hash of the packages that compute it.

A dataset that other code continues, or a run that other code resumes, would mix two definitions. A word fixed in a
report, a dashboard or a command decides nothing, so `inspection`, `diagnostics`, `monitoring`, `ensemble` and `cli` are
not hashed.
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
    "run": ("dataset", "graph", "batches", "model", "evaluation", "runs", "verdict", "training"),
}
"""Packages that decide the values of prices and dataset, and those that decide a run on a given dataset and graph.

Configuration enters both keys by its values, so a reworded refusal in `config` changes neither, and a new field of
training leaves the datasets valid. How `storage` writes a file changes nothing in it. A run depends on the data layer
through the fingerprint of its dataset.
"""

LIBRARIES: dict[Result, tuple[str, ...]] = {"dataset": ("numpy", "numba", "polars", "exchange_calendars"), "run": ()}
"""Libraries whose versions decide a result. A run records its versions in run.json and may be resumed with others."""


@cache
def code_revision(result: Result, library: Path = Path(__file__).parents[1]) -> str:
    """Hash of the code that decides `result`, 16 hex digits; it needs no git.

    It is computed once per process, because this process does not run files that are edited later.
    """
    digest = hashlib.sha256()
    for package in PACKAGES[result]:
        for source in sorted((library / package).rglob("*.py")):
            digest.update(source.relative_to(library).as_posix().encode())
            digest.update(source.read_bytes())
    digest.update(" ".join(f"{name} {version(name)}" for name in LIBRARIES[result]).encode())
    return digest.hexdigest()[:16]
