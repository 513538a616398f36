"""A remedy, the settings that should remove a cause, tried for two epochs."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from atft_pipeline.diagnostics.causes import REMEDIES
from atft_pipeline.diagnostics.changes import plan_changes, values_of
from atft_pipeline.diagnostics.probes.figures import Figures
from atft_pipeline.diagnostics.run_inputs import RunInputs
from atft_pipeline.errors import InputError
from atft_pipeline.evaluation.metrics import mean_and_error

PROBE_EPOCHS = 2


def remedy(inputs: RunInputs, cause: str) -> Figures:
    """Trains two epochs as the run was set and two with the cause's remedy; compares their ICs session by session.

    Both have the same seed and batches. Both are trained with the present code, so a fault of older code is in neither.
    """
    from atft_pipeline.config.overrides import with_overrides
    from atft_pipeline.training.train import train

    if cause not in REMEDIES:
        raise InputError("no settings remove this cause")
    changed = plan_changes(REMEDIES[cause], values_of(inputs.record))
    if not changed.overrides:
        raise InputError(f"the run's settings leave nothing to change ({changed.sentence})")
    short = replace(inputs.config, train=replace(inputs.config.train, epochs=PROBE_EPOCHS))
    ics: list[dict[Any, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in (
            ("as_it_was", short),
            ("changed", with_overrides(short, changed.overrides)),
        ):
            run_dir = Path(folder) / name
            train(settings, inputs.dataset, inputs.graph, run_dir, device="cpu", log=lambda _: None)
            rows = pq.read_table(run_dir / "daily").to_pylist()
            evaluated = (PROBE_EPOCHS, "validation", inputs.record.slice)
            ics.append(
                {row["date"]: row["ic"] for row in rows if (row["epoch"], row["split"], row["slice"]) == evaluated}
            )
    gains = [ics[1][day] - ics[0][day] for day in ics[0] if None not in (ics[0][day], ics[1].get(day))]
    if len(gains) < 2:
        raise InputError("no session has an IC on both sides")
    mean, error = mean_and_error(np.array(gains))
    return {"remedy_ic_gain": mean, "remedy_ic_gain_t": mean / error if error else None}
