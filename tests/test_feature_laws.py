"""The eight laws of FEATURES.md, each over the whole registry."""

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
from market_factory import CONFIG, Tables, beside_prices, raw_tables, sample, sample_market, sessions_of

from atft_pipeline import dataset
from atft_pipeline.config import DatasetConfig
from atft_pipeline.dataset_rows import build_dataset
from atft_pipeline.errors import InputError
from atft_pipeline.features import registry
from atft_pipeline.features.panel import FeaturePanel, build_features, build_market, normalised
from atft_pipeline.features.registry import (
    FEATURE_NAMES,
    REGISTRY,
    WARM_UP_TOLERANCE,
    Feature,
    markdown_table,
    registry_fingerprint,
    validated,
)
from atft_pipeline.price_panel import PricePanel
from atft_pipeline.universe import build_prices

Built = tuple[pa.Table, pa.Table, dict[str, Any]]
SOURCE = {"path": "sample", "tables": {"prices": {"rows": 1, "sha256": "ab"}}}


def build(tables: Tables, config: DatasetConfig = CONFIG) -> Built:
    result = build_prices(tables, config)
    return build_dataset(result.panel, result.quarantine, beside_prices(tables), config, SOURCE)


@cache
def built() -> Built:
    return build(raw_tables())


@cache
def panel() -> FeaturePanel:
    result, tables = sample()
    return build_features(result.panel, tables, CONFIG)


def every_feature(where: Callable[[Feature], bool] = lambda feature: True) -> Any:  # noqa: ARG005
    rows = [feature for feature in REGISTRY if where(feature)]
    return pytest.mark.parametrize("feature", rows, ids=lambda feature: feature.name)


# --- 1: exactly 82, one order, one fingerprint ---


def test_law_1_dataset_carries_the_82_in_registry_order_with_their_fingerprint() -> None:
    features, membership, manifest = built()
    assert len(FEATURE_NAMES) == len(set(FEATURE_NAMES)) == 82
    assert features.column_names == [*dataset.KEYS, *FEATURE_NAMES, *dataset.TARGETS]
    assert manifest["features"] == list(FEATURE_NAMES)
    assert manifest["registry_fingerprint"] == registry_fingerprint()
    assert all(features[name].type == pa.float32() for name in (*FEATURE_NAMES, *dataset.TARGETS))
    assert membership.column_names == list(dataset.MEMBERSHIP_COLUMNS)
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
    market = sample_market()
    feature = REGISTRY[FEATURE_NAMES.index("returns_1d")]
    late = dataclasses.replace(feature, lag_sessions=2).compute(market)
    np.testing.assert_array_equal(late[2:], feature.compute(market)[:-2])
    assert np.isnan(late[:2]).all()


# --- 2: nothing published after the close of t changes anything up to t ---


def published_later_changed(tables: Tables, t: dt.date, close: str) -> Tables:
    """Everything that became public after the close of t, changed as hard as the tables allow."""
    rng = np.random.default_rng(11)
    later = pl.col("Date") > t

    def shaken(frame: pl.DataFrame, columns: list[str]) -> pl.DataFrame:
        noise = pl.Series(np.exp(0.2 * rng.standard_normal(frame.height)))
        return frame.with_columns(pl.when(later).then(pl.col(name) * noise).otherwise(pl.col(name)) for name in columns)

    prices = shaken(tables["prices"], ["Open", "High", "Low", "Close"])
    prices = prices.with_columns(
        pl.when(later).then(pl.col("Volume") * 7).otherwise(pl.col("Volume")),
        pl.when(later & (pl.col("Code").str.slice(2, 1) == "3")).then(0.5).otherwise("AdjustmentFactor")
        .alias("AdjustmentFactor"),
    )  # fmt: skip
    # A third of the later rows never happen, and whole stocks stop trading.
    prices = prices.filter(~(later & (pl.Series(rng.random(prices.height)) < 0.33)))
    prices = prices.filter(~(later & (pl.col("Code").str.slice(1, 1) == "4")))
    listed = tables["listed"].with_columns(
        pl.when(later).then(pl.lit("0050")).otherwise("Sector33Code").alias("Sector33Code"),
        pl.when(later).then(pl.lit("0113")).otherwise("MarketCode").alias("MarketCode"),
    )
    # Published on t itself, a week of flows counts from the next session on.
    flows = tables["investor_flows"].with_columns(
        pl.when(pl.col("PublishedDate") >= t).then(-3.0 * pl.col(name)).otherwise(name).alias(name)
        for name in ("ForeignersBalance", "IndividualsBalance", "TotalTotal")
    )
    unknown = (pl.col("DisclosedDate") > str(t)) | (
        (pl.col("DisclosedDate") == str(t)) & (pl.col("DisclosedTime") >= close)
    )
    statements = tables["statements"].with_columns(
        pl.when(unknown).then(pl.lit("123456789")).otherwise(name).alias(name)
        for name in ("NetSales", "Profit", "OperatingProfit", "Equity", "ForecastProfit", "ForecastOperatingProfit")
    )
    return {
        "prices": prices,
        "listed": listed,
        "index": shaken(tables["index"], ["Close"]),
        "investor_flows": flows,
        "statements": statements,
    }


