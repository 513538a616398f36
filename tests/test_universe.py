"""Adjusted prices, membership and quarantine: decided at each session from what was public at its close."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from atft_pipeline import trading_calendar
from atft_pipeline.config import DatasetConfig
from atft_pipeline.contracts import check_prices
from atft_pipeline.errors import InputError
from atft_pipeline.price_panel import PRICES_COLUMNS
from atft_pipeline.synthetic import generate_market
from atft_pipeline.universe import QUARANTINE_RULES, PricesResult, build_prices

CONFIG = DatasetConfig(min_history_sessions=10)
DAYS: list[dt.date] = trading_calendar.sessions("tokyo", "2023-01-04", "2023-04-28").tolist()
Tables = dict[str, pl.DataFrame]


def quiet_market(stocks: int = 3, sessions: int = 40, price: float = 1000.0) -> Tables:
    """Stocks that move half a percent up and down on a turnover of 200 million yen; nothing to quarantine."""
    rows = []
    for t, day in enumerate(DAYS[:sessions]):
        for i in range(stocks):
            close = price * (1 + 0.005 * math.sin(t + i))
            rows.append((day, f"{3000 + i}0", close, close * 1.01, close * 0.99, close, 200e6 / close, None, 1.0))
    names = ["Date", "Code", "Open", "High", "Low", "Close", "Volume", "TurnoverValue", "AdjustmentFactor"]
    schema = {n: pl.Date if n == "Date" else pl.String if n == "Code" else pl.Float64 for n in names}
    prices = pl.DataFrame(rows, schema=schema, orient="row")
    listed = pl.DataFrame(
        [(DAYS[0], f"{3000 + i}0", "3650", "0111") for i in range(stocks)],
        schema={"Date": pl.Date, "Code": pl.String, "Sector33Code": pl.String, "MarketCode": pl.String},
        orient="row",
    )
    index = pl.DataFrame({"Date": DAYS[:sessions], "Code": ["0000"] * sessions, "Close": [2000.0] * sessions})
    return {"prices": prices, "listed": listed, "index": index}


def edit(tables: Tables, session: int, code: str = "30000", until: int | None = None, **values: pl.Expr) -> Tables:
    """The tables with one stock's columns changed at `session` (through `until`)."""
    here = (pl.col("Code") == code) & pl.col("Date").is_between(
        DAYS[session], DAYS[session if until is None else until]
    )
    changed = [pl.when(here).then(value).otherwise(pl.col(name)).alias(name) for name, value in values.items()]
    return tables | {"prices": tables["prices"].with_columns(changed)}


def scaled(ratio: float) -> dict[str, pl.Expr]:
    return {name: pl.col(name) * ratio for name in ("Open", "High", "Low", "Close")}


def rules(result: PricesResult) -> list[tuple[str, dt.date, str]]:
    return [(row["rule"], row["Date"], row["Code"]) for row in result.quarantine.iter_rows(named=True)]


def adjusted_close(result: PricesResult, code: str = "30000") -> np.ndarray:
    return result.prices.filter(pl.col("Code") == code)["Close"].to_numpy().copy()


# --- the table --------------------------------------------------------------------------------------------------------


def test_quiet_market_has_every_row_and_no_hit() -> None:
    result = build_prices(quiet_market(), CONFIG)
    assert result.prices.columns == list(PRICES_COLUMNS)
    assert result.prices.height == 3 * 40
    assert result.quarantine.is_empty()
    assert check_prices(result.prices).passed
    assert result.summary["quarantine"] == {}
    assert result.summary["warnings"] == []


def test_split_is_adjusted_forward() -> None:
    """Prices before the ex-date stay as printed; after it they and the volumes are on the old share base."""
    plain = build_prices(quiet_market(), CONFIG).prices
    split = edit(quiet_market(), 20, until=39, **scaled(0.25), Volume=pl.col("Volume") * 4)
    split = edit(split, 20, AdjustmentFactor=pl.lit(0.25))
    result = build_prices(split, CONFIG)
    assert result.quarantine.is_empty()
    assert_frame_equal(result.prices.drop("cumulative_factor"), plain.drop("cumulative_factor"), rel_tol=1e-12)
    factors = result.prices.filter(pl.col("Code") == "30000")["cumulative_factor"].to_list()
    assert factors == [1.0] * 20 + [0.25] * 20


def test_factor_on_a_session_without_trade_counts_from_the_next_trade() -> None:
    split = edit(quiet_market(), 20, until=39, **scaled(0.5))
    none = {name: pl.lit(None) for name in ("Open", "High", "Low", "Close", "Volume")}
    split = edit(split, 20, **none, AdjustmentFactor=pl.lit(0.5))
    closes = adjusted_close(build_prices(split, CONFIG))
    expected = adjusted_close(build_prices(quiet_market(), CONFIG))
    expected[20] = np.nan
    np.testing.assert_allclose(closes, expected)


