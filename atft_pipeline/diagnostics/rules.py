"""The rule table: what each cause looks like in the record, and what to do next. Rows, not branches.

A rule fires when all its conditions hold. It is `not_assessable` as soon as one of its signals was not measured,
whatever the others say: missing evidence is never "fine". Validity rules stand first and veto the rest, because a
number that is not this run's own explains nothing about it.
"""

from __future__ import annotations

import math
import operator
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from atft_pipeline.diagnostics.signals import Signals, Value

Status = Literal["fired", "not_fired", "not_assessable"]
Severity = Literal["invalid", "failure", "defect", "explanation", "observation"]
"""`invalid`: the Sharpe must not be read. `failure`: the run did not end. `defect`: wrong whatever the Sharpe is.
`explanation`: would explain a low Sharpe, and is only an observation where the Sharpe is not low. `observation`."""
Group = Literal["validity", "runtime", "data", "curves", "learning rate", "loss terms", "ic", "gradients", "noise"]

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}

FLAT_LOSS = 2e-4
"""Relative change of a loss that reads as none. With standardised targets the mse can fall by IC² only: 0.0009 for an
IC of 0.03, so a threshold of a per cent would call every healthy run flat."""
RECOMPUTED_SHARPE_TOLERANCE = 1e-6
STORED_SHARPE_TOLERANCE = 1e-3
DEGENERACY_RESETS_ALLOWED = 5


@dataclass(frozen=True)
class Condition:
    signal: str
    comparison: str
    threshold: float

    def __str__(self) -> str:
        return f"{self.signal} {self.comparison} {self.threshold:g}"


@dataclass(frozen=True)
class Rule:
    """`evidence` is filled with signals, `next_step` with the run's commands (experiments.Commands)."""

    id: str
    cause: str
    group: Group
    severity: Severity
    when: tuple[Condition, ...]
    evidence: str
    next_step: str
    report_line: str
    """The line of the validation report that this rule answers."""

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(condition.signal for condition in self.when))


@dataclass(frozen=True)
class Finding:
    """One rule held against one run."""

    rule: str
    cause: str
    group: Group
    severity: Severity
    status: Status
    decisive: bool
    """Fired, and no validity rule forbids reading it."""
    evidence: str
    condition: str
    next_step: str
    report_line: str


def _when(*conditions: tuple[str, str, float]) -> tuple[Condition, ...]:
    return tuple(Condition(*condition) for condition in conditions)


SHARPE_IS_LOW = ("sharpe_shortfall", ">", 0.0)

