"""What was public at a close: statements by their time of day, flows from the session after their publication."""

from __future__ import annotations

import datetime as dt
from typing import Any

import numpy as np
import polars as pl
import pytest
from markets.market_factory import days
from slow_disclosures import known_documents, known_weeks

from atft_pipeline.config.schema import DatasetConfig
from atft_pipeline.errors import InputError
from atft_pipeline.features.compute import build_market
from atft_pipeline.market.calendar import sessions as exchange_sessions
from atft_pipeline.market.disclosures import HISTORY_WEEKS, Disclosures, disclosures, flow_releases, session_at
from atft_pipeline.market.price_panel import PricePanel

SESSIONS = exchange_sessions("tokyo", "2024-01-04", "2025-12-30")
NAN = np.nan


def document(date: str, time: str | None = "12:00:00", **columns: Any) -> dict[str, Any]:
    blank = {
        "DisclosedDate": date,
        "DisclosedTime": time,
        "LocalCode": "13010",
        "TypeOfDocument": "1QFinancialStatements_Consolidated_JP",
        "TypeOfCurrentPeriod": "1Q",
        "CurrentFiscalYearEndDate": "2025-03-31",
        "NetSales": "100",
        "OperatingProfit": "10",
        "Profit": "5",
        "TotalAssets": "200",
        "Equity": "50",
        "ForecastOperatingProfit": "",
        "ForecastProfit": "",
        "NextYearForecastOperatingProfit": "",
        "NextYearForecastProfit": "",
    }
    return blank | columns


def known(*documents: dict[str, Any], sessions: Any = SESSIONS, codes: tuple[str, ...] = ("13010",)) -> Disclosures:
    return disclosures(pl.DataFrame(list(documents), infer_schema_length=None), sessions, codes, "tokyo")


def at(record: Disclosures, name: str, day: str, stock: int = 0, sessions: Any = SESSIONS) -> float:
    """Figure in force at the close of `day`, before expiry."""
    event = record.latest[int(np.searchsorted(sessions, np.datetime64(day))), stock]
    return NAN if event < 0 else float(record.values[name][event])


@pytest.mark.parametrize(
    ("date", "time", "first_known"),
    [
        ("2024-05-14", "14:59:59", "2024-05-14"),
        ("2024-05-14", "15:00:00", "2024-05-15"),  # at the close is not before it
        ("2024-11-05", "15:29", "2024-11-05"),  # the close moved to 15:30 on this day
        ("2024-11-05", "15:30:00", "2024-11-06"),
        ("2024-11-01", "15:29:00", "2024-11-05"),  # a Friday before a Monday holiday
        ("2024-05-11", "09:00:00", "2024-05-13"),  # a Saturday
        ("2024-05-06", "09:00:00", "2024-05-07"),  # a holiday
        ("2024-01-01", "12:00:00", "2024-01-04"),  # before the first session
        ("2024-05-14", None, "2024-05-15"),  # no time: after the close
        ("2024-05-14", "-", "2024-05-15"),
    ],
)
def test_statement_is_known_from_the_first_close_after_it(date: str, time: str | None, first_known: str) -> None:
    record = known(document(date, time))
    assert str(SESSIONS[int(np.argmax(record.latest[:, 0] >= 0))]) == first_known
    assert (record.latest[np.searchsorted(SESSIONS, np.datetime64(first_known)) :, 0] >= 0).all()


@pytest.mark.parametrize(
    ("date", "time", "first_known"),
    [
        ("2008-12-30", "10:59:59", "2008-12-30"),
        ("2008-12-30", "11:00:00", "2009-01-05"),
        ("2009-01-05", "11:00:00", "2009-01-06"),
    ],
)
def test_half_day_closes_with_the_morning_session(date: str, time: str, first_known: str) -> None:
    sessions = exchange_sessions("tokyo", "2008-12-25", "2009-01-09")
    record = known(document(date, time), sessions=sessions)
    assert str(sessions[int(np.argmax(record.latest[:, 0] >= 0))]) == first_known


def test_documents_before_the_first_session_are_known_and_count_weekdays() -> None:
    record = known(document("2023-12-27"), document("2024-01-04"))  # Wednesday to Thursday of the next week
    assert record.known_at.tolist() == [-6.0, 0.0]
    assert record.latest[0, 0] == 1


