"""Ridge on the run's own sessions, to see whether there is anything to learn."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from atft_pipeline.diagnostics.probes.figures import Figures
from atft_pipeline.diagnostics.run_inputs import RunInputs
from atft_pipeline.evaluation.metrics import information_coefficient, mean_and_error
from atft_pipeline.inspection.reader import Record

SIGNALS = ("baseline_ic", "baseline_ic_t", "baseline_train_ic", "over_baseline_t")


def measure(inputs: RunInputs) -> Figures:
    """Fits ridge on the run's training sessions and evaluates it on its validation sessions.

    `baseline_ic` and its t; `over_baseline_t`: t of the run's daily IC minus ridge's; `baseline_train_ic`: in sample.
    """
    from atft_pipeline.evaluation.baselines import fit_ridge

    panel, split = inputs.panel, inputs.split
    scores = fit_ridge(panel, split, np.concatenate([split.train, split.validation]))
    ic = information_coefficient(scores[split.validation], inputs.targets)
    trained = information_coefficient(scores[split.train], panel.targets[split.train, :, 0].astype(np.float64))
    mean, error = mean_and_error(ic)
    network_ic = _daily_ic(inputs.record, panel.sessions[split.validation])
    difference = mean_and_error(network_ic - ic)
    return {
        "baseline_ic": mean,
        "baseline_ic_t": mean / error if error else None,
        "baseline_train_ic": mean_and_error(trained)[0],
        "over_baseline_t": difference[0] / difference[1] if difference[1] else None,
    }


def _daily_ic(record: Record, sessions: NDArray[np.datetime64]) -> NDArray[np.float64]:
    rows = record.rows(
        """SELECT date, ic FROM daily WHERE split = 'validation' AND slice = ?
           AND epoch = (SELECT max(epoch) FROM daily) AND isfinite(ic)""",
        record.slice,
    )
    values = dict(rows)
    return np.array([values.get(day, math.nan) for day in sessions.astype("datetime64[D]").tolist()], float)
