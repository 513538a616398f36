"""The eventful market has the events that it claims: a law tested on a market without its event proves nothing."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

import polars as pl
import pytest
from markets.eventful_market import HOLIDAY, PERIODS, Event, Tables, eventful_tables, events
from markets.market_factory import prices_of, sessions_of

ALL = [(period, event) for period in PERIODS for event in events(period)]
Present = Callable[["View"], bool]


def all_sessions(tables: Tables) -> list[dt.date]:
    """Either table alone lacks one: the index a row, the prices the session in which nothing traded."""
    return sorted({*sessions_of(tables["index"]), *sessions_of(tables["prices"])} - {HOLIDAY})


class View:
    """The raw tables as one event sees them."""

    def __init__(self, tables: Tables, event: Event) -> None:
        self.tables, self.code, self.session = tables, event.code, event.session
        self.days = all_sessions(tables)
        self.t = self.days.index(event.session)

    def quote(self, name: str, after: int = 0) -> float | None:
        """Value of the row `after` sessions later, null without a row."""
        row = self.rows.filter(pl.col("Date") == self.days[self.t + after])
        return row[name][0] if row.height else None

    @property
    def rows(self) -> pl.DataFrame:
        return self.tables["prices"].filter(pl.col("Code") == self.code)

    def has_row(self, after: int = 0) -> bool:
        return self.days[self.t + after] in set(self.rows["Date"])

    def jump(self, after: int = 0) -> float:
        return self.quote("Close", after) / self.quote("Close", after - 1)  # type: ignore[operator]

    @property
    def documents(self) -> pl.DataFrame:
        return self.tables["statements"].filter(pl.col("LocalCode") == self.code)

    def disclosed(self, day: dt.date | None = None) -> pl.DataFrame:
        return self.documents.filter(pl.col("DisclosedDate") == (day or self.session).isoformat())

    def listed(self, column: str, code: str | None = None) -> tuple[str, str]:
        """The value before the session and from it on."""
        rows = self.tables["listed"].filter(pl.col("Code") == (code or self.code)).sort("Date")
        before, after = rows.filter(pl.col("Date") < self.session), rows.filter(pl.col("Date") >= self.session)
        return before[column][-1], after[column][0]


def factor_is(ratio: float) -> Present:
    return lambda v: v.quote("AdjustmentFactor") == pytest.approx(ratio)


def has_one_of(*kinds: str) -> Present:
    return lambda v: set(v.disclosed()["TypeOfDocument"]) >= set(kinds)


PRESENT: dict[str, Present] = {
    "listing": lambda v: v.has_row() and not v.has_row(-1) and not v.code.isdigit(),
    "delisting": lambda v: v.has_row(-1) and v.rows["Date"].max() < v.session,
    "listed_and_never_traded": lambda v: v.rows.is_empty() and v.code in set(v.tables["listed"]["Code"]),
    "stop_and_return": lambda v: v.has_row(-1) and not any(map(v.has_row, range(90))) and v.has_row(90),
    "split": lambda v: v.quote("AdjustmentFactor") < 1,  # type: ignore[operator]
    "consolidation": factor_is(10.0),
    "split_without_trade": lambda v: factor_is(0.5)(v) and v.quote("Close") is None,
    "split_at_the_end_of_a_halt": lambda v: factor_is(0.5)(v) and v.quote("Close", -4) is None and v.has_row(-4),
    "halt": lambda v: not any(map(v.has_row, range(4))) and v.has_row(4),
    "halt_with_empty_rows": lambda v: all(v.has_row(k) and v.quote("Close", k) is None for k in range(15)),
    "no_trade": lambda v: all(v.quote("Volume", k) == 0 and v.jump(k) == 1 for k in range(0, 18, 3)),
    "no_price_change": lambda v: all(v.jump(k) == 1 and v.quote("Volume", k) > 0 for k in range(25)),  # type: ignore[operator]
    "zero_price": lambda v: v.quote("Open") == 0,
    "negative_price": lambda v: v.quote("Low") == -1,
    "null_price": lambda v: v.quote("Close") is None and v.quote("Volume") > 0,  # type: ignore[operator]
    "negative_volume": lambda v: v.quote("Volume") < 0,  # type: ignore[operator]
    "negative_turnover": lambda v: v.quote("TurnoverValue") < 0,  # type: ignore[operator]
    "high_below_low": lambda v: v.quote("High") < v.quote("Low"),  # type: ignore[operator]
    "close_outside_range": lambda v: v.quote("Close") > v.quote("High"),  # type: ignore[operator]
    "range_too_wide": lambda v: v.quote("High") > 9 * v.quote("Low"),  # type: ignore[operator]
    "bad_factor": lambda v: v.quote("AdjustmentFactor") in (-1, None),
    "level_error": lambda v: v.jump() > 4 and v.jump(1) < 0.25,
    "level_break": lambda v: v.jump() > 6 and v.jump(1) > 0.9,
    "split_without_factor": lambda v: v.jump() < 0.6 and factor_is(1.0)(v),
    "real_halving": lambda v: v.jump() < 0.6 and v.quote("TurnoverValue") > 5 * v.quote("TurnoverValue", -1),  # type: ignore[operator]
    "factor_without_jump": lambda v: v.jump() > 0.9 and factor_is(0.25)(v),
    "factor_one_session_late": lambda v: v.jump() < 0.6 and factor_is(1.0)(v) and v.quote("AdjustmentFactor", 1) == 0.5,
    "penny_stock": lambda v: v.rows["Close"].max() > 50 > v.rows["Close"].min(),  # type: ignore[operator]
    "session_without_quotes": lambda v: v.session not in set(v.tables["prices"]["Date"]),
    "holiday_rows": lambda v: HOLIDAY in set(v.tables["prices"]["Date"]),
    "missing_index_row": lambda v: v.session not in set(v.tables["index"]["Date"]),
    "old_segments": lambda v: {"0101", "0102", "0104", "0106"} <= set(v.tables["listed"]["MarketCode"]) and "TSEJASDAQ"
    in set(v.tables["investor_flows"]["Section"]),
    "sector_change": lambda v: len(set(v.listed("Sector33Code"))) == 2,
    "section_change": lambda v: set(v.listed("MarketCode")) == {"0101", "0102"},
    "revised_flows": lambda v: v.tables["investor_flows"].filter(PublishedDate=v.session)["EndDate"].n_unique() >= 1
    and v.tables["investor_flows"].select("EndDate", "Section").is_duplicated().any(),
    "late_flows": lambda v: v.tables["investor_flows"].sort("EndDate")["PublishedDate"].is_sorted() is False,
    "forecast_revision": has_one_of("EarnForecastRevision"),
    "several_documents_in_a_day": lambda v: len(v.disclosed()) >= 3 and v.disclosed()["DisclosedTime"].n_unique() >= 3,
    "dividend_notice": has_one_of("RevisionDividendForecast"),
    "corrected_older_period": lambda v: v.disclosed()["CurrentPeriodEndDate"].max() < str(v.session.year - 1) + "-12",  # type: ignore[operator]
    "restated_newest_period": lambda v: "1000000" in set(v.disclosed()["Equity"]),
    "late_results": lambda v: v.disclosed()["CurrentPeriodEndDate"].max()
    < v.documents.filter(pl.col("DisclosedDate") < str(v.session))["CurrentPeriodEndDate"].max(),  # type: ignore[operator]
    "silent_company": lambda v: v.documents["DisclosedDate"].max() < str(v.session),  # type: ignore[operator]
    "ifrs_filer": lambda v: set(v.documents["OrdinaryProfit"]) == {""} and "-" in set(v.documents["OperatingProfit"]),
    "marks_for_nothing": lambda v: "*" in set(v.documents["TotalAssets"]) and "-" in set(v.documents["Equity"]),
    "document_without_time": lambda v: "" in set(v.disclosed()["DisclosedTime"]),
    "document_on_a_saturday": lambda v: any(
        dt.date.fromisoformat(day).weekday() == 5 for day in v.documents["DisclosedDate"]
    ),
    "changed_fiscal_year": lambda v: v.documents["CurrentFiscalYearEndDate"].str.slice(5).n_unique() == 2,
    "loss": lambda v: set(v.documents["Profit"]) == {"0", "-500000"},
}  # fmt: skip


@pytest.mark.parametrize(("period", "event"), ALL, ids=lambda x: f"{x.name}-{x.code}" if isinstance(x, Event) else x)
def test_event_is_where_the_list_says(period: str, event: Event) -> None:
    assert PRESENT[event.name](View(eventful_tables(period), event))


def test_every_kind_of_event_is_planned() -> None:
    assert {event.name for _, event in ALL} == set(PRESENT)


@pytest.mark.parametrize("period", PERIODS)
def test_quarantine_names_the_planned_faults_and_nothing_else(period: str) -> None:
    days = all_sessions(eventful_tables(period))
    planned = {
        (rule, days[days.index(event.session) + after], event.code)
        for event in events(period) for rule, after in event.hits
    }  # fmt: skip
    if period == "segments":
        planned.add(("no_trade_date", HOLIDAY, ""))
    hits = prices_of(period).quarantine.filter(pl.col("rule") != "not_common_stock")
    assert set(hits.select("rule", "Date", "Code").rows()) == planned
