"""The history that the gate of `model_120ep` decides on, read from the Dagster instance. Nothing is decided here.

The rule, when the gate is open and why it is shut, is `gate_decision` in atft_pipeline/verdict/gate.py.

An event that was reported by hand belongs to no run: Dagster gives it an empty run id, which becomes None here.
"""

from typing import Any

import dagster as dg
from dagster._core.storage.asset_check_execution_record import (
    COMPLETED_ASSET_CHECK_EXECUTION_RECORD_STATUSES as EVALUATED,
)

GATE_MODEL = dg.AssetKey("model_20ep")
GATE_CHECK = dg.AssetCheckKey(GATE_MODEL, "success_criterion")


def last_check(instance: dg.DagsterInstance) -> dict[str, Any] | None:
    """The newest evaluation of `model_20ep`'s criterion: its outcome, its time and run, and the dataset it is of.

    A check that was planned and never ran, because its run stopped before it, is no evaluation.
    """
    records = instance.event_log_storage.get_asset_check_execution_history(
        check_key=GATE_CHECK, limit=1, status=EVALUATED
    )
    entry = records[0].event if records else None
    if entry is None or entry.dagster_event is None:
        return None
    evaluation = entry.dagster_event.asset_check_evaluation_data
    return {
        # When it was evaluated; the record's own timestamp is when its run planned it, in whole seconds.
        "timestamp": entry.timestamp,
        "run_id": records[0].run_id or None,
        **_values(evaluation.metadata, "status", "dataset_fingerprint", "config_key", "summary"),
    }


def last_materialization(instance: dg.DagsterInstance, key: dg.AssetKey = GATE_MODEL) -> dict[str, Any] | None:
    """The newest materialization of an asset: its id, its run and the metadata that ties it to a run directory."""
    record = next(iter(instance.fetch_materializations(key, limit=1).records), None)
    if record is None or record.asset_materialization is None:
        return None
    return {
        "timestamp": record.timestamp,
        "run_id": record.run_id or None,
        **_values(record.asset_materialization.metadata, "run_dir", "dataset_fingerprint", "config_key", "run_key"),
    }


def _values(metadata: Any, *names: str) -> dict[str, Any]:
    return {name: metadata[name].value if name in metadata else None for name in names}
