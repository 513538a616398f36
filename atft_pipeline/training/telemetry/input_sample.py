"""What the model was given: figures of a sample of its sessions, which the diagnosis compares with the dataset's own.

A feature that the loader fills, scales, shifts or never finds still looks healthy in the dataset. So the figures are
taken in the first epoch, from the very blocks that the model and the loss get.
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

if TYPE_CHECKING:  # the diagnosis imports this module and needs no torch
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
    """Figures of the sampled sessions of each split, taken as blocks with these sessions come by.

    A session outside its split is a fault, and is taken too, up to `SAMPLED_SESSIONS` of them. Nothing is taken before
    `start` and after `write`.
    """

    def __init__(self, panel: Panel, split: Split) -> None:
        self._panel = panel
        parts = {"train": split.train, "validation": split.validation, "test": split.test}
        self._sessions = {name: frozenset(part.tolist()) for name, part in parts.items()}
        self._wanted = {name: set(sampled(_with_members(panel, part)).tolist()) for name, part in parts.items()}
        self._foreign = dict.fromkeys(parts, SAMPLED_SESSIONS)
        self._rows: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
        self._is_open = False

    def start(self) -> None:
        """From now on blocks are looked at: the first epoch of a run begins."""
        self._is_open = True

    def observe(self, split: str, block: Block) -> None:
        """Takes the figures of the block's sessions that are in the sample and were not taken before."""
        if not self._is_open:
            return
        for column, session in enumerate(block.session_index.tolist()):
            if session in self._wanted[split]:
                self._wanted[split].remove(session)
            elif session not in self._sessions[split] and self._foreign[split]:
                self._foreign[split] -= 1
            else:
                continue
            _add_session(self._rows, split, self._panel, block, column)

    def write(self, path: Path) -> None:
        """Writes `inputs.parquet` of a run, once."""
        if self._is_open:
            write_parquet(path, pa.table(self._rows, SCHEMA))
            self._is_open = False


def _with_members(panel: Panel, sessions: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sessions that have a member: no block is made of any other session."""
    return sessions[panel.member[sessions].any(axis=1)]


def sampled(sessions: NDArray[np.int64]) -> NDArray[np.int64]:
    """At most `SAMPLED_SESSIONS` of the sessions, evenly spaced."""
    positions = np.linspace(0, len(sessions) - 1, min(SAMPLED_SESSIONS, len(sessions))).round().astype(int)
    return sessions[np.unique(positions)]


def _add_session(rows: dict[str, list[Any]], split: str, panel: Panel, block: Block, column: int) -> None:
    row = column + block.x.shape[1] - block.member.shape[1]  # behind the warm-up sessions
    member = block.member[:, column].cpu().numpy()
    x = np.where(block.missing[:, row].cpu().numpy(), np.nan, block.x[:, row].double().cpu().numpy())[member]  # [n, F]
    target = block.target[:, column].double().cpu().numpy()[member]  # [n, H]
    values = np.concatenate((x, target), axis=1)
    names = [*panel.feature_names, *(f"target_{h}d" for h in HORIZONS)]
    mean, std, present = moments(values)
    day = panel.sessions[int(block.session_index[column])].item()
    figures = (mean, std, correlations(values, target[:, 0]))
    for key, by_name in zip(("mean", "std", "ic"), figures, strict=True):
        rows[key].extend(None if np.isnan(value) else value for value in by_name.tolist())
    rows["present"].extend(present.tolist())
    rows["name"].extend(names)
    for key, same in (("split", split), ("date", day), ("stocks", len(values))):
        rows[key].extend([same] * len(names))


def moments(
    values: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Mean, std (ddof 0) and number of the values of each column `[n, C] -> [C]`; NaN where a column has none."""
    present = np.isfinite(values)
    count = present.sum(axis=0)
    divisor = np.where(count > 0, count, np.nan)
    mean = np.where(present, values, 0.0).sum(axis=0) / divisor
    deviation = np.where(present, values - mean, 0.0)
    return mean, np.sqrt((deviation**2).sum(axis=0) / divisor), count


def correlations(values: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson correlation of each column `[n, C]` with `target: [n]`, over what both have: `[C]`.

    NaN where either does not vary, or where fewer than three rows have both.
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
