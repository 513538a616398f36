"""Attention over each session's stock graph. N stocks, S sessions, D width, E edges.

Source: Brody, Alon and Yahav, How Attentive are Graph Attention Networks? (GATv2, ICLR 2022), eq. 7.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch_geometric.nn import GATv2Conv

EDGE_CHANNELS: int = 3
"""corr, same_sector, same_market."""

CORR_MIDDLE, CORR_UNIT = 0.25, 0.1
"""Nearest neighbours correlate by 0.1 to 0.5: as it is, a peer's 0.4 beside a stranger's 0.2 hardly moves a softmax."""


class GraphAttention(nn.Module):
    """h + GATv2(LayerNorm(h)) over nodes `s * N + i`: `[N, S, D] -> [N, S, D]`.

    No self loops and no bias: a stock reads its own state through the residual, and one without neighbours keeps it
    exactly. Messages flow from row 0 of `edge_index` to row 1.
    """

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.attention = GATv2Conv(
            hidden,
            hidden // heads,
            heads=heads,
            dropout=dropout,
            edge_dim=EDGE_CHANNELS,
            add_self_loops=False,
            bias=False,
        )

    def forward(self, h: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        N, S, D = h.shape
        nodes = self.norm(h).transpose(0, 1).reshape(S * N, D)  # [S*N, D]
        corr = (edge_attr[:, :1] - CORR_MIDDLE) / CORR_UNIT
        messages = self.attention(nodes, edge_index, torch.cat((corr, edge_attr[:, 1:]), dim=1))  # [S*N, D]
        return h + messages.view(S, N, D).transpose(0, 1)
