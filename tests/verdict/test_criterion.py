"""The verdict's rules, health items, milestones and the gate: each branch fires, and does not."""

from __future__ import annotations

import json
import math
import re

import pytest

from atft_pipeline.config.schema import EvaluationConfig
from atft_pipeline.verdict.criterion import CriterionEvidence, judge
from atft_pipeline.verdict.gate import gate_decision
from atft_pipeline.verdict.health import (
    HealthItem,
    finite_losses,
    gradients_reach_components,
    parameters_moved,
    predictions_not_constant,
)
from atft_pipeline.verdict.milestones import TrainingProgress, progress_milestones
from atft_pipeline.verdict.validity import ValidityItem

GOOD = CriterionEvidence(value=0.142, se=0.063, psr_0=0.988, sessions=250)
SOUND = [ValidityItem("weights", True, 0.1, 0.99, "fine")]
WELL = [HealthItem("finite_losses", True, 0.0, 0.0, "fine")]
IDENTIFIERS = {
    "run_key": "k",
    "config_key": "c",
    "dataset_fingerprint": "d",
    "weights_hash": "w",
    "predictions_hash": "p",
}


def verdict(**changes):
    arguments = {
        "config": EvaluationConfig(),
        "epochs_planned": 20,
        "epochs_done": 20,
        "evidence": GOOD,
        "validity": SOUND,
        "health": WELL,
        "progress": TrainingProgress({5: 0.09, 20: 0.142}),
        "reversal_sharpe": 0.05,
        "final": {"validation": {"sharpe_daily": 0.142}},
        "identifiers": IDENTIFIERS,
    }
    return judge(**(arguments | changes))


def with_value(value, **changes):
    return CriterionEvidence(**({"value": value, "se": 0.063, "psr_0": 0.99, "sessions": 250} | changes))


# The criterion --------------------------------------------------------------------------------------------------


def test_a_pass_reads_as_one_line_and_warns_of_nothing():
    result = verdict()
    assert result["status"] == "passed"
    assert result["summary"] == (
        "passed: Sharpe 0.142 (daily, gross, liquid, validation, epoch 20; se 0.063, 250 sessions) > 0.10"
    )
    assert result["warnings"] == []
    assert result["criterion"] == {
        "metric": "sharpe_daily",
        "threshold": 0.10,
        "epoch": 20,
        "value": 0.142,
        "se": 0.063,
        "psr_0": 0.988,
        "split": "validation",
        "slice": "liquid",
        "sessions": 250,
        "gross": True,
    }
    assert IDENTIFIERS.items() <= result.items()


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (0.1000001, "passed"),
        (0.10, "failed"),
        (0.0999, "failed"),
        (-1.0, "failed"),
        (None, "failed"),
        (math.nan, "failed"),
    ],
)
def test_only_strictly_above_the_threshold_passes(value, status):
    assert verdict(evidence=with_value(value))["status"] == status


def test_a_failure_says_by_how_much():
    summary = verdict(evidence=with_value(0.0818))["summary"]
    assert summary.startswith("failed: Sharpe 0.082 (daily")
    assert summary.endswith("not above 0.10")
    assert "0.1000001 " in verdict(evidence=with_value(0.1000001))["summary"]
    assert "no Sharpe was measured at epoch 20" in verdict(evidence=None)["summary"]


def test_the_configured_threshold_and_epoch_are_used():
    config = EvaluationConfig(criterion_sharpe=0.2, criterion_epoch=10)
    assert verdict(config=config)["status"] == "failed"
    assert verdict(config=config)["criterion"]["epoch"] == 10


def test_shorter_runs_are_not_applicable_and_say_so():
    result = verdict(epochs_planned=5, epochs_done=5)
    assert result["status"] == "not_applicable"
    assert result["summary"] == "not applicable: 5 epochs are fewer than the criterion epoch 20"
    assert result["criterion"]["value"] is None


def test_a_run_that_stopped_early_fails():
    result = verdict(epochs_planned=50, epochs_done=7, evidence=None, validity=[])
    assert (result["status"], result["summary"]) == (
        "failed",
        "failed: stopped after epoch 7 of 50, before the criterion epoch 20",
    )


def test_a_run_that_stopped_after_the_criterion_epoch_keeps_its_figure():
    assert verdict(epochs_planned=50, epochs_done=31)["status"] == "passed"


