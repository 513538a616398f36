"""The progress of each run and its newest figures, read from the record while it is written.

Parts that cannot be read are listed among the run's problems.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from atft_pipeline.config.slices import DEFAULT_SLICE
from atft_pipeline.errors import InputError, unusable_path
from atft_pipeline.runs.documents import read_document
from atft_pipeline.runs.header import read_run
from atft_pipeline.runs.lock import is_held
from atft_pipeline.runs.paths import UnreadableFile
from atft_pipeline.runs.state import run_state
from atft_pipeline.runs.tables import read_part, read_table, series_values
from atft_pipeline.storage.json_values import finite_or_none

Curve = Mapping[int, float]
"""Epoch -> value, ascending; NaN where what was recorded is not finite."""

CurveKey = tuple[str, ...]
"""Key of a curve: (metric, split, component, term) in `series`, (metric, split, slice) in `evals`."""

CURVE_KEYS: dict[str, tuple[str, ...]] = {
    "series": ("metric", "split", "component", "term"),
    "evals": ("metric", "split", "slice"),
}

PASSING = ("passed", "not_applicable")
"""Verdicts of a run that meets its criterion, or is too short for it."""


@dataclass(frozen=True)
class RunProgress:
    """One run at one moment. None, or an empty curve, where something is not measured; never 0 instead.

    `problems`: what could not be read, a sentence each. `eta_s` counts down between epochs; `since_epoch_s` is the time
    since the newest epoch was written. `epoch_evaluated` is the epoch of Sharpe and IC, which are None where that
    evaluation is invalid.
    """

    run: str
    run_dir: Path
    state: str
    started: str = ""
    reason: str | None = None
    epoch: int | None = None
    epochs: int | None = None
    eta_s: float | None = None
    since_epoch_s: float | None = None
    train_loss: Curve = field(default_factory=dict)
    validation_loss: Curve = field(default_factory=dict)
    epoch_evaluated: int | None = None
    evaluation_valid: bool | None = None
    sharpe_daily: float | None = None
    sharpe_se: float | None = None
    ic_mean: float | None = None
    lr: float | None = None
    gradient_l2: Mapping[str, Curve] = field(default_factory=dict)
    dispersion_ratio: Curve = field(default_factory=dict)
    degeneracy_events: int | None = None
    degeneracy_resets: int | None = None
    samples_per_s: float | None = None
    gpu_utilisation: float | None = None
    gpu_memory_bytes: float | None = None
    peak_rss_bytes: float | None = None
    verdict: str | None = None
    problems: tuple[str, ...] = ()

    @property
    def goes_on(self) -> bool:
        return self.state == "running"

    @property
    def has_succeeded(self) -> bool:
        """Whether it has finished, and its criterion is met or does not apply to a run of its length."""
        return self.state == "finished" and self.verdict in PASSING

    def as_dict(self) -> dict[str, Any]:
        """Newest figures by name, for JSON."""
        curves = ("train_loss", "validation_loss", "dispersion_ratio")
        return (
            vars(self)
            | {"run_dir": str(self.run_dir), "problems": list(self.problems)}
            | {name: newest(getattr(self, name)) for name in curves}
            | {"gradient_l2": {component: newest(curve) for component, curve in self.gradient_l2.items()}}
        )


def newest(curve: Curve) -> float | None:
    """The value of the newest epoch; None where there is none, or it is not finite."""
    return finite_or_none(curve.get(max(curve))) if curve else None


def read_progress(run_dir: Path, now_s: float) -> RunProgress:
    """One run at `now_s` (seconds since 1970), from the parts that can be read."""
    name = run_dir.name or run_dir.resolve().name
    try:
        return _read(run_dir, name, now_s)
    except InputError as error:
        return RunProgress(name, run_dir, "unreadable", problems=(str(error),))
    except OSError as error:
        return RunProgress(name, run_dir, "unreadable", problems=(str(unusable_path(error)),))


def _read(run_dir: Path, name: str, now_s: float) -> RunProgress:
    header = read_run(run_dir)
    state = run_state(run_dir, header)
    problems: list[str] = []
    series = _curves(run_dir, "series", problems)
    evals = _curves(run_dir, "evals", problems)
    epoch, epochs = _whole(header.get("epochs_done")), _whole(header.get("epochs_planned"))
    if epoch is None or epochs is None:
        problems.append("run.json does not say how many epochs are done and planned: a run of another version")
    since_s = _since_newest_part(run_dir, now_s) if state == "running" else None
    verdict = _verdict(run_dir, problems) if state == "finished" else None
    return RunProgress(
        run=name,
        run_dir=run_dir,
        state=state,
        started=str(header.get("started") or ""),
        reason=_text(header.get("reason")),
        epoch=epoch,
        epochs=epochs,
        eta_s=_left_s(series, epoch, epochs, since_s),
        since_epoch_s=since_s,
        train_loss=series.get(("loss_weighted", "train", "loss", "total"), {}),
        validation_loss=series.get(("loss_weighted", "validation", "loss", "total"), {}),
        **_evaluation(evals, _slice(header)),
        lr=newest(series.get(("lr", "train", "all", ""), {})),
        gradient_l2={key[2]: curve for key, curve in series.items() if key[0] == "grad_l2"},
        dispersion_ratio=series.get(("dispersion_ratio", "validation", "", ""), {}),
        degeneracy_events=_count(series, "degeneracy_event"),
        degeneracy_resets=_count(series, "degeneracy_reset"),
        samples_per_s=newest(series.get(("samples_per_s", "train", "", ""), {})),
        gpu_utilisation=newest(series.get(("gpu_utilisation", "train", "", ""), {})),
        gpu_memory_bytes=newest(series.get(("gpu_memory_bytes", "train", "", ""), {})),
        peak_rss_bytes=newest(series.get(("peak_rss_bytes", "train", "", ""), {})),
        verdict=verdict,
        problems=tuple(problems),
    )


def read_all_progress(runs: Path, now_s: float) -> list[RunProgress]:
    """Every run directory under `runs`, newest start first.

    Raises InputError when the folder does not exist.
    """
    if not runs.is_dir():
        raise InputError(f"{runs}: no such folder of runs; train one first or name another with --runs")
    progress = [read_progress(path.parent, now_s) for path in sorted(runs.glob("*/run.json"))]
    return sorted(progress, key=lambda run: run.started, reverse=True)


# Curves of a run's tables -----------------------------------------------------------------------------------------


def _curves(run_dir: Path, table: str, problems: list[str]) -> dict[CurveKey, dict[int, float]]:
    """Curves from all readable files of a table; each file is read once per process while it stays the same."""
    curves: dict[CurveKey, dict[int, float]] = {}
    for path in sorted((run_dir / table).glob("epoch_*.parquet")):
        try:
            state = path.stat()
            rows = _epoch_rows(path, state.st_mtime_ns, state.st_size, table)
        except (OSError, UnreadableFile) as error:
            problems.append(f"{table}/{path.name} is left out: {error}")
            continue
        for key, epoch, value in rows:
            curves.setdefault(key, {})[epoch] = value
    return curves


@lru_cache(maxsize=8192)
def _epoch_rows(path: Path, changed_ns: int, size: int, table: str) -> tuple[tuple[CurveKey, int, float], ...]:  # noqa: ARG001
    """(key, epoch, value) of figures by epoch, not by step; a file whose time or size has changed is read again."""
    rows = read_part(path, table)
    if "step" in rows.schema.names:
        rows = rows.filter(pc.is_null(rows["step"]))
    return tuple(
        (
            tuple(row[name] or "" for name in CURVE_KEYS[table]),
            row["epoch"],
            math.nan if row["value"] is None else row["value"],
        )
        for row in rows.select([*CURVE_KEYS[table], "epoch", "value"]).to_pylist()
        if row["epoch"] is not None
    )


def _count(series: Mapping[CurveKey, Curve], metric: str) -> int | None:
    curve = series.get((metric, "validation", "", ""))
    return None if curve is None else int(sum(value for value in curve.values() if math.isfinite(value)))


def _left_s(
    series: Mapping[CurveKey, Curve], epoch: int | None, epochs: int | None, since_s: float | None
) -> float | None:
    """Seconds to the end of a running run, of whose current epoch `since_s` have passed."""
    length = epoch_length_s(
        series.get(("epoch_s", "train", "", ""), {}), series.get(("validation_s", "validation", "", ""), {})
    )
    if since_s is None or length is None or epoch is None or epochs is None or not math.isfinite(length):
        return None
    return round((epochs - epoch) * length - min(since_s, length), 1) if epoch < epochs else 0.0


def _evaluation(evals: Mapping[CurveKey, Curve], universe: str) -> dict[str, Any]:
    """The newest evaluation of the validation split in the criterion's slice."""
    valid = evals.get(("valid", "validation", universe), {})
    sharpe = evals.get(("sharpe_daily", "validation", universe), {})
    if not (valid or sharpe):
        return {}
    epoch = max([*valid, *sharpe])
    is_valid = finite_or_none(valid.get(epoch))
    figures = {
        metric: finite_or_none(evals.get((metric, "validation", universe), {}).get(epoch))
        for metric in ("sharpe_daily", "sharpe_se", "ic_mean")
    }
    return {"epoch_evaluated": epoch, "evaluation_valid": None if is_valid is None else is_valid > 0} | figures


