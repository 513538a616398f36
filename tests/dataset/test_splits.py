"""Laws of the calendar split."""

from __future__ import annotations

import numpy as np
import pytest

from atft_pipeline.config.schema import SplitConfig
from atft_pipeline.dataset.splits import PURGE_SESSIONS, Split, make_split
from atft_pipeline.errors import InputError

SESSIONS = np.arange("2010-01-01", "2011-12-01", dtype="datetime64[D]")  # 699 days, every one a session here

CONFIGS = {
    "fraction": SplitConfig(scheme="fraction"),
    "sessions": SplitConfig(scheme="sessions", validation_sessions=100, test_sessions=150),
    "dates": SplitConfig(scheme="dates", validation_start="2010-10-01", test_start="2011-06-01"),
    "embargoed": SplitConfig(scheme="fraction", embargo_sessions=7),
}


def parts(split: Split) -> list[np.ndarray]:
    return [split.train, split.validation, split.test]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_purged_fold_shares_no_label_with_training(config: SplitConfig) -> None:

    split = make_split(SESSIONS, config)
    for earlier, later in [(split.train, split.validation), (split.validation, split.test)]:
        read_by_earlier = {t + lag for t in earlier for lag in range(PURGE_SESSIONS + 1)}
        read_by_later = {t + lag for t in later for lag in range(PURGE_SESSIONS + 1)}
        shared = read_by_earlier & {t for t in read_by_later if t >= later[0]}
        assert not shared


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_indices_of_two_parts_differ_by_more_than_purge_and_embargo(config: SplitConfig) -> None:
    split = make_split(SESSIONS, config)
    gap = PURGE_SESSIONS + config.embargo_sessions
    assert split.purge_sessions == gap
    for i, one in enumerate(parts(split)):
        assert (np.diff(one) == 1).all()
        for other in parts(split)[i + 1 :]:
            assert np.abs(one[:, None] - other[None, :]).min() > gap


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gap_before_validation_and_before_test_is_the_one_skfolio_purges(config: SplitConfig) -> None:
    """One walk-forward fold per boundary. Embargo is part of the gap: nothing here trains on what follows a test."""
    from skfolio.model_selection import WalkForward  # seconds, which other tests need not wait for

    split = make_split(SESSIONS, config)
    for earlier, later in [(split.train, split.validation), (split.validation, split.test)]:
        rows = np.arange(earlier[0], later[-1] + 1)
        purged = WalkForward(
            train_size=len(earlier), test_size=len(later), purged_size=PURGE_SESSIONS + config.embargo_sessions
        )
        [(train, test)] = purged.split(rows[:, None])
        np.testing.assert_array_equal(rows[train], earlier)
        np.testing.assert_array_equal(rows[test], later)


def test_training_sessions_are_those_that_combinatorial_purging_leaves_before_the_held_out_folds() -> None:
    from skfolio.model_selection import CombinatorialPurgedCV  # seconds, which other tests need not wait for

    # 60/20/20 as five folds of which the last two are held out. skfolio has no fold between the two, so the gap that we
    # also take from the end of validation has no counterpart there.
    sessions = SESSIONS[:400]
    split = make_split(sessions, SplitConfig(scheme="fraction"))
    folds = CombinatorialPurgedCV(n_folds=5, n_test_folds=2, purged_size=PURGE_SESSIONS)
    train, held_out = list(folds.split(np.zeros((len(sessions), 1))))[-1]
    np.testing.assert_array_equal(train, split.train)
    assert [fold[0] for fold in held_out] == [split.validation[0], split.test[0]]


def test_fraction_by_hand() -> None:
    split = make_split(SESSIONS[:200], SplitConfig(scheme="fraction"), purge_sessions=21)
    assert [(p[0], p[-1]) for p in parts(split)] == [(0, 98), (120, 138), (160, 199)]


def test_sessions_scheme_keeps_the_lengths_asked_for() -> None:
    split = make_split(SESSIONS, CONFIGS["sessions"])
    assert len(split.validation) == 100
    assert len(split.test) == 150
    assert split.test[-1] == len(SESSIONS) - 1


def test_dates_bound_every_part() -> None:
    config = SplitConfig(
        scheme="dates",
        train_start="2010-02-01",
        validation_start="2010-10-01",
        test_start="2011-06-01",
        test_end="2011-08-31",
    )
    split = make_split(SESSIONS, config)
    assert SESSIONS[split.train[0]] == np.datetime64("2010-02-01")
    assert SESSIONS[split.validation[0]] == np.datetime64("2010-10-01")
    assert SESSIONS[split.validation[-1]] == np.datetime64("2011-06-01") - 22
    assert SESSIONS[split.test[[0, -1]]].tolist() == np.array(["2011-06-01", "2011-08-31"], "M8[D]").tolist()


def test_a_longer_embargo_only_takes_sessions_away() -> None:
    without, embargoed = make_split(SESSIONS, CONFIGS["fraction"]), make_split(SESSIONS, CONFIGS["embargoed"])
    assert len(without.train) - len(embargoed.train) == 7
    assert set(embargoed.validation) < set(without.validation)


@pytest.mark.parametrize(
    ("sessions", "config"),
    [
        (30, SplitConfig(scheme="fraction")),
        (300, SplitConfig(scheme="sessions", validation_sessions=250, test_sessions=250)),
        (699, SplitConfig(scheme="dates", validation_start="2030-01-01", test_start="2031-01-01")),
    ],
)
def test_too_few_sessions_is_one_sentence_with_numbers(sessions: int, config: SplitConfig) -> None:
    with pytest.raises(InputError, match=rf"{sessions} sessions are fewer than sessions needed.*longer price history"):
        make_split(SESSIONS[:sessions], config)


def test_a_date_that_is_none_names_its_field() -> None:
    config = SplitConfig(scheme="dates", validation_start="last year", test_start="2011-06-01")
    with pytest.raises(InputError, match=r"split\.validation_start.*last year"):
        make_split(SESSIONS, config)
