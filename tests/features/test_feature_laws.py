"""The eight laws of docs/features.md, each over the whole registry."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from markets.eventful_market import PERIODS, eventful_tables, events
from markets.market_factory import (
    CONFIG,
    LONG,
    QUIET,
    SOURCE,
    Built,
    Tables,
    build,
    built_of,
    dataset_of,
    features_of,
    panels,
    panels_of,
    prices_of,
    raw_tables,
    sample,
    sessions_of,
    tables_of,
)
from polars.testing import assert_frame_equal

from atft_pipeline.config.schema import DatasetConfig
from atft_pipeline.dataset import layout
from atft_pipeline.dataset.rows import build_dataset
from atft_pipeline.errors import InputError
from atft_pipeline.features import registry
from atft_pipeline.features.compute import build_features, normalised
from atft_pipeline.features.registry import (
    FEATURE_NAMES,
    REGISTRY,
    Feature,
    markdown_table,
    registry_fingerprint,
    validated,
)
from atft_pipeline.features.vocabulary.windows import lag
from atft_pipeline.market.calendar import close_time
from atft_pipeline.market.price_panel import PricePanel
from atft_pipeline.market.universe import PricesResult, build_prices

WARM_UP_TOLERANCE = 0.01
"""Share of its standard deviation by which an exponential average may still depend on its start after its window."""


def built() -> Built:
    return built_of(QUIET)


def every_feature(where: Callable[[Feature], bool] = lambda feature: True) -> Any:  # noqa: ARG005
    rows = [feature for feature in REGISTRY if where(feature)]
    return pytest.mark.parametrize("feature", rows, ids=lambda feature: feature.name)


every_long_market = pytest.mark.parametrize("market", LONG)


# --- 1: exactly 82, one order, one fingerprint ---


@pytest.mark.parametrize("market", [QUIET, *PERIODS])
def test_law_1_dataset_carries_the_82_in_registry_order_with_their_fingerprint(market: str) -> None:
    features, membership, manifest = built_of(market)
    assert len(FEATURE_NAMES) == len(set(FEATURE_NAMES)) == 82
    assert features.column_names == [*layout.ROW_KEYS, *FEATURE_NAMES, *layout.TARGETS]
    assert manifest["features"] == list(FEATURE_NAMES)
    assert manifest["registry_fingerprint"] == registry_fingerprint()
    assert all(features[name].type == pa.float32() for name in (*FEATURE_NAMES, *layout.TARGETS))
    assert membership.column_names == list(layout.MEMBERSHIP_COLUMNS)
    assert manifest["rows"] == features.num_rows == membership.num_rows


def test_law_1_fingerprint_follows_any_change_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    before = registry_fingerprint()
    for change in (
        {"name": "x"},
        {"norm": "raw"},
        {"window_sessions": 9},
        {"formula": "x"},
        {"reads": ("index.Close",)},
        {"lag_sessions": 1},
    ):
        rows = (dataclasses.replace(REGISTRY[0], **change), *REGISTRY[1:])
        monkeypatch.setattr("atft_pipeline.features.registry.REGISTRY", rows)
        assert registry_fingerprint() != before


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (REGISTRY[:-1], "expected 82 features, found 81"),
        ((*REGISTRY[:-1], REGISTRY[0]), "returns_1d is there twice"),
        ((dataclasses.replace(REGISTRY[0], norm="rank"), *REGISTRY[1:]), "expected a norm"),
        (
            (dataclasses.replace(REGISTRY[0], reads=("fundamentals.Sales",)), *REGISTRY[1:]),
            "expected columns of the tables",
        ),
        ((dataclasses.replace(REGISTRY[0], reads=()), *REGISTRY[1:]), "expected columns of the tables"),
        ((dataclasses.replace(REGISTRY[0], window_sessions=0), *REGISTRY[1:]), "window of 0 sessions"),
    ],
)
def test_law_1_registry_refuses_a_wrong_row(rows: tuple[Feature, ...], message: str) -> None:
    assert validated(REGISTRY) is REGISTRY
    with pytest.raises(InputError, match=message):
        validated(rows)


@every_feature()
def test_feature_declares_exactly_what_its_expression_reads(feature: Feature) -> None:
    assert feature.trace.columns == set(feature.reads)
    assert feature.trace.window_sessions <= feature.window_sessions
    assert feature.lag_sessions >= feature.publication_lag


def changed(name: str, **fields: Any) -> tuple[Feature, ...]:
    return tuple(dataclasses.replace(row, **fields) if row.name == name else row for row in REGISTRY)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("beta_60d", {"reads": ("prices.Close",)}, "beta_60d: reads column index.Close and does not declare it"),
        ("close_location", {"reads": ("prices.High", "prices.Close")}, "close_location: reads column prices.Low"),
        ("returns_1d", {"reads": ("prices.Close", "prices.Open")}, "declares column prices.Open and never reads it"),
        ("stmt_roe", {"expression": lambda m: m.in_force(m.stmt("NetSales"))}, "reads column statements.NetSales"),
        ("volatility_60d", {"window_sessions": 65}, "volatility_60d: window of 65 sessions.*looks back over 66"),
        ("sec_vol_20_z", {"window_sessions": 252}, "sec_vol_20_z: window of 252 sessions.*looks back over 277"),
        ("rsi_14", {"window_sessions": 14}, "rsi_14: window of 14 sessions"),
        ("flow_smart_idx", {"lag_sessions": 0}, "flow_smart_idx: lag of 0 sessions, but investor_flows counts from"),
        ("returns_5d", {"lag_sessions": -1}, "returns_5d: lag of -1 sessions, but prices counts from"),
        ("returns_5d", {"expression": lambda m: lag(m.ret(5), -1)}, "returns_5d: lag looks 1 sessions ahead"),
        ("returns_5d", {"expression": lambda m: np.roll(m.ret(5), 3)}, "returns_5d: .*in the words of vocabulary/"),
    ],
)
def test_registry_row_is_held_to_its_own_expression(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        validated(changed(name, **fields))


def test_a_faulty_row_fails_when_the_registry_is_imported() -> None:
    source = Path(registry.__file__).read_text(encoding="utf-8")
    faulty = source.replace(
        '"volatility_60d", "volatility", "cs", 59 + _STEP', '"volatility_60d", "volatility", "cs", 9'
    )
    assert faulty != source
    with pytest.raises(InputError, match="volatility_60d: window of 9 sessions"):
        exec(compile(faulty, registry.__file__, "exec"), {"__name__": registry.__name__})


def test_a_longer_lag_delays_the_feature() -> None:
    market = panels_of(QUIET)
    feature = REGISTRY[FEATURE_NAMES.index("returns_1d")]
    late = dataclasses.replace(feature, lag_sessions=2).compute(market)
    np.testing.assert_array_equal(late[2:], feature.compute(market)[:-2])
    assert np.isnan(late[:2]).all()


# --- 2: nothing published after the close of t changes anything up to t ---


LATER_SESSIONS = 25
"""Of the changed future so many sessions are kept: enough for every halt and jump of the plan to end."""


@cache
def law_2_market(market: str) -> tuple[Tables, PricesResult, Built]:
    """The market's tables and what becomes of them; of the long one the last 660 sessions, for time: most windows are
    full when its events begin."""
    tables = tables_of(market)
    if market == "segments":
        first = sessions_of(tables["index"])[400]
        tables |= {name: tables[name].filter(pl.col("Date") >= first) for name in ("prices", "index")}
    result = build_prices(tables, CONFIG)
    return tables, result, dataset_of(result, tables)


def known_at_close(t: dt.date) -> dict[str, pl.Expr]:
    """Of each table, the rows that were public at the close of `t`."""
    close = close_time("tokyo", t).isoformat()
    earlier = pl.col("DisclosedDate") < str(t)
    in_time = (pl.col("DisclosedDate") == str(t)) & (pl.col("DisclosedTime") != "") & (pl.col("DisclosedTime") < close)
    return {
        **dict.fromkeys(("prices", "listed", "index"), pl.col("Date") <= t),
        # Published on t itself, a week of flows counts from the next session on.
        "investor_flows": pl.col("PublishedDate") < t,
        "statements": earlier | in_time,
    }


def nothing_later(tables: Tables, t: dt.date) -> Tables:
    """The tables as they were at the close of `t`."""
    return {name: tables[name].filter(known) for name, known in known_at_close(t).items()}


def all_later_changed(tables: Tables, t: dt.date) -> Tables:
    """Everything that became public after the close of t, changed as hard as the tables allow, for some sessions."""
    rng = np.random.default_rng(11)
    known = known_at_close(t)
    until = [day for day in sessions_of(tables["index"]) if day > t][:LATER_SESSIONS]
    end = until[-1] if until else t
    cut = {name: table if name in ("investor_flows", "statements") else table.filter(pl.col("Date") <= end)
           for name, table in tables.items()}  # fmt: skip

    def changed(name: str, values: dict[str, pl.Expr]) -> pl.DataFrame:
        keep = known[name]
        return cut[name].with_columns(pl.when(keep).then(pl.col(c)).otherwise(v).alias(c) for c, v in values.items())

    def shaken(name: str, columns: tuple[str, ...]) -> dict[str, pl.Expr]:
        noise = pl.lit(pl.Series(np.exp(0.2 * rng.standard_normal(cut[name].height))))
        return {column: pl.col(column) * noise for column in columns}

    third = pl.col("Code").str.slice(2, 1) == "3"
    prices = changed("prices", shaken("prices", ("Open", "High", "Low", "Close")) | {
        "Volume": pl.col("Volume") * 7,
        "AdjustmentFactor": pl.when(third).then(0.5).otherwise("AdjustmentFactor"),
    })  # fmt: skip
    # A third of the later rows never happen, and whole stocks stop trading.
    never = pl.lit(pl.Series(rng.random(prices.height) < 0.33)) | (pl.col("Code").str.slice(1, 1) == "4")
    flows = {name: -3.0 * pl.col(name) for name in ("ForeignersBalance", "IndividualsBalance", "TotalTotal")}
    figures = ("NetSales", "Profit", "OperatingProfit", "Equity", "ForecastProfit", "ForecastOperatingProfit")
    return {
        "prices": prices.filter(known["prices"] | ~never),
        "listed": changed("listed", {"Sector33Code": pl.lit("0050"), "MarketCode": pl.lit("0113")}),
        "index": changed("index", shaken("index", ("Close",))),
        "investor_flows": changed("investor_flows", flows),
        "statements": changed("statements", dict.fromkeys(figures, pl.lit("123456789"))),
    }


FUTURES: dict[str, Callable[[Tables, dt.date], Tables]] = {"removed": nothing_later, "changed": all_later_changed}


def disclosure_and_publication_days(tables: Tables) -> list[dt.date]:
    """A day with statements before and after the close, the day flows appear, and two ordinary ones."""
    sessions = sessions_of(tables["prices"])
    statements = tables["statements"].with_columns(pl.col("DisclosedDate").str.to_date())
    busy = statements.group_by("DisclosedDate").len().filter(pl.col("DisclosedDate").is_in(sessions[280:]))
    published = [day for day in tables["investor_flows"]["PublishedDate"].to_list() if day in sessions[350:]]
    return [busy.sort("len", "DisclosedDate")["DisclosedDate"][-1], published[0], sessions[300], sessions[-2]]


def cuts() -> list[tuple[str, dt.date]]:
    """Every event's session, the one before and the one after it, and four days of the quiet market."""
    found = [(QUIET, day) for day in disclosure_and_publication_days(raw_tables())]
    for period in PERIODS:
        days = sessions_of(eventful_tables(period)["index"])
        at = {int(np.searchsorted(days, event.session)) + k for event in events(period) for k in (-1, 0, 1)}
        in_a_long_halt = {650, 689} if period == "segments" else set()
        first = 460 if period == "segments" else 1
        found += [(period, days[t]) for t in sorted(at | in_a_long_halt) if first <= t < len(days) - 1]
    return found


