"""From a run's own record to its verdict: the validity battery at the epochs that count, then `verdict.json`.

Everything here is read back from the run directory it judges, so a resumed run is judged like an uninterrupted one, and
no figure of another run can enter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from atft_pipeline.config.overrides import from_dict
from atft_pipeline.config.schema import PipelineConfig
from atft_pipeline.runs.header import read_run
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
from atft_pipeline.verdict.milestones import Progress
from atft_pipeline.verdict.validity import (
    ValidityItem,
    not_assessable,
)

Rows = list[dict[str, Any]]


def write_verdict(run_dir: Path) -> dict[str, Any]:
    """Judges the run from its record, writes `verdict.json` and returns its content."""
    header = read_run(run_dir)
    config = from_dict(header["config"])
    evals = read_table(run_dir, "evals").to_pylist()
    batteries = [json.loads(path.read_text()) for path in sorted((run_dir / "validity").glob("epoch_*.json"))]
    last = header["epochs_done"]
    judged = config.evaluation.criterion_epoch if last >= config.evaluation.criterion_epoch else last
    battery = next((b for b in batteries if b["epoch"] == judged), None)
    final_hashes = [row for row in evals if row["epoch"] == last and row["split"] == "validation"]
    verdict = judge(
        config=config.evaluation,
        epochs_planned=header["epochs_planned"],
        epochs_done=last,
        evidence=_evidence(evals, config, judged),
        validity=[*_validity(batteries), _weights_left_their_start(header, evals, judged)] if battery else [],
        health=_health(run_dir),
        progress=_progress(run_dir, evals, config),
        reversal_sharpe=battery["reversal_sharpe"] if battery else None,
        final={split: _statistics(evals, last, split, config.evaluation.universe) for split in ("validation", "test")},
        identifiers={
            "run_key": header["key"],
            "config_key": header["config_key"],
            "dataset_fingerprint": header["dataset_fingerprint"],
            "weights_hash": final_hashes[0]["weights_hash"] if final_hashes else None,
            "predictions_hash": final_hashes[0]["predictions_hash"] if final_hashes else None,
        },
        warnings=battery["lag_scan"]["warnings"] if battery else [],
    )
    write_json(run_dir / "verdict.json", verdict)
    return verdict


def _statistics(evals: Rows, epoch: int, split: str, universe: str) -> dict[str, float | None]:
    return {
        row["metric"]: row["value"]
        for row in evals
        if (row["epoch"], row["split"], row["slice"]) == (epoch, split, universe)
    }


def _evidence(evals: Rows, config: PipelineConfig, epoch: int) -> CriterionEvidence | None:
    """The validation figures at exactly `epoch`; None when that epoch was never evaluated."""
    figures = _statistics(evals, epoch, "validation", config.evaluation.universe)
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


def _validity(batteries: Rows) -> list[ValidityItem]:
    """Every item of every battery that was run; a later one cannot make up for an earlier one."""
    return [
        ValidityItem(**(item | {"name": f"{item['name']} (epoch {battery['epoch']})"}))
        for battery in batteries
        for item in battery["items"]
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


def _health(run_dir: Path) -> list[HealthItem]:
    series = read_table(run_dir, "series")
    rows = series.to_pylist()
    components = sorted({row["component"] for row in rows if row["metric"] == "grad_l2"})
    mean_l2 = {
        name: float(np.mean(list(series_values(series, "grad_l2", component=name).values()))) for name in components
    }
    ratios = series_values(series, "dispersion_ratio")
    return [
        finite_losses([row["value"] for row in rows if row["metric"] in ("loss", "loss_raw", "loss_weighted")]),
        gradients_reach_components(mean_l2),
        parameters_moved(_movement(run_dir, components)),
        predictions_not_constant(ratios[max(ratios)] if ratios else None),
    ]


def _movement(run_dir: Path, components: list[str]) -> dict[str, float]:
    """l2 distance between the last epoch's weights and the initial ones, per component."""
    checkpoints = sorted((run_dir / "checkpoints").glob("epoch_*.pt"))
    if len(checkpoints) < 2:
        return {}
    this_run = {"run_key": read_run(run_dir)["key"]}
    first, last = (read_checkpoint(path, this_run)["weights"] for path in (checkpoints[0], checkpoints[-1]))
    return {
        name: float(sum(((last[k] - first[k]).double() ** 2).sum() for k in first if k.startswith(f"{name}."))) ** 0.5
        for name in components
    }


def _progress(run_dir: Path, evals: Rows, config: PipelineConfig) -> Progress:
    series = read_table(run_dir, "series").to_pylist()
    counts = {
        metric: sum(int(row["value"]) for row in series if row["metric"] == metric)
        for metric in ("gradient_warning", "degeneracy_reset")
    }
    sharpe = {
        row["epoch"]: row["value"]
        for row in evals
        if row["metric"] == "sharpe_daily"
        and (row["split"], row["slice"]) == ("validation", config.evaluation.universe)
    }
    return Progress(sharpe, counts["gradient_warning"], counts["degeneracy_reset"], crashed=False)
