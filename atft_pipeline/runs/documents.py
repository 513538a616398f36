"""The one reader of JSON in a run directory, and the two documents that only need it: the verdict and its checks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from atft_pipeline.errors import InputError
from atft_pipeline.runs.paths import UnreadableFile, first_line, require_inside

NOT_WRITTEN = "not written"


def read_document(run_dir: Path, name: str) -> dict[str, Any]:
    """The JSON object in the file `name` of a run directory.

    Raises UnreadableFile where it is not written, leaves the run directory, or holds something else.
    """
    path = run_dir / name
    require_inside(path, run_dir)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UnreadableFile(NOT_WRITTEN) from error
    except OSError as error:
        raise UnreadableFile(f"unreadable ({first_line(error)})") from error
    except ValueError as error:  # no UTF-8, or no JSON
        raise UnreadableFile(f"not JSON ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise UnreadableFile("not a JSON object")
    return content


def read_verdict(run_dir: Path) -> dict[str, Any]:
    """`verdict.json`; raises InputError where the run has none yet or it cannot be read."""
    try:
        return read_document(run_dir, "verdict.json")
    except UnreadableFile as error:
        if str(error) == NOT_WRITTEN:
            raise InputError(
                f"run directory {run_dir}: no verdict.json; the run has not finished, start it again to go on"
            ) from error
        raise InputError(f"{run_dir / 'verdict.json'}: {error}; remove the run directory and train again") from error


def read_validity(run_dir: Path) -> list[dict[str, Any]]:
    """The results of the validity checks, by epoch. Raises InputError for one that cannot be read."""
    results = []
    for path in sorted((run_dir / "validity").glob("epoch_*.json")):
        try:
            results.append(read_document(run_dir, f"validity/{path.name}"))
        except UnreadableFile as error:
            raise InputError(f"{path}: {error}; remove the run directory and train again") from error
    return results
