"""A small market for the stock graph's tests, in memory and as a dataset on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from atft_pipeline.config.schema import GraphConfig
from atft_pipeline.dataset.layout import MEMBERSHIP_COLUMNS
from atft_pipeline.graph.build import StockGraph, graph_at
from atft_pipeline.graph.membership import Membership, windows
from atft_pipeline.storage.artifact import write_manifest

T, N = 75, 16
CONFIG = GraphConfig(lookback_sessions=40, neighbours=3, refresh_sessions=5, shrinkage=0.2)
CODES = np.array([f"{1301 + 7 * i}" for i in range(N)])
Market = dict[str, np.ndarray]


def days(count: int) -> np.ndarray:
    return np.datetime64("2020-01-06") + np.arange(count)


def market(seed: int = 0, sessions: int = T) -> Market:
    """Returns with sector factors, one jump, missing stretches, a late and a constant stock; sectors that change."""
    rng = np.random.default_rng(seed)
    shape = (sessions, N)
    sector = np.tile(np.array([0] * 7 + [1] * 6 + [2] * 2 + [-1]), (sessions, 1))
    sector[50:, 0] = 1
    returns = 0.01 * (rng.normal(size=shape) + rng.normal(size=(sessions, 3))[:, np.maximum(sector[0], 0)])
    returns += 0.02 * rng.normal(size=(sessions, 1))
    returns[30, 2] = 0.8
    returns[rng.random(shape) < 0.08] = np.nan
    returns[:48, 4] = np.nan
    returns[:, 6] = np.where(np.arange(sessions) % 2, np.nan, returns[:, 6])
    returns[10:40, 8] = np.nan
    returns[:, 1] = np.nan_to_num(returns[:, 1])
    returns[:, 3] = np.nan_to_num(returns[:, 3])
    member = rng.random(shape) > 0.1
    return {"returns": returns, "member": member, "sector": sector, "market": np.arange(N) % 2 + 0 * sector}


def large_market(stocks: int, sessions: int, seed: int = 0) -> Market:
    """More stocks than a block of targets has: 11 sectors, one return in ten missing and a third of the stocks late."""
    rng = np.random.default_rng(seed)
    sector = np.tile(rng.integers(0, 11, stocks), (sessions, 1))
    returns = 0.01 * (rng.normal(size=(sessions, stocks)) + rng.normal(size=(sessions, 11))[:, sector[0]])
    returns[rng.random(returns.shape) < 0.1] = np.nan
    returns[: sessions // 5, rng.random(stocks) < 0.3] = np.nan
    member = rng.random(returns.shape) > 0.02
    return {"returns": returns, "member": member, "sector": sector, "market": sector % 3}


def build(data: Market, config: GraphConfig = CONFIG, threads: int | None = None) -> StockGraph:
    sessions, stocks = data["returns"].shape
    codes = CODES if stocks == N else np.array([f"{i:05}" for i in range(stocks)])
    membership = Membership(
        sessions=days(sessions),
        codes=codes,
        returns=data["returns"].astype(np.float32),
        member=data["member"],
        sector=data["sector"].astype(np.int32),
        market=data["market"].astype(np.int32),
    )
    return graph_at(membership, windows(sessions, config), config, threads)


def edges_at(graph: StockGraph, g: int) -> list[tuple[str, str, float, float, float]]:
    """Target, source and attributes of the edges of refresh g."""
    rows = range(graph.offsets[g], graph.offsets[g + 1])
    return [(graph.codes[graph.target[e]], graph.codes[graph.source[e]], *map(float, graph.edge_attr[e])) for e in rows]


def all_edges(graph: StockGraph) -> list[tuple[np.datetime64, list[tuple[str, str, float, float, float]]]]:
    return [(day, edges_at(graph, g)) for g, day in enumerate(graph.refreshes)]


def membership_table(data: Market) -> pa.Table:
    """The market as membership rows; stock 7 has no row before session 20."""
    t, i = np.divmod(np.arange(data["returns"].size), N)
    t, i = t[(i != 7) | (t >= 20)], i[(i != 7) | (t >= 20)]
    text = lambda values: pa.array([None if v < 0 else f"{v}" for v in values], pa.string())  # noqa: E731
    returns = data["returns"][t, i]
    columns = {
        "Date": pa.array(days(len(data["returns"]))[t], pa.date32()),
        "Code": pa.array(CODES[i]),
        "is_traded": np.isfinite(returns),
        "is_investable": data["member"][t, i],
        "is_liquid": data["member"][t, i] & (i < 12),
        "return_1d": pa.array(returns, from_pandas=True),
        "Open": returns,
        "Close": returns,
        "Sector33Code": text(data["sector"][t, i]),
        "MarketCode": text(data["market"][t, i]),
    }
    return pa.table(columns).select(list(MEMBERSHIP_COLUMNS))


def write_months(path: Path, data: Market, fingerprint: str = "f00d") -> None:
    """What of a dataset by month the graph reads: membership parts, their digests, and all session dates."""
    table = membership_table(data)
    folder = path.with_name(f"{path.name}.membership")
    folder.mkdir(parents=True, exist_ok=True)
    month_at = table["Date"].to_numpy().astype("datetime64[M]")
    parts = {}
    for month in np.unique(month_at):
        part = table.filter(pa.array(month_at == month))
        pq.write_table(part, folder / f"{month}.parquet")
        digest = hashlib.sha256(str(part.to_pydict()).encode()).hexdigest()
        parts[str(month)] = {"rows": part.num_rows, "membership_sha256": digest}
    write_manifest(
        path,
        {
            "kind": "ml_dataset",
            "fingerprint": fingerprint,
            "source": {"path": "raw"},
            "parts": parts,
            "session_dates": [str(day) for day in days(len(data["returns"]))],
        },
    )
