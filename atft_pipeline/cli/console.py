"""Blocks of text on stdout and sentences on stderr: in colour on a terminal, plain everywhere else.

Colours and tables need the package rich, which a machine that only trains does not have; it is imported where it is
used, and plain text replaces it. rich honours NO_COLOR and TERM=dumb.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TextIO

from atft_pipeline.cli.reply import Block, Cell, Facts, Sentences, Table
from atft_pipeline.monitoring.number_format import duration, one_line

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

GAP = "  "
"""Space between two columns."""


def say(sentence: str) -> None:
    """Prints a sentence on stderr, if the caller has not closed it."""
    if sys.stderr is not None:
        print(sentence, file=sys.stderr, flush=True)


def discard_output() -> None:
    """Points stdout at nothing: after a broken pipe Python would otherwise complain again when it closes stdout."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show(blocks: Sequence[Block], took_s: float, stream: TextIO | None = None) -> None:
    """Prints the blocks of a command that took `took_s` seconds. Raises OSError where the stream takes no more."""
    stream = sys.stdout if stream is None else stream
    blocks = [_timed(block, took_s) if isinstance(block, Facts) else block for block in blocks]
    if is_terminal(stream):
        _show_in_colour(blocks, stream)
    else:
        print("\n".join(line for block in blocks for line in plain(block)), file=stream, flush=True)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether rich can draw on the stream."""
    return stream is not None and stream.isatty() and importlib.util.find_spec("rich") is not None


def _timed(block: Facts, took_s: float) -> Facts:
    return replace(block, lines=[*block.lines, ("took", Cell(duration(took_s)))]) if block.timed else block


# Plain text -------------------------------------------------------------------------------------------------------


def plain(block: Block) -> list[str]:
    """The block as lines without control characters."""
    if isinstance(block, Facts):
        return [f"{name}: {one_line(value.text)}" for name, value in block.lines]
    if isinstance(block, Sentences):
        if not block.sentences:
            return [f"{block.title}: {block.none}"]
        return [f"{block.title}:", *(f"{GAP}{one_line(sentence)}" for sentence in block.sentences)]
    return [f"{block.title}:", *(GAP + line for line in _aligned(block))]


def _aligned(table: Table) -> list[str]:
    rows = [list(table.header), *([one_line(cell.text) for cell in row] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = [number == 0 or name in table.words for number, name in enumerate(table.header)]
    return [
        GAP.join(
            text.ljust(width) if is_left else text.rjust(width)
            for text, width, is_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in rows
    ]


# In colour --------------------------------------------------------------------------------------------------------


def _show_in_colour(blocks: Sequence[Block], stream: TextIO) -> None:
    from rich.console import Console

    console = Console(file=stream, highlight=False)
    for number, block in enumerate(blocks):
        if number and not (isinstance(block, Sentences) and isinstance(blocks[number - 1], Sentences)):
            console.print()
        for renderable in drawn(block, console):
            console.print(renderable)
    stream.flush()


def drawn(block: Block, console: Console) -> list[RenderableType]:
    """The block as rich draws it on this console."""
    from rich.padding import Padding
    from rich.text import Text

    if isinstance(block, Facts):
        return [_drawn_facts(block)]
    if isinstance(block, Sentences):
        if not block.sentences:
            return [Text.assemble((block.title, "bold"), f"  {block.none}")]
        return [
            Text(block.title, style="bold"),
            *(Padding(Text(one_line(s), style=block.colour), (0, 0, 0, 2)) for s in block.sentences),
        ]
    return [
        Text(block.title, style="bold"),
        *(
            renderable
            for number, part in enumerate(fitting(block, console.width))
            for renderable in ([Text(""), _drawn_table(part)] if number else [_drawn_table(part)])
        ),
    ]


def _drawn_facts(block: Facts) -> RenderableType:
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in block.lines:
        grid.add_row(Text(name), Text(one_line(value.text), style=value.colour))
    return grid


def _drawn_table(table: Table) -> RenderableType:
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text

    # The box puts a space between two columns; with the padding that is the gap.
    grid = Grid(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, len(GAP) - 1, 0, 0), header_style="bold", show_edge=False
    )
    for number, name in enumerate(table.header):
        is_left = number == 0 or name in table.words
        grid.add_column(Text(name), justify="left" if is_left else "right", no_wrap=True)
    for row in table.rows:
        grid.add_row(*(Text(one_line(cell.text), style=cell.colour) for cell in row))
    return grid


def fitting(table: Table, width: int) -> list[Table]:
    """The table in parts of at most `width` columns of text, each with the first column: no figure is broken in two.

    A single column that is wider stays whole; the terminal wraps it.
    """
    columns = list(zip(table.header, *([one_line(cell.text) for cell in row] for row in table.rows), strict=True))
    widths = [max(map(len, column)) + len(GAP) for column in columns]
    parts: list[list[int]] = [[]]
    used = widths[0]
    for number in range(1, len(columns)):
        if parts[-1] and used + widths[number] > width:
            parts.append([])
            used = widths[0]
        parts[-1].append(number)
        used += widths[number]
    return [
        replace(
            table,
            header=[table.header[number] for number in (0, *part)],
            rows=[[row[number] for number in (0, *part)] for row in table.rows],
        )
        for part in parts
    ]
