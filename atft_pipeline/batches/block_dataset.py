"""Cuts blocks out of a panel."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from atft_pipeline.batches.block import Block, NeighbourTable
from atft_pipeline.batches.panel import Panel
from atft_pipeline.batches.panel_storage import left_to_the_cache
from atft_pipeline.graph.build import StockGraph


class BlockDataset:
    """Cuts blocks out of a panel that lies on `device` once.

    A session's graph is the newest refresh at or before it, restricted to the session's members; sessions before the
    first refresh have no edges. `graph` None gives blocks without edges.
    """

    def __init__(
        self, panel: Panel, graph: StockGraph | None, receptive_field: int, device: torch.device | str = "cpu"
    ) -> None:
        self.panel = panel
        self.receptive_field = receptive_field
        self.device = torch.device(device)
        self._features = torch.from_numpy(panel.features).to(self.device)
        self._targets = torch.from_numpy(panel.targets).to(self.device)
        self._member = torch.from_numpy(panel.member).to(self.device)
        self._members_at = panel.member.sum(axis=1)
        self._neighbours = neighbour_table(graph, panel.codes).to(self.device)
        refreshes = panel.sessions[:0] if graph is None else graph.refreshes
        newest = np.searchsorted(refreshes, panel.sessions, side="right") - 1
        self._refresh_at = torch.from_numpy(newest).to(self.device)

    def sessions_per_block(self, session_indices: NDArray[np.integer], batch_size: int) -> list[NDArray[np.int64]]:
        """`session_indices` cut into contiguous runs of at most `batch_size` member samples, at least one session.

        Sessions without a member are left out: there is nothing to score.
        """
        blocks: list[list[int]] = []
        samples = 0
        for session in np.sort(np.asarray(session_indices, dtype=np.int64)).tolist():
            members = int(self._members_at[session])
            if members == 0:
                continue
            samples += members
            if blocks and session == blocks[-1][-1] + 1 and samples <= batch_size:
                blocks[-1].append(session)
            else:
                blocks.append([session])
                samples = members
        return [np.array(block, dtype=np.int64) for block in blocks]

    def block(self, session_indices: NDArray[np.integer]) -> Block:
        """The block whose target sessions are the contiguous, ascending `session_indices: [S]`."""
        first, last = int(session_indices[0]), int(session_indices[-1])
        if last - first + 1 != len(session_indices):
            raise ValueError(f"a block's sessions are contiguous, found {session_indices}")
        member = self._member[first : last + 1]  # [S, N]
        stocks = member.any(dim=0).nonzero().squeeze(1)  # [n]
        begin = first - self.receptive_field + 1
        values = self._features[max(begin, 0) : last + 1].transpose(0, 1).index_select(0, stocks)
        values = functional.pad(values, (0, 0, max(-begin, 0), 0), value=torch.nan)  # [n, S+R-1, F]
        x = values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        block = Block(
            session_index=torch.arange(first, last + 1, device=self.device),
            stock_index=stocks,
            x=x,
            missing=x != values,  # four times as fast as asking for finite values, and NaN differs from everything
            member=member[:, stocks].T.contiguous(),
            target=self._targets[first : last + 1, stocks].transpose(0, 1).contiguous(),
            neighbours=self._block_neighbours(first, last, stocks),
        )
        left_to_the_cache(self.panel.features)
        return block

    def _block_neighbours(self, first: int, last: int, stocks: Tensor) -> NeighbourTable:
        """The edges between the members of each session."""
        refresh = self._refresh_at[first : last + 1]  # [S]
        cells = (refresh[:, None], stocks)
        source = self._neighbours.source[cells].long()  # [S, n, K] in the panel
        member = self._member[first : last + 1]
        session = torch.arange(len(refresh), device=self.device)[:, None, None]
        is_edge = self._neighbours.is_edge[cells] & (refresh >= 0)[:, None, None]
        is_edge &= member[session, source] & member[:, stocks, None]
        in_block = torch.zeros(len(self.panel.codes), dtype=torch.int64, device=self.device)
        in_block[stocks] = torch.arange(len(stocks), device=self.device)
        return NeighbourTable(
            source=in_block[source].masked_fill(~is_edge, 0),
            is_edge=is_edge,
            attributes=self._neighbours.attributes[cells].masked_fill(~is_edge[..., None], 0.0),
        )


def neighbour_table(graph: StockGraph | None, codes: NDArray[np.str_]) -> NeighbourTable:
    """The graph's edges as a table per refresh, `[G, N, K]` over `codes: [N]`; edges of other stocks are left out.

    `graph` None is one refresh without an edge. Neighbours stand as in the graph, the nearest first.
    """
    if graph is None or len(graph.refreshes) == 0:
        shape = (1, len(codes), 0)
        return NeighbourTable(torch.zeros(shape, dtype=torch.int32), torch.zeros(shape).bool(), torch.zeros(*shape, 3))
    position = np.searchsorted(codes, graph.codes).clip(max=len(codes) - 1)
    position = np.where(codes[position] == graph.codes, position, -1)
    refresh = np.repeat(np.arange(len(graph.refreshes)), np.diff(graph.offsets))
    kept = (position[graph.source] >= 0) & (position[graph.target] >= 0)
    row = (refresh * len(codes) + position[graph.target])[kept]
    order = np.argsort(row, kind="stable")
    row = row[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    shape = (len(graph.refreshes), len(codes), int(rank.max(initial=-1)) + 1)
    source, is_edge = np.zeros(shape, np.int32), np.zeros(shape, bool)
    attributes = np.zeros((*shape, 3), np.float32)
    rows = shape[0] * shape[1]
    source.reshape(rows, shape[2])[row, rank] = position[graph.source][kept][order]
    is_edge.reshape(rows, shape[2])[row, rank] = True
    attributes.reshape(rows, shape[2], 3)[row, rank] = graph.edge_attr[kept][order]
    return NeighbourTable(torch.from_numpy(source), torch.from_numpy(is_edge), torch.from_numpy(attributes))
