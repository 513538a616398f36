"""Scores of models that a network has to beat, fitted on the same training sessions and judged by the same evaluation.

T sessions, N stocks, F features. Inputs are the panel's normalised features; a missing one is 0, the mean of its
session. Targets are the forward returns that the network is trained on: z-scores of each session over its universe
(ddof 1), clipped to ±5, of horizon 1 unless another is named. No fit reads a validation or test session.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from atft_pipeline.config.schema import HORIZONS, EvaluationConfig
from atft_pipeline.errors import InputError
from atft_pipeline.evaluation.evaluate import SPLITS, Evaluation, evaluate_panel
from atft_pipeline.evaluation.reversal import one_factor_reversal
from atft_pipeline.evaluation.slices import panel_of_slice

if TYPE_CHECKING:
    from atft_pipeline.batches.panel import Panel
    from atft_pipeline.dataset.splits import Split

TARGET_CLIP = 5.0
RIDGE_PENALTY = 0.01
"""Per training row. With standardised features each coefficient shrinks by about one percent, and features that are
exact copies of each other remain solvable."""

LIGHTGBM_TREES = 300
LIGHTGBM_LEAF_ROWS = 200
_LIGHTGBM: dict[str, object] = {
    "objective": "regression",
    "learning_rate": 0.05,
    "num_leaves": 31,
    "subsample": 0.8,
    "subsample_freq": 1,
    "colsample_bytree": 0.5,
    "reg_lambda": 1.0,
    "deterministic": True,
    "force_row_wise": True,
    "verbosity": -1,
}
"""Not tuned: many weak trees with large leaves, because one-day returns are nearly all noise."""

Features = NDArray[np.float32]


def standardised_targets(targets: NDArray[np.floating], member: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Per-session z-scores [T, N] of the members' targets, ddof 1, clipped to ±5.

    NaN outside the universe, where the target is missing, and in sessions with fewer than two or without dispersion.
    """
    has_target = member & np.isfinite(targets)
    count = has_target.sum(axis=1, keepdims=True)
    values = np.where(has_target, targets, 0.0).astype(np.float64)
    centred = np.where(has_target, values - values.sum(axis=1, keepdims=True) / np.maximum(count, 1), 0.0)
    std = np.sqrt((centred**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1))
    usable = has_target & (std > 0.0)
    return np.where(usable, np.clip(centred / np.where(std > 0.0, std, 1.0), -TARGET_CLIP, TARGET_CLIP), np.nan)


def ridge(X: Features, y: NDArray[np.float64], X_new: Features) -> NDArray[np.float64]:
    """Predictions [M] for X_new [M, F] of a ridge regression fitted on X [n, F], y [n]; X is left centred."""
    from sklearn.linear_model import Ridge

    model = Ridge(alpha=RIDGE_PENALTY * len(X), solver="cholesky", copy_X=False).fit(X, y.astype(np.float32))
    return np.asarray(model.predict(X_new), np.float64)


def lightgbm(X: Features, y: NDArray[np.float64], X_new: Features, *, seed: int) -> NDArray[np.float64]:
    """Predictions [M] of gradient-boosted trees fitted on X [n, F], y [n], for X_new [M, F]; the same for one seed."""
    from lightgbm import Booster, Dataset, train

    # At the leaf size that a large market needs, a small one has no split at all.
    leaf = min(LIGHTGBM_LEAF_ROWS, max(len(X) // 50, 1))
    settings = _LIGHTGBM | {"min_child_samples": leaf, "seed": seed}
    booster: Booster = train(settings, Dataset(X, label=y), num_boost_round=LIGHTGBM_TREES)
    return np.asarray(booster.predict(X_new), np.float64)


def fit_baselines(panel: Panel, split: Split, seed: int) -> dict[str, NDArray[np.float64]]:
    """Scores [T, N] of `ridge`, `lightgbm` and `reversal`; NaN except for members in validation and test sessions.

    `reversal` is the better of the 1- and 5-session reversal, sign included, decided on the training sessions.
    Raises InputError where no training row has a target.
    """
    X, y, X_new, asked = _rows(panel, split, horizon_sessions=1)
    scores = {
        "lightgbm": _placed(lightgbm(X, y, X_new, seed=seed), asked),
        "ridge": _placed(ridge(X, y, X_new), asked),
    }
    names, targets = panel.feature_names, panel.targets[:, :, HORIZONS.index(1)]
    factor = one_factor_reversal(panel.features, names, targets, panel.member, split.train).scores
    scores["reversal"] = np.where(asked, factor, np.nan)
    return scores


def evaluate_baselines(
    scores: Mapping[str, NDArray[np.float64]], panel: Panel, split: Split, config: EvaluationConfig
) -> dict[str, dict[str, Evaluation]]:
    """Model -> split -> evaluation, with bootstrap, of the scores of `fit_baselines`: that of the network."""
    return {
        model: {
            part: evaluate_panel(
                values[getattr(split, part)],
                panel_of_slice(panel, getattr(split, part), config.universe),
                config,
                bootstrap=True,
            )
            for part in SPLITS
        }
        for model, values in scores.items()
    }


def fit_ridge(panel: Panel, split: Split, asked: NDArray[np.int64]) -> NDArray[np.float64]:
    """Scores [T, N] of `ridge` on the sessions `asked`, which may include training sessions.

    NaN elsewhere and outside the universe. Raises InputError where no training row has a target.
    """
    X, y, _, _ = _rows(panel, split, horizon_sessions=1)
    cells = np.zeros(panel.member.shape, bool)
    cells[asked] = panel.member[asked]
    return _placed(ridge(X, y, _filled(panel.features[cells])), cells)


def fit_lightgbm(panel: Panel, split: Split, seed: int, *, horizon_sessions: int) -> NDArray[np.float64]:
    """Scores [T, N] of `lightgbm` fitted to the targets of one horizon; NaN except for members in validation and test.

    For horizon 1 they are those of `fit_baselines`. Raises InputError where no training row has a target.
    """
    X, y, X_new, asked = _rows(panel, split, horizon_sessions)
    return _placed(lightgbm(X, y, X_new, seed=seed), asked)


def _rows(
    panel: Panel, split: Split, horizon_sessions: int
) -> tuple[Features, NDArray[np.float64], Features, NDArray[np.bool_]]:
    """X [n, F] and y [n] of the training rows with a target, X_new [M, F] of the rows to score, and their cells [T, N].

    Every horizon is fitted on the same sessions: the purge is that of the longest.
    """
    targets = panel.targets[:, :, HORIZONS.index(horizon_sessions)]
    train = np.zeros(len(panel.sessions), bool)
    train[split.train] = True
    scored = np.zeros(len(panel.sessions), bool)
    scored[np.concatenate([split.validation, split.test])] = True
    # Only the training sessions are standardised, so that no other target can enter the fit.
    y = np.full(targets.shape, np.nan)
    y[train] = standardised_targets(targets[train], panel.member[train])
    fitted, asked = np.isfinite(y), panel.member & scored[:, None]
    if not fitted.any():
        raise InputError("baselines: no training row has a target; check the universe and the training sessions")
    return _filled(panel.features[fitted]), y[fitted], _filled(panel.features[asked]), asked


def _placed(values: NDArray[np.float64], asked: NDArray[np.bool_]) -> NDArray[np.float64]:
    scores = np.full(asked.shape, np.nan)
    scores[asked] = values
    return scores


def _filled(features: Features) -> Features:
    return np.nan_to_num(features, nan=0.0, posinf=0.0, neginf=0.0)
