"""The validity checks: is a Sharpe this run's own, does it depend on the weights, and does the evaluation work?

Every check is a pure function of arrays that are already computed. `passed` is True, False, or None where the
measurement is missing; with None a verdict is not valid. Scores and returns are [T, N] with NaN for missing values, as
in the evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atft_pipeline.config.schema import EXECUTION_DELAY_SESSIONS
from atft_pipeline.errors import InputError
from atft_pipeline.evaluation.evaluate import constant_sessions
from atft_pipeline.evaluation.metrics import information_coefficient, mean_and_error, rank_information_coefficient
from atft_pipeline.evaluation.portfolio import long_short, rankable

REINITIALISED_RANK_IC = 0.99
"""Two draws of the weights agree far less; scores that do not come from the weights agree exactly."""
PERMUTATIONS = 100
PERMUTATION_ERRORS = 4.0
"""Standard errors of the mean over permutations: a correct evaluation exceeds it once in 16,000."""
REPEAT_TOLERANCE_CPU = 1e-3
REPEAT_TOLERANCE_GPU = 5e-2
"""Largest difference of two passes over the std of the scores. In float32 two block partitions, which reorder sums,
differ by at most 1e-5, and the smallest healthy std is 0.014. A GPU may run in bf16, with eight bits, and its atomic
additions have no fixed order."""
REPEATED_STATISTICS: tuple[str, ...] = ("ic_mean", "rank_ic_mean", "sharpe_daily", "sharpe_daily_net", "turnover_mean")
REPEATED_STATISTICS_TOLERANCE = 1e-2
"""Absolute, relative above 1. Nearly equal scores may swap ranks between two passes and change a portfolio leg."""
TARGET_TOLERANCE = 1e-6
"""Absolute, and relative above 1: float32 keeps seven digits of a return."""

LOOKS_TOO_GOOD_IC = 0.15
LOOKS_TOO_GOOD_SHARPE = 0.5
REPEATS_THE_PAST = 0.10
"""Margin by which the correlation with known returns may exceed that with coming returns before the scan warns."""

Array = NDArray[np.floating]
MeanReturn = Callable[[Array, Array], float]


@dataclass(frozen=True)
class ValidityItem:
    """The result of one check."""

    name: str
    passed: bool | None
    """None: not assessable, a measurement is missing."""
    value: float | None
    tolerance: float | None
    explanation: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def mean_long_short_return(quantile: float) -> MeanReturn:
    """The mean gross return of the evaluation's portfolio, as a function of scores and targets."""

    def mean(scores: Array, targets: Array) -> float:
        return mean_and_error(long_short(scores, targets, quantile=quantile, cost_bps=0.0).gross)[0]

    return mean


def not_assessable(name: str, what: str) -> ValidityItem:
    """The result of a check whose measurement is missing; `what` says why."""
    return ValidityItem(name, None, None, None, f"not assessable: {what}")


def reinitialised_weights_score_differently(trained: Array, fresh: Array) -> ValidityItem:
    """Passes when the mean RankIC between the scores and those of newly drawn weights is at most 0.99.

    A session counts as equal where both have constant scores, and as different where only one has.
    """
    name = "reinitialised_weights_score_differently"
    both = np.isfinite(trained) & np.isfinite(fresh)
    sessions = both.sum(axis=1) >= 2
    if not sessions.any():
        return not_assessable(name, "no session has two stocks that both weights score")
    agreement = rank_information_coefficient(trained, fresh)
    flat = constant_sessions(np.asarray(trained, np.float64), both) & constant_sessions(
        np.asarray(fresh, np.float64), both
    )
    value = float(np.where(flat, 1.0, np.nan_to_num(agreement, nan=0.0))[sessions].mean())
    return ValidityItem(
        name,
        value <= REINITIALISED_RANK_IC,
        value,
        REINITIALISED_RANK_IC,
        "mean RankIC between the trained model's scores and those of re-initialised weights; near 1 the scores do not"
        " depend on the weights",
    )