def assert_same_prices(was: PricesResult, now: PricesResult, t: dt.date) -> None:
    """Rows, flags and decisions up to `t`. A row within a long halt exists only once the halt has ended: no member."""
    before, after = (result.prices.filter(pl.col("Date") <= t) for result in (was, now))
    halted = [x.join(y, on=["Date", "Code"], how="anti") for x, y in ((before, after), (after, before))]
    for rows in halted:
        assert not rows.select(pl.any_horizontal("is_traded", "is_investable", "is_liquid").any()).item()
    both = [x.join(y, on=["Date", "Code"], how="semi").sort("Date", "Code") for x, y in
            ((before, after), (after, before))]  # fmt: skip
    assert_frame_equal(both[0], both[1], check_exact=True)
    # What a later session proves is decided for targets alone.
    settled = (pl.col("Date") <= t) & (pl.col("decision") != "mask_target")
    decided = [result.quarantine.filter(settled).sort("Date", "Code", "rule") for result in (was, now)]
    assert_frame_equal(decided[0], decided[1])


@pytest.mark.parametrize("future", FUTURES)
@pytest.mark.parametrize(("market", "t"), cuts(), ids=str)
@pytest.mark.slow(reason="a market computed again for every day and every split")
def test_law_2_nothing_published_after_the_close_moves_an_earlier_session(market: str, t: dt.date, future: str) -> None:
    tables, prices, was = law_2_market(market)
    changed = FUTURES[future](tables, t)
    changed_prices = build_prices(changed, CONFIG)
    assert_same_prices(prices, changed_prices, t)
    now = dataset_of(changed_prices, changed)
    compared = 0
    for table, columns in ((0, FEATURE_NAMES), (1, layout.MEMBERSHIP_COLUMNS)):
        rows = [pl.DataFrame(result[table]).filter(pl.col("Date") <= t) for result in (was, now)]
        assert rows[0].select(layout.ROW_KEYS).equals(rows[1].select(layout.ROW_KEYS))
        for name in columns:
            assert rows[0][name].equals(rows[1][name]), f"{name} of a session up to {t} saw what came later"
            compared += 1
    assert compared == 82 + len(layout.MEMBERSHIP_COLUMNS)
    later = [pl.DataFrame(result[0]).filter(pl.col("Date") > t) for result in (was, now)]
    assert not later[0].equals(later[1]), "the perturbation must have done something"


