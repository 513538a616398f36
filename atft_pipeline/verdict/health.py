"""Training health: finite losses, gradients in every component, weights that moved, predictions that differ.

A failed health item is a warning; it does not change the verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from atft_pipeline.storage.json_values import finite_or_none

GRADIENT_FLOOR_L2 = 1e-7
"""Smallest mean gradient l2 at which a component counts as reached."""

HEALTHY_DISPERSION_RATIO = 1e-3
"""Smallest ratio of the predictions' std to the target's, within a session, at which predictions are not constant."""


@dataclass(frozen=True)
class HealthItem:
    """One measurement of training health against its tolerance."""

    name: str
    passed: bool | None
    """None: not recorded."""
    value: float | None
    tolerance: float | None
    explanation: str


def finite_losses(losses: Sequence[float | None]) -> HealthItem:
    """Passes when every recorded loss of a step or an epoch is finite. Value: how many are not."""
    if not losses:
        return HealthItem("finite_losses", None, None, 0.0, "no loss is recorded")
    broken = sum(finite_or_none(loss) is None for loss in losses)
    return HealthItem("finite_losses", broken == 0, float(broken), 0.0, f"{broken} of {len(losses)} losses not finite")


def gradients_reach_components(grad_l2: Mapping[str, float | None]) -> HealthItem:
    """Passes when every trainable component has a mean gradient l2 of at least 1e-7. Value: the smallest."""
    name = "gradients_reach_every_component"
    if not grad_l2:
        return HealthItem(name, None, None, GRADIENT_FLOOR_L2, "no component's gradient is recorded")
    sizes = {component: finite_or_none(l2) or 0.0 for component, l2 in grad_l2.items()}
    starved = sorted(component for component, l2 in sizes.items() if l2 < GRADIENT_FLOOR_L2)
    return HealthItem(
        name,
        not starved,
        min(sizes.values()),
        GRADIENT_FLOOR_L2,
        f"gradient l2 below {GRADIENT_FLOOR_L2:g} in: {', '.join(starved) or 'no component'}",
    )


def parameters_moved(movement: Mapping[str, float | None]) -> HealthItem:
    """Passes when the weights of every component differ from their initial ones. Value: the smallest movement.

    `movement`: component with trainable parameters -> l2 distance from its initial weights.
    """
    if not movement:
        return HealthItem("parameters_moved", None, None, 0.0, "no component's movement is recorded")
    distances = {component: finite_or_none(distance) or 0.0 for component, distance in movement.items()}
    still = sorted(component for component, distance in distances.items() if distance <= 0.0)
    return HealthItem(
        "parameters_moved",
        not still,
        min(distances.values()),
        0.0,
        f"weights unchanged since initialisation in: {', '.join(still) or 'no component'}",
    )


def predictions_not_constant(dispersion_ratio: float | None) -> HealthItem:
    """Passes when the last within-session std of predictions over the target's is at least 0.001."""
    name, floor = "predictions_not_constant", HEALTHY_DISPERSION_RATIO
    ratio = finite_or_none(dispersion_ratio)
    if ratio is None:
        return HealthItem(name, None, None, floor, "the dispersion of the predictions is not recorded")
    return HealthItem(name, ratio >= floor, ratio, floor, f"dispersion of predictions is {ratio:.2e} of the target's")
