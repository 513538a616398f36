"""The expectations of the validation report. Missing one is a warning; it does not change the verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from atft_pipeline.storage.json_values import finite_or_none

MAX_DEGENERACY_RESETS = 5
TARGET_SHARPE = 0.849


@dataclass(frozen=True)
class TrainingProgress:
    """The figures of a run that the milestones read."""

    sharpe_by_epoch: Mapping[int, float | None] = field(default_factory=dict)
    """Epoch -> `sharpe_daily` of validation."""
    gradient_warnings: int | None = 0
    degeneracy_resets: int | None = 0
    crashed: bool = False
    """Whether an earlier start of the run failed or was killed."""


@dataclass(frozen=True)
class Milestone:
    """One expectation of the validation report."""

    name: str
    epoch: int | None
    value: float | None
    expected: str
    passed: bool | None
    """None: not reached or not measured."""


MILESTONES: tuple[tuple[int, float, float], ...] = ((5, 0.08, 0.10), (20, 0.10, 0.15), (50, 0.15, 0.30))
"""Epoch, and the range of the daily Sharpe expected by then. A Sharpe above the range is no miss."""
BEYOND_50: tuple[float, float] = (0.30, 0.85)


def progress_milestones(progress: TrainingProgress, epochs_planned: int) -> list[Milestone]:
    """The milestones whose epochs the run was planned to reach."""
    items = []
    for epoch, low, high in MILESTONES:
        if epoch <= epochs_planned:
            items.append(_sharpe_milestone(f"sharpe_by_epoch_{epoch}", epoch, low, high, progress))
    if epochs_planned > MILESTONES[-1][0]:
        low, high = BEYOND_50
        items.append(_sharpe_milestone("sharpe_beyond_epoch_50", epochs_planned, low, high, progress))
        items.append(_sharpe_milestone("target_sharpe", epochs_planned, TARGET_SHARPE, math.inf, progress))
    warnings, resets = progress.gradient_warnings, progress.degeneracy_resets
    items.append(_count_milestone("gradient_warnings", warnings, "0", lambda n: n == 0))
    items.append(
        _count_milestone(
            "degeneracy_resets", resets, f"fewer than {MAX_DEGENERACY_RESETS}", lambda n: n < MAX_DEGENERACY_RESETS
        )
    )
    items.append(Milestone("no_crash", None, float(progress.crashed), "no crash", not progress.crashed))
    return items


def _sharpe_milestone(name: str, epoch: int, low: float, high: float, progress: TrainingProgress) -> Milestone:
    value = finite_or_none(progress.sharpe_by_epoch.get(epoch))
    expected = f"at least {low}" if math.isinf(high) else f"{low:.2f} to {high:.2f}"
    return Milestone(name, epoch, value, expected, None if value is None else value >= low)


def _count_milestone(name: str, count: int | None, expected: str, good: Callable[[int], bool]) -> Milestone:
    if count is None:
        return Milestone(name, None, None, expected, None)
    return Milestone(name, None, float(count), expected, good(count))


def milestone_warning(milestone: Milestone) -> str:
    value = "none" if milestone.value is None else f"{milestone.value:.3g}"
    return f"milestone {milestone.name}: expected {milestone.expected}, found {value}"