# --- 3: no neighbour inside a prices-only feature ---


PRICES_ONLY = [feature for feature in REGISTRY if feature.tables == ("prices",)]


@every_long_market
@every_feature(lambda feature: feature in PRICES_ONLY)
def test_law_3_another_stock_moves_no_prices_only_feature(feature: Feature, market: str) -> None:
    dense = panels_of(market)
    others = np.arange(len(dense.codes)) != 7
    rng = np.random.default_rng(5)
    quotes = {name: np.where(others, values * rng.uniform(0.3, 3.0), values) for name, values in dense.quotes.items()}
    moved = dataclasses.replace(dense, quotes=quotes, memo={})
    np.testing.assert_array_equal(feature.compute(dense)[:, 7], feature.compute(moved)[:, 7])


def test_law_3_holds_from_the_raw_tables_on_for_each_stock_with_an_event() -> None:
    """Half of the stocks are quoted ever wilder, some rows are missing: the other half notices nothing."""
    tables = tables_of("segments")
    dense = panels_of("segments")
    wild = pl.col("Code").is_in(dense.codes[::2])
    noise = pl.Series(np.exp(0.5 * np.random.default_rng(2).standard_normal(tables["prices"].height)))
    prices = tables["prices"].with_columns(
        *(pl.when(wild).then(pl.col(name) * noise).otherwise(name).alias(name) for name in ("Open", "Close", "Volume"))
    )
    prices = prices.filter(~(wild & (pl.lit(noise) > 2.0)))
    moved = panels(build_prices({**tables, "prices": prices}, CONFIG).prices, tables)
    assert moved.sessions.tolist() == dense.sessions.tolist()
    for feature in PRICES_ONLY:
        here, there = feature.compute(dense), feature.compute(moved)
        for code in dense.codes[1::2]:
            n, k = dense.codes.index(code), moved.codes.index(code)
            np.testing.assert_array_equal(here[:, n], there[:, k], err_msg=f"{feature.name} of {code}")


