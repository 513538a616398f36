"""One evaluation for everything: every epoch of a run, the baselines, and any table of predictions.

T sessions, N stocks in ascending code order. `scores[t]` is known at the close of session t, `targets[t]` is the raw
forward return from the execution price, NaN missing. What cannot be ranked (constant or non-finite scores) is never
ranked: the evaluation comes back invalid with its reason. What cannot be evaluated at all is an InputError.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from atft_pipeline.config.schema import HORIZONS, EvaluationConfig, Slice
from atft_pipeline.errors import InputError
from atft_pipeline.evaluation import metrics
from atft_pipeline.evaluation.portfolio import DailyPortfolio, jpx_spread_returns, long_short, long_short_tranches
from atft_pipeline.storage.product import read_table

STATISTICS: dict[str, str] = {
    "ic_mean": "correlation",
    "icir": "ratio",
    "rank_ic_mean": "correlation",
    "rank_icir": "ratio",
    "sharpe_daily": "per session",
    "sharpe_daily_net": "per session",
    "sharpe_annualised": "per year",
    "sharpe_annualised_lo": "per year",
    "jpx_spread_sharpe": "per session",
    "max_drawdown": "fraction",
    "turnover_mean": "sum of |weight changes|",
    "sharpe_se": "per session",
    "psr_0": "probability",
    "deflated_sharpe": "probability",
    "min_track_record_sessions": "sessions",
    "sharpe_ci_low": "per session",
    "sharpe_ci_high": "per session",
    "sessions": "sessions",
    "sessions_without_portfolio": "sessions",
    "dropped_targets": "rows",
}
"""Every statistic and its unit."""

DAILY: tuple[str, ...] = ("ic", "rank_ic", "gross", "net", "turnover", "jpx_spread", "stocks")

SLICES: dict[Slice, str] = {"all": "is_investable", "liquid": "is_liquid"}
"""Column of a predictions table that marks the rows of a slice."""

_NO_DISPERSION = 1e-12
_BOOTSTRAP_SEED = 20
_HORIZON_COLUMN = re.compile(r"^(?P<stem>.*)_(?P<sessions>[1-9]\d*)d$")


@dataclass(frozen=True)
class Statistic:
    value: float | None
    """None where it cannot be computed."""
    unit: str
    se: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Statistics of one set of scores, with the daily series they summarise."""

    sessions: NDArray[np.datetime64]
    daily: dict[str, NDArray[np.float64]]
    """Keys `DAILY`, each [T]; NaN where a session has no value, throughout when the evaluation is invalid."""
    statistics: dict[str, Statistic]
    """Keys `STATISTICS`."""
    valid: bool
    reason: str
    """Why the evaluation is invalid; empty when it is valid."""
    notes: tuple[str, ...] = ()

    def value(self, name: str) -> float | None:
        return self.statistics[name].value

    def values(self) -> dict[str, float | None]:
        return {name: statistic.value for name, statistic in self.statistics.items()}

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON: the statistics at the top level, with `valid`, `reason` and `notes`."""
        return {**self.values(), "valid": self.valid, "reason": self.reason, "notes": list(self.notes)}


def evaluate(
    scores: NDArray[np.floating],
    targets: NDArray[np.floating],
    sessions: NDArray[np.datetime64],
    codes: Sequence[str] | NDArray[Any],
    config: EvaluationConfig,
    *,
    days_per_year: int,
    bootstrap: bool,
    trials: int = 1,
    member: NDArray[np.bool_] | None = None,
    horizon_sessions: int = 1,
    returns_1d: NDArray[np.floating] | None = None,
) -> Evaluation:
    """Evaluation of `scores` against `targets`, both [T, N], over the cells of `member` [T, N].

    Without `member` a cell counts as soon as it has a score or a target, so a target whose score is NaN makes the
    evaluation invalid; pass the universe when NaN scores mean "not in it". Every `member` cell with a target needs a
    finite score; cells without a target are dropped before ranking and counted in `dropped_targets`. A session whose
    scores are all equal (range within 1e-12 of their size) among at least two stocks makes the evaluation invalid.
    The portfolio of a horizon above 1 is held in tranches on `returns_1d` [T, N], the one-session forward returns.
    `trials` is the number of models tried, for the deflated Sharpe.

    Raises InputError: shapes that differ, codes out of order, infinite targets, no target at all, fewer than two
    sessions in which at least two stocks have a target, a horizon above 1 without `returns_1d`, a year without days,
    no trial.
    """
    if days_per_year < 1:
        raise InputError(f"evaluation: days_per_year must be at least 1, found {days_per_year}; Tokyo has 245")
    if trials < 1:
        raise InputError(f"evaluation: trials must be at least 1, found {trials}; the model evaluated is one of them")
    score: NDArray[np.float64] = np.asarray(scores, np.float64)
    target: NDArray[np.float64] = np.asarray(targets, np.float64)
    sessions, codes = np.asarray(sessions, "datetime64[D]"), np.asarray(codes)
    shape = (len(sessions), len(codes))
    for name, cells in (("scores", score), ("targets", target), ("members", member)):
        if cells is not None and cells.shape != shape:
            raise InputError(f"evaluation: expected {name} of shape {shape} (sessions, codes), found {cells.shape}")
    if member is None:
        member = ~np.isnan(score) | ~np.isnan(target)
    _require_usable(target, sessions, codes, member)
    if horizon_sessions > 1 and returns_1d is None:
        raise InputError(
            f"evaluation: a horizon of {horizon_sessions} sessions overlaps and is held in tranches; it needs the"
            " one-session forward returns beside its own target"
        )
    due = member & ~np.isnan(target)
    dropped = int((member & np.isnan(target)).sum())
    reason = _unrankable(score, due, sessions)
    if reason:
        return _invalid(sessions, due, dropped, reason)
    score, target = np.where(member, score, np.nan), np.where(member, target, np.nan)
    costs = {"quantile": config.quantile, "cost_bps": config.cost_bps}
    if horizon_sessions > 1 and returns_1d is not None:
        held = np.where(member, returns_1d, np.nan)
        portfolio = long_short_tranches(score, held, horizon_sessions, **costs)
    else:
        portfolio = long_short(score, target, **costs)
    daily = {
        "ic": metrics.information_coefficient(score, target),
        "rank_ic": metrics.rank_information_coefficient(score, target),
        "gross": portfolio.gross,
        "net": portfolio.net,
        "turnover": portfolio.turnover,
        "jpx_spread": jpx_spread_returns(score, target),
        "stocks": portfolio.stocks.astype(np.float64),
    }
    statistics = _statistics(daily, portfolio, config, days_per_year, bootstrap, trials, dropped, member)
    notes = () if statistics["sharpe_daily"].value is not None else (_no_sharpe(config, portfolio),)
    return Evaluation(sessions, daily, statistics, True, "", notes)


def _require_usable(
    targets: NDArray[np.float64],
    sessions: NDArray[np.datetime64],
    codes: NDArray[Any],
    member: NDArray[np.bool_],
) -> None:
    if (codes[1:] <= codes[:-1]).any() or (sessions[1:] <= sessions[:-1]).any():
        raise InputError("evaluation: sessions and codes must be in ascending order, each once; sort the panel first")
    if np.isinf(targets[member]).any():
        day = sessions[np.isinf(np.where(member, targets, 0.0)).any(axis=1)][0]
        raise InputError(f"evaluation: a target is infinite on {day}; leave it null where the return is unknown")
    stocks = (member & ~np.isnan(targets)).sum(axis=1)
    if not stocks.any():
        raise InputError(
            "evaluation: no row has a target; evaluate sessions whose forward returns are known already"
            if member.any()
            else "evaluation: no row to evaluate; check the universe and the split"
        )
    if stocks.max() < 2:
        raise InputError("evaluation: no session has two stocks with a target; a ranking needs at least two")
    if (stocks >= 2).sum() < 2:
        day = sessions[stocks >= 2][0]
        raise InputError(
            f"evaluation: only one session ({day}) has two stocks with a target; a standard deviation over sessions"
            " needs at least two"
        )


def _unrankable(scores: NDArray[np.float64], due: NDArray[np.bool_], sessions: NDArray[np.datetime64]) -> str:
    """Why these scores cannot be ranked, or an empty string."""
    broken = due & ~np.isfinite(scores)
    if broken.any():
        first = sessions[broken.any(axis=1)][0]
        return (
            f"scores are not finite: {int(broken.sum())} of {int(due.sum())} rows with a target have none or an"
            f" infinite one, first on {first}"
        )
    constant = constant_sessions(scores, due)
    if constant.any():
        ranked = int((due.sum(axis=1) >= 2).sum())
        return (
            f"scores are constant: in {int(constant.sum())} of {ranked} sessions every stock has the same score,"
            f" first on {sessions[constant][0]}"
        )
    return ""


def constant_sessions(scores: NDArray[np.float64], due: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[T] sessions with at least two stocks in `due` whose scores do not differ by more than 1e-12 of their size."""
    high = np.where(due, scores, -np.inf).max(axis=1, initial=-np.inf)
    low = np.where(due, scores, np.inf).min(axis=1, initial=np.inf)
    ranked = due.sum(axis=1) >= 2
    size = np.maximum(np.abs(high), np.abs(low))
    flat = np.zeros(len(scores), bool)
    flat[ranked] = high[ranked] - low[ranked] <= _NO_DISPERSION * size[ranked]
    return flat


