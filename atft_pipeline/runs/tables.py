"""The tables of a run directory: their schemas, and how they are read.

A table is a folder of parquet partitions, one per epoch, each renamed into place when it is complete. DuckDB reads them
while the run goes on (`read_parquet('RUN/series/*.parquet')`), and a killed run loses at most its current epoch.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from atft_pipeline.errors import InputError
from atft_pipeline.runs.paths import UnreadableFile, files_until, first_line, require_inside

SERIES = pa.schema(
    [
        ("step", pa.int64()),
        ("epoch", pa.int32()),
        ("split", pa.string()),
        ("component", pa.string()),
        ("term", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
    ]
)
"""One number per row. `step` is null for figures of a whole epoch."""

EVALS = pa.schema(
    [
        ("epoch", pa.int32()),
        ("split", pa.string()),
        ("slice", pa.string()),
        ("weights_hash", pa.string()),
        ("predictions_hash", pa.string()),
        ("metric", pa.string()),
        ("unit", pa.string()),
        ("value", pa.float64()),
        ("se", pa.float64()),
    ]
)

DAILY = pa.schema(
    [
        ("epoch", pa.int32()),
        ("split", pa.string()),
        ("slice", pa.string()),
        ("date", pa.date32()),
        ("ic", pa.float64()),
        ("rank_ic", pa.float64()),
        ("gross", pa.float64()),
        ("net", pa.float64()),
        ("turnover", pa.float64()),
    ]
)

TABLES: dict[str, pa.Schema] = {"series": SERIES, "evals": EVALS, "daily": DAILY}


def read_table(run_dir: Path, name: str) -> pa.Table:
    """All complete partitions of `series`, `evals` or `daily`, oldest epoch first; empty before the first epoch.

    Raises InputError for a partition that cannot be read.
    """
    partitions = []
    for path in files_until(run_dir / name, "epoch_*.parquet"):
        try:
            partitions.append(read_part(path, name))
        except UnreadableFile as error:
            raise InputError(f"{path}: not a readable part of a run's record ({error}); train the run again") from error
    return pa.concat_tables(partitions) if partitions else TABLES[name].empty_table()


def read_part(path: Path, name: str) -> pa.Table:
    """One partition of table `name`, with the columns of its schema.

    Raises UnreadableFile where it is torn, lacks a column, or leaves the run directory.
    """
    schema = TABLES[name]
    require_inside(path, path.parents[1])
    try:
        table = pq.ParquetFile(path).read()
        lacking = [column for column in schema.names if column not in table.schema.names]
        if not lacking:
            return table.select(schema.names).cast(schema)
    except (OSError, pa.ArrowException) as error:
        raise UnreadableFile(f"torn or unreadable ({first_line(error)})") from error
    raise UnreadableFile(f"column {lacking[0]} is missing")


def series_values(series: pa.Table, metric: str, **where: str) -> dict[int, float]:
    """Epoch -> value of the per-epoch rows of `metric` whose columns equal `where`."""
    chosen = pc.and_(pc.is_null(series["step"]), pc.equal(series["metric"], metric))
    for column, value in where.items():
        chosen = pc.and_(chosen, pc.equal(series[column], value))
    rows = series.filter(chosen)
    return dict(zip(rows["epoch"].to_pylist(), rows["value"].to_pylist(), strict=True))