def test_text_figures_become_numbers_and_marks_become_null() -> None:
    record = known(document("2024-05-14", NetSales="1,234", OperatingProfit="-", TotalAssets="*", Equity=" "))
    values = [
        at(record, name, "2024-05-14") for name in ("NetSales", "OperatingProfit", "Profit", "TotalAssets", "Equity")
    ]
    np.testing.assert_array_equal(values, [1234.0, NAN, 5.0, NAN, NAN])


def test_year_on_year_compares_the_same_cumulative_period() -> None:
    record = known(
        document("2024-05-14", TypeOfCurrentPeriod="FY", CurrentFiscalYearEndDate="2024-03-31", NetSales="400"),
        document("2024-08-09", NetSales="100"),
        document("2025-05-13", TypeOfCurrentPeriod="FY", NetSales="440"),
        document("2025-08-08", CurrentFiscalYearEndDate="2026-03-31", NetSales="90"),
    )
    ago = [at(record, "NetSales_year_ago", day) for day in ("2024-08-09", "2025-05-13", "2025-08-08")]
    np.testing.assert_array_equal(ago, [NAN, 400.0, 100.0])


def test_leap_year_and_odd_year_ends_still_match() -> None:
    record = known(
        document("2024-04-10", TypeOfCurrentPeriod="FY", CurrentFiscalYearEndDate="2024-02-29", NetSales="400"),
        document("2025-04-10", TypeOfCurrentPeriod="FY", CurrentFiscalYearEndDate="2025-02-28", NetSales="440"),
    )
    assert at(record, "NetSales_year_ago", "2025-04-10") == 400.0


def test_without_fiscal_year_dates_the_disclosure_dates_the_period() -> None:
    rows = [document("2024-08-09", NetSales="100"), document("2025-08-12", NetSales="120")]
    frame = pl.DataFrame(rows).drop("CurrentFiscalYearEndDate")
    record = disclosures(frame, SESSIONS, ("13010",), "tokyo")
    assert at(record, "NetSales_year_ago", "2025-08-12") == 100.0


def test_correction_of_an_older_period_changes_the_comparison_only() -> None:
    record = known(
        document("2024-08-09", NetSales="100"),
        document("2025-08-08", CurrentFiscalYearEndDate="2026-03-31", NetSales="120"),
        document("2025-09-10", NetSales="80"),
    )
    assert at(record, "NetSales", "2025-09-10") == 120.0
    assert [at(record, "NetSales_year_ago", day) for day in ("2025-09-09", "2025-09-10")] == [100.0, 80.0]


def test_forecast_revision_keeps_the_last_results_and_counts_as_a_revision() -> None:
    revision = {"NetSales": "", "OperatingProfit": "", "Profit": "", "TotalAssets": "", "Equity": ""}
    record = known(
        document("2024-08-09", ForecastOperatingProfit="50", ForecastProfit="30"),
        document(
            "2024-09-10",
            TypeOfDocument="EarnForecastRevision",
            TypeOfCurrentPeriod="FY",
            ForecastOperatingProfit="60",
            **revision,
        ),
    )
    assert at(record, "NetSales", "2024-09-10") == 100.0
    assert at(record, "OperatingProfit_full_year", "2024-09-10") == 60.0
    assert at(record, "OperatingProfit_forecast", "2024-09-10") == 60.0
    assert at(record, "OperatingProfit_forecast_before", "2024-09-10") == 50.0
    assert np.isnan(at(record, "Profit_forecast_before", "2024-09-10"))
    assert str(record.disclosed["results"][1]) == "2024-08-09"
    assert str(record.disclosed["document"][1]) == "2024-09-10"


def test_a_revision_document_that_repeats_figures_brings_no_results() -> None:
    record = known(
        document("2024-08-09", NetSales="100"),
        document("2024-09-10", TypeOfDocument="DividendForecastRevision", NetSales="999"),
    )
    assert at(record, "NetSales", "2024-09-10") == 100.0
    assert str(record.disclosed["results"][1]) == "2024-08-09"


