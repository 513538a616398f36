"""A progress bar on stderr for long work: nothing in the first second, and nothing without a terminal."""

from __future__ import annotations

import re
import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING

from atft_pipeline.cli.console import is_terminal, say

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

WAIT_S = 1.0
"""Work that ends sooner shows no bar."""
REFRESHES_PER_S = 4.0

_EPOCH = re.compile(r"epoch (\d+)/(\d+)\b")
"""Start of the line that the trainer logs after an epoch."""


class ProgressBar:
    """A bar from its first second until the block ends; `advance` may be called from any thread."""

    def __init__(self, title: str, *, unit: str = "", hidden: bool = False) -> None:
        self._stage, self._unit, self._hidden = title, unit, hidden
        self._done, self._total = 0, 0
        self._lock = threading.Lock()
        self._bar: RichProgress | None = None
        self._ended = False
        self._timer = threading.Timer(WAIT_S, self._start)
        self._timer.daemon = True

    def __enter__(self) -> ProgressBar:
        if not self._hidden and is_terminal(sys.stderr):
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        with self._lock:
            self._ended = True
            if self._bar is not None:
                self._bar.stop()

    def advance(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` steps of the stage are finished."""
        with self._lock:
            self._stage, self._done, self._total = stage, done, total
            self._update()

    def stage(self, stage: str) -> None:
        """Begins a stage whose steps are not counted."""
        self.advance(stage, 0, 0)

    def say(self, line: str) -> None:
        """A line of the training's log, above the bar; the line of an epoch advances it."""
        epoch = _EPOCH.match(line)
        if epoch is not None:
            self.advance("training", int(epoch[1]), int(epoch[2]))
        # While a bar is shown, rich replaces sys.stderr and draws the bar again below the line.
        say(line)

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(file=sys.stderr, highlight=False)
        if console.is_dumb_terminal:
            return
        columns = ("{task.description}", BarColumn(bar_width=24), TextColumn("{task.fields[steps]}"))
        with self._lock:
            if self._ended:
                return
            self._bar = Progress(
                *columns,
                TimeElapsedColumn(),
                console=console,
                transient=True,
                refresh_per_second=REFRESHES_PER_S,
                redirect_stdout=False,
            )
            self._bar.add_task(self._stage, total=None, steps="")
            self._update()
            self._bar.start()

    def _update(self) -> None:
        if self._bar is not None and self._bar.tasks:
            steps = f"{self._done}/{self._total} {self._unit}".rstrip() if self._total else ""
            total = self._total or None
            task = self._bar.tasks[0].id
            self._bar.update(task, description=self._stage, completed=self._done, total=total, steps=steps)