def _invalid(sessions: NDArray[np.datetime64], due: NDArray[np.bool_], dropped: int, reason: str) -> Evaluation:
    daily = {name: np.full(len(sessions), np.nan) for name in DAILY}
    daily["stocks"] = due.sum(axis=1).astype(np.float64)
    statistics = {name: Statistic(None, unit) for name, unit in STATISTICS.items()}
    statistics["sessions"] = Statistic(0.0, STATISTICS["sessions"])
    statistics["dropped_targets"] = Statistic(float(dropped), STATISTICS["dropped_targets"])
    return Evaluation(sessions, daily, statistics, False, reason)


def _statistics(
    daily: dict[str, NDArray[np.float64]],
    portfolio: DailyPortfolio,
    config: EvaluationConfig,
    days_per_year: int,
    bootstrap: bool,
    trials: int,
    dropped: int,
    member: NDArray[np.bool_],
) -> dict[str, Statistic]:
    gross, net = portfolio.gross, portfolio.net
    held = np.isfinite(gross)
    year = math.sqrt(days_per_year)
    ratio, error = metrics.sharpe(gross), metrics.sharpe_standard_error(gross)
    lo = metrics.lo_annualised_sharpe(gross, days_per_year)
    interval = (math.nan, math.nan)
    if bootstrap:
        interval = metrics.bootstrap_interval(gross, samples=config.bootstrap_samples, seed=_BOOTSTRAP_SEED)
    ic, rank_ic = daily["ic"], daily["rank_ic"]
    values: dict[str, tuple[float, float]] = {
        "ic_mean": metrics.mean_and_error(ic),
        "icir": (metrics.sharpe(ic), metrics.sharpe_standard_error(ic)),
        "rank_ic_mean": metrics.mean_and_error(rank_ic),
        "rank_icir": (metrics.sharpe(rank_ic), metrics.sharpe_standard_error(rank_ic)),
        "sharpe_daily": (ratio, error),
        "sharpe_daily_net": (metrics.sharpe(net), metrics.sharpe_standard_error(net)),
        "sharpe_annualised": (ratio * year, error * year),
        "sharpe_annualised_lo": (lo, error * lo / ratio if ratio else math.nan),
        "jpx_spread_sharpe": (metrics.sharpe(daily["jpx_spread"]), metrics.sharpe_standard_error(daily["jpx_spread"])),
        "max_drawdown": (metrics.max_drawdown(gross), math.nan),
        "turnover_mean": metrics.mean_and_error(portfolio.turnover),
        "sharpe_se": (error, math.nan),
        "psr_0": (metrics.probabilistic_sharpe(gross), math.nan),
        "deflated_sharpe": (metrics.deflated_sharpe(gross, trials), math.nan),
        "min_track_record_sessions": (metrics.minimum_track_record(gross), math.nan),
        "sharpe_ci_low": (interval[0], math.nan),
        "sharpe_ci_high": (interval[1], math.nan),
        "sessions": (float(held.sum()), math.nan),
        "sessions_without_portfolio": (float((member.any(axis=1) & ~held).sum()), math.nan),
        "dropped_targets": (float(dropped), math.nan),
    }
    return {
        name: Statistic(metrics.finite_or_none(v), STATISTICS[name], metrics.finite_or_none(se))
        for name, (v, se) in values.items()
    }


