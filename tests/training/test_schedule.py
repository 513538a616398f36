"""Learning-rate schedules against hand-computed rates and torch's own plateau rule."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest
import torch

from atft_pipeline.config.schema import ScheduleConfig
from atft_pipeline.errors import InputError
from atft_pipeline.training.schedule import SHAPES, LearningRateSchedule, planned_lr

NAMES = get_args(get_type_hints(ScheduleConfig)["name"])
"""Every schedule that the configuration allows."""


def optimizer(lr: float = 1.0) -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates(config: ScheduleConfig, steps: int) -> list[float]:
    schedule = LearningRateSchedule(optimizer(), config, total_steps=steps)
    seen = []
    for _ in range(steps):
        seen.append(schedule.lr)
        schedule.step()
    return seen


def test_cosine_warms_up_linearly_and_ends_at_the_minimum() -> None:
    seen = rates(ScheduleConfig(name="cosine", warmup_fraction=0.4, min_lr_ratio=0.1), steps=10)
    middle = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 5)) for k in range(6)]
    assert seen == pytest.approx([0.25, 0.5, 0.75, 1.0, *middle])


def test_steps_beyond_the_plan_stay_at_the_minimum() -> None:
    schedule = LearningRateSchedule(optimizer(), ScheduleConfig(min_lr_ratio=0.1), total_steps=4)
    for _ in range(9):
        schedule.step()
    assert schedule.lr == pytest.approx(0.1)


def test_constant_is_flat_after_the_warm_up() -> None:
    assert rates(ScheduleConfig(name="constant", warmup_fraction=0.5), 4) == pytest.approx([0.5, 1.0, 1.0, 1.0])


def test_every_group_keeps_its_share() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)]
    shared = torch.optim.SGD(groups)
    LearningRateSchedule(shared, ScheduleConfig(name="constant", warmup_fraction=0.5), total_steps=4)
    assert [g["lr"] for g in shared.param_groups] == pytest.approx([0.5, 0.05])


@pytest.mark.parametrize("patience", [0, 2])
def test_plateau_reduces_when_torch_does(patience: int) -> None:
    losses = [1.0, 0.9, 0.95, 0.95, 0.92, 0.91, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6]
    theirs = optimizer()
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(
        theirs, factor=0.5, patience=patience, threshold=0.0, min_lr=0.01
    )
    config = ScheduleConfig(name="plateau", warmup_fraction=0.0, patience=patience, factor=0.5, min_lr_ratio=0.01)
    ours = LearningRateSchedule(optimizer(), config, total_steps=100)
    for loss in losses:
        reference.step(loss)
        ours.epoch_end(loss)
        assert ours.lr == pytest.approx(theirs.param_groups[0]["lr"])


def test_only_plateau_reads_the_validation_loss() -> None:
    schedule = LearningRateSchedule(optimizer(), ScheduleConfig(name="constant", warmup_fraction=0.0), 10)
    for _ in range(20):
        schedule.epoch_end(1.0)
    assert schedule.lr == 1.0


def test_a_loss_that_is_not_finite_is_no_improvement() -> None:
    config = ScheduleConfig(name="plateau", warmup_fraction=0.0, patience=0)
    schedule = LearningRateSchedule(optimizer(), config, 10)
    schedule.epoch_end(math.nan)
    assert schedule.lr == 0.5


@pytest.mark.parametrize("name", NAMES)
def test_restart_continues_with_the_same_rates(name: str) -> None:
    config = ScheduleConfig(name=name, warmup_fraction=0.2, patience=0)  # type: ignore[arg-type]
    through = LearningRateSchedule(optimizer(), config, 12)
    for epoch in range(2):
        for _ in range(3):
            through.step()
        through.epoch_end(1.0 + epoch)
    restarted = LearningRateSchedule(optimizer(), config, 12)
    restarted.load_state_dict(through.state_dict())
    for _ in range(6):
        assert restarted.lr == through.lr
        restarted.step()
        through.step()
    restarted.epoch_end(5.0)
    through.epoch_end(5.0)
    assert restarted.state_dict() == through.state_dict()


# The plan ---------------------------------------------------------------------------------------------------------


def test_the_table_has_a_shape_for_every_schedule_that_configuration_allows() -> None:
    assert set(SHAPES) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_training_runs_at_the_planned_rate(name: str) -> None:
    config = ScheduleConfig(name=name, warmup_fraction=0.25, min_lr_ratio=0.1)  # type: ignore[arg-type]
    trained = LearningRateSchedule(optimizer(2.0), config, total_steps=12)
    for step in range(15):
        assert trained.lr == planned_lr(config, 2.0, step, total_steps=12)
        trained.step()


def test_a_schedule_without_a_shape_is_refused() -> None:
    config = ScheduleConfig()
    object.__setattr__(config, "name", "linear")
    with pytest.raises(InputError, match="expected one of cosine, plateau, constant, found 'linear'"):
        planned_lr(config, 1.0, 3, total_steps=10)


def test_plateau_lowers_no_rate_of_the_warm_up() -> None:
    schedule = LearningRateSchedule(optimizer(), ScheduleConfig(name="plateau", warmup_fraction=0.4, patience=0), 10)
    for _ in range(2):
        schedule.epoch_end(math.nan)
    seen = []
    for _ in range(6):
        seen.append(schedule.lr)
        schedule.step()
    assert seen == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.25, 0.25])


@pytest.mark.process(reason="a fresh interpreter")
def test_the_plan_needs_no_torch() -> None:
    code = "import sys; import atft_pipeline.training.schedule; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
