"""Whether the features reach the model unchanged: sampled blocks compared with the dataset's rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from atft_pipeline.config.schema import HORIZONS
from atft_pipeline.diagnostics import questions
from atft_pipeline.diagnostics.rule import Rule, all_of
from atft_pipeline.diagnostics.run_inputs import RunInputs
from atft_pipeline.diagnostics.signal import Audit, SignalTable, Value
from atft_pipeline.inspection.reader import Record

SIGNALS = SignalTable()

INPUT_TOLERANCE = 1e-3
"""Relative tolerance, for sums over float32 in another order."""
OF_SESSIONS = 0.5
"""A feature differs where more than this share of its sampled sessions does: a few may come from a revised dataset."""
SCALED = 5.0
"""A feature has another unit where the ratio of its spreads is above this or below its inverse."""
DRIFTED = 10.0
"""Ratio of the spreads in training and validation above which a feature has drifted: an order of magnitude."""


@SIGNALS.add
def features(record: Record) -> float | None:
    return _size(record.run.get("features"))


@SIGNALS.add
def live_features(record: Record) -> float | None:
    return _size(record.run.get("live_features"))


@SIGNALS.add
def dead_features(record: Record) -> float | None:
    total, live = features(record), live_features(record)
    return None if total is None or live is None else total - live


def _size(value: object) -> float | None:
    if isinstance(value, list):
        return float(len(value))
    return float(value) if isinstance(value, int | float) else None


def _drift(inputs: RunInputs) -> dict[str, Value]:
    """Counts features whose cross-sectional spread differs by an order of magnitude between training and validation."""
    inputs.require_sample()
    rows = inputs.record.rows(
        """SELECT name, median(std) FILTER (split = 'train'), median(std) FILTER (split = 'validation')
           FROM given WHERE name NOT LIKE 'target\\_%' ESCAPE '\\' GROUP BY name"""
    )
    spreads = [(before, after) for _, before, after in rows if before and after]
    drifted = sum(max(after / before, before / after) > DRIFTED for before, after in spreads)
    return {"inputs_drifted": float(drifted)} if spreads else {}


class Compared(NamedTuple):
    """A feature in the sampled sessions of a split, compared with the dataset's rows of the same sessions.

    Shares count sessions with the same number of stocks. Where stocks are left out every figure differs, which is a
    fault of the stocks and not of the feature.
    """

    name: str
    split: str
    unlike: float | None
    """Share of sessions with other moments."""
    constant: float
    """Share of sessions in which it is constant here and varies in the dataset."""
    spread_ratio: float | None
    """Median ratio of the spreads."""
    other_ic: float | None
    """Share of sessions with another correlation with the target."""
    other_stocks: float | None
    """Share of all sessions with another number of stocks; None where no number was recorded."""
    varies: float | None
    """Share of sessions in which it varies in the dataset; a market-wide feature is the same for all stocks."""

    @property
    def is_target(self) -> bool:
        return self.name.startswith("target_")

    @property
    def is_scaled(self) -> bool:
        """A change of unit keeps the correlation with the target; another column or noise changes it."""
        same_ic = self.other_ic is not None and self.other_ic <= OF_SESSIONS
        ratio = self.spread_ratio or 1.0
        return not 1 / SCALED <= ratio <= SCALED and self.constant <= OF_SESSIONS and same_ic


def _inputs_agree(inputs: RunInputs) -> dict[str, Value]:
    """Compares sampled blocks with the dataset's rows of the same sessions and universe."""
    inputs.require_sample()
    record = inputs.record
    sampled = {row[0] for row in record.rows("SELECT DISTINCT name FROM given")}
    names = (*inputs.manifest["features"], *(f"target_{h}d" for h in HORIZONS))
    if not sampled.intersection(names):
        return {}
    _expect(inputs, [name for name in names if name in sampled])
    everything = _compared(record)
    stocks: dict[str, Value] = {"stocks_not_given": _largest_of_a_split(everything)}
    compared = [row for row in everything if row.unlike is not None and (row.other_stocks or 0.0) <= OF_SESSIONS]
    if not compared:
        return stocks

    def features_where(condition: Callable[[Compared], bool]) -> float:
        return float(len({row.name for row in compared if not row.is_target and condition(row)}))

    varying = features_where(lambda row: (row.varies or 0.0) > OF_SESSIONS)
    constant = features_where(lambda row: row.constant > OF_SESSIONS)
    labels = [row.other_ic for row in compared if row.split == "train" and not row.is_target]
    measured = [share for share in labels if share is not None]
    return {
        "inputs_unlike_dataset": features_where(lambda row: (row.unlike or 0.0) > OF_SESSIONS),
        "inputs_constant": constant,
        "inputs_constant_share": constant / max(varying, 1),
        "inputs_scaled": features_where(lambda row: row.is_scaled),
        "labels_unlike_dataset": float(np.mean(measured)) if measured else None,
        **stocks,
        **_exchanged(record),
    }


