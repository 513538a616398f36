"""`ensemble_scores_5ep`: every field changes the score, further seeds are further runs, a refusal is one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
import pytest
from dagster_runs import EVER, copied, failures, make, training, working_in

from atft_pipeline.config.schema import EvaluationConfig
from atft_pipeline.evaluation.predictions_table import evaluate_file
from atft_pipeline.runs.header import read_run

pytestmark = pytest.mark.slow(reason="assets made in this process")

ENSEMBLE_SCORES = 'key:"ensemble_scores_5ep"'
RUN = 'key:"training_run_5ep"'

Folder = tuple[Path, dg.DagsterInstance]


@pytest.fixture(scope="module")
def folder(upstream: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folder]:
    """A folder in which a run of five epochs was made, as the working directory."""
    checkout = copied(upstream, tmp_path_factory.mktemp("ensemble_scores"))
    with working_in(checkout) as path, dg.DagsterInstance.ephemeral() as instance:
        assert make(RUN, instance, training(5, EVER)).success
        yield path, instance


def scored(instance: dg.DagsterInstance, **config: Any) -> dict[str, Any]:
    """Metadata of one materialization of `ensemble_scores_5ep`."""
    result = make(ENSEMBLE_SCORES, instance, {"ensemble_scores_5ep": {"config": config}})
    assert result.success, failures(result)
    (event,) = result.get_asset_materialization_events()
    return {name: value.value for name, value in event.materialization.metadata.items()}


def run_dirs(path: Path) -> list[Path]:
    return sorted((path / "output" / "runs").iterdir())


def test_without_a_field_the_run_s_own_score_is_exported(folder: Folder) -> None:
    path, instance = folder
    said = scored(instance)
    assert said["definition"] == "horizon 1: z-scores per session of seed 1"
    verdict = json.loads((run_dirs(path)[0] / "verdict.json").read_text())
    for split in ("validation", "test"):
        for name in ("ic_mean", "turnover_mean"):
            assert said[f"{split}_ensemble_{name}"] == pytest.approx(verdict["final"][split][name], rel=1e-4)
    assert len(run_dirs(path)) == 1


def test_seeds_blend_and_smoothing_are_made_evaluated_and_reused(folder: Folder) -> None:
    path, instance = folder
    config = {"seeds": 2, "blend": "lightgbm", "smoothing_sessions": 3, "horizon_sessions": 5}
    said = scored(instance, **config)
    runs = {read_run(run)["seed"]: read_run(run) for run in run_dirs(path)}
    assert set(runs) == {1, 2}
    assert runs[2]["status"] == "finished"
    assert runs[2]["overrides"] == runs[1]["overrides"] | {"train.seed": 2}
    assert runs[2]["name"] == f"model_5ep-{runs[2]['key']}"
    table = pq.read_table(said["path"])
    parts = ("seed_1", "seed_2", "network", "lightgbm", "blend")
    assert {f"score_5d_{part}" for part in parts} < set(table.column_names)
    figures = evaluate_file(Path(said["path"]), EvaluationConfig(cost_bps=5.0), split="test", universe="liquid")
    assert said["test_ensemble_sharpe_net_5bps"] == pytest.approx(figures["sharpe_daily_net"], rel=1e-9)
    assert 0.0 <= said["network_weight"] <= 1.0
    for name in ("figures", "differences", "against_better_part", "statistics_validation", "statistics_test"):
        assert said[name].startswith("| ")
    started = runs[2]["started"]
    assert scored(instance, **config)["path"] == said["path"]
    assert {read_run(run)["seed"]: read_run(run)["started"] for run in run_dirs(path)}[2] == started


def test_every_field_changes_the_ensemble_score(folder: Folder) -> None:
    _, instance = folder
    tables = [
        pq.read_table(scored(instance, **config)["path"])
        for config in ({}, {"seeds": 2}, {"blend": "lightgbm"}, {"smoothing_sessions": 2}, {"horizon_sessions": 5})
    ]
    scores = [table[next(n for n in ("score_1d", "score_5d") if n in table.column_names)] for table in tables]
    for n, score in enumerate(scores):
        for other in scores[:n]:
            assert not score.equals(other)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"seeds": 0}, "ensemble_scores_5ep: seeds: expected at least 1, found 0"),
        ({"seeds": 4, "smoothing_sessions": 0}, "smoothing: expected a span of at least 1 session, found 0"),
        ({"seeds": 4, "horizon_sessions": 2}, "horizon: expected one of 1, 5, 10, 20, found 2"),
    ],
)
def test_a_field_out_of_range_is_one_sentence_before_anything_is_trained(
    folder: Folder, config: dict[str, Any], sentence: str
) -> None:
    path, instance = folder
    before = run_dirs(path)
    assert failures(make(ENSEMBLE_SCORES, instance, {"ensemble_scores_5ep": {"config": config}})) == {
        "ensemble_scores_5ep": sentence
    }
    assert run_dirs(path) == before


def test_an_unknown_blend_is_no_configuration(folder: Folder) -> None:
    _, instance = folder
    with pytest.raises(dg.DagsterInvalidConfigError, match="blend"):
        make(ENSEMBLE_SCORES, instance, {"ensemble_scores_5ep": {"config": {"blend": "ridge"}}})


def test_seeds_of_other_code_are_refused_before_they_are_trained(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, instance = folder
    before = run_dirs(path)
    monkeypatch.setattr("assets.judging.ensemble_scores.code_revision", lambda _: "other")
    sentence = failures(make(ENSEMBLE_SCORES, instance, {"ensemble_scores_5ep": {"config": {"seeds": 3}}}))[
        "ensemble_scores_5ep"
    ]
    assert "this is other; materialize training_run_5ep again" in sentence
    assert run_dirs(path) == before


def test_without_a_run_the_sentence_says_how_to_make_one(folder: Folder) -> None:
    _, instance = folder
    assert (
        "training_run_20ep was never materialized"
        in failures(make('key:"ensemble_scores_20ep"', instance))["ensemble_scores_20ep"]
    )
