"""Where a panel lies: on the device or in memory where it fits, else in a memory map on disk.

The place changes no value, only the time that a block takes.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from atft_pipeline.config.schema import PanelPlace

SHARE_OF_FREE_HOST, SHARE_OF_FREE_DEVICE = 1 / 3, 1 / 2
"""Largest share of the free memory that a panel may take. The rest is for the training step and, on the host, for the
evaluation. Ten million rows take 3.3 GB, the rest of their run 4.3 GB on one core: with 8 GB they are mapped."""

T = TypeVar("T")
B = TypeVar("B")

Allocate = Callable[[tuple[int, ...]], NDArray[np.float32]]
"""Shape -> uninitialised array of float32."""


def in_memory(shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.empty(shape, dtype=np.float32)


def in_map(shape: tuple[int, ...], folder: Path) -> NDArray[np.float32]:
    """An array over an unnamed file in `folder`, whose space is freed when the process ends, however it ends.

    Raises OSError where the disk has no room for all of it. Without the reservation, a full disk would show only when a
    page is written back, as a signal that kills the process.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        reserve(file, int(np.prod(shape, dtype=np.int64)) * np.dtype(np.float32).itemsize)
        return np.asarray(np.memmap(file, dtype=np.float32, mode="r+", shape=shape))


def reserve(file: IO[bytes], size: int) -> None:
    """Reserves `size` bytes on the disk; raises OSError where it has less room."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    zeros = bytes(2**20)  # macOS has no posix_fallocate
    for start in range(0, size, len(zeros)):
        file.write(zeros[: size - start])
    file.flush()


def left_to_the_cache(array: NDArray[np.float32]) -> None:
    """Releases the pages of a mapped array: they stay in the file cache and no longer count as this process's memory.

    An array in memory stays as it is. Other threads may read at the same time.
    """
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class PanelStorage:
    """Decides by the panel's size where its array lies and on which device blocks are cut."""

    asked: PanelPlace
    device: torch.device
    folder: Path
    """Folder of the memory map's file."""
    free_host: int
    free_device: int
    """In bytes; 0 where the device is the host."""

    @classmethod
    def now(cls, asked: PanelPlace, device: torch.device, folder: Path, processes: int = 1) -> PanelStorage:
        """The storage for the memory that is free now; several processes share the host's memory equally."""
        free_device = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        return cls(asked, device, folder, free_host_bytes() // processes, free_device)

    def on_device(self, panel_bytes: int) -> bool:
        """Whether an accelerator holds the whole panel."""
        return self.asked != "map" and panel_bytes < SHARE_OF_FREE_DEVICE * self.free_device

    def is_mapped(self, panel_bytes: int) -> bool:
        """Whether the host's array is a memory map, which may be so even where the device holds the panel."""
        if self.asked != "auto":
            return self.asked == "map"
        too_large_for_device = self.device.type != "cpu" and not self.on_device(panel_bytes)
        return too_large_for_device or panel_bytes >= SHARE_OF_FREE_HOST * self.free_host

    def allocate(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        mapped = self.is_mapped(int(np.prod(shape, dtype=np.int64)) * np.dtype(np.float32).itemsize)
        return in_map(shape, self.folder) if mapped else in_memory(shape)

    def place(self, panel_bytes: int) -> str:
        """`device`, `memory` or `map`: where blocks are cut from."""
        if self.on_device(panel_bytes):
            return "device"
        return "map" if self.is_mapped(panel_bytes) else "memory"

    def block_device(self, panel_bytes: int) -> torch.device:
        return self.device if self.on_device(panel_bytes) else torch.device("cpu")

    def workers(self, panel_bytes: int, asked: int) -> int:
        """Threads that make blocks: at least one for a memory map, so that no step waits for the disk."""
        return max(asked, 1) if self.place(panel_bytes) == "map" else asked


def free_host_bytes(root: Path = Path("/")) -> int:
    """Memory that this process may still take: what the machine has available, or less if a control group limits it.

    Pages that only cache files count as free. `root`: the root of the file system.
    """
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():  # not Linux: the whole memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = _numbers(meminfo)["MemAvailable:"] * 1024
    return min([available, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """Bytes left up to the limit of each control group of this process, version 1 or 2, and of the groups around it."""
    memberships = root / "proc/self/cgroup"
    for line in memberships.read_text().splitlines() if memberships.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, limit, usage, prefix = "sys/fs/cgroup", "memory.max", "memory.current", ""
        elif controllers == "memory":
            mount, limit, usage, prefix = (
                "sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_",
            )
        else:
            continue
        inner = Path(path.lstrip("/"))
        # In a container the path may be the host's, while only the mount's root exists.
        for group in (root / mount / part for part in (inner, *inner.parents)):
            if (group / limit).exists() and (most := (group / limit).read_text().strip()) != "max":
                stat = _numbers(group / "memory.stat")
                cache = stat[f"{prefix}inactive_file"] + stat[f"{prefix}active_file"]
                yield int(most) - int((group / usage).read_text()) + cache


def _numbers(table: Path) -> dict[str, int]:
    """First word of each line -> the number after it."""
    return {words[0]: int(words[1]) for line in table.read_text().splitlines() if len(words := line.split()) > 1}


def prefetched(make: Callable[[T], B], items: Sequence[T], workers: int) -> Iterator[B]:
    """`map(make, items)`; threads make up to 2 x `workers` results ahead, with 0 the calling thread makes them."""
    if workers == 0:
        yield from map(make, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future[B]] = deque()
        for item in items:
            ahead.append(pool.submit(make, item))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
