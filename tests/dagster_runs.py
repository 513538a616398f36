"""The code location on a market that is small enough to run everything, in this process or as users start it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets.definitions import defs
from atft_pipeline.config.overrides import REPORT_VARIABLES, with_overrides
from atft_pipeline.market.synthetic import write_market
from atft_pipeline.training import plan

REPO = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
STOCKS, SESSIONS = 40, 330

EVER, NEVER = -9.0, 9.0
"""Thresholds of the criterion that every and no run of this market passes."""

TINY = {
    "model.hidden_size": 8,
    "model.window_sessions": 3,
    "model.normalisation_window_sessions": 3,
    "train.batch_size": 100_000,
    "evaluation.bootstrap_samples": 10,
}
"""A model of tenths of a second per epoch."""

UPSTREAM = '+key:"stock_graph"'
UPSTREAM_CONFIG = {
    "stock_graph": {"config": {"overrides": {"graph.lookback_sessions": 60, "graph.refresh_sessions": 20}}}
}


def training(epochs: int, sharpe: float, overrides: Mapping[str, Any] | None = None, **config: Any) -> dict[str, Any]:
    """Op config of `train_{epochs}ep` with a tiny model, a threshold, and the reason that one needs."""
    fields = {**TINY, "evaluation.criterion_sharpe": sharpe, **(overrides or {})}
    return {f"train_{epochs}ep": {"config": {"overrides": fields, "criterion_reason": "forced by a test", **config}}}


def make_source(folder: Path) -> Path:
    """A source folder of all five raw tables."""
    folder.mkdir(parents=True)
    write_market(folder, stocks=STOCKS, sessions=SESSIONS, seed=1)
    return folder


def make(
    selection: str | dg.AssetSelection, instance: dg.DagsterInstance, ops: Mapping[str, Any] | None = None
) -> dg.ExecuteInProcessResult:
    """Materialises a selection in this process; outputs are relative to the working directory."""
    job = dg.define_asset_job("selected", selection=selection)
    resolved = dg.Definitions.merge(defs, dg.Definitions(jobs=[job])).resolve_job_def("selected")
    return resolved.execute_in_process(instance=instance, run_config={"ops": dict(ops or {})}, raise_on_error=False)


def few_epochs(patch: pytest.MonkeyPatch, epochs: int = 2) -> None:
    """The trainings of this process take `epochs`, whatever their names say, and are judged after the first.

    For tests of what happens around a training. The criterion of such a run must be changed by an override too.
    """
    plan_run = plan.plan_run
    shorter = {"train.epochs": epochs, "evaluation.criterion_epoch": 1}
    patch.setattr(plan, "plan_run", lambda settings, *rest: plan_run(with_overrides(settings, shorter), *rest))


def outcomes(result: dg.ExecuteInProcessResult) -> dict[str, dg.AssetCheckEvaluation]:
    """The evaluated checks by `asset:check`."""
    return {
        f"{check.asset_key.to_user_string()}:{check.check_name}": check
        for check in result.get_asset_check_evaluations()
    }


def failures(result: dg.ExecuteInProcessResult) -> dict[str, str]:
    """Failed step -> its sentence: the description of a Failure, else the error's message."""
    sentences = {}
    for event in result.all_events:
        if event.is_step_failure:
            data = event.step_failure_data
            user = data.user_failure_data
            sentences[str(event.step_key)] = (user.description if user else None) or (
                data.error.message if data.error else ""
            )
    return sentences


def made(result: dg.ExecuteInProcessResult) -> set[str]:
    return {event.asset_key.to_user_string() for event in result.get_asset_materialization_events() if event.asset_key}


def first_error(output: str) -> str:
    """The first line of a console that reports an error, a stack trace's included.

    A step that does not start because another failed is no error of its own. The console shows it before or after the
    failure: Dagster passes what a step's process prints through a file.
    """
    signs = (" - ERROR - ", "Traceback", "Stack Trace", "Error:")
    lines = [line for line in output.splitlines() if "Dependencies for step" not in line]
    return next((line for line in lines if any(sign in line for sign in signs)), "")


# Processes -----------------------------------------------------------------------------------------------------


def workspace(folder: Path) -> Path:
    """A folder that stands in for the checkout: the configuration files, no output, no history."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("dagster.yaml", "workspace.yaml", "pyproject.toml"):
        shutil.copy(REPO / name, folder / name)
    return folder


@contextmanager
def working_in(folder: Path, **variables: str) -> Iterator[Path]:
    """`folder` as the working directory, the source in it named by a relative path, `variables` in the environment."""
    here = {"ATFT_PRESET": "quick", "OMP_NUM_THREADS": "1", "ATFT_SOURCE": "source"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("DAGSTER_HOME", raising=False)
        for name, value in (here | variables).items():
            patch.setenv(name, value)
        yield folder


def make_upstream(folder: Path) -> None:
    """Fills a checkout: the configuration files, a source, and the dataset and graph that are made of it."""
    make_source(workspace(folder) / "source")
    with working_in(folder), dg.DagsterInstance.ephemeral() as instance:
        assert make(UPSTREAM, instance, UPSTREAM_CONFIG).success


def copied(checkout: Path, folder: Path) -> Path:
    """`folder`, with all that `checkout` holds; paths within are relative, so that it stands alone."""
    return shutil.copytree(checkout, folder, symlinks=True, dirs_exist_ok=True)


def environment(source: Path | None, **extra: str) -> dict[str, str]:
    """The caller's environment without anything that configures this project."""
    dropped = {*REPORT_VARIABLES, "ATFT_SOURCE", "ATFT_PRESET", "DAGSTER_HOME"}
    kept = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("DAGSTER_CLI")}
    named = {} if source is None else {"ATFT_SOURCE": str(source)}
    return kept | {"OMP_NUM_THREADS": "1", "ATFT_PRESET": "quick"} | named | extra


def command(
    folder: Path, arguments: list[str], source: Path | None = None, **extra: str
) -> subprocess.CompletedProcess[str]:
    """A command of the virtual environment as a process of its own in `folder`; stdout and stderr are one text."""
    return subprocess.run(
        [str(BIN / arguments[0]), *arguments[1:]],
        cwd=folder,
        env=environment(source, **extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )


def materialize(
    folder: Path, select: str, ops: Mapping[str, Any] | None = None, source: Path | None = None, **extra: str
) -> subprocess.CompletedProcess[str]:
    """`dagster asset materialize --select SELECT`."""
    config = ["--config-json", json.dumps({"ops": dict(ops)})] if ops else []
    return command(folder, ["dagster", "asset", "materialize", "--select", select, *config], source, **extra)


def history(folder: Path) -> dg.DagsterInstance:
    """What the commands in `folder` remember. The working directory must be `folder`: the paths are relative."""
    assert Path.cwd() == folder
    return dg.DagsterInstance.from_config(str(folder))
