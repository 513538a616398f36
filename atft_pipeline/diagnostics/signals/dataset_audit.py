"""Signals from holding a run's files against its dataset and against each other: what a false figure cannot keep up.

Everything is recomputed here by other code than wrote it, from the predictions stored, the inputs sampled
(`inputs.parquet`) and the dataset that the run names. None where one of them cannot be read, or where the dataset is
not the one the run was made on. Shapes: T sessions, N stocks, H horizons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from atft_pipeline.config.schema import HORIZONS
from atft_pipeline.diagnostics.run_inputs import RunInputs
from atft_pipeline.diagnostics.signals.recorded import Value, plain
from atft_pipeline.errors import InputError
from atft_pipeline.runs.reader import Record, read_scores
from atft_pipeline.training.telemetry.input_sample import SCHEMA as INPUTS
from atft_pipeline.training.telemetry.input_sample import sampled

TARGET_TOLERANCE = 1e-6
INPUT_TOLERANCE = 1e-3
"""Relative: sums over float32 in another order."""
OF_SESSIONS = 0.5
"""A feature differs where more than this share of its sampled sessions does: one odd session is a revised dataset."""
SCALED = 5.0
LEAVING_SESSIONS, LEAVING_ROWS, LEAVING_TAIL = 250, 60_000, 20
"""A hundredth of the stocks leaves in a year: on 240 stock-years none leaving has a probability of a tenth."""
DRIFTED = 10.0
TARGET_CLIP = 5.0


SIGNALS: tuple[str, ...] = (
    "validation_elsewhere", "validation_in_training", "targets_unlike_dataset", "rows_not_scored",
    "predicted_ic_correlation", "ic_gap", "sharpe_ratio_to_daily", "squared_error_gap", "squared_error_gap_negated",
    "tied_scores", "inputs_unlike_dataset", "inputs_constant", "inputs_constant_share", "inputs_scaled",
    "inputs_exchanged", "inputs_exchanged_example", "inputs_drifted", "labels_unlike_dataset", "stocks_not_given",
    "trained_elsewhere", "train_not_seen", "feature_ic", "feature_ic_name", "codes_that_leave",
)  # fmt: skip


def audit(record: Record) -> dict[str, Value]:
    """Every signal of SIGNALS."""
    inputs = RunInputs(record)
    found: dict[str, Value] = dict.fromkeys(SIGNALS)
    for part in (_evaluated, _given_inputs, _market):
        found |= part(inputs)
    return {name: plain(value) for name, value in found.items()}


# Evaluation ------------------------------------------------------------------------------------------------------


def _evaluated(inputs: RunInputs) -> dict[str, Value]:
    record, found = inputs.record, _figures_agree(inputs.record)
    scores = _scores(record)
    if scores is None:
        return found
    epoch, table = scores
    record.connection.register("scored", table)
    try:
        found |= _told(lambda: _scores_agree(record, epoch, table))
        found |= _told(lambda: _in_split(inputs)) | _told(lambda: _targets_agree(inputs))
    finally:
        record.connection.unregister("scored")
    return found


def _told(measure: Callable[[], dict[str, Value]]) -> dict[str, Value]:
    """What `measure` finds; nothing where a file is torn, another by now, or holds other columns than it should."""
    with suppress(InputError, OSError, pa.ArrowException, duckdb.Error):
        return measure()
    return {}


def _scores(record: Record) -> tuple[int, pa.Table] | None:
    """The validation rows of the newest predictions."""
    for epoch in sorted(record.predictions, reverse=True):
        table = read_scores(record.predictions[epoch], HORIZONS)
        rows = None if table is None else table.filter(pc.equal(table["split"], "validation"))
        if rows is not None and rows.num_rows:
            return epoch, rows
    return None


def _figures_agree(record: Record) -> dict[str, Value]:
    """Whether the statistics follow from the daily rows: the IC as the Sharpe."""
    gaps = record.rows(
        """WITH own AS (SELECT epoch, split, slice, avg(ic) AS ic, avg(gross) / nullif(stddev_samp(gross), 0) AS sharpe
                        FROM daily WHERE isfinite(gross) GROUP BY ALL)
           SELECT max(abs(e.value - own.ic)) FILTER (e.metric = 'ic_mean'),
                  median(e.value / nullif(own.sharpe, 0)) FILTER (e.metric = 'sharpe_daily')
           FROM evals e JOIN own USING (epoch, split, slice) WHERE isfinite(e.value)"""
    )[0]
    return {
        "ic_gap": None if gaps[0] is None else float(gaps[0]),
        "sharpe_ratio_to_daily": None if gaps[1] is None else float(gaps[1]),
    }


def _scores_agree(record: Record, epoch: int, table: pa.Table) -> dict[str, Value]:
    """The stored scores against what the record says of them."""
    correlated = record.rows(
        """WITH own AS (SELECT Date AS date, corr(score_1d::DOUBLE, target_1d::DOUBLE) AS ic FROM scored
                        WHERE isfinite(target_1d) AND (is_liquid OR $1 = 'all') GROUP BY Date)
           SELECT corr(own.ic, d.ic), count(*) FROM own JOIN daily d USING (date)
           WHERE d.split = 'validation' AND d.slice = $1 AND d.epoch = $2 AND isfinite(d.ic) AND isfinite(own.ic)""",
        record.slice,
        epoch,
    )[0]
    ties = record.scalar(
        """SELECT avg((n > 1)::INT) FROM (SELECT count(*) OVER (PARTITION BY Date, score_1d) AS n FROM scored
                                          WHERE isfinite(score_1d))"""
    )
    gaps = _squared_error_gaps(record, epoch, table)
    return {
        "predicted_ic_correlation": float(correlated[0]) if correlated[0] is not None and correlated[1] > 2 else None,
        "tied_scores": ties,
        "squared_error_gap": gaps[0],
        "squared_error_gap_negated": gaps[1],
    }


def _squared_error_gaps(record: Record, epoch: int, table: pa.Table) -> tuple[float | None, float | None]:
    """|recorded - recomputed| mean squared error of the validation scores, as stored and with the sign turned."""
    recorded = record.curve("loss_raw", split="validation", term="mse").get(epoch)
    weights = record.config("train.loss.horizon_weights")
    if recorded is None or not isinstance(weights, list) or len(weights) != len(HORIZONS):
        return None, None
    if not np.isfinite(table["score_1d"].to_numpy()).any():
        return None, None
    session = np.unique(table["Date"].to_numpy(), return_inverse=True)[1]
    errors = [_squared_error(session, table, horizon) for horizon in HORIZONS]
    share = np.array(weights, float) / sum(weights)
    plain, negated = (float(share @ np.array([error[side] for error in errors])) for side in (0, 1))
    return abs(plain - recorded), abs(negated - recorded)


def _squared_error(session: NDArray[np.int64], table: pa.Table, horizon: int) -> tuple[float, float]:
    """Mean over sessions of the mean over stocks, for score and for minus score."""
    score = table[f"score_{horizon}d"].to_numpy().astype(np.float64)
    target = table[f"target_{horizon}d"].to_numpy().astype(np.float64)
    there = np.isfinite(target) & np.isfinite(score)
    session, score, target = session[there], score[there], target[there]
    count = np.maximum(np.bincount(session), 1)
    centred = target - (np.bincount(session, target) / count)[session]
    std = np.sqrt(np.bincount(session, centred**2) / count)
    usable = (std > 0) & (np.bincount(session) >= 2)
    z = np.clip(centred / np.where(std > 0, std, 1.0)[session], -TARGET_CLIP, TARGET_CLIP)

    def mean(values: NDArray[np.float64]) -> float:
        by_session = np.bincount(session, values) / count
        return float(by_session[usable].mean()) if usable.any() else 0.0

    return mean((score - z) ** 2), mean((score + z) ** 2)


def _in_split(inputs: RunInputs) -> dict[str, Value]:
    """Sessions evaluated as validation, against the split that the configuration gives on the dataset's sessions."""
    sessions, split = inputs.sessions, inputs.split
    dates = inputs.record.connection.execute("SELECT DISTINCT Date FROM scored").fetchnumpy()["Date"]
    evaluated = np.unique(np.asarray(dates, "datetime64[D]"))
    expected, trained = sessions[split.validation], sessions[split.train]
    return {
        "validation_elsewhere": float(np.mean(~np.isin(evaluated, expected))),
        "validation_in_training": float(np.mean(np.isin(evaluated, trained))),
    }


