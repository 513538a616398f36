"""Starts the processes that train one run together, by torchrun's launcher, and says in one sentence why one failed.

On one machine the processes meet at a free port. On several machines each launcher is given the same address of the
first machine, whose first process is the leader and writes the run directory. `torchrun ... -m atft_pipeline.cli train
...` does the same with torchrun's flags.
"""

from __future__ import annotations

import gc
import importlib
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from atft_pipeline.config.schema import PipelineConfig
from atft_pipeline.errors import InputError, RunFailure, unusable_path
from atft_pipeline.runs.header import read_run
from atft_pipeline.runs.lock import is_held
from atft_pipeline.runs.record import RunRecord
from atft_pipeline.training.distributed.interrupts import handled, kept
from atft_pipeline.training.distributed.process_group import PeerLost, joined
from atft_pipeline.training.failures import early_end_recorded
from atft_pipeline.training.plan import plan_run, resolve_run_dir
from atft_pipeline.training.train import TrainingResult, train

SHUTDOWN_S = 20
"""Time from the request to end until SIGKILL: the leader still writes its record."""

INTERRUPTED = 130
"""Exit code of a process that was interrupted."""

START_METHOD = "forkserver"
"""A fork server imports the libraries once for all processes. A fork of the launcher would lose its threads."""

Log = Callable[[str], None]


@dataclass(frozen=True)
class Layout:
    """How many processes train one run, and where the machines meet."""

    processes: int = 1
    """On each machine."""
    nodes: int = 1
    node_rank: int = 0
    rendezvous: str | None = None
    """HOST:PORT of the first machine; only for several machines."""

    def __post_init__(self) -> None:
        for name, value, least in (("processes", self.processes, 1), ("nodes", self.nodes, 1)):
            if value < least:
                raise InputError(f"{name}: expected a whole number of at least {least}, found {value}")
        if not 0 <= self.node_rank < self.nodes:
            raise InputError(f"node rank: expected 0 to {self.nodes - 1} of {self.nodes} nodes, found {self.node_rank}")
        if self.nodes == 1 and self.rendezvous is not None:
            raise InputError(f"rendezvous {self.rendezvous}: one node needs none; give the number of nodes too")
        if self.nodes > 1:
            host, _, port = (self.rendezvous or "").rpartition(":")
            if not host or not port.isdigit() or not 0 < int(port) < 2**16:
                raise InputError(
                    f"rendezvous: {self.nodes} nodes meet at HOST:PORT of the first one, found {self.rendezvous!r}"
                )

    @property
    def total(self) -> int:
        return self.processes * self.nodes


def processes_asked(environment: Mapping[str, str]) -> int:
    """`ATFT_PROCESSES` of the environment, else 1. Raises InputError where it is no number of processes."""
    text = environment.get("ATFT_PROCESSES", "1")
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"ATFT_PROCESSES: expected a whole number of at least 1, found {text!r}")
    return int(text)


