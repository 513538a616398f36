"""Whether the run is complete and repeatable, and gets its data in time."""

from __future__ import annotations

import math
import re

import numpy as np

from atft_pipeline.diagnostics import questions
from atft_pipeline.diagnostics.changes import lowered, raised
from atft_pipeline.diagnostics.curve_statistics import (
    total,
)
from atft_pipeline.diagnostics.rule import Rule, all_of
from atft_pipeline.diagnostics.signal import SignalTable
from atft_pipeline.diagnostics.topics.learning_rate import planned_lr
from atft_pipeline.inspection.reader import Record, as_number

SIGNALS = SignalTable()


@SIGNALS.add
def failed(record: Record) -> float | None:
    status = record.run.get("status")
    return None if status is None else float(status == "failed")


@SIGNALS.add
def failure_reason(record: Record) -> str | None:
    """Why the run ended early, in its own words."""
    return str(record.run.get("reason") or "no reason recorded") if record.run else None


@SIGNALS.add
def failure_not_finite(record: Record) -> float | None:
    """1 where the run failed because of a number that was not finite."""
    has_failed = failed(record)
    if not has_failed:
        return has_failed
    return float(bool(re.search(r"\b(nan|inf|infinite|not finite|non-?finite)\b", failure_reason(record) or "", re.I)))


@SIGNALS.add
def abandoned(record: Record) -> float | None:
    """1 when run.json says running and no process holds the run's lock: it was killed."""
    return None if record.state is None else float(record.state == "killed")


@SIGNALS.add
def non_finite_losses(record: Record) -> float | None:
    """Recorded losses and gradients that were not finite."""
    return record.scalar(
        """SELECT sum(CASE WHEN metric = 'non_finite' OR value IS NULL OR NOT isfinite(value) THEN 1 ELSE 0 END)
           FROM series WHERE metric IN ('loss', 'loss_raw', 'loss_weighted', 'grad_norm', 'non_finite')"""
    )


@SIGNALS.add
def loader_wait_share(record: Record) -> float | None:
    waited, spent = total(record, "loader_wait_s"), total(record, "epoch_s")
    return waited / spent if waited is not None and spent else None


@SIGNALS.add
def epochs_done(record: Record) -> float | None:
    return float(record.epochs_done)


@SIGNALS.add
def epochs_missing(record: Record) -> float | None:
    """Epochs before the newest that have no row of training or none of evaluation; None where there are no rows."""
    recorded = [set(record.curve("lr")), {int(e) for (e,) in record.rows("SELECT DISTINCT epoch FROM evals")}]
    if not any(recorded):
        return None
    # The newest epoch of a killed run may be half written.
    return float(sum(any(epoch not in of for of in recorded) for epoch in range(1, record.epochs_done)))


@SIGNALS.add
def epochs_planned(record: Record) -> float | None:
    return None if record.epochs_planned is None else float(record.epochs_planned)


@SIGNALS.add
def lr_jump_on_resume(record: Record) -> float | None:
    """|log| of the rate's ratio across a resume over the planned ratio; 0 without a resume."""
    if not record.run:
        return None
    resumed = int(as_number(record.run.get("resumed_after_epoch"), 0))
    if not resumed:
        return 0.0
    rates, plan = record.curve("lr"), planned_lr(record)
    after = resumed + 1
    if not all(epoch in curve for curve in (rates, plan) for epoch in (resumed, after)) or not rates[resumed]:
        return None
    expected = plan[after] / plan[resumed] if plan[resumed] else 1.0
    return abs(math.log(max(rates[after] / rates[resumed], 1e-12) / max(expected, 1e-12)))


@SIGNALS.add
def loss_jump_on_resume(record: Record) -> float | None:
    """Rise of the training loss across a resume, in median absolute changes by epoch; 0 without a resume."""
    if not record.run:
        return None
    resumed = int(as_number(record.run.get("resumed_after_epoch"), 0))
    if not resumed:
        return 0.0
    losses = record.curve("loss_weighted", split="train", term="total")
    changes = [abs(losses[epoch + 1] - losses[epoch]) for epoch in losses if epoch + 1 in losses and epoch != resumed]
    usual = float(np.median(changes)) if len(changes) >= 3 else 0.0
    if resumed not in losses or resumed + 1 not in losses or not usual:
        return None
    return (losses[resumed + 1] - losses[resumed]) / usual


