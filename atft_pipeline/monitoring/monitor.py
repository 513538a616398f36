"""Runs watched while they train: one frame per look, with the persistent warnings of running runs.

A frame is read from the runs' records; nothing is written to a run directory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from atft_pipeline.errors import InputError, unusable_path
from atft_pipeline.monitoring.persistent_warnings import PersistentWarning, persistent_warnings
from atft_pipeline.monitoring.progress import RunProgress, has_ended, read_all_progress, read_progress
from atft_pipeline.training.distributed.interrupts import pause

ENDED_SHOWN = 5
"""Number of the newest ended runs that a frame shows."""


@dataclass(frozen=True)
class Watched:
    """A run of a frame. Only a running run, or one that was asked for by name, has `warnings`.

    `unassessed`: why there are none, where the rules could not be assessed.
    """

    progress: RunProgress
    warnings: tuple[PersistentWarning, ...] = ()
    unassessed: str | None = None

    def as_dict(self) -> dict[str, Any]:
        warnings = [vars(warning) for warning in self.warnings]
        return self.progress.as_dict() | {"warnings": warnings, "unassessed": self.unassessed}


@dataclass(frozen=True)
class Frame:
    """What one look saw. `older`: ended runs that are not shown. `place`: the folder or the run looked at."""

    place: Path
    time: str
    runs: tuple[Watched, ...]
    older: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {"time": self.time, "runs": [run.as_dict() for run in self.runs], "older": self.older}


Look = Callable[[float], Frame]
"""Seconds since 1970 -> the frame of that time."""


def look_at_folder(runs: Path) -> Look:
    """Looks at every run of a folder that is running or cannot be read, and at the newest ended ones."""

    def look(now_s: float) -> Frame:
        all_runs = read_all_progress(runs, now_s)
        ended = [progress for progress in all_runs if not _is_always_shown(progress)]
        shown = [progress for progress in all_runs if _is_always_shown(progress)] + ended[:ENDED_SHOWN]
        watched = tuple(_assessed(progress) if progress.goes_on else Watched(progress) for progress in shown)
        return Frame(runs, _clock(now_s), watched, older=len(ended) - len(ended[:ENDED_SHOWN]))

    return look


def look_at_run(run_dir: Path) -> Look:
    """Looks at one run, whatever its state. Raises InputError where the directory does not exist."""

    def look(now_s: float) -> Frame:
        if not run_dir.is_dir():
            raise InputError(f"{run_dir}: no such run directory; give one that `atft train` writes, or --runs FOLDER")
        return Frame(run_dir, _clock(now_s), (_assessed(read_progress(run_dir, now_s)),))

    return look


def watch_folder(runs: Path, show: Callable[[Frame], None], *, every_s: float, once: bool) -> int:
    """Shows the runs of a folder again and again until it is interrupted, or `once`; 0 is the exit code."""
    look = look_at_folder(runs)
    _require_pause(every_s)
    while True:
        show(look(time.time()))
        if once:
            return 0
        pause(every_s)


def watch_run(run_dir: Path, show: Callable[[Frame], None], *, every_s: float, once: bool) -> int:
    """Shows one run until it has ended; the exit code is 1 if it has ended without success, else 0."""
    look = look_at_run(run_dir)
    _require_pause(every_s)
    while True:
        frame = look(time.time())
        show(frame)
        (run,) = frame.runs
        if has_ended(run.progress):
            return 0 if run.progress.has_succeeded else 1
        if once:
            return 0
        pause(every_s)


def _require_pause(every_s: float) -> None:
    if not (math.isfinite(every_s) and every_s > 0):
        raise InputError(f"--every {every_s:g}: expected a number of seconds above 0")


def _is_always_shown(progress: RunProgress) -> bool:
    return progress.goes_on or progress.state == "unreadable"


def _assessed(progress: RunProgress) -> Watched:
    """The run with its persistent warnings; a run that cannot be read has none."""
    if progress.state == "unreadable":
        return Watched(progress)
    try:
        return Watched(progress, persistent_warnings(progress.run_dir))
    except InputError as error:
        return Watched(progress, unassessed=str(error))
    except OSError as error:
        return Watched(progress, unassessed=str(unusable_path(error)))


def _clock(now_s: float) -> str:
    return datetime.fromtimestamp(now_s, UTC).isoformat(timespec="seconds")