def test_forecast_of_another_fiscal_year_is_no_revision() -> None:
    record = known(
        document("2025-02-10", TypeOfCurrentPeriod="3Q", ForecastOperatingProfit="50"),
        document("2025-05-13", TypeOfCurrentPeriod="FY", NextYearForecastOperatingProfit="70"),
        document("2025-08-08", CurrentFiscalYearEndDate="2026-03-31", ForecastOperatingProfit="77"),
    )
    before = [at(record, "OperatingProfit_forecast_before", day) for day in ("2025-05-13", "2025-08-08")]
    np.testing.assert_array_equal(before, [NAN, 70.0])
    # The full year that ended is measured against its own last forecast.
    assert at(record, "OperatingProfit_full_year", "2025-05-13") == 50.0
    assert at(record, "OperatingProfit_full_year", "2025-08-08") == 77.0


NO_RESULTS = dict.fromkeys(("NetSales", "OperatingProfit", "Profit", "TotalAssets", "Equity"), "")


def test_documents_of_a_day_follow_each_other_by_time_then_number() -> None:
    rows = [
        document("2024-05-14", "13:00:00", NetSales="2", DisclosureNumber="20240514000010"),
        document("2024-05-14", "13:00:00", NetSales="3", DisclosureNumber="20240514000009"),
        document("2024-05-14", "11:00:00", NetSales="1", DisclosureNumber="20240514000011"),
    ]
    assert at(known(*rows), "NetSales", "2024-05-14") == 2.0
    unnumbered = [{name: value for name, value in row.items() if name != "DisclosureNumber"} for row in rows]
    assert at(known(*unnumbered), "NetSales", "2024-05-14") == 3.0, "of one moment the table's last"
    assert at(known(*unnumbered[::-1]), "NetSales", "2024-05-14") == 2.0


def test_results_with_a_forecast_and_a_dividend_revision_on_one_day() -> None:
    record = known(
        document("2024-05-14", ForecastProfit="30"),
        document("2024-08-09", TypeOfCurrentPeriod="2Q", NetSales="210", ForecastProfit="30"),
        document("2024-08-09", TypeOfDocument="EarnForecastRevision", ForecastProfit="45", **NO_RESULTS),
        document("2024-08-09", TypeOfDocument="DividendForecastRevision", **NO_RESULTS),
    )
    found = [at(record, name, "2024-08-09") for name in ("NetSales", "Profit_forecast", "Profit_forecast_before")]
    assert found == [210.0, 45.0, 30.0]


def test_code_with_a_letter() -> None:
    record = known(document("2024-05-14", LocalCode="130A0"), codes=("13000", "130A0"))
    assert record.latest[-1].tolist() == [-1, 0]


def test_profit_that_a_standard_does_not_know_is_null_and_not_zero() -> None:
    ifrs = {"TypeOfDocument": "1QFinancialStatements_Consolidated_IFRS", "OrdinaryProfit": "", "OperatingProfit": ""}
    record = known(document("2024-05-14", **ifrs, ForecastProfit="30"))
    assert [at(record, name, "2024-05-14") for name in ("NetSales", "Profit", "Profit_full_year")] == [100.0, 5.0, 30.0]
    assert np.isnan(at(record, "OperatingProfit", "2024-05-14"))
    assert np.isnan(at(record, "OperatingProfit_full_year", "2024-05-14"))


def year(end: str, start: str, disclosed: str, sales: str, **columns: Any) -> dict[str, Any]:
    dates = {"CurrentPeriodStartDate": start, "CurrentFiscalYearStartDate": start, "CurrentPeriodEndDate": end}
    period = {"TypeOfCurrentPeriod": "FY", "CurrentFiscalYearEndDate": end} | dates
    return document(disclosed, NetSales=sales, **(period | columns))


CHANGED_YEAR = (
    year("2022-12-31", "2022-04-01", "2023-02-14", "300"),
    year("2023-12-31", "2023-01-01", "2024-02-14", "420"),
    year("2024-12-31", "2024-01-01", "2025-02-14", "441"),
)
"""Nine months to December 2022, when the fiscal year's end moved from March, then twelve and twelve."""


def without_starts(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.endswith("StartDate")}


@pytest.mark.parametrize("are_starts_stated", [True, False])
def test_short_fiscal_year_is_compared_with_no_full_one(are_starts_stated: bool) -> None:
    rows = [year("2022-03-31", "2021-04-01", "2022-05-13", "400"), *CHANGED_YEAR]
    record = known(*(rows if are_starts_stated else map(without_starts, rows)))
    assert np.isnan(at(record, "NetSales_year_ago", "2024-02-14")), "twelve months are not compared with nine"
    assert at(record, "NetSales_year_ago", "2025-02-14") == 420.0


