"""Slices: which cells each covers, which slices a run reports, and the panel that its scores are evaluated on."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from atft_pipeline.evaluation.slices import evaluable_slices, marked_slice, panel_of_slice, slice_mask

T, N = 4, 3
YES, NO = True, False


def panel(member=YES, investable=YES, liquid=YES):
    flags = {"member": member, "investable": investable, "liquid": liquid}
    return SimpleNamespace(
        sessions=np.datetime64("2012-01-04") + np.arange(T),
        codes=np.array(["1000", "1001", "1002"]),
        targets=np.arange(T * N * 2, dtype=float).reshape(T, N, 2),
        manifest={"days_per_year": 245},
        **{name: np.broadcast_to(np.asarray(flag), (T, N)) for name, flag in flags.items()},
    )


def test_a_slice_is_its_flag_among_the_members():
    given = panel(member=[YES, YES, NO], investable=[YES, NO, YES], liquid=[NO, YES, YES])
    np.testing.assert_array_equal(slice_mask(given, "all")[0], [YES, NO, NO])
    np.testing.assert_array_equal(slice_mask(given, "liquid")[0], [NO, YES, NO])


def test_a_run_reports_the_slices_that_it_scores_in_full():
    sessions = np.arange(T)
    assert evaluable_slices(panel(), sessions, "all") == ("liquid", "all")
    assert evaluable_slices(panel(), sessions, "liquid") == ("liquid",)


@pytest.mark.parametrize(("sessions", "liquid", "expected"), [
    (np.arange(2), [YES, YES, NO], ("liquid", "all")),
    (np.arange(1), YES, ()),  # one session has no standard deviation
    (np.arange(T), [YES, NO, NO], ("all",)),  # one stock has no rank
])  # fmt: skip
def test_a_slice_needs_two_sessions_of_two_stocks(sessions, liquid, expected):
    assert evaluable_slices(panel(liquid=liquid), sessions, "all") == expected


def test_a_stock_without_a_target_does_not_count():
    given = panel()
    given.targets[1:, 1:, 0] = np.nan
    assert evaluable_slices(given, np.arange(T), "all") == ()


def test_predictions_mark_the_liquid_rows_only():
    assert (marked_slice("liquid"), marked_slice("all")) == ("liquid", None)


def test_the_panel_of_a_slice_has_the_sessions_asked_for_and_the_shortest_horizon():
    given = panel(liquid=[NO, YES, YES])
    of_slice = panel_of_slice(given, np.array([1, 3]), "liquid")
    np.testing.assert_array_equal(of_slice.sessions, given.sessions[[1, 3]])
    np.testing.assert_array_equal(of_slice.targets, given.targets[[1, 3], :, 0])
    np.testing.assert_array_equal(of_slice.member, [[NO, YES, YES]] * 2)
    assert (of_slice.codes is given.codes, of_slice.days_per_year, of_slice.horizon_sessions) == (True, 245, 1)