def _targets_agree(inputs: RunInputs) -> dict[str, Value]:
    """The targets evaluated, row by row, and the rows of the universe that have no score."""
    first, last = (inputs.sessions[inputs.split.validation[end]].item() for end in (0, -1))
    unlike = inputs.record.scalar(
        f"""SELECT avg((abs(s.target_1d - d.target_1d) > {TARGET_TOLERANCE}
                        OR coalesce(isfinite(s.target_1d), false) != coalesce(isfinite(d.target_1d), false))::INT)
            FROM scored s JOIN (SELECT f.Date, f.Code, f.target_1d FROM read_parquet(?) f) d USING (Date, Code)
            WHERE isfinite(s.target_1d) OR d.target_1d IS NOT NULL""",
        inputs.rows,
    )
    missing = inputs.record.scalar(
        f"""SELECT avg((s.Code IS NULL)::INT)
            FROM (SELECT Date, Code FROM read_parquet(?) WHERE {inputs.universe} AND Date BETWEEN ? AND ?) m
            LEFT JOIN scored s USING (Date, Code)""",
        inputs.members,
        first,
        last,
    )
    return {"targets_unlike_dataset": unlike, "rows_not_scored": missing}


# Inputs ----------------------------------------------------------------------------------------------------------


def _given_inputs(inputs: RunInputs) -> dict[str, Value]:
    record, given = inputs.record, _given(inputs.record)
    if given is None:
        return {}
    record.connection.register("given", given)
    try:
        parts = (lambda: _feature_ic(record), lambda: _drift(record), lambda: _sessions(inputs))
        found = [_told(part) for part in (*parts, lambda: _inputs_agree(inputs))]
        return {name: value for part in found for name, value in part.items()}
    finally:
        record.connection.unregister("given")


