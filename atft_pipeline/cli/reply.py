"""The output of a command: an object for scripts, and blocks of text for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cell:
    """A figure or a word, and the colour that says whether it is good news; '' is no colour."""

    text: str
    colour: str = ""


@dataclass(frozen=True)
class Facts:
    """A line per figure: its name and its value. `timed` adds a line with the seconds that the command took."""

    lines: Sequence[tuple[str, Cell]]
    timed: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under a header. The first column names the row; the others hold figures, or words if listed in `words`."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: Sequence[str] = ()
    """Headings of columns that are aligned left."""


@dataclass(frozen=True)
class Sentences:
    """Sentences under a title, a line each; `none` is shown where there is no sentence."""

    title: str
    sentences: Sequence[str]
    none: str = "none"
    colour: str = ""


Block = Facts | Table | Sentences


@dataclass(frozen=True)
class Reply:
    """`content` goes to `--json`, `blocks` to people, `code` is the exit code. Without content nothing is printed."""

    content: dict[str, Any]
    blocks: Sequence[Block] = field(default=())
    code: int = 0


def facts(*lines: tuple[str, object], timed: bool = False) -> Facts:
    """Lines of a name and a value; a value may be a `Cell`, which has a colour."""
    return Facts([(name, cell(value)) for name, value in lines], timed)


def cell(value: object) -> Cell:
    """A value in words: four significant digits of a float, `not measured` for None."""
    if isinstance(value, Cell):
        return value
    if value is None:
        return Cell("not measured")
    return Cell(f"{value:.4g}" if isinstance(value, float) else str(value))
