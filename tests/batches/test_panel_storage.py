"""Where a panel is stored: the choice, the memory map with its leftovers, and the same bits from either place."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from atft_process import content
from numpy.typing import NDArray
from training_runs import Data, header, record, settings, train_quietly, trainer_of

from atft_pipeline.batches import block_dataset, panel_storage
from atft_pipeline.batches.block import Block, NeighbourTable
from atft_pipeline.batches.block_dataset import BlockDataset
from atft_pipeline.batches.panel import Panel, load_panel
from atft_pipeline.batches.panel_storage import PanelStorage, free_host_bytes, in_map, left_to_the_cache
from atft_pipeline.errors import RunFailure
from atft_pipeline.graph.store import load_graph
from atft_pipeline.training import trainer as training

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
GB = 10**9
MAPPED = {"train.panel": "map"}

# Decision -------------------------------------------------------------------------------------------------------

# asked, device, free host and device in GB; where blocks of a panel of 3.4 GB come from, whether the host maps it
CASES: dict[str, tuple[Any, torch.device, float, float, str, bool]] = {
    "fits the host": ("auto", CPU, 23, 0, "memory", False),
    "too large for the host": ("auto", CPU, 8, 0, "map", True),
    "map although it fits": ("map", CPU, 23, 0, "map", True),
    "memory although it does not fit": ("memory", CPU, 8, 0, "memory", False),
    "fits the device": ("auto", CUDA, 128, 80, "device", False),
    "fits the device alone": ("auto", CUDA, 8, 80, "device", True),
    "too large for the device": ("auto", CUDA, 128, 6, "map", True),
    "map although it fits the device": ("map", CUDA, 128, 80, "map", True),
    "memory, and the device's": ("memory", CUDA, 8, 80, "device", False),
    "memory, not the device's": ("memory", CUDA, 128, 6, "memory", False),
}


@pytest.mark.parametrize(("asked", "device", "host", "accelerator", "place", "mapped"), CASES.values(), ids=CASES)
def test_the_panel_stays_where_it_fits_and_streams_from_a_map_where_it_does_not(
    asked: Any, device: torch.device, host: float, accelerator: float, place: str, mapped: bool
) -> None:
    storage = PanelStorage(asked, device, Path("run"), int(host * GB), int(accelerator * GB))
    panel_bytes = int(3.4 * GB)
    assert (storage.place(panel_bytes), storage.is_mapped(panel_bytes)) == (place, mapped)
    assert storage.block_device(panel_bytes) == (device if place == "device" else CPU)


@pytest.mark.parametrize(("asked", "given"), [("map", (1, 1, 3)), ("memory", (0, 1, 3))])
def test_blocks_of_a_map_are_always_made_ahead(asked: Any, given: tuple[int, ...]) -> None:
    storage = PanelStorage(asked, CPU, Path("run"), GB, 0)
    assert tuple(storage.workers(GB, workers) for workers in (0, 1, 3)) == given


def test_the_decision_is_taken_by_what_is_free_now(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trainer_of(data, tmp_path).panel_place == "memory"
    shapes = []
    panel_bytes = load_panel(data.dataset, "all", lambda s: shapes.append(s) or panel_storage.in_memory(s)).nbytes
    assert [4 * np.prod(shape) for shape in shapes] == [panel_bytes], "both decisions are by the same number"
    monkeypatch.setattr(panel_storage, "free_host_bytes", lambda: 2 * panel_bytes)
    trainer = trainer_of(data, tmp_path)
    assert (trainer.panel_place, trainer.workers) == ("map", 1)


def test_several_processes_share_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panel_storage, "free_host_bytes", lambda: 12 * GB)
    assert [PanelStorage.now("auto", CPU, Path("run"), n).place(3 * GB) for n in (1, 4)] == ["memory", "map"]


def test_room_is_made_where_the_system_has_no_call_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.posix_fallocate")
    values = in_map((3, 700, 200), tmp_path)
    values.fill(2.0)
    assert values.sum() == 2 * values.size


# Free memory ----------------------------------------------------------------------------------------------------

V2 = ("memory.max", "memory.current", "")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def machine(root: Path, memberships: str = "", **groups: tuple[object, int, int, tuple[str, str, str]]) -> int:
    """Free bytes on a machine of 1,000 kB whose control groups (limit, used, thereof cache) lie at these paths."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal:  2000 kB\nMemAvailable:  1000 kB\nHugePages_Total:  0\n")
    (root / "proc/self/cgroup").write_text(memberships)
    for path, (limit, used, cache, (limit_file, usage_file, prefix)) in groups.items():
        folder = root / "sys/fs/cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit_file).write_text(f"{limit}\n")
        (folder / usage_file).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 7\n{prefix}inactive_file {cache - 1}\n{prefix}active_file 1\n")
    return free_host_bytes(root)


