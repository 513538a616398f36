"""What is true of each market (sessions, close times, days per year, currency floors) and what follows from it.

The table overrides the calendar library where they differ: the library starts late unless told, omits 2020-10-01 in
Tokyo (a session of the exchange in which a system failure let nothing trade) and knows none of Tokyo's half days.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atft_pipeline.errors import InputError


@dataclass(frozen=True)
class MarketFacts:
    calendar: str
    """Name in exchange_calendars."""
    days_per_year: int
    regular_close: tuple[tuple[dt.date, dt.time], ...]
    """(first session, closing time) in the exchange's time zone, ascending."""
    early_closes: dict[dt.date, dt.time]
    """Closes that neither the regular rule nor the library knows."""
    half_days_until: dt.date | None
    """Last date on which the first and the last session of a year end with the morning session."""
    morning_close: dt.time
    """End of the morning session on those half days."""
    extra_sessions: tuple[dt.date, ...]
    """Sessions that the library omits."""
    price_floor: float
    """Currency units, unadjusted close: below it a tick is a return."""
    turnover_floor: float
    """Currency units a session, trailing median: at or above it a stock is liquid."""
    turnover_window_sessions: int
    benchmark: str


MARKETS: dict[str, MarketFacts] = {
    "tokyo": MarketFacts(
        calendar="XTKS",
        days_per_year=245,
        regular_close=((dt.date(1900, 1, 1), dt.time(15, 0)), (dt.date(2024, 11, 5), dt.time(15, 30))),
        # The exchange stopped all trading at 14:40 when orders neared its system's capacity.
        early_closes={dt.date(2006, 1, 18): dt.time(14, 40)},
        half_days_until=dt.date(2009, 1, 5),
        # The morning session ended at 11:00 until it was extended to 11:30 on 2011-11-21.
        morning_close=dt.time(11, 0),
        extra_sessions=(dt.date(2020, 10, 1),),
        price_floor=50.0,
        turnover_floor=100e6,
        turnover_window_sessions=20,
        benchmark="TOPIX",
    ),
    "us": MarketFacts(
        calendar="XNYS",
        days_per_year=252,
        regular_close=((dt.date(1900, 1, 1), dt.time(16, 0)),),
        early_closes={},
        half_days_until=None,
        morning_close=dt.time(13, 0),
        extra_sessions=(),
        price_floor=1.0,
        turnover_floor=20e6,
        turnover_window_sessions=20,
        benchmark="S&P 500",
    ),
}

_LIBRARY_FIRST = dt.date(1997, 1, 1)
"""The library's holiday rules for Tokyo go no further back."""
_LIBRARY_LAST = dt.date(2200, 12, 31)
"""The library counts nanoseconds, which end in 2262."""


def market_facts(market: str) -> MarketFacts:
    """The row of `market`. Raises InputError that lists the known ones."""
    if market not in MARKETS:
        raise InputError(f"dataset.market: expected one of {', '.join(sorted(MARKETS))}, found {market!r}")
    return MARKETS[market]


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