def test_year_ends_a_month_off_are_still_full_years() -> None:
    # Eleven months apart, without starts: a year's end estimated or dated otherwise, not a year of eleven months.
    rows = [year("2023-03-31", "", "2023-05-12", "400"), year("2024-02-29", "", "2024-04-12", "410")]
    assert at(known(*rows), "NetSales_year_ago", "2024-04-12") == 400.0


def test_first_quarter_of_a_moved_year_has_no_year_ago_quarter() -> None:
    # January to March follows a year from April; the first quarter a year before was April to June.
    record = known(
        year(
            "2023-06-30",
            "2023-04-01",
            "2023-08-10",
            "90",
            TypeOfCurrentPeriod="1Q",
            CurrentFiscalYearEndDate="2023-12-31",
        ),
        year(
            "2024-03-31",
            "2024-01-01",
            "2024-05-10",
            "95",
            TypeOfCurrentPeriod="1Q",
            CurrentFiscalYearEndDate="2024-12-31",
        ),
        year(
            "2024-06-30",
            "2024-01-01",
            "2024-08-09",
            "99",
            TypeOfCurrentPeriod="2Q",
            CurrentFiscalYearEndDate="2024-12-31",
        ),
        year(
            "2025-03-31",
            "2025-01-01",
            "2025-05-09",
            "98",
            TypeOfCurrentPeriod="1Q",
            CurrentFiscalYearEndDate="2025-12-31",
        ),
    )
    ago = [at(record, "NetSales_year_ago", day) for day in ("2024-05-10", "2024-08-09", "2025-05-09")]
    np.testing.assert_array_equal(ago, [NAN, NAN, 95.0])


def test_periods_of_a_long_fiscal_year_follow_each_other() -> None:
    long = {"CurrentFiscalYearEndDate": "2024-09-30"}  # eighteen months from April 2023
    record = known(
        year("2023-03-31", "2022-04-01", "2023-05-12", "400"),
        year("2024-03-31", "2023-04-01", "2024-05-14", "410", TypeOfCurrentPeriod="4Q", **long),
        year("2024-06-30", "2023-04-01", "2024-08-09", "515", TypeOfCurrentPeriod="5Q", **long),
        year("2024-09-30", "2023-04-01", "2024-11-14", "620", **long),
    )
    days = ("2024-05-14", "2024-08-09", "2024-11-14")
    assert [at(record, "NetSales", day) for day in days] == [410.0, 515.0, 620.0]
    # Twelve months against the year before; fifteen and eighteen have no match.
    np.testing.assert_array_equal([at(record, "NetSales_year_ago", day) for day in days], [400.0, NAN, NAN])


def test_period_without_a_quarters_name_is_placed_by_its_dates() -> None:
    other = {"TypeOfCurrentPeriod": "OtherPeriod", "CurrentFiscalYearEndDate": "2024-12-31"}
    first = year("2024-03-31", "2024-01-01", "2024-05-10", "95", **other | {"TypeOfCurrentPeriod": "1Q"})
    record = known(first, year("2024-08-31", "2024-01-01", "2024-09-10", "250", **other))
    assert at(record, "NetSales", "2024-09-10") == 250.0
    undated = known(first, document("2024-09-10", NetSales="250", TypeOfCurrentPeriod="OtherPeriod"))
    assert at(undated, "NetSales", "2024-09-10") == 95.0


def test_late_correction_brings_no_old_forecast_back_into_force() -> None:
    record = known(
        document("2024-08-09", NetSales="100", ForecastProfit="30"),
        document("2024-11-08", TypeOfCurrentPeriod="2Q", NetSales="210", ForecastProfit="45"),
        document("2024-12-02", NetSales="99", ForecastProfit="30"),  # corrects the first quarter, forecast of its time
        document("2025-05-13", TypeOfCurrentPeriod="FY", NetSales="430", NextYearForecastProfit="60"),
        document("2025-06-02", TypeOfCurrentPeriod="2Q", NetSales="211", ForecastProfit="45"),
    )
    days = ("2024-12-02", "2025-05-13", "2025-06-02")
    assert [at(record, "NetSales", day) for day in days] == [210.0, 430.0, 430.0]
    assert [at(record, "Profit_forecast", day) for day in days] == [45.0, 60.0, 60.0]
    assert [str(record.disclosed["forecast"][e]) for e in (2, 4)] == ["2024-11-08", "2025-05-13"]
    assert at(record, "Profit_full_year", "2025-06-02") == 45.0


