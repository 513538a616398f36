"""The average of the weights over steps."""

from __future__ import annotations

import copy

import torch

from atft_pipeline.model.atft_gat_fan import ATFTGATFAN


class WeightAverage:
    """Exponential moving average of the weights: the model that is evaluated and kept.

    The decay ramps up as (1 + step) / (10 + step), so that the initial weights do not dominate early epochs. With decay
    0 the average is the model itself.
    """

    def __init__(self, model: ATFTGATFAN, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False) if decay > 0 else model

    @torch.no_grad()
    def update(self, model: ATFTGATFAN, step: int) -> None:
        """Call after each optimizer step, `step` from 0."""
        if self.decay == 0:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        for averaged, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            averaged.copy_(buffer)
