"""A training that crashed, was killed or stopped is explained too: sensors find its record and start `explain_failure`.

`diagnostics_{N}ep` hangs off `training_run_{N}ep`, which such a training never materialises.
"""

from pathlib import Path
from typing import Any

import dagster as dg

from assets.diagnosis.diagnostics import diagnostics_key, explained
from assets.metadata import as_dagster_failure
from assets.training.training_run import run_asset_key, trainings_started
from resources.execution import release_killed_runs

LOOK_S = 30
"""Between two looks of a sensor."""


class EndedTraining(dg.Config):
    run_dir: str
    """Run directory of the training."""
    epochs: int
    """Its length, which names the asset that shows the explanation."""


@dg.op
def explain_training(context: dg.OpExecutionContext, config: EndedTraining) -> None:
    """Diagnoses the run in `run_dir`, writes its report and shows both at `diagnostics_{N}ep`.

    As an observation: a materialization would say that the last `training_run_{N}ep` is explained, which is another
    run.
    """
    with as_dagster_failure(context):
        metadata = explained(context, Path(config.run_dir))
    context.log_event(
        dg.AssetObservation(
            diagnostics_key(config.epochs), description="a training that ended early, explained", metadata=metadata
        )
    )


@dg.job(description="Explains one training from its run directory, in whatever state that is; sensors start it.")
def explain_failure() -> None:
    explain_training()


def explanations(instance: dg.DagsterInstance, run: dg.DagsterRun) -> dg.SensorResult | dg.SkipReason:
    """What a finished Dagster run leaves to be explained: each training it started and did not explain itself."""
    materialized = instance.get_records_for_run(run.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION).records
    made = {record.asset_key for record in materialized}
    requests, reasons = [], []
    for epochs, run_dir in trainings_started(instance, run.run_id).items():
        name = run_asset_key(epochs).to_user_string()
        if not (run_dir / "run.json").is_file():
            reasons.append(f"{name} ended before it had a record ({run_dir} holds no run.json)")
        elif diagnostics_key(epochs) in made:
            reasons.append(f"{name} was explained in the same run")
        else:
            config = {"ops": {"explain_training": {"config": {"run_dir": str(run_dir), "epochs": epochs}}}}
            requests.append(dg.RunRequest(run_key=f"{run.run_id} {name}", run_config=config))
    if requests:
        return dg.SensorResult(run_requests=requests)
    why = "; ".join(reasons) or "no training had started in it"
    return dg.SkipReason(f"run {run.run_id} of {run.job_name}: {why}; there is nothing to explain")


ALWAYS: dict[str, Any] = {
    "default_status": dg.DefaultSensorStatus.RUNNING,
    "minimum_interval_seconds": LOOK_S,
}
# A command such as `dagster asset materialize` belongs to no code location: only who watches all of them sees its runs.
EVERYWHERE: dict[str, Any] = ALWAYS | {"monitor_all_code_locations": True}


@dg.run_failure_sensor(
    description="Starts `explain_failure` for every training of a run that failed, whoever started the run.",
    request_job=explain_failure,
    **EVERYWHERE,
)
def failed_training(context: dg.RunFailureSensorContext) -> dg.SensorResult | dg.SkipReason:
    return explanations(context.instance, context.dagster_run)


@dg.run_status_sensor(
    run_status=dg.DagsterRunStatus.CANCELED,
    description="Starts `explain_failure` for every training of a run that was terminated, by Ctrl-C or in the UI.",
    request_job=explain_failure,
    **EVERYWHERE,
)
def canceled_training(context: dg.RunStatusSensorContext) -> dg.SensorResult | dg.SkipReason:
    return explanations(context.instance, context.dagster_run)


@dg.sensor(
    description="Records trainings as failed whose command was killed, so that they are explained.",
    **ALWAYS,
)
def killed_runs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """Nobody else notices that the process of a command such as `dagster asset materialize` is gone.

    Of a run that the UI or the daemon started the code server notices it, and of a killed step its run.
    """
    gone = release_killed_runs(context.instance)
    return dg.SkipReason(f"killed, recorded as failed: {', '.join(gone)}" if gone else "no training was killed")
