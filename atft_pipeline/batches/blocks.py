"""Dense panel of a dataset, and the session blocks the model trains on.

Shapes: T sessions and N stocks of the panel, F features that have a value, H horizons; S target sessions and n stocks
of a block, R the model's receptive field, G refreshes of the graph, K neighbours of a stock at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from atft_pipeline.batches.panel_storage import Allocate, in_memory, left_to_the_cache
from atft_pipeline.config.schema import Slice
from atft_pipeline.errors import InputError
from atft_pipeline.graph.build import UNIVERSE_COLUMNS, StockGraph
from atft_pipeline.storage.product import KEYS, TARGETS, read_manifest, read_membership, readable, resolved

ROWS_PER_READ: int = 65_536
"""Rows of the dataset held beside the panel while it is filled: about 20 MB."""


@dataclass(frozen=True)
class Panel:
    """A dataset as dense arrays over all its sessions and the stocks that are in the universe at least once."""

    sessions: NDArray[np.datetime64]
    """[T] ascending."""
    codes: NDArray[np.str_]
    """[N] ascending."""
    feature_names: list[str]
    """[F] the live features; one without a value in the whole dataset would say nothing and cost as much."""
    features: NDArray[np.float32]
    """[T, N, F], NaN where missing or without a row."""
    targets: NDArray[np.float32]
    """[T, N, H] raw forward returns, NaN where missing."""
    member: NDArray[np.bool_]
    """[T, N] in the training universe at that session."""
    investable: NDArray[np.bool_]
    liquid: NDArray[np.bool_]
    manifest: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Of features and targets, all but a hundredth of it."""
        return self.features.nbytes + self.targets.nbytes


def load_panel(dataset: Path, universe: Slice, allocate: Allocate = in_memory) -> Panel:
    """The dataset at `dataset`, a parquet file or a folder of parts, for the stocks of `universe`.

    Read part by part, so that the peak is the panel itself plus one read. `allocate` decides where the cells lie.

    Raises InputError when a column is not where the manifest's registry has it, when the membership table has other
    rows than the features, when no feature is live, and when the universe is empty.
    """
    manifest = read_manifest(dataset, "ml_dataset")
    if not manifest["live_features"]:
        raise InputError(
            f"{dataset}: none of {len(manifest['features'])} features is live; give a longer price history"
        )
    if unknown := sorted(set(manifest["live_features"]) - set(manifest["features"])):
        raise InputError(f"{dataset}: its manifest calls {unknown[0]!r} live, which is no feature; build it again")
    names = [*manifest["live_features"], *TARGETS]
    membership = read_membership(dataset, [*KEYS, "is_investable", "is_liquid"])
    sessions, t = np.unique(membership["Date"].to_numpy().astype("datetime64[D]"), return_inverse=True)
    flags = {name: membership[name].to_numpy().astype(bool) for name in ("is_investable", "is_liquid")}
    in_universe = flags[UNIVERSE_COLUMNS[universe]]
    if not in_universe.any():
        raise InputError(
            f"{dataset}: no row of {len(in_universe)} is in the universe {universe!r}"
            f" ({UNIVERSE_COLUMNS[universe]}); give more history or set train.universe"
        )
    codes, column = _universe_codes(membership["Code"], in_universe)
    shape = (len(sessions), len(codes))
    row_to_cell = np.where(column >= 0, t * len(codes) + column, -1)

    cells_by_name = allocate((*shape, len(names)))
    cells_by_name.fill(np.nan)
    values = cells_by_name.reshape(-1, len(names))
    start = 0
    for rows in _read_rows(dataset, manifest, names, membership):
        cells = row_to_cell[start : start + len(rows)]
        values[cells[cells >= 0]] = rows[cells >= 0]
        start += len(rows)
    if start != membership.num_rows:
        raise InputError(f"{dataset}: {start} rows, its membership table has {membership.num_rows}; build it again")

    kept = row_to_cell >= 0
    dense = {name: np.zeros(shape, dtype=bool) for name in flags}
    for name, flag in flags.items():
        dense[name].reshape(-1)[row_to_cell[kept]] = flag[kept]
    return Panel(
        sessions=sessions,
        codes=codes,
        feature_names=manifest["live_features"],
        # Views of one array: a copy of the features would double the peak.
        features=cells_by_name[..., : -len(TARGETS)],
        targets=cells_by_name[..., -len(TARGETS) :],
        member=dense[UNIVERSE_COLUMNS[universe]],
        investable=dense["is_investable"],
        liquid=dense["is_liquid"],
        manifest=manifest,
    )


def _universe_codes(
    code: pa.ChunkedArray, in_universe: NDArray[np.bool_]
) -> tuple[NDArray[np.str_], NDArray[np.int64]]:
    """Codes in the universe at least once, ascending, and each row's position among them or -1."""
    encoded = code.combine_chunks().dictionary_encode()
    index = encoded.indices.to_numpy()
    distinct = np.array(encoded.dictionary.to_pylist(), dtype=np.str_)
    used = np.flatnonzero(np.bincount(index[in_universe], minlength=len(distinct)))
    used = used[np.argsort(distinct[used])]
    position = np.full(len(distinct), -1, dtype=np.int64)
    position[used] = np.arange(len(used))
    return distinct[used], position[index]