def _market(inputs: RunInputs) -> dict[str, Value]:
    return _told(lambda: _leaving(inputs))


def _given(record: Record) -> pa.Table | None:
    with suppress(OSError, pa.ArrowException, KeyError):
        table = pq.read_table(record.run_dir / "inputs.parquet").select(INPUTS.names).cast(INPUTS)
        return table if table.num_rows else None
    return None


def _feature_ic(record: Record) -> dict[str, Value]:
    """The largest mean correlation of an input with the coming return, over the sampled sessions."""
    rows = record.rows(
        """SELECT name, abs(avg(ic)) AS size FROM given WHERE name NOT LIKE 'target\\_%' ESCAPE '\\' AND ic IS NOT NULL
           GROUP BY name HAVING count(*) >= 8 ORDER BY size DESC LIMIT 1"""
    )
    return {"feature_ic": float(rows[0][1]), "feature_ic_name": str(rows[0][0])} if rows else {}


def _drift(record: Record) -> dict[str, Value]:
    """Features whose cross-sectional spread in validation is another order of magnitude than in training."""
    rows = record.rows(
        """SELECT name, median(std) FILTER (split = 'train'), median(std) FILTER (split = 'validation')
           FROM given WHERE name NOT LIKE 'target\\_%' ESCAPE '\\' GROUP BY name"""
    )
    known = [(before, after) for _, before, after in rows if before and after]
    drifted = sum(max(after / before, before / after) > DRIFTED for before, after in known)
    return {"inputs_drifted": float(drifted)} if known else {}


def _sessions(inputs: RunInputs) -> dict[str, Value]:
    """Sessions that the first epoch trained on, against the split that the configuration gives."""
    record, sessions, split = inputs.record, inputs.sessions, inputs.split

    def days(query: str, *parameters: object) -> NDArray[np.datetime64]:
        found = record.connection.execute(query, list(parameters)).fetchnumpy()
        return np.asarray(next(iter(found.values())), "datetime64[D]")

    seen = days("SELECT DISTINCT date FROM given WHERE split = 'train'")
    if not record.epochs_done or not len(seen):
        return {}
    inhabited = days(f"SELECT DISTINCT Date FROM read_parquet(?) WHERE {inputs.universe}", inputs.members)
    trainable = split.train[np.isin(sessions[split.train], inhabited)]
    return {
        "trained_elsewhere": float(np.mean(~np.isin(seen, sessions[split.train]))),
        "train_not_seen": float(np.mean(~np.isin(sessions[sampled(trainable)], seen))),
    }


def _leaving(inputs: RunInputs) -> dict[str, Value]:
    """Stocks whose rows end before the dataset does; None where it is too small to expect one."""
    sessions = inputs.sessions
    if len(sessions) < LEAVING_SESSIONS or len(sessions) * inputs.manifest["stocks"] < LEAVING_ROWS:
        return {}
    cut = sessions[-LEAVING_TAIL].item()
    query = "SELECT count(*) FROM (SELECT Code FROM read_parquet(?) GROUP BY Code HAVING max(Date) < ?)"
    return {"codes_that_leave": inputs.record.scalar(query, inputs.members, cut)}


