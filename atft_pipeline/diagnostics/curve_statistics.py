"""Statistics of a run's curves by epoch that several topics measure.

"Early" and "late" are means over the first and the last quarter of the epochs, at least one each.
"""

from __future__ import annotations

import numpy as np

from atft_pipeline.inspection.reader import Curve, Record

MIN_TREND_EPOCHS = 5
"""Fewer epochs show no trend."""


def last(curve: Curve) -> float | None:
    return curve[max(curve)] if curve else None


def median(curve: Curve) -> float | None:
    """Median over the epochs."""
    return float(np.median(list(curve.values()))) if curve else None


def early_and_late(curve: Curve) -> tuple[float, float]:
    values = list(curve.values())
    quarter = max(1, len(values) // 4)
    return float(np.mean(values[:quarter])), float(np.mean(values[-quarter:]))


def medians_by_component(record: Record, metric: str) -> dict[str, float]:
    """Component -> median over the epochs."""
    medians = {name: median(record.curve(metric, component=name)) for name in record.components(metric)}
    return {name: value for name, value in medians.items() if value is not None}


def total(record: Record, metric: str) -> float | None:
    """Sum over epochs and components."""
    return record.scalar("SELECT sum(value) FROM series WHERE metric = ? AND step IS NULL AND isfinite(value)", metric)
