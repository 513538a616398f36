"""The stock graph by month: what an increment computes, and that it is the full build bit for bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from markets.graph_market import CONFIG, Market, all_edges, build, days, market, write_months

from atft_pipeline.config.schema import GraphConfig
from atft_pipeline.errors import InputError
from atft_pipeline.graph import membership as graph_inputs
from atft_pipeline.graph.store import build_graph_file, content_sha256, load_graph
from atft_pipeline.storage.artifact import manifest_path, read_manifest

SESSIONS = 205
"""2020-01-06 to 2020-07-28: refreshes in February to July, the last on 2020-07-24; a window reaches two months back."""
MONTHS = ["2020-02", "2020-03", "2020-04", "2020-05", "2020-06", "2020-07"]


def first(sessions: int, data: Market) -> Market:
    return {name: values[:sessions].copy() for name, values in data.items()}


def increment(
    folder: Path, before: Market, after: Market, config: GraphConfig = CONFIG, earlier: GraphConfig = CONFIG
) -> dict[str, Any]:
    """The manifest of the graph of `after` on top of that of `before`, once it is proved equal to a full build."""
    write_months(folder / "d", before, "before")
    build_graph_file(folder / "d", folder / "old", earlier)
    shutil.rmtree(folder / "d.membership")
    write_months(folder / "d", after, "after")
    made = build_graph_file(folder / "d", folder / "new", config, previous=folder / "old")
    full = build_graph_file(folder / "d", folder / "full", config)
    decided_by_previous = ("months_computed", "months_reused")
    assert {k: made[k] for k in made if k not in decided_by_previous} == {
        k: full[k] for k in full if k not in decided_by_previous
    }
    assert full["months_computed"] == list(full["parts"])
    assert full["months_reused"] == []
    assert sorted(made["months_computed"] + made["months_reused"]) == list(made["parts"])
    new, whole = load_graph(folder / "new"), load_graph(folder / "full")
    for name in ("refreshes", "codes", "offsets", "source", "target", "edge_attr"):
        assert getattr(new, name).tobytes() == getattr(whole, name).tobytes(), name
    assert made == read_manifest(folder / "new", "stock_graph")
    return made


def test_graph_by_month_is_the_graph(tmp_path: Path) -> None:
    data = market(sessions=SESSIONS)
    write_months(tmp_path / "d", data)
    manifest = build_graph_file(tmp_path / "d", tmp_path / "g", replace(CONFIG, universe="all"))
    data["returns"][:20, 7] = np.nan
    data["member"][:20, 7] = False
    expected = build(data)
    assert all_edges(load_graph(tmp_path / "g")) == all_edges(expected)
    assert sorted(file.stem for file in (tmp_path / "g").iterdir()) == MONTHS == list(manifest["parts"])
    assert (manifest["refresh_dates"], manifest["edges"]) == (len(expected.refreshes), len(expected.source))
    assert 0 < manifest["mean_degree"] <= CONFIG.neighbours
    for month, part in manifest["parts"].items():
        assert part["sha256"] == content_sha256(load_graph(tmp_path / "g" / f"{month}.parquet"))
    one_file = build_graph_file(tmp_path / "d", tmp_path / "g.parquet", replace(CONFIG, universe="all"))
    assert all_edges(load_graph(tmp_path / "g.parquet")) == all_edges(expected)
    shared = ("fingerprint", "refresh_dates", "edges", "mean_degree", "months_computed")
    assert {name: one_file[name] for name in shared} == {name: manifest[name] for name in shared}


def test_nothing_changed_computes_and_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = market(sessions=SESSIONS)
    write_months(tmp_path / "d", data)
    build_graph_file(tmp_path / "d", tmp_path / "old", CONFIG)
    shutil.rmtree(tmp_path / "d.membership")
    made = build_graph_file(tmp_path / "d", tmp_path / "new", CONFIG, previous=tmp_path / "old")
    assert (made["months_computed"], made["months_reused"]) == ([], MONTHS)
    for month in MONTHS:
        assert (tmp_path / "old" / f"{month}.parquet").samefile(tmp_path / "new" / f"{month}.parquet")

    def refuse(*_: object) -> None:
        raise OSError("other file system")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    build_graph_file(tmp_path / "d", tmp_path / "copy", CONFIG, previous=tmp_path / "old")
    assert all_edges(load_graph(tmp_path / "copy")) == all_edges(load_graph(tmp_path / "old"))


def test_a_graph_is_its_own_previous(tmp_path: Path) -> None:
    data = market(sessions=SESSIONS)
    write_months(tmp_path / "d", first(SESSIONS - 10, data))
    build_graph_file(tmp_path / "d", tmp_path / "g", CONFIG)
    write_months(tmp_path / "d", data)
    made = build_graph_file(tmp_path / "d", tmp_path / "g", CONFIG, previous=tmp_path / "g")
    assert made["months_reused"] == MONTHS[:-1]
    build_graph_file(tmp_path / "d", tmp_path / "full", CONFIG)
    assert all_edges(load_graph(tmp_path / "g")) == all_edges(load_graph(tmp_path / "full"))


def windows_computed(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Records the last session of every window that is searched, by its returns."""
    from atft_pipeline.graph.kernels import Search

    searched, nearest = [], Search.nearest
    monkeypatch.setattr(
        Search, "nearest", lambda s, window, *rest: searched.append(window) or nearest(s, window, *rest)
    )
    return searched


