"""Evaluation of any table of predictions: its columns checked once, then each split and slice."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from atft_pipeline.config.schema import HORIZONS, EvaluationConfig
from atft_pipeline.config.slices import SLICES, Slice
from atft_pipeline.errors import InputError
from atft_pipeline.evaluation.evaluate import Evaluation, EvaluationPanel, evaluate_panel, invalid
from atft_pipeline.evaluation.metrics import can_bootstrap
from atft_pipeline.storage.artifact import read_artifact

_HORIZON_COLUMN = re.compile(r"^(?P<stem>.*)_(?P<sessions>[1-9]\d*)d$")


@dataclass(frozen=True)
class TableEvaluation:
    """Evaluation of all rows of a predictions table and, where it has the columns, of each split and slice."""

    overall: Evaluation
    by_split: dict[str, Evaluation]
    by_slice: dict[str, Evaluation]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON: statistics of all rows at the top level, `by_split` and `by_slice` where the table has them."""
        groups = {"by_split": self.by_split, "by_slice": self.by_slice}
        nested = {
            key: {name: evaluation.as_dict() for name, evaluation in group.items()}
            for key, group in groups.items()
            if group
        }
        return {**self.overall.as_dict(), **nested}


def evaluate_table(
    table: pa.Table,
    *,
    score: str,
    target: str,
    config: EvaluationConfig,
    split: str | None = None,
    universe: Slice | None = None,
    days_per_year: int = 245,
    bootstrap: bool = False,
    trials: int = 1,
) -> TableEvaluation:
    """Evaluation of a table with the columns Date, Code, `score` and `target`, in any row order.

    Date is a date, a timestamp (its own zone's day) or an ISO string; integer codes are read as strings. A null or NaN
    target is dropped and counted, a null or NaN score beside a target makes the evaluation invalid. `split` and
    `universe` keep only the rows of that split (column `split`) and slice (columns is_investable, is_liquid).
    A target named like `target_5d` overlaps with the next session's: its portfolio is held in tranches on `target_1d`,
    and without that column the notes say that the daily returns overlap.

    Raises InputError: a missing column, a column of another type, no rows, keys that are null or not unique, and what
    `evaluate_panel` refuses.
    """
    horizon, one_session = _horizon(target, table.column_names)
    frame = _Frame.of(table, (score, target, *([one_session] if one_session else [])))
    chosen = frame.chosen(split, universe)
    overlapping = horizon > 1 and one_session is None

    def evaluated(rows: NDArray[np.bool_]) -> Evaluation:
        sessions, codes, cells, member = frame.panel(rows)
        panel = EvaluationPanel(
            sessions,
            codes,
            cells[target],
            days_per_year,
            member,
            horizon_sessions=horizon if one_session else 1,
            returns_1d=cells[one_session] if one_session else None,
        )
        result = evaluate_panel(cells[score], panel, config, bootstrap=bootstrap, trials=trials)
        return replace(result, notes=(_overlap(target, horizon),)) if overlapping else result

    overall = evaluated(chosen)
    by_split = {}
    if split is None and "split" in table.column_names:
        labels = frame.labels("split")
        by_split = {name: _or_refusal(evaluated, chosen & (labels == name)) for name in sorted(set(labels[chosen]))}
    by_slice: dict[str, Evaluation] = {
        name: _or_refusal(evaluated, chosen & frame.flags(column))
        for name, column in SLICES.items()
        if universe is None and column in table.column_names
    }
    return TableEvaluation(overall, by_split, by_slice)


@dataclass(frozen=True)
class ScorePanel:
    """Scores and targets of a predictions table as dense arrays: T sessions and N codes, both ascending."""

    sessions: NDArray[np.datetime64]
    codes: NDArray[Any]
    scores: NDArray[np.float64]
    """[T, N], NaN where the table has none."""
    targets: NDArray[np.float64]


def score_panel(
    table: pa.Table, *, score: str, target: str, split: str | None = None, universe: Slice | None = None
) -> ScorePanel:
    """The rows that `evaluate_table` evaluates for the same arguments. Raises InputError as it does."""
    frame = _Frame.of(table, (score, target))
    sessions, codes, cells, _ = frame.panel(frame.chosen(split, universe))
    return ScorePanel(sessions, codes, cells[score], cells[target])


