"""A whole run directory for the diagnosis: run.json, verdict.json, predictions, and the tables in DuckDB.

A file that cannot be read raises nothing and is named in `missing`: a killed run leaves torn files, and it needs a
diagnosis most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from atft_pipeline.config.slices import DEFAULT_SLICE
from atft_pipeline.errors import InputError
from atft_pipeline.runs.documents import read_document
from atft_pipeline.runs.header import located
from atft_pipeline.runs.lock import is_held
from atft_pipeline.runs.paths import UnreadableFile, files_until, first_line, part_epoch, require_inside
from atft_pipeline.runs.state import RUNNING, run_state
from atft_pipeline.runs.tables import TABLES, read_part

KEYS: dict[str, str] = {
    "series": "step, epoch, split, component, term, metric",
    "evals": "epoch, split, slice, metric",
    "daily": "epoch, split, slice, date",
}
"""Columns that identify a row. Of two rows with the same key (an epoch repeated after a restart) the one in the later
partition counts."""

EpochRows = dict[tuple[str, str], list[tuple[str, str, int, float]]]
"""(metric, term) -> (split, component, epoch, value) of the per-epoch rows whose value is finite. They are kept apart
because nearly all rows are of steps, and nearly all questions are about epochs."""

Curve = dict[int, float]
"""Epoch -> value, ascending, NaN and null left out."""


@dataclass(frozen=True)
class Record:
    """The record of one run. `missing` names every file that was expected and could not be used, and why.

    `is_past`: the record as it stood at the end of an earlier epoch.
    """

    run_dir: Path
    run: dict[str, Any]
    verdict: dict[str, Any]
    predictions: dict[int, Path]
    missing: tuple[str, ...]
    connection: duckdb.DuckDBPyConnection
    epoch_rows: EpochRows
    is_past: bool = False

    def rows(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        return self.connection.execute(query, list(parameters)).fetchall()

    def scalar(self, query: str, *parameters: object) -> float | None:
        rows = self.rows(query, *parameters)
        return None if not rows or rows[0][0] is None else float(rows[0][0])

    def config(self, dotted: str) -> Any:
        """A field of the run's configuration; None where run.json does not have it."""
        value: Any = self.run.get("config")
        for name in dotted.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def number(self, dotted: str, default: float) -> float:
        """A number of the configuration; `default` where it is absent or no number, as in a run of another version."""
        return as_number(self.config(dotted), default)

    @property
    def phases(self) -> list[dict[str, Any]]:
        """The loss phases of the configuration that have weights."""
        phases = self.config("train.loss.phases")
        return [p for p in phases if _section(p, "weights")] if isinstance(phases, list) else []

    @property
    def criterion(self) -> dict[str, Any]:
        """The criterion in the verdict; empty before there is one."""
        return _section(self.verdict, "criterion")

    def curve(self, metric: str, *, split: str | None = None, component: str | None = None, term: str = "") -> Curve:
        """A per-epoch series; `split` and `component` None accept any."""
        by_epoch = {
            epoch: value
            for its_split, its_component, epoch, value in self.epoch_rows.get((metric, term), ())
            if split in (None, its_split) and component in (None, its_component)
        }
        return dict(sorted(by_epoch.items()))

    def components(self, metric: str) -> list[str]:
        components = {row[1] for (name, _), rows in self.epoch_rows.items() if name == metric for row in rows}
        return sorted(str(component) for component in components if component)

    def evaluation(self, metric: str, split: str = "validation") -> dict[int, tuple[float, float | None]]:
        """Epoch -> (value, standard error or None) of a statistic in the criterion's slice."""
        rows = self.rows(
            """SELECT epoch, value, se FROM evals
               WHERE metric = ? AND split = ? AND slice = ? AND isfinite(value) ORDER BY epoch""",
            metric,
            split,
            self.slice,
        )
        return {int(e): (float(v), None if se is None or math.isnan(se) else float(se)) for e, v, se in rows}

    @property
    def slice(self) -> str:
        """The slice that the criterion reads, as the verdict says, else the configuration."""
        recorded = self.criterion.get("slice") or self.config("evaluation.universe")
        return str(recorded) if recorded else DEFAULT_SLICE

    @property
    def criterion_epoch(self) -> int:
        return int(self.number("evaluation.criterion_epoch", 20))

    @property
    def criterion_sharpe(self) -> float:
        return self.number("evaluation.criterion_sharpe", 0.10)

    @property
    def is_locked(self) -> bool:
        """Whether a process is writing this run. For a past epoch: always True, the run went on after it."""
        return self.is_past or is_held(self.run_dir)

    @property
    def state(self) -> str | None:
        """The run's state (`run_state`); None where run.json does not say one. For a past epoch: `running`."""
        if self.run.get("status") is None:
            return None
        return RUNNING if self.is_past else run_state(self.run_dir, self.run)

    @property
    def epochs_done(self) -> int:
        """The newest epoch with a record. The run.json of a killed run may lag behind its tables."""
        recorded = self.scalar("SELECT max(epoch) FROM series WHERE step IS NULL")
        evaluated = self.scalar("SELECT max(epoch) FROM evals")
        return int(max(recorded or 0, evaluated or 0, as_number(self.run.get("epochs_done"), 0)))

    @property
    def epochs_planned(self) -> int | None:
        planned = as_number(self.run.get("epochs_planned"), self.number("train.epochs", 0))
        return int(planned) if planned > 0 else None


