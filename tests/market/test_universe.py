"""Adjusted prices, membership and quarantine: decided at each session from what was public at its close."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping

import numpy as np
import polars as pl
import pytest
from markets.eventful_market import SEGMENT_CHANGE, SILENT_SESSION, Event, eventful_tables, events
from markets.market_factory import build, built_of, panels, prices_of, sessions_of
from polars.testing import assert_frame_equal

from atft_pipeline.config.schema import DatasetConfig
from atft_pipeline.errors import InputError
from atft_pipeline.features.registry import REGISTRY
from atft_pipeline.market import calendar
from atft_pipeline.market.contracts import check_prices
from atft_pipeline.market.price_panel import PRICES_COLUMNS
from atft_pipeline.market.quarantine import QUARANTINE_RULES
from atft_pipeline.market.synthetic import generate_market
from atft_pipeline.market.universe import PricesResult, build_prices

CONFIG = DatasetConfig(min_history_sessions=10)
DAYS: list[dt.date] = calendar.sessions("tokyo", "2023-01-04", "2023-04-28").tolist()
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
    with pytest.raises(InputError, match="calendar of us: 2023-01-16 is no session"):  # it is one in Tokyo
        build_prices(tables, DatasetConfig(market="us"))
    open_days = calendar.sessions("us", DAYS[0], DAYS[-1]).tolist()
    tables["prices"] = tables["prices"].filter(pl.col("Date").is_in(open_days))
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
    "negative_turnover": edit(quiet_market(), 20, TurnoverValue=pl.lit(-1.0)),
    "high_below_low": edit(quiet_market(), 20, High=pl.lit(900.0), Low=pl.lit(1100.0)),
    "price_outside_range": edit(quiet_market(), 20, Close=pl.col("High") * 1.02),
    "range_too_wide": edit(quiet_market(), 20, High=pl.lit(9900.0), Close=pl.lit(9900.0)),
    "bad_factor": edit(quiet_market(), 20, AdjustmentFactor=pl.lit(-1.0)),
    "factor_without_jump": edit(quiet_market(), 20, AdjustmentFactor=pl.lit(0.25)),
    "split_without_factor": edit(quiet_market(), 20, until=39, **scaled(0.5), Volume=pl.col("Volume") * 2),
    "level_break": edit(quiet_market(), 20, until=39, **scaled(10.0)),
    "jump_without_factor": edit(quiet_market(), 20, until=39, **scaled(0.5), Volume=pl.col("Volume") * 20),
}


@pytest.mark.parametrize(
    ("rule", "column", "value"),
    [
        ("negative_volume", "Volume", np.inf),
        ("negative_turnover", "TurnoverValue", np.inf),
        ("bad_factor", "AdjustmentFactor", 1e-200),
        ("bad_factor", "AdjustmentFactor", 1e200),
    ],
)
def test_figure_beyond_any_market_is_a_fault_too(rule: str, column: str, value: float) -> None:
    result = build_prices(edit(quiet_market(), 20, **{column: pl.lit(value)}), CONFIG)
    assert rules(result) == [(rule, DAYS[20], "30000")]
    assert check_prices(result.prices).passed


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_a_cumulative_factor_on_every_row_is_never_followed(factor: float) -> None:
    """It would be a consolidation a day: without a jump of the price it is ignored, and no product overflows."""
    tables = quiet_market(sessions=len(DAYS))
    expected = adjusted_close(build_prices(tables, CONFIG))
    result = build_prices(edit(tables, 0, until=len(DAYS) - 1, AdjustmentFactor=pl.lit(factor)), CONFIG)
    np.testing.assert_allclose(adjusted_close(result) / adjusted_close(result)[0], expected / expected[0], rtol=1e-9)
    assert set(result.summary["quarantine"]) == {"factor_without_jump", "bad_factor"}
    assert check_prices(result.prices).passed


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


# --- what each rule promises ------------------------------------------------------------------------------------------

DECISIONS = ("drop", "mask", "ignore_factor", "rebase", "flag", "mask_target")


def test_every_rule_has_a_decision_and_a_reason_and_fires_on_the_eventful_market_or_here() -> None:
    fired = set(prices_of("segments").quarantine["rule"])
    assert fired | {"not_listed"} == set(QUARANTINE_RULES)
    for rule in QUARANTINE_RULES.values():
        assert rule.decision in DECISIONS
        assert rule.explanation


def test_summary_counts_the_rows_of_each_rule_and_every_row_says_where_and_what() -> None:
    result = prices_of("segments")
    counts = {rule: result.quarantine.filter(rule=rule).height for rule in set(result.quarantine["rule"])}
    assert result.summary["quarantine"] == counts
    assert {"rule", "decision", "Date", "Code", "detail"} <= set(result.quarantine.columns)
    assert result.quarantine.null_count().sum_horizontal().item() == 0
    decisions = {rule: known.decision for rule, known in QUARANTINE_RULES.items()}
    assert dict(result.quarantine.select("rule", "decision").iter_rows()).items() <= decisions.items()


def test_drop_and_mask_leave_no_price_and_the_other_decisions_keep_the_row() -> None:
    result = prices_of("segments")
    for row in result.quarantine.iter_rows(named=True):
        there = result.prices.filter(pl.col("Date") == row["Date"], pl.col("Code") == row["Code"])
        if row["decision"] == "drop":
            assert there.is_empty()
        else:
            assert there["is_traded"].to_list() == [row["decision"] != "mask"], row
            assert there["Close"].null_count() == (row["decision"] == "mask")


@pytest.mark.parametrize("rule", [rule for rule in FAULTS if rule != "jump_without_factor"])
def test_rule_is_decided_on_its_day_from_data_up_to_it(rule: str) -> None:
    """The hit, the mask and the corrected level of the day are the same when the data end with it."""
    whole = build_prices(FAULTS[rule], CONFIG)
    until = {name: FAULTS[rule][name].filter(pl.col("Date") <= DAYS[20]) for name in ("prices", "index", "listed")}
    ended = build_prices(until, CONFIG)
    assert_frame_equal(ended.quarantine, whole.quarantine)
    assert_frame_equal(ended.prices, whole.prices.filter(pl.col("Date") <= DAYS[20]))


def test_factor_missing_in_the_past_is_no_hit_of_the_past_because_factors_appear_later() -> None:
    """A source that states factors only from some day on: whether its early rows are wrong was decided without them."""
    late = edit(quiet_market(), 0, until=29, AdjustmentFactor=pl.lit(None, pl.Float64))
    for i in (1, 2):
        late = edit(late, 0, code=f"300{i}0", until=29, AdjustmentFactor=pl.lit(None, pl.Float64))
    until = {name: late[name].filter(pl.col("Date") <= DAYS[25]) for name in ("prices", "index", "listed")}
    then, now = build_prices(until, CONFIG).quarantine, build_prices(late, CONFIG).quarantine
    assert_frame_equal(then, now.filter(pl.col("Date") <= DAYS[25]))


def test_order_of_rows_in_the_tables_does_not_matter() -> None:
    shuffled = {
        name: table.sample(fraction=1.0, shuffle=True, seed=1) for name, table in eventful_tables("segments").items()
    }
    was, now = prices_of("segments"), build_prices(shuffled, DatasetConfig())
    assert_frame_equal(was.prices, now.prices)
    assert_frame_equal(was.quarantine, now.quarantine)
    old, new = built_of("segments")[0], build(shuffled)[0]
    assert old.equals(new)


# --- sessions of the exchange -----------------------------------------------------------------------------------------


def silent(rows: str) -> Tables:
    """The market across 2020-10-01 as three kinds of sources print that session."""
    tables = generate_market(stocks=20, sessions=120, seed=4, first_session=dt.date(2020, 7, 1)).tables
    on = pl.col("Date") == SILENT_SESSION
    prices, index = tables["prices"], tables["index"]
    if rows == "empty rows":
        names = ("Open", "High", "Low", "Close", "Volume", "TurnoverValue")
        prices = prices.with_columns(pl.when(~on).then(pl.col(name)).alias(name) for name in names)
        prices = prices.with_columns(AdjustmentFactor=pl.when(on).then(1.0).otherwise("AdjustmentFactor"))
    else:
        prices = prices.filter(~on)
    if rows != "index row":
        index = index.filter(~on)
    else:
        level = index.filter(pl.col("Date") < SILENT_SESSION)["Close"][-1]
        index = index.with_columns(Close=pl.when(on).then(level).otherwise("Close"))
    return {**tables, "prices": prices, "index": index}


@pytest.mark.parametrize("rows", ["empty rows", "index row", "no row"])
def test_session_in_which_nothing_traded_is_a_session_whatever_the_source_prints(rows: str) -> None:
    """A window counts exchange sessions: how a source prints 2020-10-01 cannot move the other sessions' windows."""
    prices = build_prices(silent(rows), DatasetConfig()).prices
    there = prices.filter(pl.col("Date") == SILENT_SESSION)
    assert there.height > 0
    assert not there["is_traded"].any()
    reference = build_prices(silent("empty rows"), DatasetConfig()).prices
    assert_frame_equal(prices, reference)