def evaluate_file(
    path: Path,
    config: EvaluationConfig,
    *,
    score: str | None = None,
    target: str | None = None,
    split: str | None = None,
    universe: Slice | None = None,
    days_per_year: int = 245,
    trials: int = 1,
) -> dict[str, Any]:
    """`evaluate_table` of a parquet file as plain JSON, with the columns used and, where `arch` is, the bootstrap.

    Without `score` the column is `score`, else that of the shortest horizon (`score_1d`); without `target` it is
    `target`, else the one of the score's horizon (`score_5d`, `target_5d`). Raises InputError, naming the file, as
    `evaluate_table` does.
    """
    table = read_artifact(path)
    columns = set(table.column_names)
    score = score or next((name for name in ("score", *(f"score_{h}d" for h in HORIZONS)) if name in columns), "score")
    if target is None:
        of_horizon = score.replace("score", "target", 1)
        # A score under another name would else be held against itself.
        has_own_target = "target" not in columns and of_horizon in columns and of_horizon != score
        target = of_horizon if has_own_target else "target"
    try:
        result = evaluate_table(
            table,
            score=score,
            target=target,
            config=config,
            split=split,
            universe=universe,
            days_per_year=days_per_year,
            bootstrap=can_bootstrap(),
            trials=trials,
        )
    except InputError as refusal:
        raise InputError(f"{path}: {refusal}") from refusal
    return {**result.as_dict(), "score": score, "target": target}


def _or_refusal(evaluated: Callable[[NDArray[np.bool_]], Evaluation], rows: NDArray[np.bool_]) -> Evaluation:
    """The evaluation of a split or slice; an invalid one with the reason where it is too small for any.

    The whole table was evaluated, so a small part of it is no reason to refuse it.
    """
    try:
        return evaluated(rows)
    except InputError as refusal:
        no_sessions = np.zeros(0, "datetime64[D]")
        return invalid(no_sessions, np.zeros((0, 0), bool), 0, str(refusal))


def _overlap(target: str, horizon_sessions: int) -> str:
    return (
        f"{target} spans {horizon_sessions} sessions and there is no target_1d: daily returns overlap, the Sharpe"
        " flatters"
    )


def _horizon(target: str, columns: Sequence[str]) -> tuple[int, str | None]:
    """Sessions that `target` spans by its name, and the one-session column beside it where it is needed and present."""
    match = _HORIZON_COLUMN.match(target)
    if match is None or match["sessions"] == "1":
        return 1, None
    one_session = f"{match['stem']}_1d"
    return int(match["sessions"]), one_session if one_session in columns else None


