"""The life of a run: what decides its result, what a stop leaves behind, and what a restart repeats."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch
from training_runs import (
    Data,
    Stop,
    evals,
    hashes,
    header,
    poisoned,
    record,
    series,
    settings,
    stop_in_training_step,
    train_quietly,
    train_until,
    verdict,
)

from atft_pipeline.config.schema import (
    EvaluationConfig,
    GuardConfig,
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from atft_pipeline.errors import InputError, RunFailure
from atft_pipeline.evaluation.evaluate import EvaluationPanel, evaluate_panel
from atft_pipeline.runs.tables import read_table
from atft_pipeline.training import train
from atft_pipeline.training.judging.scoring import weights_hash
from atft_pipeline.training.trainer import Trainer

pytestmark = pytest.mark.slow(reason="trainings")

# What decides a run ---------------------------------------------------------------------------------------------


def test_same_seed_configuration_and_data_give_the_same_bits(data, trained, tmp_path):
    again = train_quietly(settings(), data, tmp_path / "again").run_dir
    assert record(again) == record(trained())


def test_another_seed_gives_other_weights_from_the_start(trained):
    first, second = header(trained()), header(trained({"train.seed": 2}))
    assert first["initial_weights_hash"] != second["initial_weights_hash"]
    assert first["initial_predictions_hash"] != second["initial_predictions_hash"]
    assert set(hashes(trained()).values()).isdisjoint(hashes(trained({"train.seed": 2})).values())


def test_weights_and_predictions_change_every_epoch(trained):
    for column in ("weights_hash", "predictions_hash"):
        seen = [header(trained())[f"initial_{column}"], *hashes(trained(), column).values()]
        assert len(set(seen)) == 4


# field: (overrides of both runs, changed value, what must differ)
PLATEAU = {"train.schedule.name": "plateau", "train.optimizer.lr": 0.0, "train.schedule.patience": 0}
LOW = {"train.guard.dispersion_ratio": 100.0, "train.guard.patience": 2}  # every prediction counts as collapsed
ONE = {"train.epochs": 1}
FIELDS = {
    TrainConfig: {
        "epochs": ({}, 2, "epochs"),
        "seed": (ONE, 2, "weights"),
        "batch_size": (ONE, 40 * 10, "steps"),
        "universe": (ONE, "liquid", "scored"),
        "precision": (ONE, "bf16-mixed", "weights"),
        "weight_ema": (ONE, 0.0, "weights"),
        "panel": (ONE, "map", "panel_place"),  # and nothing else: test_a_run_from_a_map_leaves_the_record_of_...
        "loader_workers": ({}, 2, None),  # speed only: test_blocks_are_made_ahead_in_other_threads
        "optimizer": None,
        "schedule": None,
        "loss": None,
        "guard": None,
    },
    OptimizerConfig: {
        "lr": (ONE, 3e-3, "weights"),
        "weight_decay": (ONE, 0.5, "weights"),
        "clip_norm": (ONE, 0.01, "weights"),
    },
    ScheduleConfig: {
        "name": (ONE, "constant", "weights"),
        "warmup_fraction": (ONE, 0.5, "weights"),
        "min_lr_ratio": (ONE, 0.5, "weights"),
        "patience": (PLATEAU, 5, "schedule"),
        "factor": (PLATEAU, 0.1, "schedule"),
    },
    LossConfig: {
        "mse": (ONE, 0.5, "weights"),
        "ic": (ONE, 0.5, "weights"),
        "rank_ic": (ONE, 0.5, "weights"),
        "sharpe": (ONE, 0.5, "weights"),
        "variance_penalty": (ONE, 0.5, "weights"),
        "horizon_weights": (ONE, [1.0, 0.0, 0.0, 0.0], "weights"),
        "phases": (ONE, [{"first_epoch": 1, "last_epoch": 1, "weights": {"ic": 1.0}}], "weights"),
    },
    GuardConfig: {
        "dispersion_ratio": ({}, 100.0, "events"),
        "patience": (LOW, 1, "resets"),
        "warmup_epochs": (LOW, 0, "events"),
    },
    EvaluationConfig: {
        "cost_bps": (ONE, 50.0, "sharpe_daily_net"),
        "quantile": (ONE, 0.4, "sharpe_daily"),
        "universe": ({}, "all", "criterion"),
        "criterion_sharpe": ({"evaluation.criterion_sharpe": -9.0}, 9.0, "status"),
        "criterion_epoch": ({}, 1, "criterion"),
        "bootstrap_samples": ({}, 10, None),  # training draws none: test_bootstrap_samples_decide_the_interval
    },
}
SECTIONS = {
    TrainConfig: "train",
    OptimizerConfig: "train.optimizer",
    ScheduleConfig: "train.schedule",
    LossConfig: "train.loss",
    GuardConfig: "train.guard",
    EvaluationConfig: "evaluation",
}
CASES = [
    pytest.param(f"{SECTIONS[section]}.{name}", *case, id=f"{SECTIONS[section]}.{name}")
    for section, cases in FIELDS.items()
    for name, case in cases.items()
    if case is not None and case[2] is not None
]


@pytest.mark.parametrize("section", FIELDS, ids=lambda s: s.__name__)
def test_every_field_has_a_case(section):
    assert set(FIELDS[section]) == {field.name for field in dataclasses.fields(section)}


def figures(run_dir: Path) -> dict[str, object]:
    rows = read_table(run_dir, "series").to_pylist()
    return {
        "weights": hashes(run_dir)[max(hashes(run_dir))],
        "epochs": header(run_dir)["epochs_done"],
        "steps": max(row["step"] for row in rows if row["step"] is not None),
        "scored": header(run_dir)["initial_predictions_hash"],
        "panel_place": header(run_dir)["panel_place"],
        "schedule": torch.load(run_dir / "checkpoints" / "resume.pt")["schedule"]["plateau_factor"],
        "events": sum(series(run_dir, "degeneracy_event").values()),
        "resets": sum(series(run_dir, "degeneracy_reset").values()),
        "status": verdict(run_dir)["status"],
        "criterion": verdict(run_dir)["criterion"]["value"],
    } | {name: evals(run_dir, name)[1] for name in ("sharpe_daily", "sharpe_daily_net")}


@pytest.mark.parametrize(("field", "base", "value", "what"), CASES)
def test_every_field_of_a_run_has_an_effect(field, base, value, what, data, trained, tmp_path, monkeypatch):
    if field == "train.loss.variance_penalty":
        monkeypatch.setattr(
            "atft_pipeline.training.losses.DISPERSION_FLOOR", 9.0
        )  # else it only acts on near-constant scores
    changed = train_quietly(settings(base | {field: value}), data, tmp_path / "changed").run_dir
    assert figures(changed)[what] != figures(trained(base))[what]


def test_loss_phases_act_in_their_epochs_only(data, trained, tmp_path):
    phases = [{"first_epoch": 2, "last_epoch": 3, "weights": {"ic": 1.0}}]
    config = settings({"train.loss.phases": phases})
    changed = train_quietly(config, data, tmp_path / "changed").run_dir
    assert hashes(changed)[1] == hashes(trained())[1]
    assert hashes(changed)[2] != hashes(trained())[2]
    assert series(changed, "loss_weight", term="ic") == {1: 0.0, 2: 1.0, 3: 1.0}


def test_bootstrap_samples_decide_the_interval():
    generator = np.random.default_rng(0)
    scores, targets = generator.normal(size=(2, 30, 10))
    sessions = np.arange("2024-01-01", "2024-01-31", dtype="datetime64[D]")
    panel = EvaluationPanel(sessions, [f"{i:04d}" for i in range(10)], targets, days_per_year=245)
    low = [
        evaluate_panel(scores, panel, EvaluationConfig(bootstrap_samples=samples), bootstrap=True).value(
            "sharpe_ci_low"
        )
        for samples in (10, 200)
    ]
    assert low[0] != low[1]


# Restart --------------------------------------------------------------------------------------------------------


class Cancelled(BaseException):
    """Stands for the interrupt that Dagster raises, which is not Python's own."""


