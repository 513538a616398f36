"""Loss curves: whether training and validation fall, and how far they part."""

from __future__ import annotations

import numpy as np

from atft_pipeline.diagnostics import questions
from atft_pipeline.diagnostics.changes import lowered, raised
from atft_pipeline.diagnostics.curve_statistics import (
    MIN_TREND_EPOCHS,
    early_and_late,
)
from atft_pipeline.diagnostics.rule import SHARPE_IS_LOW, Rule, all_of
from atft_pipeline.diagnostics.signal import SignalTable
from atft_pipeline.inspection.reader import Curve, Record

SIGNALS = SignalTable()

FLAT_LOSS = 2e-4
"""Relative change under which a loss counts as flat. With standardised targets the mse can fall by IC² only, 0.0009 for
an IC of 0.03, so a threshold of one per cent would call every healthy run flat."""
TREND_TAU = 0.3
"""Kendall's tau over the epochs under which a curve counts as flat, so that noise around a level is no trend."""
LATE_EPOCHS = 6
"""Fewer epochs are not judged: early in training every loss is worse than a constant's."""


def loss_curve(record: Record, split: str) -> Curve:
    """Weighted total loss by epoch; the raw mse where phases change the weights, so that totals cannot be compared."""
    changing = record.scalar(
        """SELECT count(*) FROM (SELECT term FROM series WHERE metric = 'loss_weight' AND step IS NULL
                                 GROUP BY term HAVING max(value) > min(value))"""
    )
    if changing:
        return record.curve("loss_raw", split=split, term="mse")
    return record.curve("loss_weighted", split=split, term="total")


@SIGNALS.add
def train_loss_fall(record: Record) -> float | None:
    return _relative_fall(loss_curve(record, "train"))


@SIGNALS.add
def validation_loss_fall(record: Record) -> float | None:
    return _relative_fall(loss_curve(record, "validation"))


def _relative_fall(curve: Curve) -> float | None:
    """(early - late) / |early|, negative for a rise; 0 where tau sees no trend; None under MIN_TREND_EPOCHS."""
    if len(curve) < MIN_TREND_EPOCHS:
        return None
    values = np.asarray(list(curve.values()))
    first, second = np.triu_indices(len(values), 1)
    tau = float(np.sign(values[second] - values[first]).mean())
    if abs(tau) < TREND_TAU:
        return 0.0
    early, late = early_and_late(curve)
    return (early - late) / max(abs(early), 1e-12)


@SIGNALS.add
def validation_best_share(record: Record) -> float | None:
    """Epoch of the lowest validation loss as a share of the epochs done."""
    curve = loss_curve(record, "validation")
    return min(curve, key=curve.__getitem__) / max(curve) if len(curve) >= MIN_TREND_EPOCHS else None


@SIGNALS.add
def validation_best_epoch(record: Record) -> float | None:
    curve = loss_curve(record, "validation")
    return float(min(curve, key=curve.__getitem__)) if curve else None


@SIGNALS.add
def train_fall_after_best(record: Record) -> float | None:
    """Relative fall of the train loss from the epoch of the lowest validation loss to the end."""
    train, best = loss_curve(record, "train"), validation_best_epoch(record)
    if best is None or int(best) not in train or len(train) < MIN_TREND_EPOCHS:
        return None
    start = train[int(best)]
    return (start - train[max(train)]) / max(abs(start), 1e-12)


@SIGNALS.add
def validation_rise(record: Record) -> float | None:
    """(late - lowest) / |lowest| of the validation loss."""
    curve = loss_curve(record, "validation")
    if len(curve) < MIN_TREND_EPOCHS:
        return None
    lowest = min(curve.values())
    return (early_and_late(curve)[1] - lowest) / max(abs(lowest), 1e-12)


@SIGNALS.add
def validation_rise_of_gain(record: Record) -> float | None:
    """The same rise as a share of the fall before it; at 1 the whole fall is undone."""
    curve = loss_curve(record, "validation")
    if len(curve) < MIN_TREND_EPOCHS:
        return None
    first, lowest = next(iter(curve.values())), min(curve.values())
    return (early_and_late(curve)[1] - lowest) / max(first - lowest, 1e-12)


@SIGNALS.add
def train_gain(record: Record) -> float | None:
    """1 - mean squared error of standardised targets, mean of the last quarter of the epochs: the variance fitted."""
    return _late_gain(record, "train")


@SIGNALS.add
def validation_gain(record: Record) -> float | None:
    """The same on validation; below 0 the predictions are worse than a constant."""
    return _late_gain(record, "validation")


