"""Causal encoder with a bounded receptive field: one pass encodes every session once, for every score that sees it.

Shapes: N stocks, T sessions, D width, A attention heads, B band (sessions one layer sees), M chunks of queries, Q
queries in a chunk, K = Q + B - 1 keys they can see.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

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

    def forward(self, h: Tensor, observed: Tensor) -> Tensor:
        """`h: [N, T, D]`, `observed: [N, T]` sessions that hold any value -> `[N, T - B + 1, D]`.

        A session without any value is not attended to, except by itself.
        """
        N, T, D = h.shape
        queries = T - self.band + 1
        chunks = -(-queries // max(SMALLEST_CHUNK, self.band))
        chunk = -(-queries // chunks)
        padding = chunks * chunk - queries
        span = chunk + self.band - 1

        q = functional.pad(self.query(h[:, self.band - 1 :]), (0, 0, 0, padding))
        q = q.view(N, chunks, chunk, self.heads, -1).transpose(2, 3)  # [N, M, A, Q, D/A]
        kv = functional.pad(self.key_value(h), (0, 0, 0, padding)).unfold(1, span, chunk)  # [N, M, 2D, K]
        k, v = kv.reshape(N, chunks, 2, self.heads, D // self.heads, span).unbind(dim=2)  # [N, M, A, D/A, K]

        bias, mask = self._band(chunk, span, functional.pad(observed, (0, padding)).unfold(1, span, chunk))
        scores = torch.matmul(q * (D // self.heads) ** -0.5, k) + bias  # [N, M, A, Q, K]
        weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
        mixed = torch.matmul(weights.to(v.dtype), v.transpose(-1, -2))  # [N, M, A, Q, D/A]
        return self.output(mixed.transpose(2, 3).reshape(N, chunks * chunk, D)[:, :queries])

    def _band(self, chunk: int, span: int, observed: Tensor) -> tuple[Tensor, Tensor]:
        """Bias `[A, Q, K]` by lag, and mask `[N, M, 1, Q, K]` from `observed: [N, M, K]`."""
        query = torch.arange(chunk, device=observed.device)[:, None] + self.band - 1
        lag = query - torch.arange(span, device=observed.device)  # [Q, K]
        bias = self.lag_bias[:, lag.clamp(0, self.band - 1)]
        mask = (lag == 0) | ((lag > 0) & (lag < self.band) & observed[:, :, None, None, :])
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
