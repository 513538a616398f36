"""A training in several processes, as its Dagster step sees it: `assets.training.process` launches the processes."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster._core.errors import DagsterPipesExecutionError

from atft_pipeline.errors import InputError, RunFailure

if TYPE_CHECKING:
    from atft_pipeline.training.plan import Plan
    from atft_pipeline.training.train import TrainingResult

TERMINATION_S = 60.0
"""Wait for the launcher after an interrupt; it kills its own processes after 20 s."""

ERRORS: dict[str, type[InputError | RunFailure]] = {"InputError": InputError, "RunFailure": RunFailure}


def train_through_pipes(
    context: dg.AssetExecutionContext | dg.OpExecutionContext,
    plan: "Plan",
    run_dir: Path,
    threads: int,
    options: dict[str, Any],
) -> "TrainingResult":
    """The result of a run that other processes train; raises what `train` raises. An interrupt ends them first."""
    from atft_pipeline.config.overrides import to_dict
    from atft_pipeline.runs.documents import read_verdict
    from atft_pipeline.training.train import TrainingResult

    extras = {
        "config": to_dict(plan.config),
        "dataset": str(plan.dataset),
        "graph": str(plan.graph),
        "run_dir": str(run_dir),
        "processes": plan.processes,
        "threads": threads,
        "options": options,
    }
    client = dg.PipesSubprocessClient(termination_timeout_seconds=TERMINATION_S)
    command = [sys.executable, "-m", "assets.training.process"]
    try:
        messages = client.run(context=context, command=command, extras=extras).get_custom_messages()
    except DagsterPipesExecutionError as error:
        raise RunFailure(f"run {run_dir}: the launcher of its {plan.processes} processes ended: {error}") from error
    (told,) = messages
    if "error" in told:
        raise ERRORS[told["error"]](told["sentence"])
    trained = Path(told["run_dir"])
    return TrainingResult(trained, read_verdict(trained), told["reused"])
