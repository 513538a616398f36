"""The best one-factor reversal: the score that a model has to beat."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atft_pipeline.errors import InputError
from atft_pipeline.evaluation import metrics
from atft_pipeline.evaluation.portfolio import long_short


@dataclass(frozen=True)
class Reversal:
    """One-factor score: `sign` times a trailing return, chosen on the training sessions alone."""

    scores: NDArray[np.float64]
    """[T, N], NaN outside the universe."""
    feature: str
    sign: int
    train_sharpe: float


REVERSAL_FEATURES: tuple[str, ...] = ("returns_1d", "returns_5d")


def one_factor_reversal(
    features: NDArray[np.floating],
    feature_names: Sequence[str],
    targets: NDArray[np.floating],
    member: NDArray[np.bool_],
    train: NDArray[np.integer],
    *,
    quantile: float = 0.2,
) -> Reversal:
    """The better of the 1- and 5-session return as a score, with the sign that earned more in training.

    features [T, N, F], targets [T, N] one-session forward returns, member [T, N]; `train` are the indices of the
    training sessions, the only ones whose targets are read. A member whose return is missing scores 0, the session's
    mean. It is called a reversal because the sign is usually negative; the sign that earned more in training is kept.

    Raises InputError where neither feature is present.
    """
    names = [name for name in REVERSAL_FEATURES if name in feature_names]
    if not names:
        raise InputError(f"reversal: expected one of the features {', '.join(REVERSAL_FEATURES)}, found neither")
    train_targets = np.where(member[train], targets[train], np.nan)
    best: Reversal | None = None
    for name in names:
        values = np.asarray(features[:, :, list(feature_names).index(name)], np.float64)
        returns = np.where(member, np.where(np.isfinite(values), values, 0.0), np.nan)
        for sign in (-1, 1):
            earned = metrics.sharpe(
                long_short(sign * returns[train], train_targets, quantile=quantile, cost_bps=0.0).gross
            )
            earned = earned if math.isfinite(earned) else -math.inf
            if best is None or earned > best.train_sharpe:
                best = Reversal(sign * returns, name, sign, earned)
    assert best is not None
    return best
