"""What the model was given: a sample of its blocks, as figures that can be held against the dataset.

A feature that a loader fills, scales, shifts or never finds looks healthy in the dataset. So the figures are taken from
blocks, behind everything that lies between, and the diagnosis compares them with the dataset's own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from atft_pipeline.blocks import BlockDataset
from atft_pipeline.config import HORIZONS
from atft_pipeline.lineage import write_parquet
from atft_pipeline.splits import Split

SAMPLED_SESSIONS: int = 16
"""Sessions of each split, evenly spaced, first and last included."""

SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("date", pa.date32()),
        ("name", pa.string()),
        ("stocks", pa.int32()),
        ("present", pa.int32()),
        ("mean", pa.float64()),
        ("std", pa.float64()),
        ("ic", pa.float64()),
    ]
)
"""One row per split, session and input: a feature or a target. `stocks` are the members of the session, `present` those
with a value that is not missing; mean and std (ddof 0) over these, `ic` their correlation with `target_1d`."""


def write_inputs(path: Path, data: BlockDataset, split: Split) -> None:
    """`inputs.parquet` of a run."""
    rows: dict[str, list[object]] = {name: [] for name in SCHEMA.names}
    for name in ("train", "validation", "test"):
        for session in sampled(getattr(split, name)):
            _add_session(rows, name, data, int(session))
    write_parquet(path, pa.table(rows, SCHEMA))


def sampled(sessions: NDArray[np.int64]) -> NDArray[np.int64]:
    """At most `SAMPLED_SESSIONS` of the sessions, evenly spaced."""
    places = np.linspace(0, len(sessions) - 1, min(SAMPLED_SESSIONS, len(sessions))).round().astype(int)
    return sessions[np.unique(places)]


def _add_session(rows: dict[str, list[object]], split: str, data: BlockDataset, session: int) -> None:
    block = data.block(np.array([session]))
    member = block.member[:, 0].cpu().numpy()
    x = np.where(block.missing[:, -1].cpu().numpy(), np.nan, block.x[:, -1].double().cpu().numpy())[member]  # [n, F]
    target = block.target[:, 0].double().cpu().numpy()[member]  # [n, H]
    values = np.concatenate((x, target), axis=1)
    names = [*data.panel.feature_names, *(f"target_{h}d" for h in HORIZONS)]
    for name, column in zip(names, values.T, strict=True):
        mean, std, present = moments(column)
        figures = (split, data.panel.sessions[session].item(), name, len(column), present, mean, std)
        for key, value in zip(SCHEMA.names, (*figures, correlation(column, target[:, 0])), strict=True):
            rows[key].append(value)


def moments(values: NDArray[np.float64]) -> tuple[float | None, float | None, int]:
    """Mean, std (ddof 0) and number of the values that are there."""
    there = values[np.isfinite(values)]
    return (float(there.mean()), float(there.std()), len(there)) if len(there) else (None, None, 0)


def correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    """Pearson correlation over what both have; None where either does not vary."""
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < 3 or np.ptp(a[both]) == 0 or np.ptp(b[both]) == 0:
        return None
    return float(np.corrcoef(a[both], b[both])[0, 1])
