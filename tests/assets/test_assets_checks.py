"""Every asset check holds on sound data, and each has a fault that makes it fail."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pytest
from dagster_runs import EVER, NEVER, UPSTREAM_CONFIG, copied, failures, made, make, outcomes, training, working_in

import assets.data.graph
from assets.data.dataset import drift_result
from assets.judging.checks import criterion_result, health_result, milestones_result
from assets.judging.evaluation import recorded_rows
from atft_pipeline.config.schema import GraphConfig
from atft_pipeline.dataset import store
from atft_pipeline.market import price_store
from atft_pipeline.market.sources import RAW_TABLES
from atft_pipeline.storage.artifact import write_manifest

pytestmark = pytest.mark.slow(reason="assets made in this process")

RAW = "group:raw"
RUN = dg.AssetKey("training_run_20ep")
MODEL = dg.AssetKey("model_20ep")
ALL_UPSTREAM = 'group:raw or key:"prices" or key:"ml_dataset" or key:"stock_graph"'


@pytest.fixture(scope="module")
def sound(
    upstream: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, dg.AssetCheckEvaluation]]]:
    """A folder in which everything up to a passed and explained model_20ep was made, and what its checks said."""
    folder = copied(upstream, tmp_path_factory.mktemp("sound"))
    with working_in(folder), dg.DagsterInstance.ephemeral() as instance:
        again = make(ALL_UPSTREAM, instance, UPSTREAM_CONFIG)
        run = make('key:"model_20ep" or key:"training_run_20ep" or key:"evaluation_20ep"', instance, training(20, EVER))
        assert again.success
        assert run.success
        yield folder, outcomes(again) | outcomes(run)


@pytest.fixture
def work(sound: tuple[Path, dict[str, dg.AssetCheckEvaluation]], tmp_path: Path) -> Iterator[Path]:
    """A copy of the sound folder to damage, as the working directory."""
    with working_in(copied(sound[0], tmp_path / "work")) as folder:
        yield folder


def linked(work: Path) -> dict[str, str]:
    """The products that the links name."""
    return {path.name: str(path.readlink()) for path in (work / "output" / "datasets").iterdir() if path.is_symlink()}


def test_every_check_passes_on_sound_data(sound: tuple[Path, dict[str, dg.AssetCheckEvaluation]]) -> None:
    _, checks = sound
    assert {name: check.passed for name, check in checks.items() if name != "training_run_20ep:milestones"} == {
        **{f"raw_{table}:contract": True for table in RAW_TABLES},
        "prices:contract": True,
        "prices:universe_not_empty": True,
        "prices:listed_is_point_in_time": True,
        "ml_dataset:contract": True,
        "ml_dataset:live_features": True,
        "ml_dataset:null_share": True,
        "ml_dataset:drift": True,
        "stock_graph:belongs_to_dataset": True,
        "model_20ep:success_criterion": True,
        "training_run_20ep:training_health": True,
        "evaluation_20ep:reproduces_record": True,
    }
    assert "training_run_20ep:milestones" in checks


# Raw tables ----------------------------------------------------------------------------------------------------


def test_a_repeated_row_breaks_the_contract_of_each_raw_table(
    work: Path, instance: dg.DagsterInstance, capfd: pytest.CaptureFixture[str]
) -> None:
    for table in RAW_TABLES:
        file = work / "source" / f"{table}.parquet"
        frame = pl.read_parquet(file)
        pl.concat([frame, frame.tail(1)]).write_parquet(file)
    result = make(RAW, instance)
    assert not result.success
    errors = [line for line in capfd.readouterr().err.splitlines() if " - ERROR - " in line]
    for table in RAW_TABLES:
        check = outcomes(result)[f"raw_{table}:contract"]
        assert not check.passed
        assert check.severity == dg.AssetCheckSeverity.ERROR
        assert f"{table} in " in str(check.description)
        assert f"{table}.parquet" in str(check.description)
        assert any(str(check.description) in line for line in errors)


def test_a_broken_raw_table_keeps_prices_from_starting_and_the_old_ones_in_place(
    work: Path, instance: dg.DagsterInstance
) -> None:
    file = work / "source" / "prices.parquet"
    frame = pl.read_parquet(file)
    pl.concat([frame, frame.tail(1)]).write_parquet(file)
    before = linked(work)
    result = make(ALL_UPSTREAM, instance, UPSTREAM_CONFIG)
    assert not result.success
    assert not {"prices", "ml_dataset", "stock_graph"} & made(result)
    assert linked(work) == before


def test_absent_optional_tables_warn_and_are_counted_as_not_live(work: Path, instance: dg.DagsterInstance) -> None:
    for table in ("investor_flows", "statements"):
        (work / "source" / f"{table}.parquet").unlink()
    result = make(ALL_UPSTREAM, instance, UPSTREAM_CONFIG)
    assert result.success
    checks = outcomes(result)
    for name in ("raw_investor_flows:contract", "raw_statements:contract", "ml_dataset:live_features"):
        assert not checks[name].passed
        assert checks[name].severity == dg.AssetCheckSeverity.WARN
    live = checks["ml_dataset:live_features"]
    assert live.metadata["live"].value < live.metadata["expected"].value == 82
    assert f"{live.metadata['live'].value} of 82 live; without values: " in str(live.description)


# Prices --------------------------------------------------------------------------------------------------------


def test_unsorted_prices_break_their_contract_and_are_not_published(
    work: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = price_store.build_prices

    def reversed_rows(*arguments: Any) -> Any:
        result = build(*arguments)
        vars(result)["prices"] = result.prices.reverse()
        return result

    monkeypatch.setattr(price_store, "build_prices", reversed_rows)
    monkeypatch.setattr(price_store, "code_revision", lambda _: "other code: nothing is taken over")
    before = linked(work)
    result = make('key:"prices" or key:"ml_dataset"', instance)
    assert not outcomes(result)["prices:contract"].passed
    assert "sort and deduplicate" in str(outcomes(result)["prices:contract"].description)
    assert "ml_dataset" not in made(result)
    assert linked(work) == before


def test_no_investable_stock_fails_universe_not_empty(work: Path, instance: dg.DagsterInstance) -> None:
    before = linked(work)
    ops = {"prices": {"config": {"overrides": {"dataset.min_history_sessions": 10_000}}}}
    result = make('key:"prices" or key:"ml_dataset"', instance, ops)
    assert not outcomes(result)["prices:universe_not_empty"].passed
    assert "ml_dataset" not in made(result)
    assert linked(work) == before


def test_sectors_from_a_later_snapshot_warn(work: Path, instance: dg.DagsterInstance) -> None:
    file = work / "source" / "listed.parquet"
    listed = pl.read_parquet(file)
    listed.filter(pl.col("Date") == listed["Date"].max()).write_parquet(file)
    result = make('key:"prices"', instance)
    assert result.success
    check = outcomes(result)["prices:listed_is_point_in_time"]
    assert not check.passed
    assert check.severity == dg.AssetCheckSeverity.WARN
    assert check.metadata["rows"].value > 0


# Dataset and graph ---------------------------------------------------------------------------------------------


def test_an_infinite_feature_breaks_the_contract_of_ml_dataset(
    work: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = store.build_features

    def with_infinity(*arguments: Any) -> Any:
        panel = build(*arguments)
        panel.values[0, -1] = np.inf
        return panel

    monkeypatch.setattr(store, "build_features", with_infinity)
    monkeypatch.setattr(store, "code_revision", lambda _: "other code: nothing is taken over")
    before = linked(work)
    result = make('key:"ml_dataset" or key:"stock_graph"', instance)
    assert not outcomes(result)["ml_dataset:contract"].passed
    assert "stock_graph" not in made(result)
    assert linked(work) == before


def test_a_graph_without_edges_does_not_belong_to_the_dataset(
    work: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = assets.data.graph.build_graph_file

    def without_edges(dataset: Path, out: Path, config: GraphConfig, previous: Path | None) -> None:
        write_manifest(out, build(dataset, out, config, previous) | {"edges": 0})

    monkeypatch.setattr(assets.data.graph, "build_graph_file", without_edges)
    before = linked(work)
    ops = {"stock_graph": {"config": {"overrides": {"graph.lookback_sessions": 80}}}}
    result = make('key:"stock_graph" or key:"model_5ep"', instance, ops | training(5, EVER))
    assert not result.success
    assert "no edges" in str(outcomes(result)["stock_graph:belongs_to_dataset"].description)
    assert "model_5ep" not in made(result)
    assert linked(work) == before


def test_a_graph_of_another_dataset_does_not_belong_to_it() -> None:
    dataset = {"fingerprint": "new", "sessions": 10}
    graph = {"dataset_fingerprint": "old", "edges": 5, "refresh_dates": 2}
    assert assets.data.graph.graph_problems(graph | {"dataset_fingerprint": "new"}, dataset) == []
    (problem,) = assets.data.graph.graph_problems(graph, dataset)
    assert "another dataset" in problem


# The run -------------------------------------------------------------------------------------------------------


@pytest.fixture
def verdict(sound: tuple[Path, dict[str, dg.AssetCheckEvaluation]]) -> dict[str, Any]:
    (run_dir,) = (sound[0] / "output" / "runs").iterdir()
    return dict(json.loads((run_dir / "verdict.json").read_text()))


@pytest.mark.parametrize(
    ("status", "passes"), [("passed", True), ("not_applicable", True), ("failed", False), ("invalid", False)]
)
def test_success_criterion_follows_the_status_of_the_verdict(
    verdict: dict[str, Any], status: str, passes: bool
) -> None:
    result = criterion_result(verdict | {"status": status, "summary": f"{status}: said"}, MODEL)
    assert (result.passed, result.description) == (passes, f"{status}: said")


def test_failed_criterion_fails_the_run_but_not_its_explanation(work: Path, instance: dg.DagsterInstance) -> None:
    selection = 'key:"model_20ep" or key:"training_run_20ep" or key:"evaluation_20ep" or key:"diagnostics_20ep"'
    result = make(selection, instance, training(20, NEVER))
    assert not result.success
    assert not outcomes(result)["model_20ep:success_criterion"].passed
    assert made(result) == {"model_20ep", "training_run_20ep", "evaluation_20ep", "diagnostics_20ep"}
    assert list((work / "output" / "runs").glob("*/report.html"))


def test_training_health_fails_on_an_item_that_failed_or_was_not_measured(verdict: dict[str, Any]) -> None:
    assert health_result(verdict, RUN).passed
    for passed in (False, None):
        broken = {**verdict["health"][0], "passed": passed, "explanation": "as planted"}
        result = health_result(verdict | {"health": [broken, *verdict["health"][1:]]}, RUN)
        assert not result.passed
        assert result.severity == dg.AssetCheckSeverity.ERROR
        assert result.description == f"{broken['name']}: as planted"
    assert not health_result(verdict | {"health": []}, RUN).passed


def test_milestones_warn_when_missed(verdict: dict[str, Any]) -> None:
    reached = [item | {"passed": True} for item in verdict["milestones"]]
    assert milestones_result(verdict | {"milestones": reached}, RUN).passed
    missed = [*reached[1:], reached[0] | {"passed": False, "value": None}]
    result = milestones_result(verdict | {"milestones": missed}, RUN)
    assert not result.passed
    assert result.severity == dg.AssetCheckSeverity.WARN
    assert "nothing measured" in str(result.description)


def judged_again(work: Path, change: Callable[[dict[str, Any]], None], instance: dg.DagsterInstance) -> dict[str, Any]:
    """The checks of the sound run after its verdict was changed on disk."""
    (run_dir,) = (work / "output" / "runs").iterdir()
    header = json.loads((run_dir / "run.json").read_text())
    content = json.loads((run_dir / "verdict.json").read_text())
    change(content)
    (run_dir / "verdict.json").write_text(json.dumps(content))
    metadata = {"run_dir": str(run_dir), "run_key": header["key"]}
    instance.report_runless_asset_event(dg.AssetMaterialization(RUN, metadata=metadata))
    return outcomes(make(dg.AssetSelection.checks_for_assets(MODEL, RUN), instance))


def test_checks_read_the_verdict_of_the_run_they_judge(work: Path, instance: dg.DagsterInstance) -> None:
    def fail_all(verdict: dict[str, Any]) -> None:
        verdict["status"] = "invalid"
        verdict["health"][0]["passed"] = False
        verdict["milestones"][0]["passed"] = False

    checks = judged_again(work, fail_all, instance)
    assert {name: check.passed for name, check in checks.items()} == {
        "model_20ep:success_criterion": False,
        "training_run_20ep:training_health": False,
        "training_run_20ep:milestones": False,
    }


def test_a_reused_run_is_judged_again(work: Path, instance: dg.DagsterInstance) -> None:  # noqa: ARG001
    result = make('key:"model_20ep"', instance, training(20, EVER))
    (event,) = [e for e in result.get_asset_materialization_events() if e.asset_key == MODEL]
    assert event.materialization.metadata["reused"].value is True
    assert outcomes(result)["model_20ep:success_criterion"].passed


def evaluated(run_dir: Path, instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    header = json.loads((run_dir / "run.json").read_text())
    metadata = {"run_dir": str(run_dir), "run_key": header["key"]}
    instance.report_runless_asset_event(dg.AssetMaterialization(RUN, metadata=metadata))
    return make('key:"evaluation_20ep"', instance)


def test_tampered_predictions_do_not_reproduce_the_record(work: Path, instance: dg.DagsterInstance) -> None:
    (run_dir,) = (work / "output" / "runs").iterdir()
    file = run_dir / "predictions" / "epoch_020.parquet"
    predictions = pl.read_parquet(file)
    predictions.with_columns(score_1d=pl.col("target_1d").fill_null(0.0).cast(pl.Float32)).write_parquet(file)
    check = outcomes(evaluated(run_dir, instance))["evaluation_20ep:reproduces_record"]
    assert not check.passed
    assert "validation sharpe_daily: recorded " in str(check.description)


def test_constant_predictions_are_not_evaluated_silently(work: Path, instance: dg.DagsterInstance) -> None:
    (run_dir,) = (work / "output" / "runs").iterdir()
    file = run_dir / "predictions" / "epoch_020.parquet"
    pl.read_parquet(file).with_columns(score_1d=pl.lit(1.0, pl.Float32)).write_parquet(file)
    check = outcomes(evaluated(run_dir, instance))["evaluation_20ep:reproduces_record"]
    assert not check.passed


def test_a_run_judged_on_all_stocks_is_evaluated_on_all_stocks(work: Path, instance: dg.DagsterInstance) -> None:
    everywhere = {"train.universe": "all", "evaluation.universe": "all"}
    selection = 'key:"training_run_5ep" or key:"evaluation_5ep"'
    result = make(selection, instance, training(5, EVER, everywhere))
    assert outcomes(result)["evaluation_5ep:reproduces_record"].passed
    (run_dir,) = (work / "output" / "runs").glob("model_5ep-*")
    assert {row["slice"] for row in recorded_rows(run_dir, "daily", "validation")} == {"all"}
    (event,) = [e for e in result.get_asset_materialization_events() if e.asset_key == dg.AssetKey("evaluation_5ep")]
    metadata = event.materialization.metadata
    assert isinstance(metadata["validation_sharpe_daily"], dg.FloatMetadataValue)
    assert str(metadata["statistics"].value).startswith("| statistic | unit | validation | test |")
    assert str(metadata["cumulative_return"].value).startswith("![Cumulative long-short return](data:image/png;base64,")


def test_a_run_directory_that_is_gone_or_another_run_is_refused(work: Path, instance: dg.DagsterInstance) -> None:
    (run_dir,) = (work / "output" / "runs").iterdir()
    instance.report_runless_asset_event(
        dg.AssetMaterialization(RUN, metadata={"run_dir": str(run_dir), "run_key": "another"})
    )
    assert "expected another; train again" in failures(make('key:"evaluation_20ep"', instance))["evaluation_20ep"]
    instance.report_runless_asset_event(
        dg.AssetMaterialization(RUN, metadata={"run_dir": str(work / "gone"), "run_key": "another"})
    )
    assert "no run.json" in failures(make('key:"evaluation_20ep"', instance))["evaluation_20ep"]


def test_explaining_a_run_beside_its_training_needs_the_record_selected(
    work: Path,  # noqa: ARG001
    instance: dg.DagsterInstance,
) -> None:
    """Without the record's key nothing makes evaluation wait for the training: it would evaluate the run before."""
    result = make('key:"model_20ep" or key:"evaluation_20ep"', instance, training(20, EVER))
    assert "select training_run_20ep too" in failures(result)["evaluation_20ep"]