# memberships of the process, control groups; free bytes
LIMITS: dict[str, tuple[str, dict[str, Any], int]] = {
    "no control group": ("", {}, 1_024_000),
    "its own, cache given back": ("0::/a/b\n", {"a/b": (9000, 5000, 300, V2)}, 4300),
    "one around it is nearer": ("0::/a/b\n", {"a/b": (9000, 0, 9, V2), "a": (8000, 7000, 9, V2)}, 1009),
    "without a limit": ("0::/a/b\n", {"a/b": ("max", 5000, 300, V2)}, 1_024_000),
    "another's": ("0::/a\n", {"b": (9000, 5000, 300, V2)}, 1_024_000),
    "the path is the host's": ("0::/docker/x\n", {".": (9000, 5000, 300, V2)}, 4300),
    "version 1": ("3:cpu:/c\n4:memory:/a\n0::/\n", {"memory/a": (9000, 5000, 300, V1)}, 4300),
    "version 1, no limit": ("4:memory:/a\n", {"memory/a": (2**63 - 4096, 5000, 300, V1)}, 1_024_000),
}


@pytest.mark.parametrize(("memberships", "groups", "free"), LIMITS.values(), ids=LIMITS)
def test_free_memory_is_the_machines_or_what_a_container_leaves(
    tmp_path: Path, memberships: str, groups: dict[str, Any], free: int
) -> None:
    assert machine(tmp_path, memberships, **groups) == free


def test_free_memory_of_this_machine_is_positive_and_no_more_than_it_has() -> None:
    assert 0 < free_host_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# Memory map -----------------------------------------------------------------------------------------------------

needs_proc = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads /proc/self/smaps")


def resident_kb(folder: Path) -> list[int]:
    """Of every mapping of a file in `folder` without a name: the kB that lie in memory."""
    found: list[int] = []
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *words = line.split()
        if not key.endswith(":"):
            inside = str(folder) in line and line.endswith("(deleted)")
        elif inside and key == "Rss:":
            found.append(int(words[0]))
    return found