def open_record(run_dir: Path, until_epoch: int | None = None) -> Record:
    """Everything in `run_dir` that can be read, and no number from outside it.

    With `until_epoch`, the record as it stood at the end of that epoch: rows and predictions of later epochs are left
    out. Where the run has gone on since, the verdict is left out too, and run.json says `running`.

    Raises InputError where the folder does not exist or holds nothing readable of a run.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise InputError(f"{run_dir}: no such run directory; give the folder that holds run.json, series/ and evals/")
    missing: list[str] = []
    run = located(_read_json(run_dir, "run.json", missing), run_dir)
    is_past = until_epoch is not None and _newest_epoch(run_dir, run) > until_epoch
    if is_past:
        verdict = {}
        run |= {"status": "running", "ended": None, "reason": None, "epochs_done": until_epoch} if run else {}
        missing.append(f"verdict.json: later than epoch {until_epoch}")
    else:
        verdict = _read_json(run_dir, "verdict.json", missing)
    connection = duckdb.connect(":memory:", config={"threads": 1})
    rows = sum(_load_table(connection, run_dir, name, until_epoch, missing) for name in TABLES)
    predictions = _find_predictions(run_dir, until_epoch, missing)
    if not (run or verdict or rows or predictions):
        connection.close()
        raise InputError(
            f"{run_dir}: nothing readable of a run (no run.json, verdict.json, series/, evals/, daily/ or predictions/"
            " with content); give a directory written by `atft train` or by a training asset"
        )
    return Record(run_dir, run, verdict, predictions, tuple(missing), connection, _epoch_rows(connection), is_past)


def _epoch_rows(connection: duckdb.DuckDBPyConnection) -> EpochRows:
    by_curve: EpochRows = {}
    rows = connection.execute(
        """SELECT metric, coalesce(term, ''), split, component, epoch, value FROM series
           WHERE step IS NULL AND epoch IS NOT NULL AND isfinite(value)"""
    ).fetchall()
    for metric, term, split, component, epoch, value in rows:
        by_curve.setdefault((metric, term), []).append((split, component, int(epoch), float(value)))
    return by_curve


def _newest_epoch(run_dir: Path, run: dict[str, Any]) -> float:
    named = [part_epoch(path) or 0 for name in TABLES for path in (run_dir / name).glob("epoch_*.parquet")]
    return max([as_number(run.get("epochs_done"), 0), *named])


def as_number(value: object, default: float) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else default  # type: ignore[arg-type]


def _section(values: object, name: str) -> dict[str, Any]:
    section = values.get(name) if isinstance(values, dict) else None
    return section if isinstance(section, dict) else {}


def _read_json(run_dir: Path, name: str, missing: list[str]) -> dict[str, Any]:
    try:
        return read_document(run_dir, name)
    except UnreadableFile as error:
        missing.append(f"{name}: {error}")
        return {}


def _load_table(
    connection: duckdb.DuckDBPyConnection, run_dir: Path, name: str, until_epoch: int | None, missing: list[str]
) -> int:
    """Creates table `name` from its readable partitions; returns the number of rows."""
    parts = []
    paths = files_until(run_dir / name, "*.parquet", until_epoch)
    for number, path in enumerate(paths):
        try:
            part = read_part(path, name)
        except UnreadableFile as error:
            missing.append(f"{name}/{path.name}: {error}")
            continue
        parts.append(part.append_column("part", pa.repeat(pa.scalar(number, pa.int32()), part.num_rows)))
    if not paths:
        missing.append(f"{name}/: no parts written")
    schema = TABLES[name].append(pa.field("part", pa.int32()))
    loaded = pa.concat_tables(parts) if parts else schema.empty_table()
    if parts and not loaded.num_rows:
        missing.append(f"{name}/: parts without rows")
    floats = [field.name for field in schema if pa.types.is_floating(field.type)]
    figures = ["value"] if "value" in floats else floats
    if loaded.num_rows and not any(_has_finite(loaded[column]) for column in figures):
        missing.append(f"{name}/: {loaded.num_rows:,} rows without one finite value")
    connection.register("loaded", loaded)
    connection.execute(
        f"""CREATE TABLE {name} AS SELECT * EXCLUDE (part) FROM loaded
            WHERE coalesce(epoch <= ?, true)
            QUALIFY row_number() OVER (PARTITION BY {KEYS[name]} ORDER BY part DESC) = 1""",
        [until_epoch],
    )
    connection.unregister("loaded")
    return loaded.num_rows


def _has_finite(values: pa.ChunkedArray) -> bool:
    return bool(pc.any(pc.is_finite(values)).as_py())


def _find_predictions(run_dir: Path, until_epoch: int | None, missing: list[str]) -> dict[int, Path]:
    by_epoch: dict[int, Path] = {}
    for path in files_until(run_dir / "predictions", "epoch_*.parquet", until_epoch):
        epoch = part_epoch(path)
        try:
            require_inside(path, run_dir)
            pq.ParquetFile(path).close()
        except UnreadableFile as error:
            missing.append(f"predictions/{path.name}: {error}")
        except (OSError, pa.ArrowException) as error:
            missing.append(f"predictions/{path.name}: torn or unreadable ({first_line(error)})")
        else:
            if epoch is not None:
                by_epoch[epoch] = path
    if not by_epoch:
        missing.append("predictions/: none readable")
    return by_epoch


def read_scores(path: Path, horizons: Sequence[int]) -> pa.Table | None:
    """Scores and targets of a predictions file as float64, beside Date, Code, split and is_liquid.

    None where the file cannot be read, or a column is missing or of another type than its name says.
    """
    fields: list[tuple[str, pa.DataType]] = [("Date", pa.date32()), ("Code", pa.string()), ("split", pa.string())]
    fields += [("is_liquid", pa.bool_())]
    fields += [(f"{kind}_{h}d", pa.float64()) for kind in ("score", "target") for h in horizons]
    schema = pa.schema(fields)
    try:
        return pq.ParquetFile(path).read(columns=schema.names).select(schema.names).cast(schema)
    except (OSError, KeyError, pa.ArrowException):
        return None
