"""What simpler models earn on the same dataset, split and evaluation."""

import time
from typing import Any

import dagster as dg

from assets.judging.evaluation import statistics_table
from assets.metadata import failing_with_one_sentence, markdown_table, numbers
from atft_pipeline.config.overrides import to_dict
from atft_pipeline.dataset.splits import make_split
from atft_pipeline.evaluation.evaluate import Evaluation, evaluate
from resources.compute import Compute
from resources.dataset_store import DatasetStore

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
    " definition the network is held to.",
)
def baselines(
    context: dg.AssetExecutionContext, config: BaselineOverrides, store: DatasetStore, compute: Compute
) -> dg.MaterializeResult:
    from atft_pipeline.batches.panel import load_panel
    from atft_pipeline.evaluation.baselines import fit_baselines
    from atft_pipeline.monitoring.comparison import setting
    from atft_pipeline.training.judging.scoring import slice_mask

    with failing_with_one_sentence(context):
        dataset, manifest = store.current("ml_dataset", "baselines")
        settings, _ = compute.configuration(
            "baselines",
            sections=("split", "train", "evaluation"),
            embedded=store.is_embedded(manifest["source"]["path"]),
            overrides=config.overrides,
        )
        panel = load_panel(dataset, settings.train.universe)
        split = make_split(panel.sessions, settings.split)
        member = slice_mask(panel, settings.evaluation.universe)
        evaluations: dict[str, Evaluation] = {}
        started = time.perf_counter()
        fitted = fit_baselines(panel, split, settings.train.seed)
        runtime_s = time.perf_counter() - started
        for name, scores in fitted.items():
            for part, sessions in (("validation", split.validation), ("test", split.test)):
                evaluations[f"{name}, {part}"] = evaluate(
                    scores[sessions],
                    panel.targets[sessions, :, 0],
                    panel.sessions[sessions],
                    panel.codes,
                    settings.evaluation,
                    days_per_year=int(manifest["days_per_year"]),
                    bootstrap=True,
                    member=member[sessions],
                )
        stored = store.keep_baselines(
            {
                "dataset_fingerprint": manifest["fingerprint"],
                **setting(to_dict(settings.split), to_dict(settings.evaluation)),
                "seed": settings.train.seed,
                "runtime_s": runtime_s,
                "models": {
                    name: {part: stored_evaluation(evaluations[f"{name}, {part}"]) for part in ("validation", "test")}
                    for name in fitted
                },
            }
        )
    figures: dict[str, float | None] = {}
    for name, evaluation in evaluations.items():
        found = {key: evaluation.value(key) for key in FIGURES}
        shown = (f"{key} {'missing' if value is None else f'{value:.3f}'}" for key, value in found.items())
        context.log.info(f"{name}: {', '.join(shown)}")
        figures |= {f"{name}_{key}".replace(", ", "_"): value for key, value in found.items()}
    return dg.MaterializeResult(
        metadata={
            "dataset_fingerprint": manifest["fingerprint"],
            "stored": dg.MetadataValue.path(str(stored)),
            **numbers(figures),
            "statistics": markdown_table(statistics_table(evaluations)),
        },
        data_version=dg.DataVersion(manifest["fingerprint"]),
    )


def stored_evaluation(evaluation: Evaluation) -> dict[str, Any]:
    """Statistics with their standard errors as plain JSON, and why they are missing where they are."""
    statistics = {name: {"value": s.value, "se": s.se} for name, s in evaluation.statistics.items()}
    return {"reason": evaluation.reason, "statistics": statistics}
