"""Scores of one horizon combined: standardised, averaged over models, blended with a weight from evidence, smoothed.

T sessions, N stocks. Scores are [T, N] panels, NaN outside the universe. Every step standardises the scores of a
session over its members, so that none of the parts outweighs another by its scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atft_pipeline.errors import InputError
from atft_pipeline.evaluation import metrics

Scores = NDArray[np.float64]


def standardised(scores: NDArray[np.floating]) -> Scores:
    """Z-scores of each session over its members [T, N], ddof 1; 0 in a session without dispersion, NaN stays NaN."""
    values: Scores = np.asarray(scores, np.float64)
    member = np.isfinite(values)
    count = member.sum(axis=1, keepdims=True)
    mean = np.where(member, values, 0.0).sum(axis=1, keepdims=True) / np.maximum(count, 1)
    centred = np.where(member, values - mean, 0.0)
    std = np.sqrt((centred**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1))
    # The rounding of a mean is no dispersion.
    usable = std > 1e-12 * np.abs(np.where(member, values, 0.0)).max(axis=1, keepdims=True, initial=0.0)
    return np.where(member, np.where(usable, centred / np.where(usable, std, 1.0), 0.0), np.nan)


def ensemble(members: Sequence[NDArray[np.floating]]) -> Scores:
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

    The average starts at a stock's first score. Sessions without a score leave it as it is, for up to `span_sessions`
    of them in a row; after more it is forgotten and starts again. NaN where the session has no score. Span 1 changes
    nothing. Nothing after a session moves its value.

    Raises InputError for a span below 1.
    """
    require_span(span_sessions)
    fresh = 2.0 / (span_sessions + 1.0)
    average = np.full(scores.shape[1], np.nan)
    missing = np.zeros(scores.shape[1], np.int64)
    out = np.full(scores.shape, np.nan)
    for t, now in enumerate(np.asarray(scores, np.float64)):
        seen = np.isfinite(now)
        missing = np.where(seen, 0, missing + 1)
        average[missing > span_sessions] = np.nan
        start = seen & np.isnan(average)
        average = np.where(start, now, np.where(seen, (1.0 - fresh) * average + fresh * now, average))
        out[t, seen] = average[seen]
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
    """Weight of `network` against `lightgbm`, both [T, N], from sessions that neither was fitted on: the validation.

    Let a and b be the mean ICs of the two standardised scores and c their mean correlation across stocks. The blend of
    weight w has the IC (w a + (1 - w) b) / sqrt(w^2 + (1 - w)^2 + 2 w (1 - w) c), largest at weights in proportion to
    a - c b and b - c a: the two-asset tangency portfolio with ICs as means. Taken at face value it follows noise, as
    two hundred sessions know an IC to a fifth of itself. Three steps keep that in check:

    1. Towards equal weights. The difference d = a - b is multiplied by max(0, 1 - (se / d)^2), se the standard error of
       its paired daily mean: the empirical-Bayes estimate around 0, d^2 - se^2 being what is left for the true one. A
       difference within its own error counts as none, which makes the weights equal; one of four errors keeps 94 % of
       itself, and the better part gets what it earned.
    2. Within [0, 1]. A part whose IC is below c times the other's only adds noise and gets nothing. Where that goes for
       both (their ICs are negative), the better one gets everything: the formula would pick the worst blend.
    3. Never behind on the evidence. Where the blend's own mean IC on these sessions is below the better part's, the
       better part gets everything. Two scores that are nearly one gain nothing by blending, and half of one that is
       behind costs half the difference with little noise in it: just what being behind by a standard error means.

    Over twelve kinds of simulated markets (tests/test_score_panels.py, 200 draws each) the blend's true IC is behind
    the better part's by at most a quarter of the standard error that the paired difference has over as many test
    sessions, on average, and by more than one in at most 12 % of the draws; those sessions show it more than one behind
    in at most 17 %, where chance alone shows 16. Equal weights: 4.1, all draws, all draws.

    Raises InputError where neither score can be ranked in any session.
    Source: Grinold and Kahn, Active Portfolio Management (2000), for ICs as means; Breiman (1995), whose non-negative
    garrote is the same shrinkage.
    """
    known = np.isfinite(targets)
    first, second = (np.where(known, standardised(scores), np.nan) for scores in (network, lightgbm))
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
    pulls = [max(0.0, mine - correlation * other) for mine, other in ((a - shift, b + shift), (b + shift, a - shift))]
    better = 1.0 if difference >= 0.0 else 0.0
    weight, reason = better, "only the better part adds to the blend"
    if min(pulls) > 0.0:
        weight, reason = pulls[0] / sum(pulls), "largest IC of the blend, differences shrunk by their errors"
        ic_blend = metrics.information_coefficient(weight * first + (1.0 - weight) * second, targets)
        gain = _mean((ic_blend - (ic_first if better else ic_second))[both])
        if gain is None or gain < 0.0:
            weight, reason = better, "the blend is behind its better part on the validation sessions"
    return BlendWeight(weight, a, b, difference, metrics.finite_or_none(error), correlation, kept, reason)


def _mean(values: NDArray[np.float64]) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None
