"""The gate of the long run: what opens it, what keeps it shut, and what an override records."""

from __future__ import annotations

import re

import pytest

from atft_pipeline.verdict.gate import gate_decision

CURRENT = {"dataset_fingerprint": "d", "config_key": "c"}
CHECK = {"status": "passed", "timestamp": 11.0, "summary": "passed: Sharpe 0.142", **CURRENT}
BUILT = {"timestamp": 10.0}


def test_the_gate_opens_for_a_fresh_pass_of_the_same_data_and_config():
    decision = gate_decision(CHECK, BUILT, CURRENT, None)
    assert (decision.open, decision.override_recorded) == (True, None)
    assert "passed: Sharpe 0.142" in decision.message


SHUT = {
    "never trained": (CHECK, None, CURRENT),
    "never evaluated": (None, BUILT, CURRENT),
    "older than the newest training": (CHECK, {"timestamp": 12.0}, CURRENT),
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
