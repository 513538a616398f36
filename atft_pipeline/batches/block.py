"""A block, the unit that training reads: contiguous target sessions, the warm-up before them, and their graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NeighbourTable:
    """Edges as a padded table: the K neighbours whose states each stock reads."""

    source: Tensor
    """[..., n, K] integer position of the neighbour among the n stocks, 0 where there is no edge."""
    is_edge: Tensor
    """[..., n, K] bool, False where a stock has fewer than K neighbours."""
    attributes: Tensor
    """[..., n, K, 3] float32 corr, same_sector, same_market, 0 where there is no edge."""

    def to(self, device: torch.device, *, non_blocking: bool = False) -> NeighbourTable:
        """The table on `device`."""
        moved = (
            tensor.to(device, non_blocking=non_blocking) for tensor in (self.source, self.is_edge, self.attributes)
        )
        return NeighbourTable(*moved)


@dataclass(frozen=True)
class Block:
    """S contiguous target sessions, the n stocks that are members at one of them, and the sessions before them."""

    session_index: Tensor
    """[S] int64 into the panel's sessions."""
    stock_index: Tensor
    """[n] int64 into the panel's codes, ascending."""
    x: Tensor
    """[n, S + R - 1, F] float32, warm-up sessions first, 0 where missing."""
    missing: Tensor
    """[n, S + R - 1, F] bool; True too for sessions before the panel's first."""
    member: Tensor
    """[n, S] bool."""
    target: Tensor
    """[n, S, H] float32 raw forward returns, NaN where missing."""
    neighbours: NeighbourTable
    """[S, n, K]"""

    def part(self, start: int, stop: int) -> Block:
        """The block of its target sessions `start` to `stop`, exclusive, with all its stocks."""
        warm_up = self.x.shape[1] - self.member.shape[1]
        table = self.neighbours
        return Block(
            session_index=self.session_index[start:stop],
            stock_index=self.stock_index,
            x=self.x[:, start : stop + warm_up],
            missing=self.missing[:, start : stop + warm_up],
            member=self.member[:, start:stop],
            target=self.target[:, start:stop],
            neighbours=NeighbourTable(
                table.source[start:stop], table.is_edge[start:stop], table.attributes[start:stop]
            ),
        )
