"""Investor flows and statements as they were public at each close; both tables carry their own publication dates.

Shapes: T sessions, N stocks, S market sections, E publications. A publication is an event. The grids `[T, N]` and
`[T, S]` hold the number of the latest event known at each close, −1 where there is none. A later publication changes
no earlier row: a revised or corrected figure counts from its own publication on.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numba import njit
from numpy.typing import NDArray

from atft_pipeline.errors import InputError
from atft_pipeline.market.calendar import closes
from atft_pipeline.market.market_facts import SECTION_OF_MARKET
from atft_pipeline.market.sources import to_date
from atft_pipeline.storage.monthly import Days

EXPIRY_DAYS = 400
"""Calendar days after which a disclosed figure no longer counts: one year, and the delay of a late annual report."""
HISTORY_WEEKS = 55
"""Weeks kept with each release: a 52-week statistic of each of the last 4."""

AGGREGATES: tuple[str, ...] = ("Total", "Proprietary", "Brokerage")
"""Prefixes of investor_flows that are no investor types: sums over others, and the exchange members' own account."""

_PERIODS: dict[str, int] = {"1Q": 1, "2Q": 2, "3Q": 3, "4Q": 4, "5Q": 5, "FY": 6}
_FULL_YEAR = 6
_FIGURES: tuple[str, ...] = ("NetSales", "OperatingProfit", "Profit", "TotalAssets", "Equity")
_COMPARED = 3
"""The first so many figures are compared with those of a year ago."""
_FORECASTS: tuple[str, ...] = ("OperatingProfit", "Profit")
_UNKNOWN = -1
_NO_DAY = int(np.datetime64("NaT", "D").astype(np.int64))


def session_at(sessions: Days, day: Days) -> NDArray[np.int64]:
    """Row of the last session on or before each day, `[E]`.

    Before the first session the rows are negative and count weekdays, since earlier sessions are not known. So t −
    session_at is the number of sessions after `day`, up to and including row t.
    """
    unseen = np.maximum(np.busday_count(day + 1, np.maximum(sessions[0], day + 1)), 0)
    return np.searchsorted(sessions, day, side="right") - 1 - unseen


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
    """[T − first, S] the latest event that a section's stocks may use: published before the session's date."""
    since: NDArray[np.float64]
    """[T − first, S] sessions since the newest week was first published, 1 at the first session that may use it."""


def flow_releases(flows: pl.DataFrame | None, sessions: Days, first: int = 0) -> FlowReleases:
    """investor_flows as known at each session: a release counts from the session after `PublishedDate`, revisions too.

    The grids cover `sessions[first:]`. Weeks are calendar weeks. An unpublished week is a null in the history; its
    later publication changes no earlier row. A revision counts from its own publication on and is no new release.
    Several weeks published at once are one release, that of the newest week. Sections without a market code
    in `SECTION_OF_MARKET`, such as the total of all sections, are ignored.

    Raises: InputError when a column that the features read is missing.
    """
    rows = _weekly_rows(flows) if flows is not None and not flows.is_empty() else None
    if rows is None or rows.is_empty():
        return _no_releases(len(sessions) - first)
    sections = tuple(rows["section"].unique().sort().to_list())
    section = rows["section"].cast(pl.Enum(sections)).to_physical().to_numpy().astype(np.int64)
    published = rows["published"].to_numpy().astype("datetime64[D]")
    starts = np.flatnonzero(np.append(True, (np.diff(section) != 0) | (np.diff(published.astype(np.int64)) != 0)))
    history = np.full((3, len(starts), HISTORY_WEEKS), np.nan)
    buying_share = np.empty(len(starts))
    released = np.empty(len(starts), np.int64)
    week = rows["week"].to_numpy()
    weekly = rows.select("foreign_net", "individual_net", "total", "buying").to_numpy()
    _write_histories(starts, section, published.astype(np.int64), week, weekly, history, buying_share, released)
    latest = _latest_release(section[starts], published[starts], sessions[first:], len(sections))
    at = session_at(sessions, released.astype("datetime64[D]"))[np.maximum(latest, 0)]
    since = np.arange(first, len(sessions), dtype=np.float64)[:, None] - at
    foreign_net, individual_net, total = history
    since = np.where(latest >= 0, since, np.nan)
    return FlowReleases(sections, foreign_net, individual_net, total, buying_share, latest, since)


