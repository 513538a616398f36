"""Training in several processes: the curve of one, the error of a process that dies, and no process left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import process_work
import pytest
import torch
from atft_process import ATFT, atft_here, environment
from conftest import Trained
from process_work import gone
from training_runs import COLLAPSED, TINY, Data, header, record, series, settings, train_quietly, trainer_of

from atft_pipeline.config.overrides import with_overrides
from atft_pipeline.config.presets import preset
from atft_pipeline.errors import InputError, RunFailure, RunInterrupted
from atft_pipeline.runs.lock import is_held
from atft_pipeline.runs.tables import read_table
from atft_pipeline.training import launcher as launch
from atft_pipeline.training.distributed.process_group import ProcessGroup
from atft_pipeline.training.launcher import Layout, processes_asked, threads_each, train_in_processes
from atft_pipeline.training.plan import plan_run, resolve_device

TWO = Layout(2)

# Places ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sessions", [0, 1, 2, 3, 7, 20])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_the_shares_are_the_parts_of_an_even_split(sessions: int, size: int) -> None:
    places = np.arange(sessions)
    expected = [part.tolist() for part in np.array_split(places, size)]
    assert [places[ProcessGroup(rank, size).share(sessions)].tolist() for rank in range(size)] == expected


def test_a_part_of_a_block_scores_its_sessions_as_the_block_does(data: Data, tmp_path: Path) -> None:
    trainer = trainer_of(data, tmp_path)
    block = trainer.data.block(np.arange(100, 120))
    model = trainer.model.eval()
    with torch.no_grad():
        whole = model(block)
        parts = [model(block.part(start, stop)) for start, stop in ((0, 1), (1, 13), (13, 20))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-6)  # order of float32 sums
    edges = [int(block.part(start, start + 1).neighbours.is_edge.sum()) for start in range(20)]
    assert sum(edges) == int(block.neighbours.is_edge.sum()) > 0


@pytest.mark.parametrize("text", ["0", "x", "-1", "", "1.5"])
def test_a_number_of_processes_that_is_none_is_refused(text: str, capsys: pytest.CaptureFixture[str],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    with pytest.raises(InputError, match=f"ATFT_PROCESSES: expected a whole number of at least 1, found '{text}'"):
        processes_asked({"ATFT_PROCESSES": text})
    monkeypatch.setenv("ATFT_PROCESSES", text)
    assert atft_here("train", "d", "g", "r") == 2
    assert capsys.readouterr().err.startswith("atft train: ATFT_PROCESSES: expected")


def test_without_a_word_one_process_trains() -> None:
    assert processes_asked({}) == 1
    assert processes_asked({"ATFT_PROCESSES": "3"}) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"processes": 0}, "processes: expected a whole number of at least 1, found 0"),
        ({"nodes": 2}, "2 nodes meet at HOST:PORT of the first one, found None"),
        ({"nodes": 2, "rendezvous": "host"}, "found 'host'"),
        ({"nodes": 2, "rendezvous": "host:99999"}, "found 'host:99999'"),
        ({"nodes": 2, "rendezvous": "host:1", "node_rank": 2}, "expected 0 to 1 of 2 nodes, found 2"),
        ({"rendezvous": "host:1"}, "one node needs none"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Layout(**fields)


def test_threads_are_divided_where_the_environment_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert [threads_each({}, processes) for processes in (2, 3, 16)] == [4, 2, 1]
    assert threads_each({"OMP_NUM_THREADS": "8"}, 2) == 0


def test_each_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    second, third = ProcessGroup(5, 8, local_rank=1), ProcessGroup(6, 8, local_rank=2)
    assert [str(resolve_device(name, second)) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(InputError, match="cuda:2 was asked for and this machine has 2 CUDA devices"):
        resolve_device("auto", third)
    with pytest.raises(InputError, match="cuda:0 is one device for 8 processes"):
        resolve_device("cuda:0", second)


def test_several_processes_are_another_run_and_one_is_not(data: Data) -> None:
    keys = [plan_run(settings(), data.dataset, data.graph, processes).key for processes in (1, 2, 3)]
    assert len(set(keys)) == 3
    assert keys[0] == plan_run(settings(), data.dataset, data.graph).key


# The same curve -------------------------------------------------------------------------------------------------

CURVE_TOLERANCE = 1e-5
"""Relative, of every step's loss; float32 sums in another order give 2e-7. Dropout is off: its draws differ."""

ALL_TERMS = {f"train.loss.{term}": 0.3 for term in ("sharpe", "ic", "rank_ic", "variance_penalty")}
CASES: dict[str, dict[str, Any]] = {
    "all terms": ALL_TERMS,
    "one session a block": {"train.batch_size": 40, "train.epochs": 1, **ALL_TERMS},
    "redrawn heads, falling rate": {
        **COLLAPSED,
        "train.optimizer.lr": 1e-3,
        "train.guard.dispersion_ratio": 100.0,
        "train.guard.warmup_epochs": 0,
        "train.guard.patience": 1,
        "train.schedule.name": "plateau",
        "train.schedule.patience": 0,
    },
}
CASES = {name: {"model.dropout": 0.0, **overrides} for name, overrides in CASES.items()}


