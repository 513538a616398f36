"""What recording costs: `python -m bench.training.recording DATASET GRAPH [--preset cpu --epochs 3 --set FIELD=VALUE]`.

Trains in a temporary directory with one thread and adds up the processor time of all code that serves the record alone:
writing series, evaluations and their daily rows, gradient contributions, updates, activations, sampled inputs. Prints
one JSON line; `share` is relative to the time of training and scoring together.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from atft_pipeline.config.overrides import parse_assignments, with_overrides
from atft_pipeline.config.presets import preset
from atft_pipeline.runs.record import RunRecord
from atft_pipeline.training import trainer as training
from atft_pipeline.training.telemetry.activations import Activations
from atft_pipeline.training.telemetry.input_sample import InputSample
from atft_pipeline.training.train import train

RECORDING: tuple[tuple[Any, str], ...] = (
    (training.Trainer, "_log_gradient_contributions"),
    (Activations, "observe_states"),
    (Activations, "observe_attention"),
    (Activations, "figures"),
    (training, "log_update"),
    (training, "log_steps"),
    (training, "log_epoch"),
    (training, "log_machine"),
    (InputSample, "observe"),
    (InputSample, "write"),
    (RunRecord, "close_epoch"),
    (RunRecord, "log_evaluation"),
)
"""Functions that exist only for the record."""


def timed(owner: Any, name: str, spent: defaultdict[str, float]) -> None:
    original: Callable[..., Any] = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        started = time.process_time()
        try:
            return original(*arguments, **options)
        finally:
            spent[name] += time.process_time() - started

    setattr(owner, name, call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("graph", type=Path)
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    spent: defaultdict[str, float] = defaultdict(float)
    for owner, name in RECORDING:
        timed(owner, name, spent)
    whole: defaultdict[str, float] = defaultdict(float)
    timed(training.Trainer, "_run", whole)
    config = with_overrides(preset(options.preset), {"train.epochs": options.epochs} | parse_assignments(options.set))
    with tempfile.TemporaryDirectory() as folder:
        train(config, options.dataset, options.graph, Path(folder) / "run", device="cpu", log=lambda _: None)
    recording = sum(spent.values())
    line = {
        "preset": options.preset,
        "epochs": options.epochs,
        "training_cpu_s": round(whole["_run"] - recording, 2),
        "recording_cpu_s": round(recording, 3),
        "share": round(recording / (whole["_run"] - recording), 4),
        "by_part_s": {name: round(value, 3) for name, value in sorted(spent.items(), key=lambda pair: -pair[1])},
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
