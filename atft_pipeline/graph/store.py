"""The stock graph on disk: one partition per month; an update computes only the months whose inputs changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from atft_pipeline.config.overrides import to_dict
from atft_pipeline.config.schema import GraphConfig
from atft_pipeline.config.slices import SLICES
from atft_pipeline.errors import InputError
from atft_pipeline.graph.build import StockGraph, graph_at
from atft_pipeline.graph.membership import (
    MINIMUM_SESSIONS,
    Membership,
    Month,
    Rows,
    coded,
    months_of,
)
from atft_pipeline.storage.artifact import (
    read_artifact,
    read_manifest,
    replacing_artifact,
    resolved,
    sha256_of,
    write_manifest,
)
from atft_pipeline.storage.atomic import link

SCHEMA: pa.Schema = pa.schema(
    {"Date": pa.date32(), "source": pa.string(), "target": pa.string()}
    | dict.fromkeys(("corr", "same_sector", "same_market"), pa.float32())
)
COUNTS: tuple[str, ...] = ("refresh_dates", "edges", "targets")


def write_graph(path: Path, graph: StockGraph) -> None:
    """Writes the edges whole or not at all: one table where `path` ends in `.parquet`, else a folder of months."""
    with replacing_artifact(path) as temporary:
        if _is_one_file(path):
            _write_table(temporary, _table(graph))
            return
        temporary.mkdir()
        month_at = months_of(graph.refreshes)
        for month in np.unique(month_at):
            chosen = np.flatnonzero(month_at == month)
            _write_table(temporary / f"{month}.parquet", _table(_refreshes(graph, chosen[0], chosen[-1] + 1)))


def load_graph(path: Path) -> StockGraph:
    """The graph at `path`, a file or a folder of partitions. Raises InputError when a file or a column is missing."""
    return _graph_of(read_artifact(path, SCHEMA.names))


def content_sha256(graph: StockGraph) -> str:
    """Hash of the edges: days, codes with an edge, sources and targets as positions among these, and attributes."""
    occurs = np.zeros(len(graph.codes), dtype=bool)
    occurs[graph.source] = occurs[graph.target] = True
    position = (np.cumsum(occurs) - 1).astype(np.int32)
    digest = hashlib.sha256("\n".join(graph.codes[occurs].tolist()).encode())
    for values in (_dates(graph), position[graph.source], position[graph.target], graph.edge_attr):
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _is_one_file(path: Path) -> bool:
    return Path(path).suffix == ".parquet"


def _table(graph: StockGraph) -> pa.Table:
    codes = pa.array(graph.codes, pa.string())
    return pa.table(
        {
            "Date": pa.array(_dates(graph), pa.date32()),
            "source": pa.DictionaryArray.from_arrays(pa.array(graph.source), codes),
            "target": pa.DictionaryArray.from_arrays(pa.array(graph.target), codes),
            "corr": graph.edge_attr[:, 0],
            "same_sector": graph.edge_attr[:, 1],
            "same_market": graph.edge_attr[:, 2],
        }
    )


def _graph_of(table: pa.Table) -> StockGraph:
    dates = table["Date"].to_numpy().astype("datetime64[D]")
    refreshes, first = np.unique(dates, return_index=True)
    codes, positions = coded([table["source"], table["target"]])
    return StockGraph(
        refreshes=refreshes,
        codes=codes,
        offsets=np.append(first, len(dates)).astype(np.int64),
        source=positions[0],
        target=positions[1],
        edge_attr=np.column_stack([table[name].to_numpy().astype(np.float32) for name in SCHEMA.names[3:]]),
    )


def _dates(graph: StockGraph) -> NDArray[np.datetime64]:
    """Each edge's refresh day."""
    return np.repeat(graph.refreshes, np.diff(graph.offsets)).astype("datetime64[D]")


def _refreshes(graph: StockGraph, start: int, stop: int) -> StockGraph:
    """The refreshes `start:stop` of a graph, as views."""
    rows = slice(graph.offsets[start], graph.offsets[stop])
    return StockGraph(
        refreshes=graph.refreshes[start:stop],
        codes=graph.codes,
        offsets=graph.offsets[start : stop + 1] - graph.offsets[start],
        source=graph.source[rows],
        target=graph.target[rows],
        edge_attr=graph.edge_attr[rows],
    )


def _write_table(file: Path, table: pa.Table) -> None:
    # Without arrow's own schema a reader sees plain strings, as the table's contract requires.
    pq.write_table(table, file, compression="zstd", store_schema=False)


# --- from a dataset on disk ---------------------------------------------------------------------------------


