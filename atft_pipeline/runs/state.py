"""The state of a run: what `run.json` says, and whether the process that wrote it is still there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atft_pipeline.runs.documents import read_document
from atft_pipeline.runs.lock import is_held
from atft_pipeline.runs.paths import UnreadableFile

RUNNING, FAILED, KILLED = "running", "failed", "killed"


def run_state(run_dir: Path, header: Mapping[str, Any]) -> str:
    """finished, failed, interrupted, running, or killed: it says running and no process holds the run directory.

    `header` is `run.json` as it was read a moment ago. A run may have ended since, so a run that is not held is looked
    up again before it counts as killed.
    """
    status = str(header["status"])
    if status != RUNNING or is_held(run_dir):
        return status
    try:
        status = str(read_document(run_dir, "run.json").get("status"))
    except UnreadableFile:
        return KILLED
    return KILLED if status == RUNNING else status


def with_earlier_end(header: Mapping[str, Any]) -> dict[str, Any]:
    """The header of a run that starts again, with its last end added to `earlier_ends`.

    The caller holds the run directory, so a header that says running is of a process that was killed.
    """
    status = header.get("status")
    if status in (None, "finished"):
        return dict(header)
    end = {
        "status": KILLED if status == RUNNING else status,
        "reason": header.get("reason"),
        "ended": header.get("ended"),
        "epochs_done": header.get("epochs_done"),
    }
    return {**header, "earlier_ends": [*header.get("earlier_ends", []), end]}


def has_crashed(header: Mapping[str, Any]) -> bool:
    """Whether a start of the run failed or was killed. An interrupt is somebody's decision, and no crash."""
    ends = header.get("earlier_ends")
    return any(end["status"] in (FAILED, KILLED) for end in ends) if isinstance(ends, list) else False
