"""The diagnostics bench's work in child processes: making a market, a run with its faults, the diagnosis of a run.

Each function takes one dict, so that the caller shows all of a task.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from atft_pipeline.config.overrides import with_overrides
from atft_pipeline.config.presets import quick
from atft_pipeline.diagnostics.diagnose import diagnose
from atft_pipeline.diagnostics.probes.run import PROBES, run_probes
from atft_pipeline.errors import RunFailure
from atft_pipeline.inspection.reader import open_record
from atft_pipeline.market.synthetic import generate_market, write_tables
from atft_pipeline.training.train import train
from atft_pipeline.training.trainer import Trainer
from bench.diagnostics.faults import FAULTS, Planted

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
    """Ends the training as a kill does: nothing is recorded."""


def generate(task: dict[str, Any]) -> str:
    """Writes a market's tables to folder `out`.

    task: `out`, the generator's `arguments`, and `fault`, the id of a fault in the generator or "".
    """
    plant = FAULTS[task["fault"]].generate if task["fault"] else None
    if plant is not None:
        plant()
    write_tables(generate_market(**task["arguments"]), Path(task["out"]))
    return ""


def run(task: dict[str, Any]) -> str:
    """Trains with faults, and returns the error that ended the training early, or "".

    task: directory `run`, folder `market` (source, dataset, graph), `settings`, `faults` (ids), and `other`, a healthy
    run of the same market for plants that need one.
    """
    torch.set_num_threads(1)
    said = ""
    faults = [FAULTS[name] for name in task["faults"]]
    market, run_dir = Path(task["market"]), Path(task["run"])
    dataset, graph = market / "dataset.parquet", market / "graph.parquet"
    settings = BASE | task["settings"]
    for fault in faults:
        settings |= fault.settings
    config = with_overrides(quick(), settings)
    if any(fault.data for fault in faults):
        own_data = run_dir.with_name(f"{run_dir.name}.data")
        shutil.rmtree(own_data, ignore_errors=True)
        shutil.copytree(market, own_data, symlinks=False, ignore=shutil.ignore_patterns("source"))
        dataset, graph = own_data / dataset.name, own_data / graph.name
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
    except (RunFailure, Planted) as error:  # any other error is a fault of the bench
        said = f"{run_dir.name}: {error}\n"
    for fault in faults:
        if fault.record:
            fault.record(run_dir, Path(task["other"]))
    return said


def half(config: Any, dataset: Path, graph: Path, run_dir: Path) -> None:
    """Trains the first half of the run and then stops it as a kill would."""
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


def diagnosed(task: dict[str, Any]) -> str:
    """Findings of `run` as JSON. All probes are run except the remedies, which do not change the ranking."""
    torch.set_num_threads(1)
    record = open_record(Path(task["run"]))
    run_probes(record, PROBES)
    record.connection.close()
    return json.dumps([asdict(finding) for finding in diagnose(Path(task["run"])).findings])
