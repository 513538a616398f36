"""Samples per second in training and scoring: `python -m bench.training.throughput DATASET GRAPH`.

Prints one JSON line per case. Each case is a run of two epochs by `atft train` in a fresh process; the second epoch
counts, the first warms up. A sample is a stock in a session. `samples_per_s` is measured over a training epoch as the
run records it: making blocks, forward, loss, backward, clipping, update, averaged weights. `scored_per_s` is measured
over the scoring of validation and test without gradients. `--wide GRAPH` adds the case that needs a graph of 20
neighbours. `--qlib PYTHON` adds qlib's GATs_ts, in an environment of its own (bench/features/requirements-qlib.txt).
Times hold for one machine on one day.

`--large DATASET GRAPH` instead runs the cases of a market whose panel should not have to fit into memory (`atft
synthesize --stocks 4150 --sessions 2500 --seed 3`, graph with `graph.universe=all`). They train one epoch, with the
panel in memory or in a memory map, under a hard limit of 8 GB of anonymous memory, which no file can back.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

CASES: dict[str, tuple[int, dict[str, object]]] = {
    "cpu, no graph": (1, {"model.graph": False}),
    "cpu": (1, {}),
    "cpu, hidden 64, window 60, 20 neighbours": (2, {"model.hidden_size": 64, "model.window_sessions": 60}),
}
"""By name: threads, and what differs from the preset `cpu`."""
WIDE = "cpu, hidden 64, window 60, 20 neighbours"

MARKET = {"train.universe": "all", "train.batch_size": 8 * 4150}
YEAR = MARKET | {
    "split.scheme": "dates",
    "split.train_start": "2030-10-01",
    "split.validation_start": "2032-01-05",
    "split.test_start": "2032-04-10",
}
LARGE: dict[str, tuple[int, dict[str, object]]] = {
    "large, in a map": (1, MARKET | {"train.panel": "map"}),
    "large, last year, in a map": (1, YEAR | {"train.panel": "map"}),
    "large, last year, in a map, 2 loaders": (1, YEAR | {"train.panel": "map", "train.loader_workers": 2}),
    "large, last year, in memory": (1, YEAR | {"train.panel": "memory"}),
    "large, last year, in memory, 2 loaders": (1, YEAR | {"train.panel": "memory", "train.loader_workers": 2}),
}
"""Each case loads the whole panel; all but the first train on its last year."""
LIMIT_BYTES = 8 * 2**30
"""Limit of the anonymous memory of a large case."""


def measured(name: str, dataset: Path, graph: Path) -> dict[str, Any]:
    """Trains one run; figures of its last epoch, and the process's peak memory, resident and its anonymous share."""
    large = name in LARGE
    threads, overrides = (LARGE if large else CASES)[name]
    epochs = 1 if large else 2
    settings = overrides | {"train.epochs": epochs, "evaluation.criterion_epoch": epochs}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "atft_pipeline.cli", "train", dataset, graph, run, "--preset", "cpu"]
        for field, value in settings.items():
            command += ["--set", f"{field}={json.dumps(value)}"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.DEVNULL,
            stderr=said,
            env=environment,
            preexec_fn=anonymous_memory_limited if large else None,
        )
        anonymous_kb = 0
        while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            anonymous = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
            anonymous_kb = max(anonymous_kb, int(anonymous[1]) if anonymous else 0)
            time.sleep(0.05)
        _, status, usage = ended
        if not (run / "verdict.json").exists():  # exit code 1 alone may mean that the criterion was not met
            said.seek(0)
            reason = said.read().strip().rpartition("\n")[2]
            return {"case": name, "exit_code": os.waitstatus_to_exitcode(status), "reason": reason}
        series = pq.read_table(run / "series").to_pylist()
    figures = {row["metric"]: row["value"] for row in series if row["epoch"] == epochs}
    return {
        "case": name,
        "threads": threads,
        "samples_per_s": round(figures["samples_per_s"]),
        "scored_per_s": round(figures["scored_per_s"]),
        "epoch_s": round(figures["epoch_s"], 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_gb": round(usage.ru_maxrss / 2**20, 2),
        "peak_anonymous_gb": round(anonymous_kb / 2**20, 2),
    }


def anonymous_memory_limited() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path, nargs="?")
    parser.add_argument("graph", type=Path, nargs="?")
    parser.add_argument("--wide", type=Path, help="graph of 20 neighbours")
    parser.add_argument("--qlib", type=Path, help="Python that has pyqlib and torch")
    parser.add_argument("--large", type=Path, nargs=2, metavar=("DATASET", "GRAPH"), help="of ten million rows")
    options = parser.parse_args()
    if options.large:
        for name in LARGE:
            print(json.dumps(measured(name, *options.large)), flush=True)
        return
    if options.graph is None:
        parser.error("give DATASET and GRAPH, or --large DATASET GRAPH")
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