def test_a_record_reported_by_hand_without_its_run_is_refused(work: Path, instance: dg.DagsterInstance) -> None:  # noqa: ARG001
    instance.report_runless_asset_event(dg.AssetMaterialization(RUN))
    assert "train again" in failures(make('key:"evaluation_20ep"', instance))["evaluation_20ep"]


# Drift against the dataset before ------------------------------------------------------------------------------


def test_more_nulls_and_a_moved_feature_warn_by_name(work: Path, instance: dg.DagsterInstance) -> None:
    """From a day on volumes are missing, and some stocks have a range far above the rest."""
    file = work / "source" / "prices.parquet"
    frame = pl.read_parquet(file)
    late = pl.col("Date") > frame["Date"].unique().sort()[60]
    frame.with_columns(
        pl.when(late & pl.col("Code").str.contains("^2[13579]"))
        .then(pl.col("High") * 1.4)
        .otherwise("High")
        .alias("High"),
        pl.when(late).then(None).otherwise("Volume").alias("Volume"),
    ).write_parquet(file)
    result = make('key:"prices" or key:"ml_dataset"', instance)
    assert result.success
    nulls, drift = (outcomes(result)[f"ml_dataset:{name}"] for name in ("null_share", "drift"))
    assert not nulls.passed
    assert nulls.severity == dg.AssetCheckSeverity.WARN
    assert "volume_ratio_20" in str(nulls.description)
    assert nulls.metadata["compared_with"].value != "nothing"
    assert not drift.passed
    assert drift.severity == dg.AssetCheckSeverity.WARN
    assert "parkinson_volatility_20d" in str(drift.description)


def test_a_feature_whose_mean_moves_is_named() -> None:
    still = {"mean_shift": 0.1, "std_log_ratio": -0.1, "tail_shift": 0.2, "null_share_change": 0.0}
    for name in ("mean_shift", "std_log_ratio", "tail_shift"):
        manifest = {"drift_against": "f" * 64, "drift": {"returns_1d": still, "rsi_14": still | {name: -0.9}}}
        result = drift_result(manifest)
        assert not result.passed
        assert str(result.description).endswith("rsi_14")
        assert drift_result(manifest | {"drift": {"returns_1d": still}}).passed
    unknown = drift_result({"drift_against": None, "drift": {}})
    assert "nothing known of drift" in str(unknown.description)
