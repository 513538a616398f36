"""What was public at a session's close, of the tables that are not published with the session itself.

Shapes: T sessions, N stocks, S market sections, E publications. A publication is an event; the grids `[T, N]` and
`[T, S]` name the latest event known at each close, −1 where there is none. Nothing published later changes an earlier
row: a revised or corrected figure counts from its own publication on.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import duckdb
import numpy as np
import polars as pl
from numpy.typing import NDArray

from atft_pipeline.errors import InputError
from atft_pipeline.trading_calendar import close_time

Days = NDArray[np.datetime64]

EXPIRY_DAYS = 400
"""Calendar days after which a disclosed figure no longer counts: a year and a late annual report."""
HISTORY_WEEKS = 55
"""Weeks kept with each release: a 52-week statistic of each of the last 4."""

SECTION_OF_MARKET: dict[str, str] = {
    "0101": "TSE1st",
    "0102": "TSE2nd",
    "0104": "TSEMothers",
    "0106": "TSEJASDAQ",
    "0107": "TSEJASDAQ",
    "0111": "TSEPrime",
    "0112": "TSEStandard",
    "0113": "TSEGrowth",
}
"""`MarketCode` of the listed table to `Section` of investor_flows. Source: JPX J-Quants API, listed/info."""
AGGREGATES: tuple[str, ...] = ("Total", "Proprietary", "Brokerage")
"""Prefixes of investor_flows that sum over others or are the exchange members' own book: no investor types."""

_PERIODS: dict[str, int] = {"1Q": 1, "2Q": 2, "3Q": 3, "4Q": 4, "5Q": 5, "FY": 6}
_FIGURES: tuple[str, ...] = ("NetSales", "OperatingProfit", "Profit", "TotalAssets", "Equity")
_FORECASTS: tuple[str, ...] = ("OperatingProfit", "Profit")


def sessions_since(sessions: Days, day: Days) -> NDArray[np.float64]:
    """Sessions after `day`, up to and with each session: `[T, E]`, 1 at the first session after it.

    Weekdays stand for the sessions before the first one known.
    """
    after = np.searchsorted(sessions, day, side="right")
    unseen = np.maximum(np.busday_count(day + 1, np.maximum(sessions[0], day + 1)), 0)
    return np.arange(1, len(sessions) + 1, dtype=np.float64)[:, None] - after + unseen


# --- investor flows ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlowReleases:
    """Weekly turnover by investor type, one event per section and publication date, as known from then on."""

    sections: tuple[str, ...]
    foreign_net: NDArray[np.float64]
    """[E, HISTORY_WEEKS] ForeignersBalance / ForeignersTotal, newest week last; NaN where a week is unknown."""
    individual_net: NDArray[np.float64]
    """[E, HISTORY_WEEKS] IndividualsBalance / IndividualsTotal."""
    total: NDArray[np.float64]
    """[E, HISTORY_WEEKS] TotalTotal, the section's whole turnover."""
    buying_share: NDArray[np.float64]
    """[E] share of the investor types that bought more than they sold in the newest week."""
    latest: NDArray[np.int32]
    """[T, S] event that a section's stocks may use: published before the session's date."""
    since: NDArray[np.float64]
    """[T, S] sessions since the newest week was first published, 1 at the first session that may use it."""


def flow_releases(flows: pl.DataFrame | None, sessions: Days) -> FlowReleases:
    """investor_flows as its readers knew it: usable from the session after `PublishedDate`, revisions included.

    Raises: InputError when a column that the features read is missing.
    """
    if flows is None or flows.is_empty():
        return _no_releases(len(sessions))
    rows = _weekly_rows(flows)
    sections = tuple(sorted(rows["Section"].unique().to_list()))
    events: list[_Release] = []
    for s, section in enumerate(sections):
        events += _releases_of(s, rows.filter(pl.col("Section") == section))
    latest = _latest_release(events, sessions, len(sections))
    history = np.stack([event.weeks for event in events])
    released = np.array([event.released for event in events], dtype="datetime64[D]")
    since = np.take_along_axis(sessions_since(sessions, released), np.maximum(latest, 0), axis=1)
    return FlowReleases(
        sections=sections,
        foreign_net=history[:, :, 0].copy(),
        individual_net=history[:, :, 1].copy(),
        total=history[:, :, 2].copy(),
        buying_share=history[:, -1, 3].copy(),
        latest=latest,
        since=np.where(latest >= 0, since, np.nan),
    )


