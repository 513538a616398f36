"""The checks of a training run. They show `verdict.json` and judge nothing themselves.

They are an op of their own. A blocking check inside the training op would fail that op, and evaluation and diagnostics,
which must explain the failure, would not start.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg

from assets.metadata import as_dagster_failure, markdown_table, numeric_metadata
from assets.training.gate_history import last_materialization
from atft_pipeline.errors import InputError
from atft_pipeline.runs.header import read_run

PASSES = ("passed", "not_applicable")
"""Verdicts with which the criterion's check passes: a run that is too short to be judged has not failed."""


def run_checks(epochs: int) -> dg.AssetChecksDefinition:
    """success_criterion (blocking), training_health and milestones of the run of this length."""
    model, run = dg.AssetKey(f"model_{epochs}ep"), dg.AssetKey(f"training_run_{epochs}ep")

    @dg.multi_asset_check(
        name=f"judge_{epochs}ep",
        can_subset=True,
        specs=[
            dg.AssetCheckSpec(
                "success_criterion",
                asset=model,
                blocking=True,
                description="Daily gross Sharpe above 0.10 at epoch 20 on the validation sessions, with every validity"
                " item passed. Not applicable below 20 epochs.",
            ),
            dg.AssetCheckSpec(
                "training_health",
                asset=run,
                description="Losses finite, gradients reach every component, parameters moved, predictions vary.",
            ),
            dg.AssetCheckSpec(
                "milestones",
                asset=run,
                description="Sharpe expected by epoch, undisturbed training. They warn.",
            ),
        ],
    )
    def judge(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        from atft_pipeline.runs.documents import read_verdict

        with as_dagster_failure(context):
            verdict = read_verdict(judged_run(context.instance, run))
        say = context.log.info if verdict["status"] in PASSES else context.log.error
        say(f"{model.to_user_string()}: {verdict['summary']}")
        for result in (health_result(verdict, run), milestones_result(verdict, run), criterion_result(verdict, model)):
            assert result.asset_key is not None
            assert result.check_name is not None
            if dg.AssetCheckKey(result.asset_key, result.check_name) in context.selected_asset_check_keys:
                yield result

    return judge


def judged_run(instance: dg.DagsterInstance, run: dg.AssetKey) -> Path:
    """Directory of the last training run, as its materialization names it.

    Raises InputError where there is none, and where the directory is gone or holds another run.
    """
    name = run.to_user_string()
    materialization = last_materialization(instance, run)
    if materialization is None:
        raise InputError(f"{name} was never materialized; run `dagster asset materialize --select '+key:{name}'`")
    if materialization["run_dir"] is None:
        raise InputError(f"{name}: its last materialization was reported by hand and names no run; train again")
    run_dir, expected = Path(materialization["run_dir"]), materialization["run_key"]
    key = read_run(run_dir)["key"]
    if key != expected:
        raise InputError(f"{name}: {run_dir} holds run {key}, expected {expected}; train again")
    return run_dir


def recorded_run(context: dg.AssetExecutionContext, epochs: int) -> Path:
    """`judged_run` for an asset that explains a run. Raises InputError also where that would be an earlier run.

    A step waits for the keys it depends on, here `training_run_{N}ep`. In a Dagster run that trains for `model_{N}ep`
    alone nothing waits for the training, and the asset would explain the run before.
    """
    model, run = dg.AssetKey(f"model_{epochs}ep"), dg.AssetKey(f"training_run_{epochs}ep")
    selected = context.job_def.asset_layer.selected_asset_keys
    if model in selected and run not in selected:
        name, record = context.asset_key.to_user_string(), run.to_user_string()
        raise InputError(
            f"{name}: selected with {model.to_user_string()} but without {record}, so it does not wait for the"
            f" training; select {record} too, or {name} alone afterwards"
        )
    return judged_run(context.instance, run)


def criterion_result(verdict: dict[str, Any], model: dg.AssetKey) -> dg.AssetCheckResult:
    """Passes where the verdict is `passed`, and where the run is too short to be judged, which it says."""
    criterion = verdict["criterion"]
    return dg.AssetCheckResult(
        asset_key=model,
        check_name="success_criterion",
        passed=verdict["status"] in PASSES,
        description=verdict["summary"],
        metadata={
            "status": verdict["status"],
            "summary": verdict["summary"],
            "dataset_fingerprint": verdict["dataset_fingerprint"],
            "config_key": verdict["config_key"],
            "run_key": verdict["run_key"],
            **numeric_metadata(
                {name: criterion[name] for name in ("value", "threshold", "se", "psr_0", "sessions", "epoch")}
            ),
            "validity": markdown_table(verdict["validity"]),
            "warnings": markdown_table([{"warning": warning} for warning in verdict["warnings"]]),
        },
    )


def health_result(verdict: dict[str, Any], run: dg.AssetKey) -> dg.AssetCheckResult:
    """Fails where an item of training health failed or was not measured."""
    items = verdict["health"]
    failed = [item for item in items if item["passed"] is not True]
    return dg.AssetCheckResult(
        asset_key=run,
        check_name="training_health",
        passed=bool(items) and not failed,
        description="; ".join(f"{item['name']}: {item['explanation']}" for item in failed)
        or f"all {len(items)} items hold",
        metadata={"items": markdown_table(items)},
    )


def milestones_result(verdict: dict[str, Any], run: dg.AssetKey) -> dg.AssetCheckResult:
    """Warns where the run has missed a milestone."""
    items = verdict["milestones"]
    missed = [item for item in items if item["passed"] is not True]
    return dg.AssetCheckResult(
        asset_key=run,
        check_name="milestones",
        passed=bool(items) and not missed,
        severity=dg.AssetCheckSeverity.WARN,
        description="; ".join(
            f"{item['name']}: expected {item['expected']}, found {_shown(item['value'])}" for item in missed
        )
        or f"all {len(items)} milestones reached",
        metadata={"items": markdown_table(items)},
    )


def _shown(value: float | None) -> str:
    return "nothing measured" if value is None else f"{value:.3g}"
