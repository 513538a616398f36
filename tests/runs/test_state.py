"""The state of a run is decided in one place, so that every reader reports the same."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from run_directories import healthy

from atft_pipeline.diagnostics.diagnose import diagnose
from atft_pipeline.inspection.reader import open_record
from atft_pipeline.monitoring.comparison import compare
from atft_pipeline.monitoring.progress import read_progress
from atft_pipeline.runs.header import read_run
from atft_pipeline.runs.lock import exclusive
from atft_pipeline.runs.state import has_crashed, run_state, with_earlier_end

STATES = {
    ("running", "held"): "running",
    ("running", "left"): "killed",
    ("finished", "left"): "finished",
    ("failed", "left"): "failed",
    ("interrupted", "left"): "interrupted",
    ("finished", "held"): "finished",
}
"""(status of run.json, whether a process holds the directory) -> state."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return healthy().write(tmp_path / "run")


def set_status(run: Path, status: str) -> None:
    header = json.loads((run / "run.json").read_text())
    # A writer that was killed has left a time of an earlier end or none: it says nothing of the state.
    (run / "run.json").write_text(json.dumps(header | {"status": status}))


@pytest.mark.parametrize(("status", "lock"), STATES)
def test_all_readers_agree_on_the_state_of_a_run(status: str, lock: str, run: Path) -> None:
    set_status(run, status)
    expected = STATES[status, lock]
    with exclusive(run) if lock == "held" else nullcontext():
        assert run_state(run, read_run(run)) == expected
        record = open_record(run)
        assert record.state == expected
        record.connection.close()
        assert read_progress(run, now_s=0.0).state == expected
        findings = {finding.rule: finding.status for finding in diagnose(run).findings}
        assert findings["run_killed"] == ("fired" if expected == "killed" else "not_fired")
        reason = compare({"run": run}).rows[0].reason
        assert ("killed" in reason, "still training" in reason) == (expected == "killed", expected == "running")


def test_a_run_that_ends_between_two_looks_was_not_killed(run: Path) -> None:
    """run.json still said running when it was read, and the lock was gone when it was asked for."""
    set_status(run, "finished")
    assert run_state(run, {"status": "running"}) == "finished"


def test_a_run_whose_header_is_gone_at_the_second_look_was_killed(run: Path) -> None:
    (run / "run.json").unlink()
    assert run_state(run, {"status": "running"}) == "killed"


def test_a_past_epoch_of_a_finished_run_is_one_of_a_running_run(run: Path) -> None:
    record = open_record(run, until_epoch=5)
    assert (record.state, record.is_locked) == ("running", True)


# Earlier ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kept", "crash"),
    [
        ("running", "killed", True),
        ("failed", "failed", True),
        ("interrupted", "interrupted", False),
    ],
)
def test_a_start_keeps_how_the_run_ended_before(status: str, kept: str, crash: bool) -> None:
    header = with_earlier_end({"key": "k", "status": status, "reason": "why", "ended": "then", "epochs_done": 3})
    assert header["earlier_ends"] == [{"status": kept, "reason": "why", "ended": "then", "epochs_done": 3}]
    assert has_crashed(header) is crash
    again = with_earlier_end(header | {"status": "interrupted"})
    assert [end["status"] for end in again["earlier_ends"]] == [kept, "interrupted"]


def test_a_first_start_and_a_new_verdict_of_a_finished_run_follow_no_early_end() -> None:
    for header in ({}, {"key": "k", "status": "finished"}):
        assert with_earlier_end(header) == header
        assert not has_crashed(header)
