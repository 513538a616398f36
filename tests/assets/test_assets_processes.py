"""The commands as a user types them: real processes, one folder, a history across calls, exit codes.

Each test continues from the one before it, as a user's calls do, and says what it starts from.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.workspace.autodiscovery import loadable_targets_from_python_module
from dagster._core.workspace.load_target import WorkspaceFileTarget
from dagster_runs import (
    BIN,
    EVER,
    NEVER,
    UPSTREAM_CONFIG,
    command,
    copied,
    environment,
    few_epochs,
    first_error,
    history,
    make,
    materialize,
    training,
    working_in,
    workspace,
)

from assets.__main__ import main
from assets.definitions import defs

pytestmark = pytest.mark.process(reason="commands of dagster, a user's session")


@pytest.fixture(scope="module")
def folder(upstream: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder all commands run in; it starts with nothing but the configuration files and a source."""
    path = workspace(tmp_path_factory.mktemp("checkout"))
    copied(upstream / "source", path / "source")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.delenv("DAGSTER_HOME", raising=False)
        yield path


def newest(folder: Path, asset: str) -> dict[str, Any]:
    """Metadata of the asset's newest materialization, {} when it was never made."""
    with history(folder) as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey(asset))
    return {} if event is None else {k: v.value for k, v in event.asset_materialization.metadata.items()}


def test_failed_criterion_exits_1_and_is_explained_and_the_long_run_does_not_start(folder: Path) -> None:
    """From nothing: everything upstream, model_20ep, its explanation, and model_120ep behind the gate."""
    ops = UPSTREAM_CONFIG | training(20, NEVER) | training(120, NEVER)
    done = materialize(folder, "+key:model_120ep,+key:diagnostics_20ep", ops, source=folder / "source")
    assert done.returncode == 1
    assert "model_20ep: failed: Sharpe" in first_error(done.stdout)
    assert newest(folder, "model_20ep")["run_dir"] == newest(folder, "evaluation_20ep")["run_dir"]
    assert Path(newest(folder, "diagnostics_20ep")["report_html"]).is_file()
    assert newest(folder, "model_120ep") == {}
    assert "epoch 1/120" not in done.stdout


def test_gate_stays_shut_in_a_later_run(folder: Path) -> None:
    """From a model_20ep whose criterion failed."""
    done = materialize(folder, "model_120ep", training(120, NEVER))
    assert done.returncode == 1
    line = first_error(done.stdout)
    assert "gate shut: the success criterion of model_20ep failed (failed: Sharpe" in line
    assert "dagster asset materialize --select model_20ep" in line
    assert """--config-json '{"ops": {"train_120ep": {"config": {"override_reason": "WHY"}}}}'""" in line


def test_dg_launch_works_on_the_same_history_and_a_later_call_explains_that_very_run(folder: Path) -> None:
    """Only model_20ep is selected, with another criterion than before; its record is written all the same."""
    before = newest(folder, "evaluation_20ep")["run_dir"]
    config = json.dumps({"ops": training(20, EVER)})
    done = command(folder, ["dg", "launch", "--assets", "model_20ep", "--config-json", config])
    assert done.returncode == 0, done.stdout
    run_dir = newest(folder, "training_run_20ep")["run_dir"]
    assert run_dir == newest(folder, "model_20ep")["run_dir"] != before

    with history(folder) as instance:
        assert make('key:"evaluation_20ep" or key:"diagnostics_20ep"', instance).success
    assert newest(folder, "evaluation_20ep")["run_dir"] == run_dir
    assert newest(folder, "diagnostics_20ep")["run_dir"] == run_dir


@contextmanager
def training_started(folder: Path, ops: dict[str, Any], log: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A model_50ep that has finished three epochs, in a process group of its own, and what its console shows."""
    output = folder / log
    with output.open("w") as console:
        process = subprocess.Popen(
            [str(BIN / "dagster"), "asset", "materialize", "--select", "model_50ep", "--config-json",
             json.dumps({"ops": ops})],
            cwd=folder, env=environment(None), stdout=console, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 120
            while "epoch 3/50" not in output.read_text() and time.monotonic() < deadline:
                assert process.poll() is None, output.read_text()
                time.sleep(0.05)
            yield process, output
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.parametrize("sent_to", ["process", "group"])
def test_an_interrupted_training_is_kept_up_to_its_last_epoch_and_not_tried_again(folder: Path, sent_to: str) -> None:
    """The UI signals the run's process, Ctrl-C in a terminal the whole group."""
    seed = {"process": 2, "group": 3}[sent_to]
    ops = training(50, EVER, {"train.seed": seed})
    with training_started(folder, ops, f"interrupted-{sent_to}.log") as (process, output):
        (os.kill if sent_to == "process" else os.killpg)(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) != 0
    text = output.read_text()
    runs = [json.loads(path.read_text()) for path in folder.glob("output/runs/model_50ep-*/run.json")]
    (run,) = [run for run in runs if run["seed"] == seed]
    done = run["epochs_done"]
    assert 3 <= done < 50
    assert (run["status"], run["epochs_planned"]) == ("interrupted", 50)
    assert run["reason"] == f"interrupted; epoch {done} of 50 is kept, start it again to go on"
    assert text.count("epoch 1/50") == 1, "tried again"
    assert "retry" not in text.lower()
    with history(folder) as instance:
        (newest_run,) = instance.get_run_records(limit=1)
        assert newest_run.dagster_run.status in (dg.DagsterRunStatus.CANCELED, dg.DagsterRunStatus.FAILURE)


def assert_last_lines(output: str, verdict_begins: str) -> None:
    report, verdict, ui = [line for line in output.splitlines() if line.strip()][-3:]
    assert report.startswith("report:   ")
    assert Path(report.split()[1]).is_file()
    assert verdict.startswith(f"verdict:  {verdict_begins}")
    assert ui == "UI:       make ui"


def test_main_job_returns_0_when_the_criterion_passed_and_reuses_the_run_that_is_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few_epochs(monkeypatch)
    with working_in(folder):
        for reused in (False, True):
            assert main({"ops": UPSTREAM_CONFIG | training(50, EVER)}) == 0
            assert_last_lines(capsys.readouterr().out, "passed")
            assert newest(folder, "model_50ep")["reused"] is reused


def test_main_job_returns_1_when_the_criterion_failed_and_still_ends_with_the_report(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few_epochs(monkeypatch)
    with working_in(folder):
        assert main({"ops": UPSTREAM_CONFIG | training(50, NEVER)}) == 1
    assert_last_lines(capsys.readouterr().out, "failed: Sharpe")


def test_main_job_that_cannot_start_says_so_and_exits_1(folder: Path) -> None:
    done = command(folder, ["python", "-m", "assets"], source=folder / "nowhere")
    assert done.returncode == 1
    assert "nowhere is not a folder" in first_error(done.stdout)
    assert "main job: stopped before diagnostics" in done.stdout


def test_the_workspace_file_names_the_code_location(folder: Path) -> None:
    """What `make ui` loads; `test_browser` opens what it then serves."""
    (origin,) = WorkspaceFileTarget([str(folder / "workspace.yaml")]).create_origins()
    named = origin.loadable_target_origin
    assert (named.module_name, named.working_directory) == ("assets.definitions", ".")
    (loaded,) = loadable_targets_from_python_module(named.module_name, working_directory=None)
    assert loaded.target_definition is defs
