"""Whether anything was learnt: Sharpe, IC, the ridge baseline and the experiments."""

from __future__ import annotations

import math

from atft_pipeline.diagnostics import questions
from atft_pipeline.diagnostics.changes import lowered, raised
from atft_pipeline.diagnostics.experiments.plan import BY_ID as EXPERIMENTS_BY_ID
from atft_pipeline.diagnostics.rule import SHARPE_IS_LOW, Rule, all_of
from atft_pipeline.diagnostics.signal import SignalTable
from atft_pipeline.inspection.reader import Record

SIGNALS = SignalTable()

EARLY_MILESTONE_SHARE = 0.8
"""Expected Sharpe before the criterion's epoch, as a share of the criterion: about 0.08 by epoch 5."""


def _decision(record: Record) -> tuple[int, float, float | None] | None:
    """(epoch, Sharpe, se) at the criterion epoch, or at the last evaluation of a run that has not reached it."""
    values = record.evaluation("sharpe_daily")
    if not values:
        return None
    epoch = record.criterion_epoch if record.criterion_epoch in values else max(values)
    return epoch, *values[epoch]


def _demanded(record: Record, epoch: int) -> float:
    return record.criterion_sharpe * (1.0 if epoch >= record.criterion_epoch else EARLY_MILESTONE_SHARE)


@SIGNALS.add
def sharpe_epoch(record: Record) -> float | None:
    decision = _decision(record)
    return None if decision is None else float(decision[0])


@SIGNALS.add
def sharpe(record: Record) -> float | None:
    decision = _decision(record)
    return None if decision is None else decision[1]


@SIGNALS.add
def sharpe_se(record: Record) -> float | None:
    decision = _decision(record)
    if decision is None or decision[2] is not None:
        return None if decision is None else decision[2]
    recorded = record.evaluation("sharpe_se").get(decision[0])
    return None if recorded is None else recorded[0]


@SIGNALS.add
def sharpe_demanded(record: Record) -> float | None:
    decision = _decision(record)
    return None if decision is None else _demanded(record, decision[0])


@SIGNALS.add
def sharpe_shortfall(record: Record) -> float | None:
    """How far the Sharpe is below the criterion, before its epoch below the milestone; negative where it is above."""
    decision = _decision(record)
    return None if decision is None else _demanded(record, decision[0]) - decision[1]


@SIGNALS.add
def sharpe_distance_se(record: Record) -> float | None:
    """|Sharpe - demanded Sharpe| in standard errors."""
    shortfall, error = sharpe_shortfall(record), sharpe_se(record)
    return abs(shortfall) / error if shortfall is not None and error else None


def _paired_t(record: Record, column: str) -> float | None:
    """t of the mean daily difference, last minus first evaluated epoch, on the same validation sessions."""
    (row,) = record.rows(
        f"""WITH d AS (SELECT epoch, date, {column} AS x FROM daily
                       WHERE split = 'validation' AND slice = ? AND isfinite({column})),
                 ends AS (SELECT min(epoch) AS first, max(epoch) AS last FROM d),
                 paired AS (SELECT b.x - a.x AS change FROM d a JOIN d b USING (date), ends
                            WHERE a.epoch = ends.first AND b.epoch = ends.last AND ends.first < ends.last)
            SELECT avg(change), stddev_samp(change), count(*) FROM paired""",
        record.slice,
    )
    if row[2] < 2:
        return None
    mean, spread, sessions = float(row[0]), float(row[1]), int(row[2])
    return mean / spread * math.sqrt(sessions) if spread > 0 else 0.0


@SIGNALS.add
def sharpe_rise_t(record: Record) -> float | None:
    return _paired_t(record, "gross")


@SIGNALS.add
def ic_rise_t(record: Record) -> float | None:
    """The larger of the paired t of IC and of RankIC."""
    measured = [t for t in (_paired_t(record, "ic"), _paired_t(record, "rank_ic")) if t is not None]
    return max(measured, default=None)


def _last_figure(record: Record, metric: str) -> float | None:
    values = record.evaluation(metric)
    return values[max(values)][0] if values else None


@SIGNALS.add
def ic_last(record: Record) -> float | None:
    return _last_figure(record, "ic_mean")


@SIGNALS.add
def rank_ic_last(record: Record) -> float | None:
    return _last_figure(record, "rank_ic_mean")


