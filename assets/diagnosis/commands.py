"""The commands of a report as one starts things in this code location."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from assets.training.training_run import RUN_LENGTHS
from atft_pipeline.diagnostics.commands import AtftCommands
from atft_pipeline.inspection.reader import Record

EXPERIMENT_JOB, EXPERIMENT_OP = "experiments", "experiment"
CRITERION_RUN_LENGTH = 20


class DagsterCommands(AtftCommands):
    """What Dagster has no command for stays one of `atft`. An asset lies where its key says, so few need the record."""

    def build_dataset(self, record: Record) -> str:  # noqa: ARG002
        return "dagster asset materialize --select +key:ml_dataset"

    def build_graph(self, record: Record) -> str:  # noqa: ARG002
        return "dagster asset materialize --select +key:stock_graph"

    def ask_baselines(self, record: Record) -> str:  # noqa: ARG002
        return "dagster asset materialize --select baselines"

    def train(self, record: Record, overrides: Mapping[str, Any], name: str) -> str:  # noqa: ARG002
        """The changes as run config of the training op, on top of what this run was given."""
        given = record.run.get("overrides")
        recorded: dict[str, Any] = given if isinstance(given, dict) else {}
        kept = {field: value for field, value in recorded.items() if "." in field and field != "train.epochs"}
        planned = record.epochs_planned or CRITERION_RUN_LENGTH
        epochs = min(RUN_LENGTHS, key=lambda length: abs(length - planned))
        config = json.dumps({"ops": {f"train_{epochs}ep": {"config": {"overrides": kept | dict(overrides)}}}})
        preset = recorded.get("preset")
        prefix = f"ATFT_PRESET={shlex.quote(str(preset))} " if preset else ""
        return f"{prefix}dagster asset materialize --select model_{epochs}ep --config-json {shlex.quote(config)}"

    def experiment(self, record: Record, id: str) -> str:
        """One partition of the job, from the checkout; it ends with the job, like `dagster asset materialize`.

        `dagster job launch` knows no partition and leaves the run to a code server, `dagster job execute` reads no
        configuration from its arguments.
        """
        config = json.dumps({"ops": {EXPERIMENT_OP: {"config": {"run_dir": str(record.run_dir)}}}})
        return f"dg launch --job {EXPERIMENT_JOB} --partition {id} --config-json {shlex.quote(config)}"


DAGSTER = DagsterCommands()
