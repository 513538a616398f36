"""Causal encoder with a bounded receptive field: one pass encodes every session once, for every score that sees it.

Shapes: N stocks, T sessions, D width, A attention heads, B band (sessions one layer sees), Q queries in a chunk, K = Q
+ B - 1 keys they can see.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from atft_pipeline.model.variable_selection import GatedResidualNetwork

SMALLEST_CHUNK: int = 16
"""Queries handled together. Fewer make the products too small, many more waste them outside the band."""


def bands(window_sessions: int, layers: int) -> list[int]:
    """Band of each layer: `1 + sum(band - 1) == window_sessions`, as even as possible."""
    reach, wider = divmod(window_sessions - 1, layers)
    return [1 + reach + (layer < wider) for layer in range(layers)]


class BandedAttention(nn.Module):
    """Multi-head attention of a session to itself and the `band - 1` sessions before it.

    Vaswani et al. (2017), eq. 1, with a learned bias per head and lag (Shaw et al., 2018, in the scalar form of Raffel
    et al., 2020). Queries are cut into chunks that share a slice of keys, so memory grows with T * (band + chunk), not
    with T squared. The first `band - 1` sessions give no query: their bands would be cut.
    """

    def __init__(self, hidden: int, heads: int, band: int) -> None:
        super().__init__()
        self.heads = heads
        self.band = band
        self.query = nn.Linear(hidden, hidden)
        self.key_value = nn.Linear(hidden, 2 * hidden)
        self.lag_bias = nn.Parameter(torch.zeros(heads, band))
        self.output = nn.Linear(hidden, hidden)
        self.attention_map = nn.Identity()

    def forward(self, h: Tensor, observed: Tensor) -> Tensor:
        """`h: [N, T, D]`, `observed: [N, T]` sessions that hold any value -> `[N, T - B + 1, D]`.

        A session without any value is not attended to, except by itself.
        """
        N, T, D = h.shape
        queries = T - self.band + 1
        chunk = -(-queries // -(-queries // max(SMALLEST_CHUNK, self.band)))
        q = self.query(h[:, self.band - 1 :]) * (D // self.heads) ** -0.5
        q = q.view(N, queries, self.heads, -1).transpose(1, 2)  # [N, A, T - B + 1, D/A]
        k, v = self.key_value(h).view(N, T, 2, self.heads, -1).permute(2, 0, 3, 1, 4)  # [N, A, T, D/A]
        mixed = []
        for first in range(0, queries, chunk):
            keys = slice(first, min(first + chunk, queries) + self.band - 1)
            bias, mask = self._band(keys.stop - first - self.band + 1, observed[:, keys])
            scores = torch.matmul(q[:, :, first : first + chunk], k[:, :, keys].transpose(-1, -2)) + bias
            weights = self.attention_map(scores.masked_fill(~mask, -torch.inf).softmax(dim=-1))  # [N, A, Q, K]
            mixed.append(torch.matmul(weights.to(v.dtype), v[:, :, keys]))  # [N, A, Q, D/A]
        return self.output(torch.cat(mixed, dim=2).transpose(1, 2).reshape(N, queries, D))

    def _band(self, queries: int, observed: Tensor) -> tuple[Tensor, Tensor]:
        """Bias `[A, Q, K]` by lag, and mask `[N, 1, Q, K]` from `observed: [N, K]`."""
        query = torch.arange(queries, device=observed.device)[:, None] + self.band - 1
        lag = query - torch.arange(observed.shape[1], device=observed.device)  # [Q, K]
        bias = self.lag_bias[:, lag.clamp(0, self.band - 1)]
        mask = (lag == 0) | ((lag > 0) & (lag < self.band) & observed[:, None, None, :])
        return bias, mask


class EncoderLayer(nn.Module):
    """Pre-norm banded attention with a residual, then a GRN position by position: `[N, T, D] -> [N, T - B + 1, D]`."""

    def __init__(self, hidden: int, heads: int, band: int, dropout: float) -> None:
        super().__init__()
        self.band = band
        self.norm = nn.LayerNorm(hidden)
        self.attention = BandedAttention(hidden, heads, band)
        self.feed_forward = GatedResidualNetwork(hidden, hidden, dropout)

    def forward(self, h: Tensor, observed: Tensor) -> Tensor:
        return self.feed_forward(h[:, self.band - 1 :] + self.attention(self.norm(h), observed))


class TemporalEncoder(nn.Module):
    """Layers whose bands sum to the window: `[N, S + W - 1, D] -> [N, S, D]`, the states of the S target sessions."""

    def __init__(self, hidden: int, heads: int, window_sessions: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(hidden, heads, band, dropout) for band in bands(window_sessions, layers)
        )

    def forward(self, h: Tensor, observed: Tensor) -> Tensor:
        """`observed: [N, S + W - 1]` False where the stock has no value at all, e.g. before its first session."""
        for layer in self.layers:
            h = layer(h, observed[:, -h.shape[1] :])
        return h


class BackboneProjection(nn.Module):
    """What the graph and the fusion read of the encoder: LayerNorm, linear map and GELU, `[N, S, D] -> [N, S, D]`."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.GELU())

    def forward(self, state: Tensor) -> Tensor:
        return self.layers(state)
