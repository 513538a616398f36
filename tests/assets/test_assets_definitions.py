"""The code location loads, names what it holds, and the nightly job retrains behind the gate."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
from dagster_runs import EVER, UPSTREAM_CONFIG, copied, few_epochs, outcomes, training, working_in

from assets.definitions import defs
from assets.metadata import markdown_table, numeric_metadata
from assets.training.training_run import RUN_LENGTHS
from resources.execution import PRELOADED, one_process_per_step

GRAPH = defs.resolve_asset_graph()


def test_definitions_load() -> None:
    dg.Definitions.validate_loadable(defs)


def test_every_asset_has_a_description_and_a_named_group() -> None:
    assert {node.group_name for node in GRAPH.asset_nodes} == {
        "raw", "features", "training", "evaluation", "diagnostics",
    }  # fmt: skip
    assert not [node.key for node in GRAPH.asset_nodes if not node.description]


def test_every_check_has_a_description() -> None:
    assert not [key for key in GRAPH.asset_check_keys if not GRAPH.get_check_spec(key).description]


@pytest.mark.parametrize("epochs", RUN_LENGTHS)
def test_evaluation_and_diagnostics_hang_off_the_record_and_not_the_gated_model(epochs: int) -> None:
    record = dg.AssetKey(f"training_run_{epochs}ep")
    evaluation, diagnostics = (dg.AssetKey(f"{name}_{epochs}ep") for name in ("evaluation", "diagnostics"))
    assert GRAPH.get(evaluation).parent_keys == {record}
    assert GRAPH.get(diagnostics).parent_keys == {record, evaluation}


def test_only_the_longest_run_depends_on_the_gate() -> None:
    gate = dg.AssetKey("model_20ep")
    assert {key.to_user_string() for key in GRAPH.get(gate).child_keys} == {"model_120ep", "training_run_120ep"}


def test_only_what_must_stop_the_run_blocks() -> None:
    blocking = {f"{key.asset_key.to_user_string()}:{key.name}" for key in GRAPH.asset_check_keys
                if GRAPH.get_check_spec(key).blocking}  # fmt: skip
    assert blocking == {
        *(f"{node.key.to_user_string()}:contract" for node in GRAPH.asset_nodes if node.group_name == "raw"),
        "prices:contract",
        "prices:universe_not_empty",
        "ml_dataset:contract",
        "stock_graph:belongs_to_dataset",
        *(f"model_{epochs}ep:success_criterion" for epochs in RUN_LENGTHS),
    }


def test_one_training_at_a_time_and_nothing_is_retried() -> None:
    ops = {op.name: op for assets_def in defs.resolve_all_job_defs() for op in assets_def.all_node_defs}
    assert {name for name, op in ops.items() if getattr(op, "pool", None) == "gpu"} == {
        "experiment",
        *(f"{op}_{epochs}ep" for op in ("train", "ensemble_scores") for epochs in RUN_LENGTHS),
    }
    assert not [name for name, op in ops.items() if getattr(op, "retry_policy", None)]


@pytest.mark.process(reason="fresh interpreters")
def test_the_code_location_loads_without_what_only_steps_need() -> None:
    """Every command starts with this import; torch and matplotlib would more than double it."""
    script = "import sys, assets.definitions; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_steps_run_in_processes_of_their_own() -> None:
    assert defs.executor is one_process_per_step


@pytest.mark.process(reason="fresh interpreters")
def test_what_steps_find_imported_exists_and_is_not_polars() -> None:
    """The server that they are forked off says nothing of a module that is not there; a fork loses polars' threads."""
    script = f"import sys; [__import__(name) for name in {PRELOADED}]; print('polars' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_nightly_schedule_retrains_in_tokyo() -> None:
    schedule = defs.resolve_schedule_def("nightly")
    assert schedule.execution_timezone == "Asia/Tokyo"
    selected = defs.resolve_job_def(schedule.job_name).asset_layer.selected_asset_keys
    names = {key.to_user_string() for key in selected}
    assert names >= {f"{kind}_{epochs}ep" for kind in ("model", "training_run", "evaluation", "diagnostics")
                     for epochs in (20, 120)}  # fmt: skip
    assert names >= {"raw_prices", "prices", "ml_dataset", "stock_graph"}
    assert not {name for name in names if name.endswith(("_5ep", "_50ep"))}


@pytest.mark.slow(reason="the nightly job, in this process")
def test_nightly_job_trains_long_once_the_criterion_passed(
    upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs each: how many the names stand for is asserted where the short run is checked."""
    few_epochs(monkeypatch)
    ops = UPSTREAM_CONFIG | training(20, EVER) | training(120, EVER)
    with working_in(copied(upstream, tmp_path)), dg.DagsterInstance.ephemeral() as instance:
        result = defs.resolve_job_def("nightly_retrain").execute_in_process(
            instance=instance, run_config={"ops": ops}, raise_on_error=False
        )
    assert result.success
    assert outcomes(result)["model_20ep:success_criterion"].passed
    order = [
        str(event.step_key)
        for event in result.all_events
        if event.is_step_start and event.step_key in ("train_20ep", "judge_20ep", "train_120ep")
    ]
    assert order == ["train_20ep", "judge_20ep", "train_120ep"]
    (record,) = (tmp_path / "output" / "runs").glob("model_120ep-*")
    header = json.loads((record / "run.json").read_text())
    assert header["status"] == "finished"
    assert header["overrides"]["gate"].startswith("gate open: model_20ep: passed")
    for epochs in (20, 120):
        (record,) = (tmp_path / "output" / "runs").glob(f"model_{epochs}ep-*")
        assert (record / "report.html").is_file()


def test_figures_are_numbers_and_rows_are_a_table() -> None:
    assert numeric_metadata({"a": 1, "b": 0.5, "c": None, "d": float("nan")}) == {
        "a": dg.MetadataValue.int(1),
        "b": dg.MetadataValue.float(0.5),
    }
    assert markdown_table([{"x": None, "y": 0.123456}, {"x": "a|b", "y": 2}]).value.splitlines() == [
        "| x | y |", "|---|---|", "| – | 0.1235 |", "| a\\|b | 2 |",
    ]  # fmt: skip


@pytest.mark.process(reason="fresh interpreters")
def test_the_variable_that_names_the_code_location_has_a_default_and_an_exported_value_wins() -> None:
    """`dagster asset materialize` reads neither pyproject.toml nor workspace.yaml."""
    name = "DAGSTER_CLI_ASSET_MATERIALIZE_MODULE_NAME"
    show = [sys.executable, "-c", f"import os; print(os.environ[{name!r}])"]
    assert subprocess.run(show, capture_output=True, text=True, env={}, check=True).stdout == "assets.definitions\n"
    other = subprocess.run(show, capture_output=True, text=True, env={name: "other"}, check=True)
    assert other.stdout == "other\n"
