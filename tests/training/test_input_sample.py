"""`inputs.parquet`: every row equals the moments of a block's cells, computed one by one."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Trained
from training_runs import Data, settings, split_sessions, train_quietly

from atft_pipeline.batches.block import Block
from atft_pipeline.batches.block_dataset import BlockDataset
from atft_pipeline.batches.panel import load_panel
from atft_pipeline.config.schema import HORIZONS
from atft_pipeline.dataset.splits import Split
from atft_pipeline.runs.header import read_run
from atft_pipeline.training import trainer as training
from atft_pipeline.training.judging import scoring
from atft_pipeline.training.telemetry.input_sample import (
    SAMPLED_SESSIONS,
    SCHEMA,
    InputSample,
    correlations,
    moments,
    sampled,
)
from bench.training.recording import RECORDING


def test_rows_equal_moments_computed_by_hand_from_the_block(data: Data, tmp_path: Path) -> None:
    panel = load_panel(data.dataset, "all")
    blocks = BlockDataset(panel, None, 5)
    session = 250
    one = np.array([session])
    seen = InputSample(panel, Split(np.arange(247, 252), one, one, purge_sessions=0))
    seen.start()
    seen.observe("train", blocks.block(np.arange(247, 252)))
    seen.write(tmp_path / "inputs.parquet")
    table = pq.read_table(tmp_path / "inputs.parquet")
    assert table.schema.equals(SCHEMA)
    day = panel.sessions[session].item()
    rows = {row["name"]: row for row in table.to_pylist() if row["date"] == day}
    assert list(rows) == [*panel.feature_names, *(f"target_{h}d" for h in HORIZONS)]

    block = blocks.block(one)
    stocks = [n for n in range(block.x.shape[0]) if block.member[n, 0]]
    target = {n: float(block.target[n, 0, 0]) for n in stocks}
    for place, name in enumerate(panel.feature_names):
        there = [n for n in stocks if not block.missing[n, -1, place]]
        values = [float(block.x[n, -1, place]) for n in there]
        row = rows[name]
        assert (row["stocks"], row["present"]) == (len(stocks), len(values))
        assert row["split"] == "train"
        if not values:
            assert row["mean"] is None
            continue
        assert row["mean"] == pytest.approx(statistics.fmean(values), abs=1e-12)
        assert row["std"] == pytest.approx(statistics.pstdev(values), abs=1e-12)
        pairs = [(v, target[n]) for v, n in zip(values, there, strict=True) if math.isfinite(target[n])]
        if row["ic"] is not None:
            assert row["ic"] == pytest.approx(statistics.correlation(*zip(*pairs, strict=True)), abs=1e-9)
    assert sum(rows[name]["ic"] is not None for name in panel.feature_names) > len(panel.feature_names) / 2
    assert rows["target_1d"]["ic"] == pytest.approx(1.0)


def test_sessions_outside_the_split_are_taken_up_to_a_number(data: Data, tmp_path: Path) -> None:
    panel = load_panel(data.dataset, "all")
    blocks = BlockDataset(panel, None, 5)
    seen = InputSample(panel, Split(np.arange(200, 204), np.arange(220, 224), np.arange(230, 234), purge_sessions=0))
    seen.start()
    for _ in range(2):
        seen.observe("train", blocks.block(np.arange(202, 206)))
    seen.observe("train", blocks.block(np.arange(240, 280)))
    seen.write(tmp_path / "inputs.parquet")
    rows = pq.read_table(tmp_path / "inputs.parquet").to_pylist()
    days = [row["date"] for row in rows if row["name"] == "target_1d"]
    of_the_split, foreign = [202, 203], [204, 205, 204, 205, *range(240, 240 + SAMPLED_SESSIONS - 4)]
    assert days == [panel.sessions[session].item() for session in (*of_the_split, *foreign)]


def test_every_split_of_a_run_is_sampled_from_its_first_to_its_last_session(trained: Trained) -> None:
    run_dir = trained()
    rows = pq.read_table(run_dir / "inputs.parquet").to_pylist()
    panel = load_panel(Path(read_run(run_dir)["dataset_path"]), "all")
    first_with_members = panel.sessions[panel.member.any(axis=1)][0].item()
    for name, sessions in split_sessions(run_dir)._asdict().items():
        dates = sorted({row["date"] for row in rows if row["split"] == name})
        assert len(dates) == SAMPLED_SESSIONS
        first = max(sessions[0].item(), first_with_members)
        assert (dates[0], dates[-1]) == (first, sessions[-1].item())


def test_nothing_is_taken_before_the_start_or_after_the_file_is_written(data: Data, tmp_path: Path) -> None:
    panel = load_panel(data.dataset, "all")
    blocks, path = BlockDataset(panel, None, 5), tmp_path / "inputs.parquet"
    sample = InputSample(panel, Split(np.arange(200, 204), np.arange(220, 224), np.arange(230, 234), purge_sessions=0))
    sample.observe("train", blocks.block(np.arange(200, 202)))
    sample.write(path)
    assert not path.exists()
    sample.start()
    sample.observe("train", blocks.block(np.arange(202, 204)))
    sample.write(path)
    written = path.read_bytes()
    sample.observe("train", blocks.block(np.arange(200, 202)))
    sample.write(path)
    assert path.read_bytes() == written
    days = {row["date"] for row in pq.read_table(path).to_pylist()}
    assert days == {panel.sessions[session].item() for session in (202, 203)}


@pytest.mark.parametrize("split", ["train", "validation"])
def test_what_is_recorded_is_what_the_model_gets(
    split: str, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change on the way from the loader to the model, behind everything that makes blocks, stands in the record."""
    original = training.to_device if split == "train" else scoring.to_device

    def shifted(block: Block, device: torch.device) -> Block:
        return replace(original(block, device), x=block.x + 3.0)

    monkeypatch.setattr(training if split == "train" else scoring, "to_device", shifted)
    run_dir = train_quietly(settings({"train.epochs": 1}), data, tmp_path / "run").run_dir
    means = {
        name: [row["mean"] for row in pq.read_table(run_dir / "inputs.parquet").to_pylist() if _is_input(row, name)]
        for name in ("train", "validation", "test")
    }
    moved = {name for name, values in means.items() if np.median(values) > 2.0}
    assert moved == ({"train"} if split == "train" else {"validation", "test"})