def test_session_without_a_trade_has_a_row_with_null_prices() -> None:
    tables = quiet_market()
    tables["prices"] = tables["prices"].filter(~((pl.col("Code") == "30000") & (pl.col("Date") == DAYS[20])))
    row = build_prices(tables, CONFIG).prices.filter(pl.col("Code") == "30000", pl.col("Date") == DAYS[20])
    assert row.select("Open", "High", "Low", "Close", "Volume", "TurnoverValue").row(0) == (None,) * 6
    assert row.select("is_traded", "is_investable").row(0) == (False, True)


def test_volume_of_zero_is_an_untraded_session() -> None:
    result = build_prices(edit(quiet_market(), 20, Volume=pl.lit(0.0)), CONFIG)
    assert math.isnan(adjusted_close(result)[20])
    assert result.quarantine.is_empty()


def test_rows_end_five_sessions_after_the_last_trade() -> None:
    tables = quiet_market()
    gone = (pl.col("Code") == "30000") & (pl.col("Date") > DAYS[24])
    tables["prices"] = tables["prices"].filter(~gone)
    rows = build_prices(tables, CONFIG).prices.filter(pl.col("Code") == "30000")
    assert rows["Date"].max() == DAYS[29]
    assert rows["is_investable"].to_list() == [False] * 9 + [True] * 21


def test_untraded_table_turnover_is_close_times_volume_and_never_adjusted() -> None:
    split = edit(quiet_market(), 20, until=39, **scaled(0.5), Volume=pl.col("Volume") * 2)
    prices = build_prices(edit(split, 20, AdjustmentFactor=pl.lit(0.5)), CONFIG).prices
    assert np.allclose(prices["TurnoverValue"].drop_nulls(), 200e6)


# --- membership -------------------------------------------------------------------------------------------------------


def test_stock_is_investable_from_its_nth_traded_session() -> None:
    flags = build_prices(quiet_market(), CONFIG).prices.filter(pl.col("Code") == "30000")["is_investable"]
    assert flags.to_list() == [False] * 9 + [True] * 31


def test_price_floor_is_on_the_printed_price() -> None:
    """A stock at 40 yen is out; consolidated 10 to 1 it is in, though its adjusted price has not moved."""
    tables = edit(quiet_market(), 0, until=39, **scaled(0.04))
    tables = edit(edit(tables, 20, until=39, **scaled(10.0)), 20, AdjustmentFactor=pl.lit(10.0))
    flags = build_prices(tables, CONFIG).prices.filter(pl.col("Code") == "30000")["is_investable"]
    assert flags.to_list() == [False] * 20 + [True] * 20


def test_liquid_needs_the_median_turnover_of_two_thirds_of_20_sessions() -> None:
    tables = edit(quiet_market(), 0, code="30010", until=39, Volume=pl.col("Volume") * 0.4)
    prices = build_prices(tables, CONFIG).prices
    flags = prices.pivot(on="Code", index="Date", values="is_liquid").sort("Date")
    assert flags["30000"].to_list() == [False] * 13 + [True] * 27
    assert not flags["30010"].any()


def test_funds_preferred_shares_and_unlisted_codes_are_dropped_once_per_code() -> None:
    tables = quiet_market(stocks=6)
    new = {"30010": "13060", "30020": "30005", "30030": "99990", "30040": "40000"}
    tables["prices"] = tables["prices"].with_columns(pl.col("Code").replace(new)).sort("Date", "Code")
    listed = tables["listed"].with_columns(pl.col("Code").replace(new)).filter(pl.col("Code") != "99990")
    fund, delisted = pl.col("Code") == "13060", pl.col("Code") == "40000"
    tables["listed"] = listed.with_columns(
        MarketCode=pl.when(fund).then(pl.lit("0109")).otherwise("MarketCode"),
        Sector33Code=pl.when(fund | delisted).then(pl.lit("9999")).otherwise("Sector33Code"),
    )
    result = build_prices(tables, CONFIG)
    assert set(result.prices["Code"]) == {"30000", "30050", "40000"}
    assert result.prices.filter(pl.col("Code") == "40000")["Sector33Code"].is_null().all()
    assert rules(result) == [
        ("not_common_stock", DAYS[0], "13060"),
        ("not_common_stock", DAYS[0], "30005"),
        ("not_listed", DAYS[0], "99990"),
    ]