def _read_rows(
    dataset: Path, manifest: Mapping[str, Any], names: list[str], membership: pa.Table
) -> Iterator[NDArray[np.float32]]:
    """Columns `names` of the dataset in order `[rows, F + H]`, null as NaN; refuses other columns or other keys."""
    data = resolved(dataset)
    expected = [*KEYS, *manifest["features"], *TARGETS]
    start = 0
    for file in sorted(data.glob("*.parquet")) if data.is_dir() else [data]:
        with readable(file), pq.ParquetFile(file) as part:
            if part.schema_arrow.names != expected:
                raise InputError(_column_difference(file, expected, part.schema_arrow.names))
            for batch in part.iter_batches(batch_size=ROWS_PER_READ, columns=[*KEYS, *names]):
                keys = membership.select(list(KEYS)).slice(start, batch.num_rows)
                if not pa.Table.from_batches([batch]).select(list(KEYS)).cast(keys.schema).equals(keys):
                    raise InputError(f"{file}: its Date and Code are not the membership table's; build both again")
                start += batch.num_rows
                rows = np.empty((batch.num_rows, len(names)), dtype=np.float32)
                for j, name in enumerate(names):
                    column = batch.column(j + len(KEYS))
                    if not pa.types.is_floating(column.type):
                        raise InputError(f"{file}: column {name} is {column.type}, not a number; build it again")
                    rows[:, j] = column.to_numpy(zero_copy_only=False)
                if np.isinf(rows[:, -len(TARGETS) :]).any():
                    raise InputError(f"{file}: a target is infinite; build the dataset again")
                yield rows


def _column_difference(file: Path, expected: list[str], found: list[str]) -> str:
    place = next(
        (j for j, (want, have) in enumerate(zip(expected, found, strict=False)) if want != have),
        min(len(expected), len(found)),
    )
    want = repr(expected[place]) if place < len(expected) else "no further column"
    have = repr(found[place]) if place < len(found) else "no further column"
    return (
        f"{file}: expected the {len(expected)} columns of its manifest's registry, found {len(found)}: column"
        f" {place} is {have} instead of {want}; build the dataset again"
    )


@dataclass(frozen=True)
class Neighbours:
    """Edges as a padded table: whose state each stock reads. `known` is False where a stock has fewer than K."""

    place: Tensor
    """[..., n, K] integer position of the neighbour among the n stocks."""
    known: Tensor
    """[..., n, K] bool."""
    attributes: Tensor
    """[..., n, K, 3] float32 corr, same_sector, same_market."""

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Neighbours:
        """The table on `device`."""
        moved = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.place, self.known, self.attributes))
        return Neighbours(*moved)


@dataclass(frozen=True)
class Block:
    """S contiguous target sessions, the n stocks that are members at one of them, and the sessions before them."""

    session_index: Tensor
    """[S] int64 into the panel's sessions."""
    stock_index: Tensor
    """[n] int64 into the panel's codes, ascending."""
    x: Tensor
    """[n, S + R - 1, F] float32, warm-up sessions first, 0 where missing."""
    missing: Tensor
    """[n, S + R - 1, F] bool; True too for sessions before the panel's first."""
    member: Tensor
    """[n, S] bool."""
    target: Tensor
    """[n, S, H] float32 raw forward returns, NaN where missing."""
    neighbours: Neighbours
    """[S, n, K]; place and attributes are 0 where not known."""

    def part(self, start: int, stop: int) -> Block:
        """The block of its target sessions `start` to `stop`, exclusive, with all its stocks."""
        warm_up = self.x.shape[1] - self.member.shape[1]
        table = self.neighbours
        return Block(
            session_index=self.session_index[start:stop],
            stock_index=self.stock_index,
            x=self.x[:, start : stop + warm_up],
            missing=self.missing[:, start : stop + warm_up],
            member=self.member[:, start:stop],
            target=self.target[:, start:stop],
            neighbours=Neighbours(table.place[start:stop], table.known[start:stop], table.attributes[start:stop]),
        )


