"""How a run ends early: what its record says, and one sentence on the cause and the way on.

Everything here runs after something went wrong, so a healthy step pays nothing for it.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from atft_pipeline.batches.block import Block
from atft_pipeline.batches.block_dataset import BlockDataset
from atft_pipeline.errors import RunFailure, RunInterrupted
from atft_pipeline.runs.header import now
from atft_pipeline.runs.record import RunRecord
from atft_pipeline.training.distributed.interrupts import handled

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Errors of a full disk, a used quota, and a file over the process's limit."""


@contextmanager
def early_end_recorded(record: RunRecord) -> Iterator[None]:
    """Records an early end of the block: `failed`, or `interrupted` by whoever runs it.

    A BaseException that is no Exception counts as an interrupt, also that of a scheduler. What was written stays, and
    the same run goes on after its last complete epoch. Where there is no `run.json`, none is written.

    Raises: RunFailure where there is no room to write, RunInterrupted for Ctrl-C, any other error unchanged.
    """
    try:
        yield
    except BaseException as error:
        sentence, status = _sentence(record, error), "failed" if isinstance(error, Exception) else "interrupted"
        # A second Ctrl-C would leave a record that says the run goes on.
        with handled(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM):
            if (record.run_dir / "run.json").exists():
                with suppress(OSError):  # no room even for this: the run then reads as killed
                    record.update(status=status, reason=sentence or _reason(error), ended=now())
        if isinstance(error, KeyboardInterrupt):
            raise RunInterrupted(f"run {record.run_dir}: {sentence}") from error
        if sentence and isinstance(error, Exception):
            raise RunFailure(f"run {record.run_dir}: {sentence}") from error
        raise


def _sentence(record: RunRecord, error: BaseException) -> str:
    """What an interrupt or a full disk has left, and the way on; empty for any other error."""
    done, planned = record.header.get("epochs_done", 0), record.header["epochs_planned"]
    kept = f"epoch {done} of {planned} is kept" if done else "no epoch was complete"
    if not isinstance(error, Exception):
        return f"interrupted; {kept}, start it again to go on"
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return f"{os.strerror(error.errno)}; {kept}, make room and start it again to go on"
    return ""


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


# Numbers that are not finite -------------------------------------------------------------------------------------


class NonFiniteOrigin(NamedTuple):
    """The tensor that is the first without finite numbers."""

    tensor: str
    """Its name for the record: a loss term, an activation, or a parameter of the model."""
    sentence: str


def non_finite_loss(terms: Mapping[str, Tensor], model: nn.Module, block: Block) -> NonFiniteOrigin:
    """The loss `terms` that are not finite, and the first such activation of a second forward pass."""
    broken = [name for name, value in terms.items() if not bool(torch.isfinite(value))]
    which = f"loss term {', '.join(broken)}" if broken else "no loss term alone, but their sum"
    origin = first_non_finite(model, block)
    if origin is None:
        return NonFiniteOrigin(", ".join(broken), f"{which}; all activations of a second forward pass are finite")
    component, tensor = origin
    return NonFiniteOrigin(tensor, f"{which}; first in the forward pass is the {tensor}, in component {component}")


def non_finite_gradient(model: nn.Module) -> NonFiniteOrigin:
    """The parameter whose gradient is the first on the way back from the loss that is not finite.

    Parameters are registered in the order of the forward pass, so the first on the way back is the last one registered.
    """
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    broken = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
    if broken:
        name, what = broken[-1], f"{len(broken)} of {len(gradients)} gradients; first on the way back is that of"
    else:
        name = max(gradients, key=lambda name: float(gradients[name].abs().max()))
        what = "the norm alone; the largest gradient is that of"
    return NonFiniteOrigin(name, f"{what} {name}, in component {name.split('.')[0]}")


@torch.no_grad()
def first_non_finite(model: nn.Module, block: Block) -> tuple[str, str] | None:
    """Component and tensor that are first not finite in a forward pass; None where all are.

    The inputs, parameters and output of every module are checked in the order of execution. Dropout draws anew, so a
    fault that depended on the draw may not show.
    """
    origins: list[tuple[str, str]] = []

    def check(module_name: str, what: str, value: Any) -> None:
        if not origins and not all(bool(tensor.isfinite().all()) for tensor in _tensors(value)):
            origins.append((module_name.split(".")[0], f"{what} of {module_name}"))

    def watch(name: str, module: nn.Module) -> list[Any]:
        def before(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            check(name, "input", [*arguments, *options.values()])
            for parameter_name, parameter in module.named_parameters(recurse=False):
                check(name, parameter_name, parameter)

        def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            check(name, "output", output)

        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]

    for what, value in (("x", block.x), ("edge_attr", block.neighbours.attributes)):
        check("block", what, value)
    hooks = [hook for name, module in model.named_modules() if name for hook in watch(name, module)]
    try:
        model(block)
    finally:
        for hook in hooks:
            hook.remove()
    return origins[0] if origins else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


# Memory ----------------------------------------------------------------------------------------------------------


@contextmanager
def shortage_of_memory_explained(
    data: BlockDataset, sessions: NDArray[np.int64], batch_size: int, attempt: Callable[[NDArray[np.int64]], None]
) -> Iterator[None]:
    """Turns a failed allocation into a RunFailure that says which `train.batch_size` would fit.

    `attempt` does what a training step does with the sessions of a block. It is tried on the largest block of smaller
    and smaller batch sizes.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors that filled the memory
        asked = re.search(r"allocate [\d.]+ \w+", str(error))
        smaller = smaller_batches(data, sessions, batch_size)
        fitting = next((size for size, block in smaller.items() if _fits(attempt, block)), None)
        way_on = (
            f"train.batch_size={fitting} would fit: a forward and backward pass of its largest block did"
            if fitting
            else "not even one session fits; make model.hidden_size or model.window_sessions smaller"
        )
        raise RunFailure(f"out of memory{f' (tried to {asked[0]})' if asked else ''}; {way_on}") from None


@contextmanager
def construction_explained() -> Iterator[None]:
    """Turns a failed allocation before the first step into a RunFailure; no batch size would help there."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunFailure(
            "out of memory before the first step; make model.hidden_size smaller, or set train.panel=map if it is the"
            " panel that does not fit"
        ) from error


def smaller_batches(data: BlockDataset, sessions: NDArray[np.int64], batch_size: int) -> dict[int, NDArray[np.int64]]:
    """Batch size -> sessions of its largest block. The samples are halved each time, down to one session."""
    members = data.panel.member.sum(axis=1)

    def largest(size: int) -> NDArray[np.int64]:
        return max(data.sessions_per_block(sessions, size), key=lambda block: int(members[block].sum()))

    failed, one = int(members[largest(batch_size)].sum()), int(members[sessions].max())
    halves = [failed >> n for n in range(1, failed.bit_length()) if failed >> n > one]
    return {size: largest(size) for size in (*halves, one) if size < failed}


def _fits(attempt: Callable[[NDArray[np.int64]], None], sessions: NDArray[np.int64]) -> bool:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        attempt(sessions)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        return False
    return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed. Torch has an exception of its own for accelerators only."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    )
