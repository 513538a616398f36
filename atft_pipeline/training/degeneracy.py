"""Collapse of predictions: how dispersed they are within a session, and when the head must be re-drawn."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from atft_pipeline.batches.panel import Panel
from atft_pipeline.config.schema import GuardConfig
from atft_pipeline.training.judging.scoring import Scores


class DegeneracyGuard:
    """Counts consecutive checks with collapsed predictions, and says when the head must be re-drawn."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.low_checks = 0

    def check(self, dispersion_ratio: float, epoch: int) -> tuple[bool, bool]:
        """(event, reset): this check is under the threshold; it is the last of `patience` such checks in a row."""
        event = epoch > self.config.warmup_epochs and not dispersion_ratio >= self.config.dispersion_ratio
        self.low_checks = self.low_checks + 1 if event else 0
        reset = self.low_checks >= self.config.patience
        if reset:
            self.low_checks = 0
        return event, reset


def dispersions(scores: Scores, panel: Panel) -> tuple[float, float]:
    """Mean within-session std (ddof 1) of horizon 1's scores and of its standardised targets, which is near 1."""
    target = panel.targets[scores.sessions, :, 0].astype(np.float64)
    target = np.where(panel.member[scores.sessions], target, np.nan)
    mean, std = _nanmean_std(target)
    z = np.clip((target - mean) / np.where(std > 0, std, np.nan), -5, 5)
    return float(np.nanmean(_nanmean_std(scores.values[:, :, 0].astype(np.float64))[1])), float(
        np.nanmean(_nanmean_std(z)[1])
    )


def _nanmean_std(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and std (ddof 1) along axis 1, kept; NaN where fewer than 2 values, without warnings."""
    count = np.isfinite(x).sum(axis=1, keepdims=True).astype(float)
    mean = np.nansum(x, axis=1, keepdims=True) / np.where(count > 0, count, np.nan)
    variance = np.nansum((x - mean) ** 2, axis=1, keepdims=True) / np.where(count > 1, count - 1, np.nan)
    return mean, np.sqrt(variance)
