"""Contracts of the tables: pandera schemas for columns and types, and rules on the whole table.

A pandera schema on a LazyFrame checks no values, so frames are collected first. Its `unique` is slow on duplicates, so
keys are counted in polars. A fault of a single quote does not break the contract: quarantine.py handles it.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandera.errors
import pandera.polars as pa
import polars as pl

from atft_pipeline.errors import InputError
from atft_pipeline.market.sources import RAW_TABLES, Source, raw_schema

TABLE_KEYS: dict[str, tuple[str, ...]] = {
    "prices": ("Date", "Code"),
    "listed": ("Date", "Code"),
    "index": ("Date", "Code"),
    "investor_flows": ("PublishedDate", "EndDate", "Section"),
    "statements": (
        "DisclosedDate", "DisclosedTime", "LocalCode", "TypeOfDocument", "TypeOfCurrentPeriod", "CurrentPeriodEndDate",
        "DisclosureNumber",
    ),
}  # fmt: skip
"""Columns that identify one row. A company may file corrections of several periods at once, hence the period's end. It
may also correct one period twice in a minute, hence the document's number where there is one."""

NEVER_NULL: dict[str, tuple[str, ...]] = {
    "prices": ("Date", "Code"),
    "listed": ("Date", "Code"),
    "index": ("Date",),
    "investor_flows": ("PublishedDate", "EndDate", "Section"),
    "statements": ("DisclosedDate", "LocalCode"),
}


@dataclass(frozen=True)
class ContractReport:
    """Extent of a table, and one sentence per breach of its contract; no sentences when it holds."""

    table: str
    rows: int
    first_date: dt.date | None
    last_date: dt.date | None
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures

    def require(self) -> ContractReport:
        """Returns itself. Raises: InputError with the first failure and the number of further ones."""
        if self.failures:
            more = f" (and {len(self.failures) - 1} more)" if len(self.failures) > 1 else ""
            raise InputError(self.failures[0] + more)
        return self


def check_table(
    name: str, frame: pl.DataFrame, *, min_sessions: int = 1, where: str = "", is_whole: bool = True
) -> ContractReport:
    """Checks raw table `name` and returns the report.

    `where`: the file that messages name. `min_sessions`: applies to prices and index. `is_whole`: False for a span of a
    table, which skips the rules that only a whole table must satisfy; one month may hold no quote at all.

    Raises: InputError when `name` is no raw table. Breaches are in the report; `require()` raises them.
    """
    if name not in RAW_TABLES:
        raise InputError(f"{name}: no raw table; expected one of {', '.join(RAW_TABLES)}")
    subject = f"{name} in {where}" if where else name
    date = RAW_TABLES[name].date
    failures = _schema_failures(subject, RAW_SCHEMAS[name](), frame)
    if not failures:
        rules = [_no_rows, _duplicate_keys, _dates_in_order, _index_positive]
        rules += [_prices_present, _several_stocks] if is_whole else []
        failures = [text for rule in rules if (text := rule(name, frame))]
        if name in ("prices", "index") and 0 < frame[date].n_unique() < min_sessions:
            failures.append(
                f"{frame[date].n_unique()} sessions in column {date}, expected at least {min_sessions};"
                " provide a longer history or shorten the windows"
            )
        failures = [f"{subject}: {text}" for text in failures]
    has_dates = date in frame.columns and frame.schema[date] == pl.Date
    first, last = (frame[date].min(), frame[date].max()) if has_dates else (None, None)
    assert first is None or isinstance(first, dt.date)
    assert last is None or isinstance(last, dt.date)
    return ContractReport(name, frame.height, first, last, tuple(failures))


def _raw_schema(name: str) -> pa.DataFrameSchema:
    spec = RAW_TABLES[name]
    return pa.DataFrameSchema(
        {
            column: pa.Column(dtype, nullable=column not in NEVER_NULL[name], required=column in spec.columns)
            for column, dtype in raw_schema(name).items()
        }
    )


def _schema_of(name: str) -> Callable[[], pa.DataFrameSchema]:
    return lambda: _raw_schema(name)


RAW_SCHEMAS: dict[str, Callable[[], pa.DataFrameSchema]] = {name: _schema_of(name) for name in RAW_TABLES}
"""pandera schema of each raw table as `Source.read` gives it: types, and keys that are never null."""


def _schema_failures(subject: str, schema: pa.DataFrameSchema, frame: pl.DataFrame) -> list[str]:
    try:
        schema.validate(frame, lazy=True)
    except pandera.errors.SchemaErrors as errors:
        return [_sentence(subject, error, frame) for error in errors.schema_errors]
    return []