RULES: tuple[Rule, ...] = (
    # Validity ------------------------------------------------------------------------------------------------------
    Rule(
        "verdict_of_other_weights",
        "the verdict speaks of weights or predictions that this run never evaluated",
        "validity",
        "invalid",
        _when(("verdict_hashes_elsewhere", ">", 0)),
        "{verdict_hashes_elsewhere:.0f} of the verdict's weights_hash and predictions_hash occur in no evaluation of"
        " this run at the epochs it names",
        "train again into a fresh directory and keep no file of an older run in it: {rerun}",
        "Is the Sharpe this run's own?",
    ),
    Rule(
        "verdict_of_other_run",
        "the verdict belongs to another run, configuration or dataset",
        "validity",
        "invalid",
        _when(("verdict_keys_elsewhere", ">", 0)),
        "{verdict_keys_elsewhere:.0f} of run key, config key and dataset fingerprint differ between verdict.json and"
        " run.json",
        "train again into a fresh directory: {rerun}",
        "Is the Sharpe this run's own?",
    ),
    Rule(
        "verdict_sharpe_not_in_evals",
        "the Sharpe of the verdict is not the one this run's evaluation measured",
        "validity",
        "invalid",
        _when(("verdict_sharpe_gap", ">", RECOMPUTED_SHARPE_TOLERANCE)),
        "verdict {verdict_sharpe:.4f}, evaluations {sharpe_by_epoch}; difference {verdict_sharpe_gap:.2g}",
        "recompute it from the stored predictions: {evaluate}",
        "Is the Sharpe this run's own?",
    ),
    Rule(
        "sharpe_not_of_daily_returns",
        "the recorded Sharpe does not follow from this run's own daily returns",
        "validity",
        "invalid",
        _when(("daily_sharpe_gap", ">", RECOMPUTED_SHARPE_TOLERANCE)),
        "mean/std (ddof 1) of daily.gross differs from evals.sharpe_daily by up to {daily_sharpe_gap:.2g}",
        "recompute it from the stored predictions: {evaluate}",
        "Is the Sharpe this run's own?",
    ),
    Rule(
        "sharpe_not_of_predictions",
        "the recorded Sharpe does not follow from this run's stored predictions",
        "validity",
        "invalid",
        _when(("predictions_sharpe_gap", ">", STORED_SHARPE_TOLERANCE)),
        "the portfolio of predictions/ has a Sharpe up to {predictions_sharpe_gap:.2g} away from evals.sharpe_daily",
        "recompute it from the stored predictions: {evaluate}",
        "Is the Sharpe this run's own?",
    ),
    Rule(
        "sharpe_never_changes",
        "the same Sharpe at different epochs: it does not depend on the weights",
        "validity",
        "invalid",
        _when(("sharpe_repeat_span", ">=", 3)),
        "one value, to 12 digits, over {sharpe_repeat_span:.0f} epochs of training ({sharpe_by_epoch})",
        "look at the dispersion of the predictions and at the hashes of the evaluations; then train again into a fresh"
        " directory: {rerun}",
        "Does the Sharpe depend on the weights?",
    ),
    Rule(
        "predictions_constant",
        "the predictions are constant within a session: there is no ranking to evaluate",
        "validity",
        "invalid",
        _when(("score_dispersion", "<", 1e-6)),
        "std of the scores within a session, median: {score_dispersion:.2g}",
        "re-draw the head earlier and learn from ranks: {train} --set train.guard.patience=1 --set train.loss.ic=0.5",
        "Are the predictions degenerate?",
    ),
    Rule(
        "evaluation_invalid",
        "evaluations were refused: scores constant or not finite",
        "validity",
        "invalid",
        _when(("invalid_evaluations", ">", 0)),
        "{invalid_evaluations:.0f} evaluations with valid = 0",
        "ask for the reason of one epoch: {evaluate}",
        "Are the predictions degenerate?",
    ),
    Rule(
        "weights_never_change",
        "the evaluated weights did not change although the learning rate was not 0",
        "validity",
        "invalid",
        _when(("weights_hash_repeats", ">", 0)),
        "{weights_hash_repeats:.0f} evaluations carry the weights_hash of the evaluation before, or of the initial"
        " weights; peak learning rate {lr_peak:.1e}",
        "check update_to_weight by component; evaluate the raw weights: {train} --set train.weight_ema=0",
        "Does the Sharpe depend on the weights?",
    ),
    Rule(
        "predictions_never_change",
        "the predictions did not change although the weights were trained",
        "validity",
        "invalid",
        _when(("predictions_hash_repeats", ">", 0)),
        "{predictions_hash_repeats:.0f} evaluations carry the predictions_hash of the evaluation before",
        "compare two predictions files of different epochs, then train again into a fresh directory: {rerun}",
        "Does the Sharpe depend on the weights?",
    ),
    Rule(
        "validity_item_failed",
        "the validity battery failed",
        "validity",
        "invalid",
        _when(("validity_failed", ">", 0)),
        "failed: {validity_failed_names}",
        "repair what the item names before reading any figure; recompute with: {evaluate}",
        "Is the Sharpe this run's own?",
    ),
    # Runtime -------------------------------------------------------------------------------------------------------
    Rule(
        "non_finite_loss",
        "a loss or gradient was not finite",
        "runtime",
        "failure",
        _when(("non_finite_losses", ">", 0)),
        "{non_finite_losses:.0f} recorded values are not finite; peak learning rate {lr_peak:.1e}",
        "lower the learning rate: {train} --set train.optimizer.lr=1e-4",
        "Did the run crash?",
    ),
    Rule(
        "run_failed",
        "the run ended with an error",
        "runtime",
        "failure",
        _when(("failed", ">", 0)),
        "after {epochs_done:.0f} of {epochs_planned:.0f} epochs: {failure_reason}",
        "remove the reason, then go on after the last complete epoch with the same command: {resume}",
        "Did the run crash?",
    ),
    Rule(
        "run_killed",
        "the run was killed: it says running, and no process holds it",
        "runtime",
        "failure",
        _when(("abandoned", ">", 0)),
        "{epochs_done:.0f} of {epochs_planned:.0f} epochs recorded, no end in run.json",
        "go on after the last complete epoch with the same command: {resume}",
        "Did the run crash?",
    ),
    Rule(
        "loader_starves_training",
        "training waits for data",
        "runtime",
        "observation",
        _when(("loader_wait_share", ">", 0.3)),
        "{loader_wait_share:.0%} of the training time was spent waiting for blocks",
        "make blocks ahead: {train} --set train.loader_workers=4",
        "Did the run crash?",
    ),
    # Data ----------------------------------------------------------------------------------------------------------
    Rule(
        "features_missing",
        "features carry no values",
        "data",
        "explanation",
        _when(("dead_features", ">", 0)),
        "{live_features:.0f} of {features:.0f} live",
        "give the source the tables that the dataset's manifest names as missing, then build it again:"
        " `atft features SOURCE {dataset}`",
        "Both losses flat: capacity or features?",
    ),
    # Curves --------------------------------------------------------------------------------------------------------
    Rule(
        "validation_flat_early",
        "overfitting: validation stops improving early while the train loss goes on falling",
        "curves",
        "explanation",
        _when(
            ("validation_best_share", "<=", 1 / 3),
            ("train_loss_fall", ">", FLAT_LOSS),
            ("train_fall_after_best", ">", FLAT_LOSS),
        ),
        "lowest validation loss at epoch {validation_best_epoch:.0f} of {epochs_done:.0f}; the train loss fell another"
        " {train_fall_after_best:.2%} after it",
        "regularise: {train} --set model.dropout=0.3 --set train.optimizer.weight_decay=0.1",
        "Validation flat early: overfitting?",
    ),
    Rule(
        "validation_rising",
        "overfitting: the validation loss rises again",
        "curves",
        "explanation",
        _when(("validation_rise", ">", 2e-3), ("validation_rise_of_gain", ">=", 0.5)),
        "it ends {validation_rise:.2%} above its lowest value at epoch {validation_best_epoch:.0f} of"
        " {epochs_done:.0f}",
        "regularise: {train} --set model.dropout=0.3 --set train.optimizer.weight_decay=0.1",
        "Validation flat early: overfitting?",
    ),
    Rule(
        "both_losses_flat",
        "neither loss falls: capacity, features or the learning rate",
        "curves",
        "explanation",
        _when(
            ("train_loss_fall", "<", FLAT_LOSS),
            ("train_loss_fall", ">", -10 * FLAT_LOSS),
            ("validation_loss_fall", "<", FLAT_LOSS),
        ),
        "relative fall: train {train_loss_fall:.2%}, validation {validation_loss_fall:.2%};"
        " {live_features:.0f} of {features:.0f} features live",
        "try more capacity (experiment C): {experiment_c}",
        "Both losses flat: capacity or features?",
    ),
    Rule(
        "both_fall_sharpe_flat",
        "both losses fall and the Sharpe does not follow: the loss is not aligned with it",
        "curves",
        "explanation",
        _when(
            ("train_loss_fall", ">", FLAT_LOSS),
            ("validation_loss_fall", ">", FLAT_LOSS),
            ("sharpe_rise_t", "<", 1.0),
            SHARPE_IS_LOW,
        ),
        "relative fall: train {train_loss_fall:.2%}, validation {validation_loss_fall:.2%}; daily returns changed by"
        " {sharpe_rise_t:.1f} standard errors from the first to the last evaluation",
        "weigh the Sharpe term (experiment B): {experiment_b}",
        "Both losses falling, Sharpe flat: loss not aligned?",
    ),
    # Learning rate -------------------------------------------------------------------------------------------------
    Rule(
        "lr_decayed_early",
        "the learning rate decayed too early",
        "learning rate",
        "explanation",
        _when(("lr_peak", ">=", 1e-5), ("lr_below_1e5_epoch", "<=", 20), ("lr_below_1e5_left_share", ">", 0.2)),
        "peak {lr_peak:.1e}; first epoch under 1e-5: {lr_below_1e5_epoch:.0f}, of {epochs_planned:.0f} planned",
        "decay later (experiment A): {experiment_a}",
        "Learning rate below 1e-5 by epoch 20: decayed too early?",
    ),
    Rule(
        "lr_below_plan",
        "the learning rate fell faster than its schedule foresees",
        "learning rate",
        "defect",
        _when(("lr_to_plan", "<", 0.5)),
        "at its lowest it was {lr_to_plan:.2f} of the planned rate; last {lr_last:.1e}",
        "check that the schedule steps once per optimizer step and knows the planned epochs: {resume}",
        "Learning rate below 1e-5 by epoch 20: decayed too early?",
    ),
    Rule(
        "lr_around_1e6",
        "the learning rate is too low to learn",
        "learning rate",
        "explanation",
        _when(("lr_low_share", ">=", 0.25)),
        "{lr_low_share:.0%} of the first 20 epochs ran at 3e-6 or less (peak {lr_peak:.1e})",
        "raise it (experiment D): {experiment_d}",
        "Learning rate around 1e-6: too low?",
    ),
    Rule(
        "lr_constant_against_plan",
        "the scheduler does not step: the learning rate is constant against its plan",
        "learning rate",
        "defect",
        _when(("lr_spread", "<", 1.05), ("lr_planned_spread", ">", 1.5)),
        "largest over smallest rate after the warm-up: {lr_spread:.2f}, planned {lr_planned_spread:.2f}",
        "check that LearningRateSchedule.step() runs after every optimizer step, then train again: {rerun}",
        "Learning rate constant: scheduler not stepping?",
    ),
    # Loss terms ----------------------------------------------------------------------------------------------------
    Rule(
        "loss_term_swallowed",
        "a loss term with a weight never changes: it is swallowed or detached",
        "loss terms",
        "defect",
        _when(("swallowed_terms", ">", 0)),
        "{swallowed_term_names}: weight above 0, raw value missing or identical at every epoch",
        "check how the term is computed and that it reaches the total; meanwhile set its weight to 0",
        "Sharpe term absent from the loss?",
    ),
    # Nothing learnt at all comes before what the loss lacks: a Sharpe term is no help without signal.
    Rule(
        "ic_flat",
        "IC does not rise and cannot be told from zero: nothing was learnt that generalises",
        "ic",
        "explanation",
        _when(("ic_rise_t", "<", 2.0), ("ic_last_t", "<", 2.0)),
        "IC {ic_last:.4f}, RankIC {rank_ic_last:.4f}, at best {ic_last_t:.1f} standard errors from zero; change since"
        " the first evaluation {ic_rise_t:.1f}",
        "ask the baselines whether the features hold any signal: `dagster asset materialize --select baselines`",
        "IC flat?",
    ),
    Rule(
        "sharpe_term_absent",
        "the Sharpe is low and the loss has no Sharpe term",
        "loss terms",
        "explanation",
        _when(("sharpe_weight", "<=", 0), SHARPE_IS_LOW),
        "weight of the Sharpe term: {sharpe_weight:g}; Sharpe {sharpe:.4f}, {sharpe_shortfall:.4f} short",
        "add it (experiment B): {experiment_b}",
        "Sharpe term absent from the loss?",
    ),
    Rule(
        "sharpe_term_light",
        "the Sharpe is low and its term is too light beside the others",
        "loss terms",
        "explanation",
        _when(("sharpe_weight", ">", 0), ("sharpe_loss_share", "<", 0.05), SHARPE_IS_LOW),
        "{sharpe_loss_share:.1%} of the weighted terms' absolute sum, with weight {sharpe_weight:g}",
        "weigh it more (experiment B): {experiment_b}",
        "Sharpe weight too low?",
    ),
    # IC ------------------------------------------------------------------------------------------------------------
    Rule(
        "ic_rises_sharpe_flat",
        "IC rises and the Sharpe does not: the ranking improves where the portfolio does not trade",
        "ic",
        "explanation",
        _when(("ic_rise_t", ">=", 2.0), ("sharpe_rise_t", "<", 1.0), SHARPE_IS_LOW),
        "from the first to the last evaluation: IC or RankIC {ic_rise_t:.1f}, daily return {sharpe_rise_t:.1f} standard"
        " errors (paired by session)",
        "weigh the tails, i.e. the Sharpe term (experiment B): {experiment_b}",
        "IC rising with Sharpe flat?",
    ),
    # Gradients -----------------------------------------------------------------------------------------------------
    Rule(
        "component_without_gradient",
        "a component receives no gradient: frozen or disconnected",
        "gradients",
        "defect",
        _when(("silent_components", ">", 0)),
        "gradient l2 exactly 0 at every epoch: {silent_component_names}",
        "check that it is on the path from input to loss and in the optimizer, then train again: {rerun}",
        "Encoder gradients low?",
    ),
    Rule(
        "gradient_warnings",
        "gradients vanish in a trainable component",
        "gradients",
        "explanation",
        _when(("gradient_warnings", ">", 0)),
        "{gradient_warnings:.0f} warnings (an epoch of a component with l2 under 1e-7): {gradient_warning_names}",
        "raise the learning rate (experiment D): {experiment_d}",
        "Encoder gradients low?",
    ),
    Rule(
        "encoder_gradient_falling",
        "the temporal encoder's gradients fade",
        "gradients",
        "explanation",
        _when(("encoder_gradient_ratio", "<", 0.1)),
        "late over early l2: {encoder_gradient_ratio:.3f}",
        "see whether the encoder still contributes by leaving the skip path out: {train} --set model.skip=false",
        "Encoder gradients falling?",
    ),
    Rule(
        "encoder_gradient_low",
        "the temporal encoder's gradients are low throughout",
        "gradients",
        "explanation",
        _when(("encoder_gradient", "<", 1e-5)),
        "median l2 {encoder_gradient:.2g}",
        "raise the learning rate (experiment D): {experiment_d}",
        "Encoder gradients low?",
    ),
    Rule(
        "gradients_rising",
        "gradients grow: training is becoming unstable",
        "gradients",
        "explanation",
        _when(("gradient_rise", ">", 10.0)),
        "largest late over early l2: {gradient_rise:.1f} ({gradient_rise_name})",
        "clip tighter: {train} --set train.optimizer.clip_norm=0.5",
        "Encoder gradients rising?",
    ),
    Rule(
        "graph_dominates_encoder",
        "graph gradients dominate the encoder's",
        "gradients",
        "explanation",
        _when(("graph_to_encoder_gradient", ">", 10.0)),
        "gat over temporal_encoder l2, median epoch: {graph_to_encoder_gradient:.1f}; gradients alone do not decide who"
        " contributes",
        "ablate the graph and compare daily IC: {train} --set model.graph=false",
        "Graph gradients dominating?",
    ),
    Rule(
        "clipping_bites",
        "most steps are clipped",
        "gradients",
        "observation",
        _when(("clipped_share", ">", 0.5)),
        "{clipped_share:.0%} of the steps; AdamW undoes a constant factor, so this alone rarely costs anything",
        "none needed; to see: {train} --set train.optimizer.clip_norm=5",
        "Encoder gradients rising?",
    ),
    Rule(
        "predictions_collapse",
        "the predictions collapsed towards a constant",
        "gradients",
        "explanation",
        _when(("degeneracy_events", ">", 0)),
        "{degeneracy_events:.0f} checks under the guard's dispersion ratio, {degeneracy_resets:.0f} resets of the head",
        "learn from ranks, whose loss a constant does not minimise: {train} --set train.loss.ic=0.5",
        "Are the predictions degenerate?",
    ),
    Rule(
        "degeneracy_resets_many",
        "the head was re-drawn again and again",
        "gradients",
        "defect",
        _when(("degeneracy_resets", ">=", DEGENERACY_RESETS_ALLOWED)),
        "{degeneracy_resets:.0f} resets; fewer than 5 are expected",
        "lower the learning rate and learn from ranks: {train} --set train.optimizer.lr=3e-4 --set train.loss.ic=0.5",
        "Are the predictions degenerate?",
    ),
    # Noise ---------------------------------------------------------------------------------------------------------
    Rule(
        "sampling_noise",
        "too few sessions to tell the Sharpe from the threshold",
        "noise",
        "explanation",
        _when(("sharpe_distance_se", "<", 1.645)),
        "Sharpe {sharpe:.4f} ± {sharpe_se:.4f} against {sharpe_demanded:.2f}: {sharpe_distance_se:.1f} standard errors"
        " apart",
        "validate on more sessions: {train} --set split.scheme=sessions --set split.validation_sessions=500",
        "Is the criterion decided?",
    ),
)


