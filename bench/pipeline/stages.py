"""Wall time, processor time and peak memory of each stage on one source.

`python -m bench.pipeline.stages SOURCE WORK_DIR`

Runs the `atft` commands one after another in fresh processes and prints one JSON line per stage. The line of training
also has the run's evaluation. Times hold for one machine on one day; quote them with both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def measured(stage: str, *arguments: str) -> dict[str, Any]:
    """One `atft` command in its own process; `peak_rss_gb` is that process's largest resident size."""
    command = [sys.executable, "-m", "atft_pipeline.cli", *arguments, "--json"]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    line = {
        "stage": stage,
        "wall_s": round(time.perf_counter() - started, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_gb": round(usage.ru_maxrss / 2**20, 2),
        "exit_code": os.waitstatus_to_exitcode(status),
    }
    result = json.loads(printed) if printed else {}
    for name in ("rows", "stocks", "sessions", "live", "edges", "summary"):
        if name in result:
            line[name] = result[name]
    for split, figures in result.get("final", {}).items():
        for name in ("sharpe_daily", "sharpe_se", "sharpe_daily_net", "ic_mean", "rank_ic_mean"):
            line[f"{split}_{name}"] = figures.get(name)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    dataset, graph, run = (str(options.work_dir / name) for name in ("dataset.parquet", "graph.parquet", "run"))
    preset = ("--preset", options.preset)
    print(json.dumps(measured("features", "features", options.source, dataset, *preset)), flush=True)
    print(json.dumps(measured("graph", "graph", dataset, graph, *preset)), flush=True)
    epochs = ("--set", f"train.epochs={options.epochs}")
    print(json.dumps(measured("train", "train", dataset, graph, run, *preset, *epochs)), flush=True)


if __name__ == "__main__":
    main()
