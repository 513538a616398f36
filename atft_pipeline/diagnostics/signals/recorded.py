"""Named signals of one run's record: each a number, or None where the record cannot tell (which is not the same as 0).

"Early" and "late" are means over the first and the last quarter of the epochs, at least one each. A trend counts only
where Kendall's tau over the epochs says the curve has one, so that noise around a level reads as flat.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from atft_pipeline.config.schema import LOSS_TERMS
from atft_pipeline.evaluation.portfolio import long_short
from atft_pipeline.runs.reader import Curve, Record, as_number, read_scores

Value = float | str | None
Signals = Mapping[str, Value]

STILL_LEARNING_LR = 1e-6
"""At or below this an averaged float32 weight may not move at all, so unchanged weights prove nothing."""
MIN_TREND_EPOCHS = 5
TREND_TAU = 0.3
EARLY_MILESTONE_SHARE = 0.8
"""Expected Sharpe before the criterion's epoch, as a share of the criterion: about 0.08 by epoch 5."""
WARM_START_EPOCHS = 2
"""Epochs in a row without a better validation loss that are granted beyond the plateau's patience."""


def measure(record: Record) -> dict[str, Value]:
    """Every signal of SIGNALS, measured on `record`."""
    return {name: plain(function(record)) for name, function in SIGNALS.items()}


def plain(value: Value) -> Value:
    """The value, None for NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value


# Validity: is the number this run's own --------------------------------------------------------------------------


def verdict_hashes_elsewhere(record: Record) -> float | None:
    """Hashes of the verdict (weights, predictions) that this run's evaluations lack at the epochs it speaks of."""
    epochs = _verdict_epochs(record)
    found = foreign = 0
    for name in ("weights_hash", "predictions_hash"):
        claimed = record.verdict.get(name)
        own = record.rows(
            f"SELECT DISTINCT {name} FROM evals WHERE epoch IN (SELECT unnest(?)) AND {name} IS NOT NULL", epochs
        )
        if claimed and own:
            found += 1
            foreign += (claimed,) not in own
    return float(foreign) if found else None


def _verdict_epochs(record: Record) -> list[int]:
    last = record.scalar("SELECT max(epoch) FROM evals")
    return [int(as_number(epoch, -1)) for epoch in (record.criterion.get("epoch"), last)]


def verdict_keys_elsewhere(record: Record) -> float | None:
    """Of run key, config key and dataset fingerprint: how many differ between verdict.json and run.json."""
    pairs = [
        (record.verdict.get(theirs), record.run.get(ours))
        for theirs, ours in (
            ("run_key", "key"),
            ("config_key", "config_key"),
            ("dataset_fingerprint", "dataset_fingerprint"),
        )
    ]
    known = [pair for pair in pairs if None not in pair]
    return float(sum(a != b for a, b in known)) if known else None


def verdict_sharpe(record: Record) -> float | None:
    value = as_number(record.criterion.get("value"), math.nan)
    return None if math.isnan(value) else value


def verdict_sharpe_gap(record: Record) -> float | None:
    """|Sharpe of the verdict - this run's own evaluation at the epoch, split and slice the verdict names|."""
    claimed, criterion = verdict_sharpe(record), record.criterion
    own = record.evaluation("sharpe_daily", str(criterion.get("split") or "validation")).get(
        int(as_number(criterion.get("epoch"), -1))
    )
    return None if claimed is None or own is None else abs(claimed - own[0])


def verdict_maximum_gap(record: Record) -> float | None:
    """|Sharpe of the verdict - the largest over all evaluated epochs|; infinite where its own epoch has the largest."""
    claimed, values = verdict_sharpe(record), record.evaluation("sharpe_daily")
    if claimed is None or not values:
        return None
    best = max(values, key=lambda epoch: values[epoch][0])
    return math.inf if best == int(as_number(record.criterion.get("epoch"), -1)) else abs(claimed - values[best][0])


def daily_sharpe_gap(record: Record) -> float | None:
    """Largest |evals.sharpe_daily - mean/std(ddof 1) of daily.gross| over epochs, splits and slices."""
    return record.scalar(
        """WITH own AS (SELECT epoch, split, slice, avg(gross) / nullif(stddev_samp(gross), 0) AS sharpe
                        FROM daily WHERE isfinite(gross) GROUP BY ALL)
           SELECT max(abs(e.value - own.sharpe)) FROM evals e JOIN own USING (epoch, split, slice)
           WHERE e.metric = 'sharpe_daily' AND isfinite(e.value)"""
    )


