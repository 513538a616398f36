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
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from atft_pipeline.dataset import manifest_path, read_manifest, resolved
from atft_pipeline.files import replacing

Days = NDArray[np.datetime64]


def month_of(days: Days) -> list[str]:
    """`YYYY-MM` of each day."""
    return days.astype("datetime64[M]").astype(str).tolist()


def sessions_by_month(sessions: Days) -> dict[str, slice]:
    """Rows of each month among ascending sessions."""
    months = sessions.astype("datetime64[M]")
    if len(months) == 0:
        return {}
    starts = [0, *np.flatnonzero(months[1:] != months[:-1]) + 1]
    return {str(months[start]): slice(int(start), int(stop)) for start, stop in pairwise([*starts, len(months)])}


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


@dataclass(frozen=True)
class Changes:
    """Against an earlier version: the first month in which each input differs."""

    first_by_input: Mapping[str, str]
    earlier: Sequence[str]
    """Months of the earlier version, none where there is none to continue."""

    @staticmethod
    def between(inputs: Mapping[str, Mapping[str, Any]], before: Mapping[str, Any] | None) -> Changes:
        """inputs: by name, a digest by month; before: the earlier manifest, with its own `inputs` and `parts`."""
        if before is None:
            return Changes({}, ())
        known = before["inputs"]
        first = {}
        for name in sorted({*inputs, *known}):
            one, two = inputs.get(name, {}), known.get(name, {})
            differing = [month for month in {*one, *two} if one.get(month) != two.get(month)]
            if differing:
                first[name] = min(differing)
        return Changes(first, sorted(before["parts"]))

    def kept(self, remembered: Iterable[str]) -> list[str]:
        """Earlier months that stand: up to the newest with a memory before the first that differs."""
        first = min(self.first_by_input.values(), default=None)
        good = [month for month in remembered if first is None or month < first]
        return [month for month in self.earlier if good and month <= max(good)]

    def record(self, kept: Sequence[str], months: Sequence[str]) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "first_changed_month": dict(self.first_by_input),
            "months_reused": list(kept),
            "months_computed": [month for month in months if month not in set(kept)],
        }


def read_previous(previous: Path | None, kind: str, **same: Any) -> dict[str, Any] | None:
    """The manifest of an earlier version in parts that can be continued: of this kind, and the `same` in what is named.

    None where there is none, or where it was made otherwise.
    """
    if previous is None or not manifest_path(previous).is_file():
        return None
    manifest = read_manifest(previous, kind)
    made_alike = "inputs" in manifest and all(manifest.get(name) == value for name, value in same.items())
    return dict(manifest) if made_alike and resolved(previous).is_dir() else None


def remembered_months(previous: Path, memory: str) -> list[str]:
    """Months after which an earlier version can be continued."""
    return sorted(file.stem for file in beside(previous, memory).glob("*.npz"))


def move_product(path: Path, to: Path) -> None:
    """Gives the product at `path`, with all that lies beside it, the name `to`; what was there is replaced."""
    old, new = resolved(path), resolved(to)
    manifest_path(new).unlink(missing_ok=True)
    # The manifest comes last: without it the others are no product.
    names = sorted((file.name for file in old.parent.glob(f"{old.name}*")), key=lambda name: name.endswith(".json"))
    for name in names:
        place = new.with_name(new.name + name.removeprefix(old.name))
        if place.is_dir():
            shutil.rmtree(place)
        old.with_name(name).replace(place)


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Arrays and texts by name as one file, written without pickling."""
    named: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
    np.savez(path, **named)


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as saved:
        return {name: saved[name] for name in saved.files}
