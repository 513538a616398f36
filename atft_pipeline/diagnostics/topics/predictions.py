"""The stored predictions: whether they rank the stocks, and whether the recorded figures follow from them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from atft_pipeline.config.schema import HORIZONS
from atft_pipeline.diagnostics import questions
from atft_pipeline.diagnostics.changes import lowered, raised
from atft_pipeline.diagnostics.curve_statistics import (
    last,
)
from atft_pipeline.diagnostics.rule import Rule, all_of
from atft_pipeline.diagnostics.run_inputs import RunInputs
from atft_pipeline.diagnostics.signal import Audit, SignalTable, Value
from atft_pipeline.evaluation.portfolio import long_short
from atft_pipeline.inspection.reader import Record, read_scores

SIGNALS = SignalTable()

STORED_SHARPE_TOLERANCE = 1e-3
"""Tolerance of a Sharpe that is computed again from stored float32 scores."""
TARGET_CLIP = 5.0
"""Standard deviations at which the loss clips a target."""


@SIGNALS.add
def predictions_sharpe_gap(record: Record) -> float | None:
    """Largest |evals.sharpe_daily - Sharpe of the stored predictions|, criterion epoch and last epoch.

    On the slice `liquid` of each stored split, with the portfolio of the evaluation.
    """
    gaps = []
    for epoch in {record.criterion_epoch, max(record.predictions, default=0)} & set(record.predictions):
        path = record.predictions[epoch]
        recorded = record.rows(
            """SELECT split, value FROM evals
               WHERE epoch = ? AND slice = 'liquid' AND metric = 'sharpe_daily' AND isfinite(value)""",
            epoch,
        )
        table = read_scores(path, [1]) if recorded else None
        for split, value in recorded if table is not None else []:
            recomputed = _portfolio_sharpe(record, table, str(split))
            if recomputed is not None:
                gaps.append(abs(float(value) - recomputed))
    return max(gaps, default=None)


def _portfolio_sharpe(record: Record, table: pa.Table, split: str) -> float | None:
    rows = table.filter(pc.and_(pc.equal(table["split"], split), table["is_liquid"]))
    if not rows.num_rows:
        return None
    dates, session = np.unique(rows["Date"].to_numpy(), return_inverse=True)
    codes = rows["Code"].combine_chunks().dictionary_encode()
    by_code = np.argsort(np.argsort(codes.dictionary.to_pylist()))  # ties break by code, so columns are sorted by it
    stock = by_code[codes.indices.to_numpy()]
    scores, targets = (np.full((len(dates), len(by_code)), np.nan) for _ in range(2))
    scores[session, stock] = rows["score_1d"].to_numpy()
    targets[session, stock] = rows["target_1d"].to_numpy()
    quantile = record.number("evaluation.quantile", 0.2)
    gross = long_short(scores, targets, quantile=quantile, cost_bps=0.0).gross
    return _sharpe(gross[np.isfinite(gross)])


def _sharpe(gross: NDArray[np.float64]) -> float | None:
    spread = float(np.std(gross, ddof=1)) if len(gross) > 1 else 0.0
    return float(np.mean(gross)) / spread if spread > 0 else None


@SIGNALS.add
def score_dispersion(record: Record) -> float | None:
    """Median over sessions of the std of scores, from the newest stored predictions, else the recorded ratio.

    Standardised targets have std 1, so this is on the scale of the guard's dispersion ratio.
    """
    for epoch in sorted(record.predictions, reverse=True):
        table = read_scores(record.predictions[epoch], [1])
        if table is None or not table.num_rows:
            continue
        record.connection.register("scores", table)
        ratio = record.scalar(
            """SELECT median(s) FROM (SELECT stddev_samp(score_1d) AS s FROM scores
                 WHERE isfinite(score_1d) GROUP BY Date, split HAVING count(*) > 1)"""
        )
        record.connection.unregister("scores")
        if ratio is not None:
            return ratio
    return last(record.curve("dispersion_ratio", split="validation"))


@SIGNALS.add
def invalid_evaluations(record: Record) -> float | None:
    return record.scalar("SELECT sum(CASE WHEN value = 0 THEN 1 ELSE 0 END) FROM evals WHERE metric = 'valid'")


def _scores_agree(inputs: RunInputs) -> dict[str, Value]:
    """Compares the stored scores with the figures that the record has of them."""
    record, (epoch, table) = inputs.record, inputs.validation_scores
    correlated = record.rows(
        """WITH own AS (SELECT Date AS date, corr(score_1d::DOUBLE, target_1d::DOUBLE) AS ic FROM scored
                        WHERE isfinite(target_1d) AND (is_liquid OR $1 = 'all') GROUP BY Date)
           SELECT corr(own.ic, d.ic), count(*) FROM own JOIN daily d USING (date)
           WHERE d.split = 'validation' AND d.slice = $1 AND d.epoch = $2 AND isfinite(d.ic) AND isfinite(own.ic)""",
        record.slice,
        epoch,
    )[0]
    ties = record.scalar(
        """SELECT avg((n > 1)::INT) FROM (SELECT count(*) OVER (PARTITION BY Date, score_1d) AS n FROM scored
                                          WHERE isfinite(score_1d))"""
    )
    gaps = _squared_error_gaps(record, epoch, table)
    return {
        "predicted_ic_correlation": float(correlated[0]) if correlated[0] is not None and correlated[1] > 2 else None,
        "tied_scores": ties,
        "squared_error_gap": gaps[0],
        "squared_error_gap_negated": gaps[1],
    }


def _squared_error_gaps(record: Record, epoch: int, table: pa.Table) -> tuple[float | None, float | None]:
    """|recorded - recomputed| mean squared error of the validation scores, as stored and with the opposite sign."""
    recorded = record.curve("loss_raw", split="validation", term="mse").get(epoch)
    weights = record.config("train.loss.horizon_weights")
    if recorded is None or not isinstance(weights, list) or len(weights) != len(HORIZONS):
        return None, None
    if not np.isfinite(table["score_1d"].to_numpy()).any():
        return None, None
    session = np.unique(table["Date"].to_numpy(), return_inverse=True)[1]
    errors = [_squared_error(session, table, horizon) for horizon in HORIZONS]
    share = np.array(weights, float) / sum(weights)
    plain, negated = (float(share @ np.array([error[side] for error in errors])) for side in (0, 1))
    return abs(plain - recorded), abs(negated - recorded)


def _squared_error(session: NDArray[np.int64], table: pa.Table, horizon: int) -> tuple[float, float]:
    """Mean over sessions of the mean over stocks, for score and for minus score."""
    score = table[f"score_{horizon}d"].to_numpy().astype(np.float64)
    target = table[f"target_{horizon}d"].to_numpy().astype(np.float64)
    measured = np.isfinite(target) & np.isfinite(score)
    session, score, target = session[measured], score[measured], target[measured]
    count = np.maximum(np.bincount(session), 1)
    centred = target - (np.bincount(session, target) / count)[session]
    std = np.sqrt(np.bincount(session, centred**2) / count)
    usable = (std > 0) & (np.bincount(session) >= 2)
    z = np.clip(centred / np.where(std > 0, std, 1.0)[session], -TARGET_CLIP, TARGET_CLIP)

    def mean(values: NDArray[np.float64]) -> float:
        by_session = np.bincount(session, values) / count
        return float(by_session[usable].mean()) if usable.any() else 0.0

    return mean((score - z) ** 2), mean((score + z) ** 2)


AUDITS: tuple[Audit, ...] = (
    Audit(
        (
            "predicted_ic_correlation",
            "tied_scores",
            "squared_error_gap",
            "squared_error_gap_negated",
        ),
        _scores_agree,
    ),
)


RULES: tuple[Rule, ...] = (
    Rule(
        id="sharpe_not_of_predictions",
        cause="the recorded Sharpe does not follow from this run's stored predictions",
        group="validity",
        severity="invalid",
        when=all_of(("predictions_sharpe_gap", ">", STORED_SHARPE_TOLERANCE)),
        evidence=(
            "the portfolio of predictions/ has a Sharpe up to {predictions_sharpe_gap:.2g} away from evals.sharpe_daily"
        ),
        next_step="compute the figures again from the stored predictions: {evaluate}",
        question=questions.SHARPE_IS_OWN,
        channel="figures from predictions",
        suspects=("metric_of_other_run", "unit_of_sharpe"),
    ),
    Rule(
        id="predictions_constant",
        cause="the predictions are constant within a session: there is no ranking to evaluate",
        group="validity",
        severity="invalid",
        when=all_of(("score_dispersion", "<", 1e-6)),
        evidence="std of the scores within a session, median: {score_dispersion:.2g}",
        next_step="reset the head earlier and weigh the IC term more",
        changes=(
            lowered("train.guard.patience", 1 / 3, at_least=1),
            raised("train.loss.ic", 2, at_least=0.5),
        ),
        question=questions.DEGENERATE,
        channel="dispersion",
        suspects=("predictions_collapse", "zeros_reach_head", "no_dispersion"),
    ),
    Rule(
        id="evaluation_invalid",
        cause="evaluations were refused: scores constant or not finite",
        group="validity",
        severity="invalid",
        when=all_of(("invalid_evaluations", ">", 0)),
        evidence="{invalid_evaluations:.0f} evaluations with valid = 0",
        next_step="read the reason at one epoch: {evaluate}",
        question=questions.DEGENERATE,
        channel="refused",
        suspects=("predictions_collapse", "zeros_reach_head", "no_dispersion"),
    ),
    Rule(
        id="scores_negated",
        cause="the evaluated scores have the opposite sign of those in the loss",
        group="validity",
        severity="invalid",
        when=all_of(("squared_error_gap", ">", 1e-4), ("squared_error_gap_negated", "<", 1e-6)),
        evidence="the recorded squared error is that of the stored scores with the opposite sign",
        next_step="look for a minus sign between model and evaluation, then train again: {rerun}",
        question=questions.SHARPE_IS_OWN,
        channel="sign",
        suspects=("sign_inverted",),
    ),
    Rule(
        id="daily_ic_inverted",
        cause="the recorded daily ICs have the opposite sign of those of the stored predictions",
        group="validity",
        severity="invalid",
        when=all_of(("predicted_ic_correlation", "<", -0.99)),
        evidence="correlation of the daily ICs recorded and recomputed: {predicted_ic_correlation:.3f}",
        next_step="look for a minus sign between predictions and metric, then compute the figures again: {evaluate}",
        question=questions.SHARPE_IS_OWN,
        channel="sign",
        suspects=("sign_inverted",),
    ),
    Rule(
        id="daily_ic_of_other_scores",
        cause="the recorded daily ICs are not those of the stored predictions",
        group="validity",
        severity="invalid",
        when=all_of(("predicted_ic_correlation", "<", 0.99), ("predicted_ic_correlation", ">=", -0.99)),
        evidence="correlation of the daily ICs recorded and recomputed: {predicted_ic_correlation:.3f}",
        next_step="compute the figures again from the stored predictions: {evaluate}",
        question=questions.SHARPE_IS_OWN,
        channel="daily ic",
        suspects=("metric_of_other_run", "cached_predictions"),
    ),
    Rule(
        id="squared_error_not_of_predictions",
        cause="the recorded validation loss is not that of the stored predictions",
        group="validity",
        severity="invalid",
        when=all_of(("squared_error_gap", ">", 1e-4), ("squared_error_gap_negated", ">=", 1e-6)),
        evidence="the recorded and the recomputed squared error differ by {squared_error_gap:.2g}",
        next_step="find what changes the scores between model and evaluation, then train again: {rerun}",
        question=questions.SHARPE_IS_OWN,
        channel="squared error",
        suspects=("unrankable_scores_ranked", "cached_predictions", "early_epoch_as_final"),
    ),
    Rule(
        id="constant_scores_accepted",
        cause="scores without dispersion were ranked",
        group="validity",
        severity="invalid",
        when=all_of(("score_dispersion", "<", 1e-12), ("invalid_evaluations", "<=", 0)),
        evidence="std of the scores within a session {score_dispersion:.2g}, and no evaluation was refused",
        next_step="refuse to rank constant scores, then compute the figures again: {evaluate}",
        question=questions.DEGENERATE,
        channel="constant accepted",
        suspects=("unrankable_scores_ranked",),
    ),
    Rule(
        id="scores_tied",
        cause="many stocks share one score: missing scores were filled",
        group="validity",
        severity="invalid",
        when=all_of(("tied_scores", ">", 0.02), ("score_dispersion", ">=", 1e-3)),
        evidence="{tied_scores:.0%} of the scores equal another score of their session to the last bit",
        next_step="find what fills missing scores, then train again: {rerun}",
        question=questions.DEGENERATE,
        channel="ties",
        suspects=("unrankable_scores_ranked",),
    ),
)