def stop_before_checkpoint(monkeypatch, error):
    """After epoch 2's tables are written, before the checkpoint that closes it."""
    save = Trainer._save

    def stopping(self, epoch):
        if epoch == 2:
            raise error
        save(self, epoch)

    monkeypatch.setattr(Trainer, "_save", stopping)


def stop_before_verdict(monkeypatch, error):
    def stopping(_):
        raise error

    monkeypatch.setattr(train, "write_verdict", stopping)


@pytest.mark.parametrize(
    ("stop", "error", "done"),
    [
        (stop_in_training_step, KeyboardInterrupt(), 1),
        (stop_in_training_step, Stop("power"), 1),
        (stop_before_checkpoint, Stop("power"), 1),
        (stop_before_verdict, KeyboardInterrupt(), 3),
        (stop_in_training_step, Cancelled(), 1),
    ],
    ids=["interrupt in a step", "error in a step", "before a checkpoint", "before the verdict", "cancelled in a step"],
)
def test_a_stopped_run_goes_on_to_the_same_end(stop, error, done, data, trained, tmp_path):
    train_until(stop, error, settings(), data, tmp_path / "run")
    stopped = header(tmp_path / "run")
    interrupted = not isinstance(error, Exception)
    assert (stopped["status"], stopped["epochs_done"]) == ("interrupted" if interrupted else "failed", done)
    assert stopped["reason"] == (
        f"interrupted; epoch {done} of 3 is kept, start it again to go on" if interrupted else "Stop: power"
    )
    assert stopped["ended"] is not None

    outcome = train_quietly(settings(), data, tmp_path / "run")
    assert not outcome.reused
    resumed = header(tmp_path / "run")
    assert (resumed["status"], resumed["reason"], resumed["resumed_after_epoch"]) == ("finished", None, done)
    assert resumed["started"] == stopped["started"]
    assert resumed["earlier_ends"] == [{name: stopped[name] for name in ("status", "reason", "ended", "epochs_done")}]
    assert no_crash(outcome.run_dir) is interrupted, "an interrupt is no crash"
    assert no_crash(trained()) is True
    assert record(outcome.run_dir) == record(trained())