def _inputs_agree(inputs: RunInputs) -> dict[str, Value]:
    """Sampled blocks against the dataset's rows of the same sessions and universe."""
    record = inputs.record
    given = {row[0] for row in record.rows("SELECT DISTINCT name FROM given")}
    features = [name for name in (*inputs.manifest["features"], *(f"target_{h}d" for h in HORIZONS)) if name in given]
    if not features:
        return {}
    columns = ", ".join(
        f"""struct_pack(name := '{name}', present := count("{name}"), mean := avg("{name}"),
            std := stddev_pop("{name}"), ic := corr("{name}", target_1d))"""
        for name in features
    )
    # Most of what a diagnosis reads. Two threads add up in another order each time, far within INPUT_TOLERANCE.
    record.connection.execute("SET threads = 2")
    record.connection.execute(
        f"""CREATE OR REPLACE TEMP TABLE expected AS
            SELECT Date AS date, stocks, unnest(figures, recursive := true) FROM (
              SELECT Date, count(*) AS stocks, [{columns}] AS figures
              FROM (SELECT * FROM read_parquet(?) WHERE Date IN (SELECT DISTINCT date FROM given))
              JOIN (SELECT m.Date, m.Code FROM read_parquet(?) m WHERE m.{inputs.universe}) USING (Date, Code)
              GROUP BY Date)""",
        [inputs.rows, inputs.members],
    )
    record.connection.execute("SET threads = 1")
    # Where stocks are left out every figure is another: that is the matter of the stocks and not of the features.
    rows = record.rows(
        f"""SELECT g.name, g.split,
              avg(({_unlike("g", "e")})::INT) FILTER (g.stocks = e.stocks),
              avg((coalesce(g.std, 0) = 0 AND coalesce(e.std, 0) > 0)::INT) FILTER (g.stocks = e.stocks),
              median(g.std / nullif(e.std, 0)) FILTER (g.stocks = e.stocks),
              avg((abs(g.ic - e.ic) > {INPUT_TOLERANCE})::INT) FILTER (g.stocks = e.stocks),
              avg((g.stocks != e.stocks)::INT),
              avg((e.std > 0)::INT)
            FROM given g JOIN expected e USING (date, name) GROUP BY g.name, g.split"""
    )
    stocks: dict[str, Value] = {"stocks_not_given": max(_shares(rows, 6), default=None)}
    rows = [row for row in rows if row[2] is not None and row[6] <= OF_SESSIONS]
    if not rows:
        return stocks

    def features_where(condition: Callable[[Any], bool]) -> float:
        return float(len({row[0] for row in rows if not row[0].startswith("target_") and condition(row)}))

    def scaled(row: Any) -> bool:
        # A change of unit leaves the correlation with the target as it is; another column or noise does not.
        varies, same_ic = row[3] <= OF_SESSIONS, row[5] is not None and row[5] <= OF_SESSIONS
        return bool(row[4]) and not 1 / SCALED <= row[4] <= SCALED and varies and same_ic

    varying = features_where(lambda row: (row[7] or 0.0) > OF_SESSIONS)  # figures of the market are one to all stocks
    constant = features_where(lambda row: row[3] > OF_SESSIONS)
    train = [row for row in rows if row[1] == "train" and not row[0].startswith("target_") and row[5] is not None]
    return {
        "inputs_unlike_dataset": features_where(lambda row: row[2] > OF_SESSIONS),
        "inputs_constant": constant,
        "inputs_constant_share": constant / max(varying, 1),
        "inputs_scaled": features_where(scaled),
        "labels_unlike_dataset": float(np.mean([row[5] for row in train])) if train else None,
        **stocks,
        **_exchanged(record),
    }


def _unlike(g: str, e: str) -> str:
    """SQL: whether the moments of a feature in a session are others in relation `g` than in relation `e`."""
    return f"""{g}.present != {e}.present OR abs({g}.mean - {e}.mean) > {INPUT_TOLERANCE} * (abs({e}.mean) + {e}.std)
               OR abs({g}.std - {e}.std) > {INPUT_TOLERANCE} * (abs({e}.mean) + {e}.std)"""


def _exchanged(record: Record) -> dict[str, Value]:
    """Features that have the moments and the IC of another one, and not their own."""
    found = record.rows(
        f"""WITH sampled AS (SELECT split, count(DISTINCT date) AS sessions FROM given GROUP BY split)
            SELECT g.name, o.name, g.split FROM given g
              JOIN expected e USING (date, name) JOIN expected o ON o.date = g.date AND o.name != g.name
              JOIN sampled USING (split)
            WHERE NOT starts_with(g.name, 'target_') AND NOT starts_with(o.name, 'target_')
              AND g.stocks = e.stocks AND o.std > 0 AND ({_unlike("g", "e")} OR abs(g.ic - e.ic) > {INPUT_TOLERANCE})
              AND NOT ({_unlike("g", "o")}) AND abs(g.ic - o.ic) <= {INPUT_TOLERANCE}
            GROUP BY g.split, g.name, o.name, sessions HAVING count(*) > {OF_SESSIONS} * sessions ORDER BY ALL"""
    )
    return {
        "inputs_exchanged": float(len({place for place, _, _ in found})),
        "inputs_exchanged_example": "{1} in the place of {0} ({2})".format(*found[0]) if found else "none",
    }


def _shares(rows: list[tuple[Any, ...]], column: int) -> Iterator[float]:
    known = [row for row in rows if row[column] is not None]
    for split in {row[1] for row in known}:
        yield float(np.mean([row[column] for row in known if row[1] == split]))
