"""Each table's contract holds on a sound table and names the fault on a broken one."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from atft_pipeline.config.schema import DatasetConfig
from atft_pipeline.errors import InputError
from atft_pipeline.market.contracts import check_ml_dataset, check_prices, check_table, read_checked
from atft_pipeline.market.sources import RAW_TABLES, open_source
from atft_pipeline.market.synthetic import write_market
from atft_pipeline.market.universe import build_prices

Change = Callable[[pl.DataFrame], pl.DataFrame]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pl.DataFrame]:
    folder = tmp_path_factory.mktemp("market")
    write_market(folder, stocks=5, sessions=25, seed=0)
    source = open_source(folder)
    return {name: source.read(name) for name in source.tables}


@pytest.mark.parametrize("name", RAW_TABLES)
def test_sound_table_passes(name: str, tables: dict[str, pl.DataFrame]) -> None:
    report = check_table(name, tables[name], min_sessions=25).require()
    assert report.passed
    assert report.rows == tables[name].height
    assert isinstance(report.first_date, dt.date)
    assert isinstance(report.last_date, dt.date)


BREAKS: list[tuple[str, Change, str]] = [
    ("prices", lambda t: pl.concat([t, t.tail(1)]), r"1 duplicate keys \(Date, Code\), e.g. Date=2022-05-12, Code="),
    ("prices", lambda t: t.reverse(), "dates out of order in column Date: .* sort the table by Date"),
    ("prices", lambda t: t.with_columns(Close=pl.lit(None, pl.Float64)), "column Close holds no value at all"),
    ("prices", lambda t: t.filter(pl.col("Code") == "20000"), "one stock only"),
    ("prices", lambda t: t.drop("Volume"), "required column Volume is missing"),
    ("prices", lambda t: t.with_columns(pl.col("Volume").cast(pl.String)), "column Volume has the wrong type"),
    ("prices", lambda t: t.with_columns(Code=pl.lit(None, pl.String)), "column Code holds nulls"),
    ("prices", lambda t: t.head(0), "no rows"),
    ("prices", lambda t: t.filter(pl.col("Date") < dt.date(2022, 4, 8)), "4 sessions .* expected at least 20"),
    ("index", lambda t: t.with_columns(Close=pl.lit(None, pl.Float64)), "column Close holds no value"),
    ("index", lambda t: t.with_columns(Close=-pl.col("Close")), "column Close holds -.* such rows"),
    ("index", lambda t: t.with_columns(Close=pl.lit(float("inf"))), "column Close holds inf .* such rows"),
    ("index", lambda t: t.head(3), "3 sessions .* expected at least 20"),
    ("listed", lambda t: pl.concat([t, t]).sort("Date"), "duplicate keys"),
    ("investor_flows", lambda t: t.reverse(), "dates out of order in column PublishedDate"),
    ("statements", lambda t: pl.concat([t, t]).sort("DisclosedDate"), "duplicate keys"),
]


@pytest.mark.parametrize(("name", "change", "reason"), BREAKS)
def test_broken_table_is_refused(name: str, change: Change, reason: str, tables: dict[str, pl.DataFrame]) -> None:
    report = check_table(name, change(tables[name]), min_sessions=20, where="/data/table.parquet")
    assert not report.passed
    with pytest.raises(InputError, match=f"^{name} in /data/table.parquet: .*{reason}") as error:
        report.require()
    assert "\n" not in str(error.value)


def shuffled_within_dates(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.sample(fraction=1, shuffle=True, seed=1).sort("Date", maintain_order=True)


def test_duplicates_are_found_whatever_the_order_within_a_date(tables: dict[str, pl.DataFrame]) -> None:
    prices = shuffled_within_dates(tables["prices"])
    assert check_table("prices", prices).passed
    doubled = shuffled_within_dates(pl.concat([prices, prices[3:5], prices[3:4]]))
    assert check_table("prices", doubled).failures[0].startswith("prices: 3 duplicate keys (Date, Code), e.g. Date=")


def test_null_keys_are_equal_keys_and_numbered_documents_are_not(tables: dict[str, pl.DataFrame]) -> None:
    rows = tables["statements"][:1].with_columns(DisclosedTime=pl.lit(None, pl.String))
    twice = pl.concat([rows, rows])
    assert "1 duplicate keys" in check_table("statements", twice).failures[0]
    assert check_table("statements", twice.with_columns(DisclosureNumber=pl.Series([1.0, 2.0]))).passed


def test_manifest_record_counts_the_null_texts(tmp_path: Path) -> None:
    write_market(tmp_path, stocks=5, sessions=25, seed=0)
    file = tmp_path / "prices.parquet"
    untraded = pl.when(pl.int_range(pl.len()) < 3).then(pl.lit("-")).otherwise(pl.col("Open").cast(pl.String))
    pl.read_parquet(file).with_columns(Open=untraded).write_parquet(file)
    record = read_checked(open_source(tmp_path)).record["tables"]
    assert record["prices"]["null_texts"] == {"Open": 3}
    assert record["index"]["null_texts"] == {}
    assert record["statements"]["null_texts"]["ForecastProfit"] > 0


def test_negative_volume_is_left_to_the_quarantine(tables: dict[str, pl.DataFrame]) -> None:
    assert check_table("prices", tables["prices"].with_columns(Volume=-pl.col("Volume"))).passed


def test_unknown_table_is_refused(tables: dict[str, pl.DataFrame]) -> None:
    with pytest.raises(InputError, match="no raw table"):
        check_table("quotes", tables["prices"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.with_columns(Close=-pl.col("Close")), "column Close holds -.*expected greater_than"),
        (lambda t: t.reverse(), "repeat or precede"),
        (lambda t: t.drop("is_liquid"), "is_liquid is missing"),
        (lambda t: t.with_columns(extra=pl.lit(1.0)), "column extra: .*build the table again"),
        (lambda t: t.select("Code", "Date", pl.exclude("Code", "Date")), "build the table again"),
        (lambda t: t.with_columns(is_traded=~pl.col("is_traded")), "is_traded disagrees"),
        (lambda t: t.with_columns(is_liquid=pl.lit(True), is_investable=pl.lit(False)), "liquid without being"),
    ],
)
def test_adjusted_prices_contract(change: Change, reason: str, tables: dict[str, pl.DataFrame]) -> None:
    prices = build_prices(tables, DatasetConfig(min_history_sessions=5)).prices
    assert check_prices(prices).passed
    with pytest.raises(InputError, match=reason):
        check_prices(change(prices)).require()


def ml_dataset() -> pl.DataFrame:
    values = pl.Series([0.5, None, -1.0, 2.0], dtype=pl.Float32)
    days = [dt.date(2024, 1, 4)] * 2 + [dt.date(2024, 1, 5)] * 2
    return pl.DataFrame({"Date": days, "Code": ["1", "2"] * 2, "a": values, "b": values, "target_1d": values})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.drop("b"), r"expected 5 columns in registry order, found 4; missing \['b'\]"),
        (lambda t: t.select("Date", "Code", "b", "a", "target_1d"), "registry order"),
        (lambda t: t.with_columns(pl.col("a").cast(pl.Float64)), "column a has the wrong type"),
        (lambda t: t.with_columns(a=pl.lit(np.inf, pl.Float32)), "column a fails"),
        (lambda t: t.with_columns(a=pl.lit(np.nan, pl.Float32)), "column a fails"),
        (lambda t: pl.concat([t, t]), "repeat or precede"),
    ],
)
def test_ml_dataset_contract(change: Change, reason: str) -> None:
    assert check_ml_dataset(ml_dataset(), ["a", "b"], ["target_1d"]).passed
    with pytest.raises(InputError, match=reason):
        check_ml_dataset(change(ml_dataset()), ["a", "b"], ["target_1d"]).require()
