"""Training assets in two processes, through Dagster Pipes: results and failures as those of one process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster_runs import EVER, NEVER, copied, failures, made, make, outcomes, training, working_in
from process_work import gone

pytestmark = pytest.mark.process(reason="trainings in two processes through Dagster Pipes")

MODEL, RUN = "model_5ep", "training_run_5ep"
SELECTION = f'key:"{MODEL}" or key:"{RUN}"'


@pytest.fixture(scope="module", autouse=True)
def folder(upstream: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with dataset and graph, in which two processes train."""
    with working_in(copied(upstream, tmp_path_factory.mktemp("checkout")), ATFT_PROCESSES="2") as path:
        yield path


def run_of(seed: int) -> dict[str, object]:
    runs = [json.loads(path.read_text()) for path in Path().glob(f"output/runs/{MODEL}-*/run.json")]
    (run,) = [run for run in runs if run["seed"] == seed]
    return run


def logged(instance: dg.DagsterInstance, result: dg.ExecuteInProcessResult) -> list[str]:
    return [entry.user_message for entry in instance.all_logs(result.run_id)]


def test_two_processes_make_the_assets_and_their_lines_are_in_the_log(instance: dg.DagsterInstance) -> None:
    ops = training(5, NEVER, {"evaluation.criterion_epoch": 2})
    result = make(SELECTION, instance, ops)
    assert made(result) == {MODEL, RUN}
    check = outcomes(result)[f"{MODEL}:success_criterion"]
    assert not check.passed
    (event,) = result.asset_materializations_for_node("train_5ep")[1:]
    run = run_of(seed=1)
    assert (run["processes"], run["status"], run["epochs_done"]) == (2, "finished", 5)
    assert event.metadata["run_key"].value == run["key"]
    assert Path(str(event.metadata["checkpoint"].value)).is_file()
    lines = logged(instance, result)
    assert sum("epoch 5/5" in line for line in lines) == 1


def test_a_killed_process_fails_the_asset_with_its_own_error_and_is_not_retried(instance: dg.DagsterInstance) -> None:
    ended = threading.Event()

    def kill() -> None:
        while not ended.wait(0.002):
            for path in Path().glob(f"output/runs/{MODEL}-*/run.json"):
                run = json.loads(path.read_text())
                if run["seed"] == 2 and run["epochs_done"] >= 1:
                    os.kill(run["pid"], signal.SIGKILL)
                    return

    killer = threading.Thread(target=kill)
    killer.start()
    result = make(SELECTION, instance, training(5, EVER, {"train.seed": 2}))
    ended.set()
    killer.join()
    sentence = "process 0 of 2 was ended by signal 9 (SIGKILL)"
    assert failures(result) == {"train_5ep": sentence}
    (event,) = [event for event in result.all_events if event.is_step_failure]
    assert event.step_failure_data.user_failure_data.metadata == {}
    assert not [event for event in result.all_events if event.is_step_up_for_retry]
    assert run_of(seed=2)["reason"] == f"RunFailure: {sentence}"
    assert any(sentence in line for line in logged(instance, result))


@pytest.mark.parametrize("text", ["0", "x"])
def test_a_number_that_is_none_fails_the_asset_in_one_sentence(
    text: str, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATFT_PROCESSES", text)
    result = make(SELECTION, instance, training(5, EVER, {"train.seed": 3}))
    expected = f"ATFT_PROCESSES: expected a whole number of at least 1, found '{text}'"
    assert failures(result) == {"train_5ep": expected}


def test_the_resource_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from atft_pipeline.errors import InputError
    from resources.compute import Compute

    assert [Compute().process_count(), Compute(processes=3).process_count()] == [2, 3]
    monkeypatch.delenv("ATFT_PROCESSES")
    assert Compute().process_count() == 1
    with pytest.raises(InputError, match="processes: expected a whole number of at least 1, found -1"):
        Compute(processes=-1).process_count()


LAUNCHER = """
import os, sys, time
from pathlib import Path
import assets.training.process as launcher
launcher.open_dagster_pipes = lambda: time.sleep(60)
launcher.LOOK_S = 0.05
Path(sys.argv[1]).write_text(str(os.getpid()))
launcher.main()
"""


def test_the_launcher_of_a_killed_step_ends_too(tmp_path: Path) -> None:
    """A step that the system kills has no time to say so, and its training would run on to the end for nobody."""
    noted = tmp_path / "pid"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {LAUNCHER!r}, {str(noted)!r}])"
    step = subprocess.Popen([sys.executable, "-c", start])
    try:
        launcher = int(waited(lambda: noted.read_text() if noted.exists() else ""))
        step.kill()
        step.wait()
        assert waited(lambda: gone(launcher)), "it runs on"
    finally:
        step.kill()
        for pid in [int(noted.read_text())] if noted.exists() else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def waited(condition: Callable[[], Any], limit_s: float = 20.0) -> Any:
    deadline = time.monotonic() + limit_s
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found
