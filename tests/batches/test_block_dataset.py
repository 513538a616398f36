"""Panel and blocks compared with a row-by-row reading of the tables that they are built from."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from atft_pipeline.batches.block import Block
from atft_pipeline.batches.block_dataset import BlockDataset
from atft_pipeline.batches.panel import Panel, load_panel
from atft_pipeline.config.schema import ModelConfig
from atft_pipeline.dataset.layout import MEMBERSHIP_COLUMNS, TARGETS, membership_path, write_dataset
from atft_pipeline.errors import InputError
from atft_pipeline.graph.build import StockGraph
from atft_pipeline.model import ATFTGATFAN
from atft_pipeline.storage.artifact import manifest_path

FEATURES = ["alpha", "dead", "beta", "gamma"]
LIVE = ["alpha", "beta", "gamma"]
SESSIONS = np.datetime64("2020-01-20") + np.arange(20)  # two months
CODES = ["1301", "1305", "1332", "13330", "9999"]  # 1305 is never liquid, 9999 never investable
R = 4


def rows() -> list[dict[str, Any]]:
    """The dataset as rows; 1332 starts late, 13330 has no rows at sessions 8 to 10."""
    rng = np.random.default_rng(0)
    found = []
    for t, date in enumerate(SESSIONS):
        for i, code in enumerate(CODES):
            if (code == "1332" and t < 6) or (code == "13330" and 8 <= t <= 10):
                continue
            investable = code != "9999" and rng.random() > 0.1
            values = {name: None if rng.random() < 0.2 else float(np.float32(rng.normal())) for name in LIVE}
            values["dead"] = None
            targets = {name: None if t > 15 and i else float(np.float32(rng.normal())) for name in TARGETS}
            found.append(
                {
                    "Date": date.item(),
                    "Code": code,
                    **values,
                    **targets,
                    "is_traded": True,
                    "is_investable": investable,
                    "is_liquid": investable and code != "1305" and t != 12,
                    "return_1d": 0.0,
                    "Open": 1.0,
                    "Close": 1.0,
                    "Sector33Code": "0050",
                    "MarketCode": None,
                }
            )
    return found


def write(path: Path, rows: list[dict[str, Any]], *, by_month: bool = False) -> Path:
    def column(name: str) -> pa.Array:
        kinds = {"Date": pa.date32(), "Code": pa.string(), "Sector33Code": pa.string(), "MarketCode": pa.string()}
        kinds |= dict.fromkeys((*FEATURES, *TARGETS), pa.float32())
        return pa.array([row[name] for row in rows], kinds.get(name))

    names = ["Date", "Code", *FEATURES, *TARGETS]
    write_dataset(
        path,
        pa.table({name: column(name) for name in names}),
        pa.table({name: column(name) for name in MEMBERSHIP_COLUMNS}),
        {"kind": "ml_dataset", "fingerprint": "f00d", "features": FEATURES, "live_features": LIVE},
    )
    return in_months(path) if by_month else path


def in_months(path: Path) -> Path:
    """The dataset at `path` as a folder of months, membership likewise."""
    folder = path.with_name(f"{path.name}.months")
    for table, parts in ((path, folder), (membership_path(path), folder.with_name(f"{folder.name}.membership"))):
        parts.mkdir()
        rows = pq.read_table(table)
        months = np.array([day.isoformat()[:7] for day in rows["Date"].to_pylist()])
        for month in np.unique(months):
            pq.write_table(rows.filter(pa.array(months == month)), parts / f"{month}.parquet")
    manifest_path(folder).write_bytes(manifest_path(path).read_bytes())
    return folder


GRAPH = StockGraph(
    refreshes=SESSIONS[[5, 11]],
    codes=np.array(["1301", "1305", "1332", "13330", "7777"]),
    offsets=np.array([0, 4, 7]),
    source=np.array([2, 3, 1, 4, 3, 0, 2], dtype=np.int32),
    target=np.array([0, 0, 2, 3, 0, 2, 3], dtype=np.int32),
    edge_attr=np.arange(21, dtype=np.float32).reshape(7, 3),
)


def same(a: float | None, b: float) -> bool:
    return math.isnan(b) if a is None else a == b


@pytest.mark.parametrize("by_month", [False, True])
@pytest.mark.parametrize(("universe", "flag"), [("all", "is_investable"), ("liquid", "is_liquid")])
def test_panel_holds_every_row_of_the_universe(tmp_path: Path, universe: Any, flag: str, by_month: bool) -> None:
    table = rows()
    panel = load_panel(write(tmp_path / "d.parquet", table, by_month=by_month), universe)
    assert (panel.feature_names, panel.features.shape[2]) == (LIVE, len(LIVE))
    assert panel.codes.tolist() == sorted({row["Code"] for row in table if row[flag]})
    assert (panel.sessions == SESSIONS).all()
    by_key = {(row["Date"], row["Code"]): row for row in table}
    absent = dict.fromkeys((*FEATURES, *TARGETS)) | dict.fromkeys(("is_investable", "is_liquid"), False)
    for t, date in enumerate(SESSIONS):
        for i, code in enumerate(panel.codes):
            row = by_key.get((date.item(), code), absent)
            assert all(same(row[name], panel.features[t, i, f]) for f, name in enumerate(LIVE))
            assert all(same(row[name], panel.targets[t, i, h]) for h, name in enumerate(TARGETS))
            assert panel.member[t, i] == row[flag]
            assert (panel.investable[t, i], panel.liquid[t, i]) == (row["is_investable"], row["is_liquid"])


def panel_and_data(tmp_path: Path, graph: StockGraph | None = GRAPH) -> tuple[Panel, BlockDataset]:
    panel = load_panel(write(tmp_path / "d.parquet", rows()), "liquid")
    return panel, BlockDataset(panel, graph, R)


def slow_edges(panel: Panel, block: Block) -> dict[tuple[int, int], list[float]]:
    """Edges by node pair: the newest refresh at or before each session, members only."""
    edges = {}
    stocks = panel.codes[block.stock_index.numpy()].tolist()
    for s, t in enumerate(block.session_index.tolist()):
        known = [g for g in range(2) if GRAPH.refreshes[g] <= panel.sessions[t]]
        for e in range(GRAPH.offsets[known[-1]], GRAPH.offsets[known[-1] + 1]) if known else ():
            ends = [str(GRAPH.codes[GRAPH.source[e]]), str(GRAPH.codes[GRAPH.target[e]])]
            places = [panel.codes.tolist().index(code) if code in panel.codes else -1 for code in ends]
            if min(places) >= 0 and panel.member[t, places].all():
                a, b = (s * len(stocks) + stocks.index(code) for code in ends)
                edges[a, b] = GRAPH.edge_attr[e].tolist()
    return edges


@pytest.mark.parametrize("sessions", [range(0, 3), range(2, 9), range(7, 8), range(9, 20)])
def test_block_is_cut_from_the_panel(tmp_path: Path, sessions: range) -> None:
    panel, data = panel_and_data(tmp_path)
    block = data.block(np.array(sessions))
    members = panel.member[sessions[0] : sessions[-1] + 1]
    assert block.session_index.tolist() == list(sessions)
    assert block.stock_index.tolist() == np.flatnonzero(members.any(axis=0)).tolist()
    assert block.x.shape == block.missing.shape == (len(block.stock_index), len(sessions) + R - 1, len(LIVE))
    assert block.x.dtype == torch.float32
    for n, i in enumerate(block.stock_index.tolist()):
        for step in range(len(sessions) + R - 1):
            t = sessions[0] - R + 1 + step
            for f in range(len(LIVE)):
                value = panel.features[t, i, f] if t >= 0 else math.nan
                assert block.missing[n, step, f].item() is math.isnan(value)
                assert block.x[n, step, f].item() == (0.0 if math.isnan(value) else value)
        for s, t in enumerate(sessions):
            assert block.member[n, s].item() == panel.member[t, i]
            np.testing.assert_array_equal(block.target[n, s].numpy(), panel.targets[t, i])
    expected = slow_edges(panel, block)
    n = len(block.stock_index)
    table = block.neighbours
    found = {
        (s * n + int(table.source[s, i, k]), s * n + i): table.attributes[s, i, k].tolist()
        for s, i, k in table.is_edge.nonzero().tolist()
    }
    assert found == expected
    assert not table.source[~table.is_edge].any()
    assert not table.attributes[~table.is_edge].any()
    assert bool(expected) is (sessions[-1] >= 5)


def test_an_infinite_feature_is_missing(tmp_path: Path) -> None:
    panel, _ = panel_and_data(tmp_path)
    panel.features[3, 0, 0] = np.inf
    block = BlockDataset(panel, None, R).block(np.array([3]))
    n = block.stock_index.tolist().index(0)
    assert block.missing[n, -1, 0]
    assert block.x[n, -1, 0] == 0.0


def test_without_a_graph_there_are_no_edges(tmp_path: Path) -> None:
    _, data = panel_and_data(tmp_path, graph=None)
    block = data.block(np.arange(10, 14))
    assert block.neighbours.source.shape == (4, len(block.stock_index), 0)
    assert block.neighbours.attributes.shape == (4, len(block.stock_index), 0, 3)


@pytest.mark.parametrize(
    "codes", [np.array([], dtype=str), np.array(["1", "2", "3", "4", "5"])], ids=["none", "others"]
)
def test_a_graph_of_no_stock_of_the_panel_is_no_graph(tmp_path: Path, codes: np.ndarray) -> None:
    edges = slice(0, 0 if len(codes) == 0 else 7)
    graph = dataclasses.replace(
        GRAPH,
        codes=codes,
        refreshes=GRAPH.refreshes[edges],
        offsets=GRAPH.offsets if len(codes) else np.array([0]),
        source=GRAPH.source[edges],
        target=GRAPH.target[edges],
        edge_attr=GRAPH.edge_attr[edges],
    )
    network = ATFTGATFAN(ModelConfig(), len(LIVE)).eval()
    panel = load_panel(write(tmp_path / "d.parquet", rows()), "liquid")
    block = BlockDataset(panel, graph, network.receptive_field).block(np.arange(14, 18))
    assert block.neighbours.source.shape == (4, len(block.stock_index), 0)
    assert torch.isfinite(network(block)).all()


@pytest.mark.parametrize("batch_size", [1, 4, 7, 1000])
def test_blocks_are_contiguous_whole_sessions_that_fit(tmp_path: Path, batch_size: int) -> None:
    panel, data = panel_and_data(tmp_path)
    wanted = np.concatenate([np.arange(0, 9), np.arange(10, 19)])
    blocks = data.sessions_per_block(wanted, batch_size)
    members = panel.member.sum(axis=1)
    assert members[12] == 0
    assert np.concatenate(blocks).tolist() == [t for t in wanted if members[t]]
    for block in blocks:
        assert (np.diff(block) == 1).all()
        assert members[block].sum() <= batch_size or len(block) == 1
    for block, following in itertools.pairwise(blocks):
        # No block could have taken the next session too.
        assert following[0] != block[-1] + 1 or members[block].sum() + members[following[0]] > batch_size


def test_a_block_of_scattered_sessions_is_refused(tmp_path: Path) -> None:
    _, data = panel_and_data(tmp_path)
    with pytest.raises(ValueError, match="contiguous"):
        data.block(np.array([3, 5]))


def test_a_dataset_without_live_features_is_one_sentence(tmp_path: Path) -> None:
    path = write(tmp_path / "d.parquet", rows())
    manifest = manifest_path(path)
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"live_features": []}))
    with pytest.raises(InputError, match=r"d\.parquet: none of 4 features is live"):
        load_panel(path, "all")


def test_an_empty_universe_is_one_sentence(tmp_path: Path) -> None:
    table = [{**row, "is_liquid": False} for row in rows()]
    path = write(tmp_path / "d.parquet", table)
    assert load_panel(path, "all").member.any()
    with pytest.raises(InputError, match=r"d\.parquet: no row of \d+ is in the universe 'liquid'"):
        load_panel(path, "liquid")


def test_columns_that_are_not_the_registry_s_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "d.parquet", rows())
    table = pq.read_table(path)
    swapped = ["Date", "Code", "beta", "dead", "alpha", "gamma", *TARGETS]
    pq.write_table(table.select(swapped), path)
    with pytest.raises(InputError, match="column 2 is 'beta' instead of 'alpha'"):
        load_panel(path, "all")
    pq.write_table(table.drop_columns(["target_20d"]), path)
    with pytest.raises(InputError, match="no further column instead of 'target_20d'"):
        load_panel(path, "all")


def test_what_is_no_number_and_what_is_infinite_is_refused_at_loading(tmp_path: Path) -> None:
    path = write(tmp_path / "d.parquet", rows())
    table = pq.read_table(path)
    place = table.schema.get_field_index("beta")
    pq.write_table(table.set_column(place, "beta", table["beta"].cast(pa.string())), path)
    with pytest.raises(InputError, match=r"d\.parquet: column beta is string, not a number"):
        load_panel(path, "all")
    place = table.schema.get_field_index("target_5d")
    infinite = pa.array([np.inf] + [0.0] * (table.num_rows - 1), pa.float32())
    pq.write_table(table.set_column(place, "target_5d", infinite), path)
    with pytest.raises(InputError, match=r"d\.parquet: a target is infinite"):
        load_panel(path, "all")
    pq.write_table(table, path)
    manifest = manifest_path(path)
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"live_features": ["delta"]}))
    with pytest.raises(InputError, match="calls 'delta' live, which is no feature"):
        load_panel(path, "all")


def test_a_membership_table_of_other_rows_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "d.parquet", rows())
    members = pq.read_table(membership_path(path))
    pq.write_table(members.slice(1), membership_path(path))
    with pytest.raises(InputError, match="its Date and Code are not the membership table's"):
        load_panel(path, "all")
    pq.write_table(pa.concat_tables([members, members.slice(0, 1)]), membership_path(path))
    with pytest.raises(InputError, match="build it again"):
        load_panel(path, "all")


def test_an_unreadable_part_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "d.parquet", rows(), by_month=True)
    (path / "2020-02.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(InputError, match=r"2020-02\.parquet: not a readable parquet file"):
        load_panel(path, "all")
