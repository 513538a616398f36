"""Fixtures shared by tests: one small market with runs on it that are trained once, and a Dagster instance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import suite
import torch
from atft_process import DATASET_SETTINGS, GRAPH_SETTINGS, SESSIONS, STOCKS, atft_here
from shared_folders import built_once, changed_folders
from training_runs import Data, settings, train_quietly

from atft_pipeline.config.schema import DatasetConfig, GraphConfig
from atft_pipeline.dataset.layout import write_dataset
from atft_pipeline.dataset.rows import build_dataset
from atft_pipeline.graph.store import build_graph_file
from atft_pipeline.market.synthetic import generate_market
from atft_pipeline.market.universe import build_prices

Trained = Callable[..., Path]


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(suite)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Data]:
    """Dataset and graph of 40 stocks x 330 sessions, the first 60 of them without a member."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: a second thread only waits
    folder = built_once(tmp_path_factory, "data", _make_data)
    yield Data(folder / "ml_dataset.parquet", folder / "graph.parquet")
    torch.set_num_threads(threads)


def _make_data(folder: Path) -> None:
    tables = generate_market(stocks=40, sessions=330, seed=1).tables
    adjusted = build_prices(tables, DatasetConfig())
    features, membership, manifest = build_dataset(
        adjusted.panel, adjusted.quarantine, tables, DatasetConfig(), {"path": "market", "tables": {}}
    )
    write_dataset(folder / "ml_dataset.parquet", features, membership, manifest)
    config = GraphConfig(lookback_sessions=60, neighbours=3, refresh_sessions=20, universe="all")
    build_graph_file(folder / "ml_dataset.parquet", folder / "graph.parquet", config)


@pytest.fixture(scope="session")
def trained(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """`trained(overrides)` is the directory of a finished run, trained once per session: read it, never write to it."""

    def run(overrides: dict[str, Any] | None = None) -> Path:
        name = hashlib.sha256(json.dumps(overrides or {}, sort_keys=True).encode()).hexdigest()[:16]
        config = settings(overrides)
        return built_once(tmp_path_factory, f"run-{name}", lambda at: train_quietly(config, data, at / "run")) / "run"

    return run


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with source, dataset and graph, for a working directory: copy it with `dagster_runs.copied`."""
    from dagster_runs import make_upstream  # seconds, which most tests need not wait for

    return built_once(tmp_path_factory, "upstream", make_upstream)


@pytest.fixture(scope="session")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source`, its dataset `d.parquet` and its graph `g.parquet`, all by the command: copy the folder to change it."""

    def build(folder: Path) -> None:
        source, dataset, graph = folder / "source", folder / "d.parquet", folder / "g.parquet"
        assert atft_here("market", source, "--stocks", STOCKS, "--sessions", SESSIONS) == 0
        assert atft_here("features", source, dataset, *DATASET_SETTINGS) == 0
        assert atft_here("graph", dataset, graph, *GRAPH_SETTINGS) == 0

    return built_once(tmp_path_factory, "products", build)


@pytest.fixture(scope="session", autouse=True)
def _shared_folders_stay_as_they_were_built() -> Iterator[None]:
    yield
    assert changed_folders() == []


@pytest.fixture
def instance() -> Iterator[Any]:
    """A Dagster instance that remembers nothing between tests."""
    import dagster as dg  # seconds, which most tests need not wait for

    with dg.DagsterInstance.ephemeral() as ephemeral:
        yield ephemeral
