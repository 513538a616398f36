"""Finds what a feature's expression reads, by evaluating the expression on traces instead of matrices.

The functions of vocabulary/ compute on matrices. Given a `Trace`, they return what they would read: which raw columns,
and how many sessions back. So each registry row is checked when it is declared, and the UI's lineage is derived.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import wraps
from inspect import signature
from typing import Any

import numpy as np

from atft_pipeline.errors import InputError


@dataclass(frozen=True)
class Trace(np.lib.mixins.NDArrayOperatorsMixin):
    """Stands for a panel or a series in an expression."""

    columns: frozenset[str] = frozenset()
    """`table.column` of every raw value that went in."""
    window_sessions: int = 1
    """Sessions looked back over, the current one included; a recursive average counts until it forgets its start."""
    overlap_sessions: int = 1
    """The same, but free of what is continued from state: recursive averages and the series of market and sectors."""
    is_series: bool = False
    """Whether it is kept over the whole history: looking back on it then costs no overlap."""

    def reaching(self, sessions: int, *, remembers: bool = False) -> Trace:
        """The trace that looks `sessions` further back.

        remembers: whether a recursion is continued from state, which costs no overlap.
        """
        free = remembers or self.is_series
        return replace(
            self,
            window_sessions=self.window_sessions + sessions,
            overlap_sessions=self.overlap_sessions + (0 if free else sessions),
        )

    def kept(self) -> Trace:
        """The trace as a series whose whole history is kept."""
        return replace(self, is_series=True)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **_: Any) -> Trace:
        return joined(inputs)

    def __getitem__(self, _: Any) -> Trace:
        return self

    __hash__ = object.__hash__


def is_trace(value: object) -> bool:
    """Whether `value` is a trace that stands for a panel or a series."""
    return isinstance(value, Trace)


def joined(values: Iterable[Any]) -> Trace:
    """What an expression of all `values` reads; values that are no traces are constants."""
    traces = [value for value in values if isinstance(value, Trace)]
    return Trace(
        columns=frozenset().union(*(trace.columns for trace in traces)),
        window_sessions=max(trace.window_sessions for trace in traces),
        overlap_sessions=max(trace.overlap_sessions for trace in traces),
        is_series=all(trace.is_series for trace in traces),
    )


def word(
    reach: Callable[..., int] | int = 0, *, results: int = 1, remembers: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function of matrices a word of the vocabulary: called with traces, it returns what it reads.

    reach: how many sessions the function looks back; a number, or a function of the arguments that it names. results:
    how many matrices the function returns. remembers: whether it continues from state, and so needs no earlier rows.
    """

    def decorate(compute: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(compute)
        def spoken(*args: Any, **kwargs: Any) -> Any:
            if not any(isinstance(value, Trace) for value in args):
                # Comparisons with NaN are intended here.
                with np.errstate(invalid="ignore", divide="ignore"):
                    return compute(*args, **kwargs)
            sessions = reach if isinstance(reach, int) else _reach_of(reach, compute, args)
            if sessions < 0:
                raise InputError(f"{compute.__name__} looks {-sessions} sessions ahead; a feature looks back only")
            trace = joined(args).reaching(sessions, remembers=remembers)
            return trace if results == 1 else (trace,) * results

        return spoken

    return decorate


def _reach_of(reach: Callable[..., int], compute: Callable[..., Any], args: tuple[Any, ...]) -> int:
    given = signature(compute).bind(*args).arguments
    return reach(**{name: given[name] for name in signature(reach).parameters})
