"""The comparison asset over real runs and baselines of a tiny market, and its check on planted ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dagster_runs import EVER, UPSTREAM, UPSTREAM_CONFIG, copied, failures, make, outcomes, training, working_in

import assets.judging.comparison
from atft_pipeline.runs.tables import TABLES
from resources.output_folders import OutputFolders

pytestmark = pytest.mark.slow(reason="assets made in this process")

CHECK = "comparison:no_identical_figures"
CONFIG = {"train.universe": "all", "evaluation.universe": "all"}
Rows = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def sound(upstream: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dg.DagsterInstance, Any]]:
    """A folder with runs of 5 and 20 epochs and the baselines, its history, and the comparison made in that job."""
    folder = copied(upstream, tmp_path_factory.mktemp("compared"))
    with working_in(folder), dg.DagsterInstance.ephemeral() as instance:
        ops = UPSTREAM_CONFIG | training(5, EVER, CONFIG) | training(20, EVER, CONFIG)
        ops |= {"baselines": {"config": {"overrides": CONFIG}}}
        runs = 'key:"training_run_5ep" or key:"training_run_20ep" or key:"evaluation_20ep"'
        result = make(f'{UPSTREAM} or {runs} or key:"baselines" or key:"comparison"', instance, ops)
        assert result.success, failures(result)
        yield folder, instance, result


@pytest.fixture
def work(sound: tuple[Path, dg.DagsterInstance, Any], tmp_path: Path) -> Iterator[Path]:
    """A copy of the folder to spoil, as the working directory: the history names its runs by relative paths."""
    with working_in(copied(sound[0], tmp_path / "work")) as folder:
        yield folder


def table(result: Any) -> Rows:
    """The comparison's table by the name of its rows."""
    (event,) = [e for e in result.get_asset_materialization_events() if e.asset_key == dg.AssetKey("comparison")]
    lines = event.materialization.metadata["comparison"].value.splitlines()
    header, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_the_table_shows_runs_and_baselines_side_by_side(sound: tuple[Path, dg.DagsterInstance, Any]) -> None:
    folder, _, result = sound
    rows = table(result)
    assert list(rows) == ["5 epochs", "20 epochs", "50 epochs", "120 epochs", "lightgbm", "ridge", "reversal"]
    states = {name: row["state"].split(":")[0] for name, row in rows.items()}
    assert states == dict.fromkeys(rows, "finished") | {"50 epochs": "missing", "120 epochs": "missing"}
    assert "never materialized" in rows["50 epochs"]["state"]
    assert all(cell for row in rows.values() for cell in row.values())
    (run,) = (folder / "output" / "runs").glob("model_20ep-*")
    final = json.loads((run / "verdict.json").read_text())["final"]["validation"]["sharpe_daily"]
    assert rows["20 epochs"]["Sharpe, validation"].startswith(f"{final:.3f} ± ")
    assert rows["20 epochs"]["expected"] == "0.10 to 0.15 at epoch 20"
    assert rows["ridge"]["gradient warnings (0)"] == "not applicable"
    check = outcomes(result)[CHECK]
    assert check.passed
    assert check.severity == dg.AssetCheckSeverity.ERROR


def test_the_evaluation_shows_costs_capacity_and_exposures(sound: tuple[Path, dg.DagsterInstance, Any]) -> None:
    _, _, result = sound
    (event,) = [e for e in result.get_asset_materialization_events() if e.asset_key == dg.AssetKey("evaluation_20ep")]
    metadata = event.materialization.metadata
    assert "net of 5 bps" in metadata["costs_and_turnover"].value
    assert "test | all | " in metadata["capacity_by_liquidity"].value
    assert metadata["not_assessable"].value == "_no rows_"
    for name in ("sharpe_after_costs", "capacity_by_liquidity", "market_exposure", "size_tilt", "net_sector_weights"):
        assert metadata[f"{name}_plot"].value.startswith("![")