# --- 4: the window is all it needs ---


@cache
def long_market(market: str) -> tuple[pl.DataFrame, Tables]:
    """Adjusted prices and the tables beside them, longer than the longest window."""
    if market != QUIET:
        return prices_of(market).prices, tables_of(market)
    result, tables = sample(24, 1120, 5)
    return result.prices, tables


@cache
def long_panels(market: str) -> Any:
    return panels(*long_market(market))


@cache
def last_window(market: str, end: dt.date, sessions: int) -> Any:
    """The panels of the `sessions` up to `end`, from tables that begin and end with them."""
    prices, tables = long_market(market)
    days = [day for day in long_panels(market).sessions.tolist() if day <= end]
    first = days[-sessions]
    recent = {
        "index": tables["index"].filter(pl.col("Date").is_between(first, end)),
        "investor_flows": tables["investor_flows"].filter(pl.col("PublishedDate").is_between(first, end)),
        "statements": tables["statements"].filter(
            pl.col("DisclosedDate").is_between(pl.lit(str(first)), pl.lit(str(end)))
        ),
    }
    return panels(prices.filter(pl.col("Date").is_between(first, end)), recent)


def window_ends() -> list[tuple[str, int]]:
    """The last session of each market, sessions within and shortly after the eventful weeks, and the last but few of
    the old segments."""
    return [(QUIET, -1), ("segments", 706), ("segments", 713), ("segments", 730), ("segments", 930), ("segments", -1)]


