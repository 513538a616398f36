"""A frame of the monitor as text for a terminal or a file: a panel per running run, a row per ended run."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from atft_pipeline.monitoring.monitor import Frame, Watched
from atft_pipeline.monitoring.number_format import colour, count, duration, gibibytes, number, one_line
from atft_pipeline.monitoring.progress import Curve, RunProgress, newest

BARS = "▁▂▃▄▅▆▇█"
SPARK_EPOCHS = 16
"""A sparkline shows this many newest epochs."""
SMALLEST_RANGE = math.log(2.0)
"""A sparkline's height is at least a factor of 2, so that noise around a level reads as flat."""
PLAIN_WIDTH = 100
"""Columns of a frame that goes to a file or a pipe."""


@contextmanager
def screen(stream: TextIO | None = None) -> Iterator[Callable[[Frame], None]]:
    """Yields the function that shows a frame.

    On a terminal a frame replaces the previous one; elsewhere it follows it, without control characters. The terminal
    is restored when the block ends, also by an interrupt.
    """
    stream = sys.stdout if stream is None else stream
    console = Console(file=stream)
    if not stream.isatty() or console.is_dumb_terminal:
        yield lambda frame: print(plain(frame), file=stream, flush=True)
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda frame: live.update(fitted(frame, console), refresh=True)


def plain(frame: Frame, width: int = PLAIN_WIDTH) -> str:
    """The frame as lines of text."""
    console = Console(force_terminal=False, color_system=None, width=width, legacy_windows=False)
    with console.capture() as captured:
        console.print(draw(frame))
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def fitted(frame: Frame, console: Console) -> RenderableType:
    """The frame with as many panels as the terminal has lines for; other runs become rows, and warnings stay."""
    for panels in range(len(frame.runs), 0, -1):
        drawn = draw(frame, panels)
        if len(console.render_lines(drawn)) < console.height:
            return drawn
    return draw(frame, 0)


def draw(frame: Frame, panels: int | None = None) -> RenderableType:
    """Panels of the first `panels` running runs (None: of all), rows of the others, and the warnings below."""
    going_on = [run for run in frame.runs if run.progress.goes_on][:panels]
    rows = [run for run in frame.runs if run not in going_on]
    parts: list[RenderableType] = [Text(f"{one_line(frame.place)}  {frame.time}", style="dim")]
    parts += [_panel(run.progress) for run in going_on]
    if rows:
        parts.append(_rows([run.progress for run in rows]))
    if not frame.runs:
        parts.append(Text("no run here yet; `atft train` or a training asset writes one"))
    if frame.older:
        parts.append(Text(f"{frame.older} older runs ended; `atft status` lists them", style="dim"))
    parts += [_sentence(run.progress, problem) for run in frame.runs for problem in _problems(run)]
    parts += _warnings(frame)
    return Group(*parts)


# One run ----------------------------------------------------------------------------------------------------------


def _panel(run: RunProgress) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    grid.add_row("epoch", _progress(run))
    grid.add_row(
        "loss",
        f"train {number(newest(run.train_loss))} {sparkline(run.train_loss)}   "
        f"validation {number(newest(run.validation_loss))} {sparkline(run.validation_loss)}",
    )
    grid.add_row("evaluation", _evaluation(run))
    grid.add_row("learning rate", number(run.lr))
    grid.add_row("gradient l2", _gradients(run.gradient_l2))
    grid.add_row(
        "predictions",
        f"dispersion ratio {number(newest(run.dispersion_ratio))} {sparkline(run.dispersion_ratio)}   "
        f"degeneracy events {count(run.degeneracy_events)}, resets {count(run.degeneracy_resets)}",
    )
    grid.add_row("machine", _machine(run))
    return Panel(
        grid,
        title=Text(f"{one_line(run.run)}  {one_line(run.state)}"),
        title_align="left",
        border_style=colour(run.state),
    )


def _progress(run: RunProgress) -> RenderableType:
    line = Table.grid(padding=(0, 2))
    since = "" if run.since_epoch_s is None else f"   newest epoch written {duration(run.since_epoch_s)} ago"
    left = "not measured" if run.eta_s is None else duration(run.eta_s)
    bar = ProgressBar(total=run.epochs or 1, completed=run.epoch or 0, width=24)
    line.add_row(f"{count(run.epoch)}/{count(run.epochs)}", bar, f"ETA {left}{since}")
    return line


