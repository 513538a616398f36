"""Training health: every item has a case that passes and one that fails, and explains its value."""

from __future__ import annotations

import math

import pytest

from atft_pipeline.verdict.health import (
    finite_losses,
    gradients_reach_components,
    parameters_moved,
    predictions_not_constant,
)


@pytest.mark.parametrize(
    ("item", "passed"),
    [
        (finite_losses([0.3, 0.2]), True),
        (finite_losses([0.3, math.nan]), False),
        (finite_losses([math.inf]), False),
        (finite_losses([0.3, None]), False),
        (finite_losses([]), None),
        (gradients_reach_components({"gat": 1e-3, "fusion": 1e-7}), True),
        (gradients_reach_components({"gat": 9e-8, "fusion": 1e-3}), False),
        (gradients_reach_components({"gat": math.nan}), False),
        (gradients_reach_components({}), None),
        (parameters_moved({"gat": 0.1}), True),
        (parameters_moved({"gat": 0.1, "fusion": 0.0}), False),
        (parameters_moved({"gat": math.nan}), False),
        (parameters_moved({}), None),
        (predictions_not_constant(0.014), True),
        (predictions_not_constant(0.0009), False),
        (predictions_not_constant(0.0), False),
        (predictions_not_constant(None), None),
        (predictions_not_constant(math.nan), None),
    ],
)
def test_training_health(item, passed):
    assert item.passed is passed


def test_health_names_the_component():
    assert "in: gat" in gradients_reach_components({"gat": 0.0, "fusion": 1.0}).explanation
    assert "in: fusion" in parameters_moved({"gat": 1.0, "fusion": 0.0}).explanation