def _late_gain(record: Record, split: str) -> float | None:
    values = list(record.curve("loss_raw", split=split, term="mse").values())
    return 1.0 - float(np.mean(values[-(len(values) // 4 or 1) :])) if len(values) >= LATE_EPOCHS else None


@SIGNALS.add
def loss_spike(record: Record) -> float | None:
    """(largest - median) over the range from the 10th to the 90th percentile of the step losses after epoch 1.

    The epoch after a reset of the head is left out, because the reset causes that jump.
    """
    (row,) = record.rows(
        """SELECT (max(value) - median(value)) / nullif(quantile_cont(value, 0.9) - quantile_cont(value, 0.1), 0)
           FROM series WHERE metric = 'loss' AND step IS NOT NULL AND epoch > 1 AND isfinite(value)
           AND epoch NOT IN (SELECT epoch + 1 FROM series WHERE metric = 'degeneracy_reset' AND value > 0)"""
    )
    return None if row[0] is None else float(row[0])


RULES: tuple[Rule, ...] = (
    Rule(
        id="validation_flat_early",
        cause="overfitting: validation stops improving early while the train loss keeps falling",
        group="curves",
        severity="explanation",
        when=all_of(
            ("validation_best_share", "<=", 1 / 3),
            ("train_loss_fall", ">", FLAT_LOSS),
            ("train_fall_after_best", ">", FLAT_LOSS),
        ),
        evidence=(
            "lowest validation loss at epoch {validation_best_epoch:.0f} of {epochs_done:.0f}; the train loss fell"
            " another {train_fall_after_best:.2%} after it"
        ),
        next_step="regularise more",
        changes=(
            raised("model.dropout", 3, at_least=0.1, at_most=0.5),
            raised("train.optimizer.weight_decay", 3, at_least=0.1),
        ),
        question=questions.OVERFITTING,
        channel="curves",
        suspects=("overfit",),
    ),
    Rule(
        id="validation_rising",
        cause="overfitting: the validation loss rises again",
        group="curves",
        severity="explanation",
        when=all_of(("validation_rise", ">", 2e-3), ("validation_rise_of_gain", ">=", 0.5)),
        evidence=(
            "the loss ends {validation_rise:.2%} above its lowest value, at epoch {validation_best_epoch:.0f} of"
            " {epochs_done:.0f}"
        ),
        next_step="regularise more",
        changes=(
            raised("model.dropout", 3, at_least=0.1, at_most=0.5),
            raised("train.optimizer.weight_decay", 3, at_least=0.1),
        ),
        question=questions.OVERFITTING,
        channel="curves",
        suspects=("overfit", "regime_shift"),
    ),
    Rule(
        id="both_losses_flat",
        cause="neither loss falls: capacity, features or the learning rate",
        group="curves",
        severity="explanation",
        when=all_of(
            ("train_loss_fall", "<", FLAT_LOSS),
            ("train_loss_fall", ">", -10 * FLAT_LOSS),
            ("validation_loss_fall", "<", FLAT_LOSS),
        ),
        evidence=(
            "relative fall: train {train_loss_fall:.2%}, validation {validation_loss_fall:.2%}; {live_features:.0f} of"
            " {features:.0f} features live"
        ),
        next_step="try more capacity (experiment C): {experiment_c}",
        experiments=(
            "C",
            "D",
        ),
        question=questions.BOTH_FLAT,
        channel="curves",
        suspects=("underfit", "lr_too_low", "frozen_component"),
    ),
    Rule(
        id="both_fall_sharpe_flat",
        cause="both losses fall and the Sharpe does not rise: the loss is not aligned with it",
        group="curves",
        severity="explanation",
        when=all_of(
            ("train_loss_fall", ">", FLAT_LOSS),
            ("validation_loss_fall", ">", FLAT_LOSS),
            ("sharpe_rise_t", "<", 1.0),
            SHARPE_IS_LOW,
        ),
        evidence=(
            "relative fall: train {train_loss_fall:.2%}, validation {validation_loss_fall:.2%}; daily returns changed"
            " by {sharpe_rise_t:.1f} standard errors from the first to the last evaluation"
        ),
        next_step="weigh the Sharpe term more (experiment B): {experiment_b}",
        experiments=("B",),
        question=questions.LOSS_NOT_ALIGNED,
        channel="result",
    ),
    Rule(
        id="loss_spikes",
        cause="the loss jumps",
        group="learning rate",
        severity="explanation",
        when=all_of(("loss_spike", ">", 8.0)),
        evidence="the largest step loss lies {loss_spike:.0f} times the usual range above the median one",
        next_step="lower the learning rate",
        changes=(lowered("train.optimizer.lr", 1 / 3),),
        question=questions.GRADIENTS_RISING,
        channel="loss level",
        suspects=("lr_too_high", "variance_penalty_dominates"),
    ),
    Rule(
        id="worse_than_constant_in_training",
        cause="even on training sessions the loss is no better than that of constant predictions",
        group="curves",
        severity="explanation",
        when=all_of(("train_gain", "<", 5e-4)),
        evidence="1 - squared error on training, late: {train_gain:.4f}",
        next_step="try more capacity, then a higher rate (experiments C and D): {experiment_c}",
        question=questions.BOTH_FLAT,
        channel="fit of a constant",
        suspects=(
            "underfit",
            "lr_too_low",
            "labels_misaligned",
            "zeros_reach_head",
            "variance_penalty_dominates",
            "lr_too_high",
        ),
    ),
    Rule(
        id="fits_training_alone",
        cause="the training loss falls far, and validation is worse than with constant predictions",
        group="curves",
        severity="explanation",
        when=all_of(("train_gain", ">", 0.1), ("validation_gain", "<", -0.05)),
        evidence="1 - squared error, late: training {train_gain:.3f}, validation {validation_gain:.3f}",
        next_step="regularise more",
        changes=(
            raised("model.dropout", 3, at_least=0.1, at_most=0.5),
            raised("train.optimizer.weight_decay", 3, at_least=3),
        ),
        question=questions.OVERFITTING,
        channel="fit",
        suspects=("overfit", "regime_shift"),
    ),
)
