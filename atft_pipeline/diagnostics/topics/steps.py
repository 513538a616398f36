"""What a step of the optimizer does to the weights."""

from __future__ import annotations

import math

import numpy as np

from atft_pipeline.diagnostics import questions
from atft_pipeline.diagnostics.changes import lowered, raised
from atft_pipeline.diagnostics.curve_statistics import (
    median,
    medians_by_component,
)
from atft_pipeline.diagnostics.rule import Rule, all_of
from atft_pipeline.diagnostics.signal import SignalTable, count_of, listed
from atft_pipeline.inspection.reader import Record

SIGNALS = SignalTable()


def _incomplete(record: Record, metric: str) -> list[str] | None:
    shares = medians_by_component(record, metric)
    return [name for name, share in shares.items() if share < 1.0] if shares else None


@SIGNALS.add
def frozen_components(record: Record) -> float | None:
    """Components with parameters that require no gradient."""
    names = _incomplete(record, "trainable_share")
    return count_of(names)


@SIGNALS.add
def frozen_component_names(record: Record) -> str | None:
    return listed(_incomplete(record, "trainable_share"))


@SIGNALS.add
def unoptimized_components(record: Record) -> float | None:
    """Components with parameters that the optimizer does not have."""
    names = _incomplete(record, "optimized_share")
    return count_of(names)


@SIGNALS.add
def unoptimized_component_names(record: Record) -> str | None:
    return listed(_incomplete(record, "optimized_share"))


@SIGNALS.add
def lost_update_share(record: Record) -> float | None:
    """Largest share of weights that a step left unchanged, over the trained components."""
    trained = {
        name: share
        for name, share in medians_by_component(record, "unchanged_share").items()
        if record.curve("grad_l2", component=name) and (median(record.curve("grad_l2", component=name)) or 0.0) > 0.0
    }
    whole = {name for name, share in medians_by_component(record, "optimized_share").items() if share == 1.0}
    free = {name for name, share in medians_by_component(record, "trainable_share").items() if share == 1.0}
    return max((share for name, share in trained.items() if name in whole & free), default=None)


@SIGNALS.add
def parameter_bits(record: Record) -> float | None:
    """Bits of the parameter with the lowest precision."""
    return min(medians_by_component(record, "parameter_bits").values(), default=None)


@SIGNALS.add
def largest_update(record: Record) -> float | None:
    """Largest update-to-weight ratio of any component, median over epochs."""
    return max(medians_by_component(record, "update_to_weight").values(), default=None)


@SIGNALS.add
def peak_update(record: Record) -> float | None:
    """The same, largest over epochs: too large steps make the weights grow until the ratio looks usual again."""
    curves = [record.curve("update_to_weight", component=name) for name in record.components("update_to_weight")]
    return max((ratio for curve in curves for ratio in curve.values()), default=None)


@SIGNALS.add
def update_per_lr(record: Record) -> float | None:
    """l2 of all components' updates over the learning rate, median over epochs; Adam's is near sqrt(parameters)."""
    rates, ratios = record.curve("lr"), []
    components = record.components("update_to_weight")
    curves = {
        name: (record.curve("update_to_weight", component=name), record.curve("weight_l2", component=name))
        for name in components
    }
    for epoch, rate in rates.items():
        parts = [u[epoch] * w[epoch] for u, w in curves.values() if epoch in u and epoch in w]
        if parts and rate > 0:
            ratios.append(math.sqrt(sum(part * part for part in parts)) / rate)
    return float(np.median(ratios)) if ratios else None


@SIGNALS.add
def clip_ratio(record: Record) -> float | None:
    """Gradient norm after over before clipping, median over epochs."""
    before, after = (record.curve("grad_norm", term=term) for term in ("before_clip", "after_clip"))
    return median({epoch: after[epoch] / before[epoch] for epoch in after if before.get(epoch)})


@SIGNALS.add
def optimizer_is_adaptive(record: Record) -> float | None:
    """1 where the optimizer divides by the size of the gradient, which undoes a constant factor."""
    name = record.run.get("optimizer")
    if not isinstance(name, str):
        return None
    return float("adam" in name.lower() or name.lower() in ("adagrad", "rmsprop", "lion"))


@SIGNALS.add
def clipped_share(record: Record) -> float | None:
    curve = record.curve("clipped_share")
    return float(np.mean(list(curve.values()))) if curve else None


