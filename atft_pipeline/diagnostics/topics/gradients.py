"""Gradients by component: whether they reach the component, and how they change over the epochs."""

from __future__ import annotations

import numpy as np

from atft_pipeline.diagnostics import questions
from atft_pipeline.diagnostics.changes import lowered, switched
from atft_pipeline.diagnostics.curve_statistics import (
    MIN_TREND_EPOCHS,
    early_and_late,
    total,
)
from atft_pipeline.diagnostics.rule import Rule, all_of
from atft_pipeline.diagnostics.signal import SignalTable, count_of, listed
from atft_pipeline.inspection.reader import Curve, Record

SIGNALS = SignalTable()


def _gradients(record: Record) -> dict[str, Curve]:
    """Gradient l2 by epoch of every component that has weights."""
    curves = {name: record.curve("grad_l2", component=name) for name in record.components("grad_l2")}
    empty = {name for name in curves if (w := record.curve("weight_l2", component=name)) and max(w.values()) == 0.0}
    return {name: curve for name, curve in curves.items() if curve and name not in empty}


@SIGNALS.add
def encoder_gradient_ratio(record: Record) -> float | None:
    """Late over early gradient l2 of the temporal encoder."""
    return _late_to_early(_gradients(record).get("temporal_encoder", {}))


def _late_to_early(curve: Curve) -> float | None:
    if len(curve) < MIN_TREND_EPOCHS:
        return None
    early, late = early_and_late(curve)
    return late / early if early > 0 else None


@SIGNALS.add
def encoder_gradient_max(record: Record) -> float | None:
    """Largest gradient l2 of the temporal encoder over the epochs."""
    return max(_gradients(record).get("temporal_encoder", {}).values(), default=None)


@SIGNALS.add
def encoder_gradient(record: Record) -> float | None:
    """Median over epochs of the temporal encoder's gradient l2."""
    curve = _gradients(record).get("temporal_encoder")
    return float(np.median(list(curve.values()))) if curve else None


@SIGNALS.add
def gradient_rise(record: Record) -> float | None:
    """Largest late over early gradient l2 of any component."""
    return max(_rises(record).values(), default=None)


@SIGNALS.add
def gradient_rise_name(record: Record) -> str | None:
    rises = _rises(record)
    return max(rises, key=rises.__getitem__) if rises else None


def _rises(record: Record) -> dict[str, float]:
    return {name: r for name, curve in _gradients(record).items() if (r := _late_to_early(curve)) is not None}


@SIGNALS.add
def graph_to_encoder_gradient(record: Record) -> float | None:
    """Median over epochs of gradient l2 gat / temporal_encoder; None without a graph."""
    curves = _gradients(record)
    graph, encoder = curves.get("gat", {}), curves.get("temporal_encoder", {})
    ratios = [graph[epoch] / encoder[epoch] for epoch in graph if encoder.get(epoch)]
    return float(np.median(ratios)) if ratios else None


def _silent(record: Record) -> list[str] | None:
    curves = _gradients(record)
    return [name for name, curve in curves.items() if max(curve.values()) == 0.0] if curves else None


@SIGNALS.add
def silent_components(record: Record) -> float | None:
    names = _silent(record)
    return count_of(names)


@SIGNALS.add
def silent_component_names(record: Record) -> str | None:
    return listed(_silent(record))


@SIGNALS.add
def components_heard(record: Record) -> float | None:
    """Components, without the head, whose gradient was above 0 at some epoch."""
    curves = _gradients(record)
    others = [curve for name, curve in curves.items() if name != "prediction_head"]
    return float(sum(max(curve.values()) > 0.0 for curve in others)) if others else None


@SIGNALS.add
def head_gradient(record: Record) -> float | None:
    """Largest gradient l2 of the prediction head over the epochs."""
    return max(_gradients(record).get("prediction_head", {}).values(), default=None)


@SIGNALS.add
def gradient_summary(record: Record) -> str | None:
    parts = []
    for name, curve in _gradients(record).items():
        early, late = early_and_late(curve)
        parts.append(f"{name} {early:.2g} -> {late:.2g}")
    return ", ".join(parts) or None


@SIGNALS.add
def gradient_warnings(record: Record) -> float | None:
    return total(record, "gradient_warning")


@SIGNALS.add
def gradient_warning_names(record: Record) -> str | None:
    names = record.components("gradient_warning")
    warned = [name for name in names if any(record.curve("gradient_warning", component=name).values())]
    return listed(warned if names else None)


