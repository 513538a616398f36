"""A run small enough for tests, and what its directory says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from atft_pipeline.config import PipelineConfig, with_overrides
from atft_pipeline.lineage import read_table
from atft_pipeline.training import Outcome, train


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


def train_quietly(config: PipelineConfig, data: Data, run_dir: Path, **options: Any) -> Outcome:
    options = {"device": "cpu", "log": lambda _: None} | options
    return train(config, data.dataset, data.graph, run_dir, **options)


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
        "verdict": verdict(run_dir),
    }
