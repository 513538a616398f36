"""A source folder of raw tables in the J-Quants columns: where they lie, how they are read, what they must hold.

Each table is `NAME.parquet`, a file or a folder of parquet parts, or a folder of parts `NAME/`. Codes stay strings.
Vendors deliver numbers and dates as text, so both are read: '-', '*' and '' are missing numbers; a text that is no
number either is a wrong type.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import polars as pl

from atft_pipeline.errors import InputError

Kind = Literal["date", "number", "text"]

MISSING_NUMBERS: tuple[str, ...] = ("", "-", "*", "－", "null", "NaN", "nan", "None")
"""Texts that mean a missing number in the exchange's files and in their usual exports."""


@dataclass(frozen=True)
class RawTable:
    """Columns of one raw table. What is neither named nor matched by `pattern` is ignored, AdjustmentClose on purpose:
    its level contains splits that came later."""

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


_FORECASTS: dict[str, Kind] = {
    f"{year}{figure}": "number"
    for year in ("Forecast", "NextYearForecast")
    for figure in ("NetSales", "OperatingProfit", "OrdinaryProfit", "Profit")
}
"""Full-year forecasts: of the running year, and of the next in a full-year document."""

RAW_TABLES: dict[str, RawTable] = {
    "prices": RawTable(
        required=True,
        columns={
            "Date": "date", "Code": "text", "Open": "number", "High": "number", "Low": "number", "Close": "number",
            "Volume": "number", "TurnoverValue": "number", "AdjustmentFactor": "number",
        },
    ),
    "listed": RawTable(
        required=True,
        columns={
            "Date": "date", "Code": "text", "CompanyName": "text", "Sector17Code": "text", "Sector33Code": "text",
            "MarketCode": "text",
        },
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
            "CurrentPeriodEndDate": "date", "CurrentFiscalYearEndDate": "date", "OrdinaryProfit": "number",
            "TotalAssets": "number", "Equity": "number", **_FORECASTS,
        },
    ),
}  # fmt: skip
"""The raw tables by name."""


@dataclass(frozen=True)
class Source:
    """A folder of raw tables; opened, so every required table is there."""

    folder: Path
    files: Mapping[str, tuple[Path, ...]]
    """Parquet files of each table that the folder has, in name order."""

    @property
    def tables(self) -> tuple[str, ...]:
        return tuple(name for name in RAW_TABLES if name in self.files)

    def read(self, table: str) -> pl.DataFrame:
        """The table with its known columns: dates as Date, numbers as Float64 (NaN as null), the rest as String.

        Row order is the files'. Raises: InputError for an absent table, an unreadable file, a missing column, a wrong
        type, or no rows.
        """
        frames = [_read_part(table, file) for file in self._files(table)]
        frame = pl.concat(frames, how="diagonal")
        if frame.is_empty():
            raise InputError(f"{table}: no rows in {self.where(table)}; provide a table with data")
        return frame

    def fingerprint(self, table: str) -> str:
        """sha256 over the files of the table in name order: what a data version is made of."""
        whole = hashlib.sha256()
        for file in self._files(table):
            with file.open("rb") as stream:
                whole.update(hashlib.file_digest(stream, "sha256").digest())
        return whole.hexdigest()

    def _files(self, table: str) -> tuple[Path, ...]:
        if table not in self.files:
            known = table in RAW_TABLES
            problem = f"not in {self.folder}" if known else f"no raw table; expected one of {', '.join(RAW_TABLES)}"
            raise InputError(f"{table}: {problem}; provide {table}.parquet")
        return self.files[table]

    def where(self, table: str) -> Path:
        """The table's file, or the folder of its parts: what a message names."""
        files = self._files(table)
        return files[0] if len(files) == 1 else files[0].parent


def open_source(folder: Path | str) -> Source:
    """The source in `folder`. Raises: InputError when the folder or a required table is not there, or one is twice."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"source: {folder} is not a folder; give a folder that holds prices, listed and index")
    found: dict[str, tuple[Path, ...]] = {}
    for name, table in RAW_TABLES.items():
        file, parts = folder / f"{name}.parquet", folder / name
        if file.exists() and parts.is_dir():
            raise InputError(f"{name}: both {file} and the folder {parts} exist; keep one of them")
        if file.is_file():
            found[name] = (file,)
        elif file.is_dir() or parts.is_dir():
            parts = file if file.is_dir() else parts
            found[name] = tuple(sorted(parts.glob("*.parquet")))
            if not found[name]:
                raise InputError(f"{name}: no parquet file in {parts}; add its parts or remove the folder")
        elif table.required:
            raise InputError(f"{name}: table not found; expected {file} or a folder {parts} of parquet parts")
    return Source(folder, found)


def _read_part(table: str, file: Path) -> pl.DataFrame:
    spec = RAW_TABLES[table]
    try:
        schema = pl.read_parquet_schema(file)
        kinds = _kinds(spec, list(schema))
        missing = [name for name in spec.columns if name not in schema]
        if missing:
            raise InputError(f"{table}: required column {', '.join(missing)} is missing in {file}; add it")
        frame = pl.read_parquet(file, columns=[name for name in kinds if name in schema], hive_partitioning=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{table}: {file} cannot be read as parquet ({reason}); write it again") from error
    absent = [pl.lit(None).alias(name) for name in kinds if name not in schema]
    return frame.with_columns(absent).select(_cast(frame, table, name, kind, file) for name, kind in kinds.items())


def _kinds(spec: RawTable, present: list[str]) -> dict[str, Kind]:
    kinds: dict[str, Kind] = {**spec.columns, **spec.optional}
    if spec.pattern:
        kinds |= {name: "number" for name in present if name not in kinds and re.match(spec.pattern, name)}
    return kinds


def _cast(frame: pl.DataFrame, table: str, name: str, kind: Kind, file: Path) -> pl.Series:
    if name not in frame.columns:
        return pl.Series(name, [None] * frame.height, dtype=_DTYPES[kind])
    column = frame[name]
    if column.dtype == pl.Categorical or isinstance(column.dtype, pl.Enum):
        column = column.cast(pl.String)
    if column.dtype == pl.Null:
        return column.cast(_DTYPES[kind])
    result = _CASTS[kind](column)
    if result is None:
        raise InputError(
            f"{table}: column {name} in {file} has type {column.dtype}, expected {_EXPECTED[kind]}; convert it"
        )
    lost = column.filter(result.is_null() & column.is_not_null())
    if kind == "number" and lost.dtype == pl.String:
        lost = lost.filter(~lost.str.strip_chars().is_in(MISSING_NUMBERS))
    elif kind == "number" and lost.dtype.is_float():
        lost = lost.filter(~lost.is_nan())
    elif lost.dtype == pl.String:
        lost = lost.filter(lost.str.strip_chars() != "")
    if lost.len():
        raise InputError(
            f"{table}: column {name} in {file} holds {lost[0]!r}, expected {_EXPECTED[kind]}; correct the "
            f"{lost.len()} such values"
        )
    return result


def _to_number(column: pl.Series) -> pl.Series | None:
    if column.dtype == pl.String:
        return column.str.strip_chars().cast(pl.Float64, strict=False).fill_nan(None)
    if column.dtype.is_numeric():
        return column.cast(pl.Float64).fill_nan(None)
    return None


def to_date(column: pl.Series) -> pl.Series | None:
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