def predictions_sharpe_gap(record: Record) -> float | None:
    """Largest |evals.sharpe_daily - Sharpe of the stored predictions|, criterion epoch and last epoch.

    Slice `liquid`, splits as stored; the portfolio is the evaluation's own definition.
    """
    gaps = []
    for epoch in {record.criterion_epoch, max(record.predictions, default=0)} & set(record.predictions):
        path = record.predictions[epoch]
        recorded = record.rows(
            """SELECT split, value FROM evals
               WHERE epoch = ? AND slice = 'liquid' AND metric = 'sharpe_daily' AND isfinite(value)""",
            epoch,
        )
        table = read_scores(path, [1]) if recorded else None
        for split, value in recorded if table is not None else []:
            recomputed = _portfolio_sharpe(record, table, str(split))
            if recomputed is not None:
                gaps.append(abs(float(value) - recomputed))
    return max(gaps, default=None)


def _portfolio_sharpe(record: Record, table: pa.Table, split: str) -> float | None:
    rows = table.filter(pc.and_(pc.equal(table["split"], split), table["is_liquid"]))
    if not rows.num_rows:
        return None
    dates, session = np.unique(rows["Date"].to_numpy(), return_inverse=True)
    codes = rows["Code"].combine_chunks().dictionary_encode()
    by_code = np.argsort(np.argsort(codes.dictionary.to_pylist()))  # ties break by code, so columns are sorted by it
    stock = by_code[codes.indices.to_numpy()]
    scores, targets = (np.full((len(dates), len(by_code)), np.nan) for _ in range(2))
    scores[session, stock] = rows["score_1d"].to_numpy()
    targets[session, stock] = rows["target_1d"].to_numpy()
    quantile = record.number("evaluation.quantile", 0.2)
    gross = long_short(scores, targets, quantile=quantile, cost_bps=0.0).gross
    return _sharpe(gross[np.isfinite(gross)])


def _sharpe(gross: NDArray[np.float64]) -> float | None:
    spread = float(np.std(gross, ddof=1)) if len(gross) > 1 else 0.0
    return float(np.mean(gross)) / spread if spread > 0 else None


def _moving_epochs(record: Record) -> set[int]:
    """Epochs whose learning rate was large enough to move weights; by configuration where no rate is recorded.

    Epochs in which no weight moved are not among them: what comes out of those must be the same.
    """
    rates, still = record.curve("lr"), _still_epochs(record)
    if not rates and record.number("train.optimizer.lr", 0.0) > STILL_LEARNING_LR:
        return {int(row[0]) for row in record.rows("SELECT DISTINCT epoch FROM evals")} - still
    return {epoch for epoch, lr in rates.items() if lr > STILL_LEARNING_LR} - still


def _still_epochs(record: Record) -> set[int]:
    """Epochs in which the step that was measured moved no weight."""
    curves = [record.curve("update_to_weight", component=name) for name in record.components("update_to_weight")]
    return {epoch for curve in curves for epoch in curve if all(other.get(epoch) == 0.0 for other in curves)}


def weights_hash_repeats(record: Record) -> float | None:
    """Evaluated epochs with the weights of the evaluation before, or the initial ones, although the rate was not 0."""
    initial = record.run.get("initial_weights_hash")
    return _hash_repeats(record, "weights_hash", str(initial) if initial else None)


def predictions_hash_repeats(record: Record) -> float | None:
    """Evaluated epochs with the very predictions of the evaluation before, although the rate was not 0."""
    return _hash_repeats(record, "predictions_hash", None)


def _hash_repeats(record: Record, column: str, initial: str | None) -> float | None:
    hashes = dict(
        record.rows(
            f"""SELECT epoch, min({column}) FROM evals
                WHERE {column} IS NOT NULL AND split = 'validation' GROUP BY epoch ORDER BY epoch"""
        )
    )
    before = [initial, *hashes.values()][: len(hashes)]
    moving = _moving_epochs(record)
    pairs = [
        (earlier, hashes[epoch]) for earlier, epoch in zip(before, hashes, strict=True) if earlier and epoch in moving
    ]
    return float(sum(now in (earlier, initial) for earlier, now in pairs)) if pairs else None


