"""The writer of a run directory: `run.json`, and one partition per table and epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from atft_pipeline.runs.tables import TABLES
from atft_pipeline.storage.atomic import replacing, write_json
from atft_pipeline.storage.json_values import finite_or_none


@dataclass
class RunRecord:
    """Writer of one run directory. Rows gather in memory; `close_epoch` writes them as one partition per table."""

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
        """Adds one number to `series`. A value that is not finite is kept as evidence."""
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
        """Adds rows to `evals` and `daily`."""
        self._rows["evals"].extend(rows)
        self._rows["daily"].extend(daily)

    def close_epoch(self, epoch: int) -> None:
        """Writes the gathered rows as this epoch's partitions and forgets them."""
        for name, schema in TABLES.items():
            write_parquet(
                self.run_dir / name / f"epoch_{epoch:03d}.parquet", pa.Table.from_pylist(self._rows[name], schema)
            )
            self._rows[name].clear()


class NullRecord(RunRecord):
    """The record of a process that is not the leader: it accepts every call and writes nothing."""

    def update(self, **fields: Any) -> None:
        self.header.update(fields)

    def close_epoch(self, epoch: int) -> None:  # noqa: ARG002
        for rows in self._rows.values():
            rows.clear()


def write_parquet(path: Path, table: pa.Table) -> None:
    """Writes `table` to `path`, atomically."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def statistics_rows(
    statistics: Mapping[str, tuple[float | None, str, float | None]], **columns: Any
) -> list[dict[str, Any]]:
    """Rows of `evals` from `metric -> (value, unit, standard error)`; None and NaN become null."""
    return [
        columns | {"metric": metric, "unit": unit, "value": finite_or_none(value), "se": finite_or_none(se)}
        for metric, (value, unit, se) in statistics.items()
    ]
