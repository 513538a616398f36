"""Atomic replacement of files and folders: readers see the old one or the new one, never a half-written one."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atft_pipeline.errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path` for a file or folder, which replaces `path` when the block ends well.

    After an exception, interrupts included, the temporary data are removed and `path` stays as it was. A file is
    replaced in one step. A folder takes two steps; a kill between them leaves the earlier one under the temporary name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    written = scratch / path.name
    try:
        yield written
        written.lstat()  # raises if nothing was written, before the earlier one is moved
        if path.is_dir() and not path.is_symlink():
            path.rename(scratch / "replaced")
        written.replace(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove_remnants(folder: Path, names: str = "*") -> None:
    """Removes temporary data that killed writers left in `folder`, for files whose names match `names`.

    Call it only while no other process writes there.
    """
    for scratch in folder.glob(f".{names}.*"):
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)


def link(file: Path, to: Path) -> None:
    """Gives `file` a second name, without a copy where the file system can."""
    try:
        to.hardlink_to(file)
    except OSError:  # on another file system, or on one without hard links
        shutil.copy2(file, to)


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as JSON to `path`, atomically. NaN is refused: it is not JSON, and a missing number is null."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def relink(link: Path, target: Path) -> None:
    """Makes `link` a relative symbolic link to `target`, replacing an earlier link in one step."""
    with replacing(link) as temporary:
        temporary.symlink_to(os.path.relpath(target, link.parent))


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays and texts by name to one file, without pickling."""
    named: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
    np.savez(path, **named)


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as saved:
            return {name: saved[name] for name in saved.files}
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise InputError(f"{path}: damaged ({error}); delete it, and what depends on it is computed again") from error
