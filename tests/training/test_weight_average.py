"""Averaged weights follow their definition."""

from __future__ import annotations

import pytest
import torch
from training_runs import (
    trainer_of,
)

from atft_pipeline.model.atft_gat_fan import ATFTGATFAN
from atft_pipeline.training.weight_average import WeightAverage


class Moving(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0]))


@pytest.mark.parametrize("decay", [0.3, 0.995])
def test_averaged_weights_follow_their_definition(decay):
    model = Moving()
    average = WeightAverage(model, decay)
    expected = 1.0
    for step, value in enumerate([2.0, 5.0, -1.0, 0.5]):
        model.weight.data.fill_(value)
        average.update(model, step)
        kept = min(decay, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * value
        assert average.model.weight.item() == pytest.approx(expected, rel=1e-6)
    assert not average.model.weight.requires_grad
    assert model.weight.requires_grad


def test_without_decay_the_average_is_the_model(data, tmp_path):
    model = Moving()
    assert WeightAverage(model, 0.0).model is model
    trainer = trainer_of(data, tmp_path, **{"train.weight_ema": 0.0})
    assert isinstance(trainer.average.model, ATFTGATFAN)
    assert trainer.average.model is trainer.model