# --- targets of stocks that cannot be traded --------------------------------------------------------------------------


def targets_of(event: str, market: str = "segments") -> tuple[pl.DataFrame, Event]:
    found = next(e for e in events(market) if e.name == event)
    return pl.DataFrame(built_of(market)[0]).filter(pl.col("Code") == found.code).sort("Date"), found


def test_delisted_stock_has_no_target_across_its_end_and_never_a_zero() -> None:
    rows, event = targets_of("delisting")
    last = rows.filter(pl.col("Date") < event.session).tail(21)
    for horizon, column in ((1, "target_1d"), (5, "target_5d"), (20, "target_20d")):
        # Entered at the next open and left `horizon` opens later: the last horizon + 1 sessions cannot.
        assert last[column].is_null().to_list() == [k >= 21 - horizon - 1 for k in range(21)], column
    after = rows.filter(pl.col("Date") >= event.session)
    assert after.select(pl.col("^target_.*$").is_not_null().any()).row(0) == (False,) * 4
    assert rows.filter(target_1d=0.0).height < 10


def test_halted_stock_has_no_target_that_enters_or_leaves_within_the_halt() -> None:
    rows, event = targets_of("halt")
    days = sessions_of(prices_of("segments").prices)
    at = days.index(event.session)
    by_day = dict(rows.select("Date", "target_1d").iter_rows())
    null = {k: by_day.get(days[at + k]) is None for k in range(-3, 6)}
    # The halt is 0..3: entry at k + 1, exit at k + 2.
    assert null == {k: not {k + 1, k + 2}.isdisjoint(range(4)) for k in range(-3, 6)}


