"""Forward returns: from the execution price after the score to h sessions later, null where nobody traded."""

from __future__ import annotations

import numpy as np
import pytest

from atft_pipeline.dataset.targets import forward_return

NAN = np.nan
OPEN = np.array([[10.0], [11.0], [12.0], [13.0], [14.0], [15.0]])
CLOSE = np.array([[20.0], [22.0], [24.0], [NAN], [28.0], [30.0]])


@pytest.mark.parametrize(
    ("execution", "horizon", "expected"),
    [
        ("next_open", 1, [12 / 11 - 1, 13 / 12 - 1, 14 / 13 - 1, 15 / 14 - 1, NAN, NAN]),
        ("next_open", 3, [14 / 11 - 1, 15 / 12 - 1, NAN, NAN, NAN, NAN]),
        ("next_close", 1, [24 / 22 - 1, NAN, NAN, 30 / 28 - 1, NAN, NAN]),
        ("same_close", 1, [22 / 20 - 1, 24 / 22 - 1, NAN, NAN, 30 / 28 - 1, NAN]),
        ("same_close", 2, [24 / 20 - 1, NAN, 28 / 24 - 1, NAN, NAN, NAN]),
        ("next_open", 20, [NAN] * 6),
    ],
)
def test_forward_return_by_execution_price(execution: str, horizon: int, expected: list[float]) -> None:
    found = forward_return(OPEN, CLOSE, horizon, execution)  # type: ignore[arg-type]
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-15)


def test_masked_row_nulls_targets_that_enter_or_leave_there_and_no_other() -> None:
    masked = np.zeros(OPEN.shape, bool)
    masked[2] = True
    found = forward_return(OPEN, CLOSE, 1, "next_open", masked)
    # Session 0 leaves at session 2's open, session 1 enters there.
    assert np.isnan(found[:, 0]).tolist() == [True, True, False, False, True, True]


def test_entry_price_is_never_one_that_the_score_has_seen() -> None:
    moved = OPEN.copy()
    moved[3] *= 5
    for execution in ("next_open", "next_close"):
        before = forward_return(OPEN, OPEN, 1, execution)  # type: ignore[arg-type]
        after = forward_return(moved, moved, 1, execution)  # type: ignore[arg-type]
        assert before[3] == after[3], "the price of session 3 is known when its score is made"


def test_empty_and_short_panels_have_no_target() -> None:
    assert np.isnan(forward_return(OPEN[:1], CLOSE[:1], 5, "next_open")).all()
