"""Every rule of the table: a run that fires it, the healthy run that does not, a record that does not measure it."""

from __future__ import annotations

import fcntl
import math
import pickle
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Trained
from run_directories import COMPONENTS, EPOCHS, Tables, frozen_failure, healthy, honest_probes
from training_runs import (
    change_inputs,
    change_predictions,
    exchange_inputs,
    of_other_sessions,
    split_sessions,
    with_scores,
    without_inputs,
)

from atft_pipeline.diagnostics.commands import next_steps
from atft_pipeline.diagnostics.diagnose import Diagnosis, Finding, diagnose
from atft_pipeline.diagnostics.gather import LATER_SIGNALS, audited_names, gather
from atft_pipeline.diagnostics.report.sections import to_markdown
from atft_pipeline.diagnostics.rule import Rule, assess, status_of
from atft_pipeline.diagnostics.rule_table import RULES, TABLE
from atft_pipeline.errors import InputError
from atft_pipeline.inspection.reader import open_record

WITH_SHARPE_TERM = {"train.loss.sharpe": 0.5}


def unspoilt(skill: float, overrides: tuple[tuple[str, object], ...]) -> Tables:
    return pickle.loads(_pickled(skill, overrides))


@cache
def _pickled(skill: float, overrides: tuple[tuple[str, object], ...]) -> bytes:
    """Made once and loaded per test, which takes a tenth of the time."""
    tables = healthy(skill, dict(overrides))
    tables.probes = honest_probes()
    tables.experiments = dict.fromkeys("ABCD", 0.5)
    return pickle.dumps(tables)


def spoilt(change: Callable[[Tables], object], *, skill: float = 0.5, **overrides: object) -> Callable[[], Tables]:
    def build() -> Tables:
        tables = unspoilt(skill, tuple((name.replace("__", "."), value) for name, value in overrides.items()))
        change(tables)
        return tables

    return build


def _foreign_verdict_value(tables: Tables) -> None:
    tables.verdict["criterion"]["value"] = 0.0818


def _foreign_evals(tables: Tables) -> None:
    tables.set_evals("sharpe_daily", lambda epoch: 0.3 + 0.001 * epoch)
    tables.predictions.clear()


def _foreign_predictions(tables: Tables) -> None:
    tables.predictions[20] = tables.predictions[1]


def _same_sharpe(tables: Tables) -> None:
    tables.set_evals("sharpe_daily", lambda _: 0.0818)


def _constant_scores(tables: Tables) -> None:
    for row in tables.predictions[20]:
        row["score_1d"] = 0.25


def _frozen_hash(column: str) -> Callable[[Tables], None]:
    def change(tables: Tables) -> None:
        for row in tables.evals:
            row[column] = "frozen"

    return change


def _failed_item(tables: Tables) -> None:
    tables.verdict["validity"].append({"name": "permutation_earns_nothing", "passed": False, "explanation": "5 se"})


def _losses(train: Callable[[int], float], validation: Callable[[int], float]) -> Callable[[Tables], None]:
    def change(tables: Tables) -> None:
        tables.set_series("loss_weighted", train, split="train", term="total")
        tables.set_series("loss_weighted", validation, split="validation", term="total")

    return change


def _lr(rate: Callable[[int], float]) -> Callable[[Tables], None]:
    return lambda tables: tables.set_series("lr", rate)


def _gradient(component: str, l2: Callable[[int], float]) -> Callable[[Tables], None]:
    return lambda tables: tables.set_series("grad_l2", l2, component=component)


def _ic_rises_alone(tables: Tables) -> None:
    for row in tables.daily:
        row["ic"] = row["rank_ic"] = 0.002 * row["epoch"] + 0.001 * (row["date"].toordinal() % 3)


def _never_learnt(tables: Tables) -> None:
    for row in tables.daily:
        row["ic"] = row["rank_ic"] = 0.05 * (-1) ** row["date"].toordinal()


def _undecided(tables: Tables) -> None:
    tables.set_evals("sharpe_daily", lambda _: 0.15)
    for row in tables.evals:
        row["se"] = 0.06 if row["metric"] == "sharpe_daily" else None


def _clearly_below(tables: Tables) -> None:
    _undecided(tables)
    tables.set_evals("sharpe_daily", lambda _: -0.15)


def _evals(metric: str, value: Callable[[int, float], float]) -> Callable[[Tables], None]:
    """Replaces the recorded values; `value` gets epoch and honest value."""

    def change(tables: Tables) -> None:
        own = {row["epoch"]: row["value"] for row in tables.evals if row["metric"] == metric}
        tables.set_evals(metric, lambda epoch: value(epoch, own[epoch]))

    return change


def _best_epoch_as_final(tables: Tables) -> None:
    _evals("sharpe_daily", lambda epoch, own: own + 2.0 * (epoch == 12))(tables)
    tables.verdict["criterion"]["value"] = max(r["value"] for r in tables.evals if r["metric"] == "sharpe_daily")


