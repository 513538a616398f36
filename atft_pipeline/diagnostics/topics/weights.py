"""Whether the Sharpe depends on the weights: hashes of weights and predictions over the epochs."""

from __future__ import annotations

import numpy as np

from atft_pipeline.diagnostics import questions
from atft_pipeline.diagnostics.changes import switched
from atft_pipeline.diagnostics.rule import Rule, all_of
from atft_pipeline.diagnostics.signal import SignalTable
from atft_pipeline.diagnostics.topics.reported_figures import RECOMPUTED_TOLERANCE
from atft_pipeline.inspection.reader import Record

SIGNALS = SignalTable()

STILL_LEARNING_LR = 1e-6
"""At or below this rate an averaged float32 weight may not move at all, so unchanged weights prove nothing."""


def moving_epochs(record: Record) -> set[int]:
    """Epochs whose learning rate was large enough to move weights; by configuration where no rate is recorded.

    Epochs in which no weight moved are left out: their evaluations must be the same.
    """
    rates, still = record.curve("lr"), _still_epochs(record)
    if not rates and record.number("train.optimizer.lr", 0.0) > STILL_LEARNING_LR:
        return {int(row[0]) for row in record.rows("SELECT DISTINCT epoch FROM evals")} - still
    return {epoch for epoch, lr in rates.items() if lr > STILL_LEARNING_LR} - still


def _still_epochs(record: Record) -> set[int]:
    """Epochs in which the measured step moved no weight."""
    curves = [record.curve("update_to_weight", component=name) for name in record.components("update_to_weight")]
    return {epoch for curve in curves for epoch in curve if all(other.get(epoch) == 0.0 for other in curves)}


@SIGNALS.add
def weights_hash_repeats(record: Record) -> float | None:
    """Evaluated epochs with the previous or the initial weights, although the rate was not 0."""
    initial = record.run.get("initial_weights_hash")
    return _hash_repeats(record, "weights_hash", str(initial) if initial else None)


@SIGNALS.add
def predictions_hash_repeats(record: Record) -> float | None:
    """Evaluated epochs with exactly the predictions of the previous evaluation, although the rate was not 0."""
    return _hash_repeats(record, "predictions_hash", None)


def _hash_repeats(record: Record, column: str, initial: str | None) -> float | None:
    hashes = dict(
        record.rows(
            f"""SELECT epoch, min({column}) FROM evals
                WHERE {column} IS NOT NULL AND split = 'validation' GROUP BY epoch ORDER BY epoch"""
        )
    )
    before = [initial, *hashes.values()][: len(hashes)]
    moving = moving_epochs(record)
    pairs = [
        (earlier, hashes[epoch]) for earlier, epoch in zip(before, hashes, strict=True) if earlier and epoch in moving
    ]
    return float(sum(now in (earlier, initial) for earlier, now in pairs)) if pairs else None


def _hashes(record: Record) -> dict[int, str]:
    return dict(
        record.rows(
            """SELECT epoch, min(weights_hash) FROM evals
               WHERE weights_hash IS NOT NULL AND split = 'validation' GROUP BY epoch ORDER BY epoch"""
        )
    )


@SIGNALS.add
def weights_hash_returns(record: Record) -> float | None:
    """Evaluations that repeat an earlier weights_hash after another one in between."""
    hashes = list(_hashes(record).values())
    if len(hashes) < 3:
        return None
    return float(sum(h in hashes[:i] and hashes[i - 1] != h for i, h in enumerate(hashes)))


@SIGNALS.add
def initial_hash_share(record: Record) -> float | None:
    """Share of evaluations with the initial weights, among those after epochs that moved weights."""
    still, initial = _still_epochs(record), record.run.get("initial_weights_hash")
    hashes = [value for epoch, value in _hashes(record).items() if epoch not in still]
    return float(np.mean([h == initial for h in hashes])) if initial and hashes else None


