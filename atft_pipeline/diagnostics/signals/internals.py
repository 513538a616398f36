"""Signals of what optimizer, loss terms and components did, from a run's own series. None where not recorded."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from atft_pipeline.config.schema import LOSS_TERMS
from atft_pipeline.diagnostics.signals.recorded import Value, plain, planned_lr
from atft_pipeline.runs.reader import Curve, Record, as_number

TERM_READS_NOTHING = 0.2
REVERSED = -0.05
LATE_EPOCHS = 6
"""Effective over configured weight under which a term counts as without effect; honest losses are within 1e-4 of 1."""
NOTICEABLE_SHARE = 0.05
"""Share of the loss's pull under which a term's conflict with the others decides nothing."""


def _median(curve: Curve) -> float | None:
    return float(np.median(list(curve.values()))) if curve else None


def _by_component(record: Record, metric: str) -> dict[str, float]:
    """Component -> median over epochs."""
    medians = {name: _median(record.curve(metric, component=name)) for name in record.components(metric)}
    return {name: value for name, value in medians.items() if value is not None}


def _names(found: list[str] | None) -> str | None:
    return None if found is None else ", ".join(found) or "none"


# Optimizer -------------------------------------------------------------------------------------------------------


def _incomplete(record: Record, metric: str) -> list[str] | None:
    shares = _by_component(record, metric)
    return [name for name, share in shares.items() if share < 1.0] if shares else None


def frozen_components(record: Record) -> float | None:
    """Components some of whose parameters ask for no gradient."""
    names = _incomplete(record, "trainable_share")
    return None if names is None else float(len(names))


def frozen_component_names(record: Record) -> str | None:
    return _names(_incomplete(record, "trainable_share"))


def unoptimized_components(record: Record) -> float | None:
    """Components some of whose parameters the optimizer does not have."""
    names = _incomplete(record, "optimized_share")
    return None if names is None else float(len(names))


def unoptimized_component_names(record: Record) -> str | None:
    return _names(_incomplete(record, "optimized_share"))


def lost_update_share(record: Record) -> float | None:
    """Largest share of a component's elements that a step left as they were, of components that are trained."""
    trained = {
        name: share
        for name, share in _by_component(record, "unchanged_share").items()
        if record.curve("grad_l2", component=name) and (_median(record.curve("grad_l2", component=name)) or 0.0) > 0.0
    }
    whole = {name for name, share in _by_component(record, "optimized_share").items() if share == 1.0}
    free = {name for name, share in _by_component(record, "trainable_share").items() if share == 1.0}
    return max((share for name, share in trained.items() if name in whole & free), default=None)


def parameter_bits(record: Record) -> float | None:
    """Bits of the narrowest parameter."""
    return min(_by_component(record, "parameter_bits").values(), default=None)


def largest_update(record: Record) -> float | None:
    """Largest update-to-weight ratio of any component, median over epochs."""
    return max(_by_component(record, "update_to_weight").values(), default=None)


def peak_update(record: Record) -> float | None:
    """The same, largest over epochs: steps that are too large blow the weights up until their ratio looks usual."""
    curves = [record.curve("update_to_weight", component=name) for name in record.components("update_to_weight")]
    return max((ratio for curve in curves for ratio in curve.values()), default=None)


def update_per_lr(record: Record) -> float | None:
    """l2 of all components' updates over the learning rate, median over epochs; Adam's is near sqrt(parameters)."""
    rates, found = record.curve("lr"), []
    components = record.components("update_to_weight")
    curves = {
        name: (record.curve("update_to_weight", component=name), record.curve("weight_l2", component=name))
        for name in components
    }
    for epoch, rate in rates.items():
        parts = [u[epoch] * w[epoch] for u, w in curves.values() if epoch in u and epoch in w]
        if parts and rate > 0:
            found.append(math.sqrt(sum(part * part for part in parts)) / rate)
    return float(np.median(found)) if found else None


def clip_ratio(record: Record) -> float | None:
    """Gradient norm after over before clipping, median over epochs."""
    before, after = (record.curve("grad_norm", term=term) for term in ("before_clip", "after_clip"))
    return _median({epoch: after[epoch] / before[epoch] for epoch in after if before.get(epoch)})


