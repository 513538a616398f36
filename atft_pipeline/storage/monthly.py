"""Artifacts of one partition per month: unchanged months are kept, changed months are written again.

An artifact at PATH is a folder of `YYYY-MM.parquet`; further folders beside it, `PATH.<name>/`, also hold one file per
month. A new version is written under temporary names, hard-links the unchanged months, and replaces the old version
only when it is whole. Its manifest comes last.
"""

from __future__ import annotations

import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from atft_pipeline.storage.artifact import manifest_path, read_manifest, replacing_artifact, resolved
from atft_pipeline.storage.atomic import link, replacing

Days = NDArray[np.datetime64]
"""Days `[T]`, ascending where they are sessions."""


def sessions_by_month(sessions: Days) -> dict[str, slice]:
    """Rows of each month among ascending sessions."""
    months = sessions.astype("datetime64[M]")
    if len(months) == 0:
        return {}
    starts = [0, *np.flatnonzero(months[1:] != months[:-1]) + 1]
    return {str(months[start]): slice(int(start), int(stop)) for start, stop in pairwise([*starts, len(months)])}


def spans(months: Mapping[str, slice], first: str, sessions_at_a_time: int) -> Iterator[list[str]]:
    """Consecutive months from `first` on, in spans of about `sessions_at_a_time` sessions, at least one month each.

    The last month is a span of its own, because the next update continues from the state before it.
    """
    names = [month for month in months if month >= first]
    span: list[str] = []
    for month in names:
        longer = sum(months[name].stop - months[name].start for name in [*span, month])
        if span and (longer > sessions_at_a_time or month == names[-1]):
            yield span
            span = []
        span.append(month)
    if span:
        yield span


def partition_path(folder: Path, month: str, suffix: str = "parquet") -> Path:
    """The file of a month in one of an artifact's folders."""
    return folder / f"{month}.{suffix}"


def beside(path: Path, name: str) -> Path:
    """The further folder or file `name` of the artifact at `path`; the artifact itself if `name` is empty."""
    data = resolved(path)
    return data.with_name(f"{data.name}.{name}") if name else data


@dataclass(frozen=True)
class PartitionWriter:
    """Temporary folders of a new version, by name; the name of the artifact's own folder is ''."""

    folders: Mapping[str, Path]
    previous: Mapping[str, Path]

    def take_over(self, month: str, *, but: Sequence[str] = ()) -> None:
        """Links the month's files of the previous version, except those in the folders `but`."""
        for name, folder in self.folders.items():
            for file in self.previous[name].glob(f"{month}.*") if name not in but else ():
                link(file, folder / file.name)


@contextmanager
def writing_partitions(path: Path, folders: Iterable[str], earlier: Earlier) -> Iterator[PartitionWriter]:
    """Temporary folders that replace those at `path` when the block ends well; the earlier manifest is then deleted."""
    data, names = resolved(path), [*folders, ""]
    with ExitStack() as stack:
        # The artifact's own folder is entered last, so it is replaced first, and the manifest is deleted with it.
        temporary = {
            name: stack.enter_context(replacing(beside(data, name)) if name else replacing_artifact(data))
            for name in names
        }
        for folder in temporary.values():
            folder.mkdir()
        yield PartitionWriter(temporary, {name: beside(earlier.path, name) for name in names})


def month_digests(frame: pl.DataFrame, date: str) -> dict[str, int]:
    """By month of column `date`, a digest of the rows in any order. Digests of disjoint rows add up."""
    if frame.is_empty():
        return {}
    names = sorted(frame.columns)
    # A row's hash does not contain the column names, so the seed is made of them.
    hashes = frame.select(names).hash_rows(seed=zlib.crc32("\n".join(names).encode()))
    rows = pl.DataFrame({"month": frame[date].dt.truncate("1mo"), "digest": hashes})
    sums = rows.group_by("month").agg(pl.col("digest").sum()).sort("month")
    return {month.isoformat()[:7]: digest for month, digest in sums.iter_rows() if month is not None}


