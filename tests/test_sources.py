"""A source folder is read with its types made right, or refused in one sentence that names table, column and file."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from atft_pipeline.errors import InputError
from atft_pipeline.sources import RAW_TABLES, open_source, raw_schema
from atft_pipeline.synthetic import write_market


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_market(tmp_path / "market", stocks=5, sessions=25, seed=0)
    return tmp_path / "market"


def rewrite(folder: Path, table: str, *columns: pl.Expr | pl.Series) -> pl.DataFrame:
    """Reads the table of `folder` after its columns were replaced on disk."""
    file = folder / f"{table}.parquet"
    pl.read_parquet(file).with_columns(*columns).write_parquet(file)
    return open_source(folder).read(table)


def test_every_table_is_read_with_its_types(folder: Path) -> None:
    source = open_source(folder)
    assert source.tables == tuple(RAW_TABLES)
    for table in source.tables:
        frame = source.read(table)
        assert raw_schema(table).items() <= frame.schema.items()
    assert source.read("statements")["NetSales"].null_count() == 0
    assert source.read("statements")["ForecastProfit"].null_count() > 0, "'' is a missing number"
    assert "TrustBanksBalance" in source.read("investor_flows").columns


def test_unknown_columns_are_ignored_and_optional_ones_are_null_when_absent(folder: Path) -> None:
    prices = rewrite(folder, "prices", pl.lit(1.0).alias("AdjustmentClose"))
    assert "AdjustmentClose" not in prices.columns
    file = folder / "index.parquet"
    pl.read_parquet(file).drop("Open").write_parquet(file)
    assert open_source(folder).read("index")["Open"].is_null().all()


def test_optional_tables_may_be_absent(folder: Path) -> None:
    (folder / "statements.parquet").unlink()
    source = open_source(folder)
    assert "statements" not in source.tables
    with pytest.raises(InputError, match=r"statements: not in .*provide statements.parquet"):
        source.read("statements")


def test_folder_of_parts_is_the_same_table(folder: Path) -> None:
    whole = open_source(folder).read("prices")
    (folder / "prices").mkdir()
    for part, rows in enumerate((whole[:40], whole[40:])):
        rows.write_parquet(folder / "prices" / f"{part}.parquet")
    with pytest.raises(InputError, match=r"both .* exist; keep one"):
        open_source(folder)
    (folder / "prices.parquet").unlink()
    assert_frame_equal(open_source(folder).read("prices"), whole)


@pytest.mark.parametrize(
    "values",
    [
        pl.col("Volume").cast(pl.Int64),
        pl.col("Volume").cast(pl.Float32),
        pl.col("Volume").cast(pl.Int64).cast(pl.String),
        pl.col("Volume").map_elements(lambda v: Decimal(int(v)), return_dtype=pl.Decimal(20, 0)),
    ],
    ids=["integer", "float32", "text", "decimal"],
)
def test_numbers_are_read_from_any_numeric_form(folder: Path, values: pl.Expr) -> None:
    before = open_source(folder).read("prices")["Volume"]
    after = rewrite(folder, "prices", values.alias("Volume"))["Volume"]
    assert after.dtype == pl.Float64
    assert (after / before - 1).abs().max() < 1e-6  # type: ignore[operator]


def test_placeholders_are_missing_numbers(folder: Path) -> None:
    texts = pl.Series("Profit", ["-", "*", "", " 12.5 ", "-3"])
    rows = pl.read_parquet(folder / "statements.parquet").head(5).with_columns(texts)
    rows.write_parquet(folder / "statements.parquet")
    assert open_source(folder).read("statements")["Profit"].to_list() == [None, None, None, 12.5, -3.0]


@pytest.mark.parametrize("form", ["%Y-%m-%d", "%Y%m%d", "%Y-%m-%d 00:00:00"])
def test_dates_are_read_from_text_and_datetimes(folder: Path, form: str) -> None:
    days = open_source(folder).read("index")["Date"]
    assert rewrite(folder, "index", pl.col("Date").dt.strftime(form))["Date"].equals(days)
    assert rewrite(folder, "index", pl.Series("Date", days).cast(pl.Datetime("us")))["Date"].equals(days)


def test_fingerprint_follows_the_content(folder: Path) -> None:
    before = {table: open_source(folder).fingerprint(table) for table in RAW_TABLES}
    assert {table: open_source(folder).fingerprint(table) for table in RAW_TABLES} == before
    rewrite(folder, "index", pl.col("Close") + 1)
    assert open_source(folder).fingerprint("index") != before["index"]
    assert open_source(folder).fingerprint("prices") == before["prices"]


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusal(folder: Path, table: str = "prices") -> str:
    with pytest.raises(InputError) as error:
        open_source(folder).read(table)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_folder_and_table(folder: Path) -> None:
    with pytest.raises(InputError, match="not a folder"):
        open_source(folder / "nowhere")
    (folder / "listed.parquet").unlink()
    with pytest.raises(InputError, match=r"listed: table not found; expected .*listed\.parquet"):
        open_source(folder)
    (folder / "listed").mkdir()
    with pytest.raises(InputError, match="no parquet file"):
        open_source(folder)


def test_missing_column(folder: Path) -> None:
    file = folder / "prices.parquet"
    pl.read_parquet(file).drop("Close").write_parquet(file)
    assert f"prices: required column Close is missing in {file}" in refusal(folder)


@pytest.mark.parametrize("damage", ["truncated", "not parquet", "zero bytes"])
def test_unreadable_file(folder: Path, damage: str) -> None:
    file = folder / "prices.parquet"
    content = {"truncated": file.read_bytes()[:500], "not parquet": b"Date,Code\n", "zero bytes": b""}[damage]
    file.write_bytes(content)
    assert f"prices: {file} cannot be read as parquet" in refusal(folder)


def test_damaged_pages_under_a_sound_footer(folder: Path) -> None:
    file = folder / "prices.parquet"
    content = bytearray(file.read_bytes())
    content[100:2000] = bytes(1900)
    file.write_bytes(bytes(content))
    assert f"prices: {file} cannot be read as parquet" in refusal(folder)


def test_empty_table(folder: Path) -> None:
    file = folder / "prices.parquet"
    pl.read_parquet(file).head(0).write_parquet(file)
    assert f"prices: no rows in {file}" in refusal(folder)


@pytest.mark.parametrize(
    ("column", "values", "found"),
    [
        ("Close", pl.lit("abc"), "holds 'abc', expected numbers"),
        ("Close", pl.lit(True), "has type Boolean, expected numbers"),
        ("Code", pl.lit(72030), "has type Int32, expected text"),
        ("Date", pl.lit(20240104), "has type Int32, expected a date"),
        ("Date", pl.lit("4 January"), "holds '4 January', expected a date"),
        ("Volume", pl.lit(dt.date(2024, 1, 4)), "has type Date, expected numbers"),
    ],
)
def test_wrong_type(folder: Path, column: str, values: pl.Expr, found: str) -> None:
    file = folder / "prices.parquet"
    pl.read_parquet(file).with_columns(values.alias(column)).write_parquet(file)
    message = refusal(folder)
    assert f"prices: column {column} in {file} " in message
    assert found in message


def test_name_that_is_no_table(folder: Path) -> None:
    assert "expected one of prices, listed" in refusal(folder, "quotes")