def _hashes(weights: Callable[[int], str]) -> Callable[[Tables], None]:
    def change(tables: Tables) -> None:
        for row in tables.evals:
            row["weights_hash"] = weights(row["epoch"])

    return change


def _twice_differs(tables: Tables) -> None:
    tables.verdict["validity"] = [{"name": "evaluating_twice_agrees", "passed": False, "explanation": "0.3 apart"}]


def _resumed_elsewhere(tables: Tables) -> None:
    tables.run["resumed_after_epoch"] = 10
    rates = {row["epoch"]: row["value"] for row in tables.series if row["metric"] == "lr"}
    tables.set_series("lr", lambda epoch: rates[epoch] * (0.1 if epoch > 10 else 1.0))


SPIKE_EPOCH = 9


def _spike(tables: Tables) -> None:
    next(row for row in tables.series if row["metric"] == "loss" and row["epoch"] == SPIKE_EPOCH)["value"] = 4.0


def _loss_lost_on_resume(tables: Tables) -> None:
    tables.run["resumed_after_epoch"] = 10
    losses = lambda epoch: 1.0 - 0.001 * epoch + 0.1 * (epoch > 10)  # noqa: E731
    tables.set_series("loss_weighted", losses, split="train", term="total")


def _negative_ic(tables: Tables) -> None:
    for row in tables.daily:
        row["ic"] = -0.02 + 0.01 * (-1) ** row["date"].toordinal()


def _probed(name: str, **figures: float | str) -> Callable[[Tables], None]:
    return lambda tables: tables.probes[name].update(figures)


def _series(metric: str, value: float, **where: str) -> Callable[[Tables], None]:
    return lambda tables: tables.set_series(metric, lambda _: value, **where)


def _all(*changes: Callable[[Tables], object]) -> Callable[[Tables], None]:
    def change(tables: Tables) -> None:
        for one in changes:
            one(tables)

    return change


def _plateau(validation: Callable[[int], float]) -> Callable[[], Tables]:
    """The rate never moves, whatever the validation losses are."""
    return spoilt(
        _all(
            _lr(lambda _: 1e-3),
            lambda t: t.set_series("loss_weighted", validation, split="validation", term="total"),
        ),
        train__schedule__name="plateau",
        train__schedule__patience=2,
    )


def _mse(train: float, validation: float) -> Callable[[Tables], None]:
    return _all(
        _series("loss_raw", train, split="train", term="mse"),
        _series("loss_raw", validation, split="validation", term="mse"),
    )


def _without_epoch_9(tables: Tables) -> None:
    tables.series = [row for row in tables.series if row["epoch"] != 9]


