"""Whether the reported figures are this run's own: verdict, evaluations and daily returns are compared."""

from __future__ import annotations

import math

from atft_pipeline.diagnostics import questions
from atft_pipeline.diagnostics.rule import Rule, all_of
from atft_pipeline.diagnostics.run_inputs import RunInputs
from atft_pipeline.diagnostics.signal import Audit, SignalTable, Value, listed
from atft_pipeline.inspection.reader import Record, as_number

SIGNALS = SignalTable()

RECOMPUTED_TOLERANCE = 1e-6
"""Tolerance of a figure that is computed again from its own rows."""


@SIGNALS.add
def verdict_hashes_elsewhere(record: Record) -> float | None:
    """Hashes of the verdict (weights, predictions) that this run's evaluations lack at the epochs it names."""
    epochs = _verdict_epochs(record)
    compared = foreign = 0
    for name in ("weights_hash", "predictions_hash"):
        claimed = record.verdict.get(name)
        evaluated = record.rows(
            f"SELECT DISTINCT {name} FROM evals WHERE epoch IN (SELECT unnest(?)) AND {name} IS NOT NULL", epochs
        )
        if claimed and evaluated:
            compared += 1
            foreign += (claimed,) not in evaluated
    return float(foreign) if compared else None


def _verdict_epochs(record: Record) -> list[int]:
    last = record.scalar("SELECT max(epoch) FROM evals")
    return [int(as_number(epoch, -1)) for epoch in (record.criterion.get("epoch"), last)]


@SIGNALS.add
def verdict_keys_elsewhere(record: Record) -> float | None:
    """How many of run key, config key and dataset fingerprint differ between verdict.json and run.json."""
    pairs = [
        (record.verdict.get(theirs), record.run.get(ours))
        for theirs, ours in (
            ("run_key", "key"),
            ("config_key", "config_key"),
            ("dataset_fingerprint", "dataset_fingerprint"),
        )
    ]
    recorded = [pair for pair in pairs if None not in pair]
    return float(sum(a != b for a, b in recorded)) if recorded else None


@SIGNALS.add
def verdict_sharpe(record: Record) -> float | None:
    value = as_number(record.criterion.get("value"), math.nan)
    return None if math.isnan(value) else value


@SIGNALS.add
def verdict_sharpe_gap(record: Record) -> float | None:
    """|Sharpe of the verdict - this run's evaluation at the epoch, split and slice that the verdict names|."""
    claimed, criterion = verdict_sharpe(record), record.criterion
    evaluated = record.evaluation("sharpe_daily", str(criterion.get("split") or "validation")).get(
        int(as_number(criterion.get("epoch"), -1))
    )
    return None if claimed is None or evaluated is None else abs(claimed - evaluated[0])


@SIGNALS.add
def verdict_maximum_gap(record: Record) -> float | None:
    """|Sharpe of the verdict - the largest over all evaluated epochs|; infinite where its own epoch has the largest."""
    claimed, values = verdict_sharpe(record), record.evaluation("sharpe_daily")
    if claimed is None or not values:
        return None
    best = max(values, key=lambda epoch: values[epoch][0])
    return math.inf if best == int(as_number(record.criterion.get("epoch"), -1)) else abs(claimed - values[best][0])


@SIGNALS.add
def daily_sharpe_gap(record: Record) -> float | None:
    """Largest |evals.sharpe_daily - mean/std(ddof 1) of daily.gross| over epochs, splits and slices."""
    return record.scalar(
        """WITH own AS (SELECT epoch, split, slice, avg(gross) / nullif(stddev_samp(gross), 0) AS sharpe
                        FROM daily WHERE isfinite(gross) GROUP BY ALL)
           SELECT max(abs(e.value - own.sharpe)) FROM evals e JOIN own USING (epoch, split, slice)
           WHERE e.metric = 'sharpe_daily' AND isfinite(e.value)"""
    )


