"""Laws of the calendar split."""

from __future__ import annotations

import numpy as np
import pytest

from atft_pipeline.config import SplitConfig
from atft_pipeline.errors import InputError
from atft_pipeline.splits import PURGE_SESSIONS, Split, make_split

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