def no_crash(run_dir: Path) -> bool | None:
    """The verdict's milestone, which the record of earlier ends decides."""
    (milestone,) = (item for item in verdict(run_dir)["milestones"] if item["name"] == "no_crash")
    return milestone["passed"]


def newest_epoch(run_dir: Path, table: str) -> int:
    return duckdb.sql(f"SELECT max(epoch) FROM read_parquet('{run_dir}/{table}/*.parquet')").fetchall()[0][0]


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from training_runs import Data, settings, train_quietly
saved = []
def torn(path, content):
    saved.append(path.name)
    if saved.count("resume.pt") == 2:
        path.open("wb", buffering=0).write(content[:len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    path.open("wb").write(content)
Path.write_bytes = torn
train_quietly(settings(), Data(Path({dataset!r}), Path({graph!r})), Path({run!r}))
"""


@pytest.mark.parametrize(
    "name", ["run.json", "verdict.json", "inputs.parquet", "series/epoch_001.parquet", "checkpoints/resume.pt"]
)
def test_what_a_killed_writer_left_is_removed(name: str, tmp_path: Path) -> None:
    """Of the training's own files: a report may be written beside it."""
    left, report = (tmp_path / path for path in (name, "report.md"))
    left, report = (path.with_name(f".{path.name}.abcdefgh") for path in (left, report))
    for scratch in (left, report):
        scratch.mkdir(parents=True)
        (scratch / "half").write_bytes(b"half")
    train._remove_remnants(tmp_path)
    assert (left.exists(), report.exists()) == (False, True)


@pytest.mark.process(reason="a training that is killed while it writes")
def test_a_run_killed_while_it_writes_loses_one_epoch_and_nothing_else(data, trained, tmp_path):
    run_dir = tmp_path / "run"
    tests = str(Path(__file__).parents[1])
    script = KILLED.format(tests=tests, dataset=str(data.dataset), graph=str(data.graph), run=str(run_dir))
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    assert (header(run_dir)["status"], header(run_dir)["epochs_done"]) == ("running", 1)
    assert list((run_dir / "checkpoints").glob(".resume.pt.*/resume.pt")), "no torn file: the test tests nothing"
    assert newest_epoch(run_dir, "evals") == 2

    said = []
    train_quietly(settings(), data, run_dir, log=said.append)
    assert said[0] == "run run: goes on after epoch 1"
    assert [end["status"] for end in header(run_dir)["earlier_ends"]] == ["killed"]
    assert no_crash(run_dir) is False
    assert record(run_dir) == record(trained())


def test_a_restart_refuses_the_checkpoint_of_another_run(data, trained, tmp_path):
    train_until(stop_in_training_step, Stop(), settings(), data, tmp_path / "run")
    foreign = trained({"train.seed": 2}) / "checkpoints" / "resume.pt"
    (tmp_path / "run" / "checkpoints" / "resume.pt").write_bytes(foreign.read_bytes())
    ours, theirs = header(tmp_path / "run")["key"], header(trained({"train.seed": 2}))["key"]
    with pytest.raises(InputError, match=f"run_key is '{theirs}', expected '{ours}'"):
        train_quietly(settings(), data, tmp_path / "run")
    assert header(tmp_path / "run")["status"] == "failed", "not a run that says it is running"


def test_duckdb_reads_every_complete_epoch_while_the_run_goes_on(data, tmp_path):
    run_dir = tmp_path / "run"
    seen = []

    def read(line: str) -> None:
        if line.startswith("epoch "):
            seen.append([newest_epoch(run_dir, name) for name in ("series", "evals", "daily")])

    train_quietly(settings(), data, run_dir, log=read)
    assert seen == [[1, 1, 1], [2, 2, 2], [3, 3, 3]]


# Reuse ----------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_reused_and_says_so(data, tmp_path):
    first = train_quietly(settings({"train.epochs": 1}), data, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in first.run_dir.rglob("*") if path.name != ".lock"}
    said = []
    second = train_quietly(settings({"train.epochs": 1}), data, tmp_path / "run", log=said.append)
    assert (first.reused, second.reused) == (False, True)
    assert second.verdict == first.verdict
    assert len(said) == 1
    assert "reused" in said[0]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_force_makes_an_attempt_beside_the_finished_run(data, tmp_path):
    config = settings({"train.epochs": 1})
    first = train_quietly(config, data, tmp_path / "run")
    train_until(stop_before_verdict, Stop(), config, data, tmp_path / "run", force=True)
    second = train_quietly(config, data, tmp_path / "run", force=True)
    third = train_quietly(config, data, tmp_path / "run", force=True)
    assert [o.run_dir.name for o in (first, second, third)] == ["run", "run-attempt2", "run-attempt3"]
    assert not second.reused
    assert record(third.run_dir) == record(second.run_dir) == record(first.run_dir)


def test_a_lost_verdict_is_judged_again_from_the_record(data, tmp_path):
    config = settings({"train.epochs": 1})
    first = train_quietly(config, data, tmp_path / "run")
    (first.run_dir / "verdict.json").unlink()
    assert train_quietly(config, data, tmp_path / "run").verdict == first.verdict


# Failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "poison"),
    [
        ("loss", lambda total, _: total * torch.nan),
        ("loss", lambda total, _: total + torch.inf),
        ("gradient", lambda total, scores: total + (0.0 * scores.sum()).sqrt()),  # finite, with slope 0 * inf
    ],
    ids=["nan", "inf", "gradient"],
)
def test_a_step_that_is_not_finite_stops_the_run_before_its_update(what, poison, data, trained, tmp_path):
    run_dir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        weights = poisoned(patch, poison)
        with pytest.raises(RunFailure, match=f"epoch 2, step .*: the {what} is .*; stopped before the update"):
            train_quietly(settings(), data, run_dir)
    assert weights_hash(weights["trainer"].model) == weights["before"]
    failed = header(run_dir)
    assert (failed["status"], failed["epochs_done"]) == ("failed", 1)
    assert failed["reason"].startswith(f"RunFailure: epoch 2, step {weights['trainer'].step}: the {what}")

    rows = [row for row in read_table(run_dir, "series").to_pylist() if row["epoch"] == 2]
    (recorded,) = [row for row in rows if row["metric"] == "non_finite"]
    assert (recorded["component"], recorded["step"]) == (what, weights["trainer"].step)
    assert not np.isfinite(recorded["value"])
    assert len([row for row in rows if row["metric"] == "loss"]) == 2, "the steps on the way there are kept"

    train_quietly(settings(), data, run_dir)
    assert record(run_dir) == record(trained())


def test_a_finite_run_records_no_failure(trained):
    assert series(trained(), "non_finite") == {}
    assert all(np.isfinite(row["value"]) for row in read_table(trained(), "series").to_pylist())


def test_a_graph_of_another_dataset_is_refused(data, tmp_path):
    manifest = data.graph.with_name("graph.parquet.manifest.json").read_text()
    (tmp_path / "graph.parquet").write_bytes(data.graph.read_bytes())
    (tmp_path / "graph.parquet.manifest.json").write_text(
        manifest.replace('"dataset_fingerprint": "', '"dataset_fingerprint": "0')
    )
    with pytest.raises(InputError, match="build the graph again"):
        train_quietly(settings(), Data(data.dataset, tmp_path / "graph.parquet"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["gpu", "tpu:0", "cuda:x", "meta", ""])
def test_an_unknown_device_is_refused_and_leaves_nothing(name, data, tmp_path):
    with pytest.raises(InputError, match="device: expected auto, cpu or cuda"):
        train_quietly(settings(), data, tmp_path / "run", device=name)
    assert not (tmp_path / "run").exists()


def test_a_cuda_device_that_is_not_there_is_refused(data, tmp_path):
    with pytest.raises(InputError, match="CUDA devices; use cpu"):
        train_quietly(settings(), data, tmp_path / "run", device="cuda:99")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"split.train_fraction": 0.17}, "no stock is in the universe 'all' in the .* training sessions"),
        ({"split.scheme": "sessions"}, "sessions"),
        (
            {"split.scheme": "sessions", "split.validation_sessions": 50, "split.test_sessions": 2},
            "fewer than two of the 2 test sessions",
        ),
        ({"train.universe": "liquid", "evaluation.universe": "all"}, "never scores"),
    ],
    ids=["no member in training", "too few sessions", "no target in test", "slice not scored"],
)
def test_what_cannot_be_trained_or_judged_is_refused_in_one_sentence(overrides, message, data, tmp_path):
    with pytest.raises(InputError, match=message) as refusal:
        train_quietly(settings(overrides), data, tmp_path / "run")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run" / "checkpoints").exists()