@pytest.mark.parametrize(("psr", "sufficient"), [(0.95, True), (0.949, False), (None, False), (math.nan, False)])
def test_a_pass_with_little_evidence_says_so(psr, sufficient):
    result = verdict(evidence=with_value(0.142, psr_0=psr))
    assert result["status"] == "passed"
    assert result["summary"].startswith("passed: " if sufficient else "passed, insufficient evidence: ")
    assert any("insufficient evidence" in w for w in result["warnings"]) is not sufficient


def test_a_failure_never_reads_insufficient_evidence():
    assert "insufficient" not in verdict(evidence=with_value(0.05, psr_0=0.7))["summary"]


# Validity vetoes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planned", [5, 20, 50])
def test_a_failed_item_vetoes(planned):
    bad = ValidityItem("evaluating_twice_agrees", False, 0.5, 1e-3, "they differ")
    result = verdict(validity=[*SOUND, bad], epochs_planned=planned, epochs_done=planned)
    assert (result["status"], result["summary"]) == ("invalid", "invalid: evaluating_twice_agrees: they differ")


def test_a_missing_measurement_and_a_missing_battery_veto():
    missing = ValidityItem("targets_match_prices", None, None, None, "not assessable: prices were not at hand")
    assert verdict(validity=[*SOUND, missing])["summary"] == (
        "invalid: targets_match_prices is not assessable: prices were not at hand"
    )
    assert verdict(validity=[])["summary"] == "invalid: the validity checks were not run"


def test_an_evaluation_that_could_not_be_ranked_is_invalid():
    result = verdict(evidence=with_value(None, valid=False, reason="scores are constant: in 3 of 250 sessions"))
    assert (result["status"], result["summary"]) == ("invalid", "invalid: scores are constant: in 3 of 250 sessions")


# Warnings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reversal", "warns"), [(0.05, False), (0.142, True), (0.3, True), (None, True)])
def test_a_reversal_that_earns_as_much_warns(reversal, warns):
    assert any("reversal" in w for w in verdict(reversal_sharpe=reversal)["warnings"]) is warns


def test_poor_health_and_other_warnings_are_passed_on_without_deciding():
    sick = HealthItem("parameters_moved", False, 0.0, 0.0, "weights as they were initialised in: gat")
    unknown = HealthItem("finite_losses", None, None, 0.0, "no loss is recorded")
    result = verdict(health=[sick, unknown], warnings=["lag scan: x"])
    assert result["status"] == "passed"
    assert len(result["warnings"]) == 3
    assert "gat" in result["warnings"][0]


def test_the_content_is_plain_json_without_nan():
    item = ValidityItem("x", False, math.inf, None, "far off")
    text = json.dumps(verdict(validity=[item], final={"test": {"sharpe_daily": math.nan}}), allow_nan=False)
    assert json.loads(text)["final"] == {"test": {"sharpe_daily": None}}


# Milestones -----------------------------------------------------------------------------------------------------


def milestones(progress, planned):
    return {m.name: m.passed for m in progress_milestones(progress, planned)}


def test_milestones_are_those_the_run_was_planned_to_reach():
    calm = {"gradient_warnings": True, "degeneracy_resets": True, "no_crash": True}
    assert milestones(TrainingProgress({5: 0.08}), 5) == {"sharpe_by_epoch_5": True, **calm}
    assert milestones(TrainingProgress({5: 0.07, 20: 0.12}), 20) == {
        "sharpe_by_epoch_5": False,
        "sharpe_by_epoch_20": True,
        **calm,
    }
    long = milestones(TrainingProgress({5: 0.2, 20: 0.2, 50: 0.14, 120: 0.5}), 120)
    assert long == {
        "sharpe_by_epoch_5": True,
        "sharpe_by_epoch_20": True,
        "sharpe_by_epoch_50": False,
        "sharpe_beyond_epoch_50": True,
        "target_sharpe": False,
        **calm,
    }


def test_an_epoch_that_was_not_reached_is_neither_met_nor_missed():
    assert milestones(TrainingProgress({}), 20)["sharpe_by_epoch_20"] is None


def test_warnings_resets_and_crashes_count():
    bad = milestones(TrainingProgress({}, gradient_warnings=1, degeneracy_resets=5, crashed=True), 1)
    assert bad == {"gradient_warnings": False, "degeneracy_resets": False, "no_crash": False}
    assert milestones(TrainingProgress({}, degeneracy_resets=4), 1)["degeneracy_resets"] is True
    assert milestones(TrainingProgress({}, gradient_warnings=None), 1)["gradient_warnings"] is None


