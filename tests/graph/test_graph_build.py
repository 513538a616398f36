"""The stock graph against a pair-by-pair reference, and its laws about time and universe."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from atft_process import REPO, environment
from markets.graph_market import (
    CODES,
    CONFIG,
    Market,
    N,
    T,
    all_edges,
    build,
    days,
    edges_at,
    large_market,
    market,
    membership_table,
)

from atft_pipeline.config.schema import GraphConfig
from atft_pipeline.dataset.layout import TARGETS, write_dataset
from atft_pipeline.errors import InputError
from atft_pipeline.graph.build import CLIP, MINIMUM_SECTOR_MEMBERS
from atft_pipeline.graph.membership import MINIMUM_SESSIONS
from atft_pipeline.graph.store import build_graph_file, load_graph, write_graph
from atft_pipeline.storage.artifact import read_manifest

SESSIONS = days(T)
ONE_REFRESH = replace(CONFIG, lookback_sessions=60, refresh_sessions=59)
"""Of 60 sessions the last one alone is a refresh."""


def slow_edges(data: Market, t: int, config: GraphConfig) -> list[tuple]:
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
    z, has = {}, np.isfinite(window)
    for i in range(N):
        own = has[:, i]
        if member[t, i] and own.sum() >= 2 / 3 * len(window) and window[own, i].std() > 1e-7:
            clipped = np.clip((window[:, i] - window[own, i].mean()) / window[own, i].std(), -CLIP, CLIP)
            z[i] = np.where(own, clipped, 0.0) / np.sqrt(np.sum(clipped[own] ** 2))
    edges = []
    for i in z:
        candidates = []
        for j in z:
            corr = np.sum(z[i] * z[j])
            if i != j and (has[:, i] & has[:, j]).sum() >= len(window) / 2 and corr > 0:
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


def brute_force(data: Market, sessions: int, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Correlations `[n, n]` of the last `sessions`, and whether a pair may be neighbours; not demeaned, all at once."""
    window = data["returns"][-sessions:].astype(dtype)
    has = np.isfinite(window)
    z = (window - np.nanmean(window, axis=0)) / np.nanstd(window, axis=0)
    z = np.where(has, np.clip(z, -CLIP, CLIP), dtype(0.0))
    z /= np.sqrt((z * z).sum(axis=0))
    node = data["member"][-1] & (has.sum(axis=0) >= 2 / 3 * sessions)
    common = has.T.astype(float) @ has
    corr = z.T @ z
    allowed = node & node[:, None] & (common >= sessions / 2) & ~np.eye(len(node), dtype=bool) & (corr > 0)
    return corr, allowed


def assert_same_neighbours(data: Market, sessions: int, neighbours: int, dtype: type) -> None:
    """The last refresh has brute force's neighbours, up to pairs whose correlations differ by less than 1e-6."""
    config = replace(
        CONFIG, lookback_sessions=sessions, neighbours=neighbours, refresh_sessions=sessions - 1, sector_demeaned=False
    )
    graph = build({name: values[-sessions:] for name, values in data.items()}, config)
    corr, allowed = brute_force(data, sessions, dtype)
    for i in range(len(corr)):
        rows = graph.target == i
        found, expected = graph.source[rows], np.argsort(-np.where(allowed[i], corr[i], 0.0), kind="stable")
        expected = expected[: min(neighbours, allowed[i].sum())]
        assert len(found) == len(expected)
        assert allowed[i, found].all()
        assert len(set(found)) == len(found)
        np.testing.assert_allclose(corr[i, found], corr[i, expected], rtol=0, atol=1e-6)
        np.testing.assert_allclose(graph.edge_attr[rows, 0], 0.8 * corr[i, found], rtol=0, atol=1e-6)
    assert len(graph.refreshes) == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("sessions", "neighbours"), [(60, 20), (250, 20), (61, 200)])
def test_blocks_find_the_neighbours_of_a_brute_force_computation(sessions: int, neighbours: int, dtype: type) -> None:
    assert_same_neighbours(large_market(500, sessions), sessions, neighbours, dtype)


def test_further_candidates_replace_pairs_without_enough_common_sessions() -> None:
    """90 near-copies lack a third of the window at its start, 90 at its end: across the two, no pair may be taken."""
    rng = np.random.default_rng(3)
    data = large_market(400, 60)
    data["returns"][:, :180] = 0.01 * rng.normal(size=(60, 1)) + 0.0003 * rng.normal(size=(60, 180))
    data["returns"][:20, :90] = np.nan
    data["returns"][40:, 90:180] = np.nan
    data["member"][:] = True
    corr, allowed = brute_force(data, 60, np.float64)
    np.fill_diagonal(corr, 0.0)
    unchecked = np.argsort(-corr, axis=1)[:180, :100]
    assert not np.take_along_axis(allowed[:180], unchecked, axis=1).all(axis=1).any(), "every such target needs more"
    assert_same_neighbours(data, 60, 100, np.float64)


def bits(data: Market, config: GraphConfig, threads: int | None = None) -> bytes:
    """Edges and attributes of the last refresh."""
    graph = build(data, config, threads)
    last = slice(graph.offsets[-2], graph.offsets[-1])
    return b"".join(part[last].tobytes() for part in (graph.source, graph.target, graph.edge_attr))


