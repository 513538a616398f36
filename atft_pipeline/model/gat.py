"""Attention over each session's stock graph. N stocks, S sessions, D width, E edges.

Source: Brody, Alon and Yahav, How Attentive are Graph Attention Networks? (GATv2, ICLR 2022), eq. 7.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch_geometric.nn import GATv2Conv

EDGE_CHANNELS: int = 3
"""corr, same_sector, same_market."""


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
        messages = self.attention(nodes, edge_index, edge_attr)  # [S*N, D]
        return h + messages.view(S, N, D).transpose(0, 1)
