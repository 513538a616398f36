"""Projection of the encoded history onto the width that graph, fusion and head share. N stocks, S sessions, D width."""

from __future__ import annotations

from torch import Tensor, nn


class BackboneProjection(nn.Module):
    """LayerNorm, linear map and GELU: `[N, S, D] -> [N, S, D]`."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.GELU())

    def forward(self, state: Tensor) -> Tensor:
        return self.layers(state)
