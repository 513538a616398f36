"""One writer per run directory. The lock ends with the process that holds it, so a killed run leaves none behind."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from atft_pipeline.errors import InputError

LOCK_ATTEMPTS, LOCK_PAUSE_S = 5, 0.05
"""`is_held` takes the lock itself for an instant, so a writer that meets it tries again."""


@contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Holds the run directory for one writer. Raises InputError where another process holds it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("w") as handle:
        for _ in range(LOCK_ATTEMPTS):
            if _locked(handle, fcntl.LOCK_EX):
                break
            time.sleep(LOCK_PAUSE_S)
        else:
            raise InputError(f"run directory {run_dir}: another process is training this run; wait for it to end")
        yield


def is_held(run_dir: Path) -> bool:
    """Whether a process is writing the run."""
    lock = run_dir / ".lock"
    if not lock.exists():
        return False
    with lock.open() as handle:
        return not _locked(handle, fcntl.LOCK_SH)


def _locked(handle: IO[str], kind: int) -> bool:
    """Takes a lock of `kind` until the file is closed; False where the lock of another process excludes it."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