def threads_each(environment: Mapping[str, str], processes: int) -> int:
    """Threads of torch in each process: a share of them; 0 where `OMP_NUM_THREADS` is set, which torch follows."""
    return 0 if environment.get("OMP_NUM_THREADS") else max(1, torch.get_num_threads() // processes)


def train_in_processes(
    layout: Layout,
    config: PipelineConfig,
    dataset: Path,
    graph: Path,
    run_dir: Path,
    *,
    threads: int = 0,
    force: bool = False,
    log: Log = print,
    **options: Any,
) -> TrainingResult:
    """`train` in the processes of `layout`, with `threads` torch threads each; `log` gets the lines of the leader.

    Raises what `train` raises, and RunFailure that names a process which ended in another way; the record says so too.
    An interrupt ends all processes first.
    """
    run_dir = resolve_run_dir(run_dir, plan_run(config, dataset, graph, layout.total).key, force=force)
    try:
        return launch(layout, _train, config, dataset, graph, run_dir, options, threads=threads, log=log)
    except (InputError, RunFailure, KeyboardInterrupt) as error:
        _record_end(run_dir, error)


def _train(log: Log, config: PipelineConfig, dataset: Path, graph: Path, run_dir: Path, options: Any) -> TrainingResult:
    with joined() as processes:
        return train(config, dataset, graph, run_dir, log=log, processes=processes, **options)


def _record_end(run_dir: Path, error: InputError | RunFailure | KeyboardInterrupt) -> NoReturn:
    """Records `error` in run.json and raises it.

    When another process ends, the leader is only asked to end itself, so its record cannot name the cause.
    """
    is_ours = (run_dir / "run.json").exists() and not is_held(run_dir)
    header = read_run(run_dir) if is_ours else {"status": "finished"}
    is_recorded = header["status"] == "failed" and str(error) in str(header["reason"])
    if header["status"] == "finished" or is_recorded:
        raise error
    with early_end_recorded(RunRecord(run_dir, header)):
        raise error
    raise AssertionError("unreachable")  # early_end_recorded suppresses nothing


# Processes -------------------------------------------------------------------------------------------------------


def launch(layout: Layout, work: Callable[..., Any], *arguments: Any, threads: int = 0, log: Log = print) -> Any:
    """What `work(log, *arguments)` returns in the first process of this machine. `work` must be importable by name.

    Raises InputError or RunFailure of the process that ended first, and KeyboardInterrupt when this one is asked to
    end. No process is left in either case.
    """
    # torchrun's launcher installs its own handlers and leaves them.
    with _elastic_quiet(), kept(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        results, problem = _launched(layout, (threads, work, arguments), log)
    gc.collect()  # frees the semaphores of its queues: a process that ends by `os._exit` would leave them
    if problem is not None:
        raise problem
    return results[min(results)]


def _launched(layout: Layout, task: tuple[Any, ...], log: Log) -> tuple[dict[int, Any], BaseException | None]:
    """Rank -> result, or the error. No file, pipe or process outlives the call."""
    processes = multiprocessing.get_context(START_METHOD)
    processes.set_forkserver_preload(["atft_pipeline.training.train"])
    with handled(signal.SIG_IGN, signal.SIGINT):
        # The fork server imports for seconds. Ctrl-C reaches it too and would only make it print a stack.
        importlib.import_module("multiprocessing.forkserver").ensure_running()
    reader, lines = processes.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="atft-") as folder, _forwarded(reader, lines, log):
        try:
            return elastic_launch(_launch_config(layout, folder), _started)(lines, *task), None
        except ChildFailedError as error:
            return {}, _explained(layout, *error.get_first_failure())
        except SignalException:
            return {}, KeyboardInterrupt("interrupted")


def _launch_config(layout: Layout, folder: str) -> LaunchConfig:
    is_one_machine = layout.nodes == 1
    return LaunchConfig(
        min_nodes=layout.nodes,
        max_nodes=layout.nodes,
        nproc_per_node=layout.processes,
        run_id="none",  # torchrun's own default, so that it may start some of the nodes
        rdzv_backend="c10d" if is_one_machine else "static",
        rdzv_endpoint="localhost:0" if is_one_machine else str(layout.rendezvous),
        rdzv_configs={} if is_one_machine else {"rank": layout.node_rank},
        local_addr="localhost" if is_one_machine else None,
        start_method=START_METHOD,
        max_restarts=0,  # a run goes on from its last epoch when it is started again, by whoever decides that
        logs_specs=DefaultLogsSpecs(log_dir=folder),
        shutdown_timeout=SHUTDOWN_S,
    )


def _started(lines: Connection, threads: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """The life of a process: it does `work`, and its exit says how that ended."""
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupted_once)
    if threads:
        torch.set_num_threads(threads)
    try:
        return work(lines.send, *arguments)
    except (InputError, RunFailure):
        raise
    except OSError as error:
        raise unusable_path(error) from error
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _interrupted_once(number: int, _: Any) -> None:
    """Interrupts once. Ctrl-C reaches the whole group and the launcher sends its own signal after it, which must not
    interrupt the writing of the record."""
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    raise KeyboardInterrupt(signal.Signals(number).name)


def _end_with_launcher() -> None:
    """Ends this process when its launcher is gone, as after a kill."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SHUTDOWN_S)
    os._exit(INTERRUPTED)


def _explained(layout: Layout, rank: int, failure: ProcessFailure) -> InputError | RunFailure:
    """The error of the process that ended first, as one sentence."""
    process = f"process {rank} of {layout.total}"
    if failure.exitcode < 0:
        number = -failure.exitcode
        name = f" ({signal.Signals(number).name})" if number in set(signal.Signals) else ""  # real-time ones have none
        return RunFailure(f"{process} was ended by signal {number}{name}")
    if failure.exitcode == INTERRUPTED:
        return RunFailure(f"{process} was interrupted")
    said = failure.error_file_data.get("message")
    if not isinstance(said, dict):
        return RunFailure(f"{process} ended with code {failure.exitcode} and said nothing")
    kind, _, sentence = str(said["message"]).partition(": ")
    if kind == InputError.__name__:
        return InputError(sentence)
    expected = kind in (RunFailure.__name__, PeerLost.__name__)
    if expected and rank == 0:
        return RunFailure(sentence)
    if expected:
        return RunFailure(f"{process}: {sentence}")
    print(said["extraInfo"]["py_callstack"], file=sys.stderr, flush=True)  # a fault of the code: its stack says where
    return RunFailure(f"{process}: {said['message']}")


@contextmanager
def _forwarded(reader: Connection, lines: Connection, log: Log) -> Iterator[None]:
    """Passes what the processes send through `lines` to `log`, in a thread, until none of them holds the pipe.

    It is a pipe and no queue: a queue has a lock, which a process that is killed while it writes keeps for ever. Of a
    pipe only the killed process's half line is lost. Whole lines are written at once, whoever else writes (POSIX: up to
    PIPE_BUF, 4,096 bytes).
    """

    def forward() -> None:
        for line in _received(reader):
            log(line)

    thread = threading.Thread(target=forward, daemon=True)
    thread.start()
    try:
        yield
    finally:
        lines.close()
        thread.join(timeout=5)  # a child of a process may outlive it and keep the pipe open


def _received(reader: Connection) -> Iterator[str]:
    """Whole lines, until the last writer is gone."""
    while True:
        try:
            line = reader.recv()
        except (EOFError, OSError):
            return
        yield line


@contextmanager
def _elastic_quiet() -> Iterator[None]:
    """Silences torchrun's launcher, which logs every failure with a stack: here it becomes one sentence."""
    names = ("torch.distributed.elastic", "torch.multiprocessing")
    # Some loggers have a level of their own, which the level of their parents does not change.
    loggers = [logging.getLogger(name) for name in (*names, *logging.root.manager.loggerDict) if name.startswith(names)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
