"""The rate that a diagnosis expects equals that of the schedule that training runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from run_directories import BASE_LR, EPOCHS, healthy

from atft_pipeline.config.schema import ScheduleConfig
from atft_pipeline.diagnostics.topics.learning_rate import lr_to_plan, planned_lr, plateau_against_losses
from atft_pipeline.inspection.reader import Record, open_record
from atft_pipeline.training.schedule import SHAPES, LearningRateSchedule

KINDS = get_args(get_type_hints(ScheduleConfig)["name"])
STEPS = 200
"""Of an epoch: enough for the rate at its end to be the one after its last step."""
Losses = Callable[[int], float]


def trained_rates(config: ScheduleConfig, loss: Losses) -> dict[int, float]:
    """Rate of the last step of each epoch, by the schedule that training runs."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=BASE_LR)
    schedule = LearningRateSchedule(optimizer, config, EPOCHS * STEPS)
    rates = {}
    for epoch in range(1, EPOCHS + 1):
        for _ in range(STEPS):
            rates[epoch] = schedule.lr
            optimizer.step()
            schedule.step()
        schedule.epoch_end(loss(epoch))
    return rates


def recorded(path: Path, kind: str, loss: Losses, **fields: float) -> Record:
    config = ScheduleConfig(name=kind, **fields)  # type: ignore[arg-type]
    tables = healthy(overrides={f"train.schedule.{name}": value for name, value in ({"name": kind} | fields).items()})
    rates = trained_rates(config, loss)
    tables.set_series("lr", rates.__getitem__)
    tables.set_series("loss_weighted", loss, split="validation", term="total")
    return open_record(tables.write(path))


@pytest.mark.parametrize("kind", KINDS)
def test_every_schedule_that_configuration_allows_is_planned_as_it_is_trained(kind: str, tmp_path: Path) -> None:
    record = recorded(tmp_path / "run", kind, lambda epoch: 1.0 - 0.01 * epoch, min_lr_ratio=0.05)
    plan, rates = planned_lr(record), record.curve("lr")
    assert list(plan) == list(rates)
    assert list(plan.values())[1:] == pytest.approx(list(rates.values())[1:], rel=0.02)
    assert kind in SHAPES


def test_a_plateau_is_asked_for_what_training_does_with_the_same_losses(tmp_path: Path) -> None:
    record = recorded(tmp_path / "run", "plateau", lambda _: 1.0, patience=2, factor=0.3, min_lr_ratio=0.05)
    rates = list(record.curve("lr").values())
    assert rates[-1] == pytest.approx(0.05 * BASE_LR)
    assert plateau_against_losses(record) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("kind", ["linear", 3, None])
def test_a_schedule_that_this_code_does_not_train_with_is_not_read_as_another(kind: object, tmp_path: Path) -> None:
    tables = healthy()
    tables.run["config"]["train"]["schedule"]["name"] = kind
    record = open_record(tables.write(tmp_path / "run"))
    assert planned_lr(record) == {}
    assert lr_to_plan(record) is None
    assert not math.isnan(record.curve("lr")[1])
