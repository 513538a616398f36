"""Markets, tasks and child processes of the diagnostics bench: the list of runs, and training two at a time."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from bench.diagnostics import planted_run
from bench.diagnostics.faults import FAULTS, Fault
from bench.harness import command

STOCKS, SESSIONS = 150, 500
AT_ONCE = 2
LOCKS: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
Settings = dict[str, object]


@dataclass(frozen=True)
class Market:
    """Arguments of the generator; `name` is its folder."""

    name: str
    arguments: dict[str, object]
    generate: str = ""
    """Id of the fault that changes the generator, or ""."""


def market(
    seed: int,
    strength: float = 1.0,
    tail_freedom: float = 5.0,
    hard: bool = False,
    generate: str = "",
    size: tuple[int, int] = (STOCKS, SESSIONS),
) -> Market:
    arguments: dict[str, object] = {
        "stocks": size[0], "sessions": size[1], "seed": seed, "strength": strength, "tail_freedom": tail_freedom,
        "hard": hard,
    }  # fmt: skip
    parts = [f"seed{seed}", f"strength{strength:g}", f"tails{tail_freedom:g}", "hard" if hard else "", generate]
    return Market("_".join(part for part in parts if part), arguments, generate)


@dataclass(frozen=True)
class Task:
    """One run: healthy, or with one or two faults."""

    name: str
    market: Market
    seed: int
    faults: tuple[str, ...] = ()
    settings: Settings = field(default_factory=dict)

    @property
    def causes(self) -> list[str]:
        return [FAULTS[fault].cause for fault in self.faults]


HEALTHY: dict[str, Settings] = {
    "base": {},
    "wide": {"model.hidden_size": 32, "train.optimizer.lr": 3e-4},
    "dropout": {"model.dropout": 0.1},
    "no_graph": {"model.graph": False},
    "no_norm": {"model.normalisation": "none"},
    "constant": {"train.schedule.name": "constant", "train.optimizer.lr": 3e-4},
    "plateau": {"train.schedule.name": "plateau", "train.schedule.patience": 2},
    "ic": {"train.loss.ic": 0.5},
    "sharpe": {"train.loss.sharpe": 0.1},
    "rank_ic": {"train.loss.rank_ic": 0.3, "train.loss.variance_penalty": 0.1},
    "slow": {"train.optimizer.lr": 3e-4},
    "long_window": {"model.window_sessions": 30, "model.encoder_layers": 2},
    "fan": {"model.normalisation": "fan"},
    "decay": {"train.optimizer.weight_decay": 0.01},
    "raw_weights": {"train.weight_ema": 0.0},
    "liquid": {"train.universe": "liquid", "evaluation.universe": "liquid"},
}
"""Settings of healthy runs."""


def markets_of(first: int) -> dict[str, Market]:
    """The markets of a set; their seeds count from `first`."""
    return {
        "strong": market(first),
        "heavy": market(first + 1, 0.8, 3.5),
        "low": market(first + 2, 0.6),
        "hard": market(first + 3, 1.0, 5.0, hard=True),
    }


DOUBLES: tuple[tuple[str, str], ...] = (
    ("frozen_at_other_run", "constant_scores_ranked"),
    ("maximum_over_history", "overfit"),
    ("cached_predictions", "lr_too_low"),
    ("sign_inverted", "unit_error"),
    ("look_ahead", "dead_units"),
    ("features_not_found", "lr_decayed_early"),
    ("sharpe_swallowed", "scheduler_never_steps"),
    ("zeros_reach_head", "slow_loader"),
)


def tasks(first: int) -> list[Task]:
    """Runs of one set: healthy ones, every fault on two markets, and pairs of faults. `first` decides all seeds."""
    by_kind = markets_of(first)
    all_tasks = [
        Task(f"{first}-healthy-{variant}-{kind}", by_kind[kind], first + number, settings=settings)
        for number, (variant, settings) in enumerate(HEALTHY.items())
        for kind in (("strong", "heavy")[number % 2], ("low", "hard")[number // 2 % 2])
    ]
    for number in (1, 2):
        usual_market = by_kind[("strong", "heavy")[(number - 1) % 2]]
        for fault in FAULTS.values():
            all_tasks.append(Task(f"{first}-{fault.id}-{number}", _market_of(fault, usual_market, first + 10 + number),
                              first + 50 + number, (fault.id,)))  # fmt: skip
    for pair in DOUBLES:
        all_tasks.append(Task(f"{first}-{'+'.join(pair)}", by_kind["strong"], first + 60, pair))
    return all_tasks


def _market_of(fault: Fault, usual: Market, seed: int) -> Market:
    if fault.generate:
        return market(seed, generate=fault.id)
    return market(seed, float(str(fault.market["strength"]))) if fault.market else usual


def twin_of(task: Task) -> Task:
    """The same run without its faults."""
    spoilt = task.market.generate or task.market.arguments["strength"] == 0.0
    clean_market = market(int(str(task.market.arguments["seed"]))) if spoilt else task.market
    return Task(f"twin-{clean_market.name}-{task.seed}", clean_market, task.seed, settings=task.settings)


def prepare(folder: Path, spec: Market) -> Path:
    """Folder with source, dataset and graph of a market; makes what is missing."""
    home = folder / "markets" / spec.name
    dataset, graph = home / "dataset.parquet", home / "graph.parquet"
    if not (home / "source").exists():
        home.mkdir(parents=True, exist_ok=True)
        child(planted_run.generate, {"out": str(home / "source"), "arguments": spec.arguments, "fault": spec.generate})
    if not graph.exists():
        command("features", home / "source", dataset)
        command("graph", dataset, graph, "--set", "graph.universe=all", "--set", "graph.lookback_sessions=60")
    return home


def make_run(folder: Path, task: Task) -> Path:
    """The run directory of the task; trains the run where it is missing. A failed child ends the bench."""
    prepare(folder, task.market)
    run_dir = folder / "runs" / task.name
    done = folder / "runs" / f"{task.name}.done"
    with LOCKS[task.name]:  # several plants share a twin
        if not done.exists():
            done.write_text(_trained(folder, task, run_dir))
    return run_dir


def _trained(folder: Path, task: Task, run_dir: Path) -> str:
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    other = None
    if any(FAULTS[fault].record for fault in task.faults):
        twin = Task(f"other-{task.market.name}", task.market, 1000)
        other = str(make_run(folder, twin))
    if task.faults and all(FAULTS[fault].only_record for fault in task.faults):
        # The training equals the twin's to the last bit, so a copy of the twin is changed instead.
        shutil.copytree(make_run(folder, twin_of(task)), run_dir, dirs_exist_ok=True)
        for fault in task.faults:
            FAULTS[fault].record(run_dir, Path(str(other)))  # type: ignore[misc]
        return ""
    content: dict[str, Any] = {
        "run": str(run_dir), "market": str(folder / "markets" / task.market.name), "faults": task.faults,
        "settings": {"train.seed": task.seed, **task.settings}, "other": other,
    }  # fmt: skip
    return child(planted_run.run, content)


def child(work: Callable[[dict[str, Any]], str], task: dict[str, Any]) -> str:
    """Calls `work` with the task in a process of its own; an error is raised here and ends the bench."""
    return _children().submit(work, task).result()


PRELOADED = (
    "atft_pipeline.training.train",
    "atft_pipeline.diagnostics.probes.run",
    # Modules that probes import when they run:
    "atft_pipeline.evaluation.baselines",
    "atft_pipeline.dataset.rows",
    "atft_pipeline.graph.kernels",
    "atft_pipeline.market.universe",
    "exchange_calendars",
    "numba",
    "pandera.polars",
    "sklearn.linear_model",
)


@cache
def _children() -> ProcessPoolExecutor:
    """A pool with one process per task, so that no change of a plant reaches the next task.

    Processes are forked from a server that has imported the modules. Otherwise imports would take a fifth of a run's
    time and half of a diagnosis'.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    before, threads = dict(os.environ), ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS")
    os.environ.update(dict.fromkeys(threads, "1"))
    try:
        children = ProcessPoolExecutor(AT_ONCE, context, max_tasks_per_child=1)
        children.submit(int).result()  # starts the server with this environment
    finally:
        os.environ.clear()
        os.environ.update(before)
    return children