def is_exponential(feature: Feature) -> bool:
    return any(name in feature.formula for name in ("EMA", "RSI", "ma_gap"))


def sessions_needed(feature: Feature, market: str, t: int) -> int:
    """The feature's window; an exponential average steps over nulls, so its window counts a stock's own sessions."""
    needed, close = feature.window_sessions, long_panels(market).close[: t + 1]
    if is_exponential(feature):
        absent = np.isnan(close) & (np.cumsum(~np.isnan(close), axis=0) > 0) & ~np.isnan(close[-1])
        for _ in range(5):
            needed = feature.window_sessions + int(absent[-needed:].sum(axis=0).max())
    return needed


@pytest.mark.parametrize(("market", "end"), window_ends())
@every_feature()
def test_law_4_the_last_window_of_sessions_gives_the_same_value(feature: Feature, market: str, end: int) -> None:
    dense = long_panels(market)
    t = range(len(dense.sessions))[end]
    needed = sessions_needed(feature, market, t)
    if t < needed:
        pytest.skip(f"the market is younger than the window of {needed} sessions")
    window = last_window(market, dense.sessions[t].item(), needed)
    whole, last = feature.compute(dense), feature.compute(window)[-1]
    # Exact, but for the start that an exponential average never quite forgets, and rounding of a chained level.
    tolerance = WARM_UP_TOLERANCE * np.nanstd(whole[max(0, t - 249) : t + 1]) if is_exponential(feature) else 0
    stocks = [dense.codes.index(code) for code in window.codes]
    expected = whole[t, stocks] if whole.ndim == 2 else whole[t : t + 1]
    last = np.atleast_1d(last)
    # A section of 2022-04-04 has no 35 weeks yet half a year later.
    assert np.isfinite(expected).any() or (feature.family == "investor flow" and end == -1), "nothing to compare"
    wrong = ~np.isclose(last, expected, rtol=1e-12, atol=tolerance, equal_nan=True)
    if feature.name.startswith("rsi"):
        # What a price that stands still does to it has its own test, below.
        wrong &= np.ptp(dense.close[t - 14 : t + 1, stocks], axis=0) != 0
    cells = [(window.codes[n], last[n], expected[n]) for n in np.flatnonzero(wrong)]
    assert cells == [], "stock, value of the window, value of the whole"


@every_feature(lambda feature: feature.name.startswith("rsi"))
def test_law_4_an_rsi_forgets_what_was_before_its_window_also_while_the_price_stands_still(feature: Feature) -> None:
    """Gains and losses decay at one pace, so on a price that stands still their ratio stays whatever it was before."""
    flat = np.concatenate([np.cumsum([100.0, 2, 3, -1, 2, 4, -2, 1, 3, 2] * 3), np.full(200, 120.0)])[:, None]
    panel = dataclasses.replace(panels_of(QUIET), quotes={"Close": flat}, memo={})
    window = dataclasses.replace(panel, quotes={"Close": flat[-feature.window_sessions :]}, memo={})
    assert feature.compute(window)[-1, 0] == 50.0
    assert feature.compute(panel)[-1, 0] == pytest.approx(50.0, abs=1.0)


def test_law_4_trailing_normalisation_needs_252_sessions() -> None:
    for market in LONG:
        dense = panels_of(market)
        for feature in REGISTRY:
            if feature.norm == "ts":
                values = feature.compute(dense)
                np.testing.assert_array_equal(
                    normalised(feature, values[-252:], dense)[-1], normalised(feature, values, dense)[-1]
                )


# --- 5 and 6: each feature says something, and something else ---