def _no_sharpe(config: EvaluationConfig, portfolio: DailyPortfolio) -> str:
    if not (held := int(np.isfinite(portfolio.gross).sum())):
        needed = math.ceil(1.0 / config.quantile)
        return f"no session has the {needed} stocks that one stock a side needs (largest: {portfolio.stocks.max()})"
    return f"the {held} daily returns of the portfolio have no standard deviation"


@dataclass(frozen=True)
class TableEvaluation:
    """Evaluation of all rows of a predictions table and, where it has the columns, of each split and slice."""

    overall: Evaluation
    by_split: dict[str, Evaluation]
    by_slice: dict[str, Evaluation]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON: the statistics of all rows at the top level, `by_split` and `by_slice` only where known."""
        parts = {"by_split": self.by_split, "by_slice": self.by_slice}
        nested = {
            key: {name: evaluation.as_dict() for name, evaluation in part.items()}
            for key, part in parts.items()
            if part
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
    A target named like `target_5d` is overlapping: its portfolio is held in tranches on `target_1d`, and without that
    column the notes say that the daily returns overlap.

    Raises InputError: a missing column, a column of another type, no rows, keys that are null or not unique, and what
    `evaluate` refuses.
    """
    horizon, one_session = _horizon(target, table.column_names)
    frame = _Frame.of(table, (score, target, *([one_session] if one_session else [])))
    chosen = frame.chosen(split, universe)

    def evaluated(rows: NDArray[np.bool_]) -> Evaluation:
        sessions, codes, cells, member = frame.panel(rows)
        result = evaluate(
            cells[score],
            cells[target],
            sessions,
            codes,
            config,
            days_per_year=days_per_year,
            bootstrap=bootstrap,
            trials=trials,
            member=member,
            horizon_sessions=horizon if one_session else 1,
            returns_1d=cells[one_session] if one_session else None,
        )
        if horizon == 1 or one_session:
            return result
        note = (
            f"{target} spans {horizon} sessions and there is no target_1d: daily returns overlap, the Sharpe flatters"
        )
        return Evaluation(result.sessions, result.daily, result.statistics, result.valid, result.reason, (note,))

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
    """Scores and targets of a predictions table, dense: T sessions and N codes, both ascending."""

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
    table = read_table(path)
    columns = set(table.column_names)
    score = score or next((name for name in ("score", *(f"score_{h}d" for h in HORIZONS)) if name in columns), "score")
    if target is None:
        of_horizon = score.replace("score", "target", 1)
        # A score under another name would else be held against itself.
        known = "target" not in columns and of_horizon in columns and of_horizon != score
        target = of_horizon if known else "target"
    try:
        result = evaluate_table(
            table,
            score=score,
            target=target,
            config=config,
            split=split,
            universe=universe,
            days_per_year=days_per_year,
            bootstrap=importlib.util.find_spec("arch") is not None,
            trials=trials,
        )
    except InputError as refusal:
        raise InputError(f"{path}: {refusal}") from refusal
    return {**result.as_dict(), "score": score, "target": target}


