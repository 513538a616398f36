"""Samples per second in training of qlib's own GATs_ts, for bench/training/throughput.py; runs in qlib's environment.

It uses qlib's class, optimizer and training epoch unchanged: GRU of two layers, hidden 64, on daily batches in memory.
Its data loader is left out, which favours it. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version

import torch
from qlib.contrib.model.pytorch_gats_ts import GATs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("stocks", 418), ("features", 20), ("window", 20), ("days", 20), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = GATs(d_feat=options.features, seed=0)
    days = [torch.randn(1, options.stocks, options.window, options.features + 1) for _ in range(options.days)]
    model.train_epoch(days[:2])
    started = time.perf_counter()
    model.train_epoch(days)
    seconds = time.perf_counter() - started
    case = f"pyqlib {version('pyqlib')} GATs_ts, hidden 64, window {options.window}, {options.features} features"
    samples = options.stocks * options.days
    print(json.dumps({"case": case, "threads": options.threads, "samples_per_s": round(samples / seconds)}))


if __name__ == "__main__":
    main()
