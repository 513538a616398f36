"""The record of one run: `output/runs/<name>-<key>/`, written while it trains and read by everything that judges it.

Tables are folders of parquet parts, one part per epoch, each renamed into place when complete. DuckDB reads them while
the run goes on (`read_parquet('RUN/series/*.parquet')`), and a killed run loses at most its current epoch. The key is a
hash of configuration, code and data: another configuration is another directory, and no function here takes two.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from atft_pipeline.config.schema import PipelineConfig, to_dict
from atft_pipeline.errors import InputError
from atft_pipeline.storage.atomic import replacing, write_json
from atft_pipeline.storage.code_version import code_revision
from atft_pipeline.storage.product import read_manifest, sha256_of

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

LOCK_ATTEMPTS, LOCK_PAUSE_S = 5, 0.05
"""A reader that asks whether a run is held (`is_held`) holds it itself for an instant; a writer tries again."""


PLACEMENT: tuple[str, ...] = ("panel", "loader_workers")
"""Fields of `train` that decide where and when, and no figure: a run may go on with others, and is the same run."""


def decisive(config: PipelineConfig) -> dict[str, Any]:
    """The configuration as a dictionary, without what changes no result."""
    values = to_dict(config)
    return values | {"train": {name: value for name, value in values["train"].items() if name not in PLACEMENT}}


def config_key(config: PipelineConfig) -> str:
    """Hash of the configuration apart from the number of epochs: runs that a 20-epoch verdict speaks for share it."""
    values = decisive(config)
    del values["train"]["epochs"]
    return sha256_of(values)[:12]


def run_key(
    config: PipelineConfig, *, dataset_fingerprint: str, graph_fingerprint: str | None, processes: int = 1
) -> str:
    """Hash of configuration, code and data; the suffix of the run's directory.

    Several processes are part of it: they add in another order and draw other dropout, and one key means the same bits.
    """
    parts = {
        "config": decisive(config),
        "code": code_revision("run"),
        "dataset": dataset_fingerprint,
        "graph": graph_fingerprint,
    }
    return sha256_of(parts | ({"processes": processes} if processes > 1 else {}))[:12]


def read_run(run_dir: Path) -> dict[str, Any]:
    """`run.json` of a run directory; raises InputError where there is none or it cannot be read."""
    path = run_dir / "run.json"
    if not path.is_file():
        raise InputError(f"run directory {run_dir}: no run.json in it; pass a directory that `atft train` wrote")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"run directory {run_dir}: run.json is not JSON ({error}); the run must be made again"
        ) from error
    missing = [name for name in ("key", "status") if not isinstance(header, dict) or name not in header]
    if missing:
        raise InputError(f"run directory {run_dir}: run.json has no {missing[0]!r}; the run must be made again")
    return located(header, run_dir)


def located(header: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """A run's header with the dataset and the graph that it names where they lie now.

    A relative path was given from the folder where the run was started: the working directory, or one above the run.
    As given, where none of these has the product that the run was made on.
    """
    return {**header} | {
        f"{what}_path": _located(header[f"{what}_path"], header.get(f"{what}_fingerprint"), run_dir)
        for what in ("dataset", "graph")
        if isinstance(header.get(f"{what}_path"), str)
    }


def _located(path: str, fingerprint: object, run_dir: Path) -> str:
    if Path(path).is_absolute():
        return path
    above = dict.fromkeys((*run_dir.absolute().parents, *Path(os.path.realpath(run_dir)).parents))
    for place in (path, *(str(folder / path) for folder in above)):
        with suppress(InputError, OSError, RuntimeError, ValueError):  # not there, not to be read, not a path
            if read_manifest(Path(place)).get("fingerprint") == fingerprint:
                return place
    return path


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


@contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Holds the run directory for one writer; the lock goes with the process, so a killed run leaves none behind."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("w") as handle:
        for _ in range(LOCK_ATTEMPTS):
            if _locked(handle, fcntl.LOCK_EX):
                break
            time.sleep(LOCK_PAUSE_S)
        else:
            raise InputError(f"run directory {run_dir}: another process is training this run; wait for it to end")
        yield


def is_held(run_dir: Path) -> bool:
    """Whether a process is writing the run: one that says `running` and is not held was killed."""
    lock = run_dir / ".lock"
    if not lock.exists():
        return False
    with lock.open() as handle:
        return not _locked(handle, fcntl.LOCK_SH)


def _locked(handle: IO[str], kind: int) -> bool:
    """Takes a lock of `kind` until the file is closed; False where another process holds one against it."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass
class RunRecord:
    """Writer of one run directory. Rows gather in memory and become one part per table at `close_epoch`."""

    run_dir: Path
    header: dict[str, Any]
    _rows: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {name: [] for name in TABLES})

    def update(self, **fields: Any) -> None:
        """Sets fields of `run.json`, atomically."""
        self.header.update(fields)
        write_json(self.run_dir / "run.json", self.header)

    def log(
        self,
        metric: str,
        value: float,
        *,
        epoch: int,
        step: int | None = None,
        split: str = "train",
        component: str = "",
        term: str = "",
    ) -> None:
        """One number. A value that is not finite is kept: that it was not is the finding."""
        self._rows["series"].append(
            {
                "step": step,
                "epoch": epoch,
                "split": split,
                "component": component,
                "term": term,
                "metric": metric,
                "value": float(value),
            }
        )

    def log_evaluation(self, rows: list[dict[str, Any]], daily: list[dict[str, Any]]) -> None:
        self._rows["evals"].extend(rows)
        self._rows["daily"].extend(daily)

    def close_epoch(self, epoch: int) -> None:
        """Writes the gathered rows as this epoch's parts and forgets them."""
        for name, schema in TABLES.items():
            write_parquet(
                self.run_dir / name / f"epoch_{epoch:03d}.parquet", pa.Table.from_pylist(self._rows[name], schema)
            )
            self._rows[name].clear()


class UnwrittenRecord(RunRecord):
    """The record of a process that does not lead: it takes what a record takes and leaves nothing."""

    def update(self, **fields: Any) -> None:
        self.header.update(fields)

    def close_epoch(self, epoch: int) -> None:  # noqa: ARG002
        for rows in self._rows.values():
            rows.clear()


def write_parquet(path: Path, table: pa.Table) -> None:
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def statistics_rows(
    statistics: Mapping[str, tuple[float | None, str, float | None]], **columns: Any
) -> list[dict[str, Any]]:
    """Rows of `evals` from `metric -> (value, unit, standard error)`; None and NaN become null."""
    return [
        columns | {"metric": metric, "unit": unit, "value": _finite(value), "se": _finite(se)}
        for metric, (value, unit, se) in statistics.items()
    ]


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