def _is_input(row: dict[str, Any], split: str) -> bool:
    return row["split"] == split and row["mean"] is not None and not row["name"].startswith("target_")


@pytest.mark.parametrize("count", [1, 2, SAMPLED_SESSIONS, 100])
def test_sample_has_no_session_twice_and_both_ends(count: int) -> None:
    sessions = np.arange(count) + 7
    chosen = sampled(sessions)
    assert len(chosen) == len(set(chosen.tolist())) == min(count, SAMPLED_SESSIONS)
    assert (chosen[0], chosen[-1]) == (sessions[0], sessions[-1])


def test_moments_are_over_what_is_there() -> None:
    nan = np.nan
    mean, std, count = moments(np.array([[1.0, nan, 5.0], [nan, nan, 5.0], [3.0, nan, 5.0]]))
    np.testing.assert_array_equal(mean, [2.0, nan, 5.0])
    np.testing.assert_array_equal(std, [1.0, nan, 0.0])
    np.testing.assert_array_equal(count, [2, 0, 3])


def test_correlation_of_what_does_not_vary_is_none() -> None:
    target = np.array([1.0, 2.0, 4.0, np.nan])
    columns = np.array([2.0 * target, np.ones(4), [1.0, 2.0, np.nan, 3.0], -target]).T  # the third has two pairs
    np.testing.assert_allclose(correlations(columns, target), [1.0, np.nan, np.nan, -1.0])
    assert np.isnan(correlations(columns, np.ones(4))).all()
    assert np.isnan(correlations(columns[:0], target[:0])).all()


def test_what_recording_costs_is_measured_on_parts_that_exist() -> None:
    assert all(callable(getattr(owner, name)) for owner, name in RECORDING)
    assert {(InputSample, "observe"), (InputSample, "write")} <= set(RECORDING)