def _or_refusal(evaluated: Callable[[NDArray[np.bool_]], Evaluation], rows: NDArray[np.bool_]) -> Evaluation:
    """A part that is too small to evaluate is reported as such beside the whole, which was not."""
    try:
        return evaluated(rows)
    except InputError as refusal:
        none = np.zeros(0, "datetime64[D]")
        return _invalid(none, np.zeros((0, 0), bool), 0, str(refusal))


def _horizon(target: str, columns: Sequence[str]) -> tuple[int, str | None]:
    """Sessions that `target` spans by its name, and the one-session column beside it, if it is needed and there."""
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
                raise InputError(f"predictions: column {name} is there more than once; keep one of them")
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


@dataclass(frozen=True)
class Reversal:
    """One-factor score: `sign` times a trailing return, chosen on the training sessions alone."""

    scores: NDArray[np.float64]
    """[T, N], NaN outside the universe."""
    feature: str
    sign: int
    train_sharpe: float


REVERSAL_FEATURES: tuple[str, ...] = ("returns_1d", "returns_5d")


def one_factor_reversal(
    features: NDArray[np.floating],
    feature_names: Sequence[str],
    targets: NDArray[np.floating],
    member: NDArray[np.bool_],
    train: NDArray[np.integer],
    *,
    quantile: float = 0.2,
) -> Reversal:
    """The better of the 1- and 5-session return as a score, with the sign that earned more in training.

    features [T, N, F], targets [T, N] one-session forward returns, member [T, N]; `train` are the indices of the
    training sessions, the only ones whose targets are read. A member whose return is missing scores 0, the session's
    mean. Named for the usual finding, a negative sign; whichever sign training shows is kept.

    Raises InputError where neither feature is present.
    """
    names = [name for name in REVERSAL_FEATURES if name in feature_names]
    if not names:
        raise InputError(f"reversal: expected one of the features {', '.join(REVERSAL_FEATURES)}, found neither")
    known = np.where(member[train], targets[train], np.nan)
    best: Reversal | None = None
    for name in names:
        values = np.asarray(features[:, :, list(feature_names).index(name)], np.float64)
        returns = np.where(member, np.where(np.isfinite(values), values, 0.0), np.nan)
        for sign in (-1, 1):
            earned = metrics.sharpe(long_short(sign * returns[train], known, quantile=quantile, cost_bps=0.0).gross)
            earned = earned if math.isfinite(earned) else -math.inf
            if best is None or earned > best.train_sharpe:
                best = Reversal(sign * returns, name, sign, earned)
    assert best is not None
    return best
