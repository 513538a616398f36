"""An experiment of a run's report: it is planned from the run's record, and its result is added to the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atft_pipeline.config.overrides import from_dict, with_overrides
from atft_pipeline.diagnostics.commands import ATFT, CommandStyle
from atft_pipeline.diagnostics.diagnose import Diagnosis, ReportPaths, diagnose, write_report
from atft_pipeline.diagnostics.experiments.plan import experiment_settings
from atft_pipeline.errors import InputError
from atft_pipeline.inspection.paired import (
    PairedResult,
    compare_runs,
    evaluated_epochs,
    result_path,
    write_experiment_result,
)
from atft_pipeline.inspection.reader import open_record
from atft_pipeline.runs.header import read_run
from atft_pipeline.training.plan import Plan, plan_run


@dataclass(frozen=True)
class PlannedExperiment:
    """An experiment before it starts."""

    id: str
    explained: Path
    """Directory of the run that the experiment explains."""
    plan: Plan
    overrides: dict[str, Any]
    """What the record of the experiment's run says of its settings."""

    @property
    def name(self) -> str:
        """Name of the experiment's run directory. It holds the run key, so that a finished experiment is reused."""
        return f"experiment_{self.id.lower()}-{self.plan.key}"


@dataclass(frozen=True)
class Conclusion:
    """Result of an experiment, and the report of the run that it explains."""

    result: PairedResult
    path: Path
    diagnosis: Diagnosis
    report: ReportPaths


def plan_experiment(run_dir: Path, id: str, epochs: int | None = None) -> PlannedExperiment:
    """Experiment `id` on the dataset, graph and seed of the run in `run_dir`, for `epochs` or as many as the run.

    Raises InputError where the run has no evaluated epoch to compare with, where its dataset or graph is gone or has
    been replaced, and where the run has the experiment's settings already.
    """
    result_path(run_dir, id)
    header = read_run(run_dir)
    if not evaluated_epochs(run_dir):
        raise InputError(
            f"run directory {run_dir}: no epoch of it was evaluated, so an experiment has nothing to be compared with;"
            f" see `atft diagnose {run_dir}`"
        )
    absent = [name for name in ("dataset_path", "graph_path", "dataset_fingerprint") if not header.get(name)]
    if absent:
        raise InputError(f"run directory {run_dir}: run.json has no {absent[0]!r}; train again")
    record = open_record(run_dir)
    try:
        settings = experiment_settings(record, id)
    finally:
        record.connection.close()
    changed = settings.overrides
    if not changed:
        raise InputError(f"run directory {run_dir}: has the settings of experiment {id} already ({settings.sentence})")
    config = with_overrides(from_dict(header["config"]), changed)
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
    recorded = header.get("overrides")
    overrides = (recorded if isinstance(recorded, dict) else {}) | changed
    return PlannedExperiment(id, run_dir, plan, overrides | {"experiment": f"{id} of {run_dir.resolve().name}"})


def conclude(run_dir: Path, id: str, experiment_dir: Path, commands: CommandStyle = ATFT) -> Conclusion:
    """Compares the finished experiment with the run that it explains, stores the result there, renews the report."""
    result = compare_runs(run_dir, experiment_dir)
    path = write_experiment_result(run_dir, id, result)
    diagnosis = diagnose(run_dir, commands=commands)
    return Conclusion(result, path, diagnosis, write_report(run_dir, diagnosis))