def test_stock_that_returns_has_no_return_over_its_absence() -> None:
    """After 90 sessions no close is carried: the first session back has no R_1, and 60 traded sessions are history."""
    rows, event = targets_of("stop_and_return")
    days = sessions_of(prices_of("segments").prices)
    back = days[days.index(event.session) + 90]
    membership = pl.DataFrame(built_of("segments")[1]).filter(pl.col("Code") == event.code)
    first = membership.filter(pl.col("Date") == back)
    assert first.select("is_traded", "return_1d").row(0) == (True, None)
    absent = membership.filter(pl.col("Date").is_between(event.session, back, closed="left"))
    assert absent.height == 4, "rows end with the fifth session after the last trade, that one included"
    assert not absent["is_traded"].any()
    assert rows.filter(pl.col("Date") == back).height == 1


def test_error_of_level_nulls_the_targets_of_its_row_only() -> None:
    rows, event = targets_of("level_error")
    days = sessions_of(prices_of("segments").prices)
    at = days.index(event.session)
    null = rows.filter(pl.col("Date").is_between(days[at - 6], days[at + 4]))["target_1d"].is_null().to_list()
    # The bad open is the exit of the session two before it and the entry of the one before it.
    assert null == [k in (-2, -1) for k in range(-6, 5)]


