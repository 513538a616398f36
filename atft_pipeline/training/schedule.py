"""Learning-rate schedules: one table of shapes over a common linear warm-up.

`planned_lr` is the plan without an optimizer: training sets the rate by it, and the diagnosis holds the recorded rates
to it. It needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from atft_pipeline.config.schema import ScheduleConfig
from atft_pipeline.errors import InputError

if TYPE_CHECKING:  # the diagnosis reads the shapes without torch
    from torch.optim import Optimizer

Shape = Callable[[float, ScheduleConfig], float]
"""Share of the base rate at `progress`, 0 right after the warm-up and 1 at the last step."""


def _flat(progress: float, config: ScheduleConfig) -> float:  # noqa: ARG001
    return 1.0


def _cosine(progress: float, config: ScheduleConfig) -> float:
    """Loshchilov & Hutter, SGDR (2017), eq. 5 without restarts."""
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


SHAPES: dict[str, Shape] = {"cosine": _cosine, "plateau": _flat, "constant": _flat}
"""Name of a schedule -> its shape. `plateau` is flat here: its reductions depend on the validation loss
(`Plateau`)."""


def warmup_steps(config: ScheduleConfig, total_steps: int) -> int:
    """How many of the first steps raise the rate to the base rate."""
    return int(config.warmup_fraction * total_steps)


def planned_ratio(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Share of the base rate at `step`, from 0, of `total_steps`, before any reduction by `plateau`.

    Step k of the w warm-up steps runs at (k + 1) / w of the base rate, so that no step is spent at zero.

    Raises InputError for a schedule without a shape.
    """
    if config.name not in SHAPES:
        raise InputError(f"train.schedule.name: expected one of {', '.join(SHAPES)}, found {config.name!r}")
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(total_steps - warmup - 1, 1), 1.0)
    return SHAPES[config.name](progress, config)


def planned_lr(config: ScheduleConfig, base_lr: float, step: int, total_steps: int) -> float:
    """The rate at `step`, from 0, of `total_steps`, before any reduction by `plateau`.

    Raises InputError for a schedule without a shape.
    """
    return base_lr * planned_ratio(config, step, total_steps)


class Plateau:
    """The factor by which `plateau` lowers the rate; 1 for every other schedule.

    More than `patience` epochs in a row without a new lowest validation loss multiply it by `factor`, never below
    `min_lr_ratio` (as torch's ReduceLROnPlateau with threshold 0). A loss that is not finite is no improvement.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        self.factor = 1.0
        self.best_loss = math.inf
        self.epochs_without_improvement = 0

    def epoch_end(self, validation_loss: float) -> None:
        """Call after each epoch's validation."""
        if validation_loss < self.best_loss:
            self.best_loss = validation_loss
            self.epochs_without_improvement = 0
            return
        self.epochs_without_improvement += 1
        if self.config.name == "plateau" and self.epochs_without_improvement > self.config.patience:
            self.factor = max(self.factor * self.config.factor, self.config.min_lr_ratio)
            self.epochs_without_improvement = 0


class LearningRateSchedule:
    """Sets `lr` of every parameter group: base rate x planned ratio x plateau factor, which acts after the warm-up."""

    def __init__(self, optimizer: Optimizer, config: ScheduleConfig, total_steps: int) -> None:
        self.optimizer = optimizer
        self.config = config
        self.total_steps = max(total_steps, 1)
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.steps = 0
        self.plateau = Plateau(config)
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
        self.plateau.epoch_end(validation_loss)
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs; the base rates come from the configuration."""
        return {
            "steps": self.steps,
            "plateau_factor": self.plateau.factor,
            "best_loss": self.plateau.best_loss,
            "epochs_without_improvement": self.plateau.epochs_without_improvement,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken, and sets the optimizer's rates accordingly."""
        self.steps = int(state["steps"])
        self.plateau.factor = float(state["plateau_factor"])
        self.plateau.best_loss = float(state["best_loss"])
        self.plateau.epochs_without_improvement = int(state["epochs_without_improvement"])
        self._apply()

    def _apply(self) -> None:
        ratio = planned_ratio(self.config, self.steps, self.total_steps)
        if self.steps >= warmup_steps(self.config, self.total_steps):
            ratio *= self.plateau.factor
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base_lr * ratio
