"""Scores of the horizons. N stocks, S sessions, D width, H horizons."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PredictionHead(nn.Module):
    """MLP with one hidden layer: `[N, S, D] -> [N, S, H]`."""

    def __init__(self, hidden: int, horizons: int, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Dropout(dropout))
        self.output = nn.Linear(hidden, horizons)

    def forward(self, state: Tensor) -> Tensor:
        return self.output(self.hidden(state))

    @torch.no_grad()
    def reset_output(self, generator: torch.Generator | None = None) -> None:
        """Re-draw the last layer as it was first drawn, uniform within 1 / sqrt(D), from `generator` (on CPU)."""
        bound = self.output.in_features**-0.5
        for parameter in self.output.parameters():
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
