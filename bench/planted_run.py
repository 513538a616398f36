"""One run with one fault planted, in a process of its own: `python bench/planted_run.py '{"run": ..., ...}'`.

The argument is a JSON object: `run` (directory to write), `market` (folder with source, dataset and graph of a market),
`faults` (ids of faults.FAULTS), `settings`, and `other` (a healthy run of the same market, for plants that
need one). The diagnosis happens elsewhere.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from faults import FAULTS, Planted

from atft_pipeline.config import with_overrides
from atft_pipeline.errors import RunFailure
from atft_pipeline.presets import quick
from atft_pipeline.training import Trainer, train

BASE: dict[str, object] = {
    "train.universe": "all",
    "evaluation.universe": "all",
    "model.hidden_size": 16,
    "model.window_sessions": 20,
    "model.normalisation_window_sessions": 10,
    "model.dropout": 0.0,
    "train.batch_size": 4800,
    "train.epochs": 24,
    "train.optimizer.lr": 5e-4,
    "train.optimizer.weight_decay": 2.0,
}
"""What differs from the preset `quick`: blocks of 32 sessions of 150 stocks."""
HALF = 12


class Killed(BaseException):
    """Ends the training process as a kill does: nothing is recorded."""


def run(task: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    faults = [FAULTS[name] for name in task["faults"]]
    market, run_dir = Path(task["market"]), Path(task["run"])
    dataset, graph = market / "dataset.parquet", market / "graph.parquet"
    settings = BASE | task["settings"]
    for fault in faults:
        settings |= fault.settings
    config = with_overrides(quick(), settings)
    if any(fault.data for fault in faults):
        own = run_dir.with_name(f"{run_dir.name}.data")
        shutil.rmtree(own, ignore_errors=True)
        shutil.copytree(market, own, symlinks=False, ignore=shutil.ignore_patterns("source"))
        dataset, graph = own / dataset.name, own / graph.name
    for fault in faults:
        if fault.data:
            fault.data(dataset, graph)
    if any(fault.resumed for fault in faults):
        half(config, dataset, graph, run_dir)
    for fault in faults:
        if fault.code:
            fault.code()
    try:
        train(config, dataset, graph, run_dir, device="cpu", log=lambda _: None)
    except (RunFailure, Planted) as error:  # anything else is a fault of the bench
        print(f"{run_dir.name}: {error}", file=sys.stderr)
    for fault in faults:
        if fault.record:
            fault.record(run_dir, Path(task["other"]))


def half(config: Any, dataset: Path, graph: Path, run_dir: Path) -> None:
    """The first half of the run, whose process then dies without a word."""
    original = Trainer._epoch

    def epoch(self: Trainer, number: int) -> None:
        if number > HALF:
            raise Killed
        original(self, number)

    Trainer._epoch = epoch  # type: ignore[method-assign]
    try:
        train(config, dataset, graph, run_dir, device="cpu", log=lambda _: None)
    except Killed:
        Trainer._epoch = original  # type: ignore[method-assign]


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