def _no_releases(T: int) -> FlowReleases:
    weeks = np.empty((0, HISTORY_WEEKS))
    return FlowReleases((), weeks, weeks, weeks, np.empty(0), np.empty((T, 0), np.int32), np.empty((T, 0)))


def _weekly_rows(flows: pl.DataFrame) -> pl.DataFrame:
    """section, published, week (an ordinal) and the four weekly values, sorted by section and publication."""
    types = [name.removesuffix("Balance") for name in flows.columns if name.endswith("Balance")]
    investors = [name for name in types if name not in AGGREGATES]
    needed = ("PublishedDate", "EndDate", "Section", "ForeignersBalance", "ForeignersTotal", "IndividualsBalance",
              "IndividualsTotal", "TotalTotal")  # fmt: skip
    _require_columns("investor_flows", flows, needed)
    numbers = {*(f"{name}Balance" for name in investors), "ForeignersTotal", "IndividualsTotal", "TotalTotal"}
    balances = [pl.col(f"{name}Balance") for name in investors]
    reporting = pl.sum_horizontal(balance.is_not_null() for balance in balances)
    monday = (pl.col("EndDate") - dt.date(1970, 1, 5)).dt.total_days() // 7
    return (
        flows.select(
            "Section",
            *(_days(flows, name) for name in ("PublishedDate", "EndDate")),
            *(_numbers(flows, name) for name in sorted(numbers)),
        )
        .filter(pl.col("Section").is_in(list(SECTION_OF_MARKET.values())))
        .select(
            section=pl.col("Section").cast(pl.String),
            published="PublishedDate",
            week=monday,
            foreign_net=pl.col("ForeignersBalance") / _unless_zero("ForeignersTotal"),
            individual_net=pl.col("IndividualsBalance") / _unless_zero("IndividualsTotal"),
            total="TotalTotal",
            buying=pl.when(reporting > 0).then(pl.sum_horizontal(balance > 0.0 for balance in balances) / reporting),
        )
        .drop_nulls(["published", "week"])
        .sort("section", "published", maintain_order=True)
        .with_columns(pl.col("foreign_net", "individual_net", "total", "buying").fill_null(np.nan))
    )


def _unless_zero(name: str) -> pl.Expr:
    return pl.when(pl.col(name) != 0.0).then(name)


@njit(cache=True, nogil=True, error_model="numpy")
def _write_histories(
    starts: Any, section: Any, published: Any, week: Any, weekly: Any, history: Any, buying_share: Any, released: Any
) -> None:
    """Writes the last weeks of each event as known once its rows are public.

    Rows are sorted by section and publication.
    """
    weeks = history.shape[2]
    oldest = week.min()
    by_week = np.empty((week.max() - oldest + weeks, 4))
    first_published = np.empty(len(by_week), np.int64)
    newest = 0
    for event in range(len(starts)):
        begin = starts[event]
        if event == 0 or section[begin] != section[begin - 1]:
            by_week[:] = np.nan
            first_published[:] = _NO_DAY
            newest = 0
        end = starts[event + 1] if event + 1 < len(starts) else len(week)
        for row in range(begin, end):
            position = week[row] - oldest + weeks - 1
            by_week[position] = weekly[row]
            if first_published[position] == _NO_DAY:
                first_published[position] = published[row]
            newest = max(newest, position)
        for value in range(3):
            history[value, event] = by_week[newest - weeks + 1 : newest + 1, value]
        buying_share[event] = by_week[newest, 3]
        released[event] = first_published[newest]


