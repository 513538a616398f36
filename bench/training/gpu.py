"""50 epochs of the preset `production` on one GPU: `python -m bench.training.gpu`, one JSON line.

4,000 stocks x 1,220 sessions x 82 features, hidden 256, window 60, bf16-mixed, validation every epoch. Random walks and
random features are written as a dataset first (that time is not counted) and trained by the same call as `atft train`.
The bench needs numpy, pyarrow and torch only.

The line also has the work of an epoch and the machine's ceilings, both measured. Work: floating point operations by
PyTorch's own counter, and bytes as if every operation read its inputs and wrote its outputs once. Ceilings: a bf16
product of 8192 x 8192 matrices, and a copy of 1 GB. `expected_s` is the time that the work needs at the slower of the
two ceilings; `--ceilings 790e12 4.0e12` computes it for another machine, without training. `--profile FILE` writes the
operations of a few steps by device time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from atft_pipeline.config.overrides import to_dict, with_overrides
from atft_pipeline.config.presets import preset
from atft_pipeline.config.schema import HORIZONS, PipelineConfig
from atft_pipeline.dataset.layout import MEMBERSHIP_COLUMNS, write_dataset
from atft_pipeline.dataset.targets import forward_return
from atft_pipeline.graph.build import StockGraph
from atft_pipeline.graph.store import write_graph
from atft_pipeline.runs.record import RunRecord
from atft_pipeline.runs.tables import read_table
from atft_pipeline.storage.artifact import write_manifest
from atft_pipeline.training.judging.scoring import to_device
from atft_pipeline.training.plan import plan_run, resolve_device
from atft_pipeline.training.train import train
from atft_pipeline.training.trainer import Trainer

FEATURES = 82


def random_dataset(path: Path, stocks: int, sessions: int) -> None:
    """Writes a dataset of independent random walks and features; the targets are the walks' forward returns."""
    rng = np.random.default_rng(0)
    names = [f"feature_{f:02}" for f in range(FEATURES - 2)] + ["returns_1d", "returns_5d"]
    days = [date(2010, 1, 4) + timedelta(days=t) for t in range(sessions)]
    returns = 0.02 * rng.standard_normal((sessions, stocks))
    close = 1000.0 * np.exp(np.cumsum(returns, axis=0))
    keys = {
        "Date": pa.array(np.repeat(np.array(days, "datetime64[D]"), stocks), pa.date32()),
        "Code": pa.array([f"{10_000 + n}" for n in range(stocks)] * sessions),
    }
    rows = sessions * stocks
    features = {name: rng.standard_normal(rows, np.float32) for name in names}
    for h in HORIZONS:
        target = forward_return(close, close, h, "next_open").reshape(-1)
        features[f"target_{h}d"] = pa.array(target.astype(np.float32), from_pandas=True)
    always = np.ones(rows, bool)
    prices = {"return_1d": np.expm1(returns).reshape(-1), "Open": close.reshape(-1), "Close": close.reshape(-1)}
    members = dict.fromkeys(("is_traded", "is_investable", "is_liquid"), always) | prices
    members |= dict.fromkeys(("Sector33Code", "MarketCode"), pa.array(["0"] * rows))
    config = PipelineConfig()
    manifest = {
        "kind": "ml_dataset",
        "fingerprint": f"random-{stocks}-{sessions}",
        "registry_fingerprint": "random",
        "features": names,
        "live_features": names,
        "config": to_dict(config.dataset),
        "source": {"path": "random"},
        "market": "tokyo",
        "days_per_year": 245,
        "execution": "next_open",
        "sessions": sessions,
        "warnings": [],
    }
    membership = pa.table({**keys, **members}).select(list(MEMBERSHIP_COLUMNS))
    write_dataset(path, pa.table({**keys, **features}), membership, manifest)


def random_graph(path: Path, dataset: Path, stocks: int, sessions: int, config: PipelineConfig) -> None:
    """Writes a graph with `neighbours` random neighbours of each stock at every refresh."""
    rng = np.random.default_rng(1)
    neighbours = min(config.graph.neighbours, stocks - 1)
    refreshes = np.datetime64("2010-01-04") + np.arange(0, sessions, config.graph.refresh_sessions)
    edges = stocks * neighbours
    step = 1 + np.stack([rng.permutation(stocks - 1)[:neighbours] for _ in refreshes])  # [G, K]
    target = np.repeat(np.arange(stocks, dtype=np.int32), neighbours)
    source = (target + step[:, None, :].repeat(stocks, axis=1).reshape(len(refreshes), -1)) % stocks
    graph = StockGraph(
        refreshes=refreshes,
        codes=np.array([f"{10_000 + n}" for n in range(stocks)]),
        offsets=np.arange(len(refreshes) + 1, dtype=np.int64) * edges,
        source=source.reshape(-1).astype(np.int32),
        target=np.tile(target, len(refreshes)),
        edge_attr=rng.random((edges * len(refreshes), 3), np.float32),
    )
    write_graph(path, graph)
    fingerprint = json.loads(dataset.with_name(f"{dataset.name}.manifest.json").read_text())["fingerprint"]
    write_manifest(
        path,
        {
            "kind": "stock_graph",
            "fingerprint": f"random-{neighbours}",
            "dataset_fingerprint": fingerprint,
            "config": to_dict(config.graph),
        },
    )


