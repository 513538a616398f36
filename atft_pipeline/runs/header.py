"""`run.json`: what a run says of itself."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from atft_pipeline.errors import InputError
from atft_pipeline.storage.artifact import read_manifest


def read_run(run_dir: Path) -> dict[str, Any]:
    """`run.json` of a run directory; raises InputError where there is none or it cannot be read."""
    path = run_dir / "run.json"
    if not path.is_file():
        raise InputError(f"run directory {run_dir}: no run.json in it; pass a directory that `atft train` wrote")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"run directory {run_dir}: run.json is not JSON ({error}); the run must be made again"
        ) from error
    missing = [name for name in ("key", "status") if not isinstance(header, dict) or name not in header]
    if missing:
        raise InputError(f"run directory {run_dir}: run.json has no {missing[0]!r}; the run must be made again")
    return located(header, run_dir)


def located(header: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """A run's header with the dataset and the graph that it names where they lie now.

    A relative path was given from the folder where the run was started: the working directory, or one above the run.
    As given, where none of these has the product that the run was made on.
    """
    return {**header} | {
        f"{what}_path": _located(header[f"{what}_path"], header.get(f"{what}_fingerprint"), run_dir)
        for what in ("dataset", "graph")
        if isinstance(header.get(f"{what}_path"), str)
    }


def _located(path: str, fingerprint: object, run_dir: Path) -> str:
    if Path(path).is_absolute():
        return path
    above = dict.fromkeys((*run_dir.absolute().parents, *Path(os.path.realpath(run_dir)).parents))
    for place in (path, *(str(folder / path) for folder in above)):
        with suppress(InputError, OSError, RuntimeError, ValueError):  # not there, not to be read, not a path
            if read_manifest(Path(place)).get("fingerprint") == fingerprint:
                return place
    return path


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
