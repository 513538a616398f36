"""A source folder is read with its types converted, or refused in a sentence that names table, column and file."""

from __future__ import annotations

import datetime as dt
import hashlib
from decimal import Decimal
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from atft_pipeline.errors import InputError
from atft_pipeline.market.sources import RAW_TABLES, open_source, raw_schema
from atft_pipeline.market.synthetic import write_market


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


def test_null_texts_are_null_counted_and_never_zero(folder: Path) -> None:
    rows = pl.read_parquet(folder / "statements.parquet").head(7)
    profit = pl.Series("Profit", ["-", "*", "", "　－ ", " 12.5 ", "-3", None])
    ends = pl.Series("CurrentPeriodEndDate", ["-", "", None, "2024-03-31", "20240331", "2024-03-31", "2024-03-31"])
    quiet = [name for name in rows.columns if name not in ("Profit", "CurrentPeriodEndDate")]
    zeros = [pl.lit("0").alias(name) for name in quiet if "Profit" in name or "Sales" in name]
    rows.with_columns(profit, ends, *zeros).write_parquet(folder / "statements.parquet")
    read = open_source(folder).read_counted("statements")
    assert read.frame["Profit"].to_list() == [None, None, None, None, 12.5, -3.0, None]
    assert read.frame["CurrentPeriodEndDate"].null_count() == 3
    assert read.null_texts == {"CurrentPeriodEndDate": 2, "Profit": 4}, "a null of the file's own is no text"
    assert open_source(folder).read("statements").equals(read.frame)


def test_null_texts_add_up_over_parts_and_stay_within_the_period_read(folder: Path) -> None:
    rows = pl.read_parquet(folder / "index.parquet").with_columns(Close=pl.lit("-"))
    (folder / "index.parquet").unlink()
    (folder / "index").mkdir()
    rows[:10].write_parquet(folder / "index" / "a.parquet")
    rows[10:].write_parquet(folder / "index" / "b.parquet")
    assert open_source(folder).read_counted("index").null_texts == {"Close": 25}
    assert open_source(folder).read_counted("index", first=rows["Date"][12]).null_texts == {"Close": 13}


def test_flags_as_text_in_other_columns_do_not_disturb(folder: Path) -> None:
    flags = pl.Series("MaterialChangesInSubsidiaries", ["true", "false", ""])
    rows = pl.read_parquet(folder / "statements.parquet").head(3)
    rows.with_columns(flags).write_parquet(folder / "statements.parquet")
    assert open_source(folder).read("statements").height == 3


def test_columns_that_other_markets_lack_are_null_when_absent(folder: Path) -> None:
    for table, names in {
        "prices": ("AdjustmentFactor", "TurnoverValue"),
        "listed": ("Sector17Code", "MarketCode"),
    }.items():
        file = folder / f"{table}.parquet"
        pl.read_parquet(file).drop(names).write_parquet(file)
        frame = open_source(folder).read(table)
        assert all(frame[name].is_null().all() for name in names), "no factor was stated, not even 1"
        assert frame.schema.items() >= raw_schema(table).items()


# --- a period, distinct values, fingerprints --------------------------------------------------------------------------


DATE_FORMS: dict[str, pl.Expr] = {
    "date": pl.col("Date"),
    "dashed": pl.col("Date").dt.strftime("%Y-%m-%d"),
    "compact": pl.col("Date").dt.strftime("%Y%m%d"),
    "datetime": pl.col("Date").cast(pl.Datetime("us")) + pl.duration(hours=15),
    "nanoseconds": pl.col("Date").cast(pl.Datetime("ns")),
    "tokyo": pl.col("Date").cast(pl.Datetime("us")).dt.replace_time_zone("Asia/Tokyo"),
}


@pytest.mark.parametrize("form", DATE_FORMS)
def test_a_period_is_the_filtered_whole(folder: Path, form: str) -> None:
    prices = rewrite(folder, "prices", DATE_FORMS[form].alias("Date"))
    source = open_source(folder)
    days = prices["Date"].unique().sort()
    first, last = days[5], days[9]
    assert_frame_equal(
        source.read("prices", first=first, last=last), prices.filter(pl.col("Date").is_between(first, last))
    )
    assert_frame_equal(source.read("prices", first=first), prices.filter(pl.col("Date") >= first))
    assert_frame_equal(source.read("prices", last=last), prices.filter(pl.col("Date") <= last))
    assert source.dates("prices").tolist() == days.to_list()
    assert source.read("prices", last=days[0] - dt.timedelta(days=1)).schema == prices.schema, "empty, and no error"


