"""Bad input through Dagster: one clear sentence before any stack trace, a failed run, earlier outputs as they were.

`test_assets_processes` asserts that the process of such a run exits 1 and prints this sentence first.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
from dagster_runs import (
    EVER,
    UPSTREAM,
    UPSTREAM_CONFIG,
    copied,
    failures,
    first_error,
    make,
    training,
    working_in,
)

MODEL = 'key:"model_5ep"'


@pytest.fixture
def work(upstream: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy to damage, as the working directory; no variable is set but the source's."""
    with working_in(copied(upstream, tmp_path / "work")) as folder:
        yield folder


def outputs(work: Path) -> dict[str, str]:
    """What lies in the datasets folder: links with their targets, files with their sizes."""
    return {
        str(path.relative_to(work)): str(path.readlink()) if path.is_symlink() else str(path.stat().st_size)
        for path in sorted((work / "output").rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def edit(table: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> Callable[[Path], None]:
    def damage(source: Path) -> None:
        file = source / f"{table}.parquet"
        change(pl.read_parquet(file)).write_parquet(file)

    return damage


def truncate(source: Path) -> None:
    file = source / "prices.parquet"
    file.write_bytes(file.read_bytes()[:-1000])


DAMAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "missing folder": (shutil.rmtree, ("source is not a folder",)),
    "missing table": (lambda s: (s / "listed.parquet").unlink(), ("listed: table not found", "listed.parquet")),
    "missing column": (edit("prices", lambda f: f.drop("Volume")), ("Volume is missing", "prices.parquet")),
    "wrong type": (
        edit("prices", lambda f: f.with_columns(Close=pl.lit("dear"))),
        ("column Close", "prices.parquet", "'dear'"),
    ),
    "empty table": (edit("index", lambda f: f.clear()), ("index: no rows", "index.parquet")),
    "truncated file": (truncate, ("prices.parquet cannot be read as parquet",)),
    "duplicate keys": (edit("prices", lambda f: pl.concat([f, f.tail(1)])), ("prices in ", "prices.parquet")),
    "dates out of order": (edit("prices", lambda f: f.reverse()), ("prices in ", "prices.parquet")),
    "no price at all": (
        edit("prices", lambda f: f.with_columns(pl.lit(None, pl.Float64).alias("Close"))),
        ("column Close holds no value", "prices.parquet"),
    ),
    "one stock": (
        edit("prices", lambda f: f.filter(pl.col("Code") == f["Code"][0])),
        ("one stock only", "prices.parquet"),
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_source_is_one_sentence_and_changes_nothing(
    work: Path, instance: dg.DagsterInstance, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    damage, named = DAMAGES[name]
    damage(work / "source")
    before = outputs(work)
    capfd.readouterr()
    result = make(UPSTREAM, instance, UPSTREAM_CONFIG)
    assert not result.success
    line = first_error(capfd.readouterr().err)
    assert " - ERROR - " in line
    for text in named:
        assert text in line
    assert outputs(work) == before


@pytest.mark.parametrize(
    ("selection", "ops", "said"),
    [
        ('key:"prices"', {"prices": {"dataset.executon": "x"}}, "unknown field 'dataset.executon'"),
        ('key:"prices"', {"prices": {"model.hidden_size": 8}}, "prices: override 'model.hidden_size' has no effect"),
        ('key:"stock_graph"', {"stock_graph": {"graph.lookback": 60}}, "unknown field 'graph.lookback'"),
        (MODEL, {"train_5ep": {"model.hidden": 8}}, "unknown field 'model.hidden'"),
        (MODEL, {"train_5ep": {"graph.neighbours": 3}}, "model_5ep: override 'graph.neighbours' has no effect"),
        (MODEL, {"train_5ep": {"train.epochs": 7}}, "override 'train.epochs' is refused"),
        (MODEL, {"train_5ep": {"model.hidden_size": "wide"}}, "model.hidden_size: expected int, found 'wide'"),
        (MODEL, {"train_5ep": {"split.train_fraction": 0.05}}, "sessions"),
    ],
)
def test_an_override_that_cannot_be_used_is_one_sentence(
    work: Path,
    instance: dg.DagsterInstance,
    capfd: pytest.CaptureFixture[str],
    selection: str,
    ops: dict[str, dict[str, object]],
    said: str,
) -> None:
    before = outputs(work)
    capfd.readouterr()
    config = {op: {"config": {"overrides": overrides}} for op, overrides in ops.items()}
    assert not make(selection, instance, config).success
    line = first_error(capfd.readouterr().err)
    assert " - ERROR - " in line
    assert said in line
    assert {k: v for k, v in outputs(work).items() if "/runs/" not in k} == before


@pytest.mark.parametrize("selection", ['key:"prices"', 'key:"stock_graph"', MODEL, 'key:"baselines"'])
def test_unknown_preset_lists_the_known_ones(
    work: Path,  # noqa: ARG001
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
    selection: str,
) -> None:
    monkeypatch.setenv("ATFT_PRESET", "nope")
    (sentence,) = failures(make(selection, instance)).values()
    assert sentence == "preset: expected one of cpu, production, quick, found 'nope'"


@pytest.mark.parametrize("asset", ["ml_dataset", "stock_graph", "model_5ep", "baselines"])
def test_another_source_than_the_manifests_is_refused_by_name(
    work: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, asset: str
) -> None:
    """The raw tables and prices would be of one market, and what is trained on of another."""
    shutil.copytree(work / "source", work / "other")
    monkeypatch.setenv("ATFT_SOURCE", "other")
    assert make("group:raw", instance).success
    before = outputs(work)
    (sentence,) = failures(make(f'key:"{asset}"', instance)).values()
    assert sentence.startswith(f"{asset}: ATFT_SOURCE is other, but its inputs were made from source;")
    assert f"--select '+key:{asset}'" in sentence
    assert outputs(work) == before


def test_a_later_command_needs_no_variable(
    work: Path,  # noqa: ARG001
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The manifest says where the dataset came from."""
    monkeypatch.delenv("ATFT_SOURCE")
    assert make('key:"ml_dataset" or key:"stock_graph"', instance, UPSTREAM_CONFIG).success


def test_a_source_that_changed_since_its_prices_is_refused_by_name(work: Path, instance: dg.DagsterInstance) -> None:
    edit("prices", lambda frame: frame.with_columns(pl.col("Volume") + 1))(work / "source")
    before = outputs(work)
    (sentence,) = failures(make('key:"ml_dataset"', instance)).values()
    assert sentence.startswith("ml_dataset: source changed since prices were made from it")
    assert "--select '+key:ml_dataset'" in sentence
    assert outputs(work) == before


@pytest.mark.parametrize(
    "asset", ["ml_dataset", "stock_graph", "model_50ep", "model_120ep", "evaluation_5ep", "baselines"]
)
def test_nothing_upstream_names_the_command(
    tmp_path: Path,
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    asset: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ATFT_SOURCE", raising=False)
    (sentence,) = failures(make(f'key:"{asset}"', instance)).values()
    assert f"run `dagster asset materialize --select '+key:{asset.replace('evaluation', 'training_run')}'`" in sentence
    assert "\n" not in sentence
    line = first_error(capfd.readouterr().err)
    assert " - ERROR - " in line
    assert sentence in line
    assert not (tmp_path / "output").exists()


def test_a_training_that_breaks_names_the_diagnosis_of_its_run(work: Path, instance: dg.DagsterInstance) -> None:
    """An absurd learning rate stops the run before an update with a loss that is not finite."""
    ops = training(5, EVER, {"train.optimizer.lr": 1e30, "train.optimizer.clip_norm": 1e30})
    (sentence,) = failures(make(MODEL, instance, ops)).values()
    (run_dir,) = (work / "output" / "runs").iterdir()
    assert "stopped before the update" in sentence
    assert f"atft diagnose {run_dir.relative_to(work)}" in sentence
