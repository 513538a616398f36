"""Folders that tests only read. Each is built once per run of the suite, by the worker that needs it first."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Listing = dict[str, tuple[int, int]]

_built: dict[Path, Listing] = {}
"""What each folder held when this worker first had it."""


def built_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """The folder `name` that `build` fills; other workers wait for it. It must be read only: copy it to change it."""
    folder = _root(factory) / name
    done = folder.with_name(f"{name}.done")
    with folder.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # the remains of a build that failed
            folder.mkdir()
            build(folder)
            done.touch()
    _built.setdefault(folder, listing(folder))
    return folder


def listing(folder: Path) -> Listing:
    """Size and time of change of every file, by its relative name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def changed_folders() -> list[str]:
    """The shared folders that a test has written to, with the files that differ."""
    return [
        f"{folder}: {sorted(name for name, _ in before.items() ^ listing(folder).items())}"
        for folder, before in _built.items()
        if listing(folder) != before
    ]


def _root(factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this session have in common."""
    base = factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    root.mkdir(exist_ok=True)
    return root
