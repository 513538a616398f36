"""Work for the processes of a test's training. It is imported by name, because they are not forked from the test."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from training_runs import Data, settings

from atft_pipeline.errors import InputError
from atft_pipeline.training import launcher as launch
from atft_pipeline.training.distributed.process_group import ProcessGroup, joined
from atft_pipeline.training.judging.scoring import weights_hash
from atft_pipeline.training.train import train
from atft_pipeline.training.trainer import Trainer

Log = Callable[[str], None]


def several(log: Log, data: Data, folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Trains `folder/NAME` for every case; returns the hashes of the final weights of all processes."""
    trainers: list[Trainer] = []
    init = Trainer.__init__

    def noted(self: Trainer, *arguments: Any) -> None:
        init(self, *arguments)
        trainers.append(self)

    Trainer.__init__ = noted  # type: ignore[method-assign]
    hashes = {}
    with joined() as processes:
        for name, overrides in cases.items():
            train(settings(overrides), *data, folder / name, device="cpu", log=log, processes=processes)
            ours = weights_hash(trainers[-1].model) + weights_hash(trainers[-1].average.model)
            hashes[name] = _gathered(processes, ours)
    return hashes


def _gathered(processes: ProcessGroup, value: str) -> list[str]:
    values: list[Any] = [None] * processes.size
    dist.all_gather_object(values, value)
    return values


def in_step(act: Callable[[], object], rank: int | None) -> None:
    """Calls `act` before the third step of epoch 2, in the process `rank` or in all; notes every process's id."""
    step = Trainer._step
    calls = 0

    def spoilt(self: Trainer, block: Any, epoch: int, **options: Any) -> Any:
        nonlocal calls
        pids = self.record.run_dir.parent / "pids"
        pids.mkdir(exist_ok=True)
        (pids / str(os.getpid())).touch()
        calls += epoch == 2
        if calls == 3 and rank in (None, self.processes.rank):
            calls = 99
            act()
        return step(self, block, epoch, **options)

    Trainer._step = spoilt  # type: ignore[method-assign]


def _raise(error: BaseException) -> None:
    raise error


def killed(log: Log, *arguments: Any) -> Any:
    in_step(lambda: os.kill(os.getpid(), signal.SIGKILL), rank=1)
    return launch._train(log, *arguments)


def killed_within_a_line(log: Log) -> None:
    """The first process is killed while it waits for room in the pipe; its listener is still at the line before."""
    if os.environ["RANK"] == "0":
        log("a line")
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
        log("x" * 1_000_000)


def faulty(log: Log, *arguments: Any) -> Any:
    in_step(lambda: _raise(ValueError("shapes differ")), rank=1)
    return launch._train(log, *arguments)


def refusing(log: Log, *arguments: Any) -> Any:
    in_step(lambda: _raise(InputError("no such column; build it again")), rank=1)
    return launch._train(log, *arguments)


def barred(log: Log, *arguments: Any) -> Any:
    in_step(lambda: _raise(PermissionError(13, "Permission denied", "months")), rank=1)
    return launch._train(log, *arguments)


def undisturbed(log: Log, *arguments: Any) -> Any:
    in_step(lambda: None, rank=None)
    return launch._train(log, *arguments)


def not_finite(log: Log, *arguments: Any) -> Any:
    """The weights of every process become NaN in the middle of an epoch."""
    step = Trainer._step

    def spoilt(self: Trainer, block: Any, epoch: int, **options: Any) -> Any:
        if self.step == 8:
            torch.nn.init.constant_(self.model.prediction_head.output.bias, torch.nan)
        return step(self, block, epoch, **options)

    Trainer._step = spoilt  # type: ignore[method-assign]
    return launch._train(log, *arguments)


def gone(pid: int) -> bool:
    """Whether a process has ended; its parent may not have noticed yet."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True