def test_correction_of_the_newest_period_counts_from_its_own_disclosure() -> None:
    record = known(document("2024-08-09", NetSales="100"), document("2024-09-02", "16:00:00", NetSales="90"))
    assert [at(record, "NetSales", day) for day in ("2024-09-02", "2024-09-03")] == [100.0, 90.0]
    assert str(record.disclosed["results"][1]) == "2024-09-02"


def test_next_years_forecast_is_of_the_year_that_its_document_names() -> None:
    short = {"CurrentFiscalYearEndDate": "2025-12-31"}
    forecast = {"NextYearForecastProfit": "50", "NextFiscalYearEndDate": "2025-12-31"}
    record = known(
        document("2025-05-13", TypeOfCurrentPeriod="FY", **forecast),
        document("2025-08-08", ForecastProfit="55", **short),
    )
    assert at(record, "Profit_forecast_before", "2025-08-08") == 50.0


def test_stocks_do_not_share_documents_and_unknown_codes_are_ignored() -> None:
    record = known(document("2024-05-14"), document("2024-05-14", LocalCode="99990"), codes=("13000", "13010"))
    assert np.isnan(at(record, "NetSales", "2024-05-14", stock=0))
    assert at(record, "NetSales", "2024-05-14", stock=1) == 100.0


# --- reference --------------------------------------------------------------------------------------------------------


def messy_documents(rng: np.random.Generator, count: int) -> list[dict[str, Any]]:
    """Documents of four companies with every irregularity at once, in the order in which a vendor may deliver them."""
    texts = ["", "-", "*", "－", None, "nan", "inf", "1,234"]
    year_ends = ["2023-03-31", "2024-03-31", "2024-12-31", "2025-12-31", "2025-03-20", "", None]
    dates = ["2023-06-30", "2024-03-31", "2024-06-30", "2024-09-20", "2025-06-28", "", None]

    def pick(values: list[Any]) -> Any:
        return values[rng.integers(len(values))]

    def figure() -> str | None:
        return str(int(rng.integers(-500, 500))) if rng.random() < 0.7 else pick(texts)

    rows = []
    for _ in range(count):
        disclosed = dt.date(2023, 6, 1) + dt.timedelta(days=int(rng.integers(0, 900)))
        row = {
            "DisclosedDate": disclosed.isoformat(),
            "DisclosedTime": pick(["11:30", "14:59:59", "15:00:00", "15:29:59", "15:30:00", "", "-", None, "9am"]),
            "DisclosureNumber": pick(["20240101000001", "20240101000002", "", None]),
            "LocalCode": pick(["13010", "13020", "130A0", "13040", "99990"]),
            "TypeOfDocument": pick(["1QFinancialStatements_Consolidated_IFRS", "EarnForecastRevision", None]),
            "TypeOfCurrentPeriod": pick(["1Q", "2Q", " 3Q", "4Q", "5Q", "FY", "FY", "OtherPeriod", None]),
            "CurrentFiscalYearStartDate": pick(["2023-04-01", "2024-04-01", "", None]),
            "CurrentPeriodStartDate": pick(["2024-01-01", "2024-04-01", "", None]),
            "CurrentFiscalYearEndDate": pick(year_ends),
            "NextFiscalYearEndDate": pick(year_ends),
            "CurrentPeriodEndDate": pick(dates),
        }
        names = ("NetSales", "OperatingProfit", "Profit", "TotalAssets", "Equity")
        forecasts = ("ForecastOperatingProfit", "ForecastProfit")
        forecasts += tuple(f"NextYear{name}" for name in forecasts)
        rows.append(row | {name: figure() for name in (*names, *forecasts)})
    return rows


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [8, 300])
def test_disclosures_equal_their_slow_reference(seed: int, count: int) -> None:
    rows = messy_documents(np.random.default_rng(seed), count)
    codes = ("13040", "13010", "130A0", "13030", "13020")
    sessions = SESSIONS[:300]
    record = disclosures(pl.DataFrame(rows, infer_schema_length=None), sessions, codes, "tokyo")
    compared = 0
    for n, code in enumerate(codes):
        for t, expected in enumerate(known_documents(rows, sessions, code, "tokyo")):
            event = record.latest[t, n]
            assert (event < 0) == (expected is None), (code, sessions[t])
            if expected is None:
                continue
            for name, values in record.values.items():
                value = expected.get(name)
                np.testing.assert_equal(values[event], NAN if value is None else value, f"{name} {code} {sessions[t]}")
            for kind, dates in record.disclosed.items():
                assert dates[event].item() == expected.get(kind), (kind, code, sessions[t])
            compared += 1
    assert compared > 300


