"""Files of a run directory: which epoch a file is of, and why one cannot be used."""

from __future__ import annotations

import re
from pathlib import Path

from atft_pipeline.errors import InputError


class UnreadableFile(InputError):
    """A file of a run directory that cannot be used. The text says why, and not which file."""


def part_epoch(path: Path) -> int | None:
    """Epoch in the name `epoch_NNN` of a partition or of a predictions file; None where the name has none."""
    match = re.fullmatch(r"epoch_(\d+)", path.stem)
    return int(match.group(1)) if match else None


def files_until(folder: Path, pattern: str, until_epoch: int | None = None) -> list[Path]:
    """Files of `folder` that match `pattern`, by name, without those of epochs after `until_epoch`."""
    paths = sorted(folder.glob(pattern))
    return [path for path in paths if until_epoch is None or (part_epoch(path) or 0) <= until_epoch]


def require_inside(path: Path, run_dir: Path) -> None:
    """Raises UnreadableFile for a link that leaves the run: it would report another run's numbers as this one's."""
    if not path.resolve().is_relative_to(run_dir.resolve()):
        raise UnreadableFile("a link to a file outside this run, not read")


def first_line(error: Exception) -> str:
    """What an error says, short enough for a list of problems."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