RULES: tuple[Rule, ...] = (
    Rule(
        id="component_without_gradient",
        cause="a component receives no gradient: frozen or disconnected",
        group="gradients",
        severity="defect",
        when=all_of(("silent_components", ">", 0)),
        evidence="gradient l2 exactly 0 at every epoch: {silent_component_names}",
        next_step="check that it is in the optimizer and on the path from input to loss, then train again: {rerun}",
        question=questions.GRADIENTS_LOW,
        channel="gradients reach",
        suspects=("frozen_component", "encoder_bypassed", "zeros_reach_head"),
    ),
    Rule(
        id="gradient_warnings",
        cause="gradients vanish in a trainable component",
        group="gradients",
        severity="explanation",
        when=all_of(("gradient_warnings", ">", 0)),
        evidence=(
            "{gradient_warnings:.0f} warnings (epochs of a component with l2 under 1e-7): {gradient_warning_names}"
        ),
        next_step="raise the learning rate (experiment D): {experiment_d}",
        experiments=("D",),
        question=questions.GRADIENTS_LOW,
        channel="gradients vanish",
        suspects=("lr_too_high", "encoder_bypassed", "zeros_reach_head", "frozen_component"),
    ),
    Rule(
        id="encoder_gradient_falling",
        cause="the temporal encoder's gradients fade",
        group="gradients",
        severity="explanation",
        when=all_of(("encoder_gradient_ratio", "<", 0.1)),
        evidence="ratio of late to early l2: {encoder_gradient_ratio:.3f}",
        next_step="leave the skip path out, to see whether the encoder still contributes",
        changes=(switched("model.skip", False),),
        question=questions.GRADIENTS_FALLING,
        channel="gradients over epochs",
    ),
    Rule(
        id="encoder_gradient_low",
        cause="the temporal encoder's gradients are low throughout",
        group="gradients",
        severity="explanation",
        when=all_of(("encoder_gradient", "<", 1e-5)),
        evidence="median l2 {encoder_gradient:.2g}",
        next_step="raise the learning rate (experiment D): {experiment_d}",
        experiments=("D",),
        question=questions.GRADIENTS_LOW,
        channel="gradients low",
    ),
    Rule(
        id="encoder_never_heard",
        cause="the temporal encoder's gradient was negligible at every epoch",
        group="gradients",
        severity="explanation",
        when=all_of(("encoder_gradient_max", "<", 1e-5)),
        evidence="largest l2 of any epoch: {encoder_gradient_max:.2g}",
        next_step="check the path from encoder to loss, then train again: {rerun}",
        question=questions.GRADIENTS_LOW,
        channel="gradients reach",
        suspects=("encoder_bypassed", "zeros_reach_head", "frozen_component"),
    ),
    Rule(
        id="gradients_rising",
        cause="gradients grow: training is becoming unstable",
        group="gradients",
        severity="explanation",
        when=all_of(("gradient_rise", ">", 10.0)),
        evidence="largest ratio of late to early l2: {gradient_rise:.1f} ({gradient_rise_name})",
        next_step="clip tighter",
        changes=(lowered("train.optimizer.clip_norm", 0.5),),
        question=questions.GRADIENTS_RISING,
        channel="gradients over epochs",
        suspects=("lr_too_high",),
    ),
    Rule(
        id="graph_dominates_encoder",
        cause="graph gradients dominate the encoder's",
        group="gradients",
        severity="explanation",
        when=all_of(("graph_to_encoder_gradient", ">", 10.0)),
        evidence=(
            "l2 of gat over that of temporal_encoder, median epoch: {graph_to_encoder_gradient:.1f}; gradients alone"
            " do not show which one contributes"
        ),
        next_step="leave the graph out and compare the daily IC",
        changes=(switched("model.graph", False),),
        question=questions.GRAPH_DOMINATES,
        channel="graph share",
        suspects=("encoder_bypassed",),
    ),
    Rule(
        id="head_hears_nothing",
        cause="no component but the head has a gradient",
        group="gradients",
        severity="defect",
        when=all_of(("components_heard", "<=", 0), ("head_gradient", ">", 0), ("frozen_components", "<=", 0)),
        evidence="gradient l2 exactly 0 at every epoch: {silent_component_names}",
        next_step="check what the head reads (padding, or a wrong position), then train again: {rerun}",
        question=questions.GRADIENTS_LOW,
        channel="head input",
        suspects=("zeros_reach_head",),
    ),
)