def test_the_grid_of_the_last_sessions_is_the_end_of_the_whole_one() -> None:
    statements = pl.DataFrame(messy_documents(np.random.default_rng(7), 200), infer_schema_length=None)
    codes = ("13010", "13020", "130A0", "13040")
    whole = disclosures(statements, SESSIONS, codes, "tokyo")
    for first in (1, 200, len(SESSIONS) - 1):
        part = disclosures(statements, SESSIONS, codes, "tokyo", first)
        np.testing.assert_array_equal(part.latest, whole.latest[first:])
        np.testing.assert_array_equal(part.known_at, whole.known_at)
    assert disclosures(None, SESSIONS, codes, "tokyo", 5).latest.shape == (len(SESSIONS) - 5, 4)


def test_what_is_disclosed_after_a_close_changes_nothing_before() -> None:
    rows = messy_documents(np.random.default_rng(8), 300)
    codes, last = ("13010", "13020", "130A0", "13040"), 150
    early = [row for row in rows if row["DisclosedDate"] <= str(SESSIONS[last])]
    assert 0 < len(early) < len(rows)
    whole, part = (
        disclosures(pl.DataFrame(r, infer_schema_length=None), SESSIONS, codes, "tokyo") for r in (rows, early)
    )
    for name in whole.values:
        for t in range(last):
            found = [np.where(d.latest[t] >= 0, d.values[name][d.latest[t]], NAN) for d in (whole, part)]
            np.testing.assert_array_equal(*found)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_missing_table_and_missing_column() -> None:
    assert (disclosures(None, SESSIONS, ("13010",), "tokyo").latest == -1).all()
    with pytest.raises(InputError, match="statements: column Profit is missing"):
        disclosures(pl.DataFrame([document("2024-05-14")]).drop("Profit"), SESSIONS, ("13010",), "tokyo")
    with pytest.raises(InputError, match="investor_flows: column Section is missing"):
        flow_releases(pl.DataFrame([week("2024-01-18", "2024-01-12")]).drop("Section"), SESSIONS)


def week(published: str, end: str, foreign: float = 1.0, **columns: Any) -> dict[str, Any]:
    row = {"PublishedDate": published, "StartDate": end, "EndDate": end, "Section": "TSEPrime"}
    for kind, balance in {"Foreigners": foreign, "Individuals": -1.0, "Proprietary": 5.0, "Total": 0.0}.items():
        row |= {f"{kind}Balance": balance, f"{kind}Total": 10.0}
    return row | columns


def test_flows_count_from_the_session_after_publication() -> None:
    releases = flow_releases(pl.DataFrame([week("2024-01-18", "2024-01-12")]), SESSIONS)
    t = int(np.searchsorted(SESSIONS, np.datetime64("2024-01-18")))
    assert releases.sections == ("TSEPrime",)
    assert releases.latest[t - 1 : t + 2, 0].tolist() == [-1, -1, 0]
    assert releases.since[t + 1 : t + 4, 0].tolist() == [1.0, 2.0, 3.0]
    assert np.isnan(releases.since[t, 0])


def test_revised_week_counts_from_its_revision_and_is_no_new_release() -> None:
    rows = [
        week("2024-01-18", "2024-01-12", foreign=1.0),
        week("2024-01-25", "2024-01-19", foreign=2.0),
        week("2024-01-30", "2024-01-12", foreign=9.0),
    ]
    releases = flow_releases(pl.DataFrame(rows), SESSIONS)
    np.testing.assert_allclose(releases.foreign_net[1, -2:], [0.1, 0.2])
    np.testing.assert_allclose(releases.foreign_net[2, -2:], [0.9, 0.2])
    after = int(np.searchsorted(SESSIONS, np.datetime64("2024-01-31")))
    assert releases.latest[after, 0] == 2
    assert releases.since[after, 0] == 4.0  # since the 25th, a Thursday: 26, 29, 30, 31


