"""One training op per run length, with two keys: the gated model and the record of its run."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from assets.metadata import as_dagster_failure, numeric_metadata
from assets.training.gate_history import GATE_MODEL, last_check, last_materialization
from assets.training.pipes import train_through_pipes
from atft_pipeline.config.schema import EvaluationConfig
from atft_pipeline.errors import InputError
from atft_pipeline.runs.header import read_run
from atft_pipeline.runs.keys import config_key
from atft_pipeline.verdict.criterion import changed_criterion
from atft_pipeline.verdict.gate import gate_decision
from resources.compute import Compute
from resources.output_folders import OutputFolders

if TYPE_CHECKING:
    from atft_pipeline.training.plan import Plan
    from atft_pipeline.training.train import TrainingResult

RUN_LENGTHS = (5, 20, 50, 120)
"""Epochs of the runs this project offers; the last one is gated by the one of 20."""
GATED_LENGTH = 120
STARTED_IN = "started_in"
"""Names the run directory in the metadata of an observation of `training_run_{N}ep`."""


class TrainingRunConfig(dg.Config):
    overrides: dict[str, Any] = {}  # noqa: RUF012 - Dagster copies it
    """Any field of the configuration by its dotted name, e.g. {"model.hidden_size": 512}."""
    force: bool = False
    """Train again although a finished run of the same configuration, code and data exists."""
    criterion_reason: str | None = None
    """Why the success criterion is not the defined one, where overrides change it. Recorded with the run."""
    override_reason: str | None = None
    """model_120ep only: why it should run although the gate is shut. Recorded with the run."""


def model_key(epochs: int) -> dg.AssetKey:
    return dg.AssetKey(f"model_{epochs}ep")


def run_asset_key(epochs: int) -> dg.AssetKey:
    return dg.AssetKey(f"training_run_{epochs}ep")


def _specs(epochs: int) -> list[dg.AssetSpec]:
    upstream = [dg.AssetKey("ml_dataset"), dg.AssetKey("stock_graph")]
    if epochs == GATED_LENGTH:
        upstream.append(GATE_MODEL)
    return [
        dg.AssetSpec(
            model_key(epochs),
            deps=upstream,
            description=f"Checkpoint after {epochs} epochs; downstream work needs its success criterion.",
            kinds={"pytorch"},
            skippable=True,
        ),
        dg.AssetSpec(
            run_asset_key(epochs),
            deps=upstream,
            description=f"Run directory of the {epochs}-epoch training: record, predictions, checkpoints.",
            kinds={"parquet"},
            skippable=True,
        ),
    ]


def training_assets(epochs: int) -> dg.AssetsDefinition:
    """`model_{epochs}ep` and `training_run_{epochs}ep`, made by one op.

    The record is a key of its own so that evaluation and diagnostics hang off it and still materialise when the
    model's blocking check fails.
    """

    @dg.multi_asset(name=f"train_{epochs}ep", group_name="training", can_subset=True, pool="gpu", specs=_specs(epochs))
    def training(
        context: dg.AssetExecutionContext, config: TrainingRunConfig, store: OutputFolders, compute: Compute
    ) -> Iterator[dg.MaterializeResult | dg.AssetObservation]:
        with as_dagster_failure(context):
            planned = _planned(context, epochs, config, store, compute)
        yield training_starts(epochs, planned.run_dir)
        with as_dagster_failure(context):
            outcome = train_here(
                context, compute, planned.plan, planned.run_dir, force=config.force, overrides=planned.overrides
            )
        yield from _results(context, epochs, outcome, planned.gate)

    return training


@dataclass(frozen=True)
class _Planned:
    """A training that may start."""

    plan: "Plan"
    run_dir: Path
    overrides: dict[str, Any]
    """What the run's record says was overridden, with the reasons given."""
    gate: dict[str, str]
    """The gate's decision; empty for a run without a gate."""


def _planned(
    context: dg.AssetExecutionContext, epochs: int, config: TrainingRunConfig, store: OutputFolders, compute: Compute
) -> _Planned:
    """The training of this length on the newest dataset and graph.

    Raises InputError where the configuration is refused, an input is missing or the gate is shut.
    """
    from atft_pipeline.training.plan import plan_run, resolve_run_dir

    name = model_key(epochs).to_user_string()
    processes = compute.process_count()
    dataset, data = store.current("ml_dataset", name)
    graph, _ = store.current("stock_graph", name)
    if "train.epochs" in config.overrides:
        raise InputError(f"{name}: override 'train.epochs' is refused, its name says {epochs}; use another model")
    settings, recorded = compute.configuration(
        name,
        sections=("split", "model", "train", "evaluation"),
        embedded=store.is_embedded(data["source"]["path"]),
        overrides=config.overrides | {"train.epochs": epochs},
    )
    recorded |= require_criterion(name, settings.evaluation, config.criterion_reason)
    plan = plan_run(settings, dataset, graph, processes)
    gate: dict[str, str] = {}
    if epochs == GATED_LENGTH:
        gate = require_open_gate(context, plan, config.override_reason)
    elif config.override_reason is not None:
        raise InputError(f"{name}: override_reason only applies to model_{GATED_LENGTH}ep")
    run_dir = resolve_run_dir(store.runs / f"{name}-{plan.key}", plan.key, force=config.force)
    return _Planned(plan, run_dir, recorded | gate, gate)


