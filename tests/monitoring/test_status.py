"""`atft status`: one snapshot per run, read from the run's record."""

from __future__ import annotations

import json
import math

import pytest

from atft_pipeline.errors import InputError
from atft_pipeline.monitoring.progress import run_snapshot, run_snapshots
from atft_pipeline.runs.lock import exclusive
from atft_pipeline.runs.record import RunRecord


def started_run(path, epochs=5, status="running", started="2024-01-01", validation_s=True):
    """Two epochs done of five: 10 and 20 s of training, 1 and 3 s of validation."""
    path.mkdir()
    record = RunRecord(path, {"key": "k", "status": status, "reason": None, "started": started})
    for epoch, (training, validation) in enumerate([(10.0, 1.0), (20.0, 3.0)], start=1):
        record.log("epoch_s", training, epoch=epoch)
        if validation_s:
            record.log("validation_s", validation, epoch=epoch, split="validation")
        record.log("loss_weighted", 1.0 / epoch, epoch=epoch, component="loss", term="total")
        record.log("loss_weighted", 2.0 / epoch, epoch=epoch, split="validation", component="loss", term="total")
        record.log("grad_norm", 0.1 * epoch, epoch=epoch, component="total", term="before_clip")
        record.close_epoch(epoch)
    record.update(epochs_planned=epochs, epochs_done=2)
    return path


def test_a_running_run_shows_its_newest_epoch_and_the_time_left(tmp_path):
    run = started_run(tmp_path / "run")
    with exclusive(run):
        snapshot = run_snapshot(run)
    assert (snapshot["state"], snapshot["epoch"], snapshot["epochs"]) == ("running", 2, 5)
    assert snapshot["eta_s"] == 3 * (11 + 23) / 2
    assert (snapshot["train_loss"], snapshot["validation_loss"], snapshot["grad_norm"]) == (0.5, 1.0, 0.2)
    assert (snapshot["lr"], snapshot["gpu_memory_bytes"]) == (None, None), "not measured is not zero"


def test_the_time_left_needs_no_more_than_training_times(tmp_path):
    run = started_run(tmp_path / "run", validation_s=False)
    with exclusive(run):
        assert run_snapshot(run)["eta_s"] == 3 * 15.0


def test_a_run_that_says_running_and_is_held_by_no_process_was_killed(tmp_path):
    snapshot = run_snapshot(started_run(tmp_path / "run"))
    assert (snapshot["state"], snapshot["eta_s"]) == ("killed", None)


@pytest.mark.parametrize("status", ["finished", "failed"])
def test_an_ended_run_has_its_own_state_and_no_time_left(status, tmp_path):
    snapshot = run_snapshot(started_run(tmp_path / "run", status=status))
    assert (snapshot["state"], snapshot["eta_s"]) == (status, None)


def test_a_run_before_its_first_epoch_has_no_figures_yet(tmp_path):
    record = RunRecord(tmp_path, {"key": "k", "status": "running", "epochs_planned": 5, "epochs_done": 0})
    with exclusive(tmp_path):
        record.update()
        snapshot = run_snapshot(tmp_path)
    assert (snapshot["state"], snapshot["eta_s"], snapshot["train_loss"]) == ("running", None, None)


def test_runs_come_newest_start_first_and_damaged_ones_say_why(tmp_path):
    started_run(tmp_path / "older", started="2024-01-01")
    started_run(tmp_path / "newer", started="2024-02-01")
    damaged = started_run(tmp_path / "damaged", started="2024-03-01")
    (damaged / "series" / "epoch_001.parquet").write_bytes(b"half")
    (tmp_path / "not a run").mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "run.json").write_text('{"key": ')
    rows = run_snapshots(tmp_path)
    assert [row["run"] for row in rows][:2] == ["newer", "older"]
    assert {row["run"]: row["state"] for row in rows[2:]} == {"damaged": "unreadable", "broken": "unreadable"}
    assert all(row["reason"] for row in rows[2:])
    json.dumps(rows, allow_nan=False)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder of runs"):
        run_snapshots(tmp_path / "nowhere")
    assert run_snapshots(tmp_path) == []


def test_a_loss_that_is_not_finite_is_no_json_number(tmp_path):
    run = started_run(tmp_path / "run", status="failed")
    record = RunRecord(run, {})
    record.log("loss_weighted", math.nan, epoch=3, component="loss", term="total")
    record.close_epoch(3)
    json.dumps(run_snapshot(run), allow_nan=False)


def test_a_finished_run_of_the_engine(trained):
    (row,) = run_snapshots(trained().parent)
    assert (row["state"], row["epoch"], row["epochs"], row["eta_s"]) == ("finished", 3, 3, None)
    measured = ("train_loss", "validation_loss", "grad_norm", "lr", "samples_per_s")
    assert all(math.isfinite(row[name]) for name in measured)
