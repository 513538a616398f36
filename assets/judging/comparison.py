"""All run lengths and the baselines in one table, with an alarm where different weights have identical figures."""

from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg

from assets.judging.checks import recorded_run
from assets.metadata import as_dagster_failure, check_result, markdown_table, numeric_metadata
from assets.training.gate_history import last_materialization
from assets.training.training_run import GATED_LENGTH, RUN_LENGTHS, model_key, run_asset_key
from atft_pipeline.errors import InputError
from resources.output_folders import OutputFolders

if TYPE_CHECKING:
    from atft_pipeline.monitoring.comparison import Comparison

CHECK = "no_identical_figures"


@dg.asset(
    group_name="evaluation",
    # Without the gated run: it fails while its gate is shut, which is when the table of the others is wanted most.
    deps=[*(run_asset_key(epochs) for epochs in RUN_LENGTHS if epochs != GATED_LENGTH), "baselines"],
    kinds={"duckdb"},
    description="The last run of every length and the baselines side by side: Sharpe, runtime, resets, warnings,"
    " expected against actual.",
    check_specs=[
        dg.AssetCheckSpec(
            CHECK,
            asset="comparison",
            description="No figure and no predictions of different weights are bit-identical.",
        )
    ],
)
def comparison(context: dg.AssetExecutionContext, store: OutputFolders) -> dg.MaterializeResult:
    from atft_pipeline.monitoring.comparison import compare

    with as_dagster_failure(context):
        _, manifest = store.current("ml_dataset", "comparison")
        baselines = store.baselines() or "never fitted; materialize the asset `baselines`"
        compared = compare(
            {_length(epochs): _run(context, epochs) for epochs in RUN_LENGTHS},
            dataset_fingerprint=manifest["fingerprint"],
            baselines=baselines,
        )
    return dg.MaterializeResult(
        metadata={
            "dataset_fingerprint": manifest["fingerprint"],
            "comparison": markdown_table(compared.table()),
            "missed_expectations": markdown_table(compared.missed()),
            "alarms": markdown_table([{"alarm": alarm.sentence} for alarm in compared.alarms]),
            "notes": markdown_table([{"note": note.sentence} for note in compared.notes]),
            **numeric_metadata({f"{row.name} sharpe": row.sharpe for row in compared.rows}),
        },
        check_results=[identity_result(context, compared)],
    )


def identity_result(context: dg.AssetExecutionContext, compared: "Comparison") -> dg.AssetCheckResult:
    """Fails with one sentence per figure that different weights share."""
    problems = [alarm.sentence for alarm in compared.alarms]
    return check_result(context, CHECK, problems, "no figure of different weights is bit-identical")


def _length(epochs: int) -> str:
    return f"{epochs} epochs"


def _run(context: dg.AssetExecutionContext, epochs: int) -> Path | str:
    """Directory of the last run of this length, or why none can be read."""
    try:
        run_dir = recorded_run(context, epochs)
    except InputError as error:
        return str(error)
    trained = {model_key(epochs), run_asset_key(epochs)} & set(context.job_def.asset_layer.selected_asset_keys)
    if not trained or epochs != GATED_LENGTH:
        return run_dir
    materialization = last_materialization(context.instance, run_asset_key(epochs))
    if materialization is not None and materialization["run_id"] != context.run_id:
        return f"{_length(epochs)}: in training in this very run; materialize comparison again afterwards"
    return run_dir
