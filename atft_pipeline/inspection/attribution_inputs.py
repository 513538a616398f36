"""What attribution reads of a run's dataset: market return, sectors and turnover on the portfolio's sessions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from atft_pipeline.config.schema import EvaluationConfig
from atft_pipeline.config.slices import Slice
from atft_pipeline.dataset.layout import read_membership
from atft_pipeline.errors import InputError
from atft_pipeline.evaluation.evaluate import SPLITS
from atft_pipeline.evaluation.predictions_table import ScorePanel, score_panel
from atft_pipeline.evaluation.slices import marked_slice
from atft_pipeline.inspection.attribution import (
    TURNOVER_WINDOW_SESSIONS,
    Array,
    Attribution,
    Days,
    Missing,
    Surroundings,
    attribute,
    trailing_median,
)
from atft_pipeline.storage.artifact import Period, read_artifact, read_manifest, resolved

# From files ------------------------------------------------------------------------------------------------------


def attribute_predictions(
    predictions: Path, config: EvaluationConfig, *, dataset: Path, dataset_fingerprint: str | None
) -> dict[str, Attribution | Missing]:
    """Split -> attribution of horizon 1 in the configured slice, from a run's predictions and dataset.

    The dataset must still be the one the run was made on; its prices are found beside it by their fingerprint. An input
    that cannot be read, or that has changed since the run, is missing with its reason. Nothing is raised.
    """
    try:
        table = read_artifact(predictions)
    except InputError as error:
        return {split: Missing(str(error)) for split in SPLITS}
    universe = marked_slice(config.universe)
    panels = {split: _panel(table, split, universe) for split in SPLITS}
    scored = [panel.sessions for panel in panels.values() if isinstance(panel, ScorePanel)]
    ends: list[date] = [day for sessions in scored for day in sessions[[0, -1]].tolist()]
    context = _Context(dataset, dataset_fingerprint, (min(ends), max(ends)) if ends else None)
    return {
        split: panel if isinstance(panel, Missing) else _attributed(panel, context, config)
        for split, panel in panels.items()
    }


def _panel(table: pa.Table, split: str, universe: Slice | None) -> ScorePanel | Missing:
    try:
        panel = score_panel(table, score="score_1d", target="target_1d", split=split, universe=universe)
    except (InputError, pa.ArrowException) as error:
        return Missing(str(error))
    return panel if len(panel.sessions) else Missing(f"no stock of split {split!r} is in the slice that is judged")


def _attributed(panel: ScorePanel, context: _Context, config: EvaluationConfig) -> Attribution | Missing:
    try:
        return attribute(panel, context.around(panel.sessions, panel.codes), config)
    except (InputError, pa.ArrowException) as error:
        return Missing(str(error))


class _Context:
    """A run's dataset, at least for a period, and its prices, each read once. A missing input keeps its reason."""

    def __init__(self, dataset: Path, fingerprint: str | None, period: Period | None = None) -> None:
        self.missing: Missing | None = None
        self.turnover: pa.Table | Missing
        try:
            manifest = read_manifest(dataset, kind="ml_dataset")
            if manifest["fingerprint"] != fingerprint:
                made, now = (str(value or "unknown")[:12] for value in (fingerprint, manifest["fingerprint"]))
                raise InputError(f"{dataset} is now dataset {now}, the run was made on {made}")
            members = read_membership(dataset, ["Date", "Code", "is_investable", "Sector33Code"], period)
            targets = read_artifact(dataset, ["target_1d"], period)
            self.members = members.append_column("target_1d", targets.column("target_1d"))
        except (InputError, pa.ArrowException) as error:
            self.missing = Missing(str(error))
            return
        self.turnover = _turnover_values(dataset, manifest)

    def around(self, sessions: Days, codes: NDArray[Any]) -> Surroundings:
        if self.missing:
            return Surroundings(self.missing, self.missing, (), self.missing)
        cells = _Cells.of(self.members, sessions, codes)
        names, number = _sectors(self.members, cells)
        return Surroundings(
            market=_market(self.members, cells),
            sector=number if (number >= 0).any() else Missing("Sector33Code is null for every stock scored"),
            sector_names=names,
            median_turnover=self._median_turnover(sessions, codes),
        )

    def _median_turnover(self, sessions: Days, codes: NDArray[Any]) -> Array | Missing:
        if isinstance(self.turnover, Missing):
            return self.turnover
        quoted = np.unique(_days(self.turnover))
        first = max(int(np.searchsorted(quoted, sessions[0])) - TURNOVER_WINDOW_SESSIONS + 1, 0)
        window = quoted[first : int(np.searchsorted(quoted, sessions[-1], side="right"))]
        at = np.searchsorted(window, sessions)
        if len(window) == 0 or (window[np.minimum(at, len(window) - 1)] != sessions).any():
            return Missing("the prices beside the dataset lack sessions that were scored")
        quotes = _between(self.turnover, window[0], window[-1])
        cells = _Cells.of(quotes, window, codes)
        dense = np.full(cells.shape, np.nan)
        values = _floats(quotes.column("TurnoverValue"))
        dense[cells.session[cells.inside], cells.stock[cells.inside]] = values[cells.inside]
        if not np.isfinite(dense).any():
            return Missing("TurnoverValue is null for every stock scored")
        return trailing_median(dense)[at]