RULES: tuple[Rule, ...] = (
    Rule(
        id="non_finite_loss",
        cause="a loss or gradient was not finite",
        group="runtime",
        severity="failure",
        when=all_of(("non_finite_losses", ">", 0)),
        evidence="{non_finite_losses:.0f} recorded values are not finite; peak learning rate {lr_peak:.1e}",
        next_step="lower the learning rate",
        changes=(lowered("train.optimizer.lr", 0.1),),
        question=questions.CRASHED,
        channel="finite",
        suspects=("non_finite", "lr_too_high"),
    ),
    Rule(
        id="run_failed",
        cause="the run ended with an error",
        group="runtime",
        severity="failure",
        when=all_of(("failed", ">", 0), ("failure_not_finite", "<=", 0)),
        evidence="after {epochs_done:.0f} of {epochs_planned:.0f} epochs: {failure_reason}",
        next_step="remove the reason, then continue after the last complete epoch: {resume}",
        question=questions.CRASHED,
        channel="ended",
        suspects=("crashed",),
    ),
    Rule(
        id="run_not_finite",
        cause="the run ended because a loss or gradient was not finite",
        group="runtime",
        severity="failure",
        when=all_of(("failed", ">", 0), ("failure_not_finite", ">", 0)),
        evidence="after {epochs_done:.0f} of {epochs_planned:.0f} epochs: {failure_reason}",
        next_step="lower the learning rate",
        changes=(lowered("train.optimizer.lr", 0.1),),
        question=questions.CRASHED,
        channel="ended",
        suspects=("non_finite", "lr_too_high"),
    ),
    Rule(
        id="run_killed",
        cause="the run was killed: its record says running, and no process holds its lock",
        group="runtime",
        severity="failure",
        when=all_of(("abandoned", ">", 0)),
        evidence="{epochs_done:.0f} of {epochs_planned:.0f} epochs recorded, no end in run.json",
        next_step="continue after the last complete epoch: {resume}",
        question=questions.CRASHED,
        channel="ended",
        suspects=("crashed",),
    ),
    Rule(
        id="loader_starves_training",
        cause="training waits for data",
        group="runtime",
        severity="defect",
        when=all_of(("loader_wait_share", ">", 0.3)),
        evidence="{loader_wait_share:.0%} of the training time was spent waiting for blocks",
        next_step="prepare blocks ahead in more threads",
        changes=(raised("train.loader_workers", 2, at_least=4),),
        question=questions.WHOLE,
        channel="loader",
        suspects=("starved_loader",),
    ),
    Rule(
        id="replay_differs",
        cause="the first epoch, trained again with the same seed, gives other weights",
        group="runtime",
        severity="defect",
        when=all_of(("replay_differs", ">", 0)),
        evidence="same code, data, seed and threads, but another weights_hash",
        next_step="find which other code ran, or which randomness has no seed, then train again: {rerun}",
        question=questions.WHOLE,
        channel="replay",
    ),
    Rule(
        id="initial_weights_not_of_seed",
        cause="the seed does not decide the initial weights",
        group="runtime",
        severity="defect",
        when=all_of(("replay_initial_differs", ">", 0)),
        evidence="drawn again with the same code and seed, the initial weights have another hash",
        next_step="find the randomness that has no seed, then train again: {rerun}",
        question=questions.WHOLE,
        channel="initial weights drawn again",
        suspects=("not_deterministic",),
        root=True,
    ),
    Rule(
        id="rate_jumps_on_resume",
        cause="the run resumed with another learning rate than its schedule had reached",
        group="runtime",
        severity="defect",
        when=all_of(("lr_jump_on_resume", ">", 0.3)),
        evidence="log ratio of the rate's change at the resume to the planned change: {lr_jump_on_resume:.2f}",
        next_step="train again from the start: {rerun}",
        question=questions.WHOLE,
        channel="resume",
        suspects=("resumed_wrongly",),
        root=True,
    ),
    Rule(
        id="loss_jumps_on_resume",
        cause="the training loss jumps where the run resumed",
        group="runtime",
        severity="defect",
        when=all_of(("loss_jump_on_resume", ">", 8.0)),
        evidence="it rises by {loss_jump_on_resume:.0f} times the usual change from epoch to epoch",
        next_step="train again from the start: {rerun}",
        question=questions.WHOLE,
        channel="resume",
        suspects=("resumed_wrongly",),
    ),
    Rule(
        id="epochs_missing",
        cause="epochs are missing from the record",
        group="runtime",
        severity="defect",
        when=all_of(("epochs_missing", ">", 0)),
        evidence="{epochs_missing:.0f} epochs before the newest have no row of training or of evaluation",
        next_step="train again into a fresh directory: {rerun}",
        question=questions.WHOLE,
        channel="epochs",
    ),
)
