"""The scores of the run's checkpoints, computed again and compared with the stored predictions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from atft_pipeline.diagnostics.probes.figures import Figures
from atft_pipeline.diagnostics.run_inputs import RunInputs
from atft_pipeline.errors import InputError
from atft_pipeline.evaluation.metrics import information_coefficient, mean_and_error
from atft_pipeline.inspection.reader import read_scores

SIGNALS = ("rescored_gap", "rescored_correlation", "rescored_epoch", "rescored_ic")

REPRODUCES = 1e-3
"""Largest difference over the spread of the scores at which predictions count as those of a checkpoint."""


def measure(inputs: RunInputs) -> Figures:
    """Scores the validation sessions again with the run's checkpoints, and compares with the stored predictions.

    `rescored_gap`: largest difference over the spread of the scores, with the checkpoint of the predictions' epoch.
    `rescored_correlation`: correlation of the two. `rescored_epoch`: epoch of the checkpoint that gives the
    predictions, -1 where none does.
    """
    predictions = inputs.record.predictions
    epoch = max(predictions, default=0)
    if not epoch:
        raise InputError("no readable predictions")
    if epoch not in inputs.checkpoints:
        raise InputError(f"no checkpoint of epoch {epoch}, whose predictions are stored")
    panel = inputs.panel
    stored = _stored_panel(predictions[epoch], panel.sessions[inputs.split.validation], panel.codes)
    rescored = inputs.scores(inputs.model(epoch))
    both = np.isfinite(rescored) & np.isfinite(stored)
    if not both.any():
        raise InputError("the predictions hold none of the validation rows")
    gap = _gap(rescored, stored)
    others = (
        e for e in inputs.checkpoints if e != epoch and _gap(inputs.scores(inputs.model(e)), stored) <= REPRODUCES
    )
    varies = np.ptp(rescored[both]) > 0 and np.ptp(stored[both]) > 0
    return {
        "rescored_gap": gap,
        "rescored_correlation": float(np.corrcoef(rescored[both], stored[both])[0, 1]) if varies else None,
        "rescored_epoch": float(epoch if gap <= REPRODUCES else next(others, -1)),
        "rescored_ic": mean_and_error(information_coefficient(rescored, inputs.targets))[0],
    }


def _gap(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    both = np.isfinite(a) & np.isfinite(b)
    spread = float(np.std(a[both])) if both.any() else 0.0
    largest = float(np.abs(a - b)[both].max()) if both.any() else math.inf
    return largest / spread if spread > 0 else (0.0 if largest == 0 else math.inf)


def _stored_panel(file: Path, sessions: NDArray[np.datetime64], codes: NDArray[np.str_]) -> NDArray[np.float64]:
    """Stored validation scores of horizon 1 as `[T, N]`, NaN where there is none."""
    table = read_scores(file, [1])
    if table is None:
        raise InputError(f"{file.name}: its columns are not those of predictions")
    table = table.filter(pc.equal(table["split"], "validation"))
    cells = np.full((len(sessions), len(codes)), np.nan)
    dates, names = table["Date"].to_numpy().astype("datetime64[D]"), np.array(table["Code"].to_pylist(), np.str_)
    t, n = np.searchsorted(sessions, dates), np.searchsorted(codes, names)
    in_range = (t < len(sessions)) & (n < len(codes))
    t, n, value = t[in_range], n[in_range], table["score_1d"].to_numpy()[in_range]
    is_member = (sessions[t] == dates[in_range]) & (codes[n] == names[in_range])
    cells[t[is_member], n[is_member]] = value[is_member]
    return cells