def assess(signals: Signals, commands: dict[str, str], rules: Sequence[Rule] = RULES) -> list[Finding]:
    """Every rule held against `signals`, in the table's order. An explanation of a Sharpe that is not low is an
    observation; nothing is decisive while a validity rule has fired, but that rule."""
    statuses = {rule.id: status_of(rule, signals) for rule in rules}
    vetoed = any(statuses[rule.id] == "fired" and rule.severity == "invalid" for rule in rules)
    shortfall = signals.get("sharpe_shortfall")
    is_low = not isinstance(shortfall, float) or shortfall > 0
    return [_finding(rule, statuses[rule.id], signals, commands, vetoed=vetoed, is_low=is_low) for rule in rules]


def status_of(rule: Rule, signals: Signals) -> Status:
    values = [(signals.get(condition.signal), condition) for condition in rule.when]
    if any(not isinstance(value, float) for value, _ in values):
        return "not_assessable"
    holds = all(OPERATORS[c.comparison](value, c.threshold) for value, c in values if isinstance(value, float))
    return "fired" if holds else "not_fired"


def _finding(
    rule: Rule, status: Status, signals: Signals, commands: dict[str, str], *, vetoed: bool, is_low: bool
) -> Finding:
    fired = status == "fired"
    severity: Severity = "observation" if rule.severity == "explanation" and not is_low else rule.severity
    unmeasured = [name for name in rule.needs if not isinstance(signals.get(name), float)]
    return Finding(
        rule=rule.id,
        cause=rule.cause,
        group=rule.group,
        severity=severity,
        status=status,
        decisive=fired and (rule.severity == "invalid" or not vetoed),
        evidence=_fill(rule.evidence, signals) if not unmeasured else f"not measured: {', '.join(unmeasured)}",
        condition=" and ".join(map(str, rule.when)),
        next_step=rule.next_step.format_map(commands) if fired else "",
        report_line=rule.report_line,
    )


class _Evidence(string.Formatter):
    """Says in words what a number format cannot: a signal that was not measured, an epoch that never came."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            return "not measured"
        return "never" if value == math.inf else str(format(value, format_spec))


def _fill(template: str, signals: Signals) -> str:
    values: dict[str, Value] = dict(signals)
    return _Evidence().vformat(template, (), values)
