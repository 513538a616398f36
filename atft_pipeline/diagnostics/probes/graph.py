"""The graph, built again from the run's dataset."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from atft_pipeline.diagnostics.probes.figures import Figures
from atft_pipeline.diagnostics.run_inputs import RunInputs
from atft_pipeline.errors import InputError

SIGNALS = ("edges_unlike_dataset",)


def measure(inputs: RunInputs) -> Figures:
    """Builds the graph again from the run's dataset. `edges_unlike_dataset`: share of edges that only one has."""
    from atft_pipeline.graph.store import build_graph_file, load_graph

    if not inputs.config.model.graph:
        raise InputError("the run has no graph")
    path = inputs.graph
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "graph.parquet"
        build_graph_file(inputs.dataset, made, inputs.config.graph)
        ours, theirs = load_graph(made), load_graph(path)
    edges = [_edges(g) for g in (ours, theirs)]
    return {"edges_unlike_dataset": len(edges[0] ^ edges[1]) / max(len(edges[0] | edges[1]), 1)}


def _edges(of: Any) -> set[tuple[Any, ...]]:
    refresh = np.repeat(of.refreshes.astype("datetime64[D]").astype(int), np.diff(of.offsets))
    return set(zip(refresh.tolist(), of.codes[of.source].tolist(), of.codes[of.target].tolist(), strict=True))