RULES: tuple[Rule, ...] = (
    Rule(
        id="steps_too_large",
        cause="a step moves a component by more than a twentieth of its weights",
        group="learning rate",
        severity="explanation",
        when=all_of(("peak_update", ">", 0.05)),
        evidence="largest update-to-weight ratio of all epochs: {peak_update:.3f}; peak rate {lr_peak:.1e}",
        next_step="lower the learning rate",
        changes=(lowered("train.optimizer.lr", 1 / 3),),
        question=questions.GRADIENTS_RISING,
        channel="step size",
        suspects=("lr_too_high",),
    ),
    Rule(
        id="steps_too_small",
        cause="a step moves no component by more than a hundred-thousandth of its weights",
        group="learning rate",
        severity="explanation",
        when=all_of(("largest_update", "<", 1e-5), ("largest_update", ">", 0)),
        evidence="largest update-to-weight ratio, median epoch: {largest_update:.2g}; peak rate {lr_peak:.1e}",
        next_step="raise the learning rate (experiment D): {experiment_d}",
        question=questions.RATE_TOO_LOW,
        channel="step size",
        suspects=("lr_too_low", "clipping_too_tight", "updates_lost"),
    ),
    Rule(
        id="updates_clipped_away",
        cause="updates are far smaller than the learning rate allows",
        group="learning rate",
        severity="defect",
        when=all_of(("update_per_lr", "<", 0.05), ("largest_update", ">", 0)),
        evidence=(
            "l2 of an update over the learning rate: {update_per_lr:.2g}, with AdamW usually near the root of the"
            " number of parameters; {clipped_share:.0%} of the steps are clipped"
        ),
        next_step="let the gradients through",
        changes=(raised("train.optimizer.clip_norm", 10, at_least=1),),
        question=questions.GRADIENTS_LOW,
        channel="update per rate",
        suspects=("clipping_too_tight",),
    ),
    Rule(
        id="clipping_not_undone",
        cause="most of the gradient is clipped away, and the optimizer does not undo it",
        group="learning rate",
        severity="defect",
        when=all_of(("clip_ratio", "<", 0.1), ("optimizer_is_adaptive", "<=", 0)),
        evidence=(
            "gradient norm after over before clipping: {clip_ratio:.2g}; {clipped_share:.0%} of the steps are clipped"
        ),
        next_step="let the gradients through",
        changes=(raised("train.optimizer.clip_norm", 10, at_least=1),),
        question=questions.GRADIENTS_LOW,
        channel="update per rate",
        suspects=("clipping_too_tight",),
    ),
    Rule(
        id="updates_lost",
        cause="many weights do not move in a step: their precision cannot hold the update",
        group="learning rate",
        severity="defect",
        when=all_of(("lost_update_share", ">", 0.2), ("largest_update", ">", 1e-7)),
        evidence=(
            "a step left {lost_update_share:.0%} of a trained component's weights unchanged; peak rate {lr_peak:.1e}"
        ),
        next_step=(
            "keep the parameters in float32 (train.precision=bf16-mixed computes in bf16 and does so), then train"
            " again: {rerun}"
        ),
        question=questions.GRADIENTS_LOW,
        channel="lost updates",
        suspects=("updates_lost",),
    ),
    Rule(
        id="nothing_moves",
        cause="no step moves a weight",
        group="learning rate",
        severity="defect",
        when=all_of(("largest_update", "<=", 0), ("lr_peak", ">", 1e-7)),
        evidence="in most epochs the measured step left all weights unchanged; peak rate {lr_peak:.1e}",
        next_step=(
            "check what follows the optimizer's step, and the precision of the parameters, then train again: {rerun}"
        ),
        question=questions.GRADIENTS_LOW,
        channel="lost updates",
        suspects=("updates_lost",),
    ),
    Rule(
        id="parameters_narrow",
        cause="parameters are kept in fewer than 32 bits",
        group="learning rate",
        severity="defect",
        when=all_of(("parameter_bits", "<", 32)),
        evidence=(
            "{parameter_bits:.0f} bits; a step left {lost_update_share:.0%} of a trained component's weights unchanged"
        ),
        next_step=(
            "keep the parameters in float32 (train.precision=bf16-mixed computes in bf16 and does so), then train"
            " again: {rerun}"
        ),
        question=questions.GRADIENTS_LOW,
        channel="parameter bits",
        suspects=("updates_lost",),
        root=True,
    ),
    Rule(
        id="not_in_optimizer",
        cause="parameters are missing from the optimizer",
        group="gradients",
        severity="defect",
        when=all_of(("unoptimized_components", ">", 0)),
        evidence="components with such parameters: {unoptimized_component_names}",
        next_step="build the optimizer from all parameters of the model, then train again: {rerun}",
        question=questions.GRADIENTS_LOW,
        channel="in the optimizer",
        suspects=("not_in_optimizer",),
        root=True,
    ),
    Rule(
        id="component_frozen",
        cause="a component is frozen",
        group="gradients",
        severity="defect",
        when=all_of(("frozen_components", ">", 0)),
        evidence="components with parameters that require no gradient: {frozen_component_names}",
        next_step="let all of its parameters train: {rerun}",
        question=questions.GRADIENTS_LOW,
        channel="trainable",
        suspects=("frozen_component",),
        root=True,
    ),
    Rule(
        id="clipping_bites",
        cause="most steps are clipped",
        group="gradients",
        severity="observation",
        when=all_of(("clipped_share", ">", 0.5)),
        evidence=(
            "{clipped_share:.0%} of the steps; AdamW undoes a constant factor, so this alone rarely costs anything"
        ),
        next_step="nothing needs to be done; clip less, to check that nothing changes",
        changes=(raised("train.optimizer.clip_norm", 5),),
        question=questions.GRADIENTS_RISING,
        channel="clipping",
        suspects=("clipping_too_tight", "lr_too_high"),
    ),
)
