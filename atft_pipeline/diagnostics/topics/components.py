"""The output of each component: whether it differs between stocks, and how much IC it is worth."""

from __future__ import annotations

import numpy as np

from atft_pipeline.diagnostics import questions
from atft_pipeline.diagnostics.changes import lowered, raised, switched
from atft_pipeline.diagnostics.curve_statistics import (
    total,
)
from atft_pipeline.diagnostics.rule import Rule, all_of
from atft_pipeline.diagnostics.signal import SignalTable
from atft_pipeline.inspection.reader import Record

SIGNALS = SignalTable()

DEGENERACY_RESETS_ALLOWED = 5
"""A run whose head collapses by chance needs fewer resets."""


@SIGNALS.add
def degeneracy_events(record: Record) -> float | None:
    return total(record, "degeneracy_event")


@SIGNALS.add
def degeneracy_resets(record: Record) -> float | None:
    return total(record, "degeneracy_reset")


def _late(record: Record, metric: str, component: str) -> float | None:
    values = list(record.curve(metric, component=component).values())
    return float(np.median(values[-max(1, len(values) // 4) :])) if values else None


@SIGNALS.add
def encoder_spread(record: Record) -> float | None:
    """How much the encoder's output differs between stocks (`stock_spread` of the backbone projection), late."""
    return _late(record, "stock_spread", "backbone_projection")


@SIGNALS.add
def encoder_spread_max(record: Record) -> float | None:
    """The same at the epoch where it is largest. An encoder that is bypassed has no spread at any epoch."""
    return max(record.curve("stock_spread", component="backbone_projection").values(), default=None)


@SIGNALS.add
def graph_spread(record: Record) -> float | None:
    return _late(record, "stock_spread", "gat")


@SIGNALS.add
def fusion_spread(record: Record) -> float | None:
    return _late(record, "stock_spread", "fusion")


@SIGNALS.add
def graph_or_encoder_spread(record: Record) -> float | None:
    """The smaller spread of the fusion's inputs; without a graph that of the encoder."""
    return min((v for v in (encoder_spread(record), graph_spread(record)) if v is not None), default=None)


@SIGNALS.add
def dead_units(record: Record) -> float | None:
    """Largest share of constant units in a component, late. The head's four outputs do not count."""
    names = [name for name in record.components("dead_units") if name != "prediction_head"]
    return max((share for name in names if (share := _late(record, "dead_units", name)) is not None), default=None)


@SIGNALS.add
def attention_entropy(record: Record) -> float | None:
    """Smallest mean entropy of an attention's weights, relative to equal weights, late."""
    names = record.components("attention_entropy")
    return min((e for name in names if (e := _late(record, "attention_entropy", name)) is not None), default=None)


RULES: tuple[Rule, ...] = (
    Rule(
        id="predictions_collapse",
        cause="the predictions collapsed towards a constant",
        group="gradients",
        severity="explanation",
        when=all_of(("degeneracy_events", ">", 0)),
        evidence=(
            "{degeneracy_events:.0f} checks under the guard's dispersion ratio, {degeneracy_resets:.0f} resets of the"
            " head"
        ),
        next_step="weigh the IC term more: constant predictions do not minimise it",
        changes=(raised("train.loss.ic", 2, at_least=0.5),),
        question=questions.DEGENERATE,
        channel="dispersion",
        suspects=("predictions_collapse", "no_dispersion", "zeros_reach_head"),
    ),
    Rule(
        id="degeneracy_resets_many",
        cause="the head was reset many times",
        group="gradients",
        severity="defect",
        when=all_of(("degeneracy_resets", ">=", DEGENERACY_RESETS_ALLOWED)),
        evidence="{degeneracy_resets:.0f} resets; fewer than 5 are expected",
        next_step="lower the learning rate and weigh the IC term more",
        changes=(
            lowered("train.optimizer.lr", 0.3),
            raised("train.loss.ic", 2, at_least=0.5),
        ),
        question=questions.DEGENERATE,
        channel="resets",
        suspects=("predictions_collapse", "zeros_reach_head"),
    ),
    Rule(
        id="encoder_says_nothing",
        cause="the encoder's output is the same for all stocks",
        group="gradients",
        severity="defect",
        when=all_of(("encoder_spread_max", "<", 0.01)),
        evidence="largest spread across stocks of the backbone's output: {encoder_spread_max:.2g} of its size",
        next_step="check the path from encoder to fusion, then train again: {rerun}",
        question=questions.GRADIENTS_LOW,
        channel="encoder output",
        suspects=("encoder_bypassed",),
    ),
    Rule(
        id="encoder_fell_silent",
        cause="the encoder's output became the same for all stocks",
        group="gradients",
        severity="defect",
        when=all_of(("encoder_spread", "<", 0.01), ("encoder_spread_max", ">=", 0.01)),
        evidence=(
            "spread across stocks of the backbone's output: {encoder_spread:.2g} of its size, at most"
            " {encoder_spread_max:.2g} before"
        ),
        next_step="lower the learning rate",
        changes=(lowered("train.optimizer.lr", 1 / 3),),
        question=questions.GRADIENTS_FALLING,
        channel="encoder output over epochs",
        suspects=("lr_too_high", "predictions_collapse"),
    ),
    Rule(
        id="graph_smooths",
        cause="after the graph all stocks have nearly the same state",
        group="gradients",
        severity="defect",
        when=all_of(("graph_spread", "<", 0.02), ("encoder_spread", ">=", 0.01)),
        evidence="spread across stocks: encoder {encoder_spread:.2g}, after the graph {graph_spread:.2g} of its size",
        next_step="leave the graph out and compare",
        changes=(switched("model.graph", False),),
        question=questions.GRAPH_DOMINATES,
        channel="graph output",
        suspects=("over_smoothing",),
    ),
    Rule(
        id="stocks_look_alike",
        cause="the head reads nearly the same state for all stocks",
        group="gradients",
        severity="defect",
        when=all_of(("fusion_spread", "<", 0.02), ("graph_or_encoder_spread", ">=", 0.02)),
        evidence="spread across stocks before the head: {fusion_spread:.2g} of its size",
        next_step="check the fusion, and weigh the IC term more",
        changes=(raised("train.loss.ic", 2, at_least=0.5),),
        question=questions.DEGENERATE,
        channel="fusion output",
        suspects=("no_dispersion",),
    ),
    Rule(
        id="units_dead",
        cause="most units of a component are constant",
        group="gradients",
        severity="defect",
        when=all_of(("dead_units", ">", 0.5)),
        evidence="{dead_units:.0%} of its units have the same output for all stocks and sessions",
        next_step="lower the learning rate and draw other initial weights",
        changes=(
            lowered("train.optimizer.lr", 1 / 3),
            raised("train.seed", 2, at_least=1),
        ),
        question=questions.DEGENERATE,
        channel="units",
        suspects=("dead_units", "lr_too_high", "encoder_bypassed"),
    ),
    Rule(
        id="attention_collapsed",
        cause="attention puts almost all its weight on one position",
        group="gradients",
        severity="explanation",
        when=all_of(("attention_entropy", "<", 0.1)),
        evidence="mean entropy relative to equal weights: {attention_entropy:.2f}",
        next_step="leave the encoder out and compare",
        changes=(lowered("model.encoder_layers", 0),),
        question=questions.GRADIENTS_RISING,
        channel="attention",
        suspects=("attention_collapse",),
    ),
    Rule(
        id="encoder_idle",
        cause="permuting the temporal encoder's output over the stocks costs no IC",
        group="gradients",
        severity="explanation",
        when=all_of(("drop_t_temporal_encoder", "<", 1.0), ("ic_last_t", ">=", 2.0)),
        evidence="IC lost: {drop_t_temporal_encoder:.1f} standard errors, paired by session",
        next_step="leave the encoder out and compare",
        changes=(lowered("model.encoder_layers", 0),),
        question=questions.COMPONENTS_CONTRIBUTE,
        channel="encoder ablated",
        suspects=("encoder_bypassed", "attention_collapse", "frozen_component"),
    ),
    Rule(
        id="graph_idle",
        cause="permuting what the graph adds over the stocks costs no IC",
        group="gradients",
        severity="explanation",
        when=all_of(("drop_t_gat", "<", 1.0), ("ic_last_t", ">=", 2.0)),
        evidence="IC lost: {drop_t_gat:.1f} standard errors, paired by session",
        next_step="leave the graph out and compare",
        changes=(switched("model.graph", False),),
        question=questions.COMPONENTS_CONTRIBUTE,
        channel="graph ablated",
        suspects=("over_smoothing",),
    ),
)
