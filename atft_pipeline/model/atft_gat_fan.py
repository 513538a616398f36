"""ATFT-GAT-FAN: gated features, trailing normalisation, banded attention, graph attention, four horizons.

Shapes: N stocks, S target sessions, R receptive field, C channels, F features, D width, H horizons.

Two laws hold by construction. A stock's score for a session is the same whatever block it is computed in. No later
session changes it. Stocks meet nowhere but on the edges of the graph.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from atft_pipeline.batches.block import Block
from atft_pipeline.config.schema import HORIZONS, ModelConfig
from atft_pipeline.model.adaptive_norm import NORMALISATIONS
from atft_pipeline.model.fusion import Fusion
from atft_pipeline.model.gat import GraphAttention
from atft_pipeline.model.prediction_head import PredictionHead
from atft_pipeline.model.temporal_encoder import BackboneProjection, TemporalEncoder
from atft_pipeline.model.variable_selection import VariableSelection

ENCODED_AT_ONCE: dict[str, int] = {"cpu": 2**18, "cuda": 2**26}
"""Values of x that go through the encoder together without gradients: a processor's cache holds 1 MB of them with what
they become, 1.5 times as fast as all at once; a GPU wants large products."""


class ATFTGATFAN(nn.Module):
    """Scores of every stock of a block at its target sessions."""

    def __init__(self, config: ModelConfig, num_features: int) -> None:
        super().__init__()
        width, dropout = config.hidden_size, config.dropout
        self.adaptive_norm = NORMALISATIONS[config.normalisation](config, num_features)
        channels = self.adaptive_norm.channels
        self.variable_selection = VariableSelection(channels, num_features, width, dropout, gates=config.feature_gates)
        if config.encoder_layers:
            self.temporal_encoder = TemporalEncoder(
                width, config.attention_heads, config.window_sessions, config.encoder_layers, dropout
            )
        self.backbone_projection = BackboneProjection(width)
        if config.graph:
            self.gat = GraphAttention(width, config.gat_heads, dropout)
        self.fusion = Fusion(channels * num_features, width, 1 + config.graph, dropout, skip=config.skip)
        self.prediction_head = PredictionHead(width, len(HORIZONS), dropout)
        self.config = config

    @property
    def receptive_field(self) -> int:
        """Sessions, the scored one included, that a score depends on; blocks carry one fewer as warm-up."""
        encoded = self.config.window_sessions if self.config.encoder_layers else 1
        return encoded + self.adaptive_norm.window_sessions - 1

    def forward(self, block: Block) -> Tensor:
        """Scores `[N, S, H]` of the block's S target sessions, float32 under autocast too.

        Every stock of the block is scored at each of the S sessions, member or not; `block.member` says which count.
        """
        states = [torch.cat(parts) for parts in zip(*self._states(block), strict=True)]
        if self.config.graph:
            states.append(self.gat(states[0], block.neighbours))
        return self.prediction_head(self.fusion(states)).float()  # [N, S, H]

    def _states(self, block: Block) -> Iterator[list[Tensor]]:
        """What the stocks' own histories say, some stocks at a time where no gradient needs all that lies between."""
        _, sessions, features = block.x.shape
        limit = block.x.numel() if torch.is_grad_enabled() else ENCODED_AT_ONCE[block.x.device.type]
        at_once = max(limit // (sessions * features), 1)
        for x, missing in zip(block.x.split(at_once), block.missing.split(at_once), strict=True):
            yield self.encode(x, missing)

    def encode(self, x: Tensor, missing: Tensor) -> list[Tensor]:
        """States `[N, S, D]` of the S target sessions, of the history and with `skip` of the session itself.

        `x: [N, S+R-1, F]` with 0 where `missing`. No stock sees another.
        """
        present = (~missing).to(x.dtype)
        inputs, removed = self.adaptive_norm(x * present, present)  # [N, S+W-1, C, F]
        h = self.variable_selection(inputs)  # [N, S+W-1, D]
        if self.config.encoder_layers:
            observed = inputs[:, :, -1].amin(dim=-1) == 0  # [N, S+W-1]
            h = self.temporal_encoder(h, observed)  # [N, S, D]
        h = self.backbone_projection(self.adaptive_norm.restore(h, removed))
        return [h, *self.fusion.own(inputs[:, -h.shape[1] :])]