@SIGNALS.add
def ic_last_t(record: Record) -> float | None:
    """The larger t of mean IC and mean RankIC over the validation sessions of the last evaluated epoch."""
    (row,) = record.rows(
        """SELECT avg(ic) / nullif(stddev_samp(ic), 0) * sqrt(count(ic)),
                  avg(rank_ic) / nullif(stddev_samp(rank_ic), 0) * sqrt(count(rank_ic))
           FROM daily WHERE split = 'validation' AND slice = $1 AND isfinite(ic) AND isfinite(rank_ic)
             AND epoch = (SELECT max(epoch) FROM daily WHERE split = 'validation' AND slice = $1)""",
        record.slice,
    )
    return max((float(t) for t in row if t is not None), default=None)


@SIGNALS.add
def ic_last_t_signed(record: Record) -> float | None:
    """t of the mean IC over the validation sessions of the last evaluated epoch, with its sign."""
    return record.scalar(
        """SELECT avg(ic) / nullif(stddev_samp(ic), 0) * sqrt(count(ic)) FROM daily
           WHERE split = 'validation' AND slice = $1 AND isfinite(ic)
             AND epoch = (SELECT max(epoch) FROM daily WHERE split = 'validation' AND slice = $1)""",
        record.slice,
    )


RULES: tuple[Rule, ...] = (
    Rule(
        id="baseline_finds_nothing",
        cause="ridge finds nothing in the features either",
        group="data",
        severity="explanation",
        when=all_of(("baseline_ic_t", "<", 1.0), ("baseline_ic_t", ">=", -2.0)),
        evidence="ridge on the same sessions: IC {baseline_ic:.4f}, {baseline_ic_t:.1f} standard errors from zero",
        next_step="add features that hold a signal, and fit the baselines on them: {ask_baselines}",
        question=questions.IC_FLAT,
        channel="baseline",
        suspects=("no_signal",),
    ),
    Rule(
        id="baseline_finds_more",
        cause="ridge finds a signal that the network does not",
        group="data",
        severity="explanation",
        when=all_of(("baseline_ic_t", ">=", 2.0), ("ic_last_t", "<", 1.0)),
        evidence=(
            "ridge on the same sessions: IC {baseline_ic:.4f}, {baseline_ic_t:.1f} standard errors from zero; the"
            " network {ic_last:.4f}"
        ),
        next_step=(
            "look for the fault in the training, not in the features: the other causes of this report say where"
        ),
        question=questions.IC_FLAT,
        channel="baseline",
        suspects=("underfit", "labels_misaligned", "lr_too_low", "frozen_component"),
    ),
    Rule(
        id="relation_reversed",
        cause="relations of the training sessions reverse in validation, also for ridge",
        group="data",
        severity="explanation",
        when=all_of(("baseline_ic_t", "<", -2.0)),
        evidence="ridge on the same sessions: IC {baseline_ic:.4f}, {baseline_ic_t:.1f} standard errors from zero",
        next_step="train up to newer sessions",
        changes=(
            raised("split.train_fraction", 7 / 6, only_if=("split.scheme", "fraction")),
            lowered("split.validation_sessions", 0.5, at_least=60, only_if=("split.scheme", "sessions")),
        ),
        question=questions.IC_FLAT,
        channel="baseline reversed",
        suspects=("regime_shift",),
    ),
    Rule(
        id="ic_negative",
        cause="the validation IC is negative beyond chance",
        group="ic",
        severity="explanation",
        when=all_of(("ic_last_t_signed", "<", -2.0)),
        evidence="IC {ic_last:.4f}, {ic_last_t_signed:.1f} standard errors from zero",
        next_step="fit ridge, to tell a wrong sign from another regime: {diagnose_all}",
        question=questions.IC_FLAT,
        channel="ic negative",
        suspects=("regime_shift", "sign_inverted", "terms_in_conflict"),
    ),
    Rule(
        id="ic_flat",
        cause="IC does not rise and does not differ from zero: nothing was learnt that generalises",
        group="ic",
        severity="explanation",
        when=all_of(("ic_rise_t", "<", 2.0), ("ic_last_t", "<", 2.0)),
        evidence=(
            "IC {ic_last:.4f}, RankIC {rank_ic_last:.4f}, at best {ic_last_t:.1f} standard errors from zero; change"
            " since the first evaluation {ic_rise_t:.1f}"
        ),
        next_step="fit the baselines, to see whether the features hold any signal: {ask_baselines}",
        question=questions.IC_FLAT,
        channel="result",
        suspects=("no_signal", "labels_misaligned", "regime_shift"),
    ),
    Rule(
        id="ic_rises_sharpe_flat",
        cause="IC rises and the Sharpe does not: the ranking improves where the portfolio does not trade",
        group="ic",
        severity="explanation",
        when=all_of(("ic_rise_t", ">=", 2.0), ("sharpe_rise_t", "<", 1.0), SHARPE_IS_LOW),
        evidence=(
            "from the first to the last evaluation: IC or RankIC {ic_rise_t:.1f}, daily return {sharpe_rise_t:.1f}"
            " standard errors (paired by session)"
        ),
        next_step="weigh the Sharpe term more, which depends on the traded tails (experiment B): {experiment_b}",
        experiments=("B",),
        question=questions.IC_RISES_ALONE,
        channel="result",
        suspects=("sharpe_term_light",),
    ),
    Rule(
        id="experiment_a_helped",
        cause="experiment A helped: a slower decay gains IC",
        group="experiments",
        severity="explanation",
        when=all_of(("experiment_a_gain_t", ">", 2.0)),
        evidence="daily IC of the experiment over this run's: {experiment_a_gain_t:.1f} standard errors",
        next_step="keep the settings of the experiment",
        changes=EXPERIMENTS_BY_ID["A"].changes,
        question=questions.DECAYED_EARLY,
        channel="experiment a",
        suspects=("lr_decayed_early",),
    ),
    Rule(
        id="experiment_b_helped",
        cause="experiment B helped: a heavier Sharpe term gains IC",
        group="experiments",
        severity="explanation",
        when=all_of(("experiment_b_gain_t", ">", 2.0)),
        evidence="daily IC of the experiment over this run's: {experiment_b_gain_t:.1f} standard errors",
        next_step="keep the settings of the experiment",
        changes=EXPERIMENTS_BY_ID["B"].changes,
        question=questions.SHARPE_WEIGHT_LOW,
        channel="experiment b",
        suspects=("sharpe_term_light",),
    ),
    Rule(
        id="experiment_c_helped",
        cause="experiment C helped: more capacity gains IC",
        group="experiments",
        severity="explanation",
        when=all_of(("experiment_c_gain_t", ">", 2.0)),
        evidence="daily IC of the experiment over this run's: {experiment_c_gain_t:.1f} standard errors",
        next_step="keep the settings of the experiment",
        changes=EXPERIMENTS_BY_ID["C"].changes,
        question=questions.BOTH_FLAT,
        channel="experiment c",
        suspects=("underfit",),
    ),
    Rule(
        id="experiment_d_helped",
        cause="experiment D helped: another learning rate gains IC",
        group="experiments",
        severity="explanation",
        when=all_of(("experiment_d_gain_t", ">", 2.0)),
        evidence="daily IC of the experiment over this run's: {experiment_d_gain_t:.1f} standard errors",
        next_step="keep the settings of the experiment",
        changes=EXPERIMENTS_BY_ID["D"].changes,
        question=questions.RATE_TOO_LOW,
        channel="experiment d",
        suspects=("lr_too_low",),
    ),
    Rule(
        id="sharpe_below_demanded",
        cause="the Sharpe is below the demanded one, beyond chance",
        group="ic",
        severity="explanation",
        when=all_of(("sharpe_shortfall", ">", 0.0), ("sharpe_distance_se", ">=", 1.645)),
        evidence=(
            "Sharpe {sharpe:.4f} ± {sharpe_se:.4f} against {sharpe_demanded:.2f}: {sharpe_distance_se:.1f} standard"
            " errors below"
        ),
        next_step="run every probe: {diagnose_all}",
        question=questions.CRITERION_DECIDED,
        channel="result",
    ),
    Rule(
        id="sampling_noise",
        cause="too few sessions to tell the Sharpe from the threshold",
        group="noise",
        severity="explanation",
        when=all_of(("sharpe_distance_se", "<", 1.645)),
        evidence=(
            "Sharpe {sharpe:.4f} ± {sharpe_se:.4f} against {sharpe_demanded:.2f}: {sharpe_distance_se:.1f} standard"
            " errors apart"
        ),
        next_step="validate on more sessions",
        changes=(
            raised("split.validation_fraction", 1.5, only_if=("split.scheme", "fraction")),
            raised("split.validation_sessions", 2, only_if=("split.scheme", "sessions")),
        ),
        question=questions.CRITERION_DECIDED,
        channel="result",
        suspects=("sampling_noise",),
    ),
)