def optimizer_is_adaptive(record: Record) -> float | None:
    """1 where the optimizer divides by the gradient's own size, so that a constant factor is undone."""
    name = record.run.get("optimizer")
    if not isinstance(name, str):
        return None
    return float("adam" in name.lower() or name.lower() in ("adagrad", "rmsprop", "lion"))


def lr_jump_on_resume(record: Record) -> float | None:
    """Rate of the first epoch after a resume over the last before, relative to the plan's; 0 without a resume."""
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


def loss_jump_on_resume(record: Record) -> float | None:
    """Rise of the training loss over a resume, in median absolute changes from epoch to epoch; 0 without a resume."""
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


def plateau_against_losses(record: Record) -> float | None:
    """Largest |log ratio| of the recorded rate and the one that the validation losses ask for; `plateau` alone."""
    if record.config("train.schedule.name") != "plateau":
        return None
    losses = record.curve("loss_weighted", split="validation", term="total")
    rates = record.curve("lr")
    base, factor = record.number("train.optimizer.lr", math.nan), record.number("train.schedule.factor", math.nan)
    floor = record.number("train.schedule.min_lr_ratio", 0.0)
    patience = int(record.number("train.schedule.patience", 0))
    if math.isnan(base) or math.isnan(factor) or len(losses) < 3 or not rates:
        return None
    best, waited, share, gaps = math.inf, 0, 1.0, []
    warm = math.ceil(record.number("train.schedule.warmup_fraction", 0.0) * (record.epochs_planned or 0))
    for epoch, rate in rates.items():
        if epoch > warm and rate > 0:
            gaps.append(abs(math.log(rate / (base * share))))
        loss = losses.get(epoch, math.inf)
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited > patience:
            share, waited = max(share * factor, floor), 0
    return max(gaps, default=None)


# Loss ------------------------------------------------------------------------------------------------------------


def _effective(record: Record) -> dict[str, float] | None:
    """Term with a weight -> effective over configured weight, median over the epochs in which it can be told."""
    if not record.scalar("SELECT count(*) FROM series WHERE metric = 'gradient_residual'"):
        return None
    found = {}
    for term in LOSS_TERMS:
        weights = record.curve("loss_weight", split="train", term=term)
        pulls = record.curve("effective_weight", term=term)
        ratios = [pulls[epoch] / weights[epoch] for epoch in pulls if weights.get(epoch, 0.0) > 0.0]
        if ratios:
            found[term] = float(np.median(ratios))
    return found


def terms_without_effect(record: Record) -> float | None:
    """Loss terms with a weight whose gradient is not in the loss's."""
    effective = _effective(record)
    return (
        None if effective is None else float(sum(REVERSED < ratio < TERM_READS_NOTHING for ratio in effective.values()))
    )


def terms_reversed(record: Record) -> float | None:
    """Loss terms that the training increases instead of lowering."""
    effective = _effective(record)
    return None if effective is None else float(sum(ratio <= REVERSED for ratio in effective.values()))


def effective_weights(record: Record) -> str | None:
    effective = _effective(record)
    return None if effective is None else ", ".join(f"{term} {ratio:.3g}" for term, ratio in effective.items()) or None


def unexplained_gradient(record: Record) -> float | None:
    """Share of the loss's gradient that no configured term explains, median over epochs."""
    return _median(record.curve("gradient_residual", term="total"))


def unexplained_pull(record: Record) -> float | None:
    """The same, 0 where the head gets no gradient at all: a loss that pulls nowhere does not pull elsewhere."""
    unexplained = unexplained_gradient(record)
    pulls = (_median(record.curve("grad_l2", component="prediction_head")) or 0.0) > 0.0
    return unexplained if unexplained is None or pulls else 0.0


def term_conflict(record: Record) -> float | None:
    """Smallest cosine of a term's pull with the others', of terms with a share worth the name; 1 with one term."""
    if not record.curve("gradient_residual", term="total"):
        return None
    cosines = []
    for term in LOSS_TERMS:
        share, cosine = (record.curve(metric, term=term) for metric in ("gradient_share", "gradient_cosine"))
        if (_median(share) or 0.0) >= NOTICEABLE_SHARE and cosine:
            cosines.append(_median(cosine) or 0.0)
    return min(cosines, default=1.0)