class _Frame:
    """Columns of a predictions table, checked once, as dense panels of any subset of its rows."""

    def __init__(self, table: pa.Table, days: NDArray[np.datetime64], codes: NDArray[Any], values: dict[str, Any]):
        self._table, self._days, self._codes, self._values = table, days, codes, values

    @classmethod
    def of(cls, table: pa.Table, columns: Sequence[str]) -> _Frame:
        for name in ("Date", "Code", *columns):
            if name not in table.column_names:
                raise InputError(
                    f"predictions: column {name} is missing; found {', '.join(table.column_names)}"
                    " (--score and --target name the columns to use)"
                )
            if table.column_names.count(name) > 1:
                raise InputError(f"predictions: column {name} appears more than once; keep one of them")
        if table.num_rows == 0:
            raise InputError("predictions: the table has no rows; expected one row per session and stock")
        values = {name: _numbers(table, name) for name in columns}
        days, codes = _days(table), _codes(table)
        _require_unique(days, codes)
        return cls(table, days, codes, values)

    def chosen(self, split: str | None, universe: Slice | None) -> NDArray[np.bool_]:
        """Rows of the split and slice, all where neither is named. Raises InputError for a split without rows."""
        rows = np.ones(len(self._days), bool)
        if split is not None:
            rows &= self.labels("split") == split
            if not rows.any():
                names = ", ".join(sorted(set(self.labels("split"))))
                raise InputError(f"predictions: no row of split {split!r} in column split; found {names}")
        if universe is not None:
            rows &= self.flags(SLICES[universe])
        return rows

    def labels(self, name: str) -> NDArray[Any]:
        column = self._column(name)
        if not (_is_text(column.type) or pa.types.is_dictionary(column.type)):
            raise InputError(f"predictions: column {name} has type {column.type}; expected strings")
        return np.asarray(pc.fill_null(pc.cast(column, pa.string()), "").to_pylist(), dtype=str)

    def flags(self, name: str) -> NDArray[np.bool_]:
        column = self._column(name)
        if not pa.types.is_boolean(column.type):
            raise InputError(f"predictions: column {name} has type {column.type}; expected true or false")
        return np.asarray(pc.fill_null(column, False).to_numpy(), bool)

    def _column(self, name: str) -> pa.ChunkedArray:
        if name not in self._table.column_names:
            raise InputError(f"predictions: column {name} is missing, so the rows cannot be chosen by it")
        return self._table.column(name)

    def panel(
        self, rows: NDArray[np.bool_]
    ) -> tuple[NDArray[np.datetime64], NDArray[Any], dict[str, NDArray[np.float64]], NDArray[np.bool_]]:
        sessions, t = np.unique(self._days[rows], return_inverse=True)
        codes, n = np.unique(self._codes[rows], return_inverse=True)
        cells = {}
        for name, values in self._values.items():
            cells[name] = np.full((len(sessions), len(codes)), np.nan)
            cells[name][t, n] = values[rows]
        member = np.zeros((len(sessions), len(codes)), bool)
        member[t, n] = True
        return sessions, codes, cells, member


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _numbers(table: pa.Table, name: str) -> NDArray[np.float64]:
    column = table.column(name)
    kind = column.type
    if pa.types.is_null(kind):
        return np.full(table.num_rows, np.nan)
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind)):
        raise InputError(f"predictions: column {name} has type {kind}; expected numbers")
    return np.asarray(pc.fill_null(pc.cast(column, pa.float64(), safe=False), math.nan).to_numpy(), np.float64)


def _days(table: pa.Table) -> NDArray[np.datetime64]:
    column = table.column("Date")
    if pa.types.is_dictionary(column.type):
        column = pc.cast(column, column.type.value_type)
    kind = column.type
    if pa.types.is_timestamp(kind) and kind.tz is not None:
        column = pc.local_timestamp(column)
    try:
        if _is_text(kind):
            # Text may carry a time of day; the date is its first ten characters.
            column = pc.cast(pc.utf8_slice_codeunits(pc.cast(column, pa.string()), 0, 10), pa.date32())
        elif not (pa.types.is_date(kind) or pa.types.is_timestamp(kind)):
            raise InputError(f"predictions: column Date has type {kind}; expected dates, timestamps or ISO text")
        days = pc.cast(column, pa.date32(), safe=False)
    except pa.ArrowInvalid as error:
        raise InputError("predictions: column Date has text that is not an ISO date like 2012-01-05") from error
    if days.null_count:
        raise InputError(f"predictions: column Date is null in {days.null_count} rows; every row needs its session")
    return np.asarray(pc.cast(days, pa.int32()).to_numpy(), np.int64).astype("datetime64[D]")


def _codes(table: pa.Table) -> NDArray[Any]:
    column = table.column("Code")
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (_is_text(kind) or pa.types.is_integer(kind)):
        raise InputError(f"predictions: column Code has type {kind}; expected strings")
    if column.null_count:
        raise InputError(f"predictions: column Code is null in {column.null_count} rows; every row needs its stock")
    # Through the dictionary: a few thousand distinct codes instead of millions of Python strings.
    encoded = pc.dictionary_encode(pc.cast(column, pa.string())).combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0)
    return np.asarray(encoded.dictionary.to_pylist(), dtype=str)[encoded.indices.to_numpy()]


def _require_unique(days: NDArray[np.datetime64], codes: NDArray[Any]) -> None:
    names, n = np.unique(codes, return_inverse=True)
    keys, first, count = np.unique(days.astype(np.int64) * len(names) + n, return_index=True, return_counts=True)
    if len(keys) < len(days):
        at = int(first[count > 1][0])
        raise InputError(
            f"predictions: {len(days) - len(keys)} rows repeat a key (Date, Code), first {days[at]} {codes[at]};"
            " keep one row per session and stock"
        )