def spoil(run: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    for part in (run / "evals").glob("*.parquet"):
        rows = [change(row) for row in pq.read_table(part).to_pylist()]
        pq.write_table(pa.Table.from_pylist(rows, TABLES["evals"]), part)


def test_a_figure_copied_from_another_run_fails_the_check(
    work: Path, sound: tuple[Path, dg.DagsterInstance, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    short, long = (next((work / "output" / "runs").glob(f"model_{n}ep-*")) for n in (5, 20))
    key = ("sharpe_daily", "validation", "all")
    copied = next(
        row["value"]
        for row in pq.read_table(short / "evals" / "epoch_005.parquet").to_pylist()
        if (row["metric"], row["split"], row["slice"]) == key
    )
    spoil(
        long,
        lambda row: (
            row | {"value": copied} if (row["metric"], row["split"], row["slice"], row["epoch"]) == (*key, 20) else row
        ),
    )
    result = make('key:"comparison"', sound[1])
    check = outcomes(result)[CHECK]
    assert not check.passed
    assert check.severity == dg.AssetCheckSeverity.ERROR
    assert result.success, "it names the fault; nothing waits for it"
    assert f"sharpe_daily {copied!r} (validation, all)" in str(check.description)
    assert "5 epochs epoch" in str(check.description), "the run it was read from"
    assert "20 epochs epoch" in str(check.description), "and the run it was filed under"
    assert str(check.description) in capfd.readouterr().err


def test_predictions_of_another_run_fail_the_check(work: Path, sound: tuple[Path, dg.DagsterInstance, Any]) -> None:
    for run in (work / "output" / "runs").glob("model_*ep-*"):
        spoil(run, lambda row: row | {"predictions_hash": "copied"} if row["epoch"] == 5 else row)
    check = outcomes(make('key:"comparison"', sound[1]))[CHECK]
    assert not check.passed
    assert "predictions_hash copied (validation)" in str(check.description)


def test_what_is_of_other_data_or_gone_says_so(work: Path, sound: tuple[Path, dg.DagsterInstance, Any]) -> None:
    (stored,) = (work / "output" / "datasets").glob("baselines_*[0-9a-f].json")
    stored.write_text(json.dumps(json.loads(stored.read_text()) | {"dataset_fingerprint": "d" * 16}))
    shutil.rmtree(next((work / "output" / "runs").glob("model_5ep-*")))
    (run,) = (work / "output" / "runs").glob("model_20ep-*")
    header = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(header | {"status": "failed", "reason": "RunFailure: loss"}))
    rows = table(make('key:"comparison"', sound[1]))
    assert rows["5 epochs"]["state"].startswith("missing: ")
    assert rows["20 epochs"]["state"] == "unfinished: 20 of 20 epochs: RunFailure: loss"
    assert rows["ridge"]["state"].startswith("stale: fitted on dataset dddddddddddd")
    assert {rows[name]["Sharpe, validation"] for name in ("5 epochs", "20 epochs", "ridge")} == {
        "missing",
        "unfinished",
        "stale",
    }


def test_baselines_are_stored_once_per_data_and_split(tmp_path: Path) -> None:
    store = OutputFolders(output=str(tmp_path / "output"))
    assert store.baselines() is None
    content = {"dataset_fingerprint": "d1", "split": {"scheme": "fraction"}, "evaluation": {}, "seed": 0, "models": {}}
    first = store.keep_baselines(content)
    assert store.keep_baselines(content | {"runtime_s": 1.0}) == first
    assert store.keep_baselines(content | {"seed": 1}) != first
    assert store.baselines() == {"kind": "baselines", **content, "seed": 1}


def test_a_long_run_that_trains_beside_the_comparison_is_not_read_from_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(assets.judging.comparison, "recorded_run", lambda *_: Path("run"))
    monkeypatch.setattr(assets.judging.comparison, "last_materialization", lambda *_: {"run_id": "earlier"})

    def read(selected: set[dg.AssetKey], run_id: str, epochs: int = 120) -> Path | str:
        layer = SimpleNamespace(selected_asset_keys=selected)
        context: Any = SimpleNamespace(job_def=SimpleNamespace(asset_layer=layer), instance=None, run_id=run_id)
        return assets.judging.comparison._run(context, epochs)

    training_now = {dg.AssetKey("training_run_120ep")}
    assert "in training in this very run" in str(read(training_now, "now"))
    assert read(training_now, "earlier") == read(set(), "now") == read(training_now, "now", 20) == Path("run")