def _hashes(record: Record) -> dict[int, str]:
    return dict(
        record.rows(
            """SELECT epoch, min(weights_hash) FROM evals
               WHERE weights_hash IS NOT NULL AND split = 'validation' GROUP BY epoch ORDER BY epoch"""
        )
    )


def weights_hash_returns(record: Record) -> float | None:
    """Evaluations whose weights_hash was seen before, with another one between."""
    hashes = list(_hashes(record).values())
    if len(hashes) < 3:
        return None
    return float(sum(h in hashes[:i] and hashes[i - 1] != h for i, h in enumerate(hashes)))


def initial_hash_share(record: Record) -> float | None:
    """Share of the evaluations whose weights are the initial ones, of those after epochs that moved weights."""
    still, initial = _still_epochs(record), record.run.get("initial_weights_hash")
    hashes = [found for epoch, found in _hashes(record).items() if epoch not in still]
    return float(np.mean([h == initial for h in hashes])) if initial and hashes else None


def sharpe_repeat_span(record: Record) -> float | None:
    """Epochs between the first and the last evaluation with one and the same Sharpe, to 12 digits, at a moving rate."""
    moving, values = _moving_epochs(record), record.evaluation("sharpe_daily")
    seen: dict[float, list[int]] = {}
    for epoch, (value, _) in values.items():
        if epoch in moving:
            seen.setdefault(float(f"{value:.12g}"), []).append(epoch)
    if sum(map(len, seen.values())) < 2:
        return None
    return float(max(epochs[-1] - epochs[0] for epochs in seen.values()))


def sharpe_by_epoch(record: Record) -> str | None:
    values = record.evaluation("sharpe_daily")
    kept = [e for e in values if e in (1, 5, record.criterion_epoch) or e % 10 == 0 or e == max(values)]
    return ", ".join(f"epoch {e}: {values[e][0]:.4f}" for e in kept) or None


def score_dispersion(record: Record) -> float | None:
    """Median over sessions of the std of scores, from the newest stored predictions, else the recorded ratio.

    Standardised targets have std 1, so this is on the scale of the guard's dispersion ratio.
    """
    for epoch in sorted(record.predictions, reverse=True):
        table = read_scores(record.predictions[epoch], [1])
        if table is None or not table.num_rows:
            continue
        record.connection.register("scores", table)
        ratio = record.scalar(
            """SELECT median(s) FROM (SELECT stddev_samp(score_1d) AS s FROM scores
                 WHERE isfinite(score_1d) GROUP BY Date, split HAVING count(*) > 1)"""
        )
        record.connection.unregister("scores")
        if ratio is not None:
            return ratio
    return _last(record.curve("dispersion_ratio", split="validation"))


def invalid_evaluations(record: Record) -> float | None:
    return record.scalar("SELECT sum(CASE WHEN value = 0 THEN 1 ELSE 0 END) FROM evals WHERE metric = 'valid'")


def _validity_items(record: Record) -> list[dict[str, object]]:
    items = record.verdict.get("validity")
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def battery_evaluating_twice(record: Record) -> float | None:
    """1 where evaluating the same weights in other batches gave other scores."""
    results = [i.get("passed") for i in _validity_items(record) if "evaluating_twice" in str(i.get("name"))]
    known = [passed for passed in results if passed is not None]
    return float(not all(known)) if known else None


def validity_failed(record: Record) -> float | None:
    measured = [item for item in _validity_items(record) if item.get("passed") is not None]
    return float(sum(not item["passed"] for item in measured)) if measured else None


def validity_failed_names(record: Record) -> str | None:
    measured = [item for item in _validity_items(record) if item.get("passed") is not None]
    failed = [f"{item.get('name')} ({item.get('explanation')})" for item in measured if not item["passed"]]
    return _listed(failed if measured else None)


def _listed(names: list[str] | None) -> str | None:
    return None if names is None else ", ".join(names) or "none"


# Results ---------------------------------------------------------------------------------------------------------