FIRES: dict[str, Callable[[], Tables]] = {
    "verdict_of_other_weights": spoilt(lambda t: t.verdict.update(weights_hash="elsewhere")),
    "verdict_of_other_run": spoilt(lambda t: t.verdict.update(run_key="k2")),
    "verdict_sharpe_not_in_evals": spoilt(_foreign_verdict_value),
    "sharpe_not_of_daily_returns": spoilt(_foreign_evals),
    "sharpe_not_of_predictions": spoilt(_foreign_predictions),
    "sharpe_never_changes": spoilt(_same_sharpe),
    "sharpe_alone_stands_still": spoilt(_same_sharpe),
    "predictions_constant": spoilt(_constant_scores),
    "evaluation_invalid": spoilt(lambda t: t.set_evals("valid", lambda epoch: float(epoch != 7))),
    "weights_never_change": spoilt(_frozen_hash("weights_hash")),
    "predictions_never_change": spoilt(_frozen_hash("predictions_hash")),
    "validity_item_failed": spoilt(_failed_item),
    "non_finite_loss": spoilt(
        lambda t: t.set_series("loss_raw", lambda e: float("nan") if e == 9 else 1.0 / e, term="mse")
    ),
    "run_failed": spoilt(lambda t: t.run.update(status="failed", reason="RuntimeError: the source went away")),
    "run_not_finite": spoilt(
        lambda t: t.run.update(status="failed", reason="RunFailure: epoch 3, step 40: the loss is nan")
    ),
    "epochs_missing": spoilt(_without_epoch_9),
    "run_killed": spoilt(lambda t: t.run.update(status="running", ended=None)),
    "loader_starves_training": spoilt(lambda t: t.set_series("loader_wait_s", lambda _: 6.0)),
    "features_missing": spoilt(lambda t: t.run.update(live_features=55)),
    "validation_flat_early": spoilt(_losses(lambda e: 1 - 0.01 * e, lambda e: 1.0 - 0.005 * min(e, 4) + 1e-6 * e)),
    "validation_rising": spoilt(_losses(lambda e: 1 - 0.01 * e, lambda e: 1.0 + 0.01 * abs(e - 5))),
    "both_losses_flat": spoilt(_losses(lambda e: 1 + 1e-5 * (-1) ** e, lambda e: 1 - 1e-5 * (-1) ** e)),
    "both_fall_sharpe_flat": spoilt(lambda _: None, skill=0.0),
    "lr_decayed_early": spoilt(_lr(lambda e: 1e-3 * 0.3**e)),
    "lr_below_plan": spoilt(_lr(lambda e: 1e-3 * 0.5**e)),
    "lr_around_1e6": spoilt(_lr(lambda _: 1e-6)),
    "lr_constant_against_plan": spoilt(_lr(lambda _: 1e-3)),
    "loss_term_swallowed": spoilt(
        lambda t: t.set_series("loss_raw", lambda _: 0.0, term="sharpe"), train__loss__sharpe=0.5
    ),
    "sharpe_term_absent": spoilt(lambda _: None, skill=0.0),
    "sharpe_term_light": spoilt(lambda _: None, skill=0.0, train__loss__sharpe=0.01),
    "ic_rises_sharpe_flat": spoilt(_ic_rises_alone, skill=0.0),
    "ic_flat": spoilt(_never_learnt),
    "component_without_gradient": spoilt(_gradient("gat", lambda _: 0.0)),
    "gradient_warnings": spoilt(
        lambda t: t.set_series("gradient_warning", lambda e: float(e > 15), component="temporal_encoder")
    ),
    "encoder_gradient_falling": spoilt(_gradient("temporal_encoder", lambda e: 0.5**e)),
    "encoder_gradient_low": spoilt(_gradient("temporal_encoder", lambda _: 1e-6)),
    "encoder_never_heard": spoilt(_gradient("temporal_encoder", lambda _: 1e-6)),
    "gradients_rising": spoilt(_gradient("prediction_head", lambda e: 2.0**e)),
    "graph_dominates_encoder": spoilt(_gradient("gat", lambda _: 9.0)),
    "clipping_bites": spoilt(lambda t: t.set_series("clipped_share", lambda _: 0.9)),
    "predictions_collapse": spoilt(lambda t: t.set_series("degeneracy_event", lambda e: float(e == 6))),
    "degeneracy_resets_many": spoilt(lambda t: t.set_series("degeneracy_reset", lambda e: float(e % 4 == 0))),
    "sampling_noise": spoilt(_undecided),
    "sharpe_below_demanded": spoilt(_clearly_below),
    "verdict_is_the_maximum": spoilt(_best_epoch_as_final),
    "verdict_from_elsewhere": spoilt(_foreign_verdict_value),
    "ic_not_of_daily_rows": spoilt(_evals("ic_mean", lambda _, own: own + 0.01)),
    "sharpe_of_another_unit": spoilt(_evals("sharpe_daily", lambda _, own: own * math.sqrt(245))),
    "weights_hash_returns": spoilt(_hashes(lambda epoch: "w3" if epoch == EPOCHS else f"w{epoch}")),
    "initial_weights_evaluated": spoilt(_hashes(lambda _: "w0")),
    "weights_hash_stale": spoilt(_hashes(lambda epoch: f"w{min(epoch, 15)}")),
    "predictions_stand_still": spoilt(_frozen_hash("predictions_hash")),
    "predictions_not_of_checkpoint": spoilt(
        _probed("rescore", rescored_gap=4.0, rescored_correlation=-1.0, rescored_epoch=-1.0)
    ),
    "predictions_minus_checkpoint": spoilt(_probed("rescore", rescored_gap=4.0, rescored_correlation=-1.0)),
    "initial_weights_not_of_seed": spoilt(_probed("replay", replay_initial_differs=1.0)),
    "predictions_of_early_checkpoint": spoilt(_probed("rescore", rescored_gap=1.0, rescored_epoch=5.0)),
    "targets_unlike_source": spoilt(_probed("data", targets_unlike_source=1.0)),
    "evaluation_twice_differs": spoilt(_twice_differs),
    "constant_scores_accepted": spoilt(_constant_scores),
    "replay_differs": spoilt(_probed("replay", replay_differs=1.0)),
    "rate_jumps_on_resume": spoilt(_resumed_elsewhere),
    "result_too_good": spoilt(lambda t: t.set_evals("ic_mean", lambda _: 0.3)),
    "features_know_later": spoilt(_probed("data", features_know_later=1.0, features_know_later_names="returns_1d")),
    "rows_unlike_source": spoilt(_probed("data", rows_unlike_source=0.05)),
    "dataset_altered": spoilt(_probed("data", parts_unlike_manifest=1.0)),
    "graph_unlike_dataset": spoilt(_probed("graph", edges_unlike_dataset=0.3)),
    "baseline_finds_nothing": spoilt(_probed("baseline", baseline_ic=0.001, baseline_ic_t=0.1)),
    "baseline_finds_more": spoilt(_never_learnt),
    "relation_reversed": spoilt(_probed("baseline", baseline_ic=-0.06, baseline_ic_t=-3.0)),
    "ic_negative": spoilt(_negative_ic),
    "steps_too_large": spoilt(
        lambda t: t.set_series("update_to_weight", lambda e: 0.2 if e == 1 else 0.01, component="fusion")
    ),
    "steps_too_small": spoilt(_series("update_to_weight", 1e-7)),
    "loss_spikes": spoilt(_spike),
    "loss_jumps_on_resume": spoilt(_loss_lost_on_resume),
    "clipping_not_undone": spoilt(
        _all(lambda t: t.run.update(optimizer="SGD"), _series("grad_norm", 0.001, term="after_clip"))
    ),
    "parameters_narrow": spoilt(_series("parameter_bits", 16.0, component="gat")),
    "experiment_a_helped": spoilt(lambda t: t.experiments.update(A=3.0)),
    "experiment_b_helped": spoilt(lambda t: t.experiments.update(B=3.0)),
    "experiment_c_helped": spoilt(lambda t: t.experiments.update(C=3.0)),
    "experiment_d_helped": spoilt(lambda t: t.experiments.update(D=3.0)),
    "updates_clipped_away": spoilt(_series("update_to_weight", 1e-8)),
    "updates_lost": spoilt(_series("unchanged_share", 0.6, component="gat")),
    "nothing_moves": spoilt(_series("update_to_weight", 0.0)),
    "plateau_against_losses": _plateau(lambda epoch: 1 + 0.001 * epoch),
    "not_in_optimizer": spoilt(_series("optimized_share", 0.5, component="gat")),
    "component_frozen": spoilt(_series("trainable_share", 0.0, component="gat")),
    "term_without_effect": spoilt(_series("effective_weight", 0.0, term="sharpe"), train__loss__sharpe=0.5),
    "term_reversed": spoilt(_series("effective_weight", -0.5, term="sharpe"), train__loss__sharpe=0.5),
    "loss_unexplained": spoilt(_series("gradient_residual", 0.4)),
    "loss_altered": spoilt(_series("gradient_residual", 0.9)),
    "terms_in_conflict": spoilt(_series("gradient_cosine", -0.8), train__loss__rank_ic=0.5),
    "variance_penalty_dominates": spoilt(
        _series("gradient_share", 0.45, term="variance_penalty"), train__loss__variance_penalty=0.1
    ),
    "worse_than_constant_in_training": spoilt(_mse(train=1.01, validation=1.0)),
    "fits_training_alone": spoilt(_mse(train=0.7, validation=1.2)),
    "encoder_says_nothing": spoilt(_series("stock_spread", 1e-4, component="backbone_projection")),
    "encoder_fell_silent": spoilt(
        lambda t: t.set_series("stock_spread", lambda e: 0.5 * 0.5**e, component="backbone_projection")
    ),
    "graph_smooths": spoilt(_series("stock_spread", 1e-4, component="gat")),
    "stocks_look_alike": spoilt(_series("stock_spread", 1e-4, component="fusion")),
    "head_hears_nothing": spoilt(
        _all(*(_series("grad_l2", 0.0, component=name) for name in COMPONENTS if name != "prediction_head"))
    ),
    "units_dead": spoilt(_series("dead_units", 0.9, component="fusion")),
    "attention_collapsed": spoilt(_series("attention_entropy", 0.01)),
    "encoder_idle": spoilt(_probed("ablate", drop_t_temporal_encoder=0.2)),
    "graph_idle": spoilt(_probed("ablate", drop_t_gat=-0.4)),
}
"""A run directory per rule in which it must fire. A rule without an entry fails `test_every_rule_has_a_case`."""

