"""An experiment compared with the run that it explains, session by session, and where the result is kept.

The result is kept in the explained run's own directory, `RUN_DIR/probes/experiment_a.json`, so that the report of a run
needs no files of another run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atft_pipeline.config.overrides import from_dict, leaves
from atft_pipeline.config.schema import EXPERIMENT_IDS
from atft_pipeline.errors import InputError
from atft_pipeline.evaluation.metrics import paired_difference, sharpe
from atft_pipeline.runs.documents import read_document
from atft_pipeline.runs.header import read_run
from atft_pipeline.runs.keys import NON_DECIDING_FIELDS
from atft_pipeline.runs.tables import read_table
from atft_pipeline.storage.atomic import write_json
from atft_pipeline.storage.json_values import finite_or_none

SPLIT = "validation"
SIGNIFICANT_SE = 1.96
"""Standard errors beyond which a difference counts as one, where no interval was computed."""


@dataclass(frozen=True)
class Difference:
    """Mean of experiment minus explained run over the sessions that both have a value for; None where not computed."""

    difference: float | None
    se: float | None
    ci_low: float | None
    ci_high: float | None
    sessions: int

    @property
    def reading(self) -> str:
        """better, worse or within chance, by the 95 % bootstrap interval, else by the standard error."""
        if self.difference is None:
            return "not measured"
        low, high = self.ci_low, self.ci_high
        if low is None or high is None:
            if self.se is None:
                return "too few sessions"
            low, high = (self.difference + sign * SIGNIFICANT_SE * self.se for sign in (-1.0, 1.0))
        if low > 0.0:
            return "better"
        return "worse" if high < 0.0 else "within chance"


@dataclass(frozen=True)
class PairedResult:
    """What an experiment earns more than the explained run, on the same validation sessions and at the same epoch."""

    explained: str
    """Name of the run that is explained."""
    experiment: str
    """Name of the other run."""
    experiment_dir: str
    changed: dict[str, list[Any]]
    """Field -> its value in the explained run and in the experiment, where they differ."""
    same_code: bool
    dataset_fingerprint: str
    slice: str
    epoch: int
    """The last epoch that both have evaluated."""
    sessions: int
    ic: Difference
    gross: Difference
    """Of the daily return before costs."""
    explained_sharpe: float | None
    experiment_sharpe: float | None
    """Daily, gross, of this epoch and slice."""


Daily = dict[date, tuple[float, float]]
"""Session -> IC and gross return."""


def compare_runs(run_dir: Path, other_dir: Path) -> PairedResult:
    """The run in `other_dir` compared with the run in `run_dir`, in the slice of the latter's criterion.

    Raises InputError where a record cannot be read, where the datasets or the validation sessions differ, and where no
    epoch was evaluated in both.
    """
    run, other = read_run(run_dir), read_run(other_dir)
    fingerprint, other_fingerprint = _fingerprint(run, run_dir), _fingerprint(other, other_dir)
    if other_fingerprint != fingerprint:
        raise InputError(
            f"{other_dir}: was trained on dataset {other_fingerprint[:12]}, {run_dir} on {fingerprint[:12]}; runs are"
            " compared on one dataset only"
        )
    config = from_dict(_config(run, run_dir)).evaluation
    by_epoch, other_by_epoch = _daily(run_dir, config.universe), _daily(other_dir, config.universe)
    common = sorted(by_epoch.keys() & other_by_epoch.keys())
    if not common:
        raise InputError(
            f"{other_dir}: no epoch was evaluated both there ({_listed(other_by_epoch)}) and in {run_dir}"
            f" ({_listed(by_epoch)}); train both further"
        )
    epoch = common[-1]
    daily, other_daily = by_epoch[epoch], other_by_epoch[epoch]
    if daily.keys() != other_daily.keys():
        raise InputError(
            f"{other_dir}: validates on {_span(other_daily)}, {run_dir} on {_span(daily)}; runs are compared on the"
            " same split only"
        )
    earned, other_earned = _columns(daily), _columns(other_daily)
    ic, gross = (
        Difference(**_paired(other_earned[k], earned[k], config.bootstrap_samples)) for k in range(len(earned))
    )
    return PairedResult(
        explained=run_dir.resolve().name,
        experiment=other_dir.name,
        experiment_dir=str(other_dir),
        changed=_changed(_config(run, run_dir), _config(other, other_dir)),
        same_code=run.get("code_revision") == other.get("code_revision"),
        dataset_fingerprint=fingerprint,
        slice=config.universe,
        epoch=epoch,
        sessions=len(daily),
        ic=ic,
        gross=gross,
        explained_sharpe=finite_or_none(sharpe(earned[1])),
        experiment_sharpe=finite_or_none(sharpe(other_earned[1])),
    )


def evaluated_epochs(run_dir: Path) -> list[int]:
    """Epochs that can be compared: their validation sessions have figures in the slice of the criterion."""
    config = from_dict(_config(read_run(run_dir), run_dir)).evaluation
    return sorted(_daily(run_dir, config.universe))


def _fingerprint(run: Mapping[str, Any], run_dir: Path) -> str:
    if not run.get("dataset_fingerprint"):
        raise InputError(f"run directory {run_dir}: run.json does not say which dataset it was trained on; train again")
    return str(run["dataset_fingerprint"])


def _config(run: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    config = run.get("config")
    if not isinstance(config, dict):
        raise InputError(f"run directory {run_dir}: run.json has no configuration; train again")
    return config


def _daily(run_dir: Path, universe: str) -> dict[int, Daily]:
    """Epoch -> its validation sessions. An epoch without a finite value, an invalid evaluation, is left out."""
    epochs: dict[int, Daily] = {}
    for row in read_table(run_dir, "daily").to_pylist():
        if (row["split"], row["slice"]) == (SPLIT, universe):
            values = tuple(math.nan if row[name] is None else row[name] for name in ("ic", "gross"))
            epochs.setdefault(row["epoch"], {})[row["date"]] = (values[0], values[1])
    return {epoch: daily for epoch, daily in epochs.items() if any(np.isfinite(v).any() for v in daily.values())}


def _columns(daily: Daily) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    ordered = np.array([daily[session] for session in sorted(daily)], np.float64)
    return ordered[:, 0], ordered[:, 1]


def _paired(ours: NDArray[np.float64], theirs: NDArray[np.float64], samples: int) -> dict[str, Any]:
    return paired_difference(ours, theirs, samples=samples)


def _changed(config: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, list[Any]]:
    values, other_values = leaves(config), leaves(other)
    ignored = {f"train.{name}" for name in NON_DECIDING_FIELDS}
    fields = [name for name in sorted(values.keys() | other_values.keys()) if name not in ignored]
    pairs = {name: [values.get(name), other_values.get(name)] for name in fields}
    return {name: [old, new] for name, (old, new) in pairs.items() if old != new}


def _listed(epochs: Mapping[int, Daily]) -> str:
    return f"epochs {min(epochs)} to {max(epochs)}" if epochs else "none"


def _span(daily: Daily) -> str:
    return f"{len(daily)} sessions from {min(daily)} to {max(daily)}"


# Results ---------------------------------------------------------------------------------------------------------


def result_path(run_dir: Path, id: str) -> Path:
    """Where the result of experiment A, B, C or D is kept. Raises InputError for another id."""
    if id not in EXPERIMENT_IDS:
        raise InputError(f"experiment: expected one of {', '.join(EXPERIMENT_IDS)}, found {id!r}")
    return run_dir / "probes" / f"experiment_{id.lower()}.json"


def write_experiment_result(run_dir: Path, id: str, result: PairedResult) -> Path:
    """Keeps the result with the run that it explains. An earlier result of the same experiment is replaced at once."""
    path = result_path(run_dir, id)
    write_json(path, asdict(result))
    return path


def read_experiment_results(run_dir: Path) -> dict[str, PairedResult]:
    """Experiment -> its result, for the experiments that were run. Raises InputError for a file that is no result."""
    return {id: _read_result(run_dir, id) for id in EXPERIMENT_IDS if result_path(run_dir, id).exists()}


def _read_result(run_dir: Path, id: str) -> PairedResult:
    path = result_path(run_dir, id)
    try:
        values = read_document(run_dir, str(path.relative_to(run_dir)))
        return PairedResult(**(values | {name: Difference(**values[name]) for name in ("ic", "gross")}))
    except (InputError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not the result of an experiment ({type(error).__name__}: {error}); delete it and run the"
            " experiment again"
        ) from error


def experiment_rows(run_dir: Path) -> list[dict[str, str]]:
    """A row of the report per experiment that was run. The row of a result that cannot be read says so."""
    rows = []
    for id in EXPERIMENT_IDS:
        if result_path(run_dir, id).exists():
            try:
                rows.append({"experiment": id} | _row(_read_result(run_dir, id)))
            except InputError as error:
                rows.append({"experiment": id} | dict.fromkeys(_COLUMNS, "not readable") | {"changed": str(error)})
    return rows


_COLUMNS = ("changed", "IC", "gross return, bps a day", "Sharpe", "at", "run")


def _row(result: PairedResult) -> dict[str, str]:
    changed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in result.changed.items()) or "nothing"
    code = "" if result.same_code else "; trained by other code, which may explain a difference too"
    cells = (
        changed + code,
        _shown(result.ic, 1.0, 4),
        _shown(result.gross, 1e4, 2),
        f"{_number(result.experiment_sharpe)} against {_number(result.explained_sharpe)}",
        f"epoch {result.epoch}, {SPLIT}, {result.slice}, {result.sessions} sessions",
        result.experiment,
    )
    return dict(zip(_COLUMNS, cells, strict=True))


def _shown(of: Difference, unit: float, digits: int) -> str:
    if of.difference is None:
        return of.reading
    error = "" if of.se is None else f" ± {unit * of.se:.{digits}f}"
    interval = ""
    if of.ci_low is not None and of.ci_high is not None:
        interval = f" ({unit * of.ci_low:+.{digits}f} to {unit * of.ci_high:+.{digits}f})"
    return f"{of.reading}: {unit * of.difference:+.{digits}f}{error}{interval}"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
