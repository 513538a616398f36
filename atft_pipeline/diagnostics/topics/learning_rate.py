"""The recorded learning rate compared with its schedule."""

from __future__ import annotations

import math

from atft_pipeline.config.schema import ScheduleConfig
from atft_pipeline.diagnostics import questions
from atft_pipeline.diagnostics.curve_statistics import (
    last,
)
from atft_pipeline.diagnostics.rule import Rule, all_of
from atft_pipeline.diagnostics.signal import SignalTable
from atft_pipeline.errors import InputError
from atft_pipeline.inspection.reader import Curve, Record
from atft_pipeline.training.schedule import SHAPES

SIGNALS = SignalTable()

WARM_START_EPOCHS = 2
"""Epochs without a better validation loss that are granted beyond the plateau's patience."""


@SIGNALS.add
def lr_peak(record: Record) -> float | None:
    return max(record.curve("lr").values(), default=None)


@SIGNALS.add
def lr_last(record: Record) -> float | None:
    return last(record.curve("lr"))


@SIGNALS.add
def lr_below_1e5_epoch(record: Record) -> float | None:
    """First epoch after the peak with a rate under 1e-5 (1 % of grace for rounding); infinite when there is none."""
    curve = record.curve("lr")
    if not curve:
        return None
    peak = max(curve, key=curve.__getitem__)
    return float(next((e for e, lr in curve.items() if e >= peak and lr < 0.99e-5), math.inf))


@SIGNALS.add
def lr_below_1e5_left_share(record: Record) -> float | None:
    """Share of the planned epochs that follow that epoch; 0 when there is none."""
    first, planned = lr_below_1e5_epoch(record), record.epochs_planned
    return None if first is None or not planned else max(0.0, 1.0 - first / planned)


@SIGNALS.add
def lr_low_share(record: Record) -> float | None:
    """Share of the first 20 epochs run at 3e-6 or less, i.e. around 1e-6.

    The last fifth of the plan is left out, since a schedule is meant to end low.
    """
    last = min(20, int(0.8 * (record.epochs_planned or 25)))
    rates = [lr for epoch, lr in record.curve("lr").items() if epoch <= last]
    return sum(lr <= 3e-6 for lr in rates) / len(rates) if rates else None


def _after_warmup(record: Record, curve: Curve) -> Curve:
    warmup = math.ceil(record.number("train.schedule.warmup_fraction", 0.0) * (record.epochs_planned or 0))
    return {epoch: value for epoch, value in curve.items() if epoch > warmup}


def planned_lr(record: Record) -> Curve:
    """The rate that the schedule plans for the end of each recorded epoch, computed by training's own functions.

    Empty where this code cannot train with the configuration. `plateau` follows the validation losses, so it is
    replayed over the recorded ones, with `WARM_START_EPOCHS` of grace.
    """
    schedule, base = _schedule(record), record.number("train.optimizer.lr", math.nan)
    planned, epochs = record.epochs_planned, record.curve("lr")
    if schedule is None or math.isnan(base) or not planned:
        return {}
    if schedule.name == "plateau":
        patience = schedule.patience + WARM_START_EPOCHS
        return {epoch: base * share for epoch, share in _plateau_shares(record, schedule, patience, floor=0.0).items()}

    def share(epoch: int) -> float:
        warmup = schedule.warmup_fraction
        progress = min(1.0, max(0.0, (epoch / planned - warmup) / max(1.0 - warmup, 1e-9)))
        return SHAPES[schedule.name](progress, schedule)

    return {epoch: base * share(epoch) for epoch in epochs}


def _schedule(record: Record) -> ScheduleConfig | None:
    """The run's schedule; None where it is not recorded, or where this code cannot train with it.

    A field that is not recorded as a number gets a fixed default.
    """
    name = record.config("train.schedule.name")
    if not isinstance(name, str) or name not in SHAPES:
        return None
    try:
        return ScheduleConfig(
            name=name,  # type: ignore[arg-type]
            warmup_fraction=record.number("train.schedule.warmup_fraction", 0.0),
            min_lr_ratio=record.number("train.schedule.min_lr_ratio", 0.0),
            patience=int(record.number("train.schedule.patience", 0)),
            factor=record.number("train.schedule.factor", 0.5),
        )
    except InputError:
        return None


def _plateau_shares(record: Record, schedule: ScheduleConfig, patience: int, *, floor: float) -> Curve:
    """Epoch -> share of the base rate that the validation losses before it ask for."""
    losses = record.curve("loss_weighted", split="validation", term="total")
    share, best, waited, shares = 1.0, math.inf, 0, {}
    for epoch in record.curve("lr"):
        shares[epoch] = share
        loss = losses.get(epoch, math.inf)
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited > patience:
            share, waited = max(share * schedule.factor, floor), 0
    return shares


def _spread(curve: Curve) -> float | None:
    values = list(curve.values())
    return max(values) / max(min(values), 1e-30) if len(values) >= 3 else None


@SIGNALS.add
def lr_spread(record: Record) -> float | None:
    """Largest over smallest rate at the ends of the epochs."""
    return _spread(record.curve("lr"))


