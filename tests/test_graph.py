"""The stock graph against a pair-by-pair reference, and its laws about time and universe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atft_pipeline.config import GraphConfig
from atft_pipeline.dataset import MEMBERSHIP_COLUMNS, TARGETS, read_manifest, write_dataset
from atft_pipeline.errors import InputError
from atft_pipeline.graph import (
    CLIP,
    MINIMUM_SECTOR_MEMBERS,
    MINIMUM_SESSIONS,
    StockGraph,
    build_graph,
    build_graph_file,
    load_graph,
    write_graph,
)

T, N = 75, 16
CONFIG = GraphConfig(lookback_sessions=40, neighbours=3, refresh_sessions=5, shrinkage=0.2)
SESSIONS = np.datetime64("2020-01-06") + np.arange(T)
CODES = np.array([f"{1301 + 7 * i}" for i in range(N)])


def market(seed: int = 0) -> dict[str, np.ndarray]:
    """Returns with sector factors, one jump, missing stretches, a late and a constant stock; sectors that change."""
    rng = np.random.default_rng(seed)
    sector = np.tile(np.array([0] * 7 + [1] * 6 + [2] * 2 + [-1]), (T, 1))
    sector[50:, 0] = 1
    returns = 0.01 * (rng.normal(size=(T, N)) + rng.normal(size=(T, 3))[:, np.maximum(sector[0], 0)])
    returns += 0.02 * rng.normal(size=(T, 1))
    returns[30, 2] = 0.8
    returns[rng.random((T, N)) < 0.08] = np.nan
    returns[:48, 4] = np.nan
    returns[:, 6] = np.where(np.arange(T) % 2, np.nan, returns[:, 6])
    returns[10:40, 8] = np.nan
    returns[:, 1] = np.nan_to_num(returns[:, 1])
    returns[:, 3] = np.nan_to_num(returns[:, 3])
    member = rng.random((T, N)) > 0.1
    return {"returns": returns, "member": member, "sector": sector, "market": np.arange(N) % 2 + 0 * sector}


def build(data: dict[str, np.ndarray], config: GraphConfig = CONFIG, codes: np.ndarray = CODES) -> StockGraph:
    sessions = SESSIONS[: len(data["returns"])]
    return build_graph(
        data["returns"], data["member"], data["sector"], data["market"], sessions, codes=codes, config=config
    )


def edges_at(graph: StockGraph, g: int) -> list[tuple[str, str, float, float, float]]:
    rows = range(graph.offsets[g], graph.offsets[g + 1])
    return [(graph.codes[graph.target[e]], graph.codes[graph.source[e]], *map(float, graph.edge_attr[e])) for e in rows]


def slow_edges(data: dict[str, np.ndarray], t: int, config: GraphConfig) -> list[tuple]:
    """The definition in the module's docstring, pair by pair in float64."""
    returns, member, sector = data["returns"], data["member"], data["sector"]
    residual = returns.copy()
    if config.sector_demeaned:
        for s in range(len(returns)):
            for i in range(N):
                members = [j for j in range(N) if member[s, j] and np.isfinite(returns[s, j])]
                peers = [j for j in members if sector[s, j] == sector[s, i] >= 0]
                peers = peers if len(peers) >= MINIMUM_SECTOR_MEMBERS else members
                residual[s, i] = returns[s, i] - np.mean(returns[s, peers])
    window = residual[max(0, t + 1 - config.lookback_sessions) : t + 1]
    z = {}
    for i in range(N):
        own = np.isfinite(window[:, i])
        if member[t, i] and own.sum() >= 2 / 3 * len(window) and window[own, i].std() > 1e-7:
            clipped = np.clip((window[:, i] - window[own, i].mean()) / window[own, i].std(), -CLIP, CLIP)
            z[i] = clipped / np.sqrt(np.mean(clipped[own] ** 2))
    edges = []
    for i in z:
        candidates = []
        for j in z:
            common = np.isfinite(z[i]) & np.isfinite(z[j])
            if i != j and common.sum() >= len(window) / 2:
                corr = np.mean(z[i][common] * z[j][common])
                if corr > 0:
                    candidates.append((-corr, j))
        for corr, j in sorted(candidates)[: config.neighbours]:
            same = [float(data[k][t, i] == data[k][t, j] >= 0) for k in ("sector", "market")]
            edges.append((CODES[i], CODES[j], -corr * (1 - config.shrinkage), *same))
    return edges


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, sector_demeaned=False), replace(CONFIG, neighbours=50)])
def test_graph_matches_the_pair_by_pair_definition(config: GraphConfig) -> None:
    data = market()
    graph = build(data, config)
    assert len(graph.refreshes) == 7  # sessions 40, 45, ..., 70
    for g, t in enumerate(range(40, T, 5)):
        assert graph.refreshes[g] == SESSIONS[t]
        found, expected = edges_at(graph, g), slow_edges(data, t, config)
        assert expected
        assert [edge[:2] for edge in found] == [edge[:2] for edge in expected]
        np.testing.assert_allclose([e[2:] for e in found], [e[2:] for e in expected], atol=1e-5)


def test_graph_ignores_everything_after_its_session() -> None:
    data, later = market(), market()
    other = market(seed=9)
    for name in later:
        later[name] = np.concatenate([data[name][:56], other[name][56:]])
    one, two = build(data), build(later)
    for g in range(4):  # refreshes 40, 45, 50, 55
        assert edges_at(one, g) == edges_at(two, g)
    assert edges_at(one, 5) != edges_at(two, 5)