FIRES_ON_TRAINED: dict[str, Callable[[Path], None]] = {
    "scores_negated": with_scores(lambda scores: -scores),
    "daily_ic_inverted": with_scores(lambda scores: -scores),
    "daily_ic_of_other_scores": with_scores(np.random.default_rng(1).permutation),
    "squared_error_not_of_predictions": with_scores(lambda scores: 2.0 * scores),
    "scores_tied": with_scores(lambda scores: np.where(np.arange(len(scores)) % 7 == 0, 0.0, scores)),
    "validation_overlaps_training": lambda run: change_predictions(run, of_other_sessions(split_sessions(run).train)),
    "validation_elsewhere": lambda run: change_predictions(run, of_other_sessions(split_sessions(run).test)),
    "targets_of_another_definition": lambda run: change_predictions(
        run, lambda rows: rows | {"target_1d": np.roll(rows["target_1d"], 1)}
    ),
    "rows_not_evaluated": lambda run: change_predictions(
        run, lambda rows: {name: values[np.arange(len(values)) % 10 > 0] for name, values in rows.items()}
    ),
    "inputs_constant": lambda run: change_inputs(run, lambda row: {"std": 0.0} if row["name"] == "returns_1d" else {}),
    "inputs_scaled": lambda run: change_inputs(
        run, lambda row: {key: 100 * row[key] for key in ("mean", "std")} if row["name"] == "returns_1d" else {}
    ),
    "inputs_drifted": lambda run: change_inputs(
        run,
        lambda row: {"std": 100 * row["std"]} if (row["name"], row["split"]) == ("returns_1d", "validation") else {},
    ),
    "inputs_exchanged": lambda run: exchange_inputs(run, "returns_1d", "returns_5d"),
    "inputs_unlike_dataset": lambda run: change_inputs(
        run, lambda row: {"mean": row["mean"] + row["std"]} if row["name"] == "returns_1d" else {}
    ),
    "labels_unlike_dataset": lambda run: change_inputs(
        run, lambda row: {} if row["ic"] is None or row["split"] != "train" else {"ic": -row["ic"] + 0.1}
    ),
    "trained_elsewhere": lambda run: change_inputs(
        run, lambda row: {"split": "train"} if row["split"] == "validation" else {}
    ),
    "train_not_seen": lambda run: without_inputs(run, lambda row: row["split"] == "train" and row["date"].day % 2),
    "stocks_not_given": lambda run: change_inputs(
        run, lambda row: {"stocks": row["stocks"] - 5} if row["split"] == "validation" else {}
    ),
    "last_session_empty": lambda run: change_inputs(
        run, lambda row: {} if row["name"].startswith("target_") else {"std": 0.0}
    ),
    "feature_too_good": lambda run: change_inputs(run, lambda row: {"ic": 0.4} if row["name"] == "returns_1d" else {}),
}
"""A change per rule that needs the dataset or predictions of all horizons, after which it must fire on a trained run:
of the validation rows of its newest predictions, or of `inputs.parquet`."""

