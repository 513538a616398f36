"""All topics of a diagnosis in one table: the rules in the order of the report, and the signals that they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

from atft_pipeline.diagnostics.rule import Rule
from atft_pipeline.diagnostics.signal import Audit, Measure
from atft_pipeline.diagnostics.topics import (
    components,
    curves,
    dataset,
    gradients,
    inputs,
    learning_rate,
    loss_terms,
    predictions,
    reported_figures,
    results,
    runtime,
    steps,
    weights,
)

TOPICS: tuple[ModuleType, ...] = (
    reported_figures, weights, predictions, dataset, inputs, runtime, curves, learning_rate, steps, loss_terms,
    gradients, components, results,
)  # fmt: skip
"""Modules with `RULES`, `SIGNALS` and perhaps `AUDITS`."""

REPORT_ORDER: tuple[str, ...] = (
    "verdict_of_other_weights", "verdict_of_other_run", "verdict_sharpe_not_in_evals",
    "sharpe_not_of_daily_returns", "sharpe_not_of_predictions", "sharpe_never_changes", "sharpe_alone_stands_still",
    "predictions_constant", "evaluation_invalid", "weights_never_change", "predictions_never_change",
    "validity_item_failed", "verdict_is_the_maximum", "verdict_from_elsewhere", "ic_not_of_daily_rows",
    "sharpe_of_another_unit", "weights_hash_returns", "initial_weights_evaluated", "weights_hash_stale",
    "predictions_stand_still", "predictions_not_of_checkpoint", "predictions_minus_checkpoint",
    "predictions_of_early_checkpoint", "scores_negated", "daily_ic_inverted", "daily_ic_of_other_scores",
    "squared_error_not_of_predictions", "validation_overlaps_training", "validation_elsewhere", "trained_elsewhere",
    "train_not_seen", "targets_of_another_definition", "targets_unlike_source", "evaluation_twice_differs",
    "constant_scores_accepted", "scores_tied", "rows_not_evaluated", "non_finite_loss", "run_failed",
    "run_not_finite", "run_killed", "loader_starves_training", "replay_differs", "initial_weights_not_of_seed",
    "rate_jumps_on_resume", "loss_jumps_on_resume", "epochs_missing", "features_missing", "inputs_constant",
    "last_session_empty", "inputs_scaled", "inputs_drifted", "inputs_exchanged", "inputs_unlike_dataset",
    "labels_unlike_dataset", "stocks_not_given", "feature_too_good", "result_too_good", "features_know_later",
    "rows_unlike_source", "no_stock_leaves", "dataset_altered", "graph_unlike_dataset", "baseline_finds_nothing",
    "baseline_finds_more", "relation_reversed", "ic_negative", "validation_flat_early", "validation_rising",
    "both_losses_flat", "both_fall_sharpe_flat", "lr_decayed_early", "lr_below_plan", "lr_around_1e6",
    "lr_constant_against_plan", "steps_too_large", "steps_too_small", "loss_spikes", "updates_clipped_away",
    "clipping_not_undone", "updates_lost", "nothing_moves", "parameters_narrow", "plateau_against_losses",
    "not_in_optimizer", "component_frozen", "loss_term_swallowed", "ic_flat", "sharpe_term_absent",
    "sharpe_term_light", "term_without_effect", "term_reversed", "loss_altered", "loss_unexplained",
    "terms_in_conflict", "variance_penalty_dominates", "worse_than_constant_in_training", "fits_training_alone",
    "ic_rises_sharpe_flat", "component_without_gradient", "gradient_warnings", "encoder_gradient_falling",
    "encoder_gradient_low", "encoder_never_heard", "gradients_rising", "graph_dominates_encoder", "clipping_bites",
    "predictions_collapse", "degeneracy_resets_many", "encoder_says_nothing", "encoder_fell_silent",
    "graph_smooths", "stocks_look_alike", "head_hears_nothing", "units_dead", "attention_collapsed", "encoder_idle",
    "graph_idle", "experiment_a_helped", "experiment_b_helped", "experiment_c_helped", "experiment_d_helped",
    "sharpe_below_demanded", "sampling_noise",
)  # fmt: skip
"""Order in which findings are reported: what proves the Sharpe false, then what stopped the run, then what it was
given, how it trained, and what it learnt. Rules that are not named here follow, topic by topic."""


@dataclass(frozen=True)
class RuleTable:
    rules: tuple[Rule, ...]
    signals: Mapping[str, Measure]
    audits: tuple[Audit, ...]


def table_of(topics: Sequence[ModuleType]) -> RuleTable:
    """The topics as one table. Raises ValueError where two rules or two signals have the same name."""
    rules = [rule for topic in topics for rule in topic.RULES]
    audits = tuple(audit for topic in topics for audit in getattr(topic, "AUDITS", ()))
    signals = {name: measure for topic in topics for name, measure in topic.SIGNALS.items()}
    measured = [name for topic in topics for name in topic.SIGNALS] + [name for audit in audits for name in audit.names]
    for names in ([rule.id for rule in rules], measured):
        duplicates = sorted({name for name in names if names.count(name) > 1})
        if duplicates:
            raise ValueError(f"two topics define {duplicates[0]!r}")
    position = {id: number for number, id in enumerate(REPORT_ORDER)}
    return RuleTable(tuple(sorted(rules, key=lambda rule: position.get(rule.id, len(position)))), signals, audits)


TABLE = table_of(TOPICS)
RULES = TABLE.rules