def _market(members: pa.Table, cells: _Cells) -> Array | Missing:
    """Mean `target_1d` of the investable stocks, scored or not: the targets are free of quarantined quotes."""
    target = _floats(members.column("target_1d"))
    used = (cells.session >= 0) & np.isfinite(target) & _flags(members.column("is_investable"))
    count = np.bincount(cells.session[used], minlength=cells.shape[0])
    total = np.bincount(cells.session[used], weights=target[used], minlength=cells.shape[0])
    if not count.any():
        return Missing("no investable stock has a target_1d in these sessions")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _sectors(members: pa.Table, cells: _Cells) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    coded = _encoded(members.column("Sector33Code"))
    number = pc.fill_null(coded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    dense = np.full(cells.shape, -1, np.int64)
    dense[cells.session[cells.inside], cells.stock[cells.inside]] = number[cells.inside]
    return tuple(coded.dictionary.to_pylist()), dense


def _turnover_values(dataset: Path, manifest: Mapping[str, Any]) -> pa.Table | Missing:
    """Date, Code and TurnoverValue of the prices that the dataset was made from; the dataset itself holds no quotes."""
    fingerprint = manifest.get("prices_fingerprint")
    if fingerprint is None:
        return Missing(f"{dataset} is one file and keeps no prices: no turnover value; build it as a folder of months")
    suffix = ".manifest.json"
    for file in sorted(resolved(dataset).parent.glob(f"*{suffix}")):
        artifact = file.with_name(file.name.removesuffix(suffix))
        try:
            if read_manifest(artifact, kind="prices")["fingerprint"] == fingerprint:
                return read_artifact(artifact, ["Date", "Code", "TurnoverValue"])
        except InputError:
            continue  # another artifact, or damaged prices: neither has the quotes
    return Missing(f"no readable prices {fingerprint[:12]} beside {dataset}: no turnover value")


@dataclass(frozen=True)
class _Cells:
    """Session and stock indices of a long table's rows in a panel; -1 outside it."""

    session: NDArray[np.int64]
    stock: NDArray[np.int64]
    shape: tuple[int, int]

    @classmethod
    def of(cls, table: pa.Table, sessions: Days, codes: NDArray[Any]) -> _Cells:
        coded = _encoded(table.column("Code"))
        stocks = _position(np.array(coded.dictionary.to_pylist(), dtype=np.str_), codes)
        return cls(_position(_days(table), sessions), stocks[coded.indices.to_numpy()], (len(sessions), len(codes)))

    @property
    def inside(self) -> NDArray[np.bool_]:
        return (self.session >= 0) & (self.stock >= 0)


def _position(values: NDArray[Any], among: NDArray[Any]) -> NDArray[np.int64]:
    """Index of each value in the ascending `among`, -1 where `among` lacks it."""
    if not len(among):
        return np.full(len(values), -1, np.int64)
    at = np.minimum(np.searchsorted(among, values), len(among) - 1)
    return np.where(among[at] == values, at, -1)


def _encoded(column: pa.ChunkedArray) -> pa.DictionaryArray:
    coded = pc.dictionary_encode(column.cast(pa.string())).combine_chunks()
    return coded.chunk(0) if isinstance(coded, pa.ChunkedArray) else coded


def _between(table: pa.Table, first: np.datetime64, last: np.datetime64) -> pa.Table:
    dates = table.column("Date").cast(pa.date32())
    since, until = (pa.scalar(end.item(), pa.date32()) for end in (first, last))
    return table.filter(pc.and_(pc.greater_equal(dates, since), pc.less_equal(dates, until)))


def _days(table: pa.Table) -> Days:
    return table.column("Date").to_numpy().astype("datetime64[D]")


def _floats(column: pa.ChunkedArray) -> Array:
    return pc.fill_null(column.cast(pa.float64()), math.nan).to_numpy()


def _flags(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    return pc.fill_null(column, False).to_numpy()