def _expect(inputs: RunInputs, names: Sequence[str]) -> None:
    """Creates the table `expected`: the moments of each feature in the dataset, by sampled session."""
    columns = ", ".join(
        f"""struct_pack(name := '{name}', present := count("{name}"), mean := avg("{name}"),
            std := stddev_pop("{name}"), ic := corr("{name}", target_1d))"""
        for name in names
    )
    connection = inputs.record.connection
    # This reads more than all the rest of a diagnosis. Two threads vary the order of sums, far within INPUT_TOLERANCE.
    connection.execute("SET threads = 2")
    connection.execute(
        f"""CREATE OR REPLACE TEMP TABLE expected AS
            SELECT Date AS date, stocks, unnest(figures, recursive := true) FROM (
              SELECT Date, count(*) AS stocks, [{columns}] AS figures
              FROM (SELECT * FROM read_parquet(?) WHERE Date IN (SELECT DISTINCT date FROM given))
              JOIN (SELECT m.Date, m.Code FROM read_parquet(?) m WHERE m.{inputs.universe}) USING (Date, Code)
              GROUP BY Date)""",
        [inputs.rows, inputs.members],
    )
    connection.execute("SET threads = 1")


def _compared(record: Record) -> list[Compared]:
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
    return [Compared(*row) for row in rows]


def _unlike(g: str, e: str) -> str:
    """SQL: whether the moments of a feature in a session differ between the relations `g` and `e`."""
    return f"""{g}.present != {e}.present OR abs({g}.mean - {e}.mean) > {INPUT_TOLERANCE} * (abs({e}.mean) + {e}.std)
               OR abs({g}.std - {e}.std) > {INPUT_TOLERANCE} * (abs({e}.mean) + {e}.std)"""


def _exchanged(record: Record) -> dict[str, Value]:
    """Features that have the moments and the IC of another feature instead of their own."""
    exchanged = record.rows(
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
        "inputs_exchanged": float(len({name for name, _, _ in exchanged})),
        "inputs_exchanged_example": "{1} in the place of {0} ({2})".format(*exchanged[0]) if exchanged else "none",
    }


def _largest_of_a_split(rows: Sequence[Compared]) -> float | None:
    """The mean share of sessions with another number of stocks, in the split where it is larger."""
    counted = [(row.split, row.other_stocks) for row in rows if row.other_stocks is not None]
    splits = {split for split, _ in counted}
    return max((float(np.mean([share for split, share in counted if split == of])) for of in splits), default=None)


AUDITS: tuple[Audit, ...] = (
    Audit(("inputs_drifted",), _drift),
    Audit(
        (
            "inputs_unlike_dataset",
            "inputs_constant",
            "inputs_constant_share",
            "inputs_scaled",
            "inputs_exchanged",
            "inputs_exchanged_example",
            "labels_unlike_dataset",
            "stocks_not_given",
        ),
        _inputs_agree,
    ),
)