@SIGNALS.add
def lr_planned_spread(record: Record) -> float | None:
    return _spread(_after_warmup(record, planned_lr(record)))


@SIGNALS.add
def lr_spread_to_plan(record: Record) -> float | None:
    """log(spread) / log(planned spread): 0 for a constant rate, near 1 for a rate that follows its plan.

    A planned spread below 1.5 counts as 1.5."""
    spread, planned = lr_spread(record), lr_planned_spread(record)
    return math.log(spread) / math.log(max(planned, 1.5)) if spread and planned else None


@SIGNALS.add
def lr_to_plan(record: Record) -> float | None:
    """Smallest rate / planned rate after the warm-up; None for `plateau`, which follows the losses."""
    if record.config("train.schedule.name") == "plateau":
        return None
    plan, rates = planned_lr(record), _after_warmup(record, record.curve("lr"))
    ratios = [lr / plan[epoch] for epoch, lr in rates.items() if plan.get(epoch)]
    return min(ratios, default=None)


@SIGNALS.add
def plateau_against_losses(record: Record) -> float | None:
    """Largest |log ratio| of the recorded rate to the one that the validation losses ask for; only for `plateau`."""
    schedule = _schedule(record)
    if schedule is None or schedule.name != "plateau":
        return None
    rates, base = record.curve("lr"), record.number("train.optimizer.lr", math.nan)
    factor = record.number("train.schedule.factor", math.nan)
    losses = record.curve("loss_weighted", split="validation", term="total")
    if math.isnan(base) or math.isnan(factor) or len(losses) < 3 or not rates:
        return None
    asked = _plateau_shares(record, schedule, schedule.patience, floor=schedule.min_lr_ratio)
    gaps = [
        abs(math.log(rate / (base * asked[epoch]))) for epoch, rate in _after_warmup(record, rates).items() if rate > 0
    ]
    return max(gaps, default=None)


RULES: tuple[Rule, ...] = (
    Rule(
        id="lr_decayed_early",
        cause="the learning rate decayed too early",
        group="learning rate",
        severity="explanation",
        when=all_of(("lr_peak", ">=", 1e-5), ("lr_below_1e5_epoch", "<=", 20), ("lr_below_1e5_left_share", ">", 0.2)),
        evidence=(
            "peak {lr_peak:.1e}; first epoch under 1e-5: {lr_below_1e5_epoch:.0f}, of {epochs_planned:.0f} planned"
        ),
        next_step="decay later (experiment A): {experiment_a}",
        experiments=("A",),
        question=questions.DECAYED_EARLY,
        channel="rate",
        suspects=("lr_decayed_early", "scheduler_wrong_direction"),
    ),
    Rule(
        id="lr_below_plan",
        cause="the learning rate fell faster than its schedule plans",
        group="learning rate",
        severity="defect",
        when=all_of(("lr_to_plan", "<", 0.5), ("lr_spread_to_plan", ">=", 0.1)),
        evidence="at its lowest it was {lr_to_plan:.2f} of the planned rate; last {lr_last:.1e}",
        next_step=(
            "check that the schedule steps once per optimizer step and knows the number of planned epochs, then"
            " continue: {resume}"
        ),
        question=questions.DECAYED_EARLY,
        channel="rate against plan",
        suspects=("lr_decayed_early",),
    ),
    Rule(
        id="lr_around_1e6",
        cause="the learning rate is too low to learn",
        group="learning rate",
        severity="explanation",
        when=all_of(("lr_low_share", ">=", 0.25)),
        evidence="{lr_low_share:.0%} of the first 20 epochs ran at 3e-6 or less (peak {lr_peak:.1e})",
        next_step="raise the learning rate (experiment D): {experiment_d}",
        experiments=("D",),
        question=questions.RATE_TOO_LOW,
        channel="rate",
        suspects=("lr_too_low",),
    ),
    Rule(
        id="lr_constant_against_plan",
        cause="the scheduler does not step, or restarts: the learning rate is constant against its plan",
        group="learning rate",
        severity="defect",
        when=all_of(("lr_spread_to_plan", "<", 0.1), ("lr_planned_spread", ">", 1.5)),
        evidence="largest over smallest rate: {lr_spread:.2f}, planned after the warm-up {lr_planned_spread:.2f}",
        next_step="check that LearningRateSchedule.step() runs after every optimizer step, then train again: {rerun}",
        question=questions.NOT_STEPPING,
        channel="rate against plan",
        suspects=("scheduler_never_steps",),
    ),
    Rule(
        id="plateau_against_losses",
        cause="the plateau schedule does not follow the validation losses",
        group="learning rate",
        severity="defect",
        when=all_of(("plateau_against_losses", ">", 0.5)),
        evidence="largest log ratio of the recorded rate to the one that they ask for: {plateau_against_losses:.2f}",
        next_step="check which metric and direction epoch_end is given, then train again: {rerun}",
        question=questions.DECAYED_EARLY,
        channel="plateau",
        suspects=("scheduler_wrong_direction",),
    ),
)