QUIET: dict[str, Callable[[], Tables]] = {"plateau_against_losses": _plateau(lambda epoch: 1 - 0.001 * epoch)}
"""Healthy runs for rules that cannot be assessed on the usual one."""


OF_LARGE_MARKETS = "no_stock_leaves"
"""Assessed on 240 stock-years and more alone; test_diagnostics_audit.py has its signal."""
TRIED = [rule for rule in RULES if rule.id != OF_LARGE_MARKETS]


@pytest.fixture(scope="module")
def healthy_diagnosis(tmp_path_factory: pytest.TempPathFactory) -> Diagnosis:
    tables = healthy(overrides=WITH_SHARPE_TERM)
    tables.probes = honest_probes()
    tables.experiments = dict.fromkeys("ABCD", 0.5)
    return diagnose(tables.write(tmp_path_factory.mktemp("run") / "healthy"))


@pytest.fixture(scope="module")
def trained_diagnosis(trained: Trained) -> Diagnosis:
    return diagnose(trained())


@pytest.fixture(scope="module")
def healthy_signals(healthy_diagnosis: Diagnosis, trained_diagnosis: Diagnosis) -> dict[str, Any]:
    """Every signal, measured: those of the dataset from the trained run, the rest from the written one."""
    audited = {name: trained_diagnosis.signals[name] for name in audited_names()}
    return dict(healthy_diagnosis.signals) | audited | {"plateau_against_losses": 0.0, "codes_that_leave": 3.0}


def finding(diagnosis: Diagnosis, rule: str) -> Finding:
    return next(f for f in diagnosis.findings if f.rule == rule)


def test_every_rule_has_a_case() -> None:
    assert sorted([*FIRES, *FIRES_ON_TRAINED, OF_LARGE_MARKETS]) == sorted(rule.id for rule in RULES)


def test_every_signal_of_a_rule_is_measured_somewhere() -> None:
    assert {name for rule in RULES for name in rule.needs} <= {*TABLE.signals, *audited_names(), *LATER_SIGNALS}


def test_a_market_that_nobody_leaves_is_noted(healthy_signals: dict[str, Any]) -> None:
    (rule,) = (rule for rule in RULES if rule.id == OF_LARGE_MARKETS)
    (found,) = assess(healthy_signals | {"codes_that_leave": 0.0}, [rule])
    assert (found.status, found.severity) == ("fired", "observation")