class BlockDataset:
    """Cuts blocks out of a panel that lies on `device` once.

    A session's graph is the newest refresh at or before it, restricted to the session's members; sessions before the
    first refresh have no edges. `graph` None gives blocks without edges.
    """

    def __init__(
        self, panel: Panel, graph: StockGraph | None, receptive_field: int, device: torch.device | str = "cpu"
    ) -> None:
        self.panel = panel
        self.receptive_field = receptive_field
        self.device = torch.device(device)
        self._features = torch.from_numpy(panel.features).to(self.device)
        self._targets = torch.from_numpy(panel.targets).to(self.device)
        self._member = torch.from_numpy(panel.member).to(self.device)
        self._members_at = panel.member.sum(axis=1)
        self._neighbours = neighbour_table(graph, panel.codes).to(self.device)
        refreshes = panel.sessions[:0] if graph is None else graph.refreshes
        newest = np.searchsorted(refreshes, panel.sessions, side="right") - 1
        self._refresh_at = torch.from_numpy(newest).to(self.device)

    def sessions_per_block(self, session_indices: NDArray[np.integer], batch_size: int) -> list[NDArray[np.int64]]:
        """`session_indices` cut into contiguous runs of at most `batch_size` member samples, at least one session.

        Sessions without a member are left out: there is nothing to score.
        """
        blocks: list[list[int]] = []
        samples = 0
        for session in np.sort(np.asarray(session_indices, dtype=np.int64)).tolist():
            members = int(self._members_at[session])
            if members == 0:
                continue
            samples += members
            if blocks and session == blocks[-1][-1] + 1 and samples <= batch_size:
                blocks[-1].append(session)
            else:
                blocks.append([session])
                samples = members
        return [np.array(block, dtype=np.int64) for block in blocks]

    def block(self, session_indices: NDArray[np.integer]) -> Block:
        """The block whose target sessions are the contiguous, ascending `session_indices: [S]`."""
        first, last = int(session_indices[0]), int(session_indices[-1])
        if last - first + 1 != len(session_indices):
            raise ValueError(f"a block's sessions are contiguous, found {session_indices}")
        member = self._member[first : last + 1]  # [S, N]
        stocks = member.any(dim=0).nonzero().squeeze(1)  # [n]
        begin = first - self.receptive_field + 1
        values = self._features[max(begin, 0) : last + 1].transpose(0, 1).index_select(0, stocks)
        values = functional.pad(values, (0, 0, max(-begin, 0), 0), value=torch.nan)  # [n, S+R-1, F]
        x = values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        block = Block(
            session_index=torch.arange(first, last + 1, device=self.device),
            stock_index=stocks,
            x=x,
            missing=x != values,  # four times as fast as asking for finite values, and NaN differs from everything
            member=member[:, stocks].T.contiguous(),
            target=self._targets[first : last + 1, stocks].transpose(0, 1).contiguous(),
            neighbours=self._block_neighbours(first, last, stocks),
        )
        left_to_the_cache(self.panel.features)
        return block

    def _block_neighbours(self, first: int, last: int, stocks: Tensor) -> Neighbours:
        """Of each session the edges between its members."""
        refresh = self._refresh_at[first : last + 1]  # [S]
        cells = (refresh[:, None], stocks)
        places = self._neighbours.place[cells].long()  # [S, n, K] in the panel
        member = self._member[first : last + 1]
        session = torch.arange(len(refresh), device=self.device)[:, None, None]
        known = self._neighbours.known[cells] & (refresh >= 0)[:, None, None]
        known &= member[session, places] & member[:, stocks, None]
        in_block = torch.zeros(len(self.panel.codes), dtype=torch.int64, device=self.device)
        in_block[stocks] = torch.arange(len(stocks), device=self.device)
        return Neighbours(
            place=in_block[places].masked_fill(~known, 0),
            known=known,
            attributes=self._neighbours.attributes[cells].masked_fill(~known[..., None], 0.0),
        )


def neighbour_table(graph: StockGraph | None, codes: NDArray[np.str_]) -> Neighbours:
    """The graph's edges as a table per refresh, `[G, N, K]` over `codes: [N]`; edges of other stocks are left out.

    `graph` None is one refresh without an edge. Neighbours stand as in the graph, the nearest first.
    """
    if graph is None or len(graph.refreshes) == 0:
        shape = (1, len(codes), 0)
        return Neighbours(torch.zeros(shape, dtype=torch.int32), torch.zeros(shape).bool(), torch.zeros(*shape, 3))
    place = np.searchsorted(codes, graph.codes).clip(max=len(codes) - 1)
    place = np.where(codes[place] == graph.codes, place, -1)
    refresh = np.repeat(np.arange(len(graph.refreshes)), np.diff(graph.offsets))
    kept = (place[graph.source] >= 0) & (place[graph.target] >= 0)
    row = (refresh * len(codes) + place[graph.target])[kept]
    order = np.argsort(row, kind="stable")
    row = row[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    shape = (len(graph.refreshes), len(codes), int(rank.max(initial=-1)) + 1)
    table, known = np.zeros(shape, np.int32), np.zeros(shape, bool)
    attributes = np.zeros((*shape, 3), np.float32)
    rows = shape[0] * shape[1]
    table.reshape(rows, shape[2])[row, rank] = place[graph.source][kept][order]
    known.reshape(rows, shape[2])[row, rank] = True
    attributes.reshape(rows, shape[2], 3)[row, rank] = graph.edge_attr[kept][order]
    return Neighbours(torch.from_numpy(table), torch.from_numpy(known), torch.from_numpy(attributes))
