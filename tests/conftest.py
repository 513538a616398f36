"""Fixtures shared by tests: one small market with runs on it that are trained once, and a Dagster instance."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import Data, settings, train_quietly

from atft_pipeline.config.schema import DatasetConfig, GraphConfig
from atft_pipeline.dataset.layout import write_dataset
from atft_pipeline.dataset.rows import build_dataset
from atft_pipeline.graph.store import build_graph_file
from atft_pipeline.market.synthetic import generate_market
from atft_pipeline.market.universe import build_prices

Trained = Callable[..., Path]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Data]:
    """Dataset and graph of 40 stocks x 330 sessions, the first 60 of them without a member."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: a second thread only waits
    folder = tmp_path_factory.mktemp("data")
    tables = generate_market(stocks=40, sessions=330, seed=1).tables
    adjusted = build_prices(tables, DatasetConfig())
    features, membership, manifest = build_dataset(
        adjusted.panel, adjusted.quarantine, tables, DatasetConfig(), {"path": "market", "tables": {}}
    )
    paths = Data(folder / "ml_dataset.parquet", folder / "graph.parquet")
    write_dataset(paths.dataset, features, membership, manifest)
    config = GraphConfig(lookback_sessions=60, neighbours=3, refresh_sessions=20, universe="all")
    build_graph_file(paths.dataset, paths.graph, config)
    yield paths
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def trained(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """`trained(overrides)` is the directory of a finished run, trained once per session: read it, never write to it."""
    runs: dict[str, Path] = {}

    def run(overrides: dict[str, Any] | None = None) -> Path:
        name = json.dumps(overrides or {}, sort_keys=True)
        if name not in runs:
            run_dir = tmp_path_factory.mktemp("runs") / "run"
            runs[name] = train_quietly(settings(overrides), data, run_dir).run_dir
        return runs[name]

    return run


@pytest.fixture
def instance() -> Iterator[Any]:
    """A Dagster instance that remembers nothing between tests."""
    import dagster as dg  # seconds, which most tests need not wait for

    with dg.DagsterInstance.ephemeral() as ephemeral:
        yield ephemeral
