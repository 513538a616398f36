"""Ensemble scores of a run: with further seeds, the blend and smoothing where its config switches them on."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import dagster as dg

from assets.judging.checks import recorded_run
from assets.judging.evaluation import statistics_table
from assets.metadata import as_dagster_failure, markdown_table, numeric_metadata
from assets.training.training_run import model_key, run_asset_key, train_here
from atft_pipeline.errors import InputError
from atft_pipeline.storage.code_version import code_revision
from resources.compute import Compute
from resources.output_folders import OutputFolders

if TYPE_CHECKING:
    from atft_pipeline.ensemble.ensemble_scores import EnsembleScores


class EnsembleScoresConfig(dg.Config):
    seeds: int = 1
    """Runs to average: the recorded one and those of the following seeds, each trained where it is not yet."""
    blend: Literal["none", "lightgbm"] = "none"
    """What the network is blended with; the weight follows the validation sessions."""
    smoothing_sessions: int = 1
    """Span of the trailing average of each stock's scores; 1 leaves them as they are."""
    horizon_sessions: int = 1
    """1, 5, 10 or 20; above 1 the portfolio is held in tranches."""


def ensemble_scores_asset(epochs: int) -> dg.AssetsDefinition:
    """`ensemble_scores_{epochs}ep`."""
    name = ensemble_scores_name(epochs)

    @dg.asset(
        name=name,
        group_name="evaluation",
        deps=[run_asset_key(epochs), "ml_dataset"],
        kinds={"parquet", "lightgbm"},
        pool="gpu",
        description=f"Score of the {epochs}-epoch run for every stock and session, averaged over seeds, blended with"
        " LightGBM and smoothed where its config says so; evaluated beside its parts and exported as a table.",
    )
    def ensemble_scores(
        context: dg.AssetExecutionContext, config: EnsembleScoresConfig, store: OutputFolders, compute: Compute
    ) -> dg.MaterializeResult:
        from atft_pipeline.ensemble.ensemble import combine_runs, require_arguments
        from atft_pipeline.ensemble.export import write_ensemble_scores

        with as_dagster_failure(context):
            require_arguments(config.horizon_sessions, config.blend, config.smoothing_sessions)
            run_dir = recorded_run(context, epochs)
            compute.apply_threads()
            scores = combine_runs(
                [run_dir, *further_seeds(context, epochs, run_dir, config.seeds, store, compute)],
                horizon_sessions=config.horizon_sessions,
                blend=config.blend,
                smoothing_sessions=config.smoothing_sessions,
            )
            if scores.problems:
                raise InputError(f"{name}: the score cannot be ranked in {'; '.join(scores.problems)}")
            path = store.exports / f"{name}-{scores.manifest['fingerprint'][:12]}.parquet"
            write_ensemble_scores(scores, path)
        context.log.info(f"{name}: {scores.manifest['definition']}")
        return dg.MaterializeResult(
            metadata={"path": dg.MetadataValue.path(str(path)), **scores_metadata(scores)},
            data_version=dg.DataVersion(scores.manifest["fingerprint"]),
        )

    return ensemble_scores


def ensemble_scores_name(epochs: int) -> str:
    return f"ensemble_scores_{epochs}ep"


def scores_metadata(scores: "EnsembleScores") -> dict[str, Any]:
    """What the score is made of, and what it and its parts earn, as numbers and as tables."""
    manifest, rows = scores.manifest, scores.figures()
    figures = {
        f"{row['split']}_{row['part']}_{figure}": value
        for row in rows
        for figure, value in row.items()
        if figure not in ("split", "part")
    }
    weight = {} if manifest["weight"] is None else {"network_weight": manifest["weight"]["network"]}
    return {
        "definition": manifest["definition"],
        "dataset_fingerprint": manifest["dataset_fingerprint"],
        "runs": markdown_table(manifest["runs"]),
        **numeric_metadata(weight | figures),
        "figures": markdown_table(rows),
        "differences": markdown_table(scores.differences),
        "against_better_part": markdown_table(scores.against_better_part()),
        **{
            f"statistics_{split}": markdown_table(statistics_table(parts))
            for split, parts in scores.evaluations.items()
        },
    }


def further_seeds(
    context: dg.AssetExecutionContext, epochs: int, run_dir: Path, seeds: int, store: OutputFolders, compute: Compute
) -> list[Path]:
    """Run directories of the seeds that follow the one of `run_dir`, `seeds` runs with it; trained or reused.

    Raises InputError, before any is trained, for fewer than one seed, where the recorded run cannot be exported itself,
    and where the code is no longer the one that trained it.
    """
    from atft_pipeline.ensemble.members import read_finished_run
    from atft_pipeline.training.plan import plan_run

    name = ensemble_scores_name(epochs)
    if seeds < 1:
        raise InputError(f"{name}: seeds: expected at least 1, found {seeds}")
    run = read_finished_run(run_dir)
    header, recorded = run.header, run.config
    if seeds > 1 and header["code_revision"] != (code := code_revision("run")):
        raise InputError(
            f"{name}: {run_dir} was trained by code {header['code_revision']}, this is {code}; materialize"
            f" {run_asset_key(epochs).to_user_string()} again, seeds are averaged only where nothing else differs"
        )
    seed_dirs = []
    for seed in range(recorded.train.seed + 1, recorded.train.seed + seeds):
        settings = replace(recorded, train=replace(recorded.train, seed=seed))
        dataset, graph = Path(header["dataset_path"]), Path(header["graph_path"])
        plan = plan_run(settings, dataset, graph, header.get("processes", 1))
        seed_dir = store.runs / f"{model_key(epochs).to_user_string()}-{plan.key}"
        outcome = train_here(context, compute, plan, seed_dir, overrides=header["overrides"] | {"train.seed": seed})
        seed_dirs.append(outcome.run_dir)
    return seed_dirs
