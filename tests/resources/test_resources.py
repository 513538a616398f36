"""Resources that touch the outside world: the size of a run, paths and links, and leftovers of killed runs."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
import torch
from dagster_runs import REPO

from atft_pipeline.errors import InputError
from atft_pipeline.storage.artifact import write_manifest
from resources.compute import Compute
from resources.execution import executing, release_killed_runs
from resources.output_folders import OutputFolders

ALL = ("split", "model", "train", "evaluation")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ATFT_PRESET", "ATFT_SOURCE", "SHARPE_WEIGHT", "DAGSTER_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


# Compute -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("embedded", "cuda", "expected"),
    [(True, False, "quick"), (True, True, "quick"), (False, False, "cpu"), (False, True, "production")],
)
def test_default_preset_follows_market_and_machine(
    monkeypatch: pytest.MonkeyPatch, embedded: bool, cuda: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    _, recorded = Compute().configuration("model_5ep", sections=ALL, embedded=embedded, overrides={})
    assert recorded == {"preset": expected}


def test_resource_beats_environment_beats_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATFT_PRESET", "production")
    choose = [Compute(), Compute(preset="quick")]
    names = [c.configuration("m", sections=ALL, embedded=False, overrides={})[1]["preset"] for c in choose]
    assert names == ["production", "quick"]


def test_run_config_wins_over_the_reports_variables_and_both_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARPE_WEIGHT", "0.3")
    monkeypatch.setenv("CS_IC_WEIGHT", "0.2")
    config, recorded = Compute(preset="quick").configuration(
        "model_5ep", sections=ALL, embedded=True, overrides={"train.loss.ic": 0.5}
    )
    assert (config.train.loss.sharpe, config.train.loss.ic) == (0.3, 0.5)
    assert recorded == {"preset": "quick", "train.loss.sharpe": 0.3, "train.loss.ic": 0.5}


def test_the_reports_variables_do_not_reach_assets_that_do_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARPE_WEIGHT", "not a number")
    _, recorded = Compute().configuration("prices", sections=("dataset",), embedded=True, overrides={})
    assert recorded == {"preset": "quick"}


def test_an_override_of_a_section_that_is_not_read_is_refused() -> None:
    with pytest.raises(InputError, match=r"prices: override 'train.seed' has no effect here; .* only dataset\.\*"):
        Compute().configuration("prices", sections=("dataset",), embedded=True, overrides={"train.seed": 2})


# Dataset store -------------------------------------------------------------------------------------------------


def publish(store: OutputFolders, fingerprint: str, source: str = "market") -> Path:
    path = store.product("stock_graph", fingerprint)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(fingerprint)
    write_manifest(path, {"kind": "stock_graph", "fingerprint": fingerprint, "source": {"path": source}})
    store.publish("stock_graph", path)
    return path


def test_the_link_names_the_newest_product_and_the_earlier_one_stays() -> None:
    store = OutputFolders()
    earlier, newest = publish(store, "a" * 64), publish(store, "b" * 64)
    path, manifest = store.current("stock_graph", "model_5ep")
    assert (path, manifest["fingerprint"]) == (newest, "b" * 64)
    assert earlier.read_text() == "a" * 64
    assert not (store.datasets / "stock_graph_latest.parquet").readlink().is_absolute()


def test_a_missing_product_names_the_command_also_where_only_its_link_is_left() -> None:
    store = OutputFolders()
    with pytest.raises(InputError, match=r"there is no stock_graph yet .* --select '\+key:model_5ep'`"):
        store.current("stock_graph", "model_5ep")
    publish(store, "a" * 64).unlink()
    with pytest.raises(InputError, match="there is no stock_graph yet"):
        store.current("stock_graph", "model_5ep")


def test_a_source_that_is_named_must_be_the_manifests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = OutputFolders()
    publish(store, "a" * 64)
    monkeypatch.setenv("ATFT_SOURCE", str(tmp_path / "market"))  # the same folder by another name
    assert store.current("stock_graph", "model_5ep")[1]["fingerprint"] == "a" * 64
    monkeypatch.setenv("ATFT_SOURCE", "elsewhere")
    with pytest.raises(InputError, match="ATFT_SOURCE is elsewhere, but its inputs were made from market"):
        store.current("stock_graph", "model_5ep")


def test_only_the_generated_market_counts_as_embedded() -> None:
    store = OutputFolders()
    assert store.is_embedded(store.datasets / "synthetic_market")
    assert not store.is_embedded("elsewhere/market")


# What killed runs leave ----------------------------------------------------------------------------------------


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    (tmp_path / "dagster.yaml").write_text((REPO / "dagster.yaml").read_text())
    with dg.DagsterInstance.from_config(str(tmp_path)) as configured:
        yield configured


def claim(instance: dg.DagsterInstance) -> str:
    """A run that has started and holds the slot of the pool."""
    run = instance.create_run_for_job(dg.job(name="training")(lambda: None), status=dg.DagsterRunStatus.STARTED)
    storage = instance.event_log_storage
    storage.initialize_concurrency_limit_to_default("gpu")
    assert storage.claim_concurrency_slot("gpu", run.run_id, "train").is_claimed
    return run.run_id


def holders(instance: dg.DagsterInstance) -> set[str]:
    return {slot.run_id for slot in instance.event_log_storage.get_concurrency_info("gpu").claimed_slots}


@pytest.mark.process(reason="a run whose process is killed")
def test_the_slot_of_a_run_whose_process_is_gone_is_taken_back(instance: dg.DagsterInstance) -> None:
    run_id = claim(instance)
    script = (
        "import os, sys; import dagster as dg; from resources.execution import executing\n"
        "with dg.DagsterInstance.from_config('.') as instance, executing(instance, sys.argv[1]):\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, run_id], check=False).returncode == -9
    assert release_killed_runs(instance) == [run_id]
    assert holders(instance) == set()
    run = instance.get_run_by_id(run_id)
    assert run is not None
    assert run.status == dg.DagsterRunStatus.FAILURE


def test_the_slot_of_a_run_that_executes_is_left_alone(instance: dg.DagsterInstance) -> None:
    run_id = claim(instance)
    with executing(instance, run_id):
        assert release_killed_runs(instance) == []
        assert holders(instance) == {run_id}


def test_the_slot_of_a_run_that_another_executor_started_is_left_until_it_has_finished(
    instance: dg.DagsterInstance,
) -> None:
    run_id = claim(instance)
    assert release_killed_runs(instance) == []
    run = instance.get_run_by_id(run_id)
    assert run is not None
    instance.report_run_failed(run)
    assert release_killed_runs(instance) == [run_id]


def test_executing_leaves_no_lock_behind(instance: dg.DagsterInstance) -> None:
    locks = Path(instance.storage_directory()) / "executing"
    with executing(instance, "run"), (locks / "run").open() as handle, pytest.raises(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert list(locks.iterdir()) == []


def test_a_history_in_memory_has_nothing_to_release() -> None:
    with dg.DagsterInstance.ephemeral() as ephemeral:
        assert release_killed_runs(ephemeral) == []