class BytesCounter(TorchDispatchMode):
    """Counts the bytes of all tensors that operations take and return, except views."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
            self.total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


def work(trainer: Trainer) -> dict[str, float]:
    """Operations and bytes of an epoch of training and of validation, from one block of each."""
    settings = trainer.config.train
    train = trainer.data.sessions_per_block(trainer.split.train, settings.batch_size)
    validation = trainer.data.sessions_per_block(trainer.split.validation, settings.batch_size)
    totals = {"flops": 0.0, "bytes": 0.0}
    for blocks, learns in ((train, True), (validation, False)):
        block = to_device(trainer.data.block(blocks[0]), trainer.device)
        with FlopCounterMode(display=False) as flops, BytesCounter() as moved, torch.set_grad_enabled(learns):
            with trainer._autocast():
                scores = trainer.model(block)
            if learns:
                trainer.loss(scores, block.target, block.member, 1).total.backward()
        trainer.optimizer.zero_grad(set_to_none=True)
        totals["flops"] += flops.get_total_flops() * len(blocks)
        totals["bytes"] += moved.total * len(blocks)
    return totals


def ceilings(device: torch.device) -> tuple[float, float]:
    """Operations per second of a bf16 product, and bytes per second of a copy (read and written)."""
    n, size = (8192, 2**30) if device.type == "cuda" else (1024, 2**27)
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    source = torch.empty(size // 4, device=device).normal_()
    target = torch.empty_like(source)
    return 2.0 * n**3 / _seconds(lambda: a @ a, device), 2.0 * size / _seconds(lambda: target.copy_(source), device)


def _seconds(call: Any, device: torch.device, repetitions: int = 20) -> float:
    def synchronised() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    call()
    started = synchronised()
    for _ in range(repetitions):
        call()
    return (synchronised() - started) / repetitions


@contextmanager
def utilisation(device: torch.device) -> Iterator[list[float]]:
    """Samples the device's utilisation five times a second; no samples where NVIDIA's management library is absent."""
    samples: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            try:
                samples.append(torch.cuda.utilization(device) / 100)
            except ModuleNotFoundError:
                return

    watcher = threading.Thread(target=watch, daemon=True)
    if device.type == "cuda":
        watcher.start()
    yield samples
    done.set()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--stocks", type=int, default=4000)
    parser.add_argument("--sessions", type=int, default=1220)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--ceilings", type=float, nargs=2, metavar=("FLOPS", "BYTES"))
    parser.add_argument("--profile", type=Path)
    options = parser.parse_args()
    device = resolve_device(options.device)
    changes = {name: json.loads(value) for name, value in (part.split("=", 1) for part in options.set)}
    fixed = {"split.scheme": "fraction", "train.epochs": options.epochs, "evaluation.criterion_epoch": options.epochs}
    config = with_overrides(preset("production"), fixed | changes)
    with tempfile.TemporaryDirectory() as folder:
        dataset, graph, run = (Path(folder) / name for name in ("dataset", "graph", "run"))
        random_dataset(dataset, options.stocks, options.sessions)
        random_graph(graph, dataset, options.stocks, options.sessions, config)
        trainer = Trainer(plan_run(config, dataset, graph), RunRecord(Path(folder), {}), device, print)
        epoch = work(trainer)
        flops_per_s, bytes_per_s = options.ceilings or ceilings(device)
        at_ceilings = options.epochs * np.array([epoch["flops"] / flops_per_s, epoch["bytes"] / bytes_per_s])
        line: dict[str, Any] = {
            "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
            "epoch_tflop": epoch["flops"] / 1e12,
            "epoch_gb": epoch["bytes"] / 1e9,
            "ceiling_tflop_per_s": flops_per_s / 1e12,
            "ceiling_gb_per_s": bytes_per_s / 1e9,
            "expected_s": round(float(at_ceilings.max()), 1),
        }
        if options.profile is not None:
            options.profile.write_text(profile(trainer))
        del trainer
        if not options.ceilings:
            with utilisation(device) as samples:
                started = time.perf_counter()
                train(config, dataset, graph, run, device=options.device, log=lambda _: None)
                seconds = time.perf_counter() - started
            line |= measured(run, seconds, at_ceilings, samples)
        print(json.dumps(line))


def measured(run: Path, seconds: float, at_ceilings: Any, samples: list[float]) -> dict[str, Any]:
    """Of a finished run: its seconds, those of its epochs, their shares at the ceilings, and the median utilisation."""
    rows = read_table(run, "series").to_pylist()
    epochs = sum(row["value"] for row in rows if row["metric"] in ("epoch_s", "validation_s"))
    memory = [row["value"] for row in rows if row["metric"] == "gpu_memory_bytes"]
    return {
        "wall_s": round(seconds, 1),
        "epochs_s": round(epochs, 1),
        "share_of_matrix_ceiling": at_ceilings[0] / epochs,
        "share_of_bandwidth_ceiling": at_ceilings[1] / epochs,
        "utilisation": float(np.median(samples)) if samples else None,
        "gpu_memory_gb": max(memory) / 1e9 if memory else None,
    }


def profile(trainer: Trainer) -> str:
    """The operations of three training steps, by time on the device."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    blocks = trainer.data.sessions_per_block(trainer.split.train, trainer.config.train.batch_size)[:3]
    with torch.profiler.profile(activities=activities) as profiler:
        for sessions in blocks:
            trainer.try_block(sessions)
    order = "self_cuda_time_total" if trainer.device.type == "cuda" else "self_cpu_time_total"
    return str(profiler.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=60))


if __name__ == "__main__":
    main()
