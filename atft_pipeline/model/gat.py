"""Attention over each session's stock graph. N stocks, S sessions, D width, A heads, K neighbours.

Source: Brody, Alon and Yahav, How Attentive are Graph Attention Networks? (GATv2, ICLR 2022), eq. 7.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from atft_pipeline.batches.block import NeighbourTable

EDGE_CHANNELS: int = 3
"""corr, same_sector, same_market."""

CORR_MIDDLE, CORR_UNIT = 0.25, 0.1
"""Nearest neighbours correlate by 0.1 to 0.5: as it is, a peer's 0.4 beside a stranger's 0.2 hardly moves a softmax."""
ATTENDED_AT_ONCE: int = 200_000
"""Neighbours' states, in numbers, that are read at once: whole sessions, one at least. They stay in the cache, and 330
sessions of 40 stocks at width 8 take a fifth of the time that they take one by one."""


class GraphAttention(nn.Module):
    """h + GATv2(LayerNorm(h)) over the graph of each session: `[N, S, D] -> [N, S, D]`.

    No self loops and no bias: a stock reads its own state through the residual, and one without neighbours keeps it
    exactly.
    """

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.attention = NeighbourAttention(hidden, heads)
        self.attention_map = nn.Identity()
        self.dropout = dropout

    def forward(self, h: Tensor, neighbours: NeighbourTable) -> Tensor:
        if neighbours.source.shape[-1] == 0:
            return h
        nodes = self.norm(h).transpose(0, 1)  # [S, N, D]
        N, D = nodes.shape[1:]
        sources, targets = self.attention.lin_l(nodes), self.attention.lin_r(nodes)
        by_head = self.attention.by_head()
        at_once = max(ATTENDED_AT_ONCE // max(N * neighbours.source.shape[-1] * D, 1), 1)
        offset = torch.arange(at_once, device=h.device)[:, None, None] * N
        tensors = (sources, targets, neighbours.source, neighbours.is_edge, neighbours.attributes)
        messages = []
        for read, reading, position, is_edge, attributes in zip(*(x.split(at_once) for x in tensors), strict=True):
            # The stocks of these sessions as if they were of one session.
            chunk = (read, reading, position + offset[: len(position)], is_edge, attributes)
            messages.append(self._messages(by_head, *(x.flatten(0, 1) for x in chunk)))
        return h + torch.cat(messages).view_as(nodes).transpose(0, 1)

    def _messages(
        self, by_head: Tensor, sources: Tensor, targets: Tensor, position: Tensor, is_edge: Tensor, attributes: Tensor
    ) -> Tensor:
        """`[N, D]`, 0 without neighbours, of `sources, targets: [N, D]` and a table of `[N, K]`."""
        N, K = position.shape
        read = sources.index_select(0, position.reshape(-1)).view(N, K, -1)  # [N, K, D]
        corr = (attributes[..., :1] - CORR_MIDDLE) / CORR_UNIT
        joined = self.attention.joined(read, targets, torch.cat((corr, attributes[..., 1:]), dim=-1))
        scores = joined @ by_head  # [N, K, A]
        absent = ~is_edge.unsqueeze(-1)
        weights = scores.masked_fill(absent, torch.finfo(scores.dtype).min).softmax(dim=1).masked_fill(absent, 0.0)
        weights = self.attention_map(weights.transpose(1, 2)).transpose(1, 2)
        weights = functional.dropout(weights, self.dropout, self.training)
        return (weights.unsqueeze(-1) * read.view(N, K, weights.shape[-1], -1)).sum(dim=1).flatten(1)


class NeighbourAttention(nn.Module):
    """The parameters of GATv2 and what they make of a pair, for a table of K neighbours instead of a list of edges.

    A stock has nearly as many neighbours as the next, so padding costs less than scattering. Names, shapes and order of
    the parameters are those of PyG's GATv2Conv, the tests' reference.
    """

    negative_slope = 0.2

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.att = nn.Parameter(torch.empty(1, heads, hidden // heads))
        self.lin_l = nn.Linear(hidden, hidden, bias=False)
        """Of the stock that is read."""
        self.lin_r = nn.Linear(hidden, hidden, bias=False)
        """Of the stock that reads."""
        self.lin_edge = nn.Linear(EDGE_CHANNELS, hidden, bias=False)
        # Glorot and Bengio (2010). Another order would give other weights for the same seed.
        for weight in (self.lin_l.weight, self.lin_r.weight, self.lin_edge.weight, self.att):
            bound = (6.0 / (weight.shape[-2] + weight.shape[-1])) ** 0.5
            nn.init.uniform_(weight, -bound, bound)

    def by_head(self) -> Tensor:
        """`att` as the matrix `[D, A]` that sums each head's part of D."""
        return torch.block_diag(*self.att[0].unsqueeze(-1))

    def joined(self, read: Tensor, targets: Tensor, edge: Tensor) -> Tensor:
        """`[N, K, D]`, of which `by_head` makes the scores: `read: [N, K, D]`, `targets: [N, D]`, `edge: [N, K, 3]`."""
        return functional.leaky_relu(read + targets.unsqueeze(1) + self.lin_edge(edge), self.negative_slope)
