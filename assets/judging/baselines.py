"""What simpler models earn on the same dataset and split, under the same evaluation."""

import time
from collections.abc import Mapping
from typing import Any

import dagster as dg

from assets.judging.evaluation import statistics_table
from assets.metadata import as_dagster_failure, markdown_table, numeric_metadata
from atft_pipeline.config.overrides import to_dict
from atft_pipeline.dataset.splits import make_split
from atft_pipeline.evaluation.evaluate import Evaluation
from resources.compute import Compute
from resources.output_folders import OutputFolders

FIGURES: tuple[str, ...] = ("sharpe_daily", "sharpe_daily_net", "ic_mean", "rank_ic_mean")
"""Statistics that the log and the metadata show one by one."""


class BaselineOverrides(dg.Config):
    overrides: dict[str, Any] = {}  # noqa: RUF012 - Dagster copies it
    """Fields of the split, train and evaluation sections, those of the run the baselines are to be compared with."""


@dg.asset(
    group_name="evaluation",
    deps=["ml_dataset"],
    kinds={"scikit-learn", "lightgbm"},
    description="Ridge, LightGBM and the best one-factor reversal, fitted on the training sessions and evaluated by the"
    " evaluation that judges the network.",
)
def baselines(
    context: dg.AssetExecutionContext, config: BaselineOverrides, store: OutputFolders, compute: Compute
) -> dg.MaterializeResult:
    from atft_pipeline.batches.panel import load_panel
    from atft_pipeline.evaluation.baselines import evaluate_baselines, fit_baselines
    from atft_pipeline.monitoring.comparison import setting

    with as_dagster_failure(context):
        dataset, manifest = store.current("ml_dataset", "baselines")
        settings, _ = compute.configuration(
            "baselines",
            sections=("split", "train", "evaluation"),
            embedded=store.is_embedded(manifest["source"]["path"]),
            overrides=config.overrides,
        )
        panel = load_panel(dataset, settings.train.universe)
        split = make_split(panel.sessions, settings.split)
        started = time.perf_counter()
        fitted = fit_baselines(panel, split, settings.train.seed)
        runtime_s = time.perf_counter() - started
        evaluations = evaluate_baselines(fitted, panel, split, settings.evaluation)
        stored = store.keep_baselines(
            {
                "dataset_fingerprint": manifest["fingerprint"],
                **setting(to_dict(settings.split), to_dict(settings.evaluation)),
                "seed": settings.train.seed,
                "runtime_s": runtime_s,
                "models": {
                    model: {part: stored_evaluation(evaluation) for part, evaluation in by_split.items()}
                    for model, by_split in evaluations.items()
                },
            }
        )
    return dg.MaterializeResult(
        metadata={
            "dataset_fingerprint": manifest["fingerprint"],
            "stored": dg.MetadataValue.path(str(stored)),
            **baselines_metadata(context, evaluations),
        },
        data_version=dg.DataVersion(manifest["fingerprint"]),
    )


def baselines_metadata(
    context: dg.AssetExecutionContext, evaluations: Mapping[str, Mapping[str, Evaluation]]
) -> dict[str, dg.MetadataValue]:
    """The main figures one by one, also in the log, and all statistics as a table."""
    figures: dict[str, float | None] = {}
    for model, by_split in evaluations.items():
        for part, evaluation in by_split.items():
            values = {key: evaluation.value(key) for key in FIGURES}
            shown = (f"{key} {'missing' if value is None else f'{value:.3f}'}" for key, value in values.items())
            context.log.info(f"{model}, {part}: {', '.join(shown)}")
            figures |= {f"{model}_{part}_{key}": value for key, value in values.items()}
    columns = {
        f"{model}, {part}": evaluation
        for model, by_split in evaluations.items()
        for part, evaluation in by_split.items()
    }
    return {**numeric_metadata(figures), "statistics": markdown_table(statistics_table(columns))}


def stored_evaluation(evaluation: Evaluation) -> dict[str, Any]:
    """Statistics with their standard errors as plain JSON, and the reason where the evaluation is invalid."""
    statistics = {name: {"value": s.value, "se": s.se} for name, s in evaluation.statistics.items()}
    return {"reason": evaluation.reason, "statistics": statistics}