def permuted_scores_earn_nothing(
    scores: Array,
    targets: Array,
    mean_return: MeanReturn,
    *,
    seed: int,
    permutations: int = PERMUTATIONS,
) -> ValidityItem:
    """Passes when the mean over within-session permutations of the scores is within 4 standard errors of 0.

    value: that mean in standard errors, std (ddof 1) over permutations / sqrt(permutations).
    """
    name = "permuted_scores_earn_nothing"
    generator = np.random.default_rng(seed)
    usable = rankable(scores, targets)
    earned = np.array([mean_return(_permuted(scores, usable, generator), targets) for _ in range(max(permutations, 2))])
    if not np.isfinite(earned).all():
        return not_assessable(name, "permuted scores have no portfolio; too few stocks per session")
    error = float(earned.std(ddof=1) / math.sqrt(len(earned)))
    mean = float(earned.mean())
    # Without spread, a mean of 0 is 0 errors away from 0, and any other mean infinitely many.
    value = mean / error if error > 0.0 else 0.0 if mean == 0.0 else math.copysign(math.inf, mean)
    passed = abs(value) <= PERMUTATION_ERRORS
    return ValidityItem(
        name,
        passed,
        value,
        PERMUTATION_ERRORS,
        f"mean daily return of {len(earned)} within-session permutations of the scores is {mean:.2e},"
        f" {value:.1f} standard errors from 0; if it is further away, the evaluation itself earns",
    )


def _permuted(scores: Array, usable: NDArray[np.bool_], generator: np.random.Generator) -> Array:
    """Scores shuffled within each session among the usable cells; the others NaN."""
    shuffled = np.argsort(np.where(usable, generator.random(usable.shape), np.inf), axis=1)
    usable_first = np.argsort(~usable, axis=1, kind="stable")
    result = np.full(usable.shape, np.nan)
    np.put_along_axis(
        result, usable_first, np.take_along_axis(np.asarray(scores, np.float64), shuffled, axis=1), axis=1
    )
    result[~usable] = np.nan
    return result


def true_returns_earn_most(scores: Array, targets: Array, mean_return: MeanReturn) -> ValidityItem:
    """Passes when the true returns as scores earn more than 0 and at least what the scores and their negative earn.

    value: the true returns' mean daily return minus the better of the two.
    """
    name = "true_returns_earn_most"
    rankable_targets = np.where(rankable(scores, targets), targets, np.nan)
    oracle = mean_return(rankable_targets, rankable_targets)
    rivals = [mean_return(np.asarray(side * scores), rankable_targets) for side in (1.0, -1.0)]
    if not math.isfinite(oracle) or not all(map(math.isfinite, rivals)):
        return not_assessable(name, "no session has enough stocks for a portfolio")
    value = oracle - max(rivals)
    rounding = 1e-12  # the model may rank like the true returns, and then its return is summed in another order
    return ValidityItem(
        name,
        oracle > 0.0 and value >= -rounding,
        value,
        rounding,
        f"the true returns as scores earn {oracle:.2e} a day, the model {rivals[0]:.2e}, its negative {rivals[1]:.2e};"
        " where they do not earn most, scores and targets are misaligned or the portfolio is wrong",
    )


def evaluating_twice_agrees(
    first: Array,
    second: Array,
    first_statistics: Mapping[str, float | None],
    second_statistics: Mapping[str, float | None],
    *,
    tolerance: float = REPEAT_TOLERANCE_CPU,
) -> ValidityItem:
    """Passes when two passes of the same weights give the same scores, and statistics that follow.

    value: largest |difference of scores| over the std (ddof 1) of the first, 0 when equal; at most `tolerance` passes.
    A score that is missing in one pass must be missing in both, and so must each of `REPEATED_STATISTICS`, which must
    agree within 1e-2.
    """
    name = "evaluating_twice_agrees"
    present = np.isfinite(first)
    if not present.any():
        return not_assessable(name, "there are no scores")
    if first.shape != second.shape or not np.array_equal(present, np.isfinite(second)):
        return ValidityItem(name, False, None, tolerance, "the two passes score different stocks or sessions")
    largest = float(np.abs(np.asarray(first, np.float64) - second)[present].max())
    spread = float(np.std(np.asarray(first, np.float64)[present], ddof=1)) if present.sum() > 1 else 0.0
    value = 0.0 if largest == 0.0 else largest / spread if spread > 0.0 else math.inf
    differing = [key for key in REPEATED_STATISTICS if not _same(first_statistics.get(key), second_statistics.get(key))]
    explanation = "largest difference of the scores of two passes, in units of their spread"
    if differing:
        explanation += f"; statistics differ: {', '.join(differing)}"
    return ValidityItem(name, value <= tolerance and not differing, value, tolerance, explanation)