def _latest_release(section: NDArray[np.int64], published: Days, sessions: Days, S: int) -> NDArray[np.int32]:
    latest = np.empty((len(sessions), S), np.int32)
    for s in range(S):
        begin, end = np.searchsorted(section, (s, s + 1))
        before = np.searchsorted(published[begin:end], sessions, side="left")
        latest[:, s] = np.where(before > 0, begin + before - 1, -1)
    return latest


# --- statements -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disclosures:
    """Financial statements and forecasts: one event per document, with the company's record as it stood after it."""

    latest: NDArray[np.int32]
    """[T − first, N] event of the last document known at the close."""
    known_at: NDArray[np.float64]
    """[E] row of the first session at whose close the document was public; negative before the first session."""
    values: Mapping[str, NDArray[np.float64]]
    """[E] each: `_VALUES` by name; money in yen, cumulative since the fiscal year began."""
    disclosed: Mapping[str, Days]
    """[E] each: date of the latest `document`, of the `results` and of the `forecast` in force; NaT where none is."""


_VALUES: tuple[str, ...] = (
    *_FIGURES,
    *(f"{name}_year_ago" for name in _FIGURES[:_COMPARED]),
    *(f"{name}_full_year" for name in _FORECASTS),
    *(f"{name}_forecast" for name in _FORECASTS),
    *(f"{name}_forecast_before" for name in _FORECASTS),
)
_STATED: tuple[str, ...] = (
    *(f"NextYearForecast{name}" for name in _FORECASTS),
    *(f"Forecast{name}" for name in _FORECASTS),
)
"""Forecasts of a document, next year's first: where it has both, the last one, for the current year, is in force."""
_PERIOD_DATES: tuple[str, ...] = (
    "CurrentPeriodStartDate",
    "CurrentPeriodEndDate",
    "CurrentFiscalYearStartDate",
    "CurrentFiscalYearEndDate",
    "NextFiscalYearEndDate",
)
_PLACE: tuple[str, ...] = ("stock", "day", "year", "next_year", "rank", "start", "end")
"""Integers of a document: whose it is, when it was disclosed, and where its period lies."""


def disclosures(
    statements: pl.DataFrame | None, sessions: Days, codes: Sequence[str], market: str, first: int = 0
) -> Disclosures:
    """statements as known at each close: from the session if disclosed strictly before its close, else the next.

    The grid covers `sessions[first:]`; `known_at` counts all sessions. A document without a time counts as disclosed
    after the close. Documents disclosed at the same moment are ordered by DisclosureNumber, then as in the table.
    Figures are numbers or text; anything but a finite number, such as blank, '-' and '*', is null.

    Results are those of the newest fiscal period known. A correction of an older period changes only the figure that
    newer ones are compared with. Results are compared with the period of equal length that ended a year before (a month
    either way). So a fiscal year of nine months has no year-ago figure and serves as none; the first year after the
    year's end moved has none either. A period begins at CurrentFiscalYearStartDate or CurrentPeriodStartDate. Without
    either, a quarter's name gives its months. A full year then has twelve months, or only those since an earlier full
    year's end, where that lies less than eleven months back. A period of another name (OtherPeriod) is placed by its
    dates; without stated dates it is no result.

    A forecast is compared with the previous one for the same fiscal year. The next year ends at NextFiscalYearEndDate,
    else twelve months later. Two forecasts are not in force: one in a correction of an older period, which repeats the
    forecast of its time, and one for a year whose results are known, which says nothing new.

    Raises: InputError when a required column is missing.
    """
    shape = (len(sessions) - first, len(codes))
    if statements is None or statements.is_empty():
        documents = pl.DataFrame()
    else:
        documents = _documents(statements, sessions, codes, market)
    E = documents.height
    latest = np.full(shape, -1, np.int32)
    values = np.full((len(_VALUES), E), np.nan)
    disclosed = np.full((3, E), np.datetime64("NaT", "D"))
    known_at = np.empty(E)
    if E:
        identity, figures, forecasts = (
            np.ascontiguousarray(documents.select(names).to_numpy()) for names in (_PLACE, _FIGURES, _STATED)
        )
        _write_records(identity, figures, forecasts, values, disclosed.view(np.int64))
        t = documents["t"].to_numpy()
        # Sessions before the first are not known: weekdays are counted instead.
        day = disclosed[0]
        known_at = t - np.busday_count(np.minimum(day, sessions[0]), sessions[0]).astype(np.float64)
        # Events of a stock ascend in time: the last one in a cell stays, and the running maximum is the latest event.
        latest[np.maximum(t - first, 0), documents["stock"].to_numpy()] = np.arange(E, dtype=np.int32)
        np.maximum.accumulate(latest, axis=0, out=latest)
    return Disclosures(
        latest=latest,
        known_at=known_at,
        values=dict(zip(_VALUES, values, strict=True)),
        disclosed=dict(zip(("document", "results", "forecast"), disclosed, strict=True)),
    )


