"""Cross-sectional stock graph: each stock's nearest neighbours by trailing return correlation, as of each refresh.

Definition, at a refresh session t:

- Refresh sessions are every `refresh_sessions`-th session counted from the dataset's first, so that appended sessions
  move none; the first is the one with `MINIMUM_SESSIONS` (or the lookback, if shorter) sessions of history.
- The window is the last `lookback_sessions` sessions, t included, or all there are at the start of the data.
- Nodes are the members of the universe at t with returns in two thirds of the window and some variance.
- Returns lose, per session, the mean of their sector's members (of all members where the sector is unknown or has
  fewer than `MINIMUM_SECTOR_MEMBERS`) if `sector_demeaned`; then each stock is standardised on its own sessions of the
  window, clipped at ± `CLIP` and scaled to mean square 1, so that one jump does not make two stocks peers.
- corr = sum of products over common sessions / number of common sessions; pairs with fewer than half the window in
  common have none. It is shrunk towards zero by `shrinkage`, which orders nothing and tells the model how far to trust.
- Neighbours are the `neighbours` largest positive correlations, ties by Code. A negative correlation is no peer: its
  message would say the opposite of what the same edge says elsewhere.

Everything is known at the close of t. On disk: a parquet table of edges and a manifest beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from atft_pipeline.config import GraphConfig, to_dict
from atft_pipeline.dataset import (
    manifest_path,
    read_manifest,
    read_membership,
    read_table,
    resolved,
    sha256_of,
    write_manifest,
)
from atft_pipeline.errors import InputError
from atft_pipeline.files import replacing

MINIMUM_SESSIONS: int = 60
"""History before the first graph. A shorter one finds chance, a longer one leaves the first year without a graph."""

MINIMUM_SECTOR_MEMBERS: int = 5
CLIP: float = 4.0
UNIVERSE_COLUMNS: dict[str, str] = {"all": "is_investable", "liquid": "is_liquid"}


@dataclass(frozen=True)
class StockGraph:
    """Edges of G refresh sessions, concatenated: those of refresh g are rows `offsets[g]:offsets[g + 1]`.

    Messages flow from `source` to `target`, positions in `codes`. `edge_attr: [E, 3]` float32 corr, same_sector,
    same_market. Sorted by refresh, target, -corr, source.
    """

    refreshes: NDArray[np.datetime64]
    codes: NDArray[np.str_]
    offsets: NDArray[np.int64]
    source: NDArray[np.int32]
    target: NDArray[np.int32]
    edge_attr: NDArray[np.float32]


def build_graph(
    returns: NDArray[np.floating],
    member: NDArray[np.bool_],
    sector: NDArray[np.integer],
    market: NDArray[np.integer],
    sessions: NDArray[np.datetime64],
    codes: NDArray[np.str_],
    config: GraphConfig,
) -> StockGraph:
    """The graph of every refresh session (see the module's definition).

    returns, member, sector, market: `[T, N]`; NaN is a missing return, a negative sector or market is unknown and the
    same as no other. codes: `[N]` ascending.
    """
    residual = np.asarray(returns, dtype=np.float32)
    if config.sector_demeaned:
        residual = _sector_demeaned(residual, member, sector)
    refreshes = _refresh_indices(len(sessions), config)
    sources, targets, attributes = [], [], []
    for t in refreshes:
        window = residual[max(0, t + 1 - config.lookback_sessions) : t + 1]
        target, source, corr = _nearest(window, member[t], config.neighbours)
        sources.append(source)
        targets.append(target)
        attributes.append(
            np.column_stack(
                [
                    corr * np.float32(1.0 - config.shrinkage),
                    (sector[t, source] == sector[t, target]) & (sector[t, source] >= 0),
                    (market[t, source] == market[t, target]) & (market[t, source] >= 0),
                ]
            ).astype(np.float32)
        )
    counts = np.array([len(source) for source in sources], dtype=np.int64)
    return StockGraph(
        refreshes=sessions[refreshes],
        codes=codes,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        source=np.concatenate([np.empty(0), *sources]).astype(np.int32),
        target=np.concatenate([np.empty(0), *targets]).astype(np.int32),
        edge_attr=np.concatenate([np.empty((0, 3), dtype=np.float32), *attributes]),
    )


def _refresh_indices(sessions: int, config: GraphConfig) -> NDArray[np.int64]:
    first = min(MINIMUM_SESSIONS, config.lookback_sessions) - 1
    indices = np.arange(0, sessions, config.refresh_sessions, dtype=np.int64)
    return indices[indices >= first]


def _sector_demeaned(
    returns: NDArray[np.float32], member: NDArray[np.bool_], sector: NDArray[np.integer]
) -> NDArray[np.float32]:
    """Returns minus the session's sector mean over members; the mean of all members where the sector is too small."""
    residual = np.empty_like(returns)
    known = np.maximum(sector, -1).astype(np.int64) + 1
    groups = int(known.max(initial=0)) + 1
    for t in range(len(returns)):
        used = member[t] & np.isfinite(returns[t])
        count = np.bincount(known[t, used], minlength=groups)
        total = np.bincount(known[t, used], weights=returns[t, used], minlength=groups)
        everyone = total.sum() / max(count.sum(), 1)
        enough = count >= MINIMUM_SECTOR_MEMBERS
        enough[0] = False
        mean = np.where(enough, total / np.maximum(count, 1), everyone)
        residual[t] = returns[t] - mean[known[t]]
    return residual


def _nearest(
    window: NDArray[np.float32], member: NDArray[np.bool_], neighbours: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Targets, sources and correlations of the edges among `member`, sorted by target, -corr, source."""
    present = np.isfinite(window)
    enough = 3 * present.sum(axis=0) >= 2 * len(window)
    stocks = np.flatnonzero(member & enough)
    z, varies = _standardised(window[:, stocks])
    stocks, z = stocks[varies], z[:, varies]
    corr = _correlations(z, present[:, stocks])
    np.fill_diagonal(corr, -np.inf)
    if len(stocks) > neighbours:
        # The k-th largest value as a threshold instead of argpartition: ties at the boundary then go by Code below.
        kth = np.partition(corr, -neighbours, axis=1)[:, -neighbours]
    else:
        kth = np.full(len(stocks), -np.inf, dtype=np.float32)
    rows, columns = np.nonzero((corr >= kth[:, None]) & (corr > 0.0))
    values = corr[rows, columns]
    order = np.lexsort((columns, -values, rows))
    rows, columns, values = rows[order], columns[order], values[order]
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows, side="left")
    kept = rank < neighbours
    return stocks[rows[kept]], stocks[columns[kept]], values[kept]


def _standardised(window: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Each column's z-scores over its own sessions, clipped and rescaled, 0 where missing; and which columns vary."""
    present = np.isfinite(window)
    count = np.maximum(present.sum(axis=0), 1).astype(np.float32)
    filled = np.where(present, window, np.float32(0.0))
    centred = np.where(present, filled - filled.sum(axis=0) / count, np.float32(0.0))
    std = np.sqrt((centred * centred).sum(axis=0) / count)
    # Far under any real residual (daily returns are about 1e-2), far over the rounding of a constant series.
    varies = std > 1e-7
    z = np.clip(centred / np.where(varies, std, np.float32(1.0)), -CLIP, CLIP)
    return z / np.sqrt(np.maximum((z * z).sum(axis=0) / count, np.float32(1e-12))), varies


def _correlations(z: NDArray[np.float32], present: NDArray[np.bool_]) -> NDArray[np.float32]:
    """`[n, n]` sums of products over common sessions / their number; -inf under half the window in common.

    A stock present throughout has the other's sessions in common, so only pairs of two incomplete ones are counted.
    """
    count = present.sum(axis=0).astype(np.float32)
    products = z.T @ z
    incomplete = np.flatnonzero(count < len(present))
    products /= np.minimum(count[:, None], count[None, :])
    if len(incomplete):
        own = present[:, incomplete].astype(np.float32)
        common = own.T @ own
        pairs = np.ix_(incomplete, incomplete)
        least = np.minimum(count[incomplete][:, None], count[incomplete][None, :])
        products[pairs] = np.where(
            2.0 * common >= len(present), products[pairs] * least / np.maximum(common, 1.0), -np.inf
        )
    return products


def write_graph(path: Path, graph: StockGraph) -> None:
    """Writes the edges as one parquet table, whole or not at all."""
    refresh = np.repeat(graph.refreshes, np.diff(graph.offsets))
    codes = pa.array(graph.codes, pa.string())
    table = pa.table(
        {
            "Date": pa.array(refresh.astype("datetime64[D]"), pa.date32()),
            "source": pa.DictionaryArray.from_arrays(pa.array(graph.source), codes),
            "target": pa.DictionaryArray.from_arrays(pa.array(graph.target), codes),
            "corr": graph.edge_attr[:, 0],
            "same_sector": graph.edge_attr[:, 1],
            "same_market": graph.edge_attr[:, 2],
        }
    )
    with replacing(resolved(path)) as temporary:
        # Without arrow's own schema a reader sees plain strings, as the contract of the table says.
        pq.write_table(table, temporary, compression="zstd", store_schema=False)
        # Without its manifest a product does not exist: no kill in between pairs new edges with an old one.
        manifest_path(path).unlink(missing_ok=True)


def load_graph(path: Path) -> StockGraph:
    """The graph that `write_graph` wrote. Raises InputError when the file or a column is missing."""
    table = read_table(path, ["Date", "source", "target", "corr", "same_sector", "same_market"])
    dates = table["Date"].to_numpy().astype("datetime64[D]")
    refreshes, first = np.unique(dates, return_index=True)
    codes, positions = _coded([table["source"], table["target"]])
    attributes = [table[name].to_numpy().astype(np.float32) for name in ("corr", "same_sector", "same_market")]
    return StockGraph(
        refreshes=refreshes,
        codes=codes,
        offsets=np.append(first, len(dates)).astype(np.int64),
        source=positions[0],
        target=positions[1],
        edge_attr=np.column_stack(attributes),
    )


def build_graph_file(dataset: Path, out: Path, config: GraphConfig) -> dict[str, Any]:
    """Builds the graph of the dataset at `dataset`, writes it and its manifest to `out`, and returns the manifest.

    Raises InputError when the dataset has too few sessions for a graph, or nothing in the universe.
    """
    made_from = read_manifest(dataset, "ml_dataset")
    sessions, codes, columns = _read_panel(dataset, config)
    if not len(_refresh_indices(len(sessions), config)):
        raise InputError(
            f"{dataset}: {len(sessions)} sessions are fewer than the sessions needed for a graph"
            f" ({min(MINIMUM_SESSIONS, config.lookback_sessions)}); give a longer price history"
        )
    if not columns["member"].any():
        raise InputError(
            f"{dataset}: no row has {UNIVERSE_COLUMNS[config.universe]}, the graph's universe is empty; give more"
            f" history or set graph.universe"
        )
    graph = build_graph(
        columns["returns"], columns["member"], columns["sector"], columns["market"], sessions, codes, config
    )
    write_graph(out, graph)
    manifest = {
        "kind": "stock_graph",
        "fingerprint": sha256_of({"dataset": made_from["fingerprint"], "config": to_dict(config)}),
        "dataset_fingerprint": made_from["fingerprint"],
        "source": made_from["source"],
        "config": to_dict(config),
        "refresh_dates": len(graph.refreshes),
        "edges": len(graph.source),
        "mean_degree": _mean_degree(graph),
    }
    write_manifest(out, manifest)
    return manifest


def _mean_degree(graph: StockGraph) -> float:
    """Edges per stock that has any, over all refreshes; 0 without edges."""
    pairs = [np.unique(graph.target[start:stop]).size for start, stop in _spans(graph.offsets)]
    return float(len(graph.target) / max(sum(pairs), 1))


def _spans(offsets: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    return zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)


def _coded(columns: list[pa.ChunkedArray]) -> tuple[NDArray[np.str_], list[NDArray[np.int32]]]:
    """The distinct strings of all columns, ascending, and each column as positions among them; null is -1."""
    dictionaries = [column.combine_chunks().dictionary_encode() for column in columns]
    distinct = [np.array(d.dictionary.to_pylist(), dtype=np.str_) for d in dictionaries]
    values = np.unique(np.concatenate(distinct))
    positions = []
    for encoded, own in zip(dictionaries, distinct, strict=True):
        lookup = np.append(np.searchsorted(values, own), -1).astype(np.int32)
        positions.append(lookup[encoded.indices.fill_null(-1).to_numpy()])
    return values, positions


def _read_panel(
    dataset: Path, config: GraphConfig
) -> tuple[NDArray[np.datetime64], NDArray[np.str_], dict[str, NDArray[Any]]]:
    """Sessions, codes and the dense `[T, N]` arrays of returns, member, sector and market of the membership table."""
    flag = UNIVERSE_COLUMNS[config.universe]
    table = read_membership(dataset, ["Date", "Code", "return_1d", flag, "Sector33Code", "MarketCode"])
    sessions, t = np.unique(table["Date"].to_numpy().astype("datetime64[D]"), return_inverse=True)
    codes, (i,) = _coded([table["Code"]])
    _, (sector,) = _coded([table["Sector33Code"]])
    _, (market,) = _coded([table["MarketCode"]])
    rows: dict[str, tuple[NDArray[Any], Any]] = {
        "returns": (table["return_1d"].to_numpy().astype(np.float32), np.nan),
        "member": (table[flag].to_numpy().astype(bool), False),
        "sector": (sector, -1),
        "market": (market, -1),
    }
    dense = {}
    for name, (values, absent) in rows.items():
        dense[name] = np.full((len(sessions), len(codes)), absent, dtype=values.dtype)
        dense[name][t, i] = values
    return sessions, codes, dense