@pytest.fixture(scope="module")
def both(data: Data, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """Runs of all cases in two processes, and the hashes of the final weights in each of them."""
    folder = tmp_path_factory.mktemp("both")
    return folder, launch.launch(TWO, process_work.several, data, folder, CASES, threads=1)


def step_losses(run_dir: Path) -> list[float]:
    rows = read_table(run_dir, "series").to_pylist()
    return [row["value"] for row in rows if row["metric"] == "loss"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.process(reason="trainings in several processes")
def test_two_processes_have_the_loss_curve_of_one(case: str, both: Any, trained: Trained) -> None:
    one, two = trained(CASES[case]), both[0] / case
    assert len(step_losses(one)) == len(step_losses(two)) > 15
    np.testing.assert_allclose(step_losses(two), step_losses(one), rtol=CURVE_TOLERANCE)
    for split in ("train", "validation"):
        curves = [series(run, "loss_weighted", split=split, component="loss", term="total") for run in (one, two)]
        assert curves[1] == pytest.approx(curves[0], rel=CURVE_TOLERANCE)
    norms = [series(run, "grad_norm", component="total", term="before_clip") for run in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    # Adam divides by a gradient's own size: where that is rounding, so is the step, up to the rate (1e-3) each.
    weights = [torch.load(run / "checkpoints" / "resume.pt")["model"] for run in (one, two)]
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=0, atol=2e-3, msg=name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.process(reason="trainings in several processes")
def test_all_processes_end_with_the_same_weights(case: str, both: Any) -> None:
    """Bit for bit, but for the head that the leading one re-draws after the last epoch."""
    first, second = both[1][case]
    assert (first == second) is (case != "redrawn heads, falling rate")


def test_the_case_of_decisions_has_decisions(trained: Trained) -> None:
    run = trained(CASES["redrawn heads, falling rate"])
    assert sum(series(run, "degeneracy_reset").values()) >= 3
    assert len(set(series(run, "lr").values())) > 1


@pytest.mark.process(reason="trainings in several processes")
def test_the_record_says_how_many_trained(both: Any, trained: Trained) -> None:
    assert header(both[0] / "all terms")["processes"] == 2
    assert header(trained())["processes"] == 1


# Ends -----------------------------------------------------------------------------------------------------------


def assert_none_left(run_dir: Path, within_s: float = 0.0) -> None:
    pids = [int(path.name) for path in (run_dir.parent / "pids").iterdir()]
    assert len(pids) >= 2
    deadline = time.monotonic() + within_s
    while not all(map(gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(gone, pids))
    assert not is_held(run_dir)


def train_two(data: Data, run_dir: Path, log: Callable[[str], None] = lambda _: None, **overrides: Any) -> Any:
    return train_in_processes(TWO, settings(overrides), *data, run_dir, threads=1, device="cpu", log=log)


@pytest.fixture(scope="module")
def undisturbed(data: Data, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return record(train_two(data, tmp_path_factory.mktemp("undisturbed") / "run").run_dir)


@pytest.mark.parametrize(
    ("work", "kind", "sentence"),
    [
        (process_work.killed, RunFailure, "process 1 of 2 was ended by signal 9 (SIGKILL)"),
        (process_work.faulty, RunFailure, "process 1 of 2: ValueError: shapes differ"),
        (process_work.refusing, InputError, "no such column; build it again"),
        (process_work.barred, InputError, "months: Permission denied; check the path, its permissions and space"),
    ],
)
@pytest.mark.process(reason="trainings in several processes")
def test_a_dying_process_fails_the_run_with_its_own_error(
    work: Any,
    kind: type[Exception],
    sentence: str,
    data: Data,
    tmp_path: Path,
    undisturbed: Any,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_train", work)
        with pytest.raises(kind) as failure:
            train_two(data, run_dir)
    assert str(failure.value) == sentence
    # Only a fault of the code is shown where it is.
    assert ("in _raise\n" in capfd.readouterr().err) is (work is process_work.faulty)
    assert_none_left(run_dir)
    stopped = header(run_dir)
    assert (stopped["status"], stopped["reason"], stopped["epochs_done"]) == (
        "failed",
        f"{kind.__name__}: {sentence}",
        1,
    )

    said: list[str] = []
    train_two(data, run_dir, said.append)
    assert said[0] == "run run: goes on after epoch 1"
    assert record(run_dir) == undisturbed


WITHIN_A_LINE = """
import time
import process_work
from atft_pipeline.training.launcher import Layout, RunFailure, launch
said = []
def log(line):
    said.append(line)
    time.sleep(2)
try:
    launch(Layout(2), process_work.killed_within_a_line, threads=1, log=log)
except RunFailure as failure:
    print(failure, said)
"""


@pytest.mark.process(reason="trainings in several processes")
def test_a_process_killed_while_it_writes_a_line_is_not_waited_for() -> None:
    """It once kept a queue's lock, for which the launcher waited for ever."""
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", WITHIN_A_LINE], cwd=tests, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "process 0 of 2 was ended by signal 9 (SIGKILL) ['a line']\n", done.stderr


@pytest.mark.process(reason="trainings in several processes")
def test_a_loss_that_is_not_finite_is_told_by_the_leading_process(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_train", process_work.not_finite)
    with pytest.raises(
        RunFailure,
        match=r"^epoch 2, step 8: the loss is nan; stopped before the update: .*bias of prediction_head.output",
    ):
        train_two(data, tmp_path / "run")
    assert header(tmp_path / "run")["reason"].startswith("RunFailure: epoch 2, step 8: the loss is nan")
    rows = read_table(tmp_path / "run", "series").to_pylist()
    assert [row["step"] for row in rows if row["metric"] == "non_finite"] == [8]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.process(reason="trainings in several processes")
def test_an_interrupt_ends_every_process_and_the_run_goes_on_later(
    number: signal.Signals, data: Data, tmp_path: Path, undisturbed: Any
) -> None:
    run_dir = tmp_path / "run"
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_train", process_work.undisturbed)
        with pytest.raises(RunInterrupted, match="interrupted; epoch 1 of 3 is kept, start it again to go on"):
            train_two(data, run_dir, lambda line: "epoch 1/3" in line and os.kill(os.getpid(), number))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert_none_left(run_dir)
    assert (header(run_dir)["status"], header(run_dir)["ended"] is None) == ("interrupted", False)
    train_two(data, run_dir)
    assert record(run_dir) == undisturbed


@pytest.mark.process(reason="trainings in several processes")
def test_a_finished_run_is_reused_by_all(data: Data, tmp_path: Path) -> None:
    first = train_two(data, tmp_path / "run", **{"train.epochs": 1})
    again = train_two(data, tmp_path / "run", **{"train.epochs": 1})
    assert (first.reused, again.reused) == (False, True)
    assert again.verdict == first.verdict
    with pytest.raises(InputError, match="holds run"):
        train_quietly(settings({"train.epochs": 1}), data, tmp_path / "run")


# The command ----------------------------------------------------------------------------------------------------


def arguments(data: Data, run_dir: Path, **overrides: Any) -> list[str]:
    fields = {**TINY, **overrides}
    assigned = [part for name, value in fields.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    where = [str(data.dataset), str(data.graph), str(run_dir)]
    return ["train", *where, "--preset", "quick", "--device", "cpu", *assigned]


def descendants(pid: int) -> set[int]:
    """Ids of the living processes that descend from `pid`."""
    children: dict[int, set[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            children.setdefault(int(status.read_text().rpartition(")")[2].split()[1]), set()).add(
                int(status.parent.name)
            )
        except OSError:
            continue
    found, ahead = set(), [pid]
    while ahead:
        new = children.get(ahead.pop(), set())
        found |= new
        ahead += new
    return found


@pytest.mark.parametrize("sent", ["interrupt to the group", "kill to the launcher"])
@pytest.mark.process(reason="trainings in several processes")
def test_the_command_leaves_no_process(sent: str, data: Data, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with subprocess.Popen(
        [str(ATFT), *arguments(data, run_dir, **{"train.epochs": 400})],
        env=environment({"ATFT_PROCESSES": "2"}), stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        assert process.stderr.readline().startswith("epoch 1/400")
        started = descendants(process.pid)
        assert len(started) >= 3, "two processes and what they are forked from"
        if sent == "interrupt to the group":
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.kill(process.pid, signal.SIGKILL)
        code = process.wait(timeout=60)
        deadline = time.monotonic() + 30
        while (left := [pid for pid in started if not gone(pid)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left
        said = process.stderr.read()
    stopped = header(run_dir)
    assert stopped["status"] == "interrupted"
    if sent == "interrupt to the group":
        assert code == 130
        told = [line for line in said.splitlines() if not line.startswith("epoch ")]
        assert told == [f"atft train: run {run_dir}: {stopped['reason']}"]


@pytest.mark.process(reason="trainings in several processes")
def test_several_nodes_meet_also_where_torchrun_starts_one(data: Data, tmp_path: Path) -> None:
    """The first node's launcher is `train_in_processes`, the second's torchrun itself: the bits of two processes."""
    short = {"train.epochs": 2, "evaluation.criterion_sharpe": -9.0}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    second = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", "1", "--nproc-per-node", "1",
        "--master-addr", "localhost", "--master-port", str(port), "-m", "atft_pipeline.cli",
        *arguments(data, tmp_path / "second" / "run", **short),
    ]  # fmt: skip
    layout = Layout(1, nodes=2, node_rank=0, rendezvous=f"localhost:{port}")
    config = with_overrides(preset("quick"), TINY | short)
    with subprocess.Popen(second, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as node:
        outcome = train_in_processes(
            layout, config, *data, tmp_path / "run", threads=1, device="cpu", log=lambda _: None
        )
        out, err = node.communicate(timeout=60)
    assert (node.returncode, out) == (0, ""), err
    assert not (tmp_path / "second").exists(), "only the leading process writes"
    together = train_in_processes(
        TWO, config, *data, tmp_path / "one node", threads=1, device="cpu", log=lambda _: None
    )
    assert record(outcome.run_dir) == record(together.run_dir)
