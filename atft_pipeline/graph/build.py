"""Cross-sectional stock graph: each stock's nearest neighbours by trailing return correlation, as of each refresh.

Definition, at a refresh session t:

- Every `refresh_sessions`-th session, counted from the dataset's first, is a refresh; so appended sessions move none.
  The first refresh is the first such session with `MINIMUM_SESSIONS` (or the lookback, if shorter) of history.
- The window is the last `lookback_sessions` sessions, t included; at the start of the data, all sessions so far.
- Nodes are the members of the universe at t with returns in two thirds of the window and some variance.
- With `sector_demeaned`, the mean of the sector's members is subtracted from the returns of each session; the mean of
  all members where the sector is unknown or has fewer than `MINIMUM_SECTOR_MEMBERS`. Then each stock is standardised
  over its own sessions of the window, clipped at ± `CLIP` so that one jump does not make two stocks peers, set to 0
  where missing, and scaled to unit norm.
- corr is the product of two such columns. A session missing in one adds nothing, so gaps draw corr towards zero. Pairs
  with fewer than half the window's sessions in common have no corr. It is shrunk towards zero by `shrinkage`, which
  leaves the order unchanged and tells the model how far to trust it.
- Neighbours are the `neighbours` largest positive correlations, ties by Code. A negative correlation makes no peer: its
  message would mean the opposite of what the same edge means elsewhere.

Everything is known at the close of t. A refresh depends on its window's rows alone, to the last bit: other refreshes
and the number of threads do not matter (kernels.py). store.py writes the graph to disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from atft_pipeline.config.schema import GraphConfig
from atft_pipeline.graph.membership import Membership, Window

if TYPE_CHECKING:
    from atft_pipeline.graph.kernels import Edges


MINIMUM_SECTOR_MEMBERS: int = 5
CLIP: float = 4.0


@dataclass(frozen=True)
class StockGraph:
    """Edges of G refresh sessions, concatenated: those of refresh g are rows `offsets[g]:offsets[g + 1]`.

    Messages flow from `source` to `target`, both positions in `codes`. `edge_attr: [E, 3]` float32 corr, same_sector,
    same_market. Sorted by refresh, target, -corr, source.
    """

    refreshes: NDArray[np.datetime64]
    codes: NDArray[np.str_]
    offsets: NDArray[np.int64]
    source: NDArray[np.int32]
    target: NDArray[np.int32]
    edge_attr: NDArray[np.float32]


def graph_at(
    membership: Membership, windows: Sequence[Window], config: GraphConfig, threads: int | None = None
) -> StockGraph:
    """The graph of the refreshes of `windows`: positions in the membership's sessions, ascending.

    threads: by default all of the machine's; the result is the same for any number.
    """
    from atft_pipeline.graph.kernels import Search  # imports numba, which training does not need

    start, stop = (windows[0][0], windows[-1][1] + 1) if windows else (0, 0)
    residual, member = membership.returns[start:stop], membership.member[start:stop]
    refreshes = []
    with Search.open(threads) as search:
        if config.sector_demeaned:
            residual = search.demeaned(residual, member, membership.sector[start:stop], MINIMUM_SECTOR_MEMBERS)
        for first, t in windows:
            window, nodes = residual[first - start : t + 1 - start], np.flatnonzero(member[t - start])
            refreshes.append(search.nearest(window, nodes, config.neighbours, CLIP))
    return StockGraph(
        refreshes=membership.sessions[np.array([t for _, t in windows], dtype=np.int64)],
        codes=membership.codes,
        offsets=np.cumsum([0, *(len(edges.source) for edges in refreshes)], dtype=np.int64),
        source=np.concatenate([np.empty(0, np.int32), *(edges.source for edges in refreshes)]),
        target=np.concatenate([np.empty(0, np.int32), *(edges.target for edges in refreshes)]),
        edge_attr=np.concatenate(
            [np.empty((0, 3), np.float32)]
            + [_attributes(edges, membership, t, config) for edges, (_, t) in zip(refreshes, windows, strict=True)]
        ),
    )


def _attributes(edges: Edges, membership: Membership, t: int, config: GraphConfig) -> NDArray[np.float32]:
    """`edge_attr` of the edges of refresh t, `[E, 3]`."""
    labels = (membership.sector[t], membership.market[t])
    return np.column_stack(
        [
            edges.corr * np.float32(1.0 - config.shrinkage),
            *(_same(label, edges.source, edges.target) for label in labels),
        ]
    )


def _same(label: NDArray[np.int32], source: NDArray[np.int32], target: NDArray[np.int32]) -> NDArray[np.float32]:
    of_source = label[source]
    return ((of_source == label[target]) & (of_source >= 0)).astype(np.float32)
