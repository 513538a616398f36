"""Split of the sessions into train, validation and test; no label of one reads a session of another.

The label of session t is the return from the entry after t to `horizon` sessions later, so with the longest horizon of
20 sessions and an entry one session late it reads prices up to t + 21. Training sessions closer than that to the first
validation session would be fitted to returns that validation measures. The purge leaves them out; the embargo leaves
out more (Lopez de Prado, Advances in Financial Machine Learning, 2018, section 7.4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atft_pipeline.config.schema import EXECUTION_DELAY_SESSIONS, HORIZONS, SplitConfig
from atft_pipeline.errors import InputError

PURGE_SESSIONS: int = max(HORIZONS) + max(EXECUTION_DELAY_SESSIONS.values())
"""Sessions of prices behind a session that its labels read."""

MINIMUM_PART_SESSIONS: int = 2
"""A mean has a standard error from two sessions on."""


@dataclass(frozen=True)
class Split:
    """Contiguous session indices of the three parts, ascending.

    Indices of two different parts differ by more than `purge_sessions`, which includes the embargo.
    """

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]
    purge_sessions: int


Cut = tuple[int, int, int, int, int, int]
"""First and one past the last index of train, validation and test."""


def make_split(sessions: NDArray[np.datetime64], config: SplitConfig, purge_sessions: int = PURGE_SESSIONS) -> Split:
    """Session indices of train, validation and test for the ascending `sessions: [T]`.

    A gap of purge plus embargo is taken from the end of train and of validation, except under `sessions`, where
    validation and test have exactly the lengths asked for and train gives way.

    Raises InputError when a part would hold fewer than two sessions.
    """
    gap = purge_sessions + config.embargo_sessions
    train_first, train_end, validation_first, validation_end, test_first, test_end = _CUTS[config.scheme](
        sessions, config, gap
    )
    parts = {
        "train": np.arange(train_first, train_end, dtype=np.int64),
        "validation": np.arange(validation_first, validation_end, dtype=np.int64),
        "test": np.arange(test_first, test_end, dtype=np.int64),
    }
    for name, part in parts.items():
        if len(part) < MINIMUM_PART_SESSIONS or part[0] < 0:
            raise InputError(
                f"split: {len(sessions)} sessions are fewer than sessions needed: scheme {config.scheme!r} leaves"
                f" {name} fewer than {MINIMUM_PART_SESSIONS} after gaps of {gap} sessions (purge {purge_sessions} +"
                f" embargo {config.embargo_sessions}); give a longer price history or a smaller split"
            )
    return Split(**parts, purge_sessions=gap)


def _cut_by_fraction(sessions: NDArray[np.datetime64], config: SplitConfig, gap: int) -> Cut:
    total = len(sessions)
    validation_first = int(total * config.train_fraction)
    # Rounded before truncation: 0.6 + 0.2 is 0.8 only up to the last bit.
    test_first = int(round(total * (config.train_fraction + config.validation_fraction), 6))
    return 0, validation_first - gap, validation_first, test_first - gap, test_first, total


def _cut_by_sessions(sessions: NDArray[np.datetime64], config: SplitConfig, gap: int) -> Cut:
    total = len(sessions)
    test_first = total - config.test_sessions
    validation_end = test_first - gap
    validation_first = validation_end - config.validation_sessions
    return 0, validation_first - gap, validation_first, validation_end, test_first, total


def _cut_by_dates(sessions: NDArray[np.datetime64], config: SplitConfig, gap: int) -> Cut:
    def first_at(field: str, value: str | None, default: int, side: str = "left") -> int:
        if value is None:
            return default
        try:
            date = np.datetime64(value, "D")
        except ValueError as error:
            raise InputError(f"split.{field}: expected an ISO date like 2012-01-04, found {value!r}") from error
        return int(np.searchsorted(sessions, date, side="left" if side == "left" else "right"))

    train_first = first_at("train_start", config.train_start, 0)
    validation_first = first_at("validation_start", config.validation_start, 0)
    test_first = first_at("test_start", config.test_start, 0)
    test_end = first_at("test_end", config.test_end, len(sessions), side="right")
    return train_first, validation_first - gap, validation_first, test_first - gap, test_first, test_end


_CUTS: dict[str, Callable[[NDArray[np.datetime64], SplitConfig, int], Cut]] = {
    "fraction": _cut_by_fraction,
    "sessions": _cut_by_sessions,
    "dates": _cut_by_dates,
}
