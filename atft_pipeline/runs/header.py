"""`run.json`: what a run says of itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from atft_pipeline.errors import InputError
from atft_pipeline.runs.documents import NOT_WRITTEN, read_document
from atft_pipeline.runs.paths import UnreadableFile
from atft_pipeline.storage.artifact import read_manifest


def read_run(run_dir: Path) -> dict[str, Any]:
    """`run.json` of a run directory; raises InputError where there is none or it cannot be used."""
    try:
        header = read_document(run_dir, "run.json")
    except UnreadableFile as error:
        if str(error) == NOT_WRITTEN:
            raise InputError(
                f"run directory {run_dir}: no run.json in it; pass a directory that `atft train` wrote"
            ) from error
        raise InputError(f"run directory {run_dir}: run.json is {error}; the run must be made again") from error
    missing = [name for name in ("key", "status") if name not in header]
    if missing:
        raise InputError(f"run directory {run_dir}: run.json has no {missing[0]!r}; the run must be made again")
    return located(header, run_dir)


def located(header: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """The header with the present paths of the dataset and the graph that it names.

    A relative path was given from the folder in which the run was started: the working directory, or a folder above the
    run. A path stays as it is where none of these folders has the artifact that the run was made on.
    """
    return {**header} | {
        f"{kind}_path": _located(header[f"{kind}_path"], header.get(f"{kind}_fingerprint"), run_dir)
        for kind in ("dataset", "graph")
        if isinstance(header.get(f"{kind}_path"), str)
    }


def _located(path: str, fingerprint: object, run_dir: Path) -> str:
    if Path(path).is_absolute():
        return path
    folders_above = dict.fromkeys((*run_dir.absolute().parents, *Path(os.path.realpath(run_dir)).parents))
    for candidate in (path, *(str(folder / path) for folder in folders_above)):
        with suppress(InputError, OSError, RuntimeError, ValueError):  # absent, unreadable, or not a path
            if read_manifest(Path(candidate)).get("fingerprint") == fingerprint:
                return candidate
    return path


def now() -> str:
    """The time in UTC, as `run.json` records it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
