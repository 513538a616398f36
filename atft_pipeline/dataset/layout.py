"""`ml_dataset` on disk: 82 features and targets, its membership table and its manifest, written whole or not at all.

Beside the dataset at `PATH` lie `PATH.membership.parquet` or `PATH.membership/`: same partitions, rows and order. A
dataset by month is written by store.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from atft_pipeline.config.schema import HORIZONS
from atft_pipeline.errors import InputError
from atft_pipeline.storage.artifact import (
    Period,
    read_artifact,
    replacing_artifact,
    resolved,
    write_manifest,
    write_partition,
)
from atft_pipeline.storage.atomic import replacing

ROW_KEYS: tuple[str, ...] = ("Date", "Code")
TARGETS: tuple[str, ...] = tuple(f"target_{h}d" for h in HORIZONS)
MEMBERSHIP_COLUMNS: tuple[str, ...] = (
    *ROW_KEYS,
    "is_traded",
    "is_investable",
    "is_liquid",
    "return_1d",
    "Open",
    "Close",
    "Sector33Code",
    "MarketCode",
)


def membership_path(path: Path) -> Path:
    """Where the membership table of the dataset at `path` lies: beside a file a file, beside a folder a folder."""
    data = resolved(path)
    return data.with_name(f"{data.name}.membership" if data.is_dir() else f"{data.name}.membership.parquet")


def read_membership(path: Path, columns: Sequence[str] | None = None, period: Period | None = None) -> pa.Table:
    """The membership table of the dataset at `path`: same rows, same order as its features."""
    return read_artifact(membership_path(path), columns, period)


def write_dataset(path: Path, features: pa.Table, membership: pa.Table, manifest: dict[str, Any]) -> None:
    """Writes features, membership and manifest as one file each under temporary names beside `path`, then renames.

    features: `Date`, `Code`, the manifest's features float32 and the targets float32, sorted by Date, Code.
    membership: `MEMBERSHIP_COLUMNS`, same rows, same order. An earlier dataset at `path` is replaced only once
    everything new is written. A dataset by month is written by store.py.

    Raises: InputError when the two tables differ in their keys, or the columns are not the manifest's.
    """
    _require_consistent(features, membership, manifest)
    data = resolved(path)
    members = data.with_name(f"{data.name}.membership.parquet")
    # The data is entered last and so replaced first: with it goes the manifest.
    with replacing(members) as temporary, replacing_artifact(data) as rows:
        write_partition(rows, features)
        write_partition(temporary, membership)
    write_manifest(data, manifest)


def _require_consistent(features: pa.Table, membership: pa.Table, manifest: dict[str, Any]) -> None:
    expected = [*ROW_KEYS, *manifest["features"], *TARGETS]
    if features.column_names != expected:
        missing = sorted(set(expected) - set(features.column_names))
        raise InputError(
            f"ml_dataset: expected {len(expected)} columns in the registry's order, found {features.num_columns};"
            f" missing {missing or 'none'}"
        )
    if membership.column_names != list(MEMBERSHIP_COLUMNS):
        raise InputError(f"membership: expected columns {list(MEMBERSHIP_COLUMNS)}, found {membership.column_names}")
    if any(not features[key].equals(membership[key]) for key in ROW_KEYS):
        raise InputError("membership: its Date and Code differ from those of the features; build both from one panel")
