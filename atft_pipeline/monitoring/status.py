"""One snapshot of the runs in a folder, read from their own records."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from atft_pipeline.errors import InputError
from atft_pipeline.runs.record import is_held, read_run, read_table, series_values

ETA_EPOCHS = 3
"""The time left is extrapolated from the mean length of this many newest epochs."""


def run_snapshots(runs: Path) -> list[dict[str, Any]]:
    """A row per run directory under `runs`, newest start first; a directory that cannot be read says why.

    Raises InputError when the folder does not exist.
    """
    if not runs.is_dir():
        raise InputError(f"{runs}: no such folder of runs; train one first or name another with --runs")
    found = [run_snapshot(path.parent) for path in sorted(runs.glob("*/run.json"))]
    return sorted(found, key=lambda row: row["started"] or "", reverse=True)


def run_snapshot(run_dir: Path) -> dict[str, Any]:
    """State, epoch, seconds left, newest losses, gradient and GPU memory of one run; None where not measured."""
    try:
        header = read_run(run_dir)
        series = read_table(run_dir, "series")
    except InputError as error:
        return {"run": run_dir.name, "state": "unreadable", "started": None, "reason": str(error)}
    state = run_state(run_dir, header)
    left = int(header.get("epochs_planned", 0)) - int(header.get("epochs_done", 0))
    times = series_values(series, "epoch_s"), series_values(series, "validation_s")
    length = epoch_length_s(*times) if state == "running" else None
    return {
        "run": run_dir.name,
        "state": state,
        "started": header.get("started"),
        "reason": header.get("reason"),
        "epoch": header.get("epochs_done"),
        "epochs": header.get("epochs_planned"),
        "eta_s": None if length is None else round(length * left, 1),
        "train_loss": _newest(series, "loss_weighted", split="train", term="total"),
        "validation_loss": _newest(series, "loss_weighted", split="validation", term="total"),
        "grad_norm": _newest(series, "grad_norm", component="total", term="before_clip"),
        "lr": _newest(series, "lr", component="all"),
        "samples_per_s": _newest(series, "samples_per_s"),
        "gpu_memory_bytes": _newest(series, "gpu_memory_bytes"),
    }


def run_state(run_dir: Path, header: Mapping[str, Any]) -> str:
    """What the header says, or `killed` where it says running and no process holds the run."""
    if header["status"] != "running" or is_held(run_dir):
        return str(header["status"])
    # It may have ended between the two looks.
    ended = read_run(run_dir)["status"]
    return "killed" if ended == "running" else str(ended)


def epoch_length_s(trained_s: Mapping[int, float], validated_s: Mapping[int, float]) -> float | None:
    """Mean seconds of the newest epochs, training and validation; None before the first is complete."""
    newest = [trained_s[epoch] + validated_s.get(epoch, 0.0) for epoch in sorted(trained_s)[-ETA_EPOCHS:]]
    return statistics.mean(newest) if newest else None


def _newest(series: pa.Table, metric: str, **where: str) -> float | None:
    """The figure of the newest epoch; None where there is none or it is not finite, which JSON cannot say."""
    values = series_values(series, metric, **where)
    newest = values[max(values)] if values else math.nan
    return newest if math.isfinite(newest) else None