def _sentence(subject: str, error: pandera.errors.SchemaError, frame: pl.DataFrame) -> str:
    reason = error.reason_code.name if error.reason_code else ""
    column = getattr(error.schema, "name", None) or error.failure_cases
    if reason == "COLUMN_NOT_IN_DATAFRAME":
        return f"{subject}: required column {error.failure_cases} is missing; add it"
    if reason == "SERIES_CONTAINS_NULLS":
        return f"{subject}: column {column} holds nulls; fill them or remove those rows"
    if reason == "WRONG_DATATYPE":
        return f"{subject}: column {column} has the wrong type, {error}; convert it"
    if not isinstance(error.failure_cases, pl.DataFrame):  # an unexpected or misplaced column has no value to show
        return f"{subject}: column {column}: {' '.join(str(error).split())[:200]}; build the table again"
    value = error.failure_cases[column][0]
    row = frame.filter(pl.col(column) == value).select(name for name in ("Date", "Code") if name in frame.columns)
    where = ", ".join(f"{key} {text}" for key, text in zip(row.columns, row.row(0), strict=True))
    rule = getattr(error.check, "error", None) or error.check
    return f"{subject}: column {column} holds {value} ({where}), expected {rule}; correct the values"


def _no_rows(_: str, frame: pl.DataFrame) -> str | None:
    return "no rows; provide a table with data" if frame.is_empty() else None


def _duplicate_keys(name: str, frame: pl.DataFrame) -> str | None:
    keys = frame.select(key for key in TABLE_KEYS[name] if key in frame.columns)
    if keys.is_empty() or keys.select(_rises(keys.columns).all()).item():
        return None
    # Equal keys have equal hashes: only rows that share one are compared in full.
    hashes = keys.hash_rows()
    if hashes.n_unique() == keys.height:
        return None
    suspects = keys.filter(hashes.is_duplicated())
    repeats = suspects.height - suspects.n_unique()
    if not repeats:
        return None
    example = suspects.filter(suspects.is_duplicated()).row(0)
    shown = ", ".join(f"{key}={value}" for key, value in zip(keys.columns, example, strict=True))
    return f"{repeats} duplicate keys ({', '.join(keys.columns)}), e.g. {shown}; keep one row per key"


def _rises(keys: Sequence[str]) -> pl.Expr:
    """Whether each row but the first is above the row before it, by the first key that differs; false where a key is
    null. If all rows rise, they are sorted and unique: one comparison of neighbours shows it, without a hash table."""
    rises = pl.lit(value=False)
    for key in reversed(keys):
        now, before = pl.col(key).slice(1), pl.col(key).slice(0, pl.len() - 1)
        rises = (now > before) | ((now == before) & rises)
    return rises.fill_null(value=False)


def _dates_in_order(name: str, frame: pl.DataFrame) -> str | None:
    date = RAW_TABLES[name].date
    falls = frame[date].to_physical().diff() < 0
    if not falls.any():
        return None
    row = falls.arg_max() or 0
    return (
        f"dates out of order in column {date}: {frame[date][row]} follows {frame[date][row - 1]} at row {row};"
        f" sort the table by {date}"
    )


_LARGEST_INDEX = 1e12
"""Above any index in any currency; its square is still finite."""


def _index_positive(name: str, frame: pl.DataFrame) -> str | None:
    usable = pl.col("Close").is_between(0, _LARGEST_INDEX, closed="right")
    wrong = frame.filter(~usable) if name == "index" else frame.clear()
    if wrong.is_empty():
        return None
    return (
        f"column Close holds {wrong['Close'][0]} on {wrong['Date'][0]} ({wrong.height} such rows); correct it or leave"
        " it empty"
    )


def _prices_present(name: str, frame: pl.DataFrame) -> str | None:
    columns = {"prices": ("Open", "High", "Low", "Close"), "index": ("Close",)}.get(name, ())
    empty = [column for column in columns if frame[column].null_count() == frame.height]
    return f"column {', '.join(empty)} holds no value at all; provide prices" if empty and frame.height else None


def _several_stocks(name: str, frame: pl.DataFrame) -> str | None:
    if name != "prices" or frame.is_empty() or (frame["Code"] != frame["Code"][0]).any():
        return None
    return f"one stock only (column Code holds {frame['Code'][0]!r} throughout); a cross-section needs several"


def prices_schema() -> pa.DataFrameSchema:
    """Contract of the table that universe.build_prices returns: columns, types, prices and factors above 0."""
    price = {name: pa.Column(pl.Float64, pa.Check.gt(0), nullable=True) for name in ("Open", "High", "Low", "Close")}
    flag = {name: pa.Column(pl.Boolean) for name in ("is_traded", "is_investable", "is_liquid", "is_listed_backfilled")}
    return pa.DataFrameSchema(
        {"Date": pa.Column(pl.Date), "Code": pa.Column(pl.String)}
        | price
        | {name: pa.Column(pl.Float64, pa.Check.ge(0), nullable=True) for name in ("Volume", "TurnoverValue")}
        | {"cumulative_factor": pa.Column(pl.Float64, pa.Check.gt(0))}
        | flag
        | {name: pa.Column(pl.String, nullable=True) for name in ("Sector33Code", "MarketCode")},
        strict=True,
        ordered=True,
    )


NO_UNIVERSE = (
    "adjusted prices: no stock is investable in any session; give a longer history, or lower"
    " dataset.min_history_sessions"
)


