"""Whether sessions, targets, rows, features and graph of the run follow from its source and configuration."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from atft_pipeline.diagnostics import questions
from atft_pipeline.diagnostics.rule import Rule, all_of
from atft_pipeline.diagnostics.run_inputs import RunInputs
from atft_pipeline.diagnostics.signal import Audit, SignalTable, Value
from atft_pipeline.training.telemetry.input_sample import sampled

SIGNALS = SignalTable()

TARGET_TOLERANCE = 1e-6
LEAVING_SESSIONS, LEAVING_ROWS, LEAVING_TAIL = 250, 60_000, 20
"""A smaller dataset need not have stocks that leave. About 1% of stocks leave in a year, so among 240 stock-years none
leaves with a probability of a tenth. Stocks whose rows end within the tail may still be listed."""


def _in_split(inputs: RunInputs) -> dict[str, Value]:
    """Compares the sessions evaluated as validation with the configured split of the dataset's sessions."""
    inputs.require_scores()
    sessions, split = inputs.sessions, inputs.split
    dates = inputs.record.connection.execute("SELECT DISTINCT Date FROM scored").fetchnumpy()["Date"]
    evaluated = np.unique(np.asarray(dates, "datetime64[D]"))
    expected, trained = sessions[split.validation], sessions[split.train]
    return {
        "validation_elsewhere": float(np.mean(~np.isin(evaluated, expected))),
        "validation_in_training": float(np.mean(np.isin(evaluated, trained))),
    }


def _targets_agree(inputs: RunInputs) -> dict[str, Value]:
    """Compares the evaluated targets with the dataset's, and counts the rows of the universe without a score."""
    inputs.require_scores()
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


def _sessions(inputs: RunInputs) -> dict[str, Value]:
    """Compares the sessions that the first epoch trained on with the configured split."""
    inputs.require_sample()
    record, sessions, split = inputs.record, inputs.sessions, inputs.split

    def days(query: str, *parameters: object) -> NDArray[np.datetime64]:
        columns = record.connection.execute(query, list(parameters)).fetchnumpy()
        return np.asarray(next(iter(columns.values())), "datetime64[D]")

    seen = days("SELECT DISTINCT date FROM given WHERE split = 'train'")
    if not record.epochs_done or not len(seen):
        return {}
    inhabited = days(f"SELECT DISTINCT Date FROM read_parquet(?) WHERE {inputs.universe}", inputs.members)
    trainable = split.train[np.isin(sessions[split.train], inhabited)]
    return {
        "trained_elsewhere": float(np.mean(~np.isin(seen, sessions[split.train]))),
        "train_not_seen": float(np.mean(~np.isin(sessions[sampled(trainable)], seen))),
    }


def _feature_ic(inputs: RunInputs) -> dict[str, Value]:
    """The largest mean correlation of a feature with the target, over the sampled sessions."""
    inputs.require_sample()
    rows = inputs.record.rows(
        """SELECT name, abs(avg(ic)) AS size FROM given WHERE name NOT LIKE 'target\\_%' ESCAPE '\\' AND ic IS NOT NULL
           GROUP BY name HAVING count(*) >= 8 ORDER BY size DESC LIMIT 1"""
    )
    return {"feature_ic": float(rows[0][1]), "feature_ic_name": str(rows[0][0])} if rows else {}


def _leaving(inputs: RunInputs) -> dict[str, Value]:
    """Counts stocks whose rows end before the dataset does; not measured where it is too small to expect one."""
    sessions = inputs.sessions
    if len(sessions) < LEAVING_SESSIONS or len(sessions) * inputs.manifest["stocks"] < LEAVING_ROWS:
        return {}
    cut = sessions[-LEAVING_TAIL].item()
    query = "SELECT count(*) FROM (SELECT Code FROM read_parquet(?) GROUP BY Code HAVING max(Date) < ?)"
    return {"codes_that_leave": inputs.record.scalar(query, inputs.members, cut)}


