"""Markdown of a report: written here, and turned into HTML that shows every character of a cell as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markdown_it import MarkdownIt

NOT_MEASURED = "not measured"

# The report itself is markdown, but text from a record (a path, an error's own words) is not. So no syntax is enabled
# that could turn such text into a link, a picture or raw HTML.
_PARSER = MarkdownIt("zero", {"html": False, "breaks": True}).enable(
    ["table", "heading", "list", "fence", "backticks", "emphasis", "newline"]
)


def to_html(text: str) -> str:
    """HTML of markdown with headings, tables, lists, fences, bold and code; everything else stays text, escaped."""
    return str(_PARSER.render(text))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def table_of(rows: Sequence[Mapping[str, str]]) -> str:
    """A table of rows with equal keys, which are its header."""
    return table(list(rows[0]), [list(row.values()) for row in rows])


def _cell(text: str) -> str:
    """A cell is one line, and only the table itself has bars."""
    return " ".join(text.split("\n")).replace("|", "\\|")


def numbered(items: Sequence[str]) -> str:
    return "\n".join(f"{number}. {item}" for number, item in enumerate(items, start=1))


def figure(value: object) -> str:
    """A number to four digits, words as they are."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value):
        return f"{value:.4g}"
    return NOT_MEASURED
