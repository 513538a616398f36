"""What the model was given: a sample of its sessions, as figures that can be held against the dataset.

A feature that a loader fills, scales, shifts or never finds looks healthy in the dataset. So the figures are taken in
the first epoch, from the very blocks that model and loss get, and the diagnosis compares them with the dataset's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from atft_pipeline.config.schema import HORIZONS
from atft_pipeline.dataset.splits import Split
from atft_pipeline.runs.record import write_parquet

if TYPE_CHECKING:  # the diagnosis reads what is written here, and needs no torch
    from atft_pipeline.batches.block import Block
    from atft_pipeline.batches.panel import Panel

SAMPLED_SESSIONS: int = 16
"""Sessions of each split that have a member of the universe, evenly spaced, first and last included."""

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


class InputSample:
    """Collects the sampled sessions of each split as blocks with them come by.

    A session that is not its split's is taken too, `SAMPLED_SESSIONS` of them at most.
    """

    def __init__(self, panel: Panel, split: Split) -> None:
        self._panel = panel
        parts = {"train": split.train, "validation": split.validation, "test": split.test}
        self._sessions = {name: frozenset(part.tolist()) for name, part in parts.items()}
        self._wanted = {name: set(sampled(_with_members(panel, part)).tolist()) for name, part in parts.items()}
        self._foreign = dict.fromkeys(parts, SAMPLED_SESSIONS)
        self._rows: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}

    def observe(self, split: str, block: Block) -> None:
        """Takes the figures of the block's sessions that are in the sample and were not seen before."""
        for place, session in enumerate(block.session_index.tolist()):
            if session in self._wanted[split]:
                self._wanted[split].remove(session)
            elif session not in self._sessions[split] and self._foreign[split]:
                self._foreign[split] -= 1
            else:
                continue
            _add_session(self._rows, split, self._panel, block, place)

    def write(self, path: Path) -> None:
        """`inputs.parquet` of a run."""
        write_parquet(path, pa.table(self._rows, SCHEMA))


def _with_members(panel: Panel, sessions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of no other session a block is made."""
    return sessions[panel.member[sessions].any(axis=1)]


def sampled(sessions: NDArray[np.int64]) -> NDArray[np.int64]:
    """At most `SAMPLED_SESSIONS` of the sessions, evenly spaced."""
    places = np.linspace(0, len(sessions) - 1, min(SAMPLED_SESSIONS, len(sessions))).round().astype(int)
    return sessions[np.unique(places)]


def _add_session(rows: dict[str, list[Any]], split: str, panel: Panel, block: Block, place: int) -> None:
    row = place + block.x.shape[1] - block.member.shape[1]  # behind the warm-up sessions
    member = block.member[:, place].cpu().numpy()
    x = np.where(block.missing[:, row].cpu().numpy(), np.nan, block.x[:, row].double().cpu().numpy())[member]  # [n, F]
    target = block.target[:, place].double().cpu().numpy()[member]  # [n, H]
    values = np.concatenate((x, target), axis=1)
    names = [*panel.feature_names, *(f"target_{h}d" for h in HORIZONS)]
    mean, std, present = moments(values)
    day = panel.sessions[int(block.session_index[place])].item()
    columns = (mean, std, correlations(values, target[:, 0]))
    for key, column in zip(("mean", "std", "ic"), columns, strict=True):
        rows[key].extend(None if np.isnan(value) else value for value in column.tolist())
    rows["present"].extend(present.tolist())
    rows["name"].extend(names)
    for key, same in (("split", split), ("date", day), ("stocks", len(values))):
        rows[key].extend([same] * len(names))


def moments(
    values: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Mean, std (ddof 0) and number of the values of each column `[n, C] -> [C]`; NaN where a column has none."""
    there = np.isfinite(values)
    count = there.sum(axis=0)
    some = np.where(count > 0, count, np.nan)
    mean = np.where(there, values, 0.0).sum(axis=0) / some
    deviation = np.where(there, values - mean, 0.0)
    return mean, np.sqrt((deviation**2).sum(axis=0) / some), count


def correlations(values: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson correlation of each column `[n, C]` with `target: [n]`, over what both have: `[C]`.

    NaN where either does not vary there or fewer than three have both.
    """
    both = np.isfinite(values) & np.isfinite(target)[:, None]
    count = both.sum(axis=0)
    enough = np.where(count >= 3, count, np.nan)
    a, b = np.where(both, values, 0.0), np.where(both, target[:, None], 0.0)
    a = np.where(both, a - a.sum(axis=0) / enough, 0.0)
    b = np.where(both, b - b.sum(axis=0) / enough, 0.0)
    size = np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))
    low, high = (
        np.where(both, values, np.inf).min(axis=0, initial=np.inf),
        np.where(both, values, -np.inf).max(axis=0, initial=-np.inf),
    )
    vary = (high > low) & (size > 0) & (count >= 3)
    return np.where(vary, (a * b).sum(axis=0) / np.where(vary, size, 1.0), np.nan)