def disclosure_and_publication_days(tables: Tables) -> list[dt.date]:
    """A day with statements before and after the close, the day flows appear, and two ordinary ones."""
    sessions = sessions_of(tables["prices"])
    statements = tables["statements"].with_columns(pl.col("DisclosedDate").str.to_date())
    busy = statements.group_by("DisclosedDate").len().filter(pl.col("DisclosedDate").is_in(sessions[280:]))
    published = [day for day in tables["investor_flows"]["PublishedDate"].to_list() if day in sessions[350:]]
    return [busy.sort("len", "DisclosedDate")["DisclosedDate"][-1], published[0], sessions[300], sessions[-2]]


@pytest.mark.parametrize("which", range(4))
def test_law_2_nothing_published_after_the_close_moves_an_earlier_session(which: int) -> None:
    tables = raw_tables()
    t = disclosure_and_publication_days(tables)[which]
    close = "15:00:00" if t < dt.date(2024, 11, 5) else "15:30:00"
    changed = published_later_changed(tables, t, close)
    before, after = build_prices(tables, CONFIG), build_prices(changed, CONFIG)
    for name in ("prices", "quarantine"):
        was, now = (getattr(result, name).filter(pl.col("Date") <= t) for result in (before, after))
        if name == "quarantine":  # what a later session proves is decided for targets alone
            was, now = (frame.filter(pl.col("decision") != "mask_target") for frame in (was, now))
        assert was.sort("Date", "Code").equals(now.sort("Date", "Code")), f"{name} of an earlier session changed"
    was, now = built(), build(changed)
    compared = 0
    for table, columns in ((0, FEATURE_NAMES), (1, dataset.MEMBERSHIP_COLUMNS)):
        rows = [pl.DataFrame(result[table]).filter(pl.col("Date") <= t) for result in (was, now)]
        assert rows[0].select(dataset.KEYS).equals(rows[1].select(dataset.KEYS))
        for name in columns:
            assert rows[0][name].equals(rows[1][name]), f"{name} of a session up to {t} saw what came later"
            compared += 1
    assert compared == 82 + len(dataset.MEMBERSHIP_COLUMNS)
    later = [pl.DataFrame(result[0]).filter(pl.col("Date") > t) for result in (was, now)]
    assert not later[0].equals(later[1]), "the perturbation must have done something"


# --- 3: no neighbour inside a prices-only feature ---


@every_feature(lambda feature: feature.tables == ("prices",))
def test_law_3_another_stock_moves_no_prices_only_feature(feature: Feature) -> None:
    market = sample_market()
    others = np.arange(len(market.codes)) != 7
    rng = np.random.default_rng(5)
    quotes = {name: np.where(others, values * rng.uniform(0.3, 3.0), values) for name, values in market.quotes.items()}
    moved = dataclasses.replace(market, quotes=quotes, memo={})
    np.testing.assert_array_equal(feature.compute(market)[:, 7], feature.compute(moved)[:, 7])


# --- 4: the window is all it needs ---


@cache
def long_sample() -> tuple[pl.DataFrame, Tables]:
    result, tables = sample(24, 1120, 5)
    return result.prices, tables