@every_feature(lambda feature: feature.norm not in ("ts", "raw"))
def test_law_5_feature_differs_between_stocks(feature: Feature) -> None:
    values = features_of(QUIET).dense(feature.name)[-60:]
    spread = np.nanmax(values, axis=1) - np.nanmin(values, axis=1)
    assert (spread > 0.1).all()


@every_feature(lambda feature: feature.norm not in ("ts", "raw"))
def test_law_5_feature_is_null_or_differs_between_stocks_in_every_session_with_events(feature: Feature) -> None:
    """A session may leave a feature without a value (nothing traded, a sector without members), never with one value
    for all."""
    values = features_of("segments").dense(feature.name)
    sessions = [v[np.isfinite(v)] for v in values]
    assert all(np.ptp(v) > 0.1 for v in sessions if len(v))
    assert sum(len(v) > 0 for v in sessions[-400:]) > 300


@every_long_market
def test_law_6_no_two_features_are_the_same(market: str) -> None:
    values = features_of(market).values.astype(np.float64)
    alike = []
    for i, j in zip(*np.triu_indices(len(REGISTRY), 1), strict=True):
        both = np.isfinite(values[i]) & np.isfinite(values[j])
        x, y = values[i, both], values[j, both]
        if both.sum() > 100 and x.std() > 0 and y.std() > 0 and abs(np.corrcoef(x, y)[0, 1]) > 0.999:
            alike.append((FEATURE_NAMES[i], FEATURE_NAMES[j]))
    assert alike == []


# --- 7: a split is no event ---


def with_split(tables: Tables, code: str, day: dt.date, n: float) -> Tables:
    """Each share of `code` becomes n on `day`, as a source prints it: earlier rows on the old base."""
    own = pl.col("Code") == code
    before, at = own & (pl.col("Date") < day), own & (pl.col("Date") == day)
    assert tables["prices"].filter(at).height == 1, "an ex-date without a row has nowhere to put its factor"
    prices = tables["prices"].with_columns(
        *(pl.when(before).then(pl.col(p) * n).otherwise(p).alias(p) for p in ("Open", "High", "Low", "Close")),
        pl.when(before).then(pl.col("Volume") / n).otherwise("Volume").alias("Volume"),
        pl.when(at).then(pl.col("AdjustmentFactor") / n).otherwise("AdjustmentFactor").alias("AdjustmentFactor"),
    )
    return {**tables, "prices": prices}


def split_cases() -> list[tuple[str, str, int, float]]:
    """market, stock, session of the ex-date, shares for one: ordinary days, and days around each kind of halt."""
    quiet = built()[0]["Code"].to_pylist()[200]
    cases = [(QUIET, quiet, 330, 3.0), (QUIET, quiet, 120, 7.0), (QUIET, quiet, 400, 0.1)]
    days = sessions_of(prices_of("segments").prices)
    near = {
        "halt": (-1, 4, 5),
        "halt_with_empty_rows": (-1, 0, 7, 14, 15),
        "no_trade": (0, 1, 3),
        "stop_and_return": (-1, 90),
        "split_without_trade": (-1, 1),
        "split_at_the_end_of_a_halt": (-4, -1, 0),
        "no_price_change": (0, 12),
        "zero_price": (0, 1),
        "delisting": (-1,),
        "listing": (0, 1),
        "level_error": (-1, 2),
    }
    ratios = (2.0, 1.1, 10.0, 0.5)
    for event in events("segments"):
        for k, after in enumerate(near.get(event.name, ())):
            cases.append(("segments", event.code, days.index(event.session) + after, ratios[k % len(ratios)]))
    return cases


@pytest.mark.parametrize(("market", "code", "t", "n"), split_cases())
@pytest.mark.slow(reason="a market computed again for every day and every split")
def test_law_7_a_split_changes_no_feature(market: str, code: str, t: int, n: float) -> None:
    tables, day = tables_of(market), sessions_of(prices_of(market).prices)[t]
    was, now = built_of(market)[0], build(with_split(tables, code, day, n))[0]
    assert was.select(layout.ROW_KEYS).equals(now.select(layout.ROW_KEYS))
    for name in (*FEATURE_NAMES, *layout.TARGETS):
        np.testing.assert_allclose(now[name].to_numpy(), was[name].to_numpy(), atol=1e-6, rtol=1e-6, err_msg=name)


# --- 8: a missing optional table is said, never filled ---


