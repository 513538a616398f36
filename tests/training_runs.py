"""A run that is small enough for tests, and readers of its directory."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from atft_pipeline.config.overrides import from_dict, with_overrides
from atft_pipeline.config.schema import HORIZONS, PipelineConfig
from atft_pipeline.dataset.splits import make_split
from atft_pipeline.runs.record import RunRecord
from atft_pipeline.runs.tables import read_table
from atft_pipeline.storage.artifact import read_manifest
from atft_pipeline.training.judging.scoring import weights_hash
from atft_pipeline.training.losses import CompositeLoss
from atft_pipeline.training.plan import plan_run, run_header
from atft_pipeline.training.train import TrainingResult, train
from atft_pipeline.training.trainer import Trainer

CPU = torch.device("cpu")

Columns = dict[str, NDArray[Any]]
Sessions = NDArray[np.datetime64]


class Data(NamedTuple):
    dataset: Path
    graph: Path


TINY: dict[str, Any] = {
    "model.hidden_size": 8,
    "model.window_sessions": 5,
    "model.normalisation_window_sessions": 5,
    "train.epochs": 3,
    "train.batch_size": 40 * 20,
    "train.universe": "all",
    "evaluation.criterion_epoch": 2,
}

MEASURED_ON_THE_CLOCK = {"epoch_s", "validation_s", "loader_wait_s", "samples_per_s", "scored_per_s", "peak_rss_bytes"}


def settings(overrides: dict[str, Any] | None = None) -> PipelineConfig:
    return with_overrides(PipelineConfig(), TINY | (overrides or {}))


def trainer_of(data: Data, run_dir: Path, **overrides: Any) -> Trainer:
    plan = plan_run(settings(overrides), data.dataset, data.graph)
    return Trainer(plan, RunRecord(run_dir, run_header(plan, run_dir, CPU, {})), CPU, lambda _: None)


def train_quietly(config: PipelineConfig, data: Data, run_dir: Path, **options: Any) -> TrainingResult:
    options = {"device": "cpu", "log": lambda _: None} | options
    return train(config, data.dataset, data.graph, run_dir, **options)


# Runs that are stopped, poisoned or collapsed -----------------------------------------------------------------------


class Stop(Exception):
    """Stands for whatever ends a process."""


def stop_in_training_step(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Raises `error` in the fourth step of epoch 2."""
    calls = itertools.count()
    step = Trainer._step

    def stopping(self, block, epoch, **options):
        if epoch == 2 and next(calls) == 3:
            raise error
        return step(self, block, epoch, **options)

    monkeypatch.setattr(Trainer, "_step", stopping)


def train_until(
    stop: Callable[[pytest.MonkeyPatch, BaseException], None],
    error: BaseException,
    config: PipelineConfig,
    data: Data,
    run_dir: Path,
    **options: Any,
) -> None:
    """Trains until `stop` raises `error`."""
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, error)
        with pytest.raises(type(error)):
            train_quietly(config, data, run_dir, **options)


def poisoned(
    monkeypatch: pytest.MonkeyPatch, poison: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> dict[str, Any]:
    """Passes the loss of step 3 of epoch 2 through `poison`; notes the weights of that moment."""
    weights: dict[str, Any] = {}
    loss, init = CompositeLoss.__call__, Trainer.__init__
    calls = itertools.count()

    def spied(self, *arguments):
        init(self, *arguments)
        weights["trainer"] = self

    def poisoning(self, scores, target, member, epoch, **options):
        terms = loss(self, scores, target, member, epoch, **options)
        if epoch == 2 and scores.requires_grad and next(calls) == 2:
            weights["before"] = weights_hash(weights["trainer"].model)
            return terms._replace(total=poison(terms.total, scores))
        return terms

    monkeypatch.setattr(Trainer, "__init__", spied)
    monkeypatch.setattr(CompositeLoss, "__call__", poisoning)
    return weights


COLLAPSED = {
    "train.epochs": 4,
    "train.optimizer.lr": 0.0,
    "train.guard.patience": 2,
    "evaluation.criterion_epoch": 3,
}
"""Settings of a run whose head is re-drawn, where its predictions are constant."""


# What a run directory says -----------------------------------------------------------------------------------------


def header(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "run.json").read_text())


def verdict(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "verdict.json").read_text())


def validity(run_dir: Path) -> dict[str, bool | None]:
    return {item["name"]: item["passed"] for item in verdict(run_dir)["validity"]}


def series(run_dir: Path, metric: str, **where: Any) -> dict[int, float]:
    """Epoch -> value of the per-epoch rows."""
    return {
        row["epoch"]: row["value"]
        for row in read_table(run_dir, "series").to_pylist()
        if row["metric"] == metric and row["step"] is None and all(row[k] == v for k, v in where.items())
    }