def build_graph_file(
    dataset: Path,
    out: Path,
    config: GraphConfig,
    previous: Path | None = None,
    *,
    advance: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Builds the graph of the dataset at `dataset`, writes it and its manifest to `out`, and returns the manifest.

    previous: an earlier graph, possibly at `out` itself. Where dataset, `previous` and `out` are by month, a month with
    unchanged inputs is linked from it, and a month that grew keeps its unchanged first refreshes. Only the inputs of
    the other refreshes are read. The manifest names `months_computed` and `months_reused`. advance: called with the
    months computed so far and those to compute.

    Raises InputError when the dataset has too few sessions for a graph, or nothing in the universe.
    """
    made_from = read_manifest(dataset, "ml_dataset")
    earlier = _Earlier.at(previous)
    rows = Rows.of(dataset, made_from, config)
    planned = rows.months()
    if not planned:
        raise InputError(
            f"{dataset}: {len(rows.sessions)} sessions are fewer than the sessions needed for a graph"
            f" ({min(MINIMUM_SESSIONS, config.lookback_sessions)}); give a longer price history"
        )
    by_month = not _is_one_file(out)
    reused = [month for month in planned if by_month and earlier.has(month)]
    computed = [month for month in planned if month not in reused]
    membership = rows.read(computed)
    if not reused and not membership.member.any():
        raise InputError(
            f"{dataset}: no row has {SLICES[config.universe]}, the graph's universe is empty; give more"
            f" history or set graph.universe"
        )
    if by_month:
        with replacing_artifact(out) as folder:
            folder.mkdir()
            partitions = {month.name: earlier.link(month, folder) for month in reused}
            for done, month in enumerate(computed, start=1):
                partitions[month.name] = _compute_partition(rows, membership, month, earlier, folder)
                advance("graph", done, len(computed))
        counts = [partitions[month.name] for month in planned]
    else:
        graph = graph_at(membership, [rows.local(membership, w) for month in planned for w in month.windows], config)
        write_graph(out, graph)
        partitions, counts = {}, [_counts(graph)]
    refresh_dates, edges, targets = (sum(count[name] for count in counts) for name in COUNTS)
    manifest = {
        "kind": "stock_graph",
        "fingerprint": sha256_of({"dataset": made_from["fingerprint"], "config": to_dict(config)}),
        "dataset_fingerprint": made_from["fingerprint"],
        "source": made_from["source"],
        "config": to_dict(config),
        "refresh_dates": refresh_dates,
        "edges": edges,
        "mean_degree": edges / max(targets, 1),
        "months_computed": [month.name for month in computed],
        "months_reused": [month.name for month in reused],
    }
    if by_month:
        manifest["parts"] = {month.name: partitions[month.name] for month in planned}
    write_manifest(out, manifest)
    return manifest


@dataclass(frozen=True)
class _Earlier:
    """An earlier graph whose partitions may be reused; it is empty where there is none."""

    folder: Path
    parts: Mapping[str, Mapping[str, Any]]

    @classmethod
    def at(cls, path: Path | None) -> _Earlier:
        """Raises InputError when there is no stock graph at `path`."""
        if path is None:
            return cls(Path(), {})
        return cls(resolved(path), read_manifest(path, "stock_graph").get("parts", {}))

    def has(self, month: Month) -> bool:
        """Whether the earlier graph has a partition of this month from the same inputs."""
        same = month.inputs is not None and self.parts.get(month.name, {}).get("inputs") == month.inputs
        return same and self._file(month).is_file()

    def link(self, month: Month, folder: Path) -> dict[str, Any]:
        """Links the month's partition into `folder` and returns its entry in the manifest."""
        link(self._file(month), folder / self._file(month).name)
        return dict(self.parts[month.name])

    def first_refreshes(self, month: Month, digests: Mapping[str, str]) -> tuple[int, list[pa.Table]]:
        """How many of the month's first refreshes have unchanged digests, and their rows."""
        before = self.parts.get(month.name, {}).get("refreshes", {})
        unchanged = list(takewhile(lambda day: before.get(day) == digests[day], digests))
        if not unchanged or not self._file(month).is_file():
            return 0, []
        table = read_artifact(self._file(month), SCHEMA.names)
        last = pa.scalar(date.fromisoformat(unchanged[-1]), pa.date32())
        return len(unchanged), [table.filter(pc.less_equal(table["Date"], last))]

    def _file(self, month: Month) -> Path:
        return self.folder / f"{month.name}.parquet"


def _compute_partition(
    rows: Rows, membership: Membership, month: Month, earlier: _Earlier, folder: Path
) -> dict[str, Any]:
    """Writes the month's partition to `folder` and returns its entry in the manifest."""
    digests = rows.refresh_digests(membership, month)
    kept, tables = earlier.first_refreshes(month, digests)
    new = graph_at(membership, [rows.local(membership, window) for window in month.windows[kept:]], rows.config)
    table = pa.concat_tables([*tables, _table(new).cast(SCHEMA)])
    _write_table(folder / f"{month.name}.parquet", table)
    graph = _graph_of(table)
    counts = _counts(graph) | {"refresh_dates": len(month.windows)}
    return {"sha256": content_sha256(graph), "inputs": month.inputs, "refreshes": digests, **counts}


def _counts(graph: StockGraph) -> dict[str, int]:
    """Refreshes, edges, and targets summed over the refreshes: sums over months then give the mean degree."""
    targets = [len(np.unique(graph.target[start:stop])) for start, stop in pairwise(graph.offsets.tolist())]
    return dict(zip(COUNTS, (len(graph.refreshes), len(graph.target), sum(targets)), strict=True))
