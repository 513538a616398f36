"""A run before it starts: what decides its result, its key, and the directory that it may write to."""

from __future__ import annotations

import itertools
import os
import platform
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atft_pipeline.config.overrides import to_dict
from atft_pipeline.config.schema import GraphConfig, PipelineConfig
from atft_pipeline.errors import InputError
from atft_pipeline.runs.header import now, read_run
from atft_pipeline.runs.keys import config_key, run_key
from atft_pipeline.storage.artifact import read_manifest
from atft_pipeline.storage.code_version import code_revision
from atft_pipeline.training.distributed.process_group import SINGLE_PROCESS, ProcessGroup


def resolve_device(name: str, processes: ProcessGroup = SINGLE_PROCESS) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU. Each of several processes has its own device.

    Raises InputError for a device that this machine or this library does not have, and for one device for several
    processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind == "cuda" and processes.size > 1:
        if index:
            raise InputError(f"device: {name} is one device for {processes.size} processes; use cuda, auto or cpu")
        name, index = f"cuda:{processes.local_rank}", str(processes.local_rank)
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise InputError(f"device: expected auto, cpu or cuda, found {name!r}")
    if kind == "cuda" and int(index or 0) >= (devices := torch.cuda.device_count()):
        raise InputError(f"device: {name} was asked for and this machine has {devices or 'no'} CUDA devices; use cpu")
    return torch.device(name)


@dataclass(frozen=True)
class Plan:
    """What decides the result of a run, and the key that follows from it."""

    config: PipelineConfig
    dataset: Path
    graph: Path
    dataset_manifest: dict[str, Any]
    graph_manifest: dict[str, Any]
    processes: int = 1

    @cached_property
    def key(self) -> str:
        return run_key(
            self.config,
            dataset_fingerprint=self.dataset_manifest["fingerprint"],
            graph_fingerprint=self.graph_manifest["fingerprint"] if self.config.model.graph else None,
            processes=self.processes,
        )


def plan_run(config: PipelineConfig, dataset: Path, graph: Path, processes: int = 1) -> Plan:
    """The plan of a run: configuration, dataset, graph, and the number of processes.

    The sections `dataset` and `graph` become those that the files were made with: they describe data, and training
    cannot change them. Raises InputError when the graph was built on another dataset, when the criterion reads stocks
    that the model never scores, and when the history is shorter than a window of the model.
    """
    data = read_manifest(dataset, kind="ml_dataset")
    edges = read_manifest(graph, kind="stock_graph")
    if edges["dataset_fingerprint"] != data["fingerprint"]:
        raise InputError(
            f"graph {graph}: built on dataset {edges['dataset_fingerprint'][:12]}, but {dataset} is"
            f" {data['fingerprint'][:12]}; build the graph again from this dataset"
        )
    if config.evaluation.universe == "all" and config.train.universe == "liquid":
        raise InputError(
            "evaluation.universe: 'all' has stocks that a model of train.universe 'liquid' never scores; set both to"
            " 'all', or evaluation.universe to 'liquid'"
        )
    for window in ("window_sessions", "normalisation_window_sessions"):
        if data["sessions"] < getattr(config.model, window):
            raise InputError(
                f"{dataset}: {data['sessions']} sessions are fewer than the window of {getattr(config.model, window)};"
                f" give a longer price history or a smaller model.{window}"
            )
    used = replace(config, dataset=type(config.dataset)(**data["config"]), graph=GraphConfig(**edges["config"]))
    return Plan(used, dataset, graph, data, edges, processes)


def resolve_run_dir(run_dir: Path, key: str, *, force: bool) -> Path:
    """The directory to write to: `run_dir`; with `force` and a finished run in it, the next attempt beside it.

    An unfinished attempt of this key is resumed. Nothing is written here. Raises InputError when `run_dir` is a file,
    holds something else, or holds another run.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"run directory {run_dir}: is a file; choose another directory")
    if not (run_dir / "run.json").exists():
        if run_dir.is_dir() and not all(_is_of_a_starting_run(path.name) for path in run_dir.iterdir()):
            raise InputError(f"run directory {run_dir}: not empty and not a run; choose another directory")
        return run_dir
    header = read_run(run_dir)
    if header["key"] != key:
        raise InputError(
            f"run directory {run_dir}: holds run {header['key']} of another configuration, code, dataset or number of"
            f" processes (this one is {key}); choose another directory"
        )
    if not force or header["status"] != "finished":
        return run_dir
    attempts = (run_dir.with_name(f"{run_dir.name}-attempt{n}") for n in itertools.count(2))
    return next(path for path in attempts if not path.exists() or _is_unfinished(path, key))


def _is_of_a_starting_run(name: str) -> bool:
    """Whether a run that was killed before its first `run.json` may have left a file of this name."""
    return name == ".lock" or name.startswith(".run.json.")


def _is_unfinished(run_dir: Path, key: str) -> bool:
    if not (run_dir / "run.json").exists():
        return False
    header = read_run(run_dir)
    return bool(header["key"] == key and header["status"] != "finished")


def run_header(plan: Plan, run_dir: Path, device: torch.device, overrides: dict[str, Any]) -> dict[str, Any]:
    """The content of `run.json` when a run starts."""
    data = plan.dataset_manifest
    return {
        "name": run_dir.name,
        "key": plan.key,
        "config": to_dict(plan.config),
        "config_key": config_key(plan.config),
        "overrides": overrides,
        "code_revision": code_revision("run"),
        "dataset_fingerprint": data["fingerprint"],
        "graph_fingerprint": plan.graph_manifest["fingerprint"],
        "registry_fingerprint": data["registry_fingerprint"],
        "dataset_path": str(plan.dataset),
        "graph_path": str(plan.graph),
        "market": data["market"],
        "execution": data["execution"],
        "days_per_year": data["days_per_year"],
        "seed": plan.config.train.seed,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "processes": plan.processes,
        "pid": os.getpid(),
        "started": now(),
        "ended": None,
        "status": "running",
        "reason": None,
        "epochs_planned": plan.config.train.epochs,
        "epochs_done": 0,
        "features": len(data["features"]),
        "live_features": len(data["live_features"]),
        "dataset_warnings": data["warnings"],
    }
