"""Milestones that a run was planned to reach: met, missed and not reached."""

from __future__ import annotations

from atft_pipeline.verdict.milestones import TrainingProgress, progress_milestones


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