def test_market_without_codes_of_class_or_sector_keeps_its_stocks() -> None:
    tables = quiet_market()
    names = {"30000": "GOOGL", "30010": "BRK.B", "30020": "F"}
    for table in ("prices", "listed"):
        tables[table] = tables[table].with_columns(pl.col("Code").replace(names))
    tables["listed"] = tables["listed"].with_columns(Sector33Code=pl.lit(None, pl.String), MarketCode=pl.lit("Q"))
    assert set(build_prices(tables, DatasetConfig(market="us")).prices["Code"]) == {"GOOGL", "BRK.B", "F"}


def test_listed_is_joined_backward_and_backfilled_with_a_flag() -> None:
    tables = quiet_market()
    later = tables["listed"].with_columns(pl.lit(DAYS[10]).alias("Date"), Sector33Code=pl.lit("5250"))
    tables["listed"] = pl.concat([tables["listed"].filter(pl.col("Code") != "30010"), later])
    result = build_prices(tables, CONFIG)
    known = result.prices.filter(pl.col("Code") == "30000")
    assert known["Sector33Code"].to_list() == ["3650"] * 10 + ["5250"] * 30
    assert not known["is_listed_backfilled"].any()
    filled = result.prices.filter(pl.col("Code") == "30010")
    assert filled["is_listed_backfilled"].to_list() == [True] * 10 + [False] * 30
    assert set(filled["Sector33Code"]) == {"5250"}
    assert result.summary["listed_backfilled_rows"] == 10
    assert "come from a later snapshot" in result.summary["warnings"][0]


def test_holiday_rows_are_dropped_and_a_silent_session_is_kept() -> None:
    """Rows of a Saturday on which nothing traded go; a session of the exchange without any trade stays."""
    saturday = dt.date(2023, 1, 28)
    tables = quiet_market()
    none = {name: pl.lit(None, pl.Float64) for name in ("Open", "High", "Low", "Close", "Volume")}
    extra = tables["prices"].filter(pl.col("Date") == DAYS[0]).with_columns(Date=pl.lit(saturday), **none)
    silent = tables["prices"].with_columns(
        pl.when(pl.col("Date") != DAYS[20]).then(pl.col(name)).alias(name) for name in none
    )
    result = build_prices(tables | {"prices": pl.concat([silent, extra]).sort("Date", "Code")}, CONFIG)
    assert rules(result) == [("no_trade_date", saturday, "")]
    assert result.summary["sessions"] == 40
    assert not result.prices.filter(pl.col("Date") == DAYS[20])["is_traded"].any()


def test_nothing_left_is_refused() -> None:
    tables = quiet_market()
    tables["listed"] = tables["listed"].with_columns(Code=pl.lit("11110"))
    with pytest.raises(InputError, match="no traded row of a common stock"):
        build_prices(tables, CONFIG)


# --- quarantine: every rule fires on its fault, and none on the quiet market ---

FAULTS: dict[str, Tables] = {
    "price_not_positive": edit(quiet_market(), 20, Open=pl.lit(0.0)),
    "negative_volume": edit(quiet_market(), 20, Volume=pl.lit(-100.0)),
    "high_below_low": edit(quiet_market(), 20, High=pl.lit(900.0), Low=pl.lit(1100.0)),
    "price_outside_range": edit(quiet_market(), 20, Close=pl.col("High") * 1.02),
    "range_too_wide": edit(quiet_market(), 20, High=pl.lit(9900.0), Close=pl.lit(9900.0)),
    "bad_factor": edit(quiet_market(), 20, AdjustmentFactor=pl.lit(-1.0)),
    "factor_without_jump": edit(quiet_market(), 20, AdjustmentFactor=pl.lit(0.25)),
    "split_without_factor": edit(quiet_market(), 20, until=39, **scaled(0.5), Volume=pl.col("Volume") * 2),
    "level_break": edit(quiet_market(), 20, until=39, **scaled(10.0)),
    "jump_without_factor": edit(quiet_market(), 20, until=39, **scaled(0.5), Volume=pl.col("Volume") * 20),
}


@pytest.mark.parametrize("rule", FAULTS)
def test_fault_is_named_on_its_day(rule: str) -> None:
    result = build_prices(FAULTS[rule], CONFIG)
    assert rules(result) == [(rule, DAYS[20], "30000")]
    assert result.quarantine["decision"].to_list() == [QUARANTINE_RULES[rule].decision]
    assert result.summary["quarantine"] == {rule: 1}
    assert check_prices(result.prices).passed


def test_masked_row_has_no_price_and_leaves_its_neighbours() -> None:
    closes = adjusted_close(build_prices(FAULTS["high_below_low"], CONFIG))
    expected = adjusted_close(build_prices(quiet_market(), CONFIG))
    expected[20] = np.nan
    np.testing.assert_allclose(closes, expected)


