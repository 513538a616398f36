"""The terms of the loss: their weights, and what each contributes to the gradient."""

from __future__ import annotations

import numpy as np

from atft_pipeline.config.schema import LOSS_TERMS
from atft_pipeline.diagnostics import questions
from atft_pipeline.diagnostics.changes import lowered
from atft_pipeline.diagnostics.curve_statistics import (
    last,
    median,
)
from atft_pipeline.diagnostics.rule import SHARPE_IS_LOW, Rule, all_of
from atft_pipeline.diagnostics.signal import SignalTable, count_of, listed
from atft_pipeline.inspection.reader import Record, as_number

SIGNALS = SignalTable()

PENALTY_DOMINATES = 1 / 3
"""Gradient contribution above which the variance penalty dominates. When it does, it and the squared error balance each
other at one half each. They oppose each other by design, so that is no conflict of terms."""
HARDLY_EXPLAINED = 0.5
"""Unexplained share of the gradient above which effective weights mean nothing; healthy runs on CPU: 1e-14."""
TERM_READS_NOTHING = 0.2
"""Effective over configured weight under which a term has no effect; in healthy runs it is within 1e-4 of 1."""
REVERSED = -0.05
"""Effective over configured weight at or below which the training raises the term."""
NOTICEABLE_SHARE = 0.05
"""Gradient contribution under which a term's conflict with the others does not matter."""


def _weights(record: Record) -> dict[str, float]:
    """Largest weight of each term over the epochs done, as recorded, else as configured."""
    recorded = {
        term: max(curve.values())
        for term in LOSS_TERMS
        if (curve := record.curve("loss_weight", term=term, split="train"))
    }
    if recorded:
        return recorded
    if not isinstance(record.config("train.loss"), dict):
        return {}
    return {
        term: max(
            record.number(f"train.loss.{term}", 0.0),
            *(as_number(phase["weights"].get(term), 0.0) for phase in record.phases),
            0.0,
        )
        for term in LOSS_TERMS
    }


@SIGNALS.add
def sharpe_weight(record: Record) -> float | None:
    return _weights(record).get("sharpe")


@SIGNALS.add
def sharpe_loss_share(record: Record) -> float | None:
    """|weighted Sharpe term| over the sum of all |weighted terms|, train split, last epoch; None without the term."""
    parts = {term: last(record.curve("loss_weighted", split="train", term=term)) for term in LOSS_TERMS}
    total = sum(abs(value) for value in parts.values() if value is not None)
    return abs(parts["sharpe"]) / total if parts["sharpe"] is not None and total > 0 else None


def _swallowed(record: Record) -> list[str] | None:
    """Terms with a weight whose raw value is not recorded, or is the same at every one of three or more epochs.

    A variance penalty of 0 is left out: it stays at 0 while the scores spread enough.
    """
    curves = {term: record.curve("loss_raw", split="train", term=term) for term in LOSS_TERMS}
    weights = _weights(record)
    if not weights or max(map(len, curves.values())) < 3:
        return None

    def stands_still(term: str) -> bool:
        values = set(curves[term].values())
        return len(values) <= 1 and not (term == "variance_penalty" and values == {0.0})

    return [term for term, weight in weights.items() if weight > 0 and stands_still(term)]


@SIGNALS.add
def swallowed_terms(record: Record) -> float | None:
    terms = _swallowed(record)
    return count_of(terms)


@SIGNALS.add
def swallowed_term_names(record: Record) -> str | None:
    return listed(_swallowed(record))


def _effective(record: Record) -> dict[str, float] | None:
    """Term with a weight -> effective over configured weight, median over the epochs in which both are recorded."""
    if not record.scalar("SELECT count(*) FROM series WHERE metric = 'gradient_residual'"):
        return None
    effective = {}
    for term in LOSS_TERMS:
        weights = record.curve("loss_weight", split="train", term=term)
        read = record.curve("effective_weight", term=term)
        ratios = [read[epoch] / weights[epoch] for epoch in read if weights.get(epoch, 0.0) > 0.0]
        if ratios:
            effective[term] = float(np.median(ratios))
    return effective


