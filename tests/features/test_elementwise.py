"""What all compiled expressions share: broadcasting, memory layouts and an output array from the caller."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from atft_pipeline.features.vocabulary.elementwise import positive, ratio

PANEL = np.random.default_rng(0).standard_normal((7, 5))
OPERANDS: dict[str, Callable[[], object]] = {
    "panel": lambda: PANEL.copy(),
    "another's rows": lambda: np.repeat(PANEL, 2, axis=0)[::2],
    "reversed": lambda: PANEL[::-1],
    "columns first": lambda: np.asfortranarray(PANEL),
    "float32": lambda: PANEL.astype(np.float32),
    "read-only": lambda: np.broadcast_to(PANEL[:1], PANEL.shape),
    "a column": lambda: PANEL[:, :1],
    "a row": lambda: PANEL[:1],
    "a number": lambda: 2.0,
}


@pytest.mark.parametrize("one", OPERANDS)
@pytest.mark.parametrize("two", OPERANDS)
def test_values_are_those_of_numpy_whatever_the_operands_look_like(one: str, two: str) -> None:
    a, b = OPERANDS[one](), OPERANDS[two]()
    expected = np.asarray(a, np.float64) / np.asarray(b, np.float64)
    np.testing.assert_array_equal(ratio(a, b), expected)


def test_a_series_is_as_good_as_a_panel_and_an_empty_one_too() -> None:
    np.testing.assert_array_equal(positive(np.array([1.0, -1.0])), [1.0, np.nan])
    assert positive(np.empty((0, 3))).shape == (0, 3)


def test_the_given_output_is_filled() -> None:
    out = np.zeros((8, 5))
    ratio(PANEL, 2.0, out=out[1:])
    np.testing.assert_array_equal(out, np.vstack([np.zeros((1, 5)), PANEL / 2.0]))


@pytest.mark.parametrize("out", [np.zeros((8, 5)), np.zeros((7, 5), order="F"), np.zeros((7, 10))[:, ::2]])
def test_an_output_that_would_not_be_filled_is_refused(out: np.ndarray) -> None:
    with pytest.raises(ValueError, match="ratio: expected out of shape"):
        ratio(PANEL, 2.0, out=out)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="broadcast"):
        ratio(PANEL, PANEL[:, :2])