@pytest.mark.parametrize("rule", ["bad_factor", "factor_without_jump", "split_without_factor", "level_break"])
def test_corrected_factor_leaves_no_step_in_the_adjusted_level(rule: str) -> None:
    closes = adjusted_close(build_prices(FAULTS[rule], CONFIG))
    np.testing.assert_allclose(closes, adjusted_close(build_prices(quiet_market(), CONFIG)), rtol=1e-9)


def test_heavily_traded_halving_stays_a_loss() -> None:
    closes = adjusted_close(build_prices(FAULTS["jump_without_factor"], CONFIG))
    assert closes[20] / closes[19] == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("ratio", [5.0, 10.0, 100.0, 7.3, 0.1])
def test_jump_that_comes_back_masks_targets_of_the_bad_row(ratio: float) -> None:
    result = build_prices(edit(quiet_market(), 20, **scaled(ratio)), CONFIG)
    masked = result.quarantine.filter(pl.col("decision") == "mask_target")
    assert masked.select("rule", "Date", "Code").rows() == [("jump_reverts", DAYS[20], "30000")]
    others = np.delete(adjusted_close(result), 20)
    np.testing.assert_allclose(others, np.delete(adjusted_close(build_prices(quiet_market(), CONFIG)), 20), rtol=1e-9)


def test_factor_one_session_late_is_moved_to_the_jump() -> None:
    late = edit(quiet_market(), 20, until=39, **scaled(0.5), Volume=pl.col("Volume") * 2)
    result = build_prices(edit(late, 21, AdjustmentFactor=pl.lit(0.5)), CONFIG)
    assert [rule for rule, *_ in rules(result)] == ["split_without_factor", "factor_without_jump"]
    closes = adjusted_close(build_prices(quiet_market(), CONFIG))
    np.testing.assert_allclose(adjusted_close(result), closes, rtol=1e-9)


# --- look-ahead -------------------------------------------------------------------------------------------------------


def faulty_market() -> Mapping[str, pl.DataFrame]:
    """A generated market with a fault of every kind spread over it."""
    tables = dict(generate_market(stocks=30, sessions=100, seed=2).tables)
    prices = tables["prices"]
    rng = np.random.default_rng(0)
    bad = pl.Series(rng.random(prices.height))
    prices = prices.with_columns(
        Open=pl.when(bad < 0.01).then(0.0).otherwise("Open"),
        Close=pl.when(bad.is_between(0.01, 0.02)).then(pl.col("Close") * 10).otherwise("Close"),
        High=pl.when(bad.is_between(0.02, 0.03)).then(pl.col("Low") * 0.9).otherwise("High"),
        AdjustmentFactor=pl.when(bad.is_between(0.03, 0.04)).then(0.2).otherwise("AdjustmentFactor"),
    )
    spike = bad.is_between(0.04, 0.07)
    columns = ("Open", "High", "Low", "Close")
    return tables | {
        "prices": prices.with_columns(pl.when(spike).then(pl.col(columns) * 10).otherwise(pl.col(columns)))
    }


@pytest.mark.parametrize("cut", [35, 60, 85])
@pytest.mark.parametrize("future", ["removed", "changed"])
def test_nothing_after_a_session_changes_its_row_or_its_hits(cut: int, future: str) -> None:
    tables = faulty_market()
    day = tables["index"]["Date"][cut]
    past = {name: table.filter(pl.col("Date") <= day) for name, table in tables.items() if name in ("prices", "index")}
    if future == "changed":
        later = tables["prices"].filter(pl.col("Date") > day)
        noise = pl.Series(np.exp(np.random.default_rng(cut).normal(0, 1, later.height)))
        later = later.with_columns(pl.col("Open", "High", "Low", "Close") * noise, AdjustmentFactor=1 / noise)
        past = {"prices": pl.concat([past["prices"], later]), "index": tables["index"]}
    listed = tables["listed"].filter(pl.col("Date") <= day) if future == "removed" else tables["listed"]
    whole, cropped = build_prices(tables, CONFIG), build_prices(past | {"listed": listed}, CONFIG)
    # A row in the middle of a long halt exists only once the halt has ended; it is never a member.
    halted = whole.prices.filter(pl.col("Date") <= day).join(cropped.prices, on=["Date", "Code"], how="anti")
    assert not halted["is_investable"].any()
    shared = whole.prices.filter(pl.col("Date") <= day).join(halted, on=["Date", "Code"], how="anti")
    assert_frame_equal(cropped.prices.filter(pl.col("Date") <= day), shared)
    settled = (pl.col("Date") <= day) & (pl.col("decision") != "mask_target")
    assert_frame_equal(cropped.quarantine.filter(settled), whole.quarantine.filter(settled))
    assert {"price_not_positive", "factor_without_jump"} <= set(whole.quarantine["rule"])
    assert "jump_reverts" in set(whole.quarantine["rule"])
