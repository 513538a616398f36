"""Experiments A to D of a run's report: a partition each, paired against the run they explain."""

from dataclasses import asdict
from pathlib import Path

import dagster as dg

from assets.diagnosis.commands import DAGSTER
from assets.diagnosis.diagnostics import diagnostics_key, explanation
from assets.metadata import as_dagster_failure, markdown_table, numeric_metadata
from assets.training.training_run import RUN_LENGTHS, train_here
from atft_pipeline.config.schema import EXPERIMENT_IDS
from atft_pipeline.errors import InputError
from atft_pipeline.runs.header import read_run
from resources.compute import Compute
from resources.output_folders import OutputFolders

EXPERIMENTS = dg.StaticPartitionsDefinition(list(EXPERIMENT_IDS))


class ExperimentConfig(dg.Config):
    run_dir: str
    """Run directory of the run to explain."""
    epochs: int | None = None
    """Epochs of the experiment; those of the run where this is not set."""


@dg.op(pool="gpu")
def experiment(
    context: dg.OpExecutionContext, config: ExperimentConfig, store: OutputFolders, compute: Compute
) -> None:
    """Trains the experiment that the partition names, or reuses it; its result and the new report are the run's.

    Both show at `diagnostics_{N}ep` of the explained run's length, as an observation: the asset's last materialization
    may be of another run.
    """
    from atft_pipeline.diagnostics.conclude import conclude, plan_experiment
    from atft_pipeline.inspection.paired import experiment_rows

    run_dir = Path(config.run_dir)
    with as_dagster_failure(context):
        if not context.has_partition_key:
            raise InputError(
                f"experiments: name the experiment, --partition {' or '.join(EXPERIMENTS.get_partition_keys())}"
            )
        id = context.partition_key
        planned = plan_experiment(run_dir, id, config.epochs)
        outcome = train_here(context, compute, planned.plan, store.runs / planned.name, overrides=planned.overrides)
        concluded = conclude(run_dir, id, outcome.run_dir, DAGSTER)
        result = concluded.result
        length = read_run(run_dir).get("epochs_planned")
        metadata = {
            "experiment": id,
            "experiment_dir": dg.MetadataValue.path(str(outcome.run_dir)),
            "results": markdown_table([dict(row) for row in experiment_rows(run_dir)]),
            **numeric_metadata({f"ic_{name}": value for name, value in asdict(result.ic).items()}),
            **numeric_metadata({f"gross_{name}": value for name, value in asdict(result.gross).items()}),
            **numeric_metadata(
                {"experiment_sharpe": result.experiment_sharpe, "explained_sharpe": result.explained_sharpe}
            ),
            **explanation(concluded.diagnosis, concluded.report),
        }
    context.log.info(f"experiment {id} of {run_dir}: IC {result.ic.reading}, gross return {result.gross.reading}")
    context.add_output_metadata(metadata)
    if length in RUN_LENGTHS:
        what = f"experiment {id} of this run, and its report with the result"
        context.log_event(dg.AssetObservation(diagnostics_key(length), description=what, metadata=metadata))


@dg.job(
    partitions_def=EXPERIMENTS,
    description="Trains an experiment of a run's report (A schedule, B Sharpe term, C capacity, D learning rate; the"
    " partition says which) on the run's dataset, graph and seed, compares the two session by session, and writes the"
    " run's report anew. Its config names the run to explain.",
)
def experiments() -> None:
    experiment()
