"""A source folder of raw tables in the J-Quants columns: where they lie, how they are read, which columns they have.

Each table is a file `NAME.parquet`, or a folder of parquet files named `NAME.parquet/` or `NAME/`; folders key=value
within it, as hive writers make them, are read too. Codes stay strings. Vendors write numbers and dates as text, so text
is read as well: '-', '*' and '' are missing values, which become null, never zero, and are counted. Any other text
that is no number is a wrong type.
"""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from atft_pipeline.errors import InputError

Kind = Literal["date", "number", "text"]

NULL_TEXTS: tuple[str, ...] = ("", "-", "*", "－", "−", "‐", "–", "—", "―", "null", "NaN", "nan", "None")
"""Texts that mean a missing number or date in the exchange's files and their usual exports. Among them are the
full-width minus and the dashes that Japanese tables use for it."""
HASH_THREADS = 2
"""Files hashed at once: hashing releases the interpreter's lock, and a disk serves two readers as fast as more."""


@dataclass(frozen=True)
class RawTable:
    """Columns of one raw table. Columns that are neither named nor matched by `pattern` are ignored. AdjustmentClose is
    ignored on purpose: its level contains splits that came later."""

    required: bool
    columns: Mapping[str, Kind]
    optional: Mapping[str, Kind] = field(default_factory=dict)
    """Known columns that may be absent; they are then null throughout."""
    pattern: str | None = None
    """Further number columns that are kept where present."""

    @property
    def date(self) -> str:
        """The column by which the table is ordered: the first day on which a row is public."""
        return next(iter(self.columns))

    @property
    def code(self) -> str:
        """The column that says what a row is about: a security, or a section of the market."""
        return next(name for name in ("Code", "LocalCode", "Section") if name in self.columns)


_FORECASTS: dict[str, Kind] = {
    f"{year}{figure}": "number"
    for year in ("Forecast", "NextYearForecast")
    for figure in ("NetSales", "OperatingProfit", "OrdinaryProfit", "Profit")
}
"""Full-year forecasts: for the current year, and in a full-year document for the next."""

RAW_TABLES: dict[str, RawTable] = {
    "prices": RawTable(
        required=True,
        columns={
            "Date": "date", "Code": "text", "Open": "number", "High": "number", "Low": "number", "Close": "number",
            "Volume": "number",
        },
        # Where nobody states splits the factor is null throughout; that differs from a stated factor of 1.
        optional={"TurnoverValue": "number", "AdjustmentFactor": "number"},
    ),
    "listed": RawTable(
        required=True,
        columns={"Date": "date", "Code": "text", "CompanyName": "text", "Sector33Code": "text"},
        optional={"Sector17Code": "text", "MarketCode": "text"},
    ),
    "index": RawTable(
        required=True,
        columns={"Date": "date", "Code": "text", "Close": "number"},
        optional={"Open": "number", "High": "number", "Low": "number"},
    ),
    "investor_flows": RawTable(
        required=False,
        columns={
            "PublishedDate": "date", "StartDate": "date", "EndDate": "date", "Section": "text",
            "ForeignersTotal": "number", "ForeignersBalance": "number",
            "IndividualsTotal": "number", "IndividualsBalance": "number",
        },
        pattern=r"^[A-Z][A-Za-z]+(Sales|Purchases|Total|Balance)$",
    ),
    "statements": RawTable(
        required=False,
        columns={
            "DisclosedDate": "date", "DisclosedTime": "text", "LocalCode": "text", "TypeOfDocument": "text",
            "TypeOfCurrentPeriod": "text", "NetSales": "number", "OperatingProfit": "number", "Profit": "number",
        },
        optional={
            "DisclosureNumber": "number", "CurrentPeriodStartDate": "date", "CurrentPeriodEndDate": "date",
            "CurrentFiscalYearStartDate": "date", "CurrentFiscalYearEndDate": "date", "NextFiscalYearEndDate": "date",
            "OrdinaryProfit": "number", "TotalAssets": "number", "Equity": "number", **_FORECASTS,
        },
    ),
}  # fmt: skip
"""The raw tables by name."""


