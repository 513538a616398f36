"""Signals: named figures of a run. None means "not measured", which is never "fine"."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from atft_pipeline.diagnostics.run_inputs import RunInputs
from atft_pipeline.inspection.reader import Record

Value = float | str | None
Signals = Mapping[str, Value]
Measure = Callable[[Record], Value]
M = TypeVar("M", bound=Measure)


class SignalTable(dict[str, Measure]):
    """Signals of one topic by name: functions of a run's own tables, which need neither its dataset nor its model."""

    def add(self, measure: M) -> M:
        """Decorator: the function's name is the signal's, its docstring says what is measured."""
        self[measure.__name__] = measure
        return measure


@dataclass(frozen=True)
class Audit:
    """Signals that one function measures together from the input files of a run.

    If the function raises InputError or an error of reading, all of its signals count as not measured.
    """

    names: tuple[str, ...]
    measure: Callable[[RunInputs], Mapping[str, Value]]


def without_nan(value: Value) -> Value:
    """The value, None for NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value


def count_of(names: Sequence[str] | None) -> float | None:
    return None if names is None else float(len(names))


def listed(names: Sequence[str] | None) -> str | None:
    """Names as a report shows them; None where they are not known."""
    return None if names is None else ", ".join(names) or "none"