@njit(cache=True, nogil=True, error_model="numpy")
def _write_records(identity: Any, figures: Any, forecasts: Any, values: Any, disclosed: Any) -> None:
    """Writes each company's record, document by document.

    It keeps results by fiscal year and period, forecasts by fiscal year and figure. Documents are sorted by company,
    then by disclosure.
    """
    E, F, K = len(identity), figures.shape[1], forecasts.shape[1] // 2
    stock, day, year, next_year = identity[:, 0], identity[:, 1], identity[:, 2], identity[:, 3]
    rank, start, end = identity[:, 4], identity[:, 5], identity[:, 6]
    C = F + _COMPARED
    r_year, r_rank, r_document = np.empty(E, np.int64), np.empty(E, np.int64), np.empty(E, np.int64)
    r_start, r_end = np.empty(E, np.int64), np.empty(E, np.int64)
    f_year, f_figure, f_value = np.empty(2 * K * E, np.int64), np.empty(2 * K * E, np.int64), np.empty(2 * K * E)
    revision = np.empty((2, K))
    results, stated, newest, forecast_day = 0, 0, _UNKNOWN, _NO_DAY
    for e in range(E):
        if e == 0 or stock[e] != stock[e - 1]:
            results, stated, newest, forecast_day = 0, 0, _UNKNOWN, _NO_DAY
            revision[:] = np.nan
        is_older = False
        if rank[e] != _UNKNOWN:
            row = _place(r_year, r_rank, results, year[e], rank[e])
            if row == results:
                r_year[row], r_rank[row] = year[e], rank[e]
                results += 1
            r_document[row], r_end[row] = e, end[e]
            r_start[row] = start[e]
            if start[e] == _UNKNOWN:
                r_start[row] = _nominal_start(r_year, r_rank, results, row, end[e])
            if newest == _UNKNOWN or (year[e], rank[e]) > (r_year[newest], r_rank[newest]):
                newest = row
            is_older = row != newest
        for k in range(2 * K):
            target = next_year[e] if k < K else year[e]
            value = forecasts[e, k]
            is_past = newest != _UNKNOWN and (r_year[newest], r_rank[newest]) >= (target, _FULL_YEAR)
            if is_older or is_past or value != value:
                continue
            row = _place(f_year, f_figure, stated, target, k % K)
            revision[1, k % K] = f_value[row] if row < stated else np.nan
            revision[0, k % K] = value
            f_year[row], f_figure[row], f_value[row] = target, k % K, value
            stated = max(stated, row + 1)
            forecast_day = day[e]
        disclosed[0, e] = day[e]
        disclosed[2, e] = forecast_day
        values[C + K : C + 2 * K, e] = revision[0]
        values[C + 2 * K :, e] = revision[1]
        if newest == _UNKNOWN:
            continue
        disclosed[1, e] = day[r_document[newest]]
        values[:F, e] = figures[r_document[newest]]
        before = _year_ago(r_start, r_end, r_document, results, newest)
        if before != _UNKNOWN:
            values[F:C, e] = figures[before, :_COMPARED]
        for k in range(K):
            row = _place(f_year, f_figure, stated, r_year[newest], k)
            values[C + k, e] = f_value[row] if row < stated else np.nan