# The rest of a run directory --------------------------------------------------------------------------------------


def _slice(header: Mapping[str, Any]) -> str:
    evaluation = _section(_section(header, "config"), "evaluation")
    return str(evaluation.get("universe") or DEFAULT_SLICE)


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    return section if isinstance(section, dict) else {}


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _verdict(run_dir: Path, problems: list[str]) -> str | None:
    """Status of verdict.json; where it cannot be read None, and a sentence in `problems`."""
    try:
        status = read_document(run_dir, "verdict.json").get("status")
    except UnreadableFile as error:
        problems.append(f"verdict.json: {error}, although the run has finished")
        return None
    if status is None:
        problems.append("verdict.json: holds no status")
    return _text(status)


def _since_newest_part(run_dir: Path, now_s: float) -> float | None:
    written = [path.stat().st_mtime for path in run_dir.glob("series/epoch_*.parquet")]
    return max(0.0, round(now_s - max(written), 1)) if written else None


ETA_EPOCHS = 3
"""The time left is extrapolated from the mean length of this many newest epochs."""


def run_snapshots(runs: Path) -> list[dict[str, Any]]:
    """A row per run directory under `runs`, newest start first; a directory that cannot be read says why.

    Raises InputError when the folder does not exist.
    """
    if not runs.is_dir():
        raise InputError(f"{runs}: no such folder of runs; train one first or name another with --runs")
    snapshots = [run_snapshot(path.parent) for path in sorted(runs.glob("*/run.json"))]
    return sorted(snapshots, key=lambda row: row["started"] or "", reverse=True)


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


def has_ended(progress: RunProgress) -> bool:
    """Whether no process writes the run any more. A starting run cannot be read yet, but a process holds its lock."""
    if progress.state == "unreadable":
        return not is_held(progress.run_dir)
    return not progress.goes_on


def epoch_length_s(trained_s: Mapping[int, float], validated_s: Mapping[int, float]) -> float | None:
    """Mean seconds of the newest epochs, training and validation; None before the first is complete."""
    newest = [trained_s[epoch] + validated_s.get(epoch, 0.0) for epoch in sorted(trained_s)[-ETA_EPOCHS:]]
    return statistics.mean(newest) if newest else None


def _newest(series: pa.Table, metric: str, **where: str) -> float | None:
    """The figure of the newest epoch; None where there is none or it is not finite, which JSON cannot express."""
    values = series_values(series, metric, **where)
    newest = values[max(values)] if values else math.nan
    return newest if math.isfinite(newest) else None