@SIGNALS.add
def sharpe_by_epoch(record: Record) -> str | None:
    values = record.evaluation("sharpe_daily")
    kept = [e for e in values if e in (1, 5, record.criterion_epoch) or e % 10 == 0 or e == max(values)]
    return ", ".join(f"epoch {e}: {values[e][0]:.4f}" for e in kept) or None


def _validity_items(record: Record) -> list[dict[str, object]]:
    items = record.verdict.get("validity")
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []


@SIGNALS.add
def battery_evaluating_twice(record: Record) -> float | None:
    """1 where evaluating the same weights in other batches gave other scores."""
    results = [i.get("passed") for i in _validity_items(record) if "evaluating_twice" in str(i.get("name"))]
    decided = [passed for passed in results if passed is not None]
    return float(not all(decided)) if decided else None


@SIGNALS.add
def validity_failed(record: Record) -> float | None:
    measured = [item for item in _validity_items(record) if item.get("passed") is not None]
    return float(sum(not item["passed"] for item in measured)) if measured else None


@SIGNALS.add
def validity_failed_names(record: Record) -> str | None:
    measured = [item for item in _validity_items(record) if item.get("passed") is not None]
    failed = [f"{item.get('name')} ({item.get('explanation')})" for item in measured if not item["passed"]]
    return listed(failed if measured else None)


