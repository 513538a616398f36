"""Products kept as one part per month: what did not change stays, what did is written again.

A product at PATH is a folder of `YYYY-MM.parquet`; further folders beside it, `PATH.<name>/`, hold one file per month
too. A new version is written under temporary names, takes unchanged months over as hard links, and replaces the old one
only when it is whole; its manifest comes last.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from atft_pipeline.dataset import manifest_path, resolved
from atft_pipeline.files import replacing

Days = NDArray[np.datetime64]


def month_of(days: Days) -> list[str]:
    """`YYYY-MM` of each day."""
    return days.astype("datetime64[M]").astype(str).tolist()


def sessions_by_month(sessions: Days) -> dict[str, slice]:
    """Rows of each month among ascending sessions."""
    months = sessions.astype("datetime64[M]")
    starts = np.flatnonzero(np.concatenate([[True], months[1:] != months[:-1]])) if len(months) else []
    stops = [*starts[1:], len(months)]
    return {str(months[start]): slice(int(start), int(stop)) for start, stop in zip(starts, stops, strict=True)}


def spans(months: Mapping[str, slice], first: str, sessions_at_a_time: int) -> Iterator[list[str]]:
    """Consecutive months from `first` on, in spans of about `sessions_at_a_time` sessions, one month at least.

    The last month is a span of its own: what is remembered before it is where the next session continues.
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


def part(folder: Path, month: str, suffix: str = "parquet") -> Path:
    return folder / f"{month}.{suffix}"


def beside(path: Path, name: str) -> Path:
    """The further folder or file `name` of the product at `path`."""
    data = resolved(path)
    return data.with_name(f"{data.name}.{name}")


@dataclass(frozen=True)
class PartsWriter:
    """Temporary folders of a new version, by name; the product's own is ''."""

    folders: Mapping[str, Path]
    previous: Mapping[str, Path]

    def take_over(self, month: str, *, but: Sequence[str] = ()) -> None:
        """The month's files of the previous version, except those in the folders `but`."""
        for name, folder in self.folders.items():
            for file in self.previous[name].glob(f"{month}.*") if name not in but else ():
                link(file, folder / file.name)


@contextmanager
def writing_parts(path: Path, folders: Iterable[str], previous: Path | None) -> Iterator[PartsWriter]:
    """Temporary folders that take the place of those at `path` when the block ends well; the manifest is then gone."""
    data = resolved(path)
    names = ["", *folders]

    def place(product: Path, name: str) -> Path:
        return product if name == "" else beside(product, name)

    with ExitStack() as stack:
        temporary = {name: stack.enter_context(replacing(place(data, name))) for name in names}
        for folder in temporary.values():
            folder.mkdir()
        yield PartsWriter(temporary, {name: place(resolved(previous), name) for name in names} if previous else {})
        manifest_path(data).unlink(missing_ok=True)
        if data.is_file():
            data.unlink()  # a folder cannot be renamed onto a file


def link(file: Path, to: Path) -> None:
    """`file` under another name, without a copy where the file system can."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copy2(file, to)


def month_digests(frame: pl.DataFrame, date: str) -> dict[str, int]:
    """By month of the column `date`: a digest of its rows, whatever their order. Digests of disjoint rows add up."""
    if frame.is_empty():
        return {}
    rows = pl.DataFrame({"month": frame[date].dt.truncate("1mo"), "digest": frame.hash_rows(seed=0)})
    sums = rows.group_by("month").agg(pl.col("digest").sum()).sort("month")
    return {month.isoformat()[:7]: digest for month, digest in sums.iter_rows() if month is not None}


def first_difference(one: Mapping[str, Any], two: Mapping[str, Any]) -> str | None:
    """The earliest month in which they differ, None when they do not."""
    differing = [month for month in {*one, *two} if one.get(month) != two.get(month)]
    return min(differing, default=None)


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Arrays and texts by name as one file, written without pickling."""
    np.savez(path, **{name: np.asarray(value) for name, value in arrays.items()})


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as saved:
        return {name: saved[name] for name in saved.files}