# --- memberships ------------------------------------------------------------------------------------------------------


def test_liquid_is_part_of_all_and_all_part_of_what_has_a_row() -> None:
    for period in ("segments", "later_close", "half_days"):
        prices = prices_of(period).prices
        assert prices.filter(pl.col("is_liquid") & ~pl.col("is_investable")).is_empty()
        share = prices.select(pl.col("is_investable").mean(), pl.col("is_liquid").mean()).row(0)
        assert 0 < share[1] < share[0] < 1


def test_untraded_stock_leaves_the_universe_after_the_fifth_session_and_returns_with_a_trade() -> None:
    _, event = targets_of("stop_and_return")
    rows = prices_of("segments").prices.filter(pl.col("Code") == event.code).sort("Date")
    days = sessions_of(prices_of("segments").prices)
    at = days.index(event.session)
    flags = dict(rows.select("Date", "is_investable").iter_rows())
    # A session within a long absence may have no row at all: no row, no member.
    assert [flags.get(days[at + k], False) for k in (-1, 0, 4, 5, 50, 89, 90)] == [
        True,
        True,
        True,
        False,
        False,
        False,
        True,
    ]


def test_stock_below_the_price_floor_is_out_on_exactly_those_sessions() -> None:
    _, event = targets_of("penny_stock")
    rows = prices_of("segments").prices.filter(pl.col("Code") == event.code, pl.col("is_traded")).sort("Date")[60:]
    assert rows.filter(pl.col("is_investable") != (pl.col("Close") >= 50.0)).is_empty()
    assert rows["is_investable"].n_unique() == 2


def test_code_that_is_listed_and_never_traded_has_no_row() -> None:
    event = next(e for e in events("segments") if e.name == "listed_and_never_traded")
    assert event.code in set(eventful_tables("segments")["listed"]["Code"])
    assert event.code not in set(prices_of("segments").prices["Code"])


def test_sector_and_segment_change_on_the_day_of_their_snapshot() -> None:
    prices = prices_of("segments").prices
    for name, column in (("sector_change", "Sector33Code"), ("section_change", "MarketCode")):
        event = next(e for e in events("segments") if e.name == name)
        listed = eventful_tables("segments")["listed"].filter(pl.col("Code") == event.code)
        snapshot = listed.filter(pl.col("Date") >= event.session)["Date"].min()
        rows = prices.filter(pl.col("Code") == event.code, pl.col("Date") < SEGMENT_CHANGE)
        before, after = rows.filter(pl.col("Date") < snapshot), rows.filter(pl.col("Date") >= snapshot)
        assert before[column].n_unique() == after[column].n_unique() == 1
        assert before[column][0] != after[column][0]
    old = set(prices.filter(pl.col("Date") < SEGMENT_CHANGE)["MarketCode"])
    new = set(prices.filter(pl.col("Date") >= SEGMENT_CHANGE)["MarketCode"])
    assert old == {"0101", "0102", "0104", "0106"}
    assert new == {"0111", "0112", "0113"}


# --- sources that have less, and other markets ------------------------------------------------------------------------


def test_source_without_factors_keeps_its_prices_and_says_nothing_of_every_row() -> None:
    tables = eventful_tables("later_close")
    none = tables["prices"].with_columns(AdjustmentFactor=pl.lit(None, pl.Float64))
    result = build_prices(tables | {"prices": none}, DatasetConfig())
    split = next(e for e in events("later_close") if e.name == "split")
    hits = [hit for hit in rules(result) if hit[0] != "not_common_stock"]
    assert hits == [("split_without_factor", split.session, split.code)], "a split is found by its price"
    assert_frame_equal(result.prices, prices_of("later_close").prices, rel_tol=1e-9)