def check_prices(frame: pl.DataFrame, *, needs_universe: bool = True) -> ContractReport:
    """Checks the adjusted prices: schema, sorted unique keys, prices exactly on traded rows, a non-empty universe.

    `needs_universe`: False for a span of a table, whose first months have no universe yet.
    """
    failures = _schema_failures("adjusted prices", prices_schema(), frame)
    if not failures:
        failures += _sorted_unique_failures("adjusted prices", frame)
        has_prices = pl.all_horizontal(pl.col("Open", "High", "Low", "Close").is_not_null())
        halves, illiquid = frame.select(
            (pl.col("is_traded") != has_prices).sum().alias("halves"),
            (pl.col("is_liquid") & ~pl.col("is_investable")).any().alias("illiquid"),
        ).row(0)
        if halves:
            failures.append(f"adjusted prices: {halves} rows whose is_traded disagrees with their prices")
        if illiquid:
            failures.append("adjusted prices: a row is liquid without being investable")
        if needs_universe and not frame["is_investable"].any():
            failures.append(NO_UNIVERSE)
    return _report("prices (adjusted)", frame, failures)


def check_ml_dataset(frame: pl.DataFrame, features: Sequence[str], targets: Sequence[str]) -> ContractReport:
    """Checks a feature table: exactly Date, Code, `features` and `targets` in this order, float32, unique keys.

    Infinite values break the contract. NaN does too, because a missing value is null on disk.
    """
    expected = ["Date", "Code", *features, *targets]
    failures: list[str] = []
    if frame.columns != expected:
        missing = [name for name in expected if name not in frame.columns]
        extra = [name for name in frame.columns if name not in expected]
        failures.append(
            f"ml_dataset: expected {len(expected)} columns in registry order, found {len(frame.columns)};"
            f" missing {missing or 'none'}, unexpected {extra or 'none'}; rebuild the dataset"
        )
        return _report("ml_dataset", frame, failures)
    values = [*features, *targets]
    columns = {name: pa.Column(pl.Float32, nullable=True) for name in values}
    schema = pa.DataFrameSchema({"Date": pa.Column(pl.Date), "Code": pa.Column(pl.String)} | columns)
    failures = (
        _schema_failures("ml_dataset", schema, frame)
        or _infinite_failures(frame, values)
        or _sorted_unique_failures("ml_dataset", frame)
    )
    return _report("ml_dataset", frame, failures)


def _infinite_failures(frame: pl.DataFrame, columns: Sequence[str]) -> list[str]:
    """Checks all columns in one pass, because a pandera check would copy each of them."""
    finite = frame.select(pl.col(columns).is_finite().all()).row(0, named=True)
    return [
        f"ml_dataset: column {name} fails finite: {(~frame[name].is_finite()).sum()} values are NaN or infinite;"
        " correct the values"
        for name in columns
        if not finite[name]
    ]


def _sorted_unique_failures(subject: str, frame: pl.DataFrame) -> list[str]:
    """Checks that keys strictly rise: then they are both sorted and unique."""
    broken = frame.select((~_rises(("Date", "Code"))).sum()).item() if frame.height > 1 else 0
    return (
        [f"{subject}: {broken} rows repeat or precede the (Date, Code) before them; sort and deduplicate"]
        if broken
        else []
    )


def _report(name: str, frame: pl.DataFrame, failures: list[str]) -> ContractReport:
    first, last = (frame["Date"].min(), frame["Date"].max()) if "Date" in frame.columns else (None, None)
    first = first if isinstance(first, dt.date) else None
    last = last if isinstance(last, dt.date) else None
    return ContractReport(name, frame.height, first, last, tuple(failures))


def joined_report(table: str, reports: Sequence[ContractReport], failures: Sequence[str] = ()) -> ContractReport:
    """Joins the reports on a table's consecutive spans; `failures` are those of the whole table."""
    days = [day for report in reports for day in (report.first_date, report.last_date) if day is not None]
    return ContractReport(
        table,
        sum(report.rows for report in reports),
        min(days, default=None),
        max(days, default=None),
        (*(failure for report in reports for failure in report.failures), *failures),
    )


@dataclass(frozen=True)
class CheckedTables:
    """Raw tables that passed their contracts, and the manifest's entry about their source."""

    tables: dict[str, pl.DataFrame]
    record: dict[str, Any]
    """`{"path": ..., "tables": {name: {rows, first_date, last_date, sha256, null_texts}}}`; null_texts counts by
    column the cells that held a text for a missing value."""


def read_checked(source: Source, *, but: Sequence[str] = ()) -> CheckedTables:
    """Reads and checks every table of `source`, except those named in `but`.

    Raises: InputError with the sentence of the first breach.
    """
    tables, entries = {}, {}
    for name in source.tables:
        if name in but:
            continue
        read = source.read_counted(name)
        report = check_table(name, read.frame, where=str(source.where(name))).require()
        tables[name] = read.frame
        entries[name] = {
            "rows": report.rows,
            "first_date": str(report.first_date),
            "last_date": str(report.last_date),
            "sha256": source.fingerprint(name),
            "null_texts": read.null_texts,
        }
    return CheckedTables(tables, {"path": str(source.folder), "tables": entries})
