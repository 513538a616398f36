"""A dataset as dense arrays in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from atft_pipeline.batches.panel_storage import Allocate, in_memory
from atft_pipeline.config.slices import SLICES, Slice
from atft_pipeline.dataset.layout import ROW_KEYS, TARGETS, read_membership
from atft_pipeline.errors import InputError
from atft_pipeline.storage.artifact import read_manifest, readable, resolved

ROWS_PER_READ: int = 65_536
"""Rows of the dataset held beside the panel while it is filled: about 20 MB."""


@dataclass(frozen=True)
class Panel:
    """A dataset as dense arrays over all its sessions and the stocks that are in the universe at least once."""

    sessions: NDArray[np.datetime64]
    """[T] ascending."""
    codes: NDArray[np.str_]
    """[N] ascending."""
    feature_names: list[str]
    """[F] the live features; one without a value in the whole dataset would say nothing and cost as much."""
    features: NDArray[np.float32]
    """[T, N, F], NaN where missing or without a row."""
    targets: NDArray[np.float32]
    """[T, N, H] raw forward returns, NaN where missing."""
    member: NDArray[np.bool_]
    """[T, N] in the training universe at that session."""
    investable: NDArray[np.bool_]
    liquid: NDArray[np.bool_]
    manifest: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Of features and targets, all but a hundredth of it."""
        return self.features.nbytes + self.targets.nbytes


def load_panel(dataset: Path, universe: Slice, allocate: Allocate = in_memory) -> Panel:
    """The dataset at `dataset`, a parquet file or a folder of partitions, for the stocks of `universe`.

    It is read in batches, so the peak is the panel plus one batch. `allocate` decides where the cells lie.

    Raises InputError when a column is not where the manifest's registry has it, when the membership table has other
    rows than the features, when no feature is live, and when the universe is empty.
    """
    manifest = read_manifest(dataset, "ml_dataset")
    if not manifest["live_features"]:
        raise InputError(
            f"{dataset}: none of {len(manifest['features'])} features is live; give a longer price history"
        )
    if unknown := sorted(set(manifest["live_features"]) - set(manifest["features"])):
        raise InputError(f"{dataset}: its manifest calls {unknown[0]!r} live, which is no feature; build it again")
    names = [*manifest["live_features"], *TARGETS]
    membership = read_membership(dataset, [*ROW_KEYS, "is_investable", "is_liquid"])
    sessions, t = np.unique(membership["Date"].to_numpy().astype("datetime64[D]"), return_inverse=True)
    flags = {name: membership[name].to_numpy().astype(bool) for name in ("is_investable", "is_liquid")}
    in_universe = flags[SLICES[universe]]
    if not in_universe.any():
        raise InputError(
            f"{dataset}: no row of {len(in_universe)} is in the universe {universe!r}"
            f" ({SLICES[universe]}); give more history or set train.universe"
        )
    codes, column = _universe_codes(membership["Code"], in_universe)
    shape = (len(sessions), len(codes))
    row_to_cell = np.where(column >= 0, t * len(codes) + column, -1)

    cells_by_name = allocate((*shape, len(names)))
    cells_by_name.fill(np.nan)
    values = cells_by_name.reshape(-1, len(names))
    start = 0
    for rows in _read_rows(dataset, manifest, names, membership):
        cells = row_to_cell[start : start + len(rows)]
        values[cells[cells >= 0]] = rows[cells >= 0]
        start += len(rows)
    if start != membership.num_rows:
        raise InputError(f"{dataset}: {start} rows, its membership table has {membership.num_rows}; build it again")

    kept = row_to_cell >= 0
    dense = {name: np.zeros(shape, dtype=bool) for name in flags}
    for name, flag in flags.items():
        dense[name].reshape(-1)[row_to_cell[kept]] = flag[kept]
    return Panel(
        sessions=sessions,
        codes=codes,
        feature_names=manifest["live_features"],
        # Views of one array: a copy of the features would double the peak.
        features=cells_by_name[..., : -len(TARGETS)],
        targets=cells_by_name[..., -len(TARGETS) :],
        member=dense[SLICES[universe]],
        investable=dense["is_investable"],
        liquid=dense["is_liquid"],
        manifest=manifest,
    )


def _universe_codes(
    code: pa.ChunkedArray, in_universe: NDArray[np.bool_]
) -> tuple[NDArray[np.str_], NDArray[np.int64]]:
    """Codes in the universe at least once, ascending, and each row's position among them or -1."""
    encoded = code.combine_chunks().dictionary_encode()
    index = encoded.indices.to_numpy()
    distinct = np.array(encoded.dictionary.to_pylist(), dtype=np.str_)
    used = np.flatnonzero(np.bincount(index[in_universe], minlength=len(distinct)))
    used = used[np.argsort(distinct[used])]
    position = np.full(len(distinct), -1, dtype=np.int64)
    position[used] = np.arange(len(used))
    return distinct[used], position[index]


def _read_rows(
    dataset: Path, manifest: Mapping[str, Any], names: list[str], membership: pa.Table
) -> Iterator[NDArray[np.float32]]:
    """Columns `names` of the dataset in order `[rows, F + H]`, null as NaN; refuses other columns or other keys."""
    data = resolved(dataset)
    expected = [*ROW_KEYS, *manifest["features"], *TARGETS]
    start = 0
    for file in sorted(data.glob("*.parquet")) if data.is_dir() else [data]:
        with readable(file), pq.ParquetFile(file) as parquet:
            if parquet.schema_arrow.names != expected:
                raise InputError(_column_difference(file, expected, parquet.schema_arrow.names))
            for batch in parquet.iter_batches(batch_size=ROWS_PER_READ, columns=[*ROW_KEYS, *names]):
                keys = membership.select(list(ROW_KEYS)).slice(start, batch.num_rows)
                if not pa.Table.from_batches([batch]).select(list(ROW_KEYS)).cast(keys.schema).equals(keys):
                    raise InputError(f"{file}: its Date and Code are not the membership table's; build both again")
                start += batch.num_rows
                rows = np.empty((batch.num_rows, len(names)), dtype=np.float32)
                for j, name in enumerate(names):
                    column = batch.column(j + len(ROW_KEYS))
                    if not pa.types.is_floating(column.type):
                        raise InputError(f"{file}: column {name} is {column.type}, not a number; build it again")
                    rows[:, j] = column.to_numpy(zero_copy_only=False)
                if np.isinf(rows[:, -len(TARGETS) :]).any():
                    raise InputError(f"{file}: a target is infinite; build the dataset again")
                yield rows


def _column_difference(file: Path, expected: list[str], found: list[str]) -> str:
    place = next(
        (j for j, (want, have) in enumerate(zip(expected, found, strict=False)) if want != have),
        min(len(expected), len(found)),
    )
    want = repr(expected[place]) if place < len(expected) else "no further column"
    have = repr(found[place]) if place < len(found) else "no further column"
    return (
        f"{file}: expected the {len(expected)} columns of its manifest's registry, found {len(found)}: column"
        f" {place} is {have} instead of {want}; build the dataset again"
    )