def test_appended_sessions_move_no_refresh() -> None:
    data = market()
    shorter = build({name: values[:63] for name, values in data.items()})
    whole = build(data)
    assert (whole.refreshes[: len(shorter.refreshes)] == shorter.refreshes).all()
    assert edges_at(whole, len(shorter.refreshes) - 1) == edges_at(shorter, len(shorter.refreshes) - 1)


def test_only_members_with_enough_history_are_nodes() -> None:
    data = market()
    graph = build(data)
    for g, t in enumerate(range(40, T, 5)):
        nodes = {code for edge in edges_at(graph, g) for code in edge[:2]}
        window = data["returns"][t - 39 : t + 1]
        allowed = data["member"][t] & (np.isfinite(window).sum(0) >= 2 / 3 * 40)
        assert nodes <= set(CODES[allowed])
    assert CODES[6] not in {code for g in range(7) for edge in edges_at(graph, g) for code in edge[:2]}


def test_equal_correlations_go_by_code() -> None:
    data = market()
    data["member"][:] = True
    data["returns"][:, 9:13] = np.nan_to_num(data["returns"][:, [9]])
    graph = build(data, replace(CONFIG, neighbours=2, sector_demeaned=False))
    first = {target: [e[1] for e in edges_at(graph, 0) if e[0] == target] for target in CODES[9:13]}
    assert first[CODES[9]] == [CODES[10], CODES[11]]
    assert first[CODES[12]] == [CODES[9], CODES[10]]


def test_a_constant_stock_has_no_neighbours() -> None:
    data = market()
    data["returns"][:, 5] = 0.0
    graph = build(data, replace(CONFIG, sector_demeaned=False))
    assert 5 not in graph.target
    assert 5 not in graph.source


def test_first_graph_waits_for_enough_history() -> None:
    graph = build(market(), replace(CONFIG, lookback_sessions=250, refresh_sessions=1))
    assert graph.refreshes[0] == SESSIONS[MINIMUM_SESSIONS - 1]


def test_graph_survives_the_disk(tmp_path: Path) -> None:
    graph = build(market())
    write_graph(tmp_path / "graph.parquet", graph)
    loaded = load_graph(tmp_path / "graph.parquet")
    assert (loaded.refreshes == graph.refreshes).all()
    assert [edges_at(loaded, g) for g in range(7)] == [edges_at(graph, g) for g in range(7)]
    table = pq.read_table(tmp_path / "graph.parquet")
    assert table.column_names == ["Date", "source", "target", "corr", "same_sector", "same_market"]
    assert [str(t) for t in table.schema.types] == ["date32[day]", "string", "string", "float", "float", "float"]


def write_market(path: Path, data: dict[str, np.ndarray]) -> None:
    """The market as a dataset on disk with one feature; stock 7 has no row before session 20."""
    t, i = np.divmod(np.arange(data["returns"].size), N)
    t, i = t[(i != 7) | (t >= 20)], i[(i != 7) | (t >= 20)]
    keys = {"Date": pa.array(SESSIONS[t], pa.date32()), "Code": pa.array(CODES[i])}
    text = lambda values: pa.array([None if v < 0 else f"{v}" for v in values], pa.string())  # noqa: E731
    returns = data["returns"][t, i]
    columns = {
        "is_traded": np.isfinite(returns),
        "is_investable": data["member"][t, i],
        "is_liquid": data["member"][t, i] & (i < 12),
        "return_1d": pa.array(returns, from_pandas=True),
        "Open": returns,
        "Close": returns,
        "Sector33Code": text(data["sector"][t, i]),
        "MarketCode": text(data["market"][t, i]),
    }
    features = pa.table({**keys, **{name: returns.astype(np.float32) for name in ("feature", *TARGETS)}})
    manifest = {"kind": "ml_dataset", "fingerprint": "f00d", "source": {"path": "raw"}, "features": ["feature"]}
    membership = pa.table({**keys, **columns}).select(list(MEMBERSHIP_COLUMNS))
    write_dataset(path, features, membership, manifest, by_month=False)


@pytest.mark.parametrize("universe", ["all", "liquid"])
def test_graph_file_is_the_graph_of_the_membership_table(tmp_path: Path, universe: str) -> None:
    data = market()
    data["returns"][:20, 7] = np.nan
    data["member"][:20, 7] = False
    write_market(tmp_path / "d.parquet", data)
    config = replace(CONFIG, universe=universe)
    manifest = build_graph_file(tmp_path / "d.parquet", tmp_path / "g.parquet", config)
    if universe == "liquid":
        data["member"][:, 12:] = False
    expected = build(data, config)
    loaded = load_graph(tmp_path / "g.parquet")
    assert [edges_at(loaded, g) for g in range(7)] == [edges_at(expected, g) for g in range(7)]
    assert manifest == read_manifest(tmp_path / "g.parquet", "stock_graph")
    assert (manifest["dataset_fingerprint"], manifest["source"]) == ("f00d", {"path": "raw"})
    assert (manifest["refresh_dates"], manifest["edges"]) == (7, len(expected.source))
    assert 0 < manifest["mean_degree"] <= CONFIG.neighbours


def test_too_few_sessions_and_an_empty_universe_are_one_sentence(tmp_path: Path) -> None:
    data = market()
    write_market(tmp_path / "d.parquet", {name: values[:30] for name, values in data.items()})
    with pytest.raises(InputError, match="30 sessions are fewer than the sessions needed"):
        build_graph_file(tmp_path / "d.parquet", tmp_path / "g.parquet", CONFIG)
    data["member"][:] = False
    write_market(tmp_path / "d.parquet", data)
    with pytest.raises(InputError, match=r"is_liquid.*universe is empty"):
        build_graph_file(tmp_path / "d.parquet", tmp_path / "g.parquet", CONFIG)
    assert not (tmp_path / "g.parquet").exists()
