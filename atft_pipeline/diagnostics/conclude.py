"""One of the experiments A to D of a run's report: planned from the run's own record, and its result fed back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atft_pipeline.config.overrides import from_dict, with_overrides
from atft_pipeline.diagnostics.diagnose import Diagnosis, ReportPaths, diagnose, write_report
from atft_pipeline.diagnostics.experiments.commands import experiment_overrides
from atft_pipeline.errors import InputError
from atft_pipeline.runs.header import read_run
from atft_pipeline.runs.keys import config_key
from atft_pipeline.runs.paired import PairedResult, compare_runs, evaluated_epochs, result_path, write_experiment_result
from atft_pipeline.runs.reader import open_record
from atft_pipeline.training.plan import Plan, plan_run


@dataclass(frozen=True)
class PlannedExperiment:
    """An experiment before it starts."""

    id: str
    explained: Path
    """Directory of the run that it explains."""
    plan: Plan
    overrides: dict[str, Any]
    """For the record of the experiment's run."""

    @property
    def name(self) -> str:
        """Of the experiment's run directory: what decides it, so that a finished one is reused."""
        return f"experiment_{self.id.lower()}-{self.plan.key}"


@dataclass(frozen=True)
class Conclusion:
    """What an experiment says of the run that it explains, and that run's report with it."""

    result: PairedResult
    path: Path
    diagnosis: Diagnosis
    report: ReportPaths


def plan_experiment(run_dir: Path, id: str, epochs: int | None = None) -> PlannedExperiment:
    """Experiment `id` on the dataset, graph and seed of the run in `run_dir`, for as many epochs unless told.

    Raises InputError, before anything is trained, where the run has no evaluated epoch to compare with, where its
    dataset or graph is gone or another one now, and where the run has the experiment's settings already.
    """
    result_path(run_dir, id)
    header = read_run(run_dir)
    if not evaluated_epochs(run_dir):
        raise InputError(
            f"run directory {run_dir}: no epoch of it was evaluated, so an experiment has nothing to be compared with;"
            f" see `atft diagnose {run_dir}`"
        )
    lacking = [name for name in ("dataset_path", "graph_path", "dataset_fingerprint") if not header.get(name)]
    if lacking:
        raise InputError(f"run directory {run_dir}: run.json has no {lacking[0]!r}; train again")
    record = open_record(run_dir)
    try:
        changed = experiment_overrides(record)[id]
    finally:
        record.connection.close()
    recorded = from_dict(header["config"])
    config = with_overrides(recorded, changed)
    if config_key(config) == config_key(recorded):
        fields = ", ".join(f"{name} {value}" for name, value in changed.items())
        raise InputError(f"run directory {run_dir}: has the settings of experiment {id} already ({fields})")
    if epochs is not None:
        changed = {**changed, "train.epochs": epochs}
        config = with_overrides(config, {"train.epochs": epochs})
    plan = plan_run(config, Path(header["dataset_path"]), Path(header["graph_path"]), header.get("processes", 1))
    for what, manifest in (("dataset", plan.dataset_manifest), ("graph", plan.graph_manifest)):
        expected = header.get(f"{what}_fingerprint")
        if manifest["fingerprint"] != expected:
            raise InputError(
                f"{header[f'{what}_path']}: its fingerprint is {manifest['fingerprint'][:12]}, {run_dir} was trained on"
                f" {str(expected)[:12]}; make it again from that run's source, or train the run again"
            )
    given = header.get("overrides")
    overrides = (given if isinstance(given, dict) else {}) | changed
    return PlannedExperiment(id, run_dir, plan, overrides | {"experiment": f"{id} of {run_dir.resolve().name}"})


def conclude(run_dir: Path, id: str, experiment_dir: Path) -> Conclusion:
    """Compares the finished experiment with the run it explains, keeps the result there and writes the report anew."""
    result = compare_runs(run_dir, experiment_dir)
    path = write_experiment_result(run_dir, id, result)
    diagnosis = diagnose(run_dir)
    return Conclusion(result, path, diagnosis, write_report(run_dir, diagnosis))
