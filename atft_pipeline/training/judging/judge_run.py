"""From a run's own record to its verdict, `verdict.json`.

Every figure is read back from the run directory that is judged. So a resumed run is judged like an uninterrupted one,
and no figure of another run can enter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from atft_pipeline.config.overrides import from_dict
from atft_pipeline.config.schema import EvaluationConfig
from atft_pipeline.runs.documents import read_validity
from atft_pipeline.runs.header import read_run
from atft_pipeline.runs.state import has_crashed
from atft_pipeline.runs.tables import read_table, series_values
from atft_pipeline.storage.atomic import write_json
from atft_pipeline.training.checkpoints import read_checkpoint
from atft_pipeline.verdict.criterion import CriterionEvidence, judge
from atft_pipeline.verdict.health import (
    HealthItem,
    finite_losses,
    gradients_reach_components,
    parameters_moved,
    predictions_not_constant,
)
from atft_pipeline.verdict.milestones import TrainingProgress
from atft_pipeline.verdict.validity import ValidityItem, not_assessable

Rows = list[dict[str, Any]]

LOSS_METRICS = ("loss", "loss_raw", "loss_weighted")


def write_verdict(run_dir: Path) -> dict[str, Any]:
    """Judges the run from its record, writes `verdict.json` and returns its content."""
    header = read_run(run_dir)
    config = from_dict(header["config"]).evaluation
    evals = read_table(run_dir, "evals").to_pylist()
    series = read_table(run_dir, "series")
    checks_by_epoch = read_validity(run_dir)
    last_epoch = header["epochs_done"]
    judged_epoch = config.criterion_epoch if last_epoch >= config.criterion_epoch else last_epoch
    checks = next((checks for checks in checks_by_epoch if checks["epoch"] == judged_epoch), None)
    verdict = judge(
        config=config,
        epochs_planned=header["epochs_planned"],
        epochs_done=last_epoch,
        evidence=_evidence(evals, config.universe, judged_epoch),
        validity=[*_validity(checks_by_epoch), _weights_left_their_start(header, evals, judged_epoch)]
        if checks
        else [],
        health=_health(run_dir, header["key"], series),
        progress=_progress(header, series, evals, config),
        reversal_sharpe=checks["reversal_sharpe"] if checks else None,
        final={split: _statistics(evals, last_epoch, split, config.universe) for split in ("validation", "test")},
        identifiers=_identifiers(header, evals, last_epoch),
        warnings=checks["lag_scan"]["warnings"] if checks else [],
    )
    write_json(run_dir / "verdict.json", verdict)
    return verdict


def _identifiers(header: Mapping[str, Any], evals: Rows, last_epoch: int) -> dict[str, str | None]:
    """The run, its configuration and data, and the hashes of the last epoch's weights and predictions."""
    rows = [row for row in evals if row["epoch"] == last_epoch and row["split"] == "validation"]
    return {
        "run_key": header["key"],
        "config_key": header["config_key"],
        "dataset_fingerprint": header["dataset_fingerprint"],
        "weights_hash": rows[0]["weights_hash"] if rows else None,
        "predictions_hash": rows[0]["predictions_hash"] if rows else None,
    }


def _statistics(evals: Rows, epoch: int, split: str, universe: str) -> dict[str, float | None]:
    return {
        row["metric"]: row["value"]
        for row in evals
        if (row["epoch"], row["split"], row["slice"]) == (epoch, split, universe)
    }


def _evidence(evals: Rows, universe: str, epoch: int) -> CriterionEvidence | None:
    """The validation figures at exactly `epoch`; None when that epoch was never evaluated."""
    figures = _statistics(evals, epoch, "validation", universe)
    if not figures:
        return None
    sessions = figures.get("sessions")
    return CriterionEvidence(
        value=figures.get("sharpe_daily"),
        se=figures.get("sharpe_se"),
        psr_0=figures.get("psr_0"),
        sessions=None if sessions is None else int(sessions),
        valid=figures.get("valid") == 1.0,
        reason=f"the scores of epoch {epoch} are constant within a session or not finite",
    )


def _validity(checks_by_epoch: Rows) -> list[ValidityItem]:
    """Every item of every epoch that was checked: a later epoch cannot make up for an earlier one."""
    return [
        ValidityItem(**(item | {"name": f"{item['name']} (epoch {checks['epoch']})"}))
        for checks in checks_by_epoch
        for item in checks["items"]
    ]


def _weights_left_their_start(header: Mapping[str, Any], evals: Rows, epoch: int) -> ValidityItem:
    """Passes when the weights judged are not the initial ones: a Sharpe of untrained weights is luck."""
    name = "weights_left_their_start"
    judged = {row["weights_hash"] for row in evals if row["epoch"] == epoch}
    initial = header.get("initial_weights_hash")
    if not judged or initial is None:
        return not_assessable(name, "the hash of the initial or of the judged weights is not recorded")
    same = initial in judged
    return ValidityItem(
        name,
        not same,
        float(same),
        0.0,
        "the weights judged are the initial ones" if same else "trained weights",
    )


def _health(run_dir: Path, key: str, series: pa.Table) -> list[HealthItem]:
    components = sorted(_of_metrics(series, "grad_l2")["component"].unique().to_pylist())
    mean_l2 = {
        name: float(np.mean(list(series_values(series, "grad_l2", component=name).values()))) for name in components
    }
    ratios = series_values(series, "dispersion_ratio")
    return [
        finite_losses(_of_metrics(series, *LOSS_METRICS)["value"].to_pylist()),
        gradients_reach_components(mean_l2),
        parameters_moved(_movement(run_dir, key, components)),
        predictions_not_constant(ratios[max(ratios)] if ratios else None),
    ]


def _of_metrics(series: pa.Table, *metrics: str) -> pa.Table:
    return series.filter(pc.is_in(series["metric"], pa.array(metrics)))


def _movement(run_dir: Path, key: str, components: list[str]) -> dict[str, float]:
    """l2 distance between the last epoch's weights and the initial ones, per component."""
    checkpoints = sorted((run_dir / "checkpoints").glob("epoch_*.pt"))
    if len(checkpoints) < 2:
        return {}
    this_run = {"run_key": key}
    first, last = (read_checkpoint(path, this_run)["weights"] for path in (checkpoints[0], checkpoints[-1]))
    return {
        name: float(sum(((last[k] - first[k]).double() ** 2).sum() for k in first if k.startswith(f"{name}."))) ** 0.5
        for name in components
    }


def _progress(header: Mapping[str, Any], series: pa.Table, evals: Rows, config: EvaluationConfig) -> TrainingProgress:
    sharpe = {
        row["epoch"]: row["value"]
        for row in evals
        if row["metric"] == "sharpe_daily" and (row["split"], row["slice"]) == ("validation", config.universe)
    }
    return TrainingProgress(
        sharpe, _total(series, "gradient_warning"), _total(series, "degeneracy_reset"), crashed=has_crashed(header)
    )


def _total(series: pa.Table, metric: str) -> int:
    return sum(int(value) for value in _of_metrics(series, metric)["value"].to_pylist())