def evals(run_dir: Path, metric: str, split: str = "validation", universe: str = "liquid") -> dict[int, float | None]:
    return {
        row["epoch"]: row["value"]
        for row in read_table(run_dir, "evals").to_pylist()
        if (row["metric"], row["split"], row["slice"]) == (metric, split, universe)
    }


def hashes(run_dir: Path, column: str = "weights_hash") -> dict[int, str]:
    rows = read_table(run_dir, "evals").to_pylist()
    return {row["epoch"]: row[column] for row in rows if row["split"] == "validation"}


def record(run_dir: Path) -> dict[str, Any]:
    """Everything a run leaves that must not depend on when or how often it was started."""
    rows = read_table(run_dir, "series").to_pylist()
    return {
        "series": [row for row in rows if row["metric"] not in MEASURED_ON_THE_CLOCK],
        "evals": read_table(run_dir, "evals").to_pylist(),
        "daily": read_table(run_dir, "daily").to_pylist(),
        "predictions": {p.name: p.read_bytes() for p in (run_dir / "predictions").glob("*.parquet")},
        "checkpoints": sorted(p.name for p in (run_dir / "checkpoints").glob("*.pt")),
        "verdict": judged_without_crashes(run_dir),
    }


def judged_without_crashes(run_dir: Path) -> dict[str, Any]:
    """The verdict without its milestone `no_crash`, which tells an uninterrupted run from one that was resumed."""
    content = verdict(run_dir)
    milestones = [item for item in content["milestones"] if item["name"] != "no_crash"]
    warnings = [warning for warning in content["warnings"] if not warning.startswith("milestone no_crash:")]
    return content | {"milestones": milestones, "warnings": warnings}


# Runs to be spoilt -----------------------------------------------------------------------------------------------


class SplitSessions(NamedTuple):
    train: Sessions
    validation: Sessions
    test: Sessions


def split_sessions(run_dir: Path) -> SplitSessions:
    """The dates of each split of a run."""
    run = header(run_dir)
    sessions = np.array(read_manifest(Path(run["dataset_path"]))["session_dates"], "datetime64[D]")
    split = make_split(sessions, from_dict(run["config"]).split)
    return SplitSessions(*(sessions[getattr(split, name)] for name in SplitSessions._fields))


def newest_predictions(run_dir: Path) -> Path:
    return max((run_dir / "predictions").glob("epoch_*.parquet"))


def change_predictions(run_dir: Path, change: Callable[[Columns], Columns]) -> None:
    """Replaces the validation rows of the newest predictions by what `change` makes of their columns."""
    path = newest_predictions(run_dir)
    table = pq.read_table(path)
    is_validation = np.array(table["split"].to_pylist()) == "validation"
    rows = table.filter(pa.array(is_validation))
    changed = change({name: rows[name].to_numpy() for name in rows.column_names})
    columns = [pa.array(changed[field.name], field.type, from_pandas=False) for field in table.schema]
    replaced = pa.Table.from_arrays(columns, schema=table.schema)
    pq.write_table(pa.concat_tables([replaced, table.filter(pa.array(~is_validation))]), path)


def with_scores(change: Callable[[NDArray[Any]], NDArray[Any]]) -> Callable[[Path], None]:
    """`change` applied to the scores of every horizon."""
    names = [f"score_{horizon}d" for horizon in HORIZONS]
    return lambda run_dir: change_predictions(run_dir, lambda rows: rows | {name: change(rows[name]) for name in names})


def of_other_sessions(sessions: Sessions) -> Callable[[Columns], Columns]:
    """The rows, as if they were of `sessions`."""

    def change(rows: Columns) -> Columns:
        place = np.unique(rows["Date"], return_inverse=True)[1]
        kept = place < len(sessions)
        moved = rows | {"Date": sessions[np.minimum(place, len(sessions) - 1)]}
        return {name: values[kept] for name, values in moved.items()}

    return change


def without_inputs(run_dir: Path, leave_out: Callable[[dict[str, Any]], object]) -> None:
    """Leaves out the rows of `inputs.parquet` for which `leave_out` is true."""
    path = run_dir / "inputs.parquet"
    table = pq.read_table(path)
    pq.write_table(table.filter(pa.array([not leave_out(row) for row in table.to_pylist()])), path)


def exchange_inputs(run_dir: Path, one: str, other: str, day: object = None) -> None:
    """Each of two inputs gets the figures of the other, in the session `day` or in all."""
    renamed = {one: other, other: one}
    change_inputs(
        run_dir, lambda row: {"name": renamed.get(row["name"], row["name"])} if day in (None, row["date"]) else {}
    )


def change_inputs(run_dir: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Updates every row of `inputs.parquet` that has a value by what `change` makes of it."""
    path = run_dir / "inputs.parquet"
    table = pq.read_table(path)
    rows = [row | change(row) if row["present"] else row for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