@pytest.mark.parametrize("missing", [("investor_flows",), ("statements",), ("investor_flows", "statements")])
def test_prices_and_universe_need_neither_flows_nor_statements(missing: tuple[str, ...]) -> None:
    tables = {name: table for name, table in eventful_tables("segments").items() if name not in missing}
    result = build_prices(tables, DatasetConfig())
    assert_frame_equal(result.prices, prices_of("segments").prices)
    assert_frame_equal(result.quarantine, prices_of("segments").quarantine)


US_SECTORS = ("Information Technology", "Health Care", "Consumer Staples")


def us_market(stocks: int = 45, sessions: int = 100) -> Tables:
    """New York: tickers for codes, names of GICS for sectors, dollars, no section of the market and no factor table."""
    days = calendar.sessions("us", "2024-01-02", "2024-12-31")[:sessions].tolist()
    base = generate_market(stocks=stocks, sessions=sessions, seed=6).tables
    was = base["index"]["Date"].sort().to_list()
    names = base["listed"].filter(pl.col("MarketCode") != "0109", pl.col("Code").str.ends_with("0"))["Code"].unique()
    tickers = {code: f"T{chr(65 + i // 26)}{chr(65 + i % 26)}" for i, code in enumerate(names.sort())}
    dates = dict(zip(was, days, strict=True))
    tables = {}
    for name in ("prices", "listed", "index"):
        table = base[name].with_columns(pl.col("Date").replace_strict(dates, default=None))
        if name != "index":
            table = table.filter(pl.col("Code").is_in(list(tickers))).with_columns(pl.col("Code").replace(tickers))
        tables[name] = table
    sector = {code: US_SECTORS[i % 3] for i, code in enumerate(tickers.values())}
    tables["listed"] = tables["listed"].with_columns(
        Sector33Code=pl.col("Code").replace(sector), MarketCode=pl.lit("NYSE"), Sector17Code=pl.lit("")
    )
    return tables


def test_us_market_keeps_its_tickers_sectors_and_252_days() -> None:
    config = DatasetConfig(market="us")
    features, membership, manifest = build(us_market(), config)
    assert manifest["days_per_year"] == 252
    assert manifest["quarantine"] == {}
    rows = pl.DataFrame(membership)
    assert set(rows["Sector33Code"]) == set(US_SECTORS)
    assert set(rows["MarketCode"]) == {"NYSE"}
    assert rows["Code"].str.contains(r"^T[A-Z]{2}$").all()
    frame = pl.DataFrame(features)
    assert frame["is_sector_valid"].max() == 1.0
    assert frame["is_flow_valid"].max() == 0.0
    assert frame["sec_mom_20"].is_not_null().any()


def test_days_per_year_scale_the_volatilities_before_normalisation() -> None:
    config = DatasetConfig(market="us")
    result = build_prices(us_market(), config)
    dense = panels(result.prices, us_market(), config)
    row = next(feature for feature in REGISTRY if feature.name == "volatility_20d")
    returns = dense.ret(1)[-20:, 0]
    assert row.compute(dense)[-1, 0] == pytest.approx(np.std(returns, ddof=1) * math.sqrt(252), rel=1e-12)


def test_sector_needs_five_members() -> None:
    """Of 45 stocks five are of one sector and four of another: the first has sector features, the second has none."""
    tables = us_market()
    codes = tables["listed"]["Code"].unique().sort().to_list()
    traded = [code for code in codes if tables["prices"].filter(pl.col("Code") == code).height == 100]
    sectors = dict.fromkeys(traded[:5], "five") | dict.fromkeys(traded[5:9], "four")
    tables["listed"] = tables["listed"].with_columns(
        Sector33Code=pl.col("Code").replace_strict(sectors, default=pl.col("Sector33Code"))
    )
    rows = pl.DataFrame(build(tables, DatasetConfig(market="us"))[0]).filter(pl.col("Date") == pl.col("Date").max())
    valid = dict(rows.select("Code", "is_sector_valid").iter_rows())
    assert [valid[code] for code in traded[:9]] == [1.0] * 5 + [0.0] * 4
    without = rows.filter(pl.col("Code").is_in(traded[5:9]))
    assert without["sec_mom_20"].null_count() == without["alpha_vs_sec_1d"].null_count() == 4