@every_feature()
def test_law_4_the_last_window_of_sessions_gives_the_same_value(feature: Feature) -> None:
    prices, tables = long_sample()
    market = sample_long_market()
    sessions = sessions_of(prices)
    first = sessions[len(sessions) - feature.window_sessions]
    recent = {
        "index": tables["index"].filter(pl.col("Date") >= first),
        "investor_flows": tables["investor_flows"].filter(pl.col("PublishedDate") >= first),
        "statements": tables["statements"].filter(pl.col("DisclosedDate") >= str(first)),
    }
    window = build_market(PricePanel.from_frame(prices.filter(pl.col("Date") >= first)), recent, CONFIG)
    assert len(window.sessions) == feature.window_sessions
    whole, last = feature.compute(market), feature.compute(window)[-1]
    if whole.ndim == 2:
        whole = whole[:, [list(market.codes).index(code) for code in window.codes]]
    assert np.isfinite(whole[-1]).any(), "nothing to compare"
    # Exact, but for the start that an exponential average never quite forgets, and rounding of a chained level.
    tolerance = (
        WARM_UP_TOLERANCE * np.nanstd(whole[-250:]) if "EMA" in feature.formula or "RSI" in feature.formula else 0
    )
    np.testing.assert_allclose(last, whole[-1], rtol=1e-12, atol=tolerance)


@cache
def sample_long_market() -> Any:
    prices, tables = long_sample()
    return build_market(PricePanel.from_frame(prices), tables, CONFIG)


def test_law_4_trailing_normalisation_needs_252_sessions() -> None:
    market = sample_market()
    for feature in REGISTRY:
        if feature.norm == "ts":
            values = feature.compute(market)
            np.testing.assert_array_equal(
                normalised(feature, values[-252:], market)[-1], normalised(feature, values, market)[-1]
            )


# --- 5 and 6: each feature says something, and something else ---


@every_feature(lambda feature: feature.norm not in ("ts", "raw"))
def test_law_5_feature_differs_between_stocks(feature: Feature) -> None:
    values = panel().dense(feature.name)[-60:]
    spread = np.nanmax(values, axis=1) - np.nanmin(values, axis=1)
    assert (spread > 0.1).all()


def test_law_6_no_two_features_are_the_same() -> None:
    values = panel().values.astype(np.float64)
    alike = []
    for i, j in zip(*np.triu_indices(len(REGISTRY), 1), strict=True):
        both = np.isfinite(values[i]) & np.isfinite(values[j])
        x, y = values[i, both], values[j, both]
        if both.sum() > 100 and x.std() > 0 and y.std() > 0 and abs(np.corrcoef(x, y)[0, 1]) > 0.999:
            alike.append((FEATURE_NAMES[i], FEATURE_NAMES[j]))
    assert alike == []


# --- 7: a split is no event ---


def test_law_7_a_split_changes_no_feature() -> None:
    tables = raw_tables()
    sessions = sessions_of(tables["prices"])
    code = next(c for c in built()[0]["Code"].to_pylist()[200:])
    for day, n in ((sessions[330], 3.0), (sessions[120], 7.0), (sessions[400], 0.1)):
        split = tables["prices"].with_columns(
            pl.when((pl.col("Code") == code) & (pl.col("Date") < day)).then(n).otherwise(1.0).alias("n"),
            pl.when((pl.col("Code") == code) & (pl.col("Date") == day)).then(1 / n).otherwise(1.0).alias("event"),
        )
        split = split.with_columns(
            *(pl.col(name) * pl.col("n") for name in ("Open", "High", "Low", "Close")),
            pl.col("Volume") / pl.col("n"),
            pl.col("AdjustmentFactor") * pl.col("event"),
        ).drop("n", "event")
        was, now = built()[0], build({**tables, "prices": split})[0]
        assert was.select(dataset.KEYS).equals(now.select(dataset.KEYS))
        for name in (*FEATURE_NAMES, *dataset.TARGETS):
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
def test_law_8_missing_tables_leave_nulls_and_a_count(missing: tuple[str, ...], live: int, reason: str | None) -> None:
    features, _, manifest = build({name: table for name, table in raw_tables().items() if name not in missing})
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