def _evaluation(run: RunProgress) -> str:
    if run.epoch_evaluated is None:
        return "not measured"
    if run.evaluation_valid is False:
        return f"epoch {run.epoch_evaluated}: invalid, its scores are constant or not finite"
    error = "" if run.sharpe_se is None else f" ± {run.sharpe_se:.4f}"
    sharpe, ic = (
        "not measured" if value is None else f"{value:+.4f}{more}"
        for value, more in ((run.sharpe_daily, error), (run.ic_mean, ""))
    )
    return f"epoch {run.epoch_evaluated}: Sharpe {sharpe} (daily, validation)   IC {ic}"


def _gradients(curves: Mapping[str, Curve]) -> RenderableType:
    """Two components per line, so that seven components take four lines."""
    if not curves:
        return Text("not measured")
    cells = [(one_line(name), number(newest(curve)), sparkline(curve)) for name, curve in curves.items()]
    half = (len(cells) + 1) // 2
    table = Table.grid(padding=(0, 1))
    for left, right in zip(cells[:half], [*cells[half:], ("", "", "")], strict=False):
        table.add_row(*left, " ", *right)
    return table


def _machine(run: RunProgress) -> str:
    speed = "samples/s not measured" if run.samples_per_s is None else f"{run.samples_per_s:,.0f} samples/s"
    used = "not measured" if run.gpu_utilisation is None else f"{run.gpu_utilisation:.0%}"
    memory, rss = gibibytes(run.gpu_memory_bytes), gibibytes(run.peak_rss_bytes)
    return f"{speed}   GPU {used}, its memory {memory}   peak RSS {rss}"


# Rows and sentences -----------------------------------------------------------------------------------------------


def _rows(runs: list[RunProgress]) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("run", overflow="fold")
    table.add_column("state")
    for name in ("epoch", "loss", "validation", "Sharpe", "IC"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for run in runs:
        sharpe, ic = (
            "invalid" if run.evaluation_valid is False else number(v) for v in (run.sharpe_daily, run.ic_mean)
        )
        table.add_row(
            Text(one_line(run.run)),
            Text(one_line(run.state), style=colour(run.state)),
            f"{count(run.epoch, '-')}/{count(run.epochs, '-')}",
            *(number(value, "-") for value in (newest(run.train_loss), newest(run.validation_loss))),
            *("-" if value == "not measured" else value for value in (sharpe, ic)),
            Text(one_line(run.verdict or "-"), style=colour(run.verdict)),
        )
    return table


def _problems(run: Watched) -> list[str]:
    ended = [run.progress.reason] if run.progress.reason and not run.progress.goes_on else []
    unassessed = [f"its rules could not be assessed: {run.unassessed}"] if run.unassessed else []
    return [*ended, *run.progress.problems, *unassessed]


def _sentence(run: RunProgress, problem: str) -> Text:
    return Text(f"{one_line(run.run)}: {one_line(problem)}", style="yellow")


def _warnings(frame: Frame) -> list[RenderableType]:
    """The newest warnings of every run that was assessed, or a line that says there are none."""
    lines: list[RenderableType] = []
    for run in frame.runs:
        for warning in run.warnings:
            since = f"since epoch {warning.since_epoch}{' or earlier' if warning.or_earlier else ''}"
            text = f"WARNING {run.progress.run}, {since}: {warning.cause} [{warning.rule}]; {warning.evidence}"
            lines.append(Text(one_line(text), style="bold red"))
        if run.warnings:
            lines.append(Text(f"  what to do: atft diagnose {one_line(run.progress.run_dir)}", style="red"))
    judged = [run for run in frame.runs if run.progress.goes_on and run.unassessed is None]
    if judged and not lines:
        lines.append(Text("no warning: no rule has fired for three epochs in a row", style="dim"))
    return lines


# Figures ----------------------------------------------------------------------------------------------------------


def sparkline(curve: Curve) -> str:
    """The newest epochs, oldest first: heights are logarithms of the absolute values, `_` where there is none.

    A curve that stays within a factor of 2 is drawn around the middle.
    """
    values = [curve[epoch] for epoch in sorted(curve)[-SPARK_EPOCHS:]]
    logs = [math.log(abs(value)) if math.isfinite(value) and value != 0 else None for value in values]
    finite = [value for value in logs if value is not None]
    if not finite:
        return "_" * len(values)
    extent = max(max(finite) - min(finite), SMALLEST_RANGE)
    lowest = (max(finite) + min(finite) - extent) / 2
    steps = [None if value is None else int((value - lowest) / extent * (len(BARS) - 1) + 0.5) for value in logs]
    return "".join("_" if step is None else BARS[step] for step in steps)
