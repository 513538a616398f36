"""Trainings that end before their diagnostics: sensors find them by their Dagster run, and a job diagnoses them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster_runs import (
    BIN,
    EVER,
    command,
    copied,
    environment,
    failures,
    history,
    made,
    make,
    materialize,
    training,
    working_in,
)

from assets.definitions import defs
from assets.diagnosis.failures import explain_failure, explanations
from assets.training.training_run import trainings_started

pytestmark = pytest.mark.slow(reason="assets made in this process")

SELECTION = 'key:"training_run_5ep"'
CRASHING: dict[str, Any] = {"train.optimizer.lr": 1e30, "train.optimizer.clip_norm": 1e30}
"""Updates that leave no weight finite."""


@pytest.fixture(scope="module", autouse=True)
def folder(upstream: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of every test: configuration files, dataset and graph."""
    with working_in(copied(upstream, tmp_path_factory.mktemp("checkout"))) as path:
        yield path


def run_of(instance: dg.DagsterInstance, result: dg.ExecuteInProcessResult) -> dg.DagsterRun:
    run = instance.get_run_by_id(result.run_id)
    assert run is not None
    return run


def requested(evaluation: Any) -> list[dg.RunRequest]:
    assert isinstance(evaluation, dg.SensorResult), evaluation
    return list(evaluation.run_requests or [])


def shown(instance: dg.DagsterInstance, epochs: int = 5) -> dict[str, Any]:
    """Metadata of the newest observation of `diagnostics_{epochs}ep`."""
    (record,) = instance.fetch_observations(dg.AssetKey(f"diagnostics_{epochs}ep"), limit=1).records
    assert record.asset_observation is not None
    return {name: value.value for name, value in record.asset_observation.metadata.items()}


def failed_sensor(context: dg.RunFailureSensorContext) -> Any:
    return defs.resolve_sensor_def("failed_training")(context)


def test_a_crashed_training_is_explained_from_its_own_directory(instance: dg.DagsterInstance) -> None:
    assert make(SELECTION, instance, training(5, EVER)).success, "an earlier run, which is another one"
    result = make(SELECTION, instance, training(5, EVER, CRASHING))
    assert "the loss is nan" in failures(result)["train_5ep"]
    healthy_again = make(SELECTION, instance, training(5, EVER, {"train.seed": 2}))
    assert healthy_again.success, "the newest directory is not the one that failed"
    (event,) = [event for event in result.all_events if event.event_type == dg.DagsterEventType.PIPELINE_FAILURE]
    context = dg.build_run_status_sensor_context(
        "failed_training", event, instance, run_of(instance, result)
    ).for_run_failure()
    (request,) = requested(failed_sensor(context))
    (again,) = requested(failed_sensor(context))
    assert request.run_key == again.run_key, "one explanation per failed run"

    explained = explain_failure.execute_in_process(instance=instance, run_config=request.run_config)
    assert explained.success
    says = shown(instance)
    header = json.loads((Path(says["run_dir"]) / "run.json").read_text())
    assert header["status"] == "failed"
    assert header["config"]["train"]["optimizer"]["lr"] == 1e30
    assert Path(says["report_html"]).parent == Path(says["run_dir"])
    assert "the loss is nan" in Path(says["report_html"]).read_text()
    assert says["headline"] in says["report"]
    assert instance.get_latest_materialization_event(dg.AssetKey("diagnostics_5ep")) is None


