"""The job `experiments`: one partition trains, compares and feeds back, by the command that the report shows."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster_runs import (
    EVER,
    command,
    copied,
    failures,
    history,
    make,
    training,
    working_in,
)

from assets.definitions import defs
from assets.diagnosis.commands import DAGSTER
from assets.diagnosis.experiments import EXPERIMENTS
from atft_pipeline.diagnostics.diagnose import diagnose
from atft_pipeline.inspection.paired import EXPERIMENT_IDS, read_experiment_results

pytestmark = pytest.mark.slow(reason="assets made in this process")


@pytest.fixture(scope="module", autouse=True)
def folder(upstream: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of every test, with a run of five epochs in it."""
    with working_in(copied(upstream, tmp_path_factory.mktemp("checkout"))) as path:
        with dg.DagsterInstance.ephemeral() as instance:
            assert make('key:"training_run_5ep"', instance, training(5, EVER)).success
        yield path


def the_run() -> Path:
    (run_dir,) = Path().glob("output/runs/model_5ep-*")
    return run_dir


def execute(id: str, instance: dg.DagsterInstance, config: dict[str, Any]) -> dg.ExecuteInProcessResult:
    return defs.resolve_job_def("experiments").execute_in_process(
        instance=instance,
        partition_key=id,
        run_config={"ops": {"experiment": {"config": config}}},
        raise_on_error=False,
    )


def test_partitions_are_the_experiments() -> None:
    assert tuple(EXPERIMENTS.get_partition_keys()) == EXPERIMENT_IDS
    assert defs.resolve_job_def("experiments").partitions_def == EXPERIMENTS


@pytest.mark.process(reason="the command that a report shows")
def test_the_command_of_the_report_trains_compares_and_feeds_back(folder: Path) -> None:
    run_dir = the_run()
    advice = next(advice for advice in diagnose(run_dir, commands=DAGSTER).experiments if advice.id == "A")
    done = command(folder, shlex.split(advice.command))
    assert done.returncode == 0, done.stdout
    result = read_experiment_results(run_dir)["A"]
    assert result.explained == run_dir.name
    experiment = json.loads((Path("output/runs") / result.experiment / "run.json").read_text())
    assert experiment["epochs_done"] == 5
    assert experiment["config"]["train"]["schedule"]["name"] == "plateau"
    with history(folder) as instance:
        (record,) = instance.fetch_observations(dg.AssetKey("diagnostics_5ep"), limit=1).records
        assert record.asset_observation is not None
        says = {name: value.value for name, value in record.asset_observation.metadata.items()}
        (run,) = instance.get_run_records(limit=1)
    assert run.dagster_run.tags["dagster/partition"] == "A"
    assert says["experiment"] == "A"
    assert says["ic_difference"] == pytest.approx(result.ic.difference)
    assert says["run_dir"] == str(run_dir)
    assert Path(says["report_html"]) == run_dir / "report.html"
    assert "| A | " in says["results"]


def test_an_experiment_that_cannot_be_run_is_one_sentence(instance: dg.DagsterInstance) -> None:
    assert failures(execute("B", instance, {"run_dir": "output/runs/gone"})) == {
        "experiment": "run directory output/runs/gone: no run.json in it; pass a directory that `atft train` wrote"
    }
    before = sorted(Path("output/runs").iterdir())
    refused = failures(execute("B", instance, {"run_dir": str(the_run()), "epochs": 0}))["experiment"]
    assert "epochs" in refused
    assert sorted(Path("output/runs").iterdir()) == before


def test_without_a_partition_the_sentence_names_them(instance: dg.DagsterInstance) -> None:
    job = defs.resolve_job_def("experiments")
    config = {"ops": {"experiment": {"config": {"run_dir": str(the_run())}}}}
    result = job.execute_in_process(instance=instance, run_config=config, raise_on_error=False)
    said = "experiments: name the experiment, --partition A or B or C or D"
    assert failures(result) == {"experiment": said}