def _same(a: float | None, b: float | None) -> bool:
    if a is None or b is None:
        return a is b
    return abs(a - b) <= REPEATED_STATISTICS_TOLERANCE * max(1.0, abs(a))


def forward_returns(open_: Array, close: Array, execution: str, horizon_sessions: int) -> NDArray[np.float64]:
    """Forward returns [T, N] from adjusted prices [T, N]: P[t + d + h] / P[t + d] - 1, NaN where a price is missing.

    P is the open for `next_open`, else the close; d is 0 for `same_close`, else 1. This is written independently of the
    dataset's targets, so that the two can be compared.
    """
    if execution not in EXECUTION_DELAY_SESSIONS:
        raise InputError(f"execution: expected one of {sorted(EXECUTION_DELAY_SESSIONS)}, found {execution!r}")
    prices = np.asarray(open_ if execution == "next_open" else close, np.float64)
    delay = EXECUTION_DELAY_SESSIONS[execution]
    returns = np.full(prices.shape, np.nan)
    last = len(prices) - delay - horizon_sessions
    if last > 0:
        entry = prices[delay : delay + last]
        exit_ = prices[delay + horizon_sessions :]
        valid = (entry > 0.0) & (exit_ > 0.0)  # False where a price is NaN
        returns[:last][valid] = exit_[valid] / entry[valid] - 1.0
    return returns


def targets_match_prices(used: Array, recomputed: Array, member: NDArray[np.bool_]) -> ValidityItem:
    """Passes when every target used equals the one recomputed from prices, within 1e-6 (relative above 1).

    All arrays are [T, N]. A target without prices behind it fails. A null target that prices would give is only
    counted, because quarantine may have removed it.
    """
    name = "targets_match_prices"
    present = member & np.isfinite(used)
    if not present.any():
        return not_assessable(name, "no target to compare")
    given, expected = np.asarray(used, np.float64)[present], np.asarray(recomputed, np.float64)[present]
    unfounded = int((~np.isfinite(expected)).sum())
    left_out = int((member & ~np.isfinite(used) & np.isfinite(recomputed)).sum())
    gap = np.abs(given - expected) / np.maximum(1.0, np.abs(expected))
    value = float(np.nanmax(gap)) if unfounded < len(gap) else math.inf
    return ValidityItem(
        name,
        unfounded == 0 and value <= TARGET_TOLERANCE,
        value,
        TARGET_TOLERANCE,
        f"largest difference between {len(gap)} used targets and those from prices; {unfounded} have no price behind"
        f" them, {left_out} that prices give are null",
    )


def scores_changed(
    previous: Mapping[str, str] | None, current: Mapping[str, str], *, learning_rate: float | None
) -> ValidityItem:
    """Passes when the hashes of weights and scores both differ from the last evaluated epoch's.

    `previous` and `current` hold `weights_hash` and `predictions_hash`; for the first evaluated epoch `previous` are
    those of the initial weights. `learning_rate` is the largest since then. The hashes may stay only where it was 0, as
    at the end of a cosine.
    """
    name = "scores_changed_since_last_epoch"
    keys = ("weights_hash", "predictions_hash")
    if previous is None or learning_rate is None or not all(previous.get(k) and current.get(k) for k in keys):
        return not_assessable(name, "the hashes of the last evaluated epoch or its learning rate are not recorded")
    same = [key.removesuffix("_hash") for key in keys if previous[key] == current[key]]
    if learning_rate == 0.0:
        return ValidityItem(name, True, float(len(same)), None, "the learning rate was 0, so nothing had to change")
    return ValidityItem(
        name,
        not same,
        float(len(same)),
        0.0,
        f"unchanged since the last evaluated epoch: {', '.join(same) or 'nothing'}",
    )