def test_a_run_whose_training_never_started_is_skipped_in_one_sentence(
    instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ATFT_SOURCE")
    result = make(SELECTION, instance)
    assert "there is no ml_dataset yet" in failures(result)["train_5ep"]
    said = explanations(instance, run_of(instance, result))
    assert isinstance(said, dg.SkipReason)
    assert "no training had started in it; there is nothing to explain" in str(said.skip_message)


def test_a_run_refused_before_its_record_is_skipped(instance: dg.DagsterInstance) -> None:
    refused = training(5, EVER, {"split.scheme": "sessions", "split.test_sessions": 300})
    result = make(SELECTION, instance, refused)
    assert list(failures(result)) == ["train_5ep"]
    ((_, run_dir),) = trainings_started(instance, result.run_id).items()
    assert not (run_dir / "run.json").exists(), "the test tests nothing"
    said = explanations(instance, run_of(instance, result))
    assert isinstance(said, dg.SkipReason)
    assert f"training_run_5ep ended before it had a record ({run_dir} holds no run.json)" in str(said.skip_message)


def test_a_training_that_its_own_run_explained_is_not_explained_again(instance: dg.DagsterInstance) -> None:
    """As after a failed criterion, which fails the run and lets its diagnostics come."""
    chain = f'{SELECTION} or key:"evaluation_5ep" or key:"diagnostics_5ep"'
    result = make(chain, instance, training(5, EVER))
    assert "diagnostics_5ep" in made(result)
    said = explanations(instance, run_of(instance, result))
    assert isinstance(said, dg.SkipReason)
    assert "training_run_5ep was explained in the same run" in str(said.skip_message)


# Processes -----------------------------------------------------------------------------------------------------


def tick(instance: dg.DagsterInstance, name: str, cursor: str | None = None) -> Any:
    """One evaluation of a sensor as the daemon makes it."""
    sensor = defs.resolve_sensor_def(name)
    context = dg.build_sensor_context(
        instance, cursor=cursor, repository_def=defs.get_repository_def(), sensor_name=name
    )
    return sensor.evaluate_tick(context)


@pytest.fixture(scope="module")
def killed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """The folder after a model_50ep in it was killed in its third epoch, a copy of it, and the sensor's cursor before.

    `kill -9` of the whole process group, as a machine that runs out of memory would: nothing in it can say that it
    ended.
    """
    config = json.dumps({"ops": training(50, EVER)})
    line = [str(BIN / "dagster"), "asset", "materialize", "--select", "model_50ep", "--config-json", config]
    with history(folder) as instance:
        cursor = tick(instance, "failed_training").cursor
        output = folder / "killed.log"
        with output.open("w") as console:
            process = subprocess.Popen(
                line, env=environment(None), stdout=console, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            deadline = time.monotonic() + 120
            while "epoch 2/50" not in output.read_text() and time.monotonic() < deadline:
                assert process.poll() is None, output.read_text()
                time.sleep(0.05)
            assert tick(instance, "killed_runs").skip_message == "no training was killed", "it runs"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return folder, copied(folder, tmp_path_factory.mktemp("killed")), cursor


@pytest.mark.process(reason="a training that is killed, and commands after it")
def test_a_command_that_is_killed_is_recorded_as_failed_and_explained(killed: tuple[Path, Path, str]) -> None:
    """The run of a command belongs to no code location, and the sensors see it all the same."""
    folder, _, cursor = killed
    with history(folder) as instance:
        assert tick(instance, "failed_training", cursor).run_requests == []
        assert tick(instance, "killed_runs").skip_message.startswith("killed, recorded as failed: ")
        seen = tick(instance, "failed_training", cursor)
        (request,) = seen.run_requests
        assert tick(instance, "failed_training", seen.cursor).run_requests == []
        config = json.dumps(request.run_config)
        done = command(folder, ["dg", "launch", "--job", "explain_failure", "--config-json", config])
        assert done.returncode == 0, done.stdout
        says = shown(instance, 50)
    assert "killed" in says["headline"]
    assert Path(says["report_html"]).is_file()


@pytest.mark.process(reason="a training that is killed, and commands after it")
def test_a_killed_training_gives_its_slot_back_and_goes_on_where_it_stopped(
    killed: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No sensor runs here: the next command finds the slot taken, and the run of its holder gone."""
    _, folder, _ = killed
    monkeypatch.chdir(folder)
    done = materialize(folder, "model_50ep", training(50, EVER))
    assert done.returncode == 0, done.stdout
    assert "goes on after epoch" in done.stdout
    assert "epoch 1/50" not in done.stdout