def _decision(record: Record) -> tuple[int, float, float | None] | None:
    """(epoch, Sharpe, se) the criterion reads: its epoch, or the last evaluation of a run that has not got there."""
    values = record.evaluation("sharpe_daily")
    if not values:
        return None
    epoch = record.criterion_epoch if record.criterion_epoch in values else max(values)
    return epoch, *values[epoch]


def _demanded(record: Record, epoch: int) -> float:
    return record.criterion_sharpe * (1.0 if epoch >= record.criterion_epoch else EARLY_MILESTONE_SHARE)


def sharpe_epoch(record: Record) -> float | None:
    found = _decision(record)
    return None if found is None else float(found[0])


def sharpe(record: Record) -> float | None:
    found = _decision(record)
    return None if found is None else found[1]


def sharpe_se(record: Record) -> float | None:
    found = _decision(record)
    if found is None or found[2] is not None:
        return None if found is None else found[2]
    recorded = record.evaluation("sharpe_se").get(found[0])
    return None if recorded is None else recorded[0]


def sharpe_demanded(record: Record) -> float | None:
    found = _decision(record)
    return None if found is None else _demanded(record, found[0])


def sharpe_shortfall(record: Record) -> float | None:
    """What is missing to the criterion, or before its epoch to the milestone; negative when it is passed."""
    found = _decision(record)
    return None if found is None else _demanded(record, found[0]) - found[1]


def sharpe_distance_se(record: Record) -> float | None:
    """|Sharpe - demanded| in standard errors."""
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


def sharpe_rise_t(record: Record) -> float | None:
    return _paired_t(record, "gross")


def ic_rise_t(record: Record) -> float | None:
    """The larger of the paired t of IC and of RankIC."""
    measured = [t for t in (_paired_t(record, "ic"), _paired_t(record, "rank_ic")) if t is not None]
    return max(measured, default=None)


def _last_figure(record: Record, metric: str) -> float | None:
    values = record.evaluation(metric)
    return values[max(values)][0] if values else None


def ic_last(record: Record) -> float | None:
    return _last_figure(record, "ic_mean")


def rank_ic_last(record: Record) -> float | None:
    return _last_figure(record, "rank_ic_mean")


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


def ic_last_t_signed(record: Record) -> float | None:
    """t of the mean IC over the validation sessions of the last evaluated epoch, with its sign."""
    return record.scalar(
        """SELECT avg(ic) / nullif(stddev_samp(ic), 0) * sqrt(count(ic)) FROM daily
           WHERE split = 'validation' AND slice = $1 AND isfinite(ic)
             AND epoch = (SELECT max(epoch) FROM daily WHERE split = 'validation' AND slice = $1)""",
        record.slice,
    )


# Curves ----------------------------------------------------------------------------------------------------------


def loss_curve(record: Record, split: str) -> Curve:
    """Weighted total loss by epoch; the raw mse where phases change the weights and totals cannot be compared."""
    changing = record.scalar(
        """SELECT count(*) FROM (SELECT term FROM series WHERE metric = 'loss_weight' AND step IS NULL
                                 GROUP BY term HAVING max(value) > min(value))"""
    )
    if changing:
        return record.curve("loss_raw", split=split, term="mse")
    return record.curve("loss_weighted", split=split, term="total")


def train_loss_fall(record: Record) -> float | None:
    return _relative_fall(loss_curve(record, "train"))


def validation_loss_fall(record: Record) -> float | None:
    return _relative_fall(loss_curve(record, "validation"))


def _relative_fall(curve: Curve) -> float | None:
    """(early - late) / |early|, negative for a rise; 0 where tau sees no trend; None under MIN_TREND_EPOCHS."""
    if len(curve) < MIN_TREND_EPOCHS:
        return None
    values = np.asarray(list(curve.values()))
    first, second = np.triu_indices(len(values), 1)
    tau = float(np.sign(values[second] - values[first]).mean())
    if abs(tau) < TREND_TAU:
        return 0.0
    early, late = _early_late(curve)
    return (early - late) / max(abs(early), 1e-12)