def test_a_refresh_is_the_same_to_the_last_bit_alone_and_in_a_long_build_on_any_number_of_threads() -> None:
    data = large_market(300, 160)
    config = replace(CONFIG, lookback_sessions=60, neighbours=10, refresh_sessions=1)
    alone = bits({name: values[100:160] for name, values in data.items()}, replace(config, refresh_sessions=59))
    assert len(alone) > 10_000
    assert alone == bits(data, config)
    assert alone == bits(data, config, threads=1) == bits(data, config, threads=2) == bits(data, config, threads=5)
    assert alone != bits({name: values[:159] for name, values in data.items()}, config)


DIGEST_OF_A_BUILD = """
from dataclasses import replace
from markets.graph_market import CONFIG, build, large_market
from atft_pipeline.graph.store import content_sha256
print(content_sha256(build(large_market(300, 250), replace(CONFIG, lookback_sessions=250, refresh_sessions=249))))
"""


@pytest.mark.process(reason="interpreters with other kernels of OpenBLAS")
def test_the_instructions_of_the_product_change_no_bit() -> None:
    """OpenBLAS's kernels for AVX2 and for SSE3 round differently; what they nominate is valued the same."""
    printed = [
        subprocess.run(
            [sys.executable, "-c", DIGEST_OF_A_BUILD],
            env=environment({"PYTHONPATH": f"{REPO}:{REPO / 'tests'}", "OPENBLAS_CORETYPE": kernels}),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for kernels in ("Haswell", "Prescott")
    ]
    assert len(printed[0]) == 65
    assert printed[0] == printed[1]


def test_stocks_outside_the_universe_change_no_bit() -> None:
    data = large_market(300, 60)
    data["member"][:, 40:200] = False
    kept = np.r_[0:40, 200:300]
    whole = build(data, ONE_REFRESH)
    part = build({name: values[:, kept] for name, values in data.items()}, ONE_REFRESH)
    assert (whole.source == kept[part.source]).all()
    assert (whole.target == kept[part.target]).all()
    assert (whole.edge_attr == part.edge_attr).all()
    assert len(part.source) > 300


def test_a_correlation_is_the_same_from_both_ends() -> None:
    graph = build(large_market(300, 60), replace(ONE_REFRESH, neighbours=30))
    corr = dict(zip(zip(graph.source, graph.target, strict=True), graph.edge_attr[:, 0], strict=True))
    both = [(corr[s, t], corr[t, s]) for s, t in corr if (t, s) in corr]
    assert len(both) > 1000
    assert all(one == other for one, other in both)


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


def test_equal_correlations_go_by_code_across_blocks() -> None:
    data = large_market(400, 60)
    data["member"][:] = True
    copies = [5, 100, 131, 250, 263, 390, 399]
    data["returns"][:, copies] = np.nan_to_num(data["returns"][:, [5]])
    graph = build(data, replace(ONE_REFRESH, neighbours=3, sector_demeaned=False))
    for copy in copies:
        assert graph.source[graph.target == copy].tolist() == [other for other in copies if other != copy][:3]


def test_a_constant_stock_has_no_neighbours() -> None:
    data = market()
    data["returns"][:, 5] = 0.0
    graph = build(data, replace(CONFIG, sector_demeaned=False))
    assert 5 not in graph.target
    assert 5 not in graph.source


def test_first_graph_waits_for_enough_history() -> None:
    graph = build(market(), replace(CONFIG, lookback_sessions=250, refresh_sessions=1))
    assert graph.refreshes[0] == SESSIONS[MINIMUM_SESSIONS - 1]


@pytest.mark.parametrize("name", ["graph.parquet", "graph"])
def test_graph_survives_the_disk(tmp_path: Path, name: str) -> None:
    graph = build(market())
    write_graph(tmp_path / name, graph)
    assert all_edges(load_graph(tmp_path / name)) == all_edges(graph)
    files = sorted((tmp_path / name).iterdir()) if name == "graph" else [tmp_path / name]
    assert name != "graph" or [file.name for file in files] == ["2020-02.parquet", "2020-03.parquet"]
    for file in files:
        schema = pq.read_schema(file)
        assert schema.names == ["Date", "source", "target", "corr", "same_sector", "same_market"]
        assert [str(t) for t in schema.types] == ["date32[day]", "string", "string", "float", "float", "float"]


def test_a_folder_takes_the_place_of_a_file_and_back(tmp_path: Path) -> None:
    graph = build(market())
    (tmp_path / "g").write_text("an earlier product")
    (tmp_path / "g.parquet").mkdir()
    for name in ("g", "g.parquet"):
        write_graph(tmp_path / name, graph)
        assert all_edges(load_graph(tmp_path / name)) == all_edges(graph)


def write_market(path: Path, data: Market) -> None:
    """The market as a dataset on disk with one feature."""
    membership = membership_table(data)
    values = membership["return_1d"].cast(pa.float32())
    features = pa.table(
        {"Date": membership["Date"], "Code": membership["Code"]} | dict.fromkeys(("feature", *TARGETS), values)
    )
    manifest = {"kind": "ml_dataset", "fingerprint": "f00d", "source": {"path": "raw"}, "features": ["feature"]}
    write_dataset(path, features, membership, manifest)


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