def validity_items(
    scores: Array,
    targets: Array,
    *,
    quantile: float,
    seed: int,
    fresh_scores: Array | None = None,
    again_scores: Array | None = None,
    statistics: Mapping[str, float | None] | None = None,
    again_statistics: Mapping[str, float | None] | None = None,
    repeat_tolerance: float = REPEAT_TOLERANCE_CPU,
    recomputed_targets: Array | None = None,
    previous_hashes: Mapping[str, str] | None = None,
    current_hashes: Mapping[str, str] | None = None,
    learning_rate: float | None = None,
) -> list[ValidityItem]:
    """The six checks of one set of scores and horizon-1 targets, both [T, N], in a fixed order.

    A check whose measurement is left out is not assessable. `fresh_scores` come from re-initialised weights,
    `again_scores` from a second pass, `recomputed_targets` from `forward_returns`.
    """
    earns = mean_long_short_return(quantile)
    member = np.isfinite(scores)
    return [
        not_assessable("reinitialised_weights_score_differently", "re-initialised weights were not scored")
        if fresh_scores is None
        else reinitialised_weights_score_differently(scores, fresh_scores),
        permuted_scores_earn_nothing(scores, targets, earns, seed=seed),
        true_returns_earn_most(scores, targets, earns),
        not_assessable("evaluating_twice_agrees", "there was no second pass")
        if again_scores is None or statistics is None or again_statistics is None
        else evaluating_twice_agrees(scores, again_scores, statistics, again_statistics, tolerance=repeat_tolerance),
        not_assessable("targets_match_prices", "prices were not at hand")
        if recomputed_targets is None
        else targets_match_prices(targets, recomputed_targets, member),
        scores_changed(previous_hashes, current_hashes or {}, learning_rate=learning_rate),
    ]


def lag_scan(
    scores: Array,
    returns: Array,
    *,
    lags: Sequence[int] = tuple(range(-5, 6)),
    sharpe_daily: float | None = None,
) -> dict[str, Any]:
    """Mean IC of the score of session t with the one-session return of t + lag; its warnings do not change the verdict.

    `returns` [T, N] are close-to-close returns of each session. Those at lag 0 and below are known when the score is
    made, those at lag 1 and above are not. The scan warns of three things:

    - a known return correlates by 0.10 more than every coming one, as in a reversal or momentum model by design;
    - a coming return has an IC above 0.15, or the daily Sharpe is above 0.5: too good to be true until shown otherwise.
    """
    ic = {lag: mean_and_error(information_coefficient(scores, _shifted(returns, lag)))[0] for lag in lags}
    finite = {lag: value for lag, value in ic.items() if math.isfinite(value)}
    coming = max((abs(v) for lag, v in finite.items() if lag > 0), default=0.0)
    known_lag, known_ic = max(
        ((lag, abs(v)) for lag, v in finite.items() if lag <= 0), key=lambda pair: pair[1], default=(0, 0.0)
    )
    warnings = []
    if known_ic > coming + REPEATS_THE_PAST:
        warnings.append(
            f"lag scan: the score correlates {finite[known_lag]:+.2f} with the return at lag {known_lag}, known"
            f" already, and at most {coming:.2f} with a coming one; it mostly repeats returns that are already known"
        )
    if coming > LOOKS_TOO_GOOD_IC:
        warnings.append(
            f"lag scan: IC {coming:.2f} with a coming return is above {LOOKS_TOO_GOOD_IC}: a leak until shown otherwise"
        )
    if sharpe_daily is not None and sharpe_daily > LOOKS_TOO_GOOD_SHARPE:
        warnings.append(
            f"daily Sharpe {sharpe_daily:.2f} is above {LOOKS_TOO_GOOD_SHARPE}: looks too good, a leak until shown"
            " otherwise"
        )
    return {"ic_by_lag": {lag: finite.get(lag) for lag in lags}, "warnings": warnings}


def _shifted(returns: Array, lag: int) -> NDArray[np.float64]:
    """[T, N]: row t is row t + lag of `returns`, NaN beyond its ends."""
    result = np.full(returns.shape, np.nan)
    T = len(returns)
    if abs(lag) < T:
        result[max(-lag, 0) : T - max(lag, 0)] = returns[max(lag, 0) : T - max(-lag, 0)]
    return result
