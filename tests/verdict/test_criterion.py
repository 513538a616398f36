"""The rules of the verdict: each has a case in which it applies and one in which it does not."""

from __future__ import annotations

import json
import math

import pytest

from atft_pipeline.config.schema import EvaluationConfig
from atft_pipeline.verdict.criterion import CriterionEvidence, judge
from atft_pipeline.verdict.health import (
    HealthItem,
)
from atft_pipeline.verdict.milestones import TrainingProgress
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


# The criterion -------------------------------------------------------------------------------------------------


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


# Validity vetoes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planned", [5, 20, 50])
def test_a_failed_item_vetoes(planned):
    bad = ValidityItem("evaluating_twice_agrees", False, 0.5, 1e-3, "they differ")
    result = verdict(validity=[*SOUND, bad], epochs_planned=planned, epochs_done=planned)
    assert (result["status"], result["summary"]) == ("invalid", "invalid: evaluating_twice_agrees: they differ")


def test_a_missing_measurement_and_missing_checks_veto():
    missing = ValidityItem("targets_match_prices", None, None, None, "not assessable: prices were not at hand")
    assert verdict(validity=[*SOUND, missing])["summary"] == (
        "invalid: targets_match_prices is not assessable: prices were not at hand"
    )
    assert verdict(validity=[])["summary"] == "invalid: the validity checks were not run"


def test_an_evaluation_that_could_not_be_ranked_is_invalid():
    result = verdict(evidence=with_value(None, valid=False, reason="scores are constant: in 3 of 250 sessions"))
    assert (result["status"], result["summary"]) == ("invalid", "invalid: scores are constant: in 3 of 250 sessions")


# Warnings ------------------------------------------------------------------------------------------------------


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


def test_a_missed_milestone_only_warns():
    result = verdict(progress=TrainingProgress({5: 0.01, 20: 0.142}))
    assert result["status"] == "passed"
    assert result["warnings"] == ["milestone sharpe_by_epoch_5: expected 0.08 to 0.10, found 0.01"]