@SIGNALS.add
def terms_without_effect(record: Record) -> float | None:
    """Loss terms that have a weight and contribute nothing to the gradient of the loss."""
    effective = _effective(record)
    return (
        None if effective is None else float(sum(REVERSED < ratio < TERM_READS_NOTHING for ratio in effective.values()))
    )


@SIGNALS.add
def terms_reversed(record: Record) -> float | None:
    """Loss terms that the training raises instead of lowering."""
    effective = _effective(record)
    return None if effective is None else float(sum(ratio <= REVERSED for ratio in effective.values()))


@SIGNALS.add
def effective_weights(record: Record) -> str | None:
    effective = _effective(record)
    return None if effective is None else ", ".join(f"{term} {ratio:.3g}" for term, ratio in effective.items()) or None


@SIGNALS.add
def unexplained_gradient(record: Record) -> float | None:
    """Share of the loss's gradient that no configured term explains, median over epochs."""
    return median(record.curve("gradient_residual", term="total"))


@SIGNALS.add
def unexplained_pull(record: Record) -> float | None:
    """The same, but 0 where the head has no gradient at all: that is no evidence of another loss."""
    unexplained = unexplained_gradient(record)
    has_gradient = (median(record.curve("grad_l2", component="prediction_head")) or 0.0) > 0.0
    return unexplained if unexplained is None or has_gradient else 0.0


@SIGNALS.add
def term_conflict(record: Record) -> float | None:
    """Smallest cosine of a noticeable term's gradient with that of the others; 1 with one term."""
    if not record.curve("gradient_residual", term="total"):
        return None
    cosines = []
    for term in LOSS_TERMS:
        share, cosine = (record.curve(metric, term=term) for metric in ("gradient_share", "gradient_cosine"))
        if (median(share) or 0.0) >= NOTICEABLE_SHARE and cosine:
            cosines.append(median(cosine) or 0.0)
    return min(cosines, default=1.0)


@SIGNALS.add
def variance_penalty_share(record: Record) -> float | None:
    """Gradient contribution of the variance penalty, median over epochs; 0 where it has no weight."""
    if not record.curve("gradient_residual", term="total"):
        return None
    return median(record.curve("gradient_share", term="variance_penalty")) or 0.0


