"""Ensemble scores made: seeds averaged, blended with LightGBM, smoothed; each step only where it is asked for.

T sessions, N stocks in ascending code order. The runs are finished and differ in their seed alone; the score and its
parts are evaluated by the code that evaluated the runs. The formulas are in combine.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from atft_pipeline.batches.panel import load_panel
from atft_pipeline.config.schema import HORIZONS
from atft_pipeline.dataset.splits import make_split
from atft_pipeline.ensemble.combine import (
    BlendWeight,
    Scores,
    averaged,
    blend_weight,
    blended,
    require_span,
    smoothed,
    standardised,
)
from atft_pipeline.ensemble.ensemble_scores import ENSEMBLE, EnsembleScores, ic_difference
from atft_pipeline.ensemble.export import scores_manifest, scores_table
from atft_pipeline.ensemble.members import FinishedRun, Predictions, read_ensemble, read_predictions
from atft_pipeline.errors import InputError
from atft_pipeline.evaluation import metrics
from atft_pipeline.evaluation.baselines import fit_lightgbm
from atft_pipeline.evaluation.evaluate import SPLITS, Evaluation, EvaluationPanel, evaluate_panel
from atft_pipeline.evaluation.slices import slice_mask
from atft_pipeline.storage.artifact import (
    read_manifest,
)

Blend = Literal["none", "lightgbm"]

BLENDS: tuple[Blend, ...] = ("none", "lightgbm")


def combine_runs(
    run_dirs: Sequence[Path], *, horizon_sessions: int = 1, blend: Blend = "none", smoothing_sessions: int = 1
) -> EnsembleScores:
    """The score of one or several runs for one horizon, from the predictions of their last epoch.

    Several runs are an ensemble of seeds. `blend` lightgbm adds LightGBM, fitted for the horizon on the runs' dataset
    and training sessions, with a weight from the validation sessions of the evaluated slice. `smoothing_sessions` above
    1 smooths the result. Smoothing trades IC for turnover; the parts stay unsmoothed, and the part `blend` is the score
    before it. Longer horizons are evaluated in tranches.

    Raises InputError where the runs cannot be combined, an argument is out of range or the dataset is gone.
    """
    require_arguments(horizon_sessions, blend, smoothing_sessions)
    if not run_dirs:
        raise InputError("ensemble: no run directory given; name at least one")
    runs = read_ensemble(run_dirs)
    column = f"score_{horizon_sessions}d"
    rows, members = read_predictions(runs, column)
    network = averaged(list(members.values()))
    parts: dict[str, Scores] = {**(members if len(members) > 1 else {}), "network": network}
    score, weight = network, None
    if blend == "lightgbm":
        parts["lightgbm"] = standardised(_lightgbm_scores(runs[0], rows, horizon_sessions))
        weight = _weight_from_validation(runs[0], rows, parts, horizon_sessions)
        score = blended(network, parts["lightgbm"], weight.network)
    if smoothing_sessions > 1:
        if weight is not None:
            parts["blend"] = score  # without smoothing it is the ensemble's score itself
        score = _smoothed_within_splits(score, rows, smoothing_sessions)
    parts[ENSEMBLE] = score
    evaluations = _evaluations(runs[0], rows, parts, horizon_sessions)
    return EnsembleScores(
        table=scores_table(rows, parts, column),
        manifest=scores_manifest(
            runs,
            rows,
            list(parts),
            horizon_sessions=horizon_sessions,
            blend=blend,
            weight=weight,
            smoothing_sessions=smoothing_sessions,
        ),
        evaluations=evaluations,
        differences=_differences(evaluations, horizon_sessions, runs[0].config.evaluation.bootstrap_samples),
    )


def require_arguments(horizon_sessions: int, blend: str, smoothing_sessions: int) -> None:
    """Raises InputError for an argument of `combine_runs` that is out of range, before anything is read or trained."""
    if horizon_sessions not in HORIZONS:
        raise InputError(f"horizon: expected one of {', '.join(map(str, HORIZONS))}, found {horizon_sessions}")
    if blend not in BLENDS:
        raise InputError(f"blend: expected one of {', '.join(BLENDS)}, found {blend!r}")
    require_span(smoothing_sessions)


def _lightgbm_scores(run: FinishedRun, rows: Predictions, horizon_sessions: int) -> Scores:
    """Scores [T, N] of LightGBM for `rows`, fitted for one horizon on the sessions that the run was trained on.

    Raises InputError where the run's dataset is gone or is another one now.
    """
    dataset, expected = Path(run.header["dataset_path"]), run.header["dataset_fingerprint"]
    fingerprint = read_manifest(dataset, kind="ml_dataset")["fingerprint"]
    if fingerprint != expected:
        raise InputError(
            f"{dataset}: its fingerprint is {fingerprint[:12]}, {run.run_dir} was trained on {expected[:12]}; train the"
            " run again, or combine it without the blend"
        )
    panel = load_panel(dataset, run.config.train.universe)
    split = make_split(panel.sessions, run.config.split)
    scores = fit_lightgbm(panel, split, run.seed, horizon_sessions=horizon_sessions)
    t = np.searchsorted(panel.sessions, rows.sessions).clip(max=len(panel.sessions) - 1)
    n = np.searchsorted(panel.codes, rows.codes).clip(max=len(panel.codes) - 1)
    same = (panel.sessions[t] == rows.sessions).all() and (panel.codes[n] == rows.codes).all()
    aligned = scores[np.ix_(t, n)]
    if not same or not np.isfinite(aligned[rows.member]).all():
        raise InputError(f"{run.predictions}: has rows that {dataset} does not score; train the run again")
    return np.where(rows.member, aligned, np.nan)


def _weight_from_validation(
    run: FinishedRun, rows: Predictions, parts: Mapping[str, Scores], horizon_sessions: int
) -> BlendWeight:
    """The blend's weight from the validation sessions of the slice that the run is judged on."""
    judged = rows.of_split("validation")[:, None] & slice_mask(rows, run.config.evaluation.universe)
    targets = np.where(judged, rows.panel(f"target_{horizon_sessions}d"), np.nan)
    return blend_weight(parts["network"], parts["lightgbm"], targets, horizon_sessions)


