"""Builds `ml_dataset` on disk from the adjusted prices on disk, a span of months in memory at a time; an earlier
dataset is continued where something is new.

An artifact at PATH: `PATH/YYYY-MM.parquet` and `PATH.membership/YYYY-MM.parquet` as layout.py reads them,
`PATH.statistics/YYYY-MM.npz` of each month's values, `PATH.memory/YYYY-MM.npz` after the months from which the features
can be continued, and the manifest. A month's features stand while the prices and tables up to it are the same; its
targets while the prices of the sessions in which they leave are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from atft_pipeline.config.overrides import to_dict
from atft_pipeline.config.schema import EXECUTION_DELAY_SESSIONS, HORIZONS, DatasetConfig
from atft_pipeline.dataset.layout import TARGETS
from atft_pipeline.dataset.rows import (
    MASK_TARGET,
    OPTIONAL_TABLES,
    DatasetRows,
    content_digest,
    dataset_manifest,
    dataset_rows,
    forward_returns,
    nullable,
    partition_record,
    with_drift,
)
from atft_pipeline.features.compute import OVERLAP_SESSIONS, FeatureState, build_features
from atft_pipeline.features.registry import FEATURE_COUNT, FEATURE_NAMES
from atft_pipeline.features.statistics import Statistics
from atft_pipeline.features.vocabulary.averages import Average
from atft_pipeline.market.contracts import ContractReport, check_ml_dataset, joined_report
from atft_pipeline.market.price_panel import PricePanel
from atft_pipeline.market.price_store import KIND as PRICES_KIND
from atft_pipeline.market.price_store import read_frame, read_months, read_quarantine
from atft_pipeline.market.sources import RAW_TABLES
from atft_pipeline.storage.artifact import (
    manifest_path,
    read_manifest,
    read_partition,
    sha256_of,
    write_manifest,
    write_partition,
)
from atft_pipeline.storage.atomic import load_arrays, save_arrays
from atft_pipeline.storage.code_version import code_revision
from atft_pipeline.storage.monthly import (
    Days,
    Earlier,
    PartitionWriter,
    beside,
    month_digests,
    partition_path,
    sessions_by_month,
    spans,
    writing_partitions,
)

KIND = "ml_dataset"
CELLS_AT_A_TIME = 2_000_000
"""Sessions times stocks of a span of months: 82 features of it are 650 MB."""
MEMBERSHIP, STATISTICS, STATE = "membership", "statistics", "memory"
SIDECARS = (MEMBERSHIP, STATISTICS, STATE)
"""What is written beside the dataset."""
THREADS = 2


@dataclass(frozen=True)
class _Prices:
    """The prices that a dataset is made from."""

    path: Path
    manifest: Mapping[str, Any]
    sessions: Days
    months: dict[str, slice]
    """Sessions of each month."""
    quarantine: pl.DataFrame

    @staticmethod
    def open(path: Path) -> _Prices:
        manifest = read_manifest(path, PRICES_KIND)
        sessions = np.array(manifest["session_dates"], dtype="datetime64[D]")
        return _Prices(path, manifest, sessions, sessions_by_month(sessions), read_quarantine(path))

    def panel(self, months: Sequence[str]) -> PricePanel:
        rows = slice(self.months[months[0]].start, self.months[months[-1]].stop)
        return read_months(self.path, months, self.sessions[rows])

    def before(self, month: str, sessions: int) -> list[str]:
        """The months that hold the `sessions` before `month`."""
        first = max(0, self.months[month].start - sessions)
        return [name for name, rows in self.months.items() if name < month and rows.stop > first]

    def after(self, month: str, sessions: int) -> list[str]:
        """The months that hold the `sessions` after `month`."""
        last = self.months[month].stop + sessions
        return [name for name, rows in self.months.items() if name > month and rows.start < last]

    def ahead(self, month: str, sessions: int) -> PricePanel | None:
        """The prices of the `sessions` after `month`."""
        months = self.after(month, sessions)
        if not months:
            return None
        days = self.sessions[self.months[month].stop :][:sessions]
        frame = read_frame(self.path, months).filter(pl.col("Date") <= days[-1].item())
        return PricePanel.from_frame(frame, days)


def update_dataset(
    prices: Path,
    tables: Mapping[str, pl.DataFrame],
    out: Path,
    config: DatasetConfig,
    previous: Path | None = None,
    *,
    advance: Callable[[str, int, int], None] = lambda *_: None,
) -> tuple[dict[str, Any], ContractReport]:
    """Builds the dataset of the prices at `prices` at `out`; its manifest, and the report on what was written.

    tables: `index`, and `investor_flows` and `statements` where there are. With `previous`, an earlier dataset of the
    same configuration and code, months that stand are taken over; `changes` in the manifest says what differed.
    `advance` hears how many months are done.

    Raises: InputError as `features.compute.build_market` does.
    """
    made_from = _Prices.open(prices)
    # Drift is measured against the earlier dataset even where that cannot be continued; `out` may soon replace it.
    has_before = previous is not None and manifest_path(previous).is_file()
    before = dict(read_manifest(previous, KIND)) if has_before and previous is not None else None
    earlier = Earlier.of(previous, KIND, config=to_dict(config), code=code_revision("dataset"))
    inputs = _inputs(made_from, tables)
    changes = earlier.changes(inputs, STATE, ["", MEMBERSHIP, STATISTICS])
    state = _load_state(earlier.path, changes.kept[-1], made_from) if changes.kept else None
    parts: dict[str, Any] = {month: dict(earlier.parts[month]) for month in changes.kept}
    reports: list[ContractReport] = []
    retargeted = []
    with writing_partitions(out, SIDECARS, earlier) as writer:
        for month in changes.kept:
            leaves_at = _target_inputs(made_from, month, config)
            changed = parts[month]["target_inputs"] != leaves_at
            writer.take_over(month, but=[""] if changed else [])
            if changed:
                retargeted.append(month)
                parts[month] |= _retarget(writer, made_from, month, config) | {"target_inputs": leaves_at}
        for rows in _spans_of_rows(made_from, tables, config, state, advance):
            written = _write(writer, rows, reports)
            for month, record in written.items():
                parts[month] = record | {"target_inputs": _target_inputs(made_from, month, config)}
            _save_state(writer, max(written), rows.panel.state)
        statistics = Statistics.total(
            (Statistics.load(partition_path(writer.folders[STATISTICS], month, "npz")) for month in parts),
            FEATURE_COUNT,
        )
    manifest = dataset_manifest(
        parts=parts,
        statistics=statistics,
        session_dates=made_from.sessions,
        stocks=made_from.manifest["stocks"],
        listed_backfilled_rows=sum(month["listed_backfilled_rows"] for month in made_from.manifest["parts"].values()),
        quarantine=made_from.quarantine,
        absent_tables=[name for name in OPTIONAL_TABLES if name not in tables or tables[name].is_empty()],
        config=config,
        source=made_from.manifest["source"],
    )
    manifest["prices_fingerprint"] = made_from.manifest["fingerprint"]
    manifest["inputs"] = inputs
    manifest["changes"] = changes.record(parts) | {"months_retargeted": retargeted}
    manifest = with_drift(manifest, before)
    write_manifest(out, manifest)
    return manifest, joined_report("ml_dataset", reports)


def _inputs(prices: _Prices, tables: Mapping[str, pl.DataFrame]) -> dict[str, dict[str, Any]]:
    """What a month's features are made from, by input and month; the tables' rows in the month they are published."""
    published = {
        name: month_digests(tables[name], RAW_TABLES[name].date)
        for name in ("index", *OPTIONAL_TABLES)
        if name in tables
    }
    adjusted = {month: record["sha256"] for month, record in prices.manifest["parts"].items()}
    return {"prices": adjusted, **published}


# --- features ---------------------------------------------------------------------------------------------------------


def _spans_of_rows(
    prices: _Prices,
    tables: Mapping[str, pl.DataFrame],
    config: DatasetConfig,
    state: FeatureState | None,
    advance: Callable[[str, int, int], None],
) -> Iterator[DatasetRows]:
    """The rows of one span of months after the other, from `state` on."""
    passed = 0 if state is None else len(state.sessions)
    months = {month: rows for month, rows in prices.months.items() if rows.start >= passed}
    at_a_time = max(1, CELLS_AT_A_TIME // max(prices.manifest["stocks"], 1))
    for span in spans(months, min(months, default=""), at_a_time):
        panel = build_features(prices.panel(span), tables, config, state)
        later = prices.ahead(span[-1], _sessions_to_exit(config))
        yield dataset_rows(panel, prices.quarantine, config, later)
        state = panel.state
        advance("features", list(months).index(span[-1]) + 1, len(months))


def _write(writer: PartitionWriter, rows: DatasetRows, reports: list[ContractReport]) -> dict[str, dict[str, Any]]:
    """Writes the months of a span, two at a time; what the manifest says of each."""

    def write(month: str, span: slice) -> tuple[str, dict[str, Any], pl.DataFrame]:
        features, membership = rows.features(span), rows.membership(span)
        write_partition(partition_path(writer.folders[""], month), features)
        write_partition(partition_path(writer.folders[MEMBERSHIP], month), membership)
        rows.statistics(span).save(partition_path(writer.folders[STATISTICS], month, "npz"))
        frame = pl.from_arrow(features)
        assert isinstance(frame, pl.DataFrame)
        return month, partition_record(features, membership), frame

    with ThreadPoolExecutor(THREADS) as pool:
        written = list(pool.map(lambda item: write(*item), rows.months.items()))
    reports.append(check_ml_dataset(pl.concat([frame for _, _, frame in written]), FEATURE_NAMES, TARGETS))
    return {month: record for month, record, _ in written}


def _save_state(writer: PartitionWriter, month: str, state: FeatureState) -> None:
    arrays: dict[str, Any] = {
        "sessions": state.sessions.astype(np.int64),
        "codes": np.array(state.tail.codes, dtype=np.str_),
        "sectors": np.array(state.sectors, dtype=np.str_),
    }
    for name, value in state.values.items():
        if isinstance(value, Average):
            arrays |= {f"values.{name}.state": value.state, f"values.{name}.seen": value.seen}
        else:
            arrays[f"values.{name}"] = value
    save_arrays(partition_path(writer.folders[STATE], month, "npz"), arrays)


def _load_state(path: Path, month: str, prices: _Prices) -> FeatureState:
    """The state after `month`; its last prices are read again from the prices on disk."""
    arrays = load_arrays(partition_path(beside(path, STATE), month, "npz"))
    values: dict[str, Any] = {}
    for key, array in arrays.items():
        _, _, name = key.partition("values.")
        if name.endswith(".state"):
            name = name.removesuffix(".state")
            values[name] = Average(array, arrays[f"values.{name}.seen"])
        elif name and not name.endswith(".seen"):
            values[name] = array
    following = prices.after(month, 1)
    months = prices.before(following[0], OVERLAP_SESSIONS) if following else [month]
    tail = prices.panel(months).last(OVERLAP_SESSIONS)
    return FeatureState(
        tail=tail.of_codes(sorted({*tail.codes, *arrays["codes"].tolist()})),
        sessions=arrays["sessions"].astype("datetime64[D]"),
        sectors=tuple(arrays["sectors"].tolist()),
        values=values,
    )


# --- targets ----------------------------------------------------------------------------------------------------------


def _sessions_to_exit(config: DatasetConfig) -> int:
    """Sessions from a score to the exit of its longest target."""
    return max(HORIZONS) + EXECUTION_DELAY_SESSIONS[config.execution]


def _target_inputs(prices: _Prices, month: str, config: DatasetConfig) -> str:
    """Digest of what the targets of a month are made from: its prices, those after it, and the masked rows there."""
    months = [month, *prices.after(month, _sessions_to_exit(config))]
    last = prices.sessions[min(prices.months[month].stop + _sessions_to_exit(config), len(prices.sessions)) - 1]
    masked = prices.quarantine.filter(
        (pl.col("decision") == MASK_TARGET)
        & (pl.col("Date") >= prices.sessions[prices.months[month].start].item())
        & (pl.col("Date") <= last.item())
    )
    return sha256_of(
        {
            "prices": {name: prices.manifest["parts"][name]["sha256"] for name in months},
            "masked": [[str(day), code] for day, code in masked.select("Date", "Code").iter_rows()],
        }
    )


def _retarget(writer: PartitionWriter, prices: _Prices, month: str, config: DatasetConfig) -> dict[str, Any]:
    """Writes an earlier month again with its targets as the prices now give them; its new digest."""
    table = read_partition(partition_path(writer.previous[""], month))
    panel, later = prices.panel([month]), prices.ahead(month, _sessions_to_exit(config))
    forward = forward_returns(panel, prices.quarantine, config, later=later)
    t = np.searchsorted(panel.sessions, table["Date"].to_numpy().astype("datetime64[D]"))
    n = np.searchsorted(np.array(panel.codes), np.array(table["Code"].to_pylist(), dtype=np.str_))
    for name in TARGETS:
        values = nullable(forward[name][t, n])
        table = table.set_column(table.column_names.index(name), name, values)
    write_partition(partition_path(writer.folders[""], month), table)
    return {"targets_sha256": content_digest(pa.table({name: table[name] for name in TARGETS}))}