def months_read(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    read, original = [], graph_inputs.read_membership_months
    monkeypatch.setattr(
        graph_inputs, "read_membership_months", lambda d, only, c: read.append(list(only)) or original(d, only, c)
    )
    return read


def test_one_more_session_computes_its_refresh_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = market(sessions=201)  # session 200, 2020-07-24, is a refresh
    write_months(tmp_path / "d", first(200, data))
    build_graph_file(tmp_path / "d", tmp_path / "old", CONFIG)
    write_months(tmp_path / "d", data)
    searched, read = windows_computed(monkeypatch), months_read(monkeypatch)
    made = build_graph_file(tmp_path / "d", tmp_path / "new", CONFIG, previous=tmp_path / "old")
    assert made["months_computed"] == ["2020-07"]
    assert len(searched) == 1
    assert read == [["2020-05", "2020-06", "2020-07"]]
    monkeypatch.undo()
    assert increment(tmp_path / "again", first(200, data), data)["parts"] == made["parts"]


def test_one_more_session_without_a_refresh_computes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = market(sessions=SESSIONS)
    write_months(tmp_path / "d", first(SESSIONS - 1, data))
    build_graph_file(tmp_path / "d", tmp_path / "old", CONFIG)
    write_months(tmp_path / "d", data)
    searched = windows_computed(monkeypatch)
    build_graph_file(tmp_path / "d", tmp_path / "new", CONFIG, previous=tmp_path / "old")
    assert searched == []
    assert all_edges(load_graph(tmp_path / "new")) == all_edges(load_graph(tmp_path / "old"))


def test_a_new_month_leaves_the_earlier_ones(tmp_path: Path) -> None:
    data = market(sessions=SESSIONS)
    made = increment(tmp_path, first(180, data), data)  # ends on 2020-07-03
    assert made["months_reused"] == MONTHS[:-1]
    longer = increment(tmp_path / "june", first(170, data), data)
    assert longer["months_reused"] == MONTHS[:-2]


def revised(data: Market, name: str, session: int, stock: int, value: float) -> Market:
    changed = first(len(data["returns"]), data)
    changed[name][session, stock] = value
    return changed


@pytest.mark.parametrize(
    ("name", "value"), [("returns", 0.07), ("returns", np.nan), ("member", False), ("sector", 2), ("market", -1)]
)
def test_a_revised_month_computes_every_month_whose_window_has_it(tmp_path: Path, name: str, value: float) -> None:
    data = market(sessions=SESSIONS)
    data["member"][70, 3] = True
    changed = revised(data, name, 70, 3, value)  # 2020-03-16
    made = increment(tmp_path, data, changed)
    assert made["months_reused"] == ["2020-02", "2020-06", "2020-07"]
    old = read_manifest(tmp_path / "old")["parts"]
    assert made["parts"]["2020-03"]["sha256"] != old["2020-03"]["sha256"]


@pytest.mark.parametrize(("session", "moved"), [(198, ["2020-07-24"]), (174, ["2020-06-29", "2020-07-04"])])
@pytest.mark.parametrize(("name", "value"), [("returns", 0.07), ("member", False), ("sector", 2), ("market", -1)])
def test_a_revised_row_moves_the_digest_of_each_refresh_from_it_on(
    tmp_path: Path, session: int, moved: list[str], name: str, value: float
) -> None:
    data = market(sessions=SESSIONS)
    data["member"][session, 3] = True
    changed = revised(data, name, session, 3, value)
    made = increment(tmp_path, data, changed)
    old = read_manifest(tmp_path / "old")["parts"]
    different = [
        day
        for month, part in made["parts"].items()
        for day, digest in part["refreshes"].items()
        if old[month]["refreshes"][day] != digest
    ]
    assert different[: len(moved)] == moved
    assert different == [day for part in made["parts"].values() for day in part["refreshes"] if day >= moved[0]]


@pytest.mark.parametrize(
    "change", [{"neighbours": 4}, {"universe": "all"}, {"shrinkage": 0.0}, {"refresh_sessions": 6}]
)
def test_another_configuration_reuses_nothing(tmp_path: Path, change: dict[str, Any]) -> None:
    data = market(sessions=120)
    made = increment(tmp_path, data, data, config=replace(CONFIG, **change))
    assert made["months_reused"] == []


def test_another_definition_reuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_months(tmp_path / "d", market(sessions=120))
    build_graph_file(tmp_path / "d", tmp_path / "g", CONFIG)
    monkeypatch.setattr(graph_inputs, "DEFINITION", graph_inputs.DEFINITION + 1)
    assert build_graph_file(tmp_path / "d", tmp_path / "g", CONFIG, previous=tmp_path / "g")["months_reused"] == []


def test_sessions_dropped_at_the_end_leave_no_part_behind(tmp_path: Path) -> None:
    data = market(sessions=SESSIONS)
    made = increment(tmp_path, data, first(150, data))
    assert list(made["parts"]) == sorted(file.stem for file in (tmp_path / "new").iterdir()) == MONTHS[:-2]


def test_a_month_without_a_refresh_has_no_part(tmp_path: Path) -> None:
    write_months(tmp_path / "d", market(sessions=SESSIONS))
    made = build_graph_file(tmp_path / "d", tmp_path / "g", replace(CONFIG, refresh_sessions=75))
    assert list(made["parts"]) == ["2020-03", "2020-06"]
    assert sorted(file.stem for file in (tmp_path / "g").iterdir()) == ["2020-03", "2020-06"]


def test_a_missing_part_of_the_earlier_graph_is_computed(tmp_path: Path) -> None:
    write_months(tmp_path / "d", market(sessions=SESSIONS))
    build_graph_file(tmp_path / "d", tmp_path / "old", CONFIG)
    (tmp_path / "old" / "2020-05.parquet").unlink()
    made = build_graph_file(tmp_path / "d", tmp_path / "new", CONFIG, previous=tmp_path / "old")
    assert made["months_computed"] == ["2020-05"]
    assert len(list((tmp_path / "new").iterdir())) == len(MONTHS)


def test_the_fingerprint_knows_dataset_and_configuration_alone(tmp_path: Path) -> None:
    data = market(sessions=120)
    write_months(tmp_path / "d", data, "f00d")
    one = build_graph_file(tmp_path / "d", tmp_path / "g", CONFIG)
    again = build_graph_file(tmp_path / "d", tmp_path / "g2", CONFIG, previous=tmp_path / "g")
    assert one["fingerprint"] == again["fingerprint"]
    write_months(tmp_path / "d", data, "beef")
    assert build_graph_file(tmp_path / "d", tmp_path / "g3", CONFIG)["fingerprint"] != one["fingerprint"]
    other = build_graph_file(tmp_path / "d", tmp_path / "g4", replace(CONFIG, neighbours=2))
    assert other["fingerprint"] != one["fingerprint"]


# --- bad input ----------------------------------------------------------------------------------------------


def spoil_manifest(path: Path, **entries: Any) -> None:
    file = manifest_path(path)
    content = json.loads(file.read_text()) | entries
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


DAYS = [str(day) for day in days(120)]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"session_dates": None}, "entry 'session_dates' is missing"),
        ({"session_dates": ["yesterday"]}, "session_dates of its manifest are no dates"),
        ({"session_dates": DAYS[::-1]}, "session_dates of its manifest are not ascending"),
        ({"session_dates": DAYS[:50]}, "parts and session_dates of its manifest differ in 2020-03"),
        ({"session_dates": DAYS[:70] + DAYS[71:]}, "its membership and its manifest differ in session 2020-03-16"),
    ],
)
def test_a_manifest_that_does_not_fit_the_dataset_is_one_sentence(
    tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    write_months(tmp_path / "d", market(sessions=120))
    spoil_manifest(tmp_path / "d", **entries)
    with pytest.raises(InputError, match=message):
        build_graph_file(tmp_path / "d", tmp_path / "g", CONFIG)
    assert not (tmp_path / "g").exists()


def test_a_missing_or_damaged_membership_part_is_named(tmp_path: Path) -> None:
    write_months(tmp_path / "d", market(sessions=120))
    part = tmp_path / "d.membership" / "2020-03.parquet"
    part.write_bytes(b"no parquet")
    with pytest.raises(InputError, match=r"2020-03\.parquet: not a readable parquet file"):
        build_graph_file(tmp_path / "d", tmp_path / "g", CONFIG)
    part.unlink()
    with pytest.raises(InputError, match=r"2020-03\.parquet: no such parquet file"):
        build_graph_file(tmp_path / "d", tmp_path / "g", CONFIG)
    pq.write_table(pq.read_table(tmp_path / "d.membership" / "2020-02.parquet").drop_columns(["return_1d"]), part)
    with pytest.raises(InputError, match=r"2020-03\.parquet: column return_1d is missing"):
        build_graph_file(tmp_path / "d", tmp_path / "g", CONFIG)


def test_a_previous_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    write_months(tmp_path / "d", market(sessions=120))
    with pytest.raises(InputError, match="nowhere: no manifest"):
        build_graph_file(tmp_path / "d", tmp_path / "g", CONFIG, previous=tmp_path / "nowhere")
    with pytest.raises(InputError, match="expected kind 'stock_graph', found 'ml_dataset'"):
        build_graph_file(tmp_path / "d", tmp_path / "g", CONFIG, previous=tmp_path / "d")


def test_too_few_sessions_and_an_empty_universe_by_month(tmp_path: Path) -> None:
    data = market(sessions=120)
    write_months(tmp_path / "d", first(30, data))
    with pytest.raises(InputError, match="30 sessions are fewer than the sessions needed"):
        build_graph_file(tmp_path / "d", tmp_path / "g", CONFIG)
    data["member"][:] = False
    write_months(tmp_path / "d", data)
    with pytest.raises(InputError, match=r"is_liquid.*universe is empty"):
        build_graph_file(tmp_path / "d", tmp_path / "g", CONFIG)