def _figures_agree(inputs: RunInputs) -> dict[str, Value]:
    """Whether IC and Sharpe follow from the daily rows."""
    gaps = inputs.record.rows(
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


AUDITS: tuple[Audit, ...] = (
    Audit(
        (
            "ic_gap",
            "sharpe_ratio_to_daily",
        ),
        _figures_agree,
    ),
)


RULES: tuple[Rule, ...] = (
    Rule(
        id="verdict_of_other_weights",
        cause="the verdict names weights or predictions that this run never evaluated",
        group="validity",
        severity="invalid",
        when=all_of(("verdict_hashes_elsewhere", ">", 0)),
        evidence=(
            "{verdict_hashes_elsewhere:.0f} of the verdict's weights_hash and predictions_hash occur in no evaluation"
            " of this run at the epochs it names"
        ),
        next_step="remove files of older runs from the directory, then train again: {rerun}",
        question=questions.SHARPE_IS_OWN,
        channel="verdict",
        suspects=("metric_of_other_run", "early_epoch_as_final"),
    ),
    Rule(
        id="verdict_of_other_run",
        cause="the verdict belongs to another run, configuration or dataset",
        group="validity",
        severity="invalid",
        when=all_of(("verdict_keys_elsewhere", ">", 0)),
        evidence=(
            "{verdict_keys_elsewhere:.0f} of run key, config key and dataset fingerprint differ between verdict.json"
            " and run.json"
        ),
        next_step="train again into a fresh directory: {rerun}",
        question=questions.SHARPE_IS_OWN,
        channel="verdict",
        suspects=("metric_of_other_run",),
    ),
    Rule(
        id="verdict_sharpe_not_in_evals",
        cause="the Sharpe of the verdict is not the one this run's evaluation measured",
        group="validity",
        severity="invalid",
        when=all_of(("verdict_sharpe_gap", ">", RECOMPUTED_TOLERANCE)),
        evidence="verdict {verdict_sharpe:.4f}, evaluations {sharpe_by_epoch}; difference {verdict_sharpe_gap:.2g}",
        next_step="compute the figures again from the stored predictions: {evaluate}",
        question=questions.SHARPE_IS_OWN,
        channel="verdict",
        suspects=("metric_of_other_run", "maximum_over_history"),
    ),
    Rule(
        id="sharpe_not_of_daily_returns",
        cause="the recorded Sharpe does not follow from this run's own daily returns",
        group="validity",
        severity="invalid",
        when=all_of(("daily_sharpe_gap", ">", RECOMPUTED_TOLERANCE)),
        evidence="mean/std (ddof 1) of daily.gross differs from evals.sharpe_daily by up to {daily_sharpe_gap:.2g}",
        next_step="compute the figures again from the stored predictions: {evaluate}",
        question=questions.SHARPE_IS_OWN,
        channel="sharpe from daily",
        suspects=("unit_of_sharpe", "metric_of_other_run"),
    ),
    Rule(
        id="validity_item_failed",
        cause="a validity check failed",
        group="validity",
        severity="invalid",
        when=all_of(("validity_failed", ">", 0)),
        evidence="failed: {validity_failed_names}",
        next_step="repair what the check names, then compute the figures again: {evaluate}",
        question=questions.SHARPE_IS_OWN,
        channel="validity checks",
    ),
    Rule(
        id="verdict_is_the_maximum",
        cause="the verdict's Sharpe is the best of all epochs, not the criterion's",
        group="validity",
        severity="invalid",
        when=all_of(("verdict_sharpe_gap", ">", RECOMPUTED_TOLERANCE), ("verdict_maximum_gap", "<", 1e-9)),
        evidence="verdict {verdict_sharpe:.4f} is the maximum over epochs; evaluations {sharpe_by_epoch}",
        next_step="read the figure at the criterion's epoch: {evaluate}",
        question=questions.SHARPE_IS_OWN,
        channel="verdict is maximum",
        suspects=("maximum_over_history",),
    ),
    Rule(
        id="verdict_from_elsewhere",
        cause="the verdict's Sharpe is neither that of its epoch nor the best of all epochs",
        group="validity",
        severity="invalid",
        when=all_of(("verdict_sharpe_gap", ">", RECOMPUTED_TOLERANCE), ("verdict_maximum_gap", ">=", 1e-9)),
        evidence="verdict {verdict_sharpe:.4f}, evaluations {sharpe_by_epoch}",
        next_step="find where the figure is read from, then train again into a fresh directory: {rerun}",
        question=questions.SHARPE_IS_OWN,
        channel="verdict is maximum",
        suspects=("metric_of_other_run", "early_epoch_as_final", "unit_of_sharpe"),
    ),
    Rule(
        id="ic_not_of_daily_rows",
        cause="the recorded IC does not follow from this run's own daily rows",
        group="validity",
        severity="invalid",
        when=all_of(("ic_gap", ">", RECOMPUTED_TOLERANCE)),
        evidence="mean of daily.ic differs from evals.ic_mean by up to {ic_gap:.2g}",
        next_step="compute the figures again from the stored predictions: {evaluate}",
        question=questions.SHARPE_IS_OWN,
        channel="ic from daily",
        suspects=("metric_of_other_run", "early_epoch_as_final"),
    ),
    Rule(
        id="sharpe_of_another_unit",
        cause="the Sharpe is annualised, or pooled over rows, under the name of a daily one",
        group="validity",
        severity="invalid",
        when=all_of(
            ("daily_sharpe_gap", ">", RECOMPUTED_TOLERANCE),
            ("ic_gap", "<=", RECOMPUTED_TOLERANCE),
            ("sharpe_repeat_span", "<", 3),
        ),
        evidence=(
            "the IC follows from the daily rows, but the Sharpe does not: {sharpe_ratio_to_daily:.2f} times mean/std of"
            " daily.gross"
        ),
        next_step="compute the figures again from the stored predictions: {evaluate}",
        question=questions.SHARPE_IS_OWN,
        channel="unit",
        suspects=("unit_of_sharpe",),
    ),
    Rule(
        id="evaluation_twice_differs",
        cause="evaluating the same weights in other batches gives other scores",
        group="validity",
        severity="invalid",
        when=all_of(("battery_evaluating_twice", ">", 0)),
        evidence="failed: {validity_failed_names}",
        next_step="find what reads across the batch (a block's statistics, a cache), then train again: {rerun}",
        question=questions.SHARPE_FOLLOWS_WEIGHTS,
        channel="twice",
        suspects=("evaluation_depends_on_batch",),
    ),
)