def variance_penalty_share(record: Record) -> float | None:
    """Share of the loss's pull that the variance penalty has, median over epochs; 0 where it is not in force."""
    if not record.curve("gradient_residual", term="total"):
        return None
    return _median(record.curve("gradient_share", term="variance_penalty")) or 0.0


def train_gain(record: Record) -> float | None:
    """1 - mean squared error of standardised targets, mean of the last quarter of the epochs: what is fitted."""
    return _late_gain(record, "train")


def validation_gain(record: Record) -> float | None:
    """The same on validation; below 0 the predictions are worse than a constant."""
    return _late_gain(record, "validation")


def _late_gain(record: Record, split: str) -> float | None:
    values = list(record.curve("loss_raw", split=split, term="mse").values())
    # Before some epochs are done every loss is worse than a constant's.
    return 1.0 - float(np.mean(values[-(len(values) // 4 or 1) :])) if len(values) >= LATE_EPOCHS else None


def loss_spike(record: Record) -> float | None:
    """(largest - median) over the range from the 10th to the 90th percentile of the step losses after epoch 1.

    The epoch after one at whose end the guard drew the head anew is left out: that jump is the guard's.
    """
    (row,) = record.rows(
        """SELECT (max(value) - median(value)) / nullif(quantile_cont(value, 0.9) - quantile_cont(value, 0.1), 0)
           FROM series WHERE metric = 'loss' AND step IS NOT NULL AND epoch > 1 AND isfinite(value)
           AND epoch NOT IN (SELECT epoch + 1 FROM series WHERE metric = 'degeneracy_reset' AND value > 0)"""
    )
    return None if row[0] is None else float(row[0])


# Components ------------------------------------------------------------------------------------------------------


def _late(record: Record, metric: str, component: str) -> float | None:
    values = list(record.curve(metric, component=component).values())
    return float(np.median(values[-max(1, len(values) // 4) :])) if values else None


def encoder_spread(record: Record) -> float | None:
    """How much the stocks differ in what the encoder hands on (`stock_spread` of the backbone projection), late."""
    return _late(record, "stock_spread", "backbone_projection")


def encoder_spread_max(record: Record) -> float | None:
    """The same at the epoch where it is largest: what is cut off is so from the first."""
    return max(record.curve("stock_spread", component="backbone_projection").values(), default=None)


def graph_spread(record: Record) -> float | None:
    return _late(record, "stock_spread", "gat")


def fusion_spread(record: Record) -> float | None:
    return _late(record, "stock_spread", "fusion")


def graph_or_encoder_spread(record: Record) -> float | None:
    """The smaller of the two: what the fusion has to work with; the encoder's where there is no graph."""
    return min((v for v in (encoder_spread(record), graph_spread(record)) if v is not None), default=None)


def dead_units(record: Record) -> float | None:
    """Largest share of units without an answer, of any component but the head's four outputs, late."""
    names = [name for name in record.components("dead_units") if name != "prediction_head"]
    return max((share for name in names if (share := _late(record, "dead_units", name)) is not None), default=None)


def attention_entropy(record: Record) -> float | None:
    """Smallest mean entropy of an attention, relative to equal weights, late."""
    names = record.components("attention_entropy")
    return min((e for name in names if (e := _late(record, "attention_entropy", name)) is not None), default=None)


_ALL: tuple[Callable[[Record], Value], ...] = (
    frozen_components,
    frozen_component_names,
    unoptimized_components,
    unoptimized_component_names,
    lost_update_share,
    parameter_bits,
    largest_update,
    peak_update,
    update_per_lr,
    clip_ratio,
    optimizer_is_adaptive,
    lr_jump_on_resume,
    loss_jump_on_resume,
    plateau_against_losses,
    terms_without_effect,
    terms_reversed,
    effective_weights,
    unexplained_gradient,
    unexplained_pull,
    term_conflict,
    variance_penalty_share,
    train_gain,
    validation_gain,
    loss_spike,
    encoder_spread,
    encoder_spread_max,
    graph_spread,
    fusion_spread,
    graph_or_encoder_spread,
    dead_units,
    attention_entropy,
)

SIGNALS: dict[str, Callable[[Record], Value]] = {function.__name__: function for function in _ALL}


def measure(record: Record) -> dict[str, Value]:
    """Every signal of SIGNALS, measured on `record`."""
    return {name: plain(function(record)) for name, function in SIGNALS.items()}