def test_revision_takes_effect_after_its_publication_and_moves_nothing_before() -> None:
    rows = [week("2024-01-18", "2024-01-12", foreign=1.0), week("2024-01-25", "2024-01-19", foreign=2.0)]
    twice = [*rows, week("2024-01-30", "2024-01-12", foreign=9.0), week("2024-02-02", "2024-01-12", foreign=4.0)]
    before, after = (flow_releases(pl.DataFrame(table), SESSIONS) for table in (rows, twice))
    first_seen = int(np.searchsorted(SESSIONS, np.datetime64("2024-01-31")))
    np.testing.assert_array_equal(after.latest[:first_seen], before.latest[:first_seen])
    np.testing.assert_array_equal(after.since, before.since)
    oldest = {
        str(SESSIONS[t]): after.foreign_net[after.latest[t, 0], -2] for t in range(first_seen - 1, first_seen + 5)
    }
    expected = {"01-30": 0.1, "01-31": 0.9, "02-01": 0.9, "02-02": 0.9, "02-05": 0.4, "02-06": 0.4}
    assert oldest == {f"2024-{day}": pytest.approx(value) for day, value in expected.items()}


def test_two_weeks_published_together_are_one_release() -> None:
    rows = [week("2024-01-18", "2024-01-05", foreign=1.0), week("2024-01-18", "2024-01-12", foreign=2.0)]
    for table in (rows, rows[::-1]):
        releases = flow_releases(pl.DataFrame(table), SESSIONS)
        np.testing.assert_allclose(releases.foreign_net[:, -2:], [[0.1, 0.2]])
        assert releases.latest.max() == 0


def test_section_that_no_market_code_names_has_no_effect() -> None:
    rows = [week("2024-01-18", "2024-01-12"), week("2024-01-25", "2024-01-19", Section="TSEGrowth")]
    foreign = [week("2024-01-17", "2024-01-12", foreign=7.0, Section=name) for name in ("TokyoNagoya", "Nagoya", "")]
    known_only, all_rows = (flow_releases(pl.DataFrame(table), SESSIONS) for table in (rows, [*foreign, *rows]))
    assert all_rows.sections == ("TSEGrowth", "TSEPrime")
    for name in ("foreign_net", "individual_net", "total", "buying_share", "latest", "since"):
        np.testing.assert_array_equal(getattr(all_rows, name), getattr(known_only, name))
    assert flow_releases(pl.DataFrame(foreign), SESSIONS).latest.shape == (len(SESSIONS), 0)


def test_stock_has_the_flows_of_the_section_it_is_in_at_each_session() -> None:
    days_around = exchange_sessions("tokyo", "2022-03-25", "2022-04-20")
    moved = dt.date(2022, 4, 4)
    market = {
        "13010": ("0101", "0111"),
        "13020": ("0106", "0112"),
        "13030": ("0104", "0113"),
        "13040": ("0105", "0105"),
    }
    prices = pl.DataFrame(
        [
            {
                "Date": day,
                "Code": code,
                "MarketCode": codes[day >= moved],
                "Sector33Code": "0050",
                "is_investable": True,
            }
            | dict.fromkeys(("Open", "High", "Low", "Close", "Volume", "TurnoverValue"), 1.0)
            for day in days_around.tolist()
            for code, codes in market.items()
        ]
    )
    old = {"TSE1st": 1.0, "TSE2nd": 2.0, "TSEJASDAQ": 3.0, "TSEMothers": 4.0}
    new = {"TSEPrime": 5.0, "TSEStandard": 6.0, "TSEGrowth": 7.0}
    flows = [week("2022-03-24", "2022-03-18", value, Section=section) for section, value in old.items()]
    flows += [week("2022-04-14", "2022-04-08", value, Section=section) for section, value in new.items()]
    index = pl.DataFrame({"Date": days_around, "Code": "0000", "Close": 1.0})
    tables = {"index": index, "investor_flows": pl.DataFrame(flows)}
    flags = dict.fromkeys(("is_liquid", "is_traded", "is_listed_backfilled"), pl.lit(value=True))
    dense = PricePanel.from_frame(prices.with_columns(**flags, cumulative_factor=1.0))
    panels = build_market(dense, tables, DatasetConfig())
    found = panels.by_section(panels.releases.foreign_net[:, -1])
    shown = {day: found[int(np.searchsorted(days_around, np.datetime64(day)))].tolist() for day in
             ("2022-04-01", "2022-04-04", "2022-04-14", "2022-04-15")}  # fmt: skip
    np.testing.assert_allclose(shown["2022-04-01"], [0.1, 0.3, 0.4, NAN])
    # The new sections have published nothing until their first week is out.
    np.testing.assert_allclose(shown["2022-04-04"], [NAN] * 4)
    np.testing.assert_allclose(shown["2022-04-14"], [NAN] * 4)
    np.testing.assert_allclose(shown["2022-04-15"], [0.5, 0.6, 0.7, NAN])