@dataclass(frozen=True)
class TableRead:
    """Rows of a table, and the texts that reading turned into nulls."""

    frame: pl.DataFrame
    null_texts: dict[str, int]
    """By column, the cells of `frame` that held a text for a missing value; columns without any are left out."""


@dataclass(frozen=True)
class Source:
    """An opened folder of raw tables; every required table exists."""

    folder: Path
    files: Mapping[str, tuple[Path, ...]]
    """Parquet files of each table that the folder has, in name order."""

    @property
    def tables(self) -> tuple[str, ...]:
        return tuple(name for name in RAW_TABLES if name in self.files)

    def read(self, table: str, *, first: dt.date | None = None, last: dt.date | None = None) -> pl.DataFrame:
        """The rows of `read_counted`."""
        return self.read_counted(table, first=first, last=last).frame

    def read_counted(self, table: str, *, first: dt.date | None = None, last: dt.date | None = None) -> TableRead:
        """Reads the table with its known columns: dates as Date, numbers as Float64 (NaN as null), the rest as String.

        Rows keep the order of their files; files are ordered by their first dates, whatever their names. `first` and
        `last`, both included, bound the date column and leave out rows without a date. Where a file stores that column
        as Date, only row groups that may hold such dates are read. Values of other rows are not checked.

        Raises: InputError for an absent table, an unreadable file, a missing column, a wrong type, or a table without
        rows. A period without rows gives an empty frame.
        """
        reads = [_read_file(table, file, self.folder, first, last) for file in self._files(table)]
        frame = pl.concat(in_time([read.frame for read in reads], self._spec(table).date), how="diagonal")
        if frame.is_empty() and first is None and last is None:
            raise InputError(f"{table}: no rows in {self.where(table)}; provide a table with data")
        counts = sum((Counter(read.null_texts) for read in reads), Counter[str]())
        return TableRead(frame, dict(sorted(counts.items())))

    def dates(self, table: str) -> NDArray[np.datetime64]:
        """Distinct dates of the table, ascending, datetime64[D]; reads the date column only."""
        return self._distinct(table, self._spec(table).date).to_numpy().astype("datetime64[D]")

    def codes(self, table: str) -> list[str]:
        """Distinct codes of the table (for investor_flows, sections), ascending; reads that column only."""
        return self._distinct(table, self._spec(table).code).to_list()

    def _distinct(self, table: str, column: str) -> pl.Series:
        values_by_file = []
        for file in self._files(table):
            with _opened(table, file, self.folder) as (spec, scan):
                values = scan.select(pl.col(column).unique()).collect()[column]
            values_by_file.append(_cast(values, table, column, {**spec.columns, **spec.optional}[column], file)[0])
            if values_by_file[-1].null_count():
                raise InputError(f"{table}: column {column} holds nulls in {file}; fill them or remove those rows")
        return pl.concat(values_by_file).unique().sort()

    def fingerprint(self, table: str) -> str:
        """sha256 over the files of the table in name order; it identifies the version of the data."""
        digests = self.file_fingerprints(table).values()
        return hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in digests)).hexdigest()

    def file_fingerprints(self, table: str) -> dict[str, str]:
        """sha256 of each file of the table in name order, by its path within the source."""
        files = self._files(table)
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            digests = list(pool.map(_sha256, files))
        return {file.relative_to(self.folder).as_posix(): digest for file, digest in zip(files, digests, strict=True)}

    def _spec(self, table: str) -> RawTable:
        self._files(table)
        return RAW_TABLES[table]

    def _files(self, table: str) -> tuple[Path, ...]:
        if table not in self.files:
            is_raw = table in RAW_TABLES
            problem = f"not in {self.folder}" if is_raw else f"no raw table; expected one of {', '.join(RAW_TABLES)}"
            raise InputError(f"{table}: {problem}; provide {table}.parquet")
        return self.files[table]

    def where(self, table: str) -> Path:
        """The table's file, or the folder of its files; messages name it."""
        files = self._files(table)
        return files[0] if len(files) == 1 else Path(os.path.commonpath(files))