RULES: tuple[Rule, ...] = (
    Rule(
        id="features_missing",
        cause="features carry no values",
        group="data",
        severity="explanation",
        when=all_of(("dead_features", ">", 0)),
        evidence="{live_features:.0f} of {features:.0f} live",
        next_step=(
            "add the tables that the dataset's manifest lists as missing to the source, then build again:"
            " {build_dataset}"
        ),
        question=questions.INPUTS_REACH_MODEL,
        channel="live features",
    ),
    Rule(
        id="inputs_constant",
        cause="features that vary in the dataset reach the model as a constant",
        group="data",
        severity="defect",
        when=all_of(("inputs_constant", ">", 0), ("inputs_constant_share", "<", 0.95), ("inputs_exchanged", "<=", 0)),
        evidence="{inputs_constant:.0f} features are constant in sampled blocks",
        next_step="check the names that the loader looks for, then train again: {rerun}",
        question=questions.INPUTS_REACH_MODEL,
        channel="inputs constant",
        suspects=("features_missing",),
    ),
    Rule(
        id="last_session_empty",
        cause="the features of the scored session do not reach the model",
        group="data",
        severity="defect",
        when=all_of(("inputs_constant_share", ">=", 0.95)),
        evidence="{inputs_constant_share:.0%} of the features are constant in the last session of sampled blocks",
        next_step="check the padding of blocks and the position that is read, then train again: {rerun}",
        question=questions.INPUTS_REACH_MODEL,
        channel="inputs constant",
        suspects=("zeros_reach_head", "features_missing"),
    ),
    Rule(
        id="inputs_scaled",
        cause="features reach the model in another unit than the dataset's",
        group="data",
        severity="defect",
        when=all_of(("inputs_scaled", ">", 0)),
        evidence=(
            "{inputs_scaled:.0f} features have a spread above five times or below a fifth of the dataset's, with the"
            " same correlation with the target"
        ),
        next_step="find the conversion between dataset and model, then train again: {rerun}",
        question=questions.INPUTS_REACH_MODEL,
        channel="inputs scaled",
        suspects=("unit_error",),
    ),
    Rule(
        id="inputs_drifted",
        cause="features change their spread by an order of magnitude between training and validation",
        group="data",
        severity="explanation",
        when=all_of(("inputs_drifted", ">", 0)),
        evidence="{inputs_drifted:.0f} features, by their median spread within a session",
        next_step="look for a unit that changes in the source, then build again: {build_dataset}",
        question=questions.INPUTS_REACH_MODEL,
        channel="inputs drifted",
        suspects=("unit_error",),
    ),
    Rule(
        id="inputs_exchanged",
        cause="features reach the model in the columns of other features",
        group="data",
        severity="defect",
        when=all_of(("inputs_exchanged", ">", 0)),
        evidence=(
            "{inputs_exchanged:.0f} features have the mean, spread and correlation with the target of another one:"
            " {inputs_exchanged_example}"
        ),
        next_step=(
            "compare the order of the columns where blocks are made with the dataset's, then train again: {rerun}"
        ),
        question=questions.INPUTS_REACH_MODEL,
        channel="inputs differ",
        suspects=("inputs_altered",),
        root=True,
    ),
    Rule(
        id="inputs_unlike_dataset",
        cause="what the model was given is not what the dataset holds",
        group="data",
        severity="defect",
        when=all_of(
            ("inputs_unlike_dataset", ">", 0),
            ("inputs_constant", "<=", 0),
            ("inputs_scaled", "<=", 0),
            ("inputs_exchanged", "<=", 0),
        ),
        evidence="{inputs_unlike_dataset:.0f} features differ from the dataset in most sampled sessions",
        next_step="find what changes the features between dataset and model, then train again: {rerun}",
        question=questions.INPUTS_REACH_MODEL,
        channel="inputs differ",
        suspects=("inputs_altered",),
        root=True,
    ),
    Rule(
        id="labels_unlike_dataset",
        cause="training targets do not belong to the features beside them",
        group="data",
        severity="defect",
        when=all_of(
            ("labels_unlike_dataset", ">", 0.3),
            ("inputs_unlike_dataset", "<=", 0),
            ("targets_unlike_dataset", "<=", 0.001),
        ),
        evidence=(
            "in {labels_unlike_dataset:.0%} of the sampled training cells a feature's correlation with the target"
            " differs from the dataset's, although the features do not"
        ),
        next_step="compare a training block with the dataset row by row, then train again: {rerun}",
        question=questions.INPUTS_REACH_MODEL,
        channel="labels",
        suspects=("labels_misaligned",),
        root=True,
    ),
    Rule(
        id="stocks_not_given",
        cause="the stocks of sampled sessions are not those of the universe",
        group="data",
        severity="defect",
        when=all_of(("stocks_not_given", ">", 0.25)),
        evidence="their number differs in {stocks_not_given:.0%} of a split's sampled sessions",
        next_step="find the filter between dataset and model, then train again: {rerun}",
        question=questions.INPUTS_REACH_MODEL,
        channel="stocks given",
        suspects=("train_filter_on_validation",),
    ),
)