@needs_proc
def test_a_map_is_of_a_file_without_a_name_whose_room_is_reserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserved = []
    make = tempfile.TemporaryFile

    def kept(**options: Any) -> Any:
        file = make(**options)
        reserved.append(os.dup(file.fileno()))
        return file

    monkeypatch.setattr(panel_storage.tempfile, "TemporaryFile", kept)
    array = in_map((5, 7, 1000), tmp_path)
    assert (array.shape, array.dtype, array.flags.writeable) == ((5, 7, 1000), np.float32, True)
    assert len(resident_kb(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == []
    # A page without room would end in a signal when it is written, not in an error.
    assert os.fstat(reserved[0]).st_blocks * 512 >= array.nbytes
    os.close(reserved[0])
    del array
    assert resident_kb(tmp_path) == []


@needs_proc
def test_a_block_reads_the_pages_of_its_own_sessions_and_keeps_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 kB a session; the kernel maps up to 64 kB around a page that it reads, at either end."""
    shape = (64, 128, 128)
    values = in_map(shape, tmp_path)
    values.fill(1.0)
    days, flags = np.datetime64("2020-01-01") + np.arange(64), np.ones(shape[:2], dtype=bool)
    codes = np.array([f"{i:04d}" for i in range(128)])
    panel = Panel(
        days, codes, [f"f{j}" for j in range(124)], values[..., :-4], values[..., -4:], flags, flags, flags, {}
    )
    data = BlockDataset(panel, None, receptive_field=4)
    assert resident_kb(tmp_path) == [64 * 64]
    left_to_the_cache(panel.features)
    assert resident_kb(tmp_path) == [0]
    read = []
    monkeypatch.setattr(block_dataset, "left_to_the_cache", lambda _: read.extend(resident_kb(tmp_path)))
    block = data.block(np.arange(30, 32))
    assert block.x.shape == (128, 5, 124)
    assert 5 * 64 <= read[0] <= (5 + 2) * 64
    monkeypatch.undo()
    assert torch.equal(data.block(np.arange(30, 32)).x, block.x)
    assert resident_kb(tmp_path) == [0]


@pytest.mark.parametrize("allocate", ["in_memory", "in_map"])
def test_blocks_are_cut_from_the_panel_itself(data: Data, tmp_path: Path, allocate: str) -> None:
    panel = load_panel(data.dataset, "all", allocation(allocate, tmp_path))
    cut = BlockDataset(panel, None, 9)
    assert np.shares_memory(cut._features.numpy(), panel.features)
    assert np.shares_memory(cut._targets.numpy(), panel.targets)


def allocation(name: str, folder: Path) -> Callable[[tuple[int, ...]], NDArray[np.float32]]:
    return (lambda shape: in_map(shape, folder)) if name == "in_map" else panel_storage.in_memory


# The same bits --------------------------------------------------------------------------------------------------


def bits(of: Block | NeighbourTable) -> dict[str, Any]:
    values = {field.name: getattr(of, field.name) for field in dataclasses.fields(of)}
    return {name: bits(v) if isinstance(v, NeighbourTable) else v.numpy().tobytes() for name, v in values.items()}


def test_blocks_of_a_map_are_those_of_memory(data: Data, tmp_path: Path) -> None:
    graph = load_graph(data.graph)
    memory, mapped = (
        BlockDataset(load_panel(data.dataset, "all", allocation(name, tmp_path)), graph, 9)
        for name in ("in_memory", "in_map")
    )
    sessions = [np.arange(first, first + 7) for first in range(0, len(memory.panel.sessions) - 7, 40)]
    for indices in sessions:
        one, other = memory.block(indices), mapped.block(indices)
        assert bits(one) == bits(other)
    assert any(memory.block(indices).neighbours.is_edge.any() for indices in sessions)


@needs_proc
def test_a_run_from_a_map_leaves_the_record_of_one_from_memory(
    data: Data, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_memory = trained()
    makers, names, maps = set(), [], []
    make = training.BlockDataset.block

    def noted(self: BlockDataset, sessions: NDArray[np.int64]) -> Block:
        makers.add(threading.current_thread())
        if not maps:
            maps.append(len(resident_kb(run_dir)))
        names.extend(path.name for path in run_dir.iterdir())
        return make(self, sessions)

    run_dir = tmp_path / "run"
    monkeypatch.setattr(training.BlockDataset, "block", noted)
    train_quietly(settings(MAPPED), data, run_dir)
    assert [header(of)["panel_place"] for of in (run_dir, from_memory)] == ["map", "memory"]
    assert maps == [1]
    assert threading.main_thread() not in makers
    assert makers, "no block was made: the test tests nothing"
    # The verdict names the run key, which every field of the configuration enters.
    assert {k: v for k, v in record(run_dir).items() if k != "verdict"} == {
        k: v for k, v in record(from_memory).items() if k != "verdict"
    }
    expected = {path.name for path in from_memory.iterdir()}
    assert set(names) | {path.name for path in run_dir.iterdir()} <= expected


# A full disk ----------------------------------------------------------------------------------------------------


def test_a_disk_without_room_for_the_map_stops_in_one_sentence_and_leaves_nothing(data: Data, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    short = MAPPED | {"train.epochs": 1}

    def no_room(*_: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panel_storage.os, "posix_fallocate", no_room)
        with pytest.raises(RunFailure) as failure:
            train_quietly(settings(short), data, run_dir)
    sentence = "No space left on device; no epoch was complete, make room and start it again to go on"
    assert str(failure.value) == f"run {run_dir}: {sentence}"
    assert set(content(run_dir)) <= {"run.json", ".lock"}
    assert (header(run_dir)["status"], header(run_dir)["reason"]) == ("failed", sentence)
    train_quietly(settings(short), data, run_dir)
    undisturbed = train_quietly(settings(short), data, tmp_path / "undisturbed").run_dir
    assert record(run_dir) == record(undisturbed)
