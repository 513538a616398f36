"""The tables of a run directory: their schemas, and how they are read.

Tables are folders of parquet parts, one part per epoch, each renamed into place when complete. DuckDB reads them while
the run goes on (`read_parquet('RUN/series/*.parquet')`), and a killed run loses at most its current epoch.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from atft_pipeline.errors import InputError

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
    """All complete parts of `series`, `evals` or `daily`, oldest epoch first; an empty table before the first epoch.

    Raises InputError for a part that cannot be read.
    """
    tables = [_read_part(part, TABLES[name]) for part in sorted((run_dir / name).glob("epoch_*.parquet"))]
    return pa.concat_tables(tables) if tables else TABLES[name].empty_table()


def _read_part(part: Path, schema: pa.Schema) -> pa.Table:
    try:
        return pq.read_table(part, schema=schema)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{part}: not a readable part of a run's record ({error}); train the run again") from error


def series_values(series: pa.Table, metric: str, **where: str) -> dict[int, float]:
    """Epoch -> value of the per-epoch rows of `metric` whose columns equal `where`."""
    return {
        row["epoch"]: row["value"]
        for row in series.to_pylist()
        if row["step"] is None and row["metric"] == metric and all(row[k] == v for k, v in where.items())
    }
