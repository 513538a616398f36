"""Evaluation of a run from its predictions file: figures, a table and pictures, compared with the run's own record."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from assets.judging.checks import recorded_run
from assets.metadata import as_dagster_failure, check_result, markdown_table, numeric_metadata
from assets.training.training_run import run_asset_key
from atft_pipeline.config.overrides import from_dict
from atft_pipeline.evaluation.evaluate import SPLITS, Evaluation
from atft_pipeline.evaluation.predictions_table import evaluate_table
from atft_pipeline.evaluation.slices import marked_slice
from atft_pipeline.runs.header import read_run
from atft_pipeline.runs.tables import read_table
from atft_pipeline.storage.artifact import read_artifact as read_parquet

RECORD_TOLERANCE = 1e-4
"""Record and file hold the same float32 scores: figures differ only by the order of sums."""


def evaluation_asset(epochs: int) -> dg.AssetsDefinition:
    """`evaluation_{epochs}ep`."""
    name = f"evaluation_{epochs}ep"

    @dg.asset(
        name=name,
        group_name="evaluation",
        deps=[run_asset_key(epochs)],
        kinds={"numpy"},
        description=f"Sharpe, IC and the rest of the definition for the {epochs}-epoch run, validation and test,"
        " recomputed from its predictions file.",
        check_specs=[
            dg.AssetCheckSpec(
                "reproduces_record",
                asset=name,
                description="The figures recomputed from the predictions file are those the run recorded.",
            )
        ],
    )
    def evaluation(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        with as_dagster_failure(context):
            run_dir = recorded_run(context, epochs)
            evaluations = evaluate_run(run_dir)
            problems = differences_from_record(run_dir, evaluations)
            explained = attribution_metadata(run_dir, tuple(evaluations))
        figures = {f"{split}_{k}": v for split, e in evaluations.items() for k, v in e.values().items()}
        return dg.MaterializeResult(
            metadata={
                "run_dir": dg.MetadataValue.path(str(run_dir)),
                **numeric_metadata(figures),
                "statistics": markdown_table(statistics_table(evaluations)),
                **explained,
            },
            check_results=[check_result(context, "reproduces_record", problems, "all figures agree")],
        )

    return evaluation


def attribution_metadata(run_dir: Path, splits: Sequence[str]) -> dict[str, dg.MetadataValue]:
    """Where the run's return comes from as tables, and the pictures of its record."""
    from assets.judging.pictures import cumulative_return, embedded
    from atft_pipeline.diagnostics.diagnose import attributions
    from atft_pipeline.diagnostics.report.attribution_plots import draw_attributions
    from atft_pipeline.diagnostics.report.attribution_tables import attribution_tables, not_assessable
    from atft_pipeline.diagnostics.report.plots import draw
    from atft_pipeline.inspection.reader import open_record

    daily = {split: recorded_rows(run_dir, "daily", split) for split in splits}
    record = open_record(run_dir)
    attributed = attributions(record)
    pictures = draw(record) | draw_attributions(attributed)
    record.connection.close()
    return {
        **{metadata_key(title): markdown_table(rows) for title, rows in attribution_tables(attributed).items()},
        "not_assessable": markdown_table([{"missing": reason} for reason in not_assessable(attributed)]),
        "cumulative_return": embedded("Cumulative long-short return", cumulative_return(daily)),
        **{f"{metadata_key(title)}_plot": embedded(title, png) for title, png in pictures.items()},
    }


def metadata_key(title: str) -> str:
    return title.lower().replace(",", "").replace(" ", "_")


def evaluate_run(run_dir: Path) -> dict[str, Evaluation]:
    """Split -> evaluation of horizon 1 in the configured slice, from the last epoch's predictions, with bootstrap."""
    header = read_run(run_dir)
    config = from_dict(header["config"]).evaluation
    path = run_dir / "predictions" / f"epoch_{header['epochs_done']:03d}.parquet"
    table = read_parquet(path)
    return {
        split: evaluate_table(
            table,
            score="score_1d",
            target="target_1d",
            config=config,
            split=split,
            universe=marked_slice(config.universe),
            days_per_year=int(header["days_per_year"]),
            bootstrap=True,
        ).overall
        for split in SPLITS
    }


def recorded_rows(run_dir: Path, table: str, split: str) -> list[dict[str, Any]]:
    """What `evals` or `daily` hold for the last epoch and the slice that the run is judged on."""
    header = read_run(run_dir)
    wanted = (header["epochs_done"], split, from_dict(header["config"]).evaluation.universe)
    rows = read_table(run_dir, table).to_pylist()
    return [row for row in rows if (row["epoch"], row["split"], row["slice"]) == wanted]


def differences_from_record(run_dir: Path, evaluations: dict[str, Evaluation]) -> list[str]:
    """Where the recomputed figures differ from those the run recorded for the same epoch, split and slice."""
    problems = []
    for split, evaluation in evaluations.items():
        recorded = {row["metric"]: row["value"] for row in recorded_rows(run_dir, "evals", split)}
        for metric in ("sharpe_daily", "sharpe_daily_net", "ic_mean", "rank_ic_mean", "sessions"):
            now, then = evaluation.value(metric), recorded.get(metric)
            if not _agree(now, then):
                problems.append(f"{split} {metric}: recorded {then}, recomputed {now}")
    return problems


def _agree(now: float | None, then: float | None) -> bool:
    if now is None or then is None:
        return now is then
    return math.isclose(now, then, rel_tol=RECORD_TOLERANCE, abs_tol=RECORD_TOLERANCE)


def statistics_table(evaluations: dict[str, Evaluation]) -> list[dict[str, Any]]:
    """A row per statistic, a column per split, with units and standard errors."""
    first = next(iter(evaluations.values()))
    return [
        {"statistic": name, "unit": first.statistics[name].unit}
        | {split: e.statistics[name].value for split, e in evaluations.items()}
        | {f"{split} se": e.statistics[name].se for split, e in evaluations.items()}
        for name in first.statistics
    ]