def _early_late(curve: Curve) -> tuple[float, float]:
    values = list(curve.values())
    quarter = max(1, len(values) // 4)
    return float(np.mean(values[:quarter])), float(np.mean(values[-quarter:]))


def validation_best_share(record: Record) -> float | None:
    """Epoch of the lowest validation loss as a share of the epochs done."""
    curve = loss_curve(record, "validation")
    return min(curve, key=curve.__getitem__) / max(curve) if len(curve) >= MIN_TREND_EPOCHS else None


def validation_best_epoch(record: Record) -> float | None:
    curve = loss_curve(record, "validation")
    return float(min(curve, key=curve.__getitem__)) if curve else None


def train_fall_after_best(record: Record) -> float | None:
    """Relative fall of the train loss from the epoch of the lowest validation loss to the end."""
    train, best = loss_curve(record, "train"), validation_best_epoch(record)
    if best is None or int(best) not in train or len(train) < MIN_TREND_EPOCHS:
        return None
    start = train[int(best)]
    return (start - train[max(train)]) / max(abs(start), 1e-12)


def validation_rise(record: Record) -> float | None:
    """(late - lowest) / |lowest| of the validation loss."""
    curve = loss_curve(record, "validation")
    if len(curve) < MIN_TREND_EPOCHS:
        return None
    lowest = min(curve.values())
    return (_early_late(curve)[1] - lowest) / max(abs(lowest), 1e-12)


def validation_rise_of_gain(record: Record) -> float | None:
    """The same rise as a share of what the validation loss had gained before; 1 = all of it given back."""
    curve = loss_curve(record, "validation")
    if len(curve) < MIN_TREND_EPOCHS:
        return None
    first, lowest = next(iter(curve.values())), min(curve.values())
    return (_early_late(curve)[1] - lowest) / max(first - lowest, 1e-12)


# Learning rate ---------------------------------------------------------------------------------------------------


def lr_peak(record: Record) -> float | None:
    return max(record.curve("lr").values(), default=None)


def lr_last(record: Record) -> float | None:
    return _last(record.curve("lr"))


def lr_below_1e5_epoch(record: Record) -> float | None:
    """First epoch after the peak with a rate under 1e-5 (1 % of grace for rounding); infinite when there is none."""
    curve = record.curve("lr")
    if not curve:
        return None
    peak = max(curve, key=curve.__getitem__)
    return float(next((e for e, lr in curve.items() if e >= peak and lr < 0.99e-5), math.inf))


def lr_below_1e5_left_share(record: Record) -> float | None:
    """Share of the planned epochs that remain from that epoch on; 0 when there is none."""
    first, planned = lr_below_1e5_epoch(record), record.epochs_planned
    return None if first is None or not planned else max(0.0, 1.0 - first / planned)


def lr_low_share(record: Record) -> float | None:
    """Share of the first 20 epochs run at 3e-6 or less, i.e. around 1e-6.

    The last fifth of the plan is left out: there a schedule is meant to have come down.
    """
    last = min(20, int(0.8 * (record.epochs_planned or 25)))
    rates = [lr for epoch, lr in record.curve("lr").items() if epoch <= last]
    return sum(lr <= 3e-6 for lr in rates) / len(rates) if rates else None


def _after_warmup(record: Record, curve: Curve) -> Curve:
    warmup = math.ceil(record.number("train.schedule.warmup_fraction", 0.0) * (record.epochs_planned or 0))
    return {epoch: value for epoch, value in curve.items() if epoch > warmup}


def planned_lr(record: Record) -> Curve:
    """The rate the schedule foresees at the end of each recorded epoch; empty where the configuration is unknown.

    `plateau` has no plan of its own: it is replayed over the recorded validation losses, with grace.
    """
    name, base = record.config("train.schedule.name"), record.number("train.optimizer.lr", math.nan)
    planned, epochs = record.epochs_planned, record.curve("lr")
    if name is None or math.isnan(base) or not planned:
        return {}
    if name == "constant":
        return dict.fromkeys(epochs, base)
    if name == "plateau":
        return _replay_plateau(record, base)
    floor = record.number("train.schedule.min_lr_ratio", 0.0)
    warmup = record.number("train.schedule.warmup_fraction", 0.0)

    def cosine(epoch: int) -> float:
        progress = min(1.0, max(0.0, (epoch / planned - warmup) / max(1.0 - warmup, 1e-9)))
        return base * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))

    return {epoch: cosine(epoch) for epoch in epochs}