@SIGNALS.add
def sharpe_repeat_span(record: Record) -> float | None:
    """Epochs from the first to the last evaluation with the same Sharpe, to 12 digits, while the weights moved."""
    moving, values = moving_epochs(record), record.evaluation("sharpe_daily")
    seen: dict[float, list[int]] = {}
    for epoch, (value, _) in values.items():
        if epoch in moving:
            seen.setdefault(float(f"{value:.12g}"), []).append(epoch)
    if sum(map(len, seen.values())) < 2:
        return None
    return float(max(epochs[-1] - epochs[0] for epochs in seen.values()))


RULES: tuple[Rule, ...] = (
    Rule(
        id="sharpe_never_changes",
        cause="the same Sharpe at different epochs: it does not depend on the weights",
        group="validity",
        severity="invalid",
        when=all_of(("sharpe_repeat_span", ">=", 3)),
        evidence="one value, to 12 digits, over {sharpe_repeat_span:.0f} epochs of training ({sharpe_by_epoch})",
        next_step="compare dispersion and hashes of the evaluations, then train again into a fresh directory: {rerun}",
        question=questions.SHARPE_FOLLOWS_WEIGHTS,
        channel="hashes over epochs",
        suspects=("cached_predictions", "metric_of_other_run", "unrankable_scores_ranked", "wrong_checkpoint"),
    ),
    Rule(
        id="sharpe_alone_stands_still",
        cause="the Sharpe is constant while the predictions change: it was not measured on them",
        group="validity",
        severity="invalid",
        when=all_of(
            ("sharpe_repeat_span", ">=", 3),
            ("daily_sharpe_gap", ">", RECOMPUTED_TOLERANCE),
            ("predictions_hash_repeats", "<=", 0),
        ),
        evidence=(
            "one value over {sharpe_repeat_span:.0f} epochs ({sharpe_by_epoch}), although the hashes of the"
            " predictions differ; the Sharpe of the daily returns differs by up to {daily_sharpe_gap:.2g}"
        ),
        next_step="find where the figure is read from, then train again into a fresh directory: {rerun}",
        question=questions.SHARPE_IS_OWN,
        channel="sharpe stands still",
        suspects=("metric_of_other_run",),
    ),
    Rule(
        id="weights_never_change",
        cause="the evaluated weights did not change although the learning rate was not 0",
        group="validity",
        severity="invalid",
        when=all_of(("weights_hash_repeats", ">", 0)),
        evidence=(
            "{weights_hash_repeats:.0f} evaluations carry the weights_hash of the evaluation before, or of the initial"
            " weights; peak learning rate {lr_peak:.1e}"
        ),
        next_step="compare update_to_weight by component, then evaluate the raw weights",
        changes=(switched("train.weight_ema", 0.0),),
        question=questions.SHARPE_FOLLOWS_WEIGHTS,
        channel="hashes over epochs",
        suspects=("wrong_checkpoint", "initial_checkpoint"),
    ),
    Rule(
        id="predictions_never_change",
        cause="the predictions did not change although the weights were trained",
        group="validity",
        severity="invalid",
        when=all_of(("predictions_hash_repeats", ">", 0)),
        evidence="{predictions_hash_repeats:.0f} evaluations carry the predictions_hash of the evaluation before",
        next_step="compare the predictions of two epochs, then train again into a fresh directory: {rerun}",
        question=questions.SHARPE_FOLLOWS_WEIGHTS,
        channel="predictions over epochs",
        suspects=("cached_predictions", "wrong_checkpoint", "unrankable_scores_ranked", "initial_checkpoint"),
    ),
    Rule(
        id="weights_hash_returns",
        cause="an evaluation carries the weights of a much earlier epoch",
        group="validity",
        severity="invalid",
        when=all_of(("weights_hash_returns", ">", 0)),
        evidence="{weights_hash_returns:.0f} evaluations repeat a weights_hash after another one in between",
        next_step="train again into a fresh directory: {rerun}",
        question=questions.SHARPE_FOLLOWS_WEIGHTS,
        channel="hash returns",
        suspects=("early_epoch_as_final",),
    ),
    Rule(
        id="initial_weights_evaluated",
        cause="the weights evaluated are the initial ones",
        group="validity",
        severity="invalid",
        when=all_of(("initial_hash_share", ">", 0.5)),
        evidence="{initial_hash_share:.0%} of the evaluations carry the hash of the initial weights",
        next_step="check that the averaged weights are updated, and evaluate the raw weights",
        changes=(switched("train.weight_ema", 0.0),),
        question=questions.SHARPE_FOLLOWS_WEIGHTS,
        channel="initial weights",
        suspects=("initial_checkpoint",),
    ),
    Rule(
        id="weights_hash_stale",
        cause="from some epoch on the evaluated weights are constant while training continues",
        group="validity",
        severity="invalid",
        when=all_of(
            ("weights_hash_repeats", ">", 0), ("initial_hash_share", "<=", 0.5), ("weights_hash_returns", "<=", 0)
        ),
        evidence="{weights_hash_repeats:.0f} evaluations carry the weights_hash of the evaluation before",
        next_step="check that the averaged weights are updated, and evaluate the raw weights",
        changes=(switched("train.weight_ema", 0.0),),
        question=questions.SHARPE_FOLLOWS_WEIGHTS,
        channel="stale weights",
        suspects=("wrong_checkpoint",),
    ),
    Rule(
        id="predictions_stand_still",
        cause="the predictions are constant while the hashes of the weights change",
        group="validity",
        severity="invalid",
        when=all_of(
            ("predictions_hash_repeats", ">", 0), ("weights_hash_repeats", "<=", 0), ("score_dispersion", ">=", 1e-6)
        ),
        evidence=(
            "{predictions_hash_repeats:.0f} evaluations carry the predictions_hash of the evaluation before, with"
            " other weights"
        ),
        next_step="look for a cache or a fixed checkpoint between model and evaluation, then train again: {rerun}",
        question=questions.SHARPE_FOLLOWS_WEIGHTS,
        channel="predictions stand still",
        suspects=("cached_predictions",),
    ),
    Rule(
        id="predictions_not_of_checkpoint",
        cause="the stored predictions are not what this code scores with the checkpoint of their epoch",
        group="validity",
        severity="defect",
        when=all_of(("rescored_gap", ">", 0.05)),
        evidence=(
            "largest difference {rescored_gap:.2g} times the scores' spread, correlation {rescored_correlation:.3f};"
            " they match the checkpoint of epoch {rescored_epoch:.0f} (-1: none)"
        ),
        next_step="train again into a fresh directory: {rerun}",
        question=questions.SHARPE_FOLLOWS_WEIGHTS,
        channel="rescoring",
    ),
    Rule(
        id="predictions_minus_checkpoint",
        cause="the stored predictions have the opposite sign of what the checkpoint of their epoch scores",
        group="validity",
        severity="invalid",
        when=all_of(("rescored_correlation", "<", -0.99)),
        evidence="correlation of the stored scores with those computed again: {rescored_correlation:.3f}",
        next_step="look for a minus sign between model and evaluation, then train again: {rerun}",
        question=questions.SHARPE_IS_OWN,
        channel="sign",
        suspects=("sign_inverted",),
    ),
    Rule(
        id="predictions_of_early_checkpoint",
        cause="the stored predictions are those of an earlier epoch's checkpoint",
        group="validity",
        severity="invalid",
        when=all_of(("rescored_gap", ">", 0.05), ("rescored_epoch", ">=", 1)),
        evidence="they are what the checkpoint of epoch {rescored_epoch:.0f} scores",
        next_step="train again into a fresh directory: {rerun}",
        question=questions.SHARPE_FOLLOWS_WEIGHTS,
        channel="rescored epoch",
        suspects=("early_epoch_as_final", "cached_predictions", "wrong_checkpoint"),
    ),
)