AUDITS: tuple[Audit, ...] = (
    Audit(
        (
            "validation_elsewhere",
            "validation_in_training",
        ),
        _in_split,
    ),
    Audit(
        (
            "targets_unlike_dataset",
            "rows_not_scored",
        ),
        _targets_agree,
    ),
    Audit(
        (
            "trained_elsewhere",
            "train_not_seen",
        ),
        _sessions,
    ),
    Audit(
        (
            "feature_ic",
            "feature_ic_name",
        ),
        _feature_ic,
    ),
    Audit(("codes_that_leave",), _leaving),
)


RULES: tuple[Rule, ...] = (
    Rule(
        id="validation_overlaps_training",
        cause="sessions evaluated as validation belong to training",
        group="validity",
        severity="invalid",
        when=all_of(("validation_in_training", ">", 0)),
        evidence=(
            "{validation_in_training:.0%} of the validation sessions are training sessions by the configured split"
        ),
        next_step="train again with the configured split: {rerun}",
        question=questions.SHARPE_IS_OWN,
        channel="split",
        suspects=("wrong_split",),
        root=True,
    ),
    Rule(
        id="validation_elsewhere",
        cause="the sessions evaluated are not those of the configured split",
        group="validity",
        severity="invalid",
        when=all_of(("validation_elsewhere", ">", 0)),
        evidence="{validation_elsewhere:.0%} of the validation sessions are outside the configured split",
        next_step="train again with the configured split: {rerun}",
        question=questions.SHARPE_IS_OWN,
        channel="split",
        suspects=("wrong_split",),
        root=True,
    ),
    Rule(
        id="trained_elsewhere",
        cause="sessions outside the training split were trained on",
        group="validity",
        severity="invalid",
        when=all_of(("trained_elsewhere", ">", 0)),
        evidence=(
            "{trained_elsewhere:.0%} of the training sessions sampled in the first epoch are outside the configured"
            " split"
        ),
        next_step="find what chooses the training sessions, then train again: {rerun}",
        question=questions.SHARPE_IS_OWN,
        channel="split",
        suspects=("wrong_split",),
        root=True,
    ),
    Rule(
        id="train_not_seen",
        cause="sessions of the training split never reached the model",
        group="data",
        severity="defect",
        when=all_of(("train_not_seen", ">", 0.1), ("trained_elsewhere", "<=", 0)),
        evidence="{train_not_seen:.0%} of the sampled ones were not read in the first epoch",
        next_step="find what draws the blocks of an epoch, then train again: {rerun}",
        question=questions.INPUTS_REACH_MODEL,
        channel="split",
        suspects=("wrong_split",),
        root=True,
    ),
    Rule(
        id="targets_of_another_definition",
        cause="the targets evaluated are not the dataset's",
        group="validity",
        severity="invalid",
        when=all_of(("targets_unlike_dataset", ">", 0.001)),
        evidence="{targets_unlike_dataset:.0%} of the rows have another target_1d than in the dataset",
        next_step="compare one row of the predictions with the dataset, then train again: {rerun}",
        question=questions.SHARPE_IS_OWN,
        channel="targets",
        suspects=("target_shifted",),
    ),
    Rule(
        id="targets_unlike_source",
        cause="the dataset's targets do not follow from its source",
        group="validity",
        severity="invalid",
        when=all_of(("targets_unlike_source", ">", 0.001)),
        evidence="{targets_unlike_source:.0%} of the targets differ when they are computed again",
        next_step="build the dataset again and train on it: {build_dataset}",
        question=questions.SHARPE_IS_OWN,
        channel="targets of source",
        suspects=("target_shifted",),
        root=True,
    ),
    Rule(
        id="rows_not_evaluated",
        cause="rows of the universe were left out of the evaluation",
        group="validity",
        severity="invalid",
        when=all_of(("rows_not_scored", ">", 0.001), ("validation_elsewhere", "<=", 0)),
        evidence="{rows_not_scored:.1%} of the validation rows in the universe have no prediction",
        next_step="remove the filter from the evaluation, then train again: {rerun}",
        question=questions.SHARPE_IS_OWN,
        channel="rows",
        suspects=("train_filter_on_validation",),
    ),
    Rule(
        id="feature_too_good",
        cause="one feature alone predicts better than an honest daily feature can",
        group="data",
        severity="defect",
        when=all_of(("feature_ic", ">", 0.15)),
        evidence="mean IC of {feature_ic_name} over the sampled sessions: {feature_ic:.3f}",
        next_step="compute its rows again without later quotes and compare them: {diagnose_all}",
        question=questions.SHARPE_IS_OWN,
        channel="feature ic",
        suspects=("look_ahead_in_feature", "target_shifted", "labels_misaligned"),
        root=True,
    ),
    Rule(
        id="result_too_good",
        cause="the result is too good to be true",
        group="data",
        severity="defect",
        when=all_of(("ic_last", ">", 0.15)),
        evidence="IC {ic_last:.3f}",
        next_step="treat it as a leak until the probes say otherwise: {diagnose_all}",
        question=questions.SHARPE_IS_OWN,
        channel="too good",
        suspects=("look_ahead_in_feature", "target_shifted", "wrong_split"),
        root=True,
    ),
    Rule(
        id="features_know_later",
        cause="features change when later quotes are withheld",
        group="data",
        severity="defect",
        when=all_of(("features_know_later", ">", 0)),
        evidence="{features_know_later:.0f} features, among them {features_know_later_names}",
        next_step="repair the feature, or build the dataset again from its source: {build_dataset}",
        question=questions.DATASET_IS_OF_SOURCE,
        channel="features made again",
        suspects=("look_ahead_in_feature",),
        root=True,
    ),
    Rule(
        id="rows_unlike_source",
        cause="the dataset has other rows than its source gives",
        group="data",
        severity="defect",
        when=all_of(("rows_unlike_source", ">", 0.001)),
        evidence="{rows_unlike_source:.1%} of the rows exist in only one of the two",
        next_step="build the dataset again from its source: {build_dataset}",
        question=questions.DATASET_IS_OF_SOURCE,
        channel="rows made again",
        suspects=("survivorship",),
        root=True,
    ),
    Rule(
        id="no_stock_leaves",
        cause="no stock ever leaves the dataset: its source may hold survivors only",
        group="data",
        severity="observation",
        when=all_of(("codes_that_leave", "<=", 0)),
        evidence="stocks whose rows end before the dataset does: {codes_that_leave:.0f}",
        next_step="add delisted stocks to the source: results on survivors alone are too good",
        question=questions.DATASET_IS_OF_SOURCE,
        channel="leaving",
        suspects=("survivorship",),
    ),
    Rule(
        id="dataset_altered",
        cause="the dataset is not the one that its manifest describes",
        group="data",
        severity="defect",
        when=all_of(("parts_unlike_manifest", ">", 0)),
        evidence="{parts_unlike_manifest:.0f} months have changed since the dataset was built",
        next_step="build the dataset again: {build_dataset}",
        question=questions.DATASET_IS_OF_SOURCE,
        channel="dataset content",
        suspects=("look_ahead_in_feature", "survivorship"),
    ),
    Rule(
        id="graph_unlike_dataset",
        cause="the graph is not the one that follows from the dataset",
        group="data",
        severity="defect",
        when=all_of(("edges_unlike_dataset", ">", 0.001)),
        evidence="{edges_unlike_dataset:.0%} of the edges exist in only one of the two",
        next_step="build the graph again: {build_graph}",
        question=questions.DATASET_IS_OF_SOURCE,
        channel="graph made again",
        suspects=("future_graph",),
    ),
)