def _replay_plateau(record: Record, base: float) -> Curve:
    losses = record.curve("loss_weighted", split="validation", term="total")
    patience = int(record.number("train.schedule.patience", 0)) + WARM_START_EPOCHS
    factor = record.number("train.schedule.factor", 0.5)
    rate, best, waited, rates = base, math.inf, 0, {}
    for epoch in record.curve("lr"):
        rates[epoch] = rate
        loss = losses.get(epoch, math.inf)
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited > patience:
            rate, waited = rate * factor, 0
    return rates


def _spread(curve: Curve) -> float | None:
    values = list(curve.values())
    return max(values) / max(min(values), 1e-30) if len(values) >= 3 else None


def lr_spread(record: Record) -> float | None:
    """Largest over smallest rate at the ends of the epochs."""
    return _spread(record.curve("lr"))


def lr_planned_spread(record: Record) -> float | None:
    return _spread(_after_warmup(record, planned_lr(record)))


def lr_spread_to_plan(record: Record) -> float | None:
    """Logarithm of that spread over the planned one's: 0 where the rate stands still, near 1 where it does as planned.
    A plan that hardly moves counts as one of half."""
    spread, planned = lr_spread(record), lr_planned_spread(record)
    return math.log(spread) / math.log(max(planned, 1.5)) if spread and planned else None


def lr_to_plan(record: Record) -> float | None:
    """Smallest rate / planned rate after the warm-up; None for `plateau`, whose plan is the losses."""
    if record.config("train.schedule.name") == "plateau":
        return None
    plan, rates = planned_lr(record), _after_warmup(record, record.curve("lr"))
    ratios = [lr / plan[epoch] for epoch, lr in rates.items() if plan.get(epoch)]
    return min(ratios, default=None)


# Loss terms ------------------------------------------------------------------------------------------------------


def _weights(record: Record) -> dict[str, float]:
    """Largest weight each term had in the epochs done, as recorded, else as configured."""
    recorded = {
        term: max(curve.values())
        for term in LOSS_TERMS
        if (curve := record.curve("loss_weight", term=term, split="train"))
    }
    if recorded:
        return recorded
    if not isinstance(record.config("train.loss"), dict):
        return {}
    return {
        term: max(
            record.number(f"train.loss.{term}", 0.0),
            *(as_number(phase["weights"].get(term), 0.0) for phase in record.phases),
            0.0,
        )
        for term in LOSS_TERMS
    }


def sharpe_weight(record: Record) -> float | None:
    return _weights(record).get("sharpe")


def sharpe_loss_share(record: Record) -> float | None:
    """|weighted Sharpe term| over the sum of all |weighted terms|, train split, last epoch; None without the term."""
    parts = {term: _last(record.curve("loss_weighted", split="train", term=term)) for term in LOSS_TERMS}
    total = sum(abs(value) for value in parts.values() if value is not None)
    return abs(parts["sharpe"]) / total if parts["sharpe"] is not None and total > 0 else None


def _swallowed(record: Record) -> list[str] | None:
    """Terms with a weight whose raw value is not recorded, or is the same at every one of three or more epochs.

    Not the variance penalty at 0, where it is while the scores spread as they should.
    """
    curves = {term: record.curve("loss_raw", split="train", term=term) for term in LOSS_TERMS}
    weights = _weights(record)
    if not weights or max(map(len, curves.values())) < 3:
        return None

    def stands_still(term: str) -> bool:
        values = set(curves[term].values())
        return len(values) <= 1 and not (term == "variance_penalty" and values == {0.0})

    return [term for term, weight in weights.items() if weight > 0 and stands_still(term)]


def swallowed_terms(record: Record) -> float | None:
    terms = _swallowed(record)
    return None if terms is None else float(len(terms))


def swallowed_term_names(record: Record) -> str | None:
    return _listed(_swallowed(record))


# Gradients -------------------------------------------------------------------------------------------------------


def _gradients(record: Record) -> dict[str, Curve]:
    """Gradient l2 by epoch of every component that has weights."""
    curves = {name: record.curve("grad_l2", component=name) for name in record.components("grad_l2")}
    empty = {name for name in curves if (w := record.curve("weight_l2", component=name)) and max(w.values()) == 0.0}
    return {name: curve for name, curve in curves.items() if curve and name not in empty}


