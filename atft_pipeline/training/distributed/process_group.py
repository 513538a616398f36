"""Several processes train one run: each computes a part of every block's sessions, and all take the same step.

Every process computes the loss of the whole block: the scores of the others arrive without gradient, and the gradients
of the parts add up to that of the block, also for the Sharpe term. So the number of processes changes figures only by
the order of float32 sums, and by dropout, which each process draws for itself.

Shapes: n stocks and S sessions of a block, H horizons.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from atft_pipeline.batches.block import Block
from atft_pipeline.config.schema import HORIZONS
from atft_pipeline.errors import RunFailure

COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""The others wait while the leader judges an epoch, for which the ten minutes of torch on CUDA are too short."""

NAMING_S = 20.0
"""How long a process that lost another waits to be ended: the launcher takes the one that ends first for the cause."""

T = TypeVar("T")


class PeerLost(RunFailure):
    """Another process of the run has ended, or is about to. The launcher knows which one, and why."""


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those that train one run. The first one is the leader and alone writes the run directory."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank among the processes of this machine."""

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    def share(self, sessions: int) -> slice:
        """This process's contiguous part of so many sessions. It may be empty where there are fewer than processes."""
        each, left = divmod(sessions, self.size)
        start = self.rank * each + min(self.rank, left)
        return slice(start, start + each + (self.rank < left))

    def part_of(self, block: Block) -> Block | None:
        """This process's part of a block; None where it has none."""
        if self.size == 1:
            return block
        part = self.share(block.member.shape[1])
        return block.part(part.start, part.stop) if part.start < part.stop else None

    def sharded(self, model: nn.Module) -> nn.Module:
        """A module with the scores of `model`, which all processes compute together."""
        return model if self.size == 1 else _Sharded(model, self)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sums the gradients over all processes. One that no process has stays None: the optimizer then skips it."""
        if self.size == 1:
            return
        present = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), present])
        _all_reduce(flat)
        pieces = flat.split([*(p.numel() for p in parameters), len(parameters)])
        for parameter, piece, having in zip(parameters, pieces[:-1], pieces[-1].tolist(), strict=True):
            parameter.grad = piece.view_as(parameter) if having else None

    def from_leader(self, value: T) -> T:
        """The leader's `value`, in every process. What the others pass is ignored."""
        if self.size == 1:
            return value
        values: list[Any] = [value if self.is_leader else None]
        with _lost_peers_explained():
            dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def joined() -> Iterator[ProcessGroup]:
    """The group of the processes that torchrun started; a single process where torchrun started none.

    A process that lost another waits before it fails, so that the launcher sees the end of the other one first.
    """
    if not dist.is_torchelastic_launched():
        yield SINGLE_PROCESS
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=COLLECTIVE_TIMEOUT)
    try:
        yield ProcessGroup(dist.get_rank(), dist.get_world_size(), dist.get_node_local_rank())
    except PeerLost:
        time.sleep(NAMING_S)
        raise
    # Only after success: to destroy a group waits for processes that may be gone.
    dist.destroy_process_group()


class _Sharded(nn.Module):
    """Scores `[n, S, H]` of a block: each process computes those of its own sessions and receives the others.

    Only its own scores carry gradient. A process without a session returns a tensor that requires gradient all the
    same: the loss tells training from evaluation by that.
    """

    def __init__(self, model: nn.Module, processes: ProcessGroup) -> None:
        super().__init__()
        self.model, self.processes = model, processes

    def forward(self, block: Block) -> Tensor:
        stocks, sessions = block.member.shape
        scores = torch.zeros((stocks, sessions, len(HORIZONS)), device=block.x.device)
        part, own_block = self.processes.share(sessions), self.processes.part_of(block)
        if own_block is None:
            _all_reduce(scores)
            return scores.requires_grad_(torch.is_grad_enabled())
        computed = self.model(own_block)  # [n, S of the part, H]
        scores[:, part] = computed.detach()
        _all_reduce(scores)  # zeros elsewhere: the sum holds each process's own scores
        return torch.cat([scores[:, : part.start], computed, scores[:, part.stop :]], dim=1)


def _all_reduce(values: Tensor) -> None:
    with _lost_peers_explained():
        dist.all_reduce(values)


@contextmanager
def _lost_peers_explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # Gloo puts its source file before the reason and the address after it.
        reason = re.split(r"[.\[\n]", re.sub(r"^\[[^]]*\] ", "", str(error)))[0].strip()
        raise PeerLost(f"another process of the run ended ({reason}); what it said is the cause") from error
