"""Expected point-in-time tables, computed row by row from the source texts: slow, but easy to check by reading."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from atft_pipeline.market.calendar import close_time

Row = Mapping[str, Any]
Figure = float | None

PERIODS = {"1Q": 1, "2Q": 2, "3Q": 3, "4Q": 4, "5Q": 5, "FY": 6}
FIGURES = ("NetSales", "OperatingProfit", "Profit", "TotalAssets", "Equity")
FORECASTS = ("OperatingProfit", "Profit")


def number(row: Row, name: str) -> Figure:
    try:
        value = float(str(row.get(name)).strip().replace(",", ""))
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def day(row: Row, name: str) -> dt.date | None:
    try:
        return dt.date.fromisoformat(str(row.get(name)).strip())
    except ValueError:
        return None


def month(date: dt.date | None, days: int = 0) -> int | None:
    if date is None:
        return None
    date += dt.timedelta(days=days)
    return date.year * 12 + date.month - (date.day <= 15)


def disclosed_at(row: Row) -> dt.datetime:
    text = str(row.get("DisclosedTime")).strip()
    try:
        time = dt.time.fromisoformat(text)
    except ValueError:
        time = dt.time(23, 59, 59)
    date = day(row, "DisclosedDate")
    assert date is not None
    return dt.datetime.combine(date, time)


@dataclass(frozen=True)
class Period:
    """Fiscal year by the month of its end, rank within it, and the months in which it and the one before it end."""

    year: int
    rank: int | None
    start: int | None
    end: int


def period_of(row: Row) -> Period:
    name = (row.get("TypeOfCurrentPeriod") or "").strip()
    left = 12 - 3 * {"1Q": 1, "2Q": 2, "3Q": 3}.get(name, 4)
    end, year = month(day(row, "CurrentPeriodEndDate")), month(day(row, "CurrentFiscalYearEndDate"))
    is_placed = end is not None and year is not None
    if year is None:
        year = (end if end is not None else month(day(row, "DisclosedDate"), -45)) + left  # type: ignore[operator]
    if end is None:
        end = year - left
    start = month(day(row, "CurrentFiscalYearStartDate"), -1)
    if start is None:
        start = month(day(row, "CurrentPeriodStartDate"), -1)
    if start is not None and start >= end:
        start = None
    rank = PERIODS.get(name)
    if rank is None and is_placed:
        months = end - start if start is not None else 12 - (year - end)
        rank = 6 if end == year else min(max(round(months / 3), 1), 5)
    return Period(year, rank, start, end)


@dataclass
class Company:
    """A company's record, document by document."""

    results: dict[tuple[int, int], tuple[int, int, int, Row]] = field(default_factory=dict)
    """By fiscal year and rank: start, end, number and row of the document."""
    forecasts: dict[tuple[int, str], float] = field(default_factory=dict)
    revision: dict[str, tuple[float, Figure]] = field(default_factory=dict)
    forecast_date: dt.date | None = None
    documents: int = 0

    def after(self, row: Row) -> dict[str, Any]:
        """Figures in force once `row` is public, and the dates of what they come from."""
        self.documents += 1
        period = period_of(row)
        is_older = self._add_results(row, period)
        if not is_older:
            self._add_forecasts(row, period)
        known: dict[str, Any] = {"document": day(row, "DisclosedDate"), "forecast": self.forecast_date}
        for name in FORECASTS:
            known[f"{name}_forecast"], known[f"{name}_forecast_before"] = self.revision.get(name, (None, None))
        if self.results:
            newest = max(self.results)
            figures, before = self.results[newest][3], self._year_ago(newest)
            known |= {name: number(figures, name) for name in FIGURES}
            known |= {f"{name}_year_ago": number(before, name) for name in FIGURES[:3]}
            known |= {f"{name}_full_year": self.forecasts.get((newest[0], name)) for name in FORECASTS}
            known["results"] = day(figures, "DisclosedDate")
        return known

    def _add_results(self, row: Row, period: Period) -> bool:
        is_revision = "Revision" in (row.get("TypeOfDocument") or "")
        if period.rank is None or is_revision or all(number(row, name) is None for name in FIGURES[:3]):
            return False
        start = period.start if period.start is not None else self._nominal_start(period)
        self.results[period.year, period.rank] = (start, period.end, self.documents, row)
        return (period.year, period.rank) != max(self.results)

    def _nominal_start(self, period: Period) -> int:
        assert period.rank is not None
        if period.rank != 6:
            return period.end - 3 * period.rank
        ended = [year for year, rank in self.results if rank == 6 and 1 < period.year - year < 11]
        return max([period.end - 12, *ended])

    def _add_forecasts(self, row: Row, period: Period) -> None:
        following = month(day(row, "NextFiscalYearEndDate"))
        if following is None or following <= period.year:
            following = period.year + 12
        for target, prefix in ((following, "NextYearForecast"), (period.year, "Forecast")):
            for name in FORECASTS:
                value = number(row, f"{prefix}{name}")
                if value is None or (self.results and max(self.results) >= (target, 6)):
                    continue
                self.revision[name] = (value, self.forecasts.get((target, name)))
                self.forecasts[target, name] = value
                self.forecast_date = day(row, "DisclosedDate")

    def _year_ago(self, newest: tuple[int, int]) -> Row:
        start, end, _, _ = self.results[newest]
        for months in (12, 11, 13):
            found = [(n, row) for s, e, n, row in self.results.values() if end - e == months and e - s == end - start]
            if found:
                return max(found, key=lambda pair: pair[0])[1]
        return {}


def known_documents(rows: Iterable[Row], sessions: Any, code: str, market: str) -> list[dict[str, Any] | None]:
    """The record of `code` at each close, None before its first document."""
    own = [(disclosed_at(row), position, row) for position, row in enumerate(rows) if row["LocalCode"] == code]

    def order(item: tuple[dt.datetime, int, Row]) -> tuple[Any, ...]:
        at, position, row = item
        value = number(row, "DisclosureNumber")
        return at, value is None, value or 0.0, position

    pending, company, record = sorted(own, key=order), Company(), []
    state: dict[str, Any] | None = None
    for session in sessions.tolist():
        close = dt.datetime.combine(session, close_time(market, session))
        while pending and pending[0][0] < close:
            state = company.after(pending.pop(0)[2])
        record.append(state)
    return record


def known_weeks(rows: Iterable[Row], session: dt.date, section: str) -> tuple[dict[int, Row], int, dt.date] | None:
    """By week number the row that readers of `section` had before `session`, the newest week, and when it first came;
    None before the first publication."""
    weeks: dict[int, Row] = {}
    first: dict[int, dt.date] = {}
    own = [row for row in rows if row["Section"] == section and dt.date.fromisoformat(row["PublishedDate"]) < session]
    for row in sorted(own, key=lambda row: row["PublishedDate"]):
        week = (dt.date.fromisoformat(row["EndDate"]) - dt.date(1970, 1, 5)).days // 7
        weeks[week] = row
        first.setdefault(week, dt.date.fromisoformat(row["PublishedDate"]))
    return (weeks, max(weeks), first[max(weeks)]) if weeks else None