def test_a_period_reads_only_the_row_groups_that_may_hold_it(folder: Path) -> None:
    file = folder / "prices.parquet"
    prices = pl.read_parquet(file)
    prices.write_parquet(file, row_group_size=prices.height // 5, statistics=True, use_pyarrow=False)
    last_groups = prices["Date"].unique().sort()[-2]
    content = bytearray(file.read_bytes())
    content[100:600] = bytes(500)  # pages of the first row group
    file.write_bytes(bytes(content))
    assert open_source(folder).read("prices", first=last_groups)["Date"].n_unique() == 2
    with pytest.raises(InputError, match="cannot be read as parquet"):
        open_source(folder).read("prices")


def test_values_outside_the_period_are_not_looked_at(folder: Path) -> None:
    file = folder / "index.parquet"
    index = pl.read_parquet(file)
    day = index["Date"][3]
    text = pl.when(pl.col("Date") == day).then(pl.lit("?")).otherwise(pl.col("Close").cast(pl.String))
    for form in ("date", "dashed"):
        index.with_columns(text.alias("Close")).with_columns(DATE_FORMS[form].alias("Date")).write_parquet(file)
        assert open_source(folder).read("index", first=index["Date"][4]).height == index.height - 4
        with pytest.raises(InputError, match=r"column Close in .* holds '\?', expected numbers"):
            open_source(folder).read("index", first=day)


def test_distinct_codes_are_those_of_each_table(folder: Path) -> None:
    source = open_source(folder)
    assert source.codes("prices") == source.read("prices")["Code"].unique().sort().to_list()
    assert source.codes("statements") == source.read("statements")["LocalCode"].unique().sort().to_list()
    assert source.codes("investor_flows") == ["TSEGrowth", "TSEPrime", "TSEStandard"]
    for question in (source.dates, source.codes, source.file_fingerprints):
        with pytest.raises(InputError, match="expected one of prices, listed"):
            question("quotes")


def hive(folder: Path, *, with_columns: bool) -> pl.DataFrame:
    """The prices of `folder`, written as a folder per month and per day below it; returns them as one table."""
    file = folder / "prices.parquet"
    prices = pl.read_parquet(file).with_columns(month=pl.col("Date").dt.month())
    file.unlink()
    for (month, day), rows in prices.group_by("month", "Date", maintain_order=True):
        part = folder / "prices" / f"month={month}" / f"Date={day}"
        part.mkdir(parents=True)
        rows.drop("month" if with_columns else ["month", "Date"]).write_parquet(part / "0.parquet")
    return prices.drop("month")


@pytest.mark.parametrize("with_columns", [True, False], ids=["dates in the files", "dates in the path"])
def test_hive_folders_are_one_table(folder: Path, with_columns: bool) -> None:
    whole = open_source(folder).read("prices")
    hive(folder, with_columns=with_columns)
    source = open_source(folder)
    assert_frame_equal(source.read("prices"), whole)
    day = whole["Date"][-1]
    assert_frame_equal(source.read("prices", first=day), whole.filter(pl.col("Date") == day))
    assert source.dates("prices").tolist() == whole["Date"].unique().sort().to_list()
    assert source.where("prices") == folder / "prices"


def test_a_files_own_date_counts_and_not_its_folders(folder: Path) -> None:
    whole = open_source(folder).read("index")
    (folder / "index" / "Date=1999-01-01" / "Close=7").mkdir(parents=True)
    (folder / "index.parquet").rename(folder / "index" / "Date=1999-01-01" / "Close=7" / "0.parquet")
    assert_frame_equal(open_source(folder).read("index"), whole)


def test_parts_follow_each_other_by_number(folder: Path) -> None:
    whole = open_source(folder).read("index")
    (folder / "index.parquet").unlink()
    for month, rows in enumerate((whole[:5], whole[5:9], whole[9:])):
        part = folder / "index" / f"month={(1, 2, 10)[month]}"
        part.mkdir(parents=True)
        rows.write_parquet(part / "0.parquet")
    assert_frame_equal(open_source(folder).read("index"), whole)


def test_names_that_look_like_patterns_are_names(folder: Path) -> None:
    strange = folder.rename(folder.with_name("market [2024] *"))
    assert open_source(strange).read("prices").height > 0
    assert open_source(strange).codes("index") == ["0000"]


def test_other_folders_and_hidden_files_are_no_parts(folder: Path) -> None:
    whole = open_source(folder).read("index")
    (folder / "index" / "backup").mkdir(parents=True)
    (folder / "index.parquet").rename(folder / "index" / "0.parquet")
    for other in (folder / "index" / "backup" / "0.parquet", folder / "index" / ".0.parquet"):
        whole.write_parquet(other)
    assert_frame_equal(open_source(folder).read("index"), whole)


def test_fingerprint_is_the_hash_over_the_hashes_of_its_parts(folder: Path) -> None:
    rows = pl.read_parquet(folder / "index.parquet")
    (folder / "index.parquet").unlink()
    (folder / "index").mkdir()
    for name, part in {"a": rows[:9], "b": rows[9:]}.items():
        part.write_parquet(folder / "index" / f"{name}.parquet")
    before = open_source(folder).file_fingerprints("index")
    digests = [hashlib.sha256((folder / name).read_bytes()) for name in ("index/a.parquet", "index/b.parquet")]
    assert before == {f"index/{name}.parquet": d.hexdigest() for name, d in zip("ab", digests, strict=True)}
    whole = hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()
    assert open_source(folder).fingerprint("index") == whole
    rows[9:12].write_parquet(folder / "index" / "b.parquet")
    after = open_source(folder).file_fingerprints("index")
    assert [name for name in before if before[name] != after[name]] == ["index/b.parquet"]


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