@pytest.mark.parametrize("seed", range(3))
def test_flow_releases_equal_their_slow_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(150):
        end = dt.date(2023, 10, 6) + dt.timedelta(weeks=int(rng.integers(0, 40)))
        published = end + dt.timedelta(days=int(rng.integers(4, 60)))
        section = ("TSEPrime", "TSEGrowth", "TokyoNagoya")[rng.integers(3)]
        rows.append(week(str(published), str(end), float(rng.integers(-9, 9)), Section=section))
        rows[-1]["IndividualsTotal"] = float(rng.integers(0, 3))
    rows = list({(r["PublishedDate"], r["EndDate"], r["Section"]): r for r in rows}.values())
    sessions = SESSIONS[:200]
    releases = flow_releases(pl.DataFrame(rows), sessions)
    part = flow_releases(pl.DataFrame(rows), sessions, first=150)
    np.testing.assert_array_equal(part.latest, releases.latest[150:])
    np.testing.assert_array_equal(part.since, releases.since[150:])
    for s, section in enumerate(releases.sections):
        for t, session in enumerate(sessions.tolist()):
            expected, event = known_weeks(rows, session, section), releases.latest[t, s]
            assert (event < 0) == (expected is None)
            if expected is None:
                assert np.isnan(releases.since[t, s])
                continue
            weeks, newest, released = expected
            history = [weeks.get(w) for w in range(newest - HISTORY_WEEKS + 1, newest + 1)]
            for name, kind in (("foreign_net", "Foreigners"), ("individual_net", "Individuals")):
                ratios = [
                    NAN if r is None or not r[f"{kind}Total"] else r[f"{kind}Balance"] / r[f"{kind}Total"]
                    for r in history
                ]
                np.testing.assert_array_equal(getattr(releases, name)[event], ratios)
            totals = [NAN if r is None else r["TotalTotal"] for r in history]
            np.testing.assert_array_equal(releases.total[event], totals)
            buyers = [weeks[newest][f"{kind}Balance"] > 0 for kind in ("Foreigners", "Individuals")]
            assert releases.buying_share[event] == np.mean(buyers)
            after = sum(released < day <= session for day in sessions.tolist())
            unseen = np.busday_count(
                released + dt.timedelta(days=1), max(sessions[0].item(), released + dt.timedelta(days=1))
            )
            assert releases.since[t, s] == after + unseen


def test_week_that_is_still_missing_is_a_null_in_the_history() -> None:
    rows = [week("2024-01-18", "2024-01-12"), week("2024-02-01", "2024-01-26")]
    with_late = [*rows, week("2024-03-07", "2024-01-19")]
    for table in (rows, with_late):
        releases = flow_releases(pl.DataFrame(table), SESSIONS)
        np.testing.assert_array_equal(releases.foreign_net[1, -3:], [0.1, NAN, 0.1])
        assert releases.foreign_net.shape[1] == HISTORY_WEEKS


def test_breadth_counts_investor_types_and_not_their_sums() -> None:
    releases = flow_releases(pl.DataFrame([week("2024-01-18", "2024-01-12", foreign=3.0)]), SESSIONS)
    assert releases.buying_share.tolist() == [
        0.5
    ]  # foreigners buy, individuals sell; Proprietary and Total are no types


def test_weekdays_stand_for_the_sessions_before_the_first() -> None:
    sessions = days("2024-05-13", "2024-05-14", "2024-05-16")  # Monday, Tuesday, Thursday
    found = session_at(sessions, days("2024-05-09", "2024-05-10", "2024-05-11", "2024-05-13", "2024-05-15"))
    assert found.tolist() == [-2, -1, -1, 0, 1]
