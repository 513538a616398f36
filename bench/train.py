"""Samples per second in training and scoring: `python bench/train.py DATASET GRAPH`, one JSON line per case.

Each case is a run of two epochs by `atft train` in a fresh process; the second epoch counts, the first warms up. A
sample is a stock in a session. `samples_per_s` is a training epoch as the run records it: blocks made, forward, loss,
backward, clipping, update, averaged weights. `scored_per_s` is the scoring of validation and test without gradients.
`--wide GRAPH` adds the case that needs a graph of 20 neighbours, `--qlib PYTHON` qlib's GATs_ts in the same run (an
environment of its own: bench/requirements-qlib.txt). Times are of one machine on one day.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

CASES: dict[str, tuple[int, dict[str, object]]] = {
    "cpu, no graph": (1, {"model.graph": False}),
    "cpu": (1, {}),
    "cpu, hidden 64, window 60, 20 neighbours": (2, {"model.hidden_size": 64, "model.window_sessions": 60}),
}
"""Threads, and what differs from the preset `cpu`, by name."""
WIDE = "cpu, hidden 64, window 60, 20 neighbours"


def measured(name: str, dataset: Path, graph: Path) -> dict[str, Any]:
    """One run of two epochs; the figures of the second, and the process's largest resident size."""
    threads, overrides = CASES[name]
    settings = overrides | {"train.epochs": 2, "evaluation.criterion_epoch": 2}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "atft_pipeline.cli", "train", dataset, graph, run, "--preset", "cpu"]
        for field, value in settings.items():
            command += ["--set", f"{field}={json.dumps(value)}"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code not in (0, 1):  # 1: trained, and the criterion not met
            return {"case": name, "exit_code": code}
        series = pq.read_table(run / "series").to_pylist()
    figures = {row["metric"]: row["value"] for row in series if row["epoch"] == 2}
    return {
        "case": name,
        "threads": threads,
        "samples_per_s": round(figures["samples_per_s"]),
        "scored_per_s": round(figures["scored_per_s"]),
        "epoch_s": round(figures["epoch_s"], 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_gb": round(usage.ru_maxrss / 2**20, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("graph", type=Path)
    parser.add_argument("--wide", type=Path, help="graph of 20 neighbours")
    parser.add_argument("--qlib", type=Path, help="Python that has pyqlib and torch")
    options = parser.parse_args()
    for name in CASES:
        graph = options.wide if name == WIDE else options.graph
        if graph is not None:
            print(json.dumps(measured(name, options.dataset, graph)), flush=True)
    if options.qlib is not None:
        for threads, features in ((1, 20), (2, 20), (1, 82)):
            arguments = ["--threads", threads, "--features", features]
            subprocess.run(
                list(map(str, [options.qlib, Path(__file__).with_name("qlib_gats.py"), *arguments])), check=True
            )


if __name__ == "__main__":
    main()
