"""What was public at a close: statements by their time of day, flows from the session after their publication."""

from __future__ import annotations

import datetime as dt
from typing import Any

import numpy as np
import polars as pl
import pytest
from market_factory import days
from slow_point_in_time import known_documents

from atft_pipeline.errors import InputError
from atft_pipeline.point_in_time import HISTORY_WEEKS, Disclosures, disclosures, flow_releases, session_at
from atft_pipeline.trading_calendar import sessions as exchange_sessions

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
        ("2024-05-14", None, "2024-05-15"),  # no time: after the close
        ("2024-05-14", "-", "2024-05-15"),
    ],
)
def test_statement_is_known_from_the_first_close_after_it(date: str, time: str | None, first_known: str) -> None:
    record = known(document(date, time))
    assert str(SESSIONS[int(np.argmax(record.latest[:, 0] >= 0))]) == first_known
    assert (record.latest[np.searchsorted(SESSIONS, np.datetime64(first_known)) :, 0] >= 0).all()


def test_half_day_closes_with_the_morning_session() -> None:
    sessions = exchange_sessions("tokyo", "2008-12-25", "2009-01-09")
    record = known(document("2008-12-30", "11:30:00"), sessions=sessions)
    assert str(sessions[int(np.argmax(record.latest[:, 0] >= 0))]) == "2009-01-05"


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


def test_last_document_of_a_day_counts() -> None:
    record = known(
        document("2024-05-14", "13:00:00", NetSales="2"),
        document("2024-05-14", "11:00:00", NetSales="1"),
    )
    assert at(record, "NetSales", "2024-05-14") == 2.0


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