def test_a_missed_milestone_only_warns():
    result = verdict(progress=TrainingProgress({5: 0.01, 20: 0.142}))
    assert result["status"] == "passed"
    assert result["warnings"] == ["milestone sharpe_by_epoch_5: expected 0.08 to 0.10, found 0.01"]


# Training health ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "passed"),
    [
        (finite_losses([0.3, 0.2]), True),
        (finite_losses([0.3, math.nan]), False),
        (finite_losses([math.inf]), False),
        (finite_losses([0.3, None]), False),
        (finite_losses([]), None),
        (gradients_reach_components({"gat": 1e-3, "fusion": 1e-7}), True),
        (gradients_reach_components({"gat": 9e-8, "fusion": 1e-3}), False),
        (gradients_reach_components({"gat": math.nan}), False),
        (gradients_reach_components({}), None),
        (parameters_moved({"gat": 0.1}), True),
        (parameters_moved({"gat": 0.1, "fusion": 0.0}), False),
        (parameters_moved({"gat": math.nan}), False),
        (parameters_moved({}), None),
        (predictions_not_constant(0.014), True),
        (predictions_not_constant(0.0009), False),
        (predictions_not_constant(0.0), False),
        (predictions_not_constant(None), None),
        (predictions_not_constant(math.nan), None),
    ],
)
def test_training_health(item, passed):
    assert item.passed is passed


def test_health_names_the_component():
    assert "in: gat" in gradients_reach_components({"gat": 0.0, "fusion": 1.0}).explanation
    assert "in: fusion" in parameters_moved({"gat": 1.0, "fusion": 0.0}).explanation


# The gate -------------------------------------------------------------------------------------------------------


CURRENT = {"dataset_fingerprint": "d", "config_key": "c"}
CHECK = {"status": "passed", "timestamp": 11.0, "summary": "passed: Sharpe 0.142", **CURRENT}
BUILT = {"timestamp": 10.0}


def test_the_gate_opens_for_a_fresh_pass_of_the_same_data_and_config():
    decision = gate_decision(CHECK, BUILT, CURRENT, None)
    assert (decision.open, decision.override_recorded) == (True, None)
    assert "passed: Sharpe 0.142" in decision.message


SHUT = {
    "never materialized": (CHECK, None, CURRENT),
    "never evaluated": (None, BUILT, CURRENT),
    "older than the last materialization": (CHECK, {"timestamp": 12.0}, CURRENT),
    "another dataset": (CHECK, BUILT, CURRENT | {"dataset_fingerprint": "e"}),
    "another configuration": (CHECK, BUILT, CURRENT | {"config_key": "e"}),
    "unknown": (CHECK | {"config_key": None}, BUILT, CURRENT),
    r"failed \(failed: Sharpe": (CHECK | {"status": "failed", "summary": "failed: Sharpe 0.08"}, BUILT, CURRENT),
    "no valid verdict": (CHECK | {"status": "invalid"}, BUILT, CURRENT),
    "did not apply": (CHECK | {"status": "not_applicable"}, BUILT, CURRENT),
    "has status odd": (CHECK | {"status": "odd"}, BUILT, CURRENT),
}


@pytest.mark.parametrize("why", SHUT)
def test_the_gate_stays_shut_and_says_what_to_do(why):
    decision = gate_decision(*SHUT[why], None, way_on="press the button")
    assert not decision.open
    assert re.search(why, decision.message)
    assert decision.message.endswith("; press the button"), "the caller's way of starting runs, not one of the library"


@pytest.mark.parametrize("why", SHUT)
def test_an_override_opens_it_and_is_recorded(why):
    decision = gate_decision(*SHUT[why], " trying longer ")
    assert (decision.open, decision.override_recorded) == (True, "trying longer")
    assert "override (trying longer)" in decision.message


def test_a_blank_override_is_none():
    assert not gate_decision(None, BUILT, CURRENT, "  ").open


def test_an_override_that_was_not_needed_is_recorded_too():
    decision = gate_decision(CHECK, BUILT, CURRENT, "just in case")
    assert (decision.open, decision.override_recorded) == (True, "just in case")
    assert decision.message.startswith("gate open:")


def test_a_check_of_the_same_run_is_fresh_although_its_event_came_first():
    built = {"timestamp": 12.0, "run_id": "r1"}
    assert gate_decision(CHECK | {"run_id": "r1"}, built, CURRENT).open
    assert not gate_decision(CHECK | {"run_id": "r0"}, built, CURRENT).open