def encoder_gradient_ratio(record: Record) -> float | None:
    """Late over early gradient l2 of the temporal encoder."""
    return _late_to_early(_gradients(record).get("temporal_encoder", {}))


def _late_to_early(curve: Curve) -> float | None:
    if len(curve) < MIN_TREND_EPOCHS:
        return None
    early, late = _early_late(curve)
    return late / early if early > 0 else None


def encoder_gradient_max(record: Record) -> float | None:
    """Largest gradient l2 of the temporal encoder over the epochs."""
    return max(_gradients(record).get("temporal_encoder", {}).values(), default=None)


def encoder_gradient(record: Record) -> float | None:
    """Median over epochs of the temporal encoder's gradient l2."""
    curve = _gradients(record).get("temporal_encoder")
    return float(np.median(list(curve.values()))) if curve else None


def gradient_rise(record: Record) -> float | None:
    """Largest late over early gradient l2 of any component."""
    return max(_rises(record).values(), default=None)


def gradient_rise_name(record: Record) -> str | None:
    rises = _rises(record)
    return max(rises, key=rises.__getitem__) if rises else None


def _rises(record: Record) -> dict[str, float]:
    return {name: r for name, curve in _gradients(record).items() if (r := _late_to_early(curve)) is not None}


def graph_to_encoder_gradient(record: Record) -> float | None:
    """Median over epochs of gradient l2 gat / temporal_encoder; None without a graph."""
    curves = _gradients(record)
    graph, encoder = curves.get("gat", {}), curves.get("temporal_encoder", {})
    ratios = [graph[epoch] / encoder[epoch] for epoch in graph if encoder.get(epoch)]
    return float(np.median(ratios)) if ratios else None


def _silent(record: Record) -> list[str] | None:
    curves = _gradients(record)
    return [name for name, curve in curves.items() if max(curve.values()) == 0.0] if curves else None


def silent_components(record: Record) -> float | None:
    names = _silent(record)
    return None if names is None else float(len(names))


def silent_component_names(record: Record) -> str | None:
    return _listed(_silent(record))


def components_heard(record: Record) -> float | None:
    """Components but the head whose gradient was not 0 throughout."""
    curves = _gradients(record)
    others = [curve for name, curve in curves.items() if name != "prediction_head"]
    return float(sum(max(curve.values()) > 0.0 for curve in others)) if others else None


def head_gradient(record: Record) -> float | None:
    """Largest gradient l2 of the prediction head over the epochs."""
    return max(_gradients(record).get("prediction_head", {}).values(), default=None)


def gradient_summary(record: Record) -> str | None:
    parts = []
    for name, curve in _gradients(record).items():
        early, late = _early_late(curve)
        parts.append(f"{name} {early:.2g} -> {late:.2g}")
    return ", ".join(parts) or None


def clipped_share(record: Record) -> float | None:
    curve = record.curve("clipped_share")
    return float(np.mean(list(curve.values()))) if curve else None


def _count(record: Record, metric: str) -> float | None:
    return record.scalar("SELECT sum(value) FROM series WHERE metric = ? AND step IS NULL AND isfinite(value)", metric)


def gradient_warnings(record: Record) -> float | None:
    return _count(record, "gradient_warning")


def gradient_warning_names(record: Record) -> str | None:
    names = record.components("gradient_warning")
    warned = [name for name in names if any(record.curve("gradient_warning", component=name).values())]
    return _listed(warned if names else None)


def degeneracy_events(record: Record) -> float | None:
    return _count(record, "degeneracy_event")


def degeneracy_resets(record: Record) -> float | None:
    return _count(record, "degeneracy_reset")


# Runtime and data ------------------------------------------------------------------------------------------------


def failed(record: Record) -> float | None:
    status = record.run.get("status")
    return None if status is None else float(status == "failed")


def failure_reason(record: Record) -> str | None:
    """Why the run ended early, in its own words."""
    return str(record.run.get("reason") or "no reason recorded") if record.run else None


def failure_not_finite(record: Record) -> float | None:
    """1 where the run failed for a number that was not finite."""
    has_failed = failed(record)
    if not has_failed:
        return has_failed
    return float(bool(re.search(r"\b(nan|inf|infinite|not finite|non-?finite)\b", failure_reason(record) or "", re.I)))