@dataclass(frozen=True)
class _Release:
    section: int
    published: dt.date
    released: dt.date
    """First publication of the newest week: a later revision of it is no new release."""
    weeks: NDArray[np.float64]
    """[HISTORY_WEEKS, 4] foreign net, individual net, total, share of buying types."""


def _no_releases(T: int) -> FlowReleases:
    weeks = np.empty((0, HISTORY_WEEKS))
    return FlowReleases((), weeks, weeks, weeks, np.empty(0), np.empty((T, 0), np.int32), np.empty((T, 0)))


def _weekly_rows(flows: pl.DataFrame) -> pl.DataFrame:
    """PublishedDate, Section, week (an ordinal) and the four weekly values, in order of publication."""
    types = [name.removesuffix("Balance") for name in flows.columns if name.endswith("Balance")]
    investors = [name for name in types if name not in AGGREGATES]
    needed = ("PublishedDate", "EndDate", "Section", "ForeignersBalance", "ForeignersTotal", "IndividualsBalance",
              "IndividualsTotal", "TotalTotal")  # fmt: skip
    _require_columns("investor_flows", flows, needed)
    balances = [_number(f"{name}Balance") for name in investors]
    known = " + ".join(f"({balance} IS NOT NULL)::INT" for balance in balances)
    buying = " + ".join(f"coalesce(({balance} > 0)::INT, 0)" for balance in balances)
    query = f"""
        SELECT published, section, week, foreign_net, individual_net, total, buying FROM (
            SELECT row_number() OVER () AS position, {_date("PublishedDate")} AS published, Section AS section,
                   datediff('day', DATE '1970-01-05', {_date("EndDate")}) // 7 AS week,
                   {_number("ForeignersBalance")} / nullif({_number("ForeignersTotal")}, 0) AS foreign_net,
                   {_number("IndividualsBalance")} / nullif({_number("IndividualsTotal")}, 0) AS individual_net,
                   {_number("TotalTotal")} AS total,
                   ({buying}) / nullif({known}, 0) AS buying
            FROM flows)
        WHERE published IS NOT NULL AND week IS NOT NULL AND section IS NOT NULL
        ORDER BY published, position"""
    return _query(query, flows=flows).rename({"section": "Section"})


def _releases_of(section: int, rows: pl.DataFrame) -> list[_Release]:
    """One event per publication date of a section. Weeks are calendar weeks, so a week still unpublished is a null
    in the history and not a gap that its later publication would reveal."""
    events = []
    first_published: dict[int, dt.date] = {}
    oldest = int(rows["week"].min())  # type: ignore[arg-type]
    known = np.full((int(rows["week"].max()) - oldest + HISTORY_WEEKS, 4), np.nan)  # type: ignore[arg-type]
    newest = oldest
    for (published,), group in rows.group_by("published", maintain_order=True):
        assert isinstance(published, dt.date)
        for _, _, week, *values in group.iter_rows():
            known[week - oldest + HISTORY_WEEKS - 1] = [np.nan if v is None else v for v in values]
            first_published.setdefault(week, published)
            newest = max(newest, week)
        history = known[newest - oldest : newest - oldest + HISTORY_WEEKS].copy()
        events.append(_Release(section, published, first_published.get(newest, published), history))
    return events


def _latest_release(events: Sequence[_Release], sessions: Days, S: int) -> NDArray[np.int32]:
    releases = pl.DataFrame(
        {
            "event": np.arange(len(events), dtype=np.int32),
            "section": [event.section for event in events],
            "published": [event.published for event in events],
        }
    )
    closes = pl.DataFrame({"t": np.arange(len(sessions)), "session": _as_dates(sessions)})
    found = _query(
        f"""SELECT t, g.section AS section, event
            FROM (SELECT t, session, section FROM closes CROSS JOIN range({S}) AS s(section)) AS g
            ASOF JOIN releases AS r ON g.section = r.section AND g.session > r.published""",
        releases=releases,
        closes=closes,
    )
    latest = np.full((len(sessions), S), -1, np.int32)
    latest[found["t"].to_numpy(), found["section"].to_numpy()] = found["event"].to_numpy()
    return latest


# --- statements -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disclosures:
    """Financial statements and forecasts, one event per document, as the company's record stood after it."""

    latest: NDArray[np.int32]
    """[T, N] last document known at the close."""
    known_at: NDArray[np.float64]
    """[E] row of the first session at whose close the document was public; negative before the first session."""
    values: Mapping[str, NDArray[np.float64]]
    """[E] each: `_VALUES` by name; money in yen, cumulative since the fiscal year began."""
    disclosed: Mapping[str, Days]
    """[E] each: date of the latest `document`, of the `results` and of the `forecast` in force, NaT without."""