@njit(cache=True, nogil=True)
def _place(years: Any, kinds: Any, count: Any, year: Any, kind: Any) -> Any:
    """Row of (year, kind) among the first `count` rows; `count` where the pair is new."""
    for row in range(count - 1, -1, -1):
        if years[row] == year and kinds[row] == kind:
            return row
    return count


@njit(cache=True, nogil=True)
def _nominal_start(years: Any, ranks: Any, count: Any, row: Any, end: Any) -> Any:
    """Month in which the previous period ended, from the period's name and the known fiscal years."""
    if ranks[row] != _FULL_YEAR:
        return end - 3 * ranks[row]
    start = end - 12
    for other in range(count):
        # A distance of eleven months is a whole year, and of one month the same year: such ends were estimated.
        if ranks[other] == _FULL_YEAR and years[row] - 11 < years[other] < years[row] - 1:
            start = max(start, years[other])
    return start


@njit(cache=True, nogil=True)
def _year_ago(starts: Any, ends: Any, documents: Any, count: Any, row: Any) -> Any:
    """Document of the period of equal length that ended 12 months earlier, else 11, else 13; the latest of several."""
    nearest, document = 4, _UNKNOWN
    for other in range(count):
        months = ends[row] - ends[other]
        distance = 2 * abs(months - 12) + (months > 12)
        # A month either way, for periods that end in mid-month and ends estimated from the disclosure's date.
        if ends[row] - starts[row] == ends[other] - starts[other] and (
            distance < nearest or (distance == nearest < 4 and documents[other] > document)
        ):
            nearest, document = distance, documents[other]
    return document


def _documents(statements: pl.DataFrame, sessions: Days, codes: Sequence[str], market: str) -> pl.DataFrame:
    """Documents of `codes` that are public by the last close, sorted by `stock` (position in `codes`) and disclosure.

    Columns: `t`, the row of the first session at whose close a document is public; the months of its period; its
    figures.
    """
    _require_columns("statements", statements, ("DisclosedDate", "LocalCode", "TypeOfCurrentPeriod", *_FIGURES[:3]))
    texts = ("TypeOfCurrentPeriod", "TypeOfDocument", "DisclosedTime")
    disclosed = pl.col("DisclosedDate")
    documents = statements.select(
        *(_text(statements, name) for name in texts),
        *(_days(statements, name) for name in ("DisclosedDate", *_PERIOD_DATES)),
        *(_numbers(statements, name) for name in ("DisclosureNumber", *_FIGURES, *_STATED)),
        stock=statements["LocalCode"]
        .cast(pl.String)
        .cast(pl.Enum(list(codes)), strict=False)
        .to_physical()
        .cast(pl.Int64),
    ).filter(pl.col("stock").is_not_null(), disclosed.is_not_null())
    documents = documents.with_columns(at=disclosed.dt.combine(_time().fill_null(dt.time(23, 59, 59))))
    public = np.searchsorted(closes(market, sessions), documents["at"].to_numpy(), side="right")
    return (
        _with_periods(documents.with_columns(pl.Series("t", public)))
        .filter(pl.col("t") < len(sessions))
        .sort("stock", "at", "DisclosureNumber", nulls_last=True, maintain_order=True)
        .with_columns(
            pl.col(*_FIGURES, *_STATED).fill_null(np.nan),
            pl.col("rank", "start").fill_null(_UNKNOWN),
            day=disclosed.to_physical().cast(pl.Int64),
        )
    )