def in_time(frames: Sequence[pl.DataFrame], date: str) -> list[pl.DataFrame]:
    """Orders the files' frames by the dates of their first rows, because by name `2015-06-30` comes before `2015`."""
    filled = [frame for frame in frames if frame.height]
    return sorted(filled, key=lambda frame: frame[date][0] or dt.date.min) or list(frames[:1])


def open_source(folder: Path | str) -> Source:
    """Opens the source in `folder`.

    Raises: InputError when the folder or a required table is missing, or when a table exists twice.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"source: {folder} is not a folder; give a folder that holds prices, listed and index")
    files: dict[str, tuple[Path, ...]] = {}
    for name, table in RAW_TABLES.items():
        file, table_folder = folder / f"{name}.parquet", folder / name
        if file.exists() and table_folder.is_dir():
            raise InputError(f"{name}: both {file} and the folder {table_folder} exist; keep one of them")
        if file.is_file():
            files[name] = (file,)
        elif file.is_dir() or table_folder.is_dir():
            table_folder = file if file.is_dir() else table_folder
            files[name] = tuple(sorted(_part_files(table_folder), key=_natural_order))
            if not files[name]:
                raise InputError(f"{name}: no parquet file in {table_folder}; add its files or remove the folder")
        elif table.required:
            raise InputError(f"{name}: table not found; expected {file} or a folder {table_folder} of parquet files")
    return Source(folder, files)


def _part_files(folder: Path) -> Iterator[Path]:
    """Parquet files in `folder` and in folders key=value below it; other folders need not belong to the table."""
    for file in folder.rglob("*.parquet"):
        *nested, name = file.relative_to(folder).parts
        if file.is_file() and not name.startswith(".") and all("=" in part for part in nested):
            yield file


def _natural_order(file: Path) -> list[list[tuple[int, str]]]:
    """Sort key by name in which month=2 precedes month=10."""
    return [[(int(run or 0), text) for run, text in re.findall(r"(\d*)(\D*)", part)] for part in file.parts]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _opened(table: str, file: Path, folder: Path) -> Iterator[tuple[RawTable, pl.LazyFrame]]:
    """The table's entry in `RAW_TABLES` and a scan of `file`; columns that only the path states (key=value) are added.

    Raises: InputError for a missing column, and for any error in reading the file while it is open.
    """
    spec = RAW_TABLES[table]
    try:
        scan = pl.scan_parquet(file, hive_partitioning=False, glob=False)
        present = scan.collect_schema()
        stated = dict(name.split("=", 1) for name in file.relative_to(folder).parts[:-1] if "=" in name)
        scan = scan.with_columns(pl.lit(value).alias(name) for name, value in stated.items() if name not in present)
        missing = [name for name in spec.columns if name not in present and name not in stated]
        if missing:
            raise InputError(f"{table}: required column {', '.join(missing)} is missing in {file}; add it")
        yield spec, scan
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{table}: {file} cannot be read as parquet ({reason}); write it again") from error


def _read_file(table: str, file: Path, folder: Path, first: dt.date | None, last: dt.date | None) -> TableRead:
    is_bounded = first is not None or last is not None
    with _opened(table, file, folder) as (spec, scan):
        schema = scan.collect_schema()
        kinds = _kinds(spec, list(schema))
        within = pl.col(spec.date).is_between(first or dt.date.min, last or dt.date.max)
        if is_bounded and schema[spec.date] == pl.Date:
            scan, is_bounded = scan.filter(within), False
        frame = scan.select(name for name in kinds if name in schema).collect()
    if is_bounded:
        days = _cast(frame[spec.date], table, spec.date, "date", file)[0]
        frame = frame.with_columns(days).filter(within)
    columns: list[pl.Series] = []
    null_texts: dict[str, int] = {}
    for name, kind in kinds.items():
        column = frame[name] if name in frame.columns else pl.Series(name, [None] * frame.height, dtype=_DTYPES[kind])
        column, texts = _cast(column, table, name, kind, file)
        columns.append(column)
        null_texts |= {name: texts} if texts else {}
    return TableRead(pl.DataFrame(columns), null_texts)


def _kinds(spec: RawTable, present: list[str]) -> dict[str, Kind]:
    kinds: dict[str, Kind] = {**spec.columns, **spec.optional}
    if spec.pattern:
        kinds |= {name: "number" for name in present if name not in kinds and re.match(spec.pattern, name)}
    return kinds


def _cast(column: pl.Series, table: str, name: str, kind: Kind, file: Path) -> tuple[pl.Series, int]:
    """Casts the column to its kind; also returns how many of its cells held a text for a missing value.

    Raises: InputError that names the first other text that cannot be cast.
    """
    if column.dtype == pl.Categorical or isinstance(column.dtype, pl.Enum):
        column = column.cast(pl.String)
    if column.dtype == pl.Null:
        return column.cast(_DTYPES[kind]), 0
    result = _CASTS[kind](column)
    if result is None:
        raise InputError(
            f"{table}: column {name} in {file} has type {column.dtype}, expected {_EXPECTED[kind]}; convert it"
        )
    if column.dtype != pl.String or result.null_count() == column.null_count():
        return result, 0  # only NaN is lost from a column that is no text
    lost = column.filter(result.is_null() & column.is_not_null()).str.strip_chars()
    wrong = lost.filter(~lost.is_in(NULL_TEXTS))
    if wrong.len():
        raise InputError(
            f"{table}: column {name} in {file} holds {wrong[0]!r}, expected {_EXPECTED[kind]}; correct the "
            f"{wrong.len()} such values"
        )
    return result, lost.len()


def _to_number(column: pl.Series) -> pl.Series | None:
    if column.dtype == pl.String:
        return column.str.strip_chars().cast(pl.Float64, strict=False).fill_nan(None)
    if column.dtype.is_numeric():
        column = column.cast(pl.Float64)
        return column.fill_nan(None) if column.is_nan().any() else column
    return None


def to_date(column: pl.Series) -> pl.Series | None:
    """The column as Date, null for text other than YYYY-MM-DD or YYYYMMDD; None where its type holds no dates."""
    if column.dtype == pl.Date:
        return column
    if isinstance(column.dtype, pl.Datetime):
        return column.dt.date()
    if column.dtype == pl.String:
        days = column.str.strip_chars().str.slice(0, 10)
        dashed = days.str.to_date("%Y-%m-%d", strict=False)
        return dashed.fill_null(days.str.to_date("%Y%m%d", strict=False)) if dashed.null_count() else dashed
    return None


def _to_text(column: pl.Series) -> pl.Series | None:
    if column.dtype == pl.String:
        return column
    return column.dt.to_string("%H:%M:%S") if column.dtype == pl.Time else None


_CASTS = {"date": to_date, "number": _to_number, "text": _to_text}
_DTYPES: dict[Kind, pl.DataType] = {"date": pl.Date(), "number": pl.Float64(), "text": pl.String()}
_EXPECTED = {"date": "a date (YYYY-MM-DD)", "number": "numbers", "text": "text"}


@functools.cache
def raw_schema(table: str) -> dict[str, pl.DataType]:
    """Column types that `Source.read` gives for the named columns of `table`."""
    spec = RAW_TABLES[table]
    return {name: _DTYPES[kind] for name, kind in {**spec.columns, **spec.optional}.items()}