@pytest.mark.parametrize(
    ("missing", "live", "reason"),
    [
        ((), 82, None),
        (("investor_flows",), 69, "69 of 82 live: table investor_flows is missing"),
        (("statements",), 68, "68 of 82 live: table statements is missing"),
        (("investor_flows", "statements"), 55, "55 of 82 live: tables investor_flows, statements are missing"),
    ],
)
@every_long_market
def test_law_8_missing_tables_leave_nulls_and_a_count(
    missing: tuple[str, ...], live: int, reason: str | None, market: str
) -> None:
    features, _, manifest = build({name: table for name, table in tables_of(market).items() if name not in missing})
    assert len(manifest["live_features"]) == live
    assert manifest["warnings"] == ([reason] if reason else [])
    for feature in REGISTRY:
        column = features[feature.name]
        if not set(feature.tables) & set(missing):
            assert column.null_count < len(column)
        elif feature.family == "masks":
            assert set(column.to_pylist()) == {0.0}
        else:
            assert column.null_count == len(column)
            assert manifest["feature_stats"][feature.name]["mean"] is None


# --- the dataset itself ---


def test_fingerprint_follows_content_and_configuration_and_nothing_else() -> None:
    manifest = built()[2]
    assert build(raw_tables())[2]["fingerprint"] == manifest["fingerprint"]
    other = build(raw_tables(), DatasetConfig(execution="next_close"))[2]
    assert other["fingerprint"] != manifest["fingerprint"]
    assert other["feature_stats"] == manifest["feature_stats"]
    tables = raw_tables()
    moved = tables["prices"].with_columns(pl.when(pl.col("Date") == pl.col("Date").max()).then(
        pl.col("Volume") + 100).otherwise("Volume").alias("Volume"))  # fmt: skip
    assert build({**tables, "prices": moved})[2]["fingerprint"] != manifest["fingerprint"]


def test_same_close_is_marked_as_not_tradeable() -> None:
    warnings = build(raw_tables(), DatasetConfig(execution="same_close"))[2]["warnings"]
    assert any("not tradeable" in warning for warning in warnings)
    assert not any("not tradeable" in warning for warning in built()[2]["warnings"])


def test_rows_are_those_of_stocks_that_traded_within_5_sessions() -> None:
    _, membership, _ = built()
    frame = pl.DataFrame(membership).sort("Code", "Date")
    assert pl.DataFrame(membership).select("Date", "Code").equals(pl.DataFrame(membership).select("Date", "Code").sort(
        "Date", "Code"))  # fmt: skip
    untraded = frame.filter(~pl.col("is_traded"))
    assert untraded.height > 0
    assert untraded["return_1d"].null_count() == untraded["Close"].null_count() == untraded.height


def test_masked_row_of_quarantine_nulls_its_targets_only() -> None:
    result, tables = sample()
    day, code = sessions_of(result.prices)[100], result.prices["Code"][0]
    hit = pl.DataFrame(
        {"rule": ["jump_reverts"], "decision": ["mask_target"], "Date": [day], "Code": [code], "detail": [""]}
    )
    plain = build_dataset(result.panel, result.quarantine.clear(), tables, CONFIG, SOURCE)[0]
    masked = build_dataset(result.panel, hit, tables, CONFIG, SOURCE)[0]
    assert plain.select(FEATURE_NAMES).equals(masked.select(FEATURE_NAMES))
    added = masked["target_1d"].null_count - plain["target_1d"].null_count
    assert added == 2, "the position entered at that open and the one left there"


def test_missing_index_and_ambiguous_index_are_refused() -> None:
    result, tables = sample()
    with pytest.raises(InputError, match="index: the table is missing"):
        build_features(result.panel, {}, CONFIG)
    two = pl.concat([tables["index"].with_columns(Code=pl.lit(code)) for code in ("0001", "0002")])
    with pytest.raises(InputError, match="index: 2 codes"):
        build_features(result.panel, {"index": two}, CONFIG)
    with pytest.raises(InputError, match="prices: no row"):
        build_features(PricePanel.from_frame(result.prices.clear()), tables, CONFIG)


def test_readme_table_has_a_row_per_feature() -> None:
    lines = markdown_table().splitlines()
    assert len(lines) == 84
    assert all(line.startswith("| ") and line.count(" | ") == 6 for line in lines)
