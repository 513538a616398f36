"""The cross-sectional graph of the dataset's stocks."""

from typing import Any

import dagster as dg

from assets.metadata import as_dagster_failure, check_result, markdown_table, numeric_metadata
from atft_pipeline.config.overrides import to_dict
from atft_pipeline.graph.store import build_graph_file
from atft_pipeline.storage.artifact import read_manifest, sha256_of
from resources.compute import Compute
from resources.output_folders import OutputFolders


class GraphOverrides(dg.Config):
    overrides: dict[str, Any] = {}  # noqa: RUF012 - Dagster copies it
    """Fields of the graph section, e.g. {"graph.lookback_sessions": 60}."""


@dg.asset(
    name="stock_graph",
    group_name="features",
    deps=["ml_dataset"],
    kinds={"numpy"},
    description="k nearest neighbours by trailing correlation at each refresh session; nothing later is read.",
    check_specs=[
        dg.AssetCheckSpec(
            "belongs_to_dataset",
            asset="stock_graph",
            blocking=True,
            description="Built on the current dataset's fingerprint, with edges, and none before its first session.",
        )
    ],
)
def stock_graph(
    context: dg.AssetExecutionContext, config: GraphOverrides, store: OutputFolders, compute: Compute
) -> dg.MaterializeResult:
    with as_dagster_failure(context):
        dataset, data = store.current("ml_dataset", "stock_graph")
        settings, _ = compute.configuration(
            "stock_graph",
            sections=("graph",),
            embedded=store.is_embedded(data["source"]["path"]),
            overrides=config.overrides,
        )
        key = sha256_of({"dataset": data["fingerprint"], "config": to_dict(settings.graph)})
        path = store.product("stock_graph", key)
        build_graph_file(dataset, path, settings.graph, store.previous("stock_graph"))
        manifest = read_manifest(path, kind="stock_graph")
    problems = graph_problems(manifest, data)
    if not problems:
        store.publish("stock_graph", path)
    return dg.MaterializeResult(
        metadata={
            "path": str(path),
            "dataset_fingerprint": data["fingerprint"],
            **numeric_metadata({name: manifest[name] for name in ("refresh_dates", "edges", "mean_degree")}),
            "config": markdown_table([manifest["config"]]),
        },
        data_version=dg.DataVersion(manifest["fingerprint"]),
        check_results=[
            check_result(context, "belongs_to_dataset", problems, f"{manifest['edges']} edges on the current dataset")
        ],
    )


def graph_problems(graph: dict[str, Any], dataset: dict[str, Any]) -> list[str]:
    """Why this graph must not be trained on; empty where it may be."""
    problems = []
    if graph["dataset_fingerprint"] != dataset["fingerprint"]:
        problems.append("the graph was built on another dataset; materialize stock_graph again")
    if graph["edges"] == 0:
        problems.append(
            f"the graph has no edges: {graph['refresh_dates']} refresh dates over {dataset['sessions']} sessions"
            " found no two stocks with enough common history; lower graph.lookback_sessions or use a longer source"
        )
    return problems
