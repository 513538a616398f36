"""Sessions and close times of the exchange, on days where the calendar library alone is wrong."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pytest

from atft_pipeline.errors import InputError
from atft_pipeline.market.calendar import close_time, sessions
from atft_pipeline.market.market_facts import MARKETS


def test_sessions_are_weekdays_without_holidays() -> None:
    week = sessions("tokyo", "2024-04-26", "2024-05-07")
    assert week.dtype == np.dtype("datetime64[D]")
    assert week.astype(str).tolist() == ["2024-04-26", "2024-04-30", "2024-05-01", "2024-05-02", "2024-05-07"]


def test_session_without_a_trade_is_a_session() -> None:
    assert np.datetime64("2020-10-01") in sessions("tokyo", "2020-09-30", "2020-10-02")
    assert close_time("tokyo", "2020-10-01") == dt.time(15, 0)


@pytest.mark.parametrize(
    ("session", "expected"),
    [
        ("2024-11-01", dt.time(15, 0)),
        ("2024-11-05", dt.time(15, 30)),
        ("2008-12-30", dt.time(11, 0)),  # last half day of a year's end
        ("2008-12-29", dt.time(15, 0)),
        ("2009-01-05", dt.time(11, 0)),  # last half day of a year's start
        ("2009-01-06", dt.time(15, 0)),
        ("2009-12-30", dt.time(15, 0)),
        ("2010-01-04", dt.time(15, 0)),
        ("2006-01-18", dt.time(14, 40)),
        ("2006-01-19", dt.time(15, 0)),
    ],
)
def test_tokyo_close(session: str, expected: dt.time) -> None:
    assert close_time("tokyo", session) == expected
    assert close_time("tokyo", np.datetime64(session)) == expected


def test_new_york_closes_early_after_thanksgiving() -> None:
    assert close_time("us", "2023-11-24") == dt.time(13, 0)
    assert close_time("us", "2023-11-27") == dt.time(16, 0)


def test_facts_of_the_two_markets() -> None:
    assert {name: facts.days_per_year for name, facts in MARKETS.items()} == {"tokyo": 245, "us": 252}
    assert MARKETS["tokyo"].turnover_floor == 100e6
    assert MARKETS["us"].turnover_floor == 20e6


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: sessions("london", "2020-01-01", "2020-01-31"), "expected one of tokyo, us"),
        (lambda: sessions("tokyo", "1990-01-01", "1990-01-31"), "known from 1997"),
        (lambda: close_time("tokyo", "2024-01-01"), "no session"),
    ],
)
def test_what_the_calendar_cannot_know_is_refused(call, reason: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=reason):
        call()