def abandoned(record: Record) -> float | None:
    """1 when run.json says running and no process holds the run's lock: it was killed."""
    return None if record.state is None else float(record.state == "killed")


def non_finite_losses(record: Record) -> float | None:
    """Losses or gradients that were not finite, of all that were recorded."""
    return record.scalar(
        """SELECT sum(CASE WHEN metric = 'non_finite' OR value IS NULL OR NOT isfinite(value) THEN 1 ELSE 0 END)
           FROM series WHERE metric IN ('loss', 'loss_raw', 'loss_weighted', 'grad_norm', 'non_finite')"""
    )


def loader_wait_share(record: Record) -> float | None:
    waited, spent = _count(record, "loader_wait_s"), _count(record, "epoch_s")
    return waited / spent if waited is not None and spent else None


def features(record: Record) -> float | None:
    return _size(record.run.get("features"))


def live_features(record: Record) -> float | None:
    return _size(record.run.get("live_features"))


def dead_features(record: Record) -> float | None:
    total, live = features(record), live_features(record)
    return None if total is None or live is None else total - live


def _size(value: object) -> float | None:
    if isinstance(value, list):
        return float(len(value))
    return float(value) if isinstance(value, int | float) else None


def epochs_done(record: Record) -> float | None:
    return float(record.epochs_done)


def epochs_missing(record: Record) -> float | None:
    """Epochs before the newest of which the training or the evaluation left no row; None where neither left any."""
    recorded = [set(record.curve("lr")), {int(e) for (e,) in record.rows("SELECT DISTINCT epoch FROM evals")}]
    if not any(recorded):
        return None
    # The newest epoch of a killed run may be half written.
    return float(sum(any(epoch not in of for of in recorded) for epoch in range(1, record.epochs_done)))


def epochs_planned(record: Record) -> float | None:
    return None if record.epochs_planned is None else float(record.epochs_planned)


def _last(curve: Curve) -> float | None:
    return curve[max(curve)] if curve else None


_ALL: tuple[Callable[[Record], Value], ...] = (
    verdict_hashes_elsewhere,
    verdict_keys_elsewhere,
    verdict_sharpe,
    verdict_sharpe_gap,
    verdict_maximum_gap,
    daily_sharpe_gap,
    predictions_sharpe_gap,
    weights_hash_repeats,
    predictions_hash_repeats,
    weights_hash_returns,
    initial_hash_share,
    sharpe_repeat_span,
    sharpe_by_epoch,
    score_dispersion,
    invalid_evaluations,
    battery_evaluating_twice,
    validity_failed,
    validity_failed_names,
    sharpe_epoch,
    sharpe,
    sharpe_se,
    sharpe_demanded,
    sharpe_shortfall,
    sharpe_distance_se,
    sharpe_rise_t,
    ic_rise_t,
    ic_last,
    rank_ic_last,
    ic_last_t,
    ic_last_t_signed,
    train_loss_fall,
    validation_loss_fall,
    validation_best_share,
    validation_best_epoch,
    train_fall_after_best,
    validation_rise,
    validation_rise_of_gain,
    lr_peak,
    lr_last,
    lr_below_1e5_epoch,
    lr_below_1e5_left_share,
    lr_low_share,
    lr_spread,
    lr_planned_spread,
    lr_spread_to_plan,
    lr_to_plan,
    sharpe_weight,
    sharpe_loss_share,
    swallowed_terms,
    swallowed_term_names,
    encoder_gradient_ratio,
    encoder_gradient,
    encoder_gradient_max,
    gradient_rise,
    gradient_rise_name,
    graph_to_encoder_gradient,
    silent_components,
    silent_component_names,
    components_heard,
    head_gradient,
    gradient_summary,
    clipped_share,
    gradient_warnings,
    gradient_warning_names,
    degeneracy_events,
    degeneracy_resets,
    failed,
    failure_reason,
    failure_not_finite,
    abandoned,
    non_finite_losses,
    loader_wait_share,
    features,
    live_features,
    dead_features,
    epochs_done,
    epochs_missing,
    epochs_planned,
)

SIGNALS: dict[str, Callable[[Record], Value]] = {function.__name__: function for function in _ALL}
"""Signal name -> how it is measured; the function's docstring says what it is."""