_VALUES: tuple[str, ...] = (
    *(name for name in _FIGURES),
    *(f"{name}_year_ago" for name in _FIGURES[:3]),
    *(f"{name}_full_year" for name in _FORECASTS),
    *(f"{name}_forecast" for name in _FORECASTS),
    *(f"{name}_forecast_before" for name in _FORECASTS),
)


def disclosures(statements: pl.DataFrame | None, sessions: Days, codes: Sequence[str], market: str) -> Disclosures:
    """statements as known at each close: the same session if disclosed strictly before it, else the next one.

    A document without a time counts as disclosed after the close. Results are those of the newest fiscal period known;
    a correction of an older one only changes what it is compared with. Figures are numbers or text; blank, '-' and '*'
    are null.

    Raises: InputError when a required column is missing.
    """
    T, N = len(sessions), len(codes)
    if statements is None or statements.is_empty():
        return _record([], [], np.full((T, N), -1, np.int32))
    documents = _documents(statements, sessions, market).filter(pl.col("code").is_in(list(codes)))
    column = {code: n for n, code in enumerate(codes)}
    latest = np.full((T, N), -1, np.int32)
    events: list[_Known] = []
    known_at: list[float] = []
    for (code,), group in documents.group_by("code", maintain_order=True):
        company = _Company()
        for document in group.iter_rows(named=True):
            latest[document["t"], column[str(code)]] = len(events)
            events.append(company.after(document))
            # Weekdays stand for the sessions between a disclosure and the first session.
            early = np.busday_count(document["disclosed"], sessions[0]) if document["disclosed"] < sessions[0] else 0
            known_at.append(float(document["t"] - early))
    # Events of a stock ascend in time, so the largest so far is the latest.
    return _record(events, known_at, np.maximum.accumulate(latest, axis=0))


def _record(events: Sequence[_Known], known_at: Sequence[float], latest: NDArray[np.int32]) -> Disclosures:
    table = np.array([event.values for event in events], dtype=np.float64).reshape(-1, len(_VALUES))
    dates = np.array([event.dates for event in events], dtype="datetime64[D]").reshape(-1, 3)
    return Disclosures(
        latest=latest,
        known_at=np.array(known_at, dtype=np.float64),
        values={name: np.ascontiguousarray(table[:, k]) for k, name in enumerate(_VALUES)},
        disclosed={name: dates[:, k].copy() for k, name in enumerate(("document", "results", "forecast"))},
    )


@dataclass(frozen=True)
class _Known:
    values: tuple[float | None, ...]
    dates: tuple[dt.date | None, dt.date | None, dt.date | None]


@dataclass
class _Company:
    """A company's record, document by document. Periods are (month in which the fiscal year ends, period)."""

    results: dict[tuple[int, int], tuple[dt.date, tuple[float | None, ...]]] = field(default_factory=dict)
    forecasts: dict[tuple[int, str], float] = field(default_factory=dict)
    revision: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    """Latest forecast of each figure, and the one it replaced for the same fiscal year."""
    forecast_date: dt.date | None = None

    def after(self, document: Mapping[str, Any]) -> _Known:
        """The record once `document` is public."""
        self._add_results(document)
        self._add_forecasts(document)
        newest = max(self.results, default=None)
        date, figures = self.results[newest] if newest is not None else (None, (None,) * len(_FIGURES))
        before = self._year_ago(newest) if newest is not None else (None,) * len(_FIGURES)
        full_year = [self.forecasts.get((newest[0], name)) if newest is not None else None for name in _FORECASTS]
        revisions = [self.revision.get(name, (None, None)) for name in _FORECASTS]
        values = (*figures, *before[:3], *full_year, *(new for new, _ in revisions), *(old for _, old in revisions))
        return _Known(values, (document["disclosed"], date, self.forecast_date))

    def _add_results(self, document: Mapping[str, Any]) -> None:
        period = _PERIODS.get(document["period"])
        figures = tuple(document[name] for name in _FIGURES)
        is_revision = "Revision" in (document["kind"] or "")
        if period is not None and not is_revision and any(value is not None for value in figures[:3]):
            self.results[document["fiscal_year"], period] = (document["disclosed"], figures)

    def _add_forecasts(self, document: Mapping[str, Any]) -> None:
        year = document["fiscal_year"]
        for name in _FORECASTS:
            # Next year's first: where a document has both, the current year's is the one in force.
            for key, value in (
                ((year + 12, name), document[f"NextYearForecast{name}"]),
                ((year, name), document[f"Forecast{name}"]),
            ):
                if value is not None:
                    self.revision[name] = (value, self.forecasts.get(key))
                    self.forecasts[key] = value
                    self.forecast_date = document["disclosed"]

    def _year_ago(self, period: tuple[int, int]) -> tuple[float | None, ...]:
        # A month either way: fiscal years that end on the 20th, and those estimated from the disclosure's date.
        for months in (12, 11, 13):
            found = self.results.get((period[0] - months, period[1]))
            if found is not None:
                return found[1]
        return (None,) * len(_FIGURES)


