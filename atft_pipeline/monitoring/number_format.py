"""Figures, durations and states as people read them on a terminal; None becomes words, never 0."""

from __future__ import annotations

GIBIBYTE = 2.0**30
NOT_MEASURED = "not measured"

COLOURS: dict[str, str] = {
    "passed": "green",
    "running": "green",
    "finished": "cyan",
    "not_applicable": "yellow",
    "insufficient evidence": "yellow",
    "interrupted": "yellow",
    "unfinished": "yellow",
    "missing": "yellow",
    "stale": "yellow",
    "other dataset": "yellow",
    "other split": "yellow",
    "failed": "red",
    "invalid": "red",
    "killed": "red",
    "unreadable": "red",
}
"""Colour of a verdict or of a run's state."""


def colour(word: str | None) -> str:
    """The colour of a verdict or state; none for any other word."""
    return COLOURS.get(word or "", "")


def verdict_colour(status: str, summary: str) -> str:
    """The colour of a verdict: a pass on insufficient evidence is no clear pass."""
    return colour("insufficient evidence" if status == "passed" and "insufficient evidence" in summary else status)


def number(value: float | None, absent: str = NOT_MEASURED) -> str:
    """Four significant digits."""
    return absent if value is None else f"{value:.4g}"


def count(value: int | None, absent: str = NOT_MEASURED) -> str:
    return absent if value is None else str(value)


def gibibytes(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value / GIBIBYTE:.2f} GiB"


def duration(seconds: float) -> str:
    """`45 s`, `4 min 05 s`, `2 h 03 min`."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def one_line(value: object) -> str:
    """The value as one line without control characters, whatever a record holds."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(value).split()))
