"""How scores of one horizon are combined: standardised, averaged over models, blended with LightGBM, smoothed.

T sessions, N stocks. Scores are [T, N], NaN outside the universe. Every step standardises the scores of a session over
its members, so that no part outweighs another by its scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atft_pipeline.errors import InputError
from atft_pipeline.evaluation import metrics
from atft_pipeline.storage.json_values import finite_or_none

Scores = NDArray[np.float64]


def standardised(scores: NDArray[np.floating]) -> Scores:
    """Z-scores of each session over its members [T, N], ddof 1; 0 in a session without dispersion, NaN stays NaN."""
    values: Scores = np.asarray(scores, np.float64)
    member = np.isfinite(values)
    count = member.sum(axis=1, keepdims=True)
    mean = np.where(member, values, 0.0).sum(axis=1, keepdims=True) / np.maximum(count, 1)
    centred = np.where(member, values - mean, 0.0)
    std = np.sqrt((centred**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1))
    # A mean is rounded: a deviation of that size is no dispersion.
    usable = std > 1e-12 * np.abs(np.where(member, values, 0.0)).max(axis=1, keepdims=True, initial=0.0)
    return np.where(member, np.where(usable, centred / np.where(usable, std, 1.0), 0.0), np.nan)


def averaged(members: Sequence[NDArray[np.floating]]) -> Scores:
    """Mean of the standardised scores of several models [T, N], standardised again; NaN where one of them has none."""
    return standardised(np.mean([standardised(scores) for scores in members], axis=0))


def blended(network: NDArray[np.floating], lightgbm: NDArray[np.floating], weight: float) -> Scores:
    """`weight` of the network's standardised scores and the rest of LightGBM's [T, N], standardised again."""
    return standardised(weight * standardised(network) + (1.0 - weight) * standardised(lightgbm))


def require_span(span_sessions: int) -> None:
    """Raises InputError for a span below 1."""
    if span_sessions < 1:
        raise InputError(f"smoothing: expected a span of at least 1 session, found {span_sessions}")


def smoothed(scores: NDArray[np.floating], span_sessions: int) -> Scores:
    """Trailing average of each stock's scores [T, N] with weights that fall by (s - 1) / (s + 1) a session.

    The average starts at a stock's first score. Up to `span_sessions` sessions in a row without a score leave it as it
    is; after more it starts again. NaN where the session has no score. Span 1 changes nothing. Nothing after a session
    moves its value.

    Raises InputError for a span below 1.
    """
    require_span(span_sessions)
    fresh = 2.0 / (span_sessions + 1.0)
    average = np.full(scores.shape[1], np.nan)
    missing = np.zeros(scores.shape[1], np.int64)
    out = np.full(scores.shape, np.nan)
    for t, now in enumerate(np.asarray(scores, np.float64)):
        scored = np.isfinite(now)
        missing = np.where(scored, 0, missing + 1)
        average[missing > span_sessions] = np.nan
        starts = scored & np.isnan(average)
        average = np.where(starts, now, np.where(scored, (1.0 - fresh) * average + fresh * now, average))
        out[t, scored] = average[scored]
    return out


@dataclass(frozen=True)
class BlendWeight:
    """Weight of the network in the blend, and the daily ICs that it follows from."""

    network: float
    """In [0, 1]; LightGBM has the rest."""
    ic_network: float | None
    ic_lightgbm: float | None
    ic_difference: float | None
    """Mean over sessions of the network's daily IC minus LightGBM's."""
    ic_difference_se: float | None
    score_correlation: float | None
    """Mean over sessions of the correlation of the two scores across stocks."""
    difference_kept: float
    """Share of the difference that is not put down to chance."""
    reason: str


def blend_weight(
    network: NDArray[np.floating],
    lightgbm: NDArray[np.floating],
    targets: NDArray[np.floating],
    horizon_sessions: int = 1,
) -> BlendWeight:
    """Weight of `network` against `lightgbm`, both [T, N], from the validation sessions, which neither was fitted on.

    Let a and b be the mean ICs of the two standardised scores and c their mean correlation across stocks. The blend of
    weight w has the IC (w a + (1 - w) b) / sqrt(w^2 + (1 - w)^2 + 2 w (1 - w) c), largest at weights in proportion to
    a - c b and b - c a: the two-asset tangency portfolio with ICs as means. Used as it is, that weight follows noise:
    over two hundred sessions the standard error of an IC is a fifth of it. Three steps limit this:

    1. Shrink towards equal weights. Multiply the difference d = a - b by max(0, 1 - (se / d)^2), se being the standard
       error of its paired daily mean. This is the empirical-Bayes estimate around 0: d^2 - se^2 estimates the square of
       the true difference. A difference within its own error counts as none and the weights are equal; one of four
       errors keeps 94 % of itself.
    2. Stay within [0, 1]. A part whose IC is below c times the other's only adds noise and gets nothing. Where that
       holds for both (their ICs are negative), the better one gets everything: the formula would pick the worst blend.
    3. Never be behind on the validation. Where the blend's own mean IC on these sessions is below the better part's,
       the better part gets everything. Two scores that are nearly the same gain nothing by blending, and half of the
       worse one costs half the difference, which is measured with little noise.

    Over twelve kinds of simulated markets (tests/ensemble/test_combine.py, 200 draws each) the blend's true IC is on
    average behind the better part's by at most a quarter of a standard error of their paired difference over as many
    test sessions. It is behind by more than one standard error in at most 12 % of the draws; the test sessions show
    that in at most 17 %, where chance alone shows 16. Equal weights: 4.1 errors, all draws, all draws.

    Raises InputError where neither score can be ranked in any session.
    Source: Grinold and Kahn, Active Portfolio Management (2000), for ICs as means; Breiman (1995), whose non-negative
    garrote is the same shrinkage.
    """
    has_target = np.isfinite(targets)
    first, second = (np.where(has_target, standardised(scores), np.nan) for scores in (network, lightgbm))
    ic_first, ic_second = (metrics.information_coefficient(scores, targets) for scores in (first, second))
    both = np.isfinite(ic_first) & np.isfinite(ic_second)
    a, b = _mean(ic_first), _mean(ic_second)
    if not both.any():
        if a is None and b is None:
            raise InputError("blend: neither part can be ranked in a validation session; look at their scores")
        reason = f"{'LightGBM' if b is None else 'the network'} cannot be ranked in any validation session"
        return BlendWeight(float(b is None), a, b, None, None, None, 0.0, reason)
    a, b = float(ic_first[both].mean()), float(ic_second[both].mean())
    difference, error = metrics.mean_and_error(ic_first[both] - ic_second[both], horizon_sessions)
    correlation = float(metrics.information_coefficient(first, second)[both].mean())
    kept = max(0.0, 1.0 - (error / difference) ** 2) if difference and math.isfinite(error) else 0.0

    shift = (1.0 - kept) * difference / 2.0
    shrunk = (a - shift, b + shift)
    proportions = [max(0.0, ic - correlation * other) for ic, other in (shrunk, shrunk[::-1])]
    better = 1.0 if difference >= 0.0 else 0.0
    weight, reason = better, "only the better part adds to the blend"
    if min(proportions) > 0.0:
        weight = proportions[0] / sum(proportions)
        reason = "largest IC of the blend, differences shrunk by their errors"
        ic_blend = metrics.information_coefficient(weight * first + (1.0 - weight) * second, targets)
        gain = _mean((ic_blend - (ic_first if better else ic_second))[both])
        if gain is None or gain < 0.0:
            weight, reason = better, "the blend is behind its better part on the validation sessions"
    return BlendWeight(weight, a, b, difference, finite_or_none(error), correlation, kept, reason)


def _mean(values: NDArray[np.float64]) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None
