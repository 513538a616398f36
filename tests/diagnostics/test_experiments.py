"""Experiments A to D: compared with the run they explain, added to its report, refused where that is impossible."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from atft_process import atft_here
from run_directories import Tables, healthy
from training_runs import header

from atft_pipeline.diagnostics.conclude import plan_experiment
from atft_pipeline.diagnostics.experiments.plan import EXPERIMENTS
from atft_pipeline.errors import InputError
from atft_pipeline.inspection.paired import (
    EXPERIMENT_IDS,
    Difference,
    compare_runs,
    experiment_rows,
    read_experiment_results,
    write_experiment_result,
)
from atft_pipeline.runs.tables import read_table

Trained = Callable[..., Path]


def daily_of(run_dir: Path, name: str, epoch: int) -> np.ndarray:
    rows = read_table(run_dir, "daily").to_pylist()
    found = [r for r in rows if (r["epoch"], r["split"], r["slice"]) == (epoch, "validation", "liquid")]
    return np.array([np.nan if r[name] is None else r[name] for r in sorted(found, key=lambda r: r["date"])])


def pair(tmp_path: Path, spoil: Callable[[Tables], None] = lambda _: None) -> tuple[Path, Path]:
    """A run that learns little and one that learns more; `spoil` changes the second."""
    better = healthy(0.8)
    better.run |= {"name": "experiment_b-k2", "key": "k2"}
    spoil(better)
    return healthy(0.1).write(tmp_path / "run"), better.write(tmp_path / "other")


# Comparison: reference -------------------------------------------------------------------------------------------


def test_a_comparison_is_the_mean_of_the_daily_differences_at_the_last_common_epoch(tmp_path: Path) -> None:
    def shorter(tables: Tables) -> None:
        tables.daily = [row for row in tables.daily if row["epoch"] <= 15]

    run, other = pair(tmp_path, shorter)
    result = compare_runs(run, other)
    assert (result.epoch, result.slice, result.sessions) == (15, "liquid", 80)
    for name, found in (("ic", result.ic), ("gross", result.gross)):
        expected = daily_of(other, name, 15) - daily_of(run, name, 15)
        assert found.difference == pytest.approx(expected.mean())
        assert found.se == pytest.approx(expected.std(ddof=1) / np.sqrt(80))
        assert found.ci_low is not None
        assert found.ci_high is not None
        assert found.ci_low < found.difference < found.ci_high
        assert found.sessions == 80
    gross = daily_of(other, "gross", 15)
    assert result.experiment_sharpe == pytest.approx(gross.mean() / gross.std(ddof=1))
    assert (result.ic.reading, result.gross.reading) == ("better", "better")
    assert compare_runs(other, run).ic.reading == "worse"


def test_a_run_against_itself_differs_by_nothing(tmp_path: Path) -> None:
    run, _ = pair(tmp_path)
    result = compare_runs(run, run)
    assert (result.ic.difference, result.ic.reading, result.changed) == (0.0, "within chance", {})


def test_what_differs_in_configuration_and_code_is_said(tmp_path: Path) -> None:
    def changed(tables: Tables) -> None:
        tables.run["config"]["train"]["loss"]["sharpe"] = 0.3
        tables.run["config"]["train"]["panel"] = "map"
        tables.run["code_revision"] = "other"

    result = compare_runs(*pair(tmp_path, changed))
    assert {name: after for name, (_, after) in result.changed.items()} == {"train.loss.sharpe": 0.3}
    assert not result.same_code


@pytest.mark.parametrize(
    ("of", "reading"),
    [
        (Difference(0.1, 0.04, None, None, 30), "better"),
        (Difference(-0.1, 0.04, None, None, 30), "worse"),
        (Difference(0.1, 0.06, None, None, 30), "within chance"),
        (Difference(0.1, 0.04, -0.01, 0.2, 30), "within chance"),
        (Difference(0.1, None, None, None, 1), "too few sessions"),
        (Difference(None, None, None, None, 0), "not measured"),
    ],
)
def test_a_difference_is_read_by_its_interval_or_its_error(of: Difference, reading: str) -> None:
    assert of.reading == reading


# Comparison: error -----------------------------------------------------------------------------------------------


def _other_dataset(tables: Tables) -> None:
    tables.run["dataset_fingerprint"] = "d2"


def _other_split(tables: Tables) -> None:
    last = max(row["date"] for row in tables.daily)
    tables.daily = [row for row in tables.daily if row["date"] != last]


def _never_evaluated(tables: Tables) -> None:
    tables.daily = []


def _invalid(tables: Tables) -> None:
    for row in tables.daily:
        row |= {"ic": float("nan"), "gross": float("nan")}


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_other_dataset, "trained on dataset d2, .* on d1; runs are compared on one dataset only"),
        (_other_split, "validates on 79 sessions from 2024-01-01 to 2024-03-19, .* on 80 sessions"),
        (_never_evaluated, "no epoch was evaluated both there .none. and in .* .epochs 1 to 20."),
        (_invalid, "no epoch was evaluated both there .none."),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(
    tmp_path: Path, spoil: Callable[[Tables], None], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        compare_runs(*pair(tmp_path, spoil))


# Results ---------------------------------------------------------------------------------------------------------


def test_a_result_is_kept_with_the_run_that_it_explains_and_shown_as_a_row(tmp_path: Path) -> None:
    run, other = pair(tmp_path, lambda tables: tables.run["config"]["train"]["loss"].update(sharpe=0.3))
    assert experiment_rows(run) == []
    result = compare_runs(run, other)
    path = write_experiment_result(run, "B", result)
    assert path == run / "probes" / "experiment_b.json"
    assert read_experiment_results(run) == {"B": result}
    assert json.loads(path.read_text()) == asdict(result)
    (row,) = experiment_rows(run)
    assert row["experiment"] == "B"
    assert row["changed"] == "train.loss.sharpe 0.0 -> 0.3"
    assert row["IC"].startswith(f"better: {result.ic.difference:+.4f} ± {result.ic.se:.4f} (+")
    assert row["at"] == "epoch 20, validation, liquid, 80 sessions"
    write_experiment_result(run, "B", replace(result, same_code=False))
    assert "trained by other code" in experiment_rows(run)[0]["changed"]


def test_a_result_that_cannot_be_read_says_so_and_hides_no_other(tmp_path: Path) -> None:
    run, other = pair(tmp_path)
    write_experiment_result(run, "A", compare_runs(run, other))
    (run / "probes" / "experiment_d.json").write_text("[1]")
    rows = {row["experiment"]: row for row in experiment_rows(run)}
    assert rows["A"]["IC"].startswith("better")
    assert rows["D"]["IC"] == "not readable"
    assert "experiment_d.json: not the result of an experiment" in rows["D"]["changed"]
    assert rows["A"].keys() == rows["D"].keys()
    with pytest.raises(InputError, match=r"experiment_d\.json: not the result"):
        read_experiment_results(run)


def test_the_experiments_are_those_of_the_report() -> None:
    assert tuple(experiment.id for experiment in EXPERIMENTS) == EXPERIMENT_IDS


# Training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def explained(trained: Trained, tmp_path: Path) -> Path:
    """A finished run of three epochs, to be written to."""
    return Path(shutil.copytree(trained(), tmp_path / "runs" / "run"))


@pytest.mark.slow(reason="an experiment is trained")
def test_an_experiment_is_trained_compared_and_fed_back(
    explained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert atft_here("experiment", explained, "A", "--epochs", 2, "--device", "cpu", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    made = Path(said["run_dir"])
    assert made.parent == explained.parent
    run, experiment = header(explained), header(made)
    assert experiment["status"] == "finished"
    assert (experiment["seed"], experiment["dataset_fingerprint"]) == (run["seed"], run["dataset_fingerprint"])
    assert experiment["overrides"]["experiment"] == "A of run"
    schedule = ("train.schedule.name", "train.schedule.patience", "train.schedule.factor")
    assert set(said["result"]["changed"]) == {*schedule, "train.epochs"}
    assert said["result"]["epoch"] == 2
    assert read_experiment_results(explained)["A"].experiment == made.name
    assert Path(said["report_html"]).parent == explained

    monkeypatch.chdir(explained)
    assert atft_here("experiment", ".", "A", "--epochs", 2, "--device", "cpu") == 0
    again = capsys.readouterr()
    assert "reused" in again.err
    assert "reused: True" in again.out
    assert [path.name for path in explained.parent.iterdir() if path.name != "run"] == [made.name]


@pytest.mark.parametrize(
    ("change", "id", "sentence"),
    [
        ({"dataset_path": "gone"}, "A", "gone"),
        ({"dataset_path": None}, "A", "run.json has no 'dataset_path'"),
        ({"dataset_fingerprint": "0123"}, "A", "was trained on 0123; make it again from that run's source"),
        ({}, "E", "expected one of A, B, C, D, found 'E'"),
    ],
)
def test_an_experiment_that_could_not_be_compared_is_refused_before_it_is_trained(
    explained: Path, change: dict[str, Any], id: str, sentence: str
) -> None:
    (explained / "run.json").write_text(json.dumps(header(explained) | change))
    with pytest.raises(InputError, match=sentence):
        plan_experiment(explained, id)
    assert list(explained.parent.iterdir()) == [explained]


def test_an_experiment_whose_settings_the_run_has_is_refused(explained: Path) -> None:
    settings = header(explained)
    settings["config"]["train"]["optimizer"]["lr"] = 1e-2
    (explained / "run.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"has the settings of experiment D already \(`train\.optimizer\.lr` is"):
        plan_experiment(explained, "D")


def test_a_run_that_was_never_evaluated_has_nothing_to_be_compared_with(
    explained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(explained / "daily")
    assert atft_here("experiment", explained, "C") == 2
    assert "no epoch of it was evaluated" in capsys.readouterr().err