@dataclass(frozen=True)
class Earlier:
    """An earlier version of a monthly artifact that can be continued; empty if there is none."""

    path: Path
    parts: Mapping[str, dict[str, Any]]
    """By month, the manifest's entry of the partition."""
    manifest: Mapping[str, Any]

    @staticmethod
    def of(previous: Path | None, kind: str, **same: Any) -> Earlier:
        """The version at `previous` if its manifest has the entries `same`, else an empty one.

        Raises: InputError when the artifact at `previous` is of another kind.
        """
        if previous is not None and manifest_path(previous).is_file() and resolved(previous).is_dir():
            manifest = read_manifest(previous, kind)
            if "inputs" in manifest and all(manifest.get(name) == value for name, value in same.items()):
                return Earlier(resolved(previous), manifest["parts"], manifest)
        return Earlier(Path(), {}, {})

    def changes(self, inputs: Mapping[str, Mapping[str, Any]], state: str, folders: Sequence[str]) -> Changes:
        """What differs from this version.

        inputs: by name, a digest by month. state: folder of the states after a month. folders: those that hold a file
        of every month; a month with a damaged file counts as changed, under the input `damaged parts`.
        """
        first = {}
        before = self.manifest.get("inputs", inputs)
        for name in sorted({*inputs, *before}):
            new, old = inputs.get(name, {}), before.get(name, {})
            differing = [month for month in {*new, *old} if new.get(month) != old.get(month)]
            if differing:
                first[name] = min(differing)
        files = {name: {file.stem: file for file in beside(self.path, name).glob("*")} for name in folders}
        damaged = [
            month
            for month, record in self.parts.items()
            if not all(month in files[name] and is_whole(files[name][month], record["rows"]) for name in folders)
        ]
        if damaged:
            first["damaged parts"] = min(damaged)
        changed = min(first.values(), default=None)
        states = beside(self.path, state).glob("*.npz") if self.parts else []
        with_state = [file.stem for file in states if zipfile.is_zipfile(file)]
        newest = max((month for month in with_state if changed is None or month < changed), default="")
        return Changes(first, [month for month in sorted(self.parts) if month <= newest])


def is_whole(file: Path, rows: int | None = None) -> bool:
    """Whether an artifact's file exists and can be opened; with `rows`, a table must have that many rows."""
    if not file.is_file():
        return False
    if file.suffix != ".parquet":
        return zipfile.is_zipfile(file)
    try:
        rows_in_file: int = pq.read_metadata(file).num_rows
    except pa.ArrowInvalid:
        return False
    return rows is None or rows_in_file == rows


@dataclass(frozen=True)
class Changes:
    """What differs from an earlier version, and which of its months are kept."""

    first_by_input: Mapping[str, str]
    """The first month in which each input differs."""
    kept: Sequence[str]
    """Months that are kept: up to the newest one with a state before the first month that differs."""

    def record(self, months: Iterable[str]) -> dict[str, Any]:
        """The manifest's entry about the changes; `months`: all months of the new version."""
        return {
            "first_changed_month": dict(self.first_by_input),
            "months_reused": list(self.kept),
            "months_computed": sorted({*months} - {*self.kept}),
        }


def remove_artifact(path: Path) -> None:
    """Deletes the artifact at `path` and all that lies beside it; does nothing if there is none."""
    for file in _files_of(resolved(path)):
        if file.is_dir():
            shutil.rmtree(file)
        else:
            file.unlink()


def move_artifact(path: Path, to: Path) -> None:
    """Moves the artifact at `path`, with all that lies beside it, to `to`, and replaces an artifact there."""
    old, new = resolved(path), resolved(to)
    manifest_path(new).unlink(missing_ok=True)
    # The manifest is moved last: without it the other files are no artifact.
    for file in sorted(_files_of(old), key=lambda file: file.suffix == ".json"):
        target = new.with_name(new.name + file.name.removeprefix(old.name))
        if target.is_dir():
            shutil.rmtree(target)
        file.replace(target)


def _files_of(data: Path) -> list[Path]:
    """The artifact's own folder or file and all that lies beside it, by exact name: `d2` does not belong to `d`."""
    return [file for file in data.parent.glob("*") if file.name == data.name or file.name.startswith(f"{data.name}.")]
