"""A process that imports the engine once and trains in forks of itself, which it kills when told to.

Started with the paths of a dataset and its graph. Reads one JSON object per line from stdin, {"run": DIR, "epochs": E,
"phase": P, "entry": K, "delay_s": D}: trains in DIR, and kills the fork with SIGKILL D seconds after it entered phase
P for the K-th time. Answers with one line: the phase the kill met, or "ended" when training was over before.

Phases follow each other in one byte of shared memory. The forks start without threads of torch, pyarrow or polars,
which a fork would lose, because this process has none.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from training_runs import Data, settings, train_quietly

from atft_pipeline.runs import record
from atft_pipeline.storage import atomic as files
from atft_pipeline.training import checkpoints, train
from atft_pipeline.training.judging import judge_run
from atft_pipeline.training.judging.epoch_evaluation import EpochEvaluator
from atft_pipeline.training.trainer import Trainer

PHASES = ("starting", "training", "evaluating", "writing")
POLL_S = 0.0002


class Phases:
    """The current phase of a fork, and how often each was entered, in memory that it shares with its parent."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 1 + 2 * len(PHASES))

    def reset(self) -> None:
        self.memory[:] = bytes(len(self.memory))

    def enter(self, phase: int) -> int:
        """Returns the phase that was left."""
        before = self.memory[0]
        self.memory[0] = phase
        low = 1 + 2 * phase
        self.memory[low : low + 2] = (self.entries(phase) + 1).to_bytes(2, "big")
        return before

    def entries(self, phase: int) -> int:
        return int.from_bytes(self.memory[1 + 2 * phase : 3 + 2 * phase], "big")

    @property
    def current(self) -> str:
        return PHASES[self.memory[0]]


def noted(phases: Phases, owner: Any, name: str, phase: str) -> None:
    """Makes `owner.name` say that it runs."""
    function: Callable[..., Any] = getattr(owner, name)

    def saying(*arguments: Any, **options: Any) -> Any:
        before = phases.enter(PHASES.index(phase))
        try:
            return function(*arguments, **options)
        finally:
            phases.memory[0] = before

    setattr(owner, name, saying)


def watch(phases: Phases) -> None:
    noted(phases, Trainer, "_step", "training")
    for name in ("score_splits", "evaluate", "check_validity", "initial_hashes"):
        noted(phases, EpochEvaluator, name, "evaluating")
    # The places where bytes are written, and where the complete file takes its name.
    noted(phases, record.pq, "write_table", "writing")
    noted(phases, Path, "write_bytes", "writing")
    noted(phases, Path, "write_text", "writing")
    noted(phases, Path, "replace", "writing")
    noted(phases, files.shutil, "rmtree", "writing")
    assert checkpoints.replacing is record.replacing is files.replacing
    assert train.write_verdict is judge_run.write_verdict


def train_in_fork(data: Data, order: dict[str, Any]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        train_quietly(settings({"train.epochs": order["epochs"]}), data, Path(order["run"]))
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def kill_in_phase(phases: Phases, child: int, order: dict[str, Any]) -> str:
    """Waits for the moment, kills, and returns the phase it met; "ended" when the fork was faster."""
    phase, at = PHASES.index(order["phase"]), None
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "ended" if status == 0 else f"failed with {status}"
        if at is None and (phase == 0 or phases.entries(phase) >= order["entry"]):
            at = time.monotonic() + order["delay_s"]
        if at is not None and time.monotonic() >= at:
            os.kill(child, signal.SIGSTOP)  # so that the phase is the one that the kill meets
            met = phases.current
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            return met if os.WIFSIGNALED(status) else "ended"
        time.sleep(POLL_S)


def main() -> None:
    torch.set_num_threads(1)
    data = Data(*map(Path, sys.argv[1:3]))
    phases = Phases()
    watch(phases)
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        phases.reset()
        print(kill_in_phase(phases, train_in_fork(data, order), order), flush=True)


if __name__ == "__main__":
    main()