def _documents(statements: pl.DataFrame, sessions: Days, market: str) -> pl.DataFrame:
    """Documents with numbers for text and `t`, the row of the first session at whose close they were public."""
    _require_columns("statements", statements, ("DisclosedDate", "LocalCode", "TypeOfCurrentPeriod", *_FIGURES[:3]))
    closes = [dt.datetime.combine(day, close_time(market, day)) for day in sessions.tolist()]
    present = set(statements.columns)
    numbers = [*_FIGURES, *(f"{prefix}{name}" for prefix in ("Forecast", "NextYearForecast") for name in _FORECASTS)]
    figures = ", ".join(f"{_number(name) if name in present else 'NULL::DOUBLE'} AS {name}" for name in numbers)
    quarter = "CASE TypeOfCurrentPeriod WHEN '1Q' THEN 1 WHEN '2Q' THEN 2 WHEN '3Q' THEN 3 ELSE 4 END"
    year_end = _date("CurrentFiscalYearEndDate") if "CurrentFiscalYearEndDate" in present else "NULL::DATE"
    period_end = _date("CurrentPeriodEndDate") if "CurrentPeriodEndDate" in present else "NULL::DATE"
    time = _time("DisclosedTime") if "DisclosedTime" in present else "NULL::TIME"
    number = "DisclosureNumber" if "DisclosureNumber" in present else "position"
    query = f"""
        WITH text AS (SELECT *, row_number() OVER () AS position FROM statements),
        documents AS (
            SELECT CAST(LocalCode AS VARCHAR) AS code, {_date("DisclosedDate")} AS disclosed,
                   {_date("DisclosedDate")} + coalesce({time}, TIME '23:59:59') AS disclosed_at,
                   trim(TypeOfCurrentPeriod) AS period,
                   {"TypeOfDocument" if "TypeOfDocument" in present else "NULL::VARCHAR"} AS kind,
                   -- without the fiscal year's dates: results appear about 45 days after their period ends
                   coalesce({year_end}, coalesce({period_end}, {_date("DisclosedDate")} - INTERVAL 45 DAY)
                            + to_months(3 * (4 - ({quarter})))) AS year_end,
                   {number} AS number, position, {figures}
            FROM text)
        SELECT d.*, c.t,
               CAST(year(year_end) * 12 + month(year_end) - (day(year_end) <= 15)::INT AS INTEGER) AS fiscal_year
        FROM documents AS d ASOF JOIN closes AS c ON d.disclosed_at < c.close_at
        ORDER BY code, disclosed_at, number, position"""
    return _query(query, statements=statements, closes=pl.DataFrame({"t": range(len(closes)), "close_at": closes}))


def _require_columns(table: str, frame: pl.DataFrame, needed: Iterable[str]) -> None:
    missing = [name for name in needed if name not in frame.columns]
    if missing:
        raise InputError(f"{table}: column {missing[0]} is missing; add it or leave the whole table out")


def _number(column: str) -> str:
    """SQL: the column as DOUBLE, null for blanks, '-', '*' and whatever else is no finite number."""
    value = f"TRY_CAST(replace(CAST({column} AS VARCHAR), ',', '') AS DOUBLE)"
    return f"(CASE WHEN isfinite({value}) THEN {value} END)"


def _date(column: str) -> str:
    return f"TRY_CAST(left(CAST({column} AS VARCHAR), 10) AS DATE)"


def _time(column: str) -> str:
    """SQL: HH:MM or HH:MM:SS as TIME, null for anything else."""
    text = f"trim(CAST({column} AS VARCHAR))"
    return f"TRY_CAST(CASE WHEN length({text}) = 5 THEN {text} || ':00' ELSE {text} END AS TIME)"


def _query(sql: str, **frames: pl.DataFrame) -> pl.DataFrame:
    with duckdb.connect() as connection:
        for name, frame in frames.items():
            connection.register(name, frame.to_arrow())
        return connection.sql(sql).pl()


def _as_dates(sessions: Days) -> pl.Series:
    return pl.Series(sessions.astype("datetime64[ms]")).cast(pl.Date)
