"""Statistics of each feature's values, month by month: all are sums, so a dataset's are the sum of its months'.

Quantiles are read from a histogram of the upper 16 bits of each float32: sign, exponent and 7 bits of the mantissa. So
a quantile is exact to one part in 256, and months can be added without their values.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from atft_pipeline.storage.atomic import load_arrays

BINS = 1 << 16
DRIFT_WARNING = 0.5
"""A warning is given above this shift of a feature's mean or tail, in earlier standard deviations, and above this log
ratio of the two standard deviations."""

NULL_SHARE_WARNING = 0.10
"""Share of all rows by which a feature's nulls may grow from one dataset to the next without a warning."""


@njit(cache=True, nogil=True)
def _tally(values: Any, moments: Any, bins: Any, counts: Any) -> Any:
    """Fills moments `[F, 4]`, and the filled bins of all features with their counts; returns how many bins are filled.

    A bin is `feature * BINS + bin of the value`.
    """
    F, R = values.shape
    filled = 0
    histogram = np.empty(BINS, np.int32)
    for f in range(F):
        row = values[f]
        bits = row.view(np.uint32)
        histogram[:] = 0
        count, total, squares, positive = 0.0, 0.0, 0.0, 0.0
        for i in range(R):
            value = np.float64(row[i])
            if value == value:
                histogram[bits[i] >> np.uint32(16)] += 1
                count += 1.0
                total += value
                squares += value * value
                positive += 1.0 if value > 0.0 else 0.0
        moments[f, 0], moments[f, 1], moments[f, 2], moments[f, 3] = count, total, squares, positive
        for b in range(BINS):
            if histogram[b]:
                bins[filled] = f * BINS + b
                counts[filled] = histogram[b]
                filled += 1
    return filled


@dataclass(frozen=True)
class Statistics:
    """Statistics of F features over some rows."""

    rows: int
    moments: NDArray[np.float64]
    """[F, 4] count, sum and sum of squares of the non-null values, and the count of values above 0."""
    bins: NDArray[np.int64]
    """[B] filled bins, `feature * BINS + upper 16 bits of the value`, ascending."""
    counts: NDArray[np.int64]
    """[B] number of values in each bin."""

    @staticmethod
    def of(values: NDArray[np.float32]) -> Statistics:
        """values: `[F, R]`, NaN where missing."""
        F, R = values.shape
        moments = np.zeros((F, 4))
        bins, counts = np.empty(F * min(R, BINS), np.int64), np.empty(F * min(R, BINS), np.int64)
        filled = _tally(np.ascontiguousarray(values), moments, bins, counts)
        return Statistics(R, moments, bins[:filled].copy(), counts[:filled].copy())

    @staticmethod
    def total(by_month: Iterable[Statistics], features: int) -> Statistics:
        """The sum in the order of `by_month`: equal statistics in equal order give the same sum to the last bit."""
        rows, moments, histogram = 0, np.zeros((features, 4)), np.zeros(features * BINS, np.int64)
        for month in by_month:
            rows += month.rows
            moments += month.moments
            histogram[month.bins] += month.counts
        filled = np.flatnonzero(histogram)
        return Statistics(rows, moments, filled, histogram[filled])

    def save(self, path: Path) -> None:
        np.savez(
            path,
            rows=self.rows,
            moments=self.moments,
            bins=self.bins.astype(np.int32),
            counts=self.counts.astype(np.int32),
        )

    @staticmethod
    def load(path: Path) -> Statistics:
        saved = load_arrays(path)
        return Statistics(int(saved["rows"]), saved["moments"], saved["bins"], saved["counts"])

    def describe(self, number: int) -> dict[str, float | None]:
        """live_share, null_share, mean, std (ddof 0), p01 and p99 of one feature; the last four null without values."""
        count, total, squares, _ = self.moments[number]
        live = count / self.rows if self.rows else 0.0
        shares = {"live_share": live, "null_share": 1.0 - live}
        if count == 0:
            return shares | {"mean": None, "std": None, "p01": None, "p99": None}
        if not np.isfinite(squares):  # JSON cannot hold an infinite value; the dataset's contract reports it
            return shares | {"mean": None, "std": None, "p01": None, "p99": None}
        mean = total / count
        return shares | {
            "mean": mean,
            "std": float(np.sqrt(max(squares / count - mean * mean, 0.0))),
            "p01": self._quantile(number, 0.01),
            "p99": self._quantile(number, 0.99),
        }

    def has_values(self, number: int, *, above_zero: bool) -> bool:
        """Whether any row has a value, or with `above_zero` a value above 0."""
        return bool(self.moments[number, 3 if above_zero else 0] > 0)

    def _quantile(self, number: int, level: float) -> float:
        bins_of_feature = slice(*np.searchsorted(self.bins, (number * BINS, (number + 1) * BINS)))
        upper = (self.bins[bins_of_feature] % BINS).astype(np.uint32)
        middles = ((upper << np.uint32(16)) | np.uint32(0x8000)).view(np.float32)
        middles[upper % (BINS // 2) == 0] = 0.0  # both zeros, and values too small to tell from them
        order = np.argsort(middles, kind="stable")
        ranks = np.cumsum(self.counts[bins_of_feature][order])
        return float(middles[order][np.searchsorted(ranks, level * (ranks[-1] - 1), side="right")])


def drift(now: dict[str, float | None], before: dict[str, float | None]) -> dict[str, float | None]:
    """How far a feature's statistics have moved since an earlier manifest.

    mean_shift: change of the mean in earlier standard deviations; std_log_ratio: ln of the ratio of the standard
    deviations; tail_shift: change of the 1st or the 99th percentile, whichever moved more, in earlier standard
    deviations; null_share_change: in shares of the rows. Null where one of the two has no value or no spread. A feature
    that is normalised per session always keeps its mean and spread: its drift shows in tails and nulls.
    """
    null_change = None
    if now.get("null_share") is not None and before.get("null_share") is not None:
        null_change = now["null_share"] - before["null_share"]  # type: ignore[operator]
    shift, ratio, tail = None, None, None
    if now.get("mean") is not None and before.get("mean") is not None and before.get("std"):
        shift = (now["mean"] - before["mean"]) / before["std"]  # type: ignore[operator]
        ratio = float(np.log(now["std"] / before["std"])) if now["std"] else None  # type: ignore[operator]
        tail = max((now[p] - before[p] for p in ("p01", "p99")), key=abs) / before["std"]  # type: ignore[operator]
    return {"mean_shift": shift, "std_log_ratio": ratio, "tail_shift": tail, "null_share_change": null_change}
