"""Sessions and closing times of each market.

market_facts.py overrides the calendar library where they differ: the library starts late unless told, omits
2020-10-01 in Tokyo (a session of the exchange in which a system failure let nothing trade) and knows none of Tokyo's
half days.
"""

from __future__ import annotations

import datetime as dt
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atft_pipeline.errors import InputError
from atft_pipeline.market.market_facts import market_facts

_LIBRARY_FIRST = dt.date(1997, 1, 1)
"""The library's holiday rules for Tokyo go no further back."""
_LIBRARY_LAST = dt.date(2200, 12, 31)
"""The library counts nanoseconds, which end in 2262."""


def sessions(market: str, first: dt.date | str, last: dt.date | str) -> NDArray[np.datetime64]:
    """Sessions of the exchange from `first` to `last`, both included, ascending datetime64[D].

    Raises: InputError for an unknown market, or dates before 1997, where the calendar's rules begin.
    """
    facts = market_facts(market)
    start, end = _as_date(first), _as_date(last)
    if start < _LIBRARY_FIRST:
        raise InputError(
            f"trading calendar of {market}: known from {_LIBRARY_FIRST}, asked from {start}; use later dates"
        )
    if end > _LIBRARY_LAST:
        raise InputError(f"trading calendar of {market}: known to {_LIBRARY_LAST}, asked to {end}; use earlier dates")
    known = _library_calendar(facts.calendar, end.year).sessions.to_numpy().astype("datetime64[D]")
    known = np.union1d(known, np.array(facts.extra_sessions, dtype="datetime64[D]"))
    return known[(known >= np.datetime64(start, "D")) & (known <= np.datetime64(end, "D"))]


def known_sessions(market: str, first: dt.date | str | np.datetime64, last: dt.date | str | np.datetime64) -> Any:
    """`sessions`, of the part of first to last that the calendar's rules reach; none before 1997 or after 2200."""
    start, end = max(_as_date(first), _LIBRARY_FIRST), min(_as_date(last), _LIBRARY_LAST)
    return sessions(market, start, end) if start <= end else np.empty(0, "datetime64[D]")


def require_sessions(market: str, days: NDArray[np.datetime64]) -> None:
    """Raises InputError that names the first of `days` which the calendar's rules know to be closed."""
    if len(days) == 0:
        return
    first, last = days.min(), days.max()
    known = known_sessions(market, first, last)
    reached = days[(days >= np.datetime64(_LIBRARY_FIRST)) & (days <= np.datetime64(_LIBRARY_LAST))]
    absent = reached[~np.isin(reached, known)]
    if len(absent):
        raise InputError(
            f"trading calendar of {market}: {absent[0]} is no session; correct the column Date of prices and index, or"
            " set dataset.market"
        )


def close_time(market: str, session: dt.date | str | np.datetime64) -> dt.time:
    """Closing time of `session` in the exchange's time zone; what is disclosed before it is known at that close.

    Raises: InputError where `session` is no session of the market.
    """
    return _close_time(market, _as_date(session))


@cache
def _close_time(market: str, session: dt.date) -> dt.time:
    closed: dt.datetime = closes(market, np.array([session], "datetime64[D]"))[0].item()
    return closed.time()


def closes(market: str, days: NDArray[np.datetime64]) -> NDArray[np.datetime64]:
    """The moment at which each of the sessions `[T]` closes, datetime64[us] in the exchange's time zone.

    Raises: InputError where a day is no session of the market.
    """
    facts = market_facts(market)
    if len(days) == 0:
        return np.empty(0, "datetime64[us]")
    first, last = days.min().item(), days.max().item()
    known = sessions(market, dt.date(first.year, 1, 1), dt.date(last.year, 12, 31))
    require_sessions(market, days)
    after = np.empty(len(known), "timedelta64[us]")
    for start, time in facts.regular_close:
        after[known >= np.datetime64(start)] = _since_midnight(time)
    calendar = _library_calendar(facts.calendar, last.year)
    early = calendar.early_closes.to_numpy().astype("datetime64[D]")
    for day in np.intersect1d(early, known):
        closed = calendar.session_close(str(day)).tz_convert(calendar.tz).time()
        after[known == day] = _since_midnight(closed)
    if facts.half_days_until is not None:
        years = known.astype("datetime64[Y]")
        turns = np.flatnonzero(years[1:] != years[:-1])
        half = np.unique(np.concatenate([[0, len(known) - 1], turns, turns + 1]))
        half = half[known[half] <= np.datetime64(facts.half_days_until)]
        after[half] = _since_midnight(facts.morning_close)
    for session, time in facts.early_closes.items():
        after[known == np.datetime64(session)] = _since_midnight(time)
    return days.astype("datetime64[us]") + after[np.searchsorted(known, days)]


def _since_midnight(time: dt.time) -> np.timedelta64:
    return np.timedelta64(dt.timedelta(hours=time.hour, minutes=time.minute, seconds=time.second))


@cache
def _library_calendar(name: str, last_year: int) -> Any:
    import exchange_calendars  # half a second that only callers of the calendar pay

    # A fixed span per call site would rebuild the calendar for every year asked; three years of margin do not.
    end = dt.date(max(last_year, 2027) // 3 * 3 + 3, 12, 31)
    return _built_calendar(exchange_calendars, name, end)


@cache
def _built_calendar(library: Any, name: str, end: dt.date) -> Any:
    return library.get_calendar(name, start=_LIBRARY_FIRST.isoformat(), end=end.isoformat())


def _as_date(day: dt.date | str | np.datetime64) -> dt.date:
    if isinstance(day, np.datetime64):
        return day.astype("datetime64[D]").item()
    if isinstance(day, dt.datetime):
        return day.date()
    return dt.date.fromisoformat(day) if isinstance(day, str) else day
