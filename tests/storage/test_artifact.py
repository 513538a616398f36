"""`ml_dataset` on disk: reading returns what was written, and a half-written dataset never looks complete."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atft_pipeline.dataset import layout
from atft_pipeline.errors import InputError
from atft_pipeline.storage import artifact


def _tables(days: list[dt.date], codes: list[str]) -> tuple[pa.Table, pa.Table, dict[str, Any]]:
    keys = [(day, code) for day in days for code in codes]
    date = pa.array([day for day, _ in keys], pa.date32())
    code = pa.array([code for _, code in keys])
    values = pa.array(np.arange(len(keys)) / 7.0, pa.float32())
    flag = pa.array([True] * len(keys))
    wide = pa.array(np.arange(len(keys)) / 3.0)
    features = pa.table({"Date": date, "Code": code, "alpha": values} | dict.fromkeys(layout.TARGETS, values))
    membership = pa.table(
        {"Date": date, "Code": code}
        | dict.fromkeys(("is_traded", "is_investable", "is_liquid"), flag)
        | dict.fromkeys(("return_1d", "Open", "Close"), wide)
        | dict.fromkeys(("Sector33Code", "MarketCode"), code)
    )
    return features, membership, {"kind": "ml_dataset", "features": ["alpha"]}


DAYS = [dt.date(2024, 1, 30), dt.date(2024, 1, 31), dt.date(2024, 2, 1)]


def test_written_dataset_reads_back_whole(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "out.parquet"
    features, membership, manifest = _tables(DAYS, ["1301", "1332"])
    layout.write_dataset(path, features, membership, manifest)
    assert artifact.read_artifact(path).equals(features)
    assert layout.read_membership(path).equals(membership)
    assert artifact.read_manifest(path, "ml_dataset") == manifest
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "out.parquet",
        "out.parquet.manifest.json",
        "out.parquet.membership.parquet",
    ]


def test_columns_come_in_the_order_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    layout.write_dataset(path, *_tables(DAYS, ["1301"]))
    assert artifact.read_artifact(path, ["target_5d", "Code"]).column_names == ["target_5d", "Code"]
    with pytest.raises(InputError, match="column nonsense is missing"):
        artifact.read_artifact(path, ["nonsense"])


def test_sidecars_of_a_link_are_those_of_its_target(tmp_path: Path) -> None:
    path, link = tmp_path / "ml_dataset_abc", tmp_path / "latest.parquet"
    layout.write_dataset(path, *_tables(DAYS, ["1301"]))
    link.symlink_to(path.name)
    assert artifact.manifest_path(link) == artifact.manifest_path(path)
    assert artifact.read_artifact(link).num_rows == 3


def test_refused_tables_leave_the_earlier_dataset_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    features, membership, manifest = _tables(DAYS, ["1301"])
    layout.write_dataset(path, features, membership, manifest)
    with pytest.raises(InputError, match=r"missing \['alpha'\]"):
        layout.write_dataset(path, features.drop_columns(["alpha"]), membership, manifest)
    with pytest.raises(InputError, match="differ"):
        layout.write_dataset(path, features, membership.slice(1), manifest)
    with pytest.raises(InputError, match="expected columns"):
        layout.write_dataset(path, features, membership.drop_columns(["Open"]), manifest)
    assert artifact.read_artifact(path).equals(features)
    assert artifact.read_manifest(path) == manifest


def test_a_failing_write_leaves_the_earlier_dataset_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.parquet"
    features, membership, manifest = _tables(DAYS, ["1301"])
    layout.write_dataset(path, features, membership, manifest)
    before = sorted(tmp_path.iterdir())

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(pq, "write_table", full_disk)
    with pytest.raises(OSError, match="No space"):
        layout.write_dataset(path, *_tables(DAYS[:1], ["9999"]))
    assert sorted(tmp_path.iterdir()) == before
    assert artifact.read_artifact(path).equals(features)


def test_manifest_problems_are_one_sentence_each(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    with pytest.raises(InputError, match="no manifest"):
        artifact.read_manifest(path)
    artifact.manifest_path(path).write_text("{")
    with pytest.raises(InputError, match="not a readable JSON manifest"):
        artifact.read_manifest(path)
    artifact.manifest_path(path).write_text("[]")
    with pytest.raises(InputError, match="expected a JSON object"):
        artifact.read_manifest(path)
    artifact.manifest_path(path).write_text(json.dumps({"kind": "stock_graph"}))
    with pytest.raises(InputError, match="expected kind 'ml_dataset'"):
        artifact.read_manifest(path, "ml_dataset")


def test_unreadable_data_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    with pytest.raises(InputError, match="build it first"):
        artifact.read_artifact(path)
    path.write_bytes(b"PAR1 truncated")
    with pytest.raises(InputError, match="not a readable parquet"):
        artifact.read_artifact(path)


def test_hash_ignores_key_order_and_nothing_else() -> None:
    assert artifact.sha256_of({"a": 1, "b": [1.5]}) == artifact.sha256_of({"b": [1.5], "a": 1})
    assert artifact.sha256_of({"a": 1}) != artifact.sha256_of({"a": 2})