def _smoothed_within_splits(score: Scores, rows: Predictions, span_sessions: int) -> Scores:
    """Each split smoothed on its own: the sessions between two splits have no score to carry an average over."""
    out = np.full(score.shape, np.nan)
    for split in SPLITS:
        sessions = rows.of_split(split)
        out[sessions] = smoothed(score[sessions], span_sessions)
    return out


def _evaluations(
    run: FinishedRun, rows: Predictions, parts: Mapping[str, Scores], horizon_sessions: int
) -> dict[str, dict[str, Evaluation]]:
    """Split -> part -> evaluation in the slice that the run is judged on."""
    config, days_per_year = run.config.evaluation, int(run.header["days_per_year"])
    member = slice_mask(rows, config.universe)
    targets, returns_1d = rows.panel(f"target_{horizon_sessions}d"), rows.panel("target_1d")
    bootstrap = metrics.can_bootstrap()
    evaluations: dict[str, dict[str, Evaluation]] = {}
    for split in SPLITS:
        of_split = rows.of_split(split)
        panel = EvaluationPanel(
            rows.sessions[of_split],
            rows.codes,
            targets[of_split],
            days_per_year,
            member[of_split],
            horizon_sessions,
            returns_1d[of_split],
        )
        evaluations[split] = {
            # As the table holds them: evaluating the file gives the same figures.
            part: evaluate_panel(scores[of_split].astype(np.float32), panel, config, bootstrap=bootstrap)
            for part, scores in parts.items()
        }
    return evaluations


def _differences(
    evaluations: Mapping[str, Mapping[str, Evaluation]], horizon_sessions: int, samples: int
) -> list[dict[str, Any]]:
    combined = ("blend", ENSEMBLE)
    return [
        {"split": split, "score": score, "part": part}
        | ic_difference(parts[score], evaluation, horizon_sessions=horizon_sessions, samples=samples)
        for split, parts in evaluations.items()
        for score in combined
        for part, evaluation in parts.items()
        if score in parts and part not in combined
    ]