RULES: tuple[Rule, ...] = (
    Rule(
        id="loss_term_swallowed",
        cause="a loss term with a weight never changes: it is left out or detached",
        group="loss terms",
        severity="defect",
        when=all_of(("swallowed_terms", ">", 0)),
        evidence="{swallowed_term_names}: weight above 0, raw value missing or identical at every epoch",
        next_step="check how the term is computed and that it reaches the total; until then set its weight to 0",
        question=questions.SHARPE_TERM_ABSENT,
        channel="gradient contributions",
        suspects=("term_without_effect",),
    ),
    Rule(
        id="sharpe_term_absent",
        cause="the Sharpe is low and the loss has no Sharpe term",
        group="loss terms",
        severity="explanation",
        when=all_of(("sharpe_weight", "<=", 0), SHARPE_IS_LOW),
        evidence="weight of the Sharpe term: {sharpe_weight:g}; Sharpe {sharpe:.4f}, {sharpe_shortfall:.4f} short",
        next_step="add the Sharpe term (experiment B): {experiment_b}",
        experiments=("B",),
        question=questions.SHARPE_TERM_ABSENT,
        channel="result",
    ),
    Rule(
        id="sharpe_term_light",
        cause="the Sharpe is low and its term is too light compared with the others",
        group="loss terms",
        severity="explanation",
        when=all_of(("sharpe_weight", ">", 0), ("sharpe_loss_share", "<", 0.05), SHARPE_IS_LOW),
        evidence="{sharpe_loss_share:.1%} of the weighted terms' absolute sum, with weight {sharpe_weight:g}",
        next_step="weigh the Sharpe term more (experiment B): {experiment_b}",
        experiments=("B",),
        question=questions.SHARPE_WEIGHT_LOW,
        channel="result",
        suspects=("sharpe_term_light",),
    ),
    Rule(
        id="term_without_effect",
        cause="a loss term has a weight and contributes nothing to the gradient of the loss",
        group="loss terms",
        severity="defect",
        when=all_of(("terms_without_effect", ">", 0), ("unexplained_pull", "<=", HARDLY_EXPLAINED)),
        evidence="effective over configured weights: {effective_weights}",
        next_step="check how the term is computed and that it reaches the total, then train again: {rerun}",
        question=questions.SHARPE_TERM_ABSENT,
        channel="gradient contributions",
        suspects=("term_without_effect",),
        root=True,
    ),
    Rule(
        id="term_reversed",
        cause="the training raises a loss term instead of lowering it",
        group="loss terms",
        severity="defect",
        when=all_of(("terms_reversed", ">", 0), ("unexplained_pull", "<=", HARDLY_EXPLAINED)),
        evidence="effective over configured weights: {effective_weights}",
        next_step="look for a minus sign in the loss, the labels or the step, then train again: {rerun}",
        question=questions.SHARPE_TERM_ABSENT,
        channel="gradient contributions",
        suspects=("term_reversed",),
        root=True,
    ),
    Rule(
        id="loss_altered",
        cause="no term of the loss explains most of its gradient",
        group="loss terms",
        severity="defect",
        when=all_of(("unexplained_pull", ">", HARDLY_EXPLAINED)),
        evidence=(
            "{unexplained_pull:.0%} of it is not explained by the terms on the block's scores and targets;"
            " effective over configured weights: {effective_weights}"
        ),
        next_step=(
            "check which scores, targets and stocks the loss is given, and what is added to it, then train again:"
            " {rerun}"
        ),
        question=questions.SHARPE_TERM_ABSENT,
        channel="loss unexplained",
        suspects=("loss_altered", "term_reversed"),
        root=True,
    ),
    Rule(
        id="loss_unexplained",
        cause="the gradient of the loss does not follow from its terms and weights",
        group="loss terms",
        severity="defect",
        when=all_of(("unexplained_gradient", ">", 0.05)),
        evidence=(
            "no term explains {unexplained_gradient:.0%} of it; effective over configured weights: {effective_weights}"
        ),
        next_step="check what else is added to the loss or scales it, then train again: {rerun}",
        question=questions.SHARPE_TERM_ABSENT,
        channel="loss unexplained",
        suspects=("term_without_effect", "term_reversed", "loss_altered"),
    ),
    Rule(
        id="terms_in_conflict",
        cause="the gradients of loss terms oppose each other",
        group="loss terms",
        severity="explanation",
        when=all_of(("term_conflict", "<", -0.5), ("variance_penalty_share", "<=", PENALTY_DOMINATES)),
        evidence="smallest cosine of a term's gradient with the others': {term_conflict:.2f}",
        next_step="leave the ranking terms out and compare",
        changes=(
            lowered("train.loss.rank_ic", 0),
            lowered("train.loss.sharpe", 0),
        ),
        question=questions.SHARPE_WEIGHT_LOW,
        channel="conflict",
        suspects=("terms_in_conflict",),
    ),
    Rule(
        id="variance_penalty_dominates",
        cause="the variance penalty dominates the gradient of the loss",
        group="loss terms",
        severity="explanation",
        when=all_of(("variance_penalty_share", ">", PENALTY_DOMINATES)),
        evidence="its gradient contribution is {variance_penalty_share:.0%}",
        next_step="weigh the variance penalty less",
        changes=(lowered("train.loss.variance_penalty", 0.1),),
        question=questions.SHARPE_WEIGHT_LOW,
        channel="penalty",
        suspects=("variance_penalty_dominates",),
    ),
)