@pytest.mark.parametrize("rule", TRIED, ids=lambda rule: rule.id)
@pytest.mark.slow(reason="a run diagnosed for every fault")
def test_rule_fires_on_its_fault(rule: Rule, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    run_dir = tmp_path / "run"
    if rule.id in FIRES:
        FIRES[rule.id]().write(run_dir)
    else:
        shutil.copytree(request.getfixturevalue("trained")(), run_dir)
        FIRES_ON_TRAINED[rule.id](run_dir)
    record = open_record(run_dir)
    (fired,) = assess(gather(record), [rule], next_steps(record))
    record.connection.close()
    assert fired.status == "fired", f"{fired.condition}: {fired.evidence}"
    assert "not measured" not in fired.evidence
    assert fired.next_step
    assert "{" not in fired.next_step.replace('{"', "")


@pytest.mark.parametrize("rule", TRIED, ids=lambda rule: rule.id)
def test_rule_is_quiet_on_a_healthy_run(rule: Rule, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if rule.id in QUIET:
        diagnosis = diagnose(QUIET[rule.id]().write(tmp_path / "run"))
    else:
        audited = set(rule.needs) & set(audited_names())
        diagnosis = request.getfixturevalue("trained_diagnosis" if audited else "healthy_diagnosis")
    quiet = finding(diagnosis, rule.id)
    assert quiet.status == "not_fired", f"{quiet.condition}: {quiet.evidence}"


def _of_three_epochs(tables: Tables) -> None:
    """A cosine of three epochs, whose last is at the floor, with losses still above a constant's."""
    for name in ("series", "evals", "daily"):
        setattr(tables, name, [row for row in getattr(tables, name) if row["epoch"] <= 3])
    tables.run |= {"epochs_planned": 3, "epochs_done": 3}
    _lr(lambda epoch: {1: 1e-3, 2: 3e-4, 3: 2e-6}[epoch])(tables)
    _mse(train=1.05, validation=1.05)(tables)


def _spike_after_a_reset(tables: Tables) -> None:
    """The guard draws the head anew at the end of the epoch before the jump."""
    tables.set_series("degeneracy_reset", lambda epoch: float(epoch == SPIKE_EPOCH - 1))


LOOKS_ALIKE: dict[str, Callable[[], Tables]] = {
    "loss_spikes": spoilt(_all(_spike, _spike_after_a_reset)),
    "terms_in_conflict": spoilt(
        _all(_series("gradient_cosine", -0.8), _series("gradient_share", 0.45, term="variance_penalty")),
        train__loss__variance_penalty=1.0,
    ),
    "lr_around_1e6": spoilt(_of_three_epochs),
    "worse_than_constant_in_training": spoilt(_of_three_epochs),
    "loss_term_swallowed": spoilt(
        lambda t: t.set_series("loss_raw", lambda _: 0.0, term="variance_penalty"), train__loss__variance_penalty=0.1
    ),
    "head_hears_nothing": spoilt(_all(*(_series("grad_l2", 0.0, component=name) for name in COMPONENTS))),
    "sharpe_of_another_unit": spoilt(_same_sharpe),
    "encoder_says_nothing": spoilt(
        lambda t: t.set_series("stock_spread", lambda e: 0.5 * 0.5**e, component="backbone_projection")
    ),
    "term_without_effect": spoilt(_series("effective_weight", -0.5, term="sharpe"), train__loss__sharpe=0.5),
    "term_reversed": spoilt(
        _all(_series("effective_weight", -0.5, term="sharpe"), _series("gradient_residual", 0.9)),
        train__loss__sharpe=0.5,
    ),
    "loss_altered": spoilt(  # a loss that pulls nowhere
        _all(_series("gradient_residual", 1.0), _series("grad_l2", 0.0, component="prediction_head"))
    ),
    "updates_clipped_away": spoilt(_series("update_to_weight", 0.0)),
    "steps_too_small": spoilt(_series("update_to_weight", 0.0)),
    "predictions_never_change": spoilt(_all(_frozen_hash("predictions_hash"), _series("update_to_weight", 0.0))),
    "sharpe_never_changes": spoilt(_all(_same_sharpe, _series("update_to_weight", 0.0))),
    "initial_weights_evaluated": spoilt(
        _all(lambda t: [row.update(weights_hash="w0") for row in t.evals], _series("update_to_weight", 0.0))
    ),
    "lr_below_plan": spoilt(_lr(lambda _: 1e-4)),
    "run_failed": spoilt(lambda t: t.run.update(status="failed", reason="epoch 3: the gradient is inf")),
    "verdict_from_elsewhere": spoilt(_best_epoch_as_final),
}
"""Runs that another rule has to speak of."""


@pytest.mark.parametrize("id", LOOKS_ALIKE)
def test_rule_is_quiet_on_what_looks_alike(id: str, tmp_path: Path) -> None:
    assert finding(diagnose(LOOKS_ALIKE[id]().write(tmp_path / "run")), id).status != "fired"


@pytest.mark.parametrize("id", ["inputs_constant", "inputs_unlike_dataset"])
def test_where_columns_are_exchanged_no_other_rule_explains_them(id: str, healthy_signals: dict[str, Any]) -> None:
    (rule,) = (rule for rule in RULES if rule.id == id)
    spoilt_inputs = {"inputs_constant": 3.0 * (id == "inputs_constant"), "inputs_unlike_dataset": 9.0}
    assert status_of(rule, healthy_signals | spoilt_inputs) == "fired"
    assert status_of(rule, healthy_signals | spoilt_inputs | {"inputs_exchanged": 6.0}) == "not_fired"


NAMED: dict[str, Callable[[], Tables]] = {
    "updates_lost": spoilt(_all(_series("update_to_weight", 0.0), _series("unchanged_share", 1.0))),
    "loss_altered": spoilt(_all(_series("gradient_residual", 0.99), _series("effective_weight", 0.003))),
    "term_reversed": spoilt(_all(_series("gradient_residual", 0.2), _series("effective_weight", -0.5))),
}


@pytest.mark.parametrize("cause", NAMED)
def test_cause_comes_first_whatever_else_it_sets_off(cause: str, tmp_path: Path) -> None:
    assert diagnose(NAMED[cause]().write(tmp_path / "run")).ranking.causes[0].id == cause


@pytest.mark.parametrize(("dispersion", "status"), [(0.03, "fired"), (1e-4, "not_fired")])
def test_scores_so_close_that_float32_makes_many_of_them_one_are_not_filled_ones(
    dispersion: float, status: str, healthy_signals: dict[str, Any]
) -> None:
    (rule,) = (rule for rule in RULES if rule.id == "scores_tied")
    assert status_of(rule, healthy_signals | {"tied_scores": 0.3, "score_dispersion": dispersion}) == status


@pytest.mark.parametrize(("rule", "signal"), [(rule, name) for rule in RULES for name in rule.needs])
def test_rule_without_one_of_its_signals_is_not_assessable(
    rule: Rule, signal: str, healthy_signals: dict[str, Any]
) -> None:
    assert status_of(rule, healthy_signals) == "not_fired"
    blind = healthy_signals | {signal: None}
    assert status_of(rule, blind) == "not_assessable"
    (found,) = assess(blind, [rule])
    assert signal in found.evidence
    assert not found.next_step


def test_record_with_nothing_but_its_header_leaves_every_trained_rule_open(tmp_path: Path) -> None:
    tables = healthy()
    tables.series, tables.evals, tables.daily, tables.predictions = [], [], [], {}
    run_dir = tables.write(tmp_path / "run")
    (run_dir / "verdict.json").unlink()
    diagnosis = diagnose(run_dir)
    assessed = {f.rule for f in diagnosis.findings if f.status != "not_assessable"}
    of_the_header = {"run_failed", "run_not_finite", "run_killed", "features_missing"}
    assert assessed == of_the_header | {"rate_jumps_on_resume", "loss_jumps_on_resume"}
    assert "No Sharpe was measured" in diagnosis.headline


def test_healthy_run_has_no_cause_and_says_its_figures(healthy_diagnosis: Diagnosis) -> None:
    assert healthy_diagnosis.causes == []
    assert [item.split(":")[0] for item in healthy_diagnosis.missing] == [
        "output/datasets/ml_dataset_d1",
        "output/datasets/stock_graph_d1.parquet",
    ]
    sharpe = healthy_diagnosis.signals["sharpe"]
    assert healthy_diagnosis.headline.startswith(f"Sharpe {sharpe:.4f} ± ")
    assert healthy_diagnosis.ranking.conclusion == "healthy"
    assert "Nothing is wrong with the run" in healthy_diagnosis.headline
    assert "above 0.10" in healthy_diagnosis.headline
    assert "RankIC" in healthy_diagnosis.headline


@pytest.mark.parametrize("overrides", [{}, {"train.schedule.name": "constant"}], ids=["mse only", "constant schedule"])
def test_choices_of_a_run_that_passed_are_no_causes(overrides: dict[str, str], tmp_path: Path) -> None:
    tables = healthy(overrides=overrides)
    if overrides:
        tables.set_series("lr", lambda _: 1e-3)
    assert diagnose(tables.write(tmp_path / "run")).causes == []


def test_plateau_that_never_steps_is_seen_only_when_it_should_have_stepped(tmp_path: Path) -> None:
    def plateau(validation: Callable[[int], float]) -> Tables:
        tables = healthy(overrides={"train.schedule.name": "plateau", "train.schedule.patience": 2})
        tables.set_series("lr", lambda _: 1e-3)
        tables.set_series("loss_weighted", validation, split="validation", term="total")
        return tables

    improving = diagnose(plateau(lambda e: 1 - 0.001 * e).write(tmp_path / "improving"))
    stuck = diagnose(plateau(lambda e: 1 + 0.001 * e).write(tmp_path / "stuck"))
    assert finding(improving, "lr_constant_against_plan").status == "not_fired"
    assert finding(stuck, "lr_constant_against_plan").status == "fired"


def test_cosine_end_below_1e5_is_not_an_early_decay(tmp_path: Path) -> None:
    tables = healthy()
    tables.set_series("lr", lambda e: 1e-3 if e < 20 else 5e-6)
    assert finding(diagnose(tables.write(tmp_path / "run")), "lr_decayed_early").status == "not_fired"


def test_zero_learning_rate_excuses_unchanged_weights_and_sharpe(tmp_path: Path) -> None:
    tables = healthy()
    tables.set_series("lr", lambda _: 0.0)
    _frozen_hash("weights_hash")(tables)
    _same_sharpe(tables)
    diagnosis = diagnose(tables.write(tmp_path / "run"))
    assert finding(diagnosis, "weights_never_change").status == "not_assessable"
    assert finding(diagnosis, "sharpe_never_changes").status == "not_assessable"


def test_initial_weights_evaluated_as_trained_ones_fire(tmp_path: Path) -> None:
    tables = healthy()
    for row in tables.evals:
        row["weights_hash"] = "w0" if row["epoch"] == EPOCHS else row["weights_hash"]
    assert finding(diagnose(tables.write(tmp_path / "run")), "weights_never_change").status == "fired"


def test_parameter_free_component_needs_no_gradient(tmp_path: Path) -> None:
    tables = healthy()
    for epoch in range(1, EPOCHS + 1):
        for metric in ("grad_l2", "weight_l2"):
            tables.series.append(
                {"step": None, "epoch": epoch, "split": "train", "component": "adaptive_norm", "term": "", "value": 0.0}
                | {"metric": metric}
            )
    assert finding(diagnose(tables.write(tmp_path / "run")), "component_without_gradient").status == "not_fired"


def test_original_failure_headlines_validity_and_vetoes_the_rest(tmp_path: Path) -> None:
    diagnosis = diagnose(frozen_failure().write(tmp_path / "run"))
    fired = {f.rule: f for f in diagnosis.findings if f.status == "fired"}
    assert {"verdict_of_other_weights", "sharpe_never_changes", "predictions_constant"} <= set(fired)
    assert diagnosis.headline.startswith("Invalid: the Sharpe must not be read: ")
    assert {cause.group for cause in diagnosis.ranking.causes} == {"evaluation"}
    assert "0.0818" in fired["sharpe_never_changes"].evidence
    assert all(f.decisive == (f.severity == "invalid") for f in fired.values())
    assert any(not f.decisive for f in fired.values())
    assert diagnosis.causes[0].group == "validity"
    assert [advice.asked_for for advice in diagnosis.experiments] == [False] * 4


def test_explanation_of_a_passed_run_is_an_observation(tmp_path: Path) -> None:
    diagnosis = diagnose(FIRES["features_missing"]().write(tmp_path / "run"))
    found = finding(diagnosis, "features_missing")
    assert (found.status, found.severity) == ("fired", "observation")
    assert "55 of 82 live" in found.evidence
    assert diagnosis.ranking.conclusion == "healthy"


# Half-written directories ----------------------------------------------------------------------------------------


def test_torn_part_is_named_and_the_rest_is_used(tmp_path: Path) -> None:
    run_dir = healthy().write(tmp_path / "run")
    part = run_dir / "series" / "epoch_020.parquet"
    part.write_bytes(part.read_bytes()[:200])
    diagnosis = diagnose(run_dir)
    assert any(item.startswith("series/epoch_020.parquet: torn") for item in diagnosis.missing)
    assert finding(diagnosis, "lr_constant_against_plan").status == "not_fired"


@pytest.mark.parametrize("content", ["", '{"status": "finis', "[]"])
def test_torn_json_is_named(tmp_path: Path, content: str) -> None:
    run_dir = healthy().write(tmp_path / "run")
    (run_dir / "run.json").write_text(content)
    diagnosis = diagnose(run_dir)
    assert any(item.startswith("run.json: ") for item in diagnosis.missing)
    assert finding(diagnosis, "run_failed").status == "not_assessable"
    assert finding(diagnosis, "sharpe_not_of_predictions").status == "not_fired"
    assert any("atft train DATASET GRAPH" in advice.command for advice in diagnosis.experiments)


@pytest.mark.parametrize("strange", [None, "x", [{"a": None}], {}, float("nan")], ids=repr)
@pytest.mark.parametrize("depth", ["leaves", "sections"])
def test_header_of_another_version_never_stops_the_diagnosis(tmp_path: Path, strange: object, depth: str) -> None:
    def replaced(values: dict[str, Any]) -> dict[str, Any]:
        return {k: replaced(v) if depth == "leaves" and isinstance(v, dict) else strange for k, v in values.items()}

    tables = healthy()
    tables.run, tables.verdict = replaced(tables.run), replaced(tables.verdict)
    diagnosis = diagnose(tables.write(tmp_path / "run"))
    assert to_markdown(diagnosis)
    assert finding(diagnosis, "sharpe_not_of_daily_returns").status == "not_fired"


def test_run_that_is_still_written_is_not_called_killed(tmp_path: Path) -> None:
    run_dir = FIRES["run_killed"]().write(tmp_path / "run")
    with (run_dir / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        diagnosis = diagnose(run_dir)
    assert finding(diagnosis, "run_killed").status == "not_fired"
    assert diagnosis.headline.startswith("Still training (20 of 20 epochs).")


def test_files_of_another_run_are_never_read(tmp_path: Path) -> None:
    other = healthy().write(tmp_path / "other")
    run_dir = healthy().write(tmp_path / "run")
    for name in ("evals", "daily", "predictions"):
        for path in (run_dir / name).iterdir():
            path.unlink()
            path.symlink_to(other / name / path.name)
    diagnosis = diagnose(run_dir)
    assert diagnosis.signals["sharpe"] is None
    assert any("a link to a file outside this run" in item for item in diagnosis.missing)


def test_repeated_epoch_counts_once_with_its_later_part(tmp_path: Path) -> None:
    run_dir = healthy().write(tmp_path / "run")
    first = run_dir / "series" / "epoch_003.parquet"
    (run_dir / "series" / "epoch_003_again.parquet").write_bytes(first.read_bytes())
    assert diagnose(run_dir).signals["loader_wait_share"] == pytest.approx(0.02)


@pytest.mark.parametrize(
    "prepare", [lambda _: None, lambda d: d.mkdir(), lambda d: (d.mkdir(), (d / "series").mkdir())]
)
def test_nothing_readable_is_one_sentence(tmp_path: Path, prepare: Callable[[Path], object]) -> None:
    run_dir = tmp_path / "run"
    prepare(run_dir)
    with pytest.raises(InputError, match=r"run") as error:
        diagnose(run_dir)
    assert "\n" not in str(error.value)