def training_starts(epochs: int, run_dir: Path) -> dg.AssetObservation:
    """Announces where the record of a training will lie: a crash or a kill leaves no materialization that says it.

    It must be yielded: Dagster stores what an op logs only when the op next yields or ends, and a killed op does
    neither.
    """
    return dg.AssetObservation(
        run_asset_key(epochs),
        description="the training starts",
        metadata={STARTED_IN: dg.MetadataValue.path(str(run_dir))},
    )


def trainings_started(instance: dg.DagsterInstance, run_id: str) -> dict[int, Path]:
    """Epochs -> run directory of every training that a Dagster run has started, finished or not."""
    records = instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.ASSET_OBSERVATION).records
    observations = [entry.asset_observation for record in records if (entry := record.event_log_entry)]
    lengths = {run_asset_key(epochs): epochs for epochs in RUN_LENGTHS}
    return {
        lengths[observation.asset_key]: Path(str(observation.metadata[STARTED_IN].value))
        for observation in observations
        if observation is not None and observation.asset_key in lengths and STARTED_IN in observation.metadata
    }


def train_here(
    context: dg.AssetExecutionContext | dg.OpExecutionContext,
    compute: Compute,
    plan: "Plan",
    run_dir: Path,
    *,
    force: bool = False,
    overrides: dict[str, Any],
) -> "TrainingResult":
    """Trains the run of `plan` in `run_dir`: in this process, or in as many as the plan says through Dagster Pipes."""
    from atft_pipeline.training.train import train

    options: dict[str, Any] = {"device": compute.device, "force": force, "overrides": overrides}
    if plan.processes > 1:
        return train_through_pipes(context, plan, run_dir, compute.threads_each(plan.processes), options)
    compute.apply_threads()
    return train(plan.config, plan.dataset, plan.graph, run_dir, log=context.log.info, **options)


def require_criterion(name: str, evaluation: EvaluationConfig, reason: str | None) -> dict[str, str]:
    """What a changed criterion adds to the run's record; raises InputError where it was changed without a reason."""
    changed = changed_criterion(evaluation)
    stated = (reason or "").strip()
    if changed is None and stated:
        raise InputError(f"{name}: criterion_reason is set, but no override changes the success criterion; drop it")
    if changed is not None and not stated:
        raise InputError(
            f"{name}: overrides change the success criterion ({changed}); drop them, or say why in criterion_reason"
        )
    return {"criterion_reason": stated} if stated else {}


def require_open_gate(context: dg.AssetExecutionContext, plan: "Plan", override_reason: str | None) -> dict[str, str]:
    """What the gate adds to the run's record; raises InputError where it is shut.

    The instance's history comes from assets/training/gate_history.py, the rule from atft_pipeline/verdict/gate.py.
    """
    current = {"dataset_fingerprint": plan.dataset_manifest["fingerprint"], "config_key": config_key(plan.config)}
    decision = gate_decision(
        last_check(context.instance),
        last_materialization(context.instance),
        current,
        override_reason,
        model=GATE_MODEL.to_user_string(),
        way_on=f"run `dagster asset materialize --select {GATE_MODEL.to_user_string()}`, or set override_reason in this"
        " asset's config",
    )
    if not decision.open:
        reason = json.dumps({"ops": {f"train_{GATED_LENGTH}ep": {"config": {"override_reason": "WHY"}}}})
        raise InputError(f"{decision.message}: --config-json '{reason}'")
    context.log.info(decision.message)
    override = {"override_reason": decision.override_recorded} if decision.override_recorded else {}
    return {"gate": decision.message, **override}


def _results(
    context: dg.AssetExecutionContext, epochs: int, outcome: "TrainingResult", gate: dict[str, str]
) -> Iterator[dg.MaterializeResult]:
    """Materializations of what was selected; the run's record is logged even where it was not selected.

    They hold the gate's decision too: the header of a reused run tells that of the day it was trained.
    """
    run_dir, verdict = outcome.run_dir, outcome.verdict
    header = read_run(run_dir)
    identity = {
        "run_dir": dg.MetadataValue.path(str(run_dir)),
        "run_key": header["key"],
        "dataset_fingerprint": header["dataset_fingerprint"],
        "config_key": header["config_key"],
        "verdict": verdict["summary"],
        "reused": outcome.reused,
        **gate,
    }
    model, run = model_key(epochs), run_asset_key(epochs)
    record_metadata = identity | numeric_metadata(
        {"epochs": header["epochs_done"], "train_sessions": header["train_sessions"], "stocks": header["stocks"]}
    )
    model_metadata = (
        identity
        | {"checkpoint": dg.MetadataValue.path(str(run_dir / "checkpoints" / f"epoch_{header['epochs_done']:03d}.pt"))}
        | numeric_metadata({f"validation_{k}": v for k, v in verdict["final"].get("validation", {}).items()})
    )
    version = dg.DataVersion(f"{header['key']}-{verdict['weights_hash']}")
    if run in context.selected_asset_keys:
        yield dg.MaterializeResult(asset_key=run, metadata=record_metadata, data_version=version)
    else:
        context.log_event(dg.AssetMaterialization(run, metadata=record_metadata))
    if model in context.selected_asset_keys:
        yield dg.MaterializeResult(asset_key=model, metadata=model_metadata, data_version=version)


training_definitions = [training_assets(epochs) for epochs in RUN_LENGTHS]