def _with_periods(documents: pl.DataFrame) -> pl.DataFrame:
    """Adds the period of each document: `year` and `next_year` (fiscal years, by the month of their end), `end` and
    `start` (months in which the period and the previous one end) and `rank` within the year, null without results."""
    name = pl.col("TypeOfCurrentPeriod").str.strip_chars()
    stated_end, stated_year, year, end, start = map(pl.col, ("stated_end", "stated_year", "year", "end", "start"))
    is_placed = stated_end.is_not_null() & stated_year.is_not_null()
    months_so_far = pl.coalesce(end - start, 12 - (year - end))
    by_dates = pl.when(end == year).then(_FULL_YEAR).otherwise((months_so_far / 3).round().clip(1, 5).cast(pl.Int64))
    is_revision = pl.col("TypeOfDocument").str.contains("Revision", literal=True).fill_null(value=False)
    has_results = ~is_revision & pl.any_horizontal(pl.col(_FIGURES[:_COMPARED]).is_not_null())
    # In steps, because an expression nested in others is computed again in each of them.
    return (
        documents.with_columns(
            stated_end=_month("CurrentPeriodEndDate"),
            stated_year=_month("CurrentFiscalYearEndDate"),
            # For documents without the fiscal year's dates: results appear about 45 days after their period ends.
            likely_end=_month("DisclosedDate", -45),
            start=pl.coalesce(_month("CurrentFiscalYearStartDate", -1), _month("CurrentPeriodStartDate", -1)),
            next_year=_month("NextFiscalYearEndDate"),
            months_left=12 - 3 * name.replace_strict({"1Q": 1, "2Q": 2, "3Q": 3}, default=4, return_dtype=pl.Int64),
            rank=name.replace_strict(_PERIODS, default=None, return_dtype=pl.Int64),
        )
        .with_columns(year=pl.coalesce(stated_year, pl.coalesce(stated_end, "likely_end") + pl.col("months_left")))
        .with_columns(end=pl.coalesce(stated_end, year - pl.col("months_left")))
        .with_columns(
            start=pl.when(start < end).then(start),
            next_year=pl.when(pl.col("next_year") > year).then("next_year").otherwise(year + 12),
        )
        .with_columns(rank=pl.when(has_results).then(pl.col("rank").fill_null(pl.when(is_placed).then(by_dates))))
    )


def _month(column: str, days: int = 0) -> pl.Expr:
    """Months since year 0 of the date `days` later. Days up to the 15th count as the month before, so that year
    ends on the 20th or on a Saturday fall into the same month as other year ends."""
    day = pl.col(column) + dt.timedelta(days=days)
    return (day.dt.year() * 12 + day.dt.month() - (day.dt.day() <= 15).cast(pl.Int32)).cast(pl.Int64)


def _require_columns(table: str, frame: pl.DataFrame, needed: Iterable[str]) -> None:
    missing = [name for name in needed if name not in frame.columns]
    if missing:
        raise InputError(f"{table}: column {missing[0]} is missing; add it or leave the whole table out")


def _numbers(frame: pl.DataFrame, name: str) -> pl.Series:
    """The column as Float64, null where it is absent and for '-', '*', blanks and anything else but a finite number."""
    column = frame[name] if name in frame.columns else pl.Series([None] * frame.height, dtype=pl.Float64)
    if column.dtype == pl.String:
        column = column.str.strip_chars().str.replace_all(",", "", literal=True)
    column = column.cast(pl.Float64, strict=False)
    return column.set(~column.is_finite(), None).alias(name)


def _days(frame: pl.DataFrame, name: str) -> pl.Series:
    """The column as Date, null where it is absent and for anything that is no date."""
    column = frame[name] if name in frame.columns else None
    days = to_date(column) if column is not None else None
    return (pl.Series([None] * frame.height, dtype=pl.Date) if days is None else days).alias(name)


def _text(frame: pl.DataFrame, name: str) -> pl.Series:
    column = frame[name] if name in frame.columns else pl.Series([None] * frame.height, dtype=pl.String)
    return column.cast(pl.String).alias(name)


def _time() -> pl.Expr:
    """DisclosedTime, HH:MM or HH:MM:SS, as a time of day, null for anything else."""
    text = pl.col("DisclosedTime").str.strip_chars()
    return text.str.to_time("%H:%M:%S%.f", strict=False).fill_null(text.str.to_time("%H:%M", strict=False))
