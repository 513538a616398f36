"""Learning-rate schedules: a table of shapes over a common linear warm-up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer

from atft_pipeline.config.schema import ScheduleConfig

Shape = Callable[[float, ScheduleConfig], float]
"""Share of the base rate at `progress`, 0 right after the warm-up and 1 at the last step."""


def _flat(progress: float, config: ScheduleConfig) -> float:  # noqa: ARG001
    return 1.0


def _cosine(progress: float, config: ScheduleConfig) -> float:
    """Loshchilov & Hutter, SGDR (2017), eq. 5 without restarts."""
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


SHAPES: dict[str, Shape] = {"cosine": _cosine, "plateau": _flat, "constant": _flat}


class LearningRateSchedule:
    """Sets `lr` of every parameter group: base lr x warm-up x shape x plateau factor.

    Step k (from 0) of the w warm-up steps runs at (k + 1) / w of the base rate, so that no step is spent at zero. Only
    `plateau` reads the validation loss: more than `patience` epochs in a row without a new lowest one multiply the rate
    by `factor`, never below `min_lr_ratio` (as torch's ReduceLROnPlateau with threshold 0). A loss that is not finite
    counts as no improvement.
    """

    def __init__(self, optimizer: Optimizer, config: ScheduleConfig, total_steps: int) -> None:
        self.optimizer = optimizer
        self.config = config
        self.total_steps = max(total_steps, 1)
        self.warmup_steps = int(config.warmup_fraction * self.total_steps)
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.steps = 0
        self.plateau_factor = 1.0
        self.best_loss = math.inf
        self.epochs_without_improvement = 0
        self._apply()

    @property
    def lr(self) -> float:
        """Rate of the first parameter group for the next optimizer step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self) -> None:
        """Call after each optimizer step."""
        self.steps += 1
        self._apply()

    def epoch_end(self, validation_loss: float) -> None:
        """Call after each epoch's validation."""
        if validation_loss < self.best_loss:
            self.best_loss = validation_loss
            self.epochs_without_improvement = 0
            return
        self.epochs_without_improvement += 1
        if self.config.name == "plateau" and self.epochs_without_improvement > self.config.patience:
            self.plateau_factor = max(self.plateau_factor * self.config.factor, self.config.min_lr_ratio)
            self.epochs_without_improvement = 0
            self._apply()

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs; the base rates come from the configuration."""
        return {
            "steps": self.steps,
            "plateau_factor": self.plateau_factor,
            "best_loss": self.best_loss,
            "epochs_without_improvement": self.epochs_without_improvement,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, and set the optimizer's rates accordingly."""
        self.steps = int(state["steps"])
        self.plateau_factor = float(state["plateau_factor"])
        self.best_loss = float(state["best_loss"])
        self.epochs_without_improvement = int(state["epochs_without_improvement"])
        self._apply()

    def _ratio(self) -> float:
        if self.steps < self.warmup_steps:
            return (self.steps + 1) / self.warmup_steps
        steps_after_warmup = max(self.total_steps - self.warmup_steps - 1, 1)
        progress = min((self.steps - self.warmup_steps) / steps_after_warmup, 1.0)
        return SHAPES[self.config.name](progress, self.config) * self.plateau_factor

    def _apply(self) -> None:
        ratio = self._ratio()
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base_lr * ratio
