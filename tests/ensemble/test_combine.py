"""Combined scores: equal to plain loops, without look-ahead, and a blend is never far behind its better part."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from atft_pipeline.ensemble.combine import averaged, blend_weight, blended, smoothed, standardised
from atft_pipeline.errors import InputError
from atft_pipeline.evaluation.metrics import information_coefficient, mean_and_error

NAN = np.nan

# Reference ------------------------------------------------------------------------------------------------------


def test_scores_are_standardised_over_the_members_of_a_session():
    scores = np.array([[1.0, 2.0, 3.0, NAN], [0.1, 0.1, 0.1, 0.1], [NAN, NAN, 7.0, NAN], [NAN] * 4])
    expected = np.array([[-1, 0, 1, NAN], [0, 0, 0, 0], [NAN, NAN, 0, NAN], [NAN] * 4])
    np.testing.assert_allclose(standardised(scores), expected)


def slow_z(row):
    known = [x for x in row if not np.isnan(x)]
    return [(x - np.mean(known)) / np.std(known, ddof=1) for x in row]


def test_an_ensemble_is_the_mean_of_the_members_z_scores():
    rng = np.random.default_rng(1)
    scale = [1.0, 1000.0, 0.01]
    members = [s * rng.normal(size=(6, 9)) + s for s in scale]
    for member in members:
        member[2, 4] = NAN
    expected = []
    for t in range(6):
        rows = [slow_z(member[t]) for member in members]
        expected.append(slow_z([sum(values) / 3 for values in zip(*rows, strict=True)]))
    np.testing.assert_allclose(averaged(members), expected)


def test_a_blend_is_its_parts_at_the_ends_and_between_them_in_the_middle():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(5, 8)), 50 * rng.normal(size=(5, 8))
    np.testing.assert_allclose(blended(a, b, 1.0), standardised(a))
    np.testing.assert_allclose(blended(a, b, 0.0), standardised(b))
    expected = [
        slow_z([0.3 * x + 0.7 * y for x, y in zip(slow_z(p), slow_z(q), strict=True)])
        for p, q in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(blended(a, b, 0.3), expected)


def slow_average(column, span):
    """One stock at a time, in plain Python."""
    out, average, missing = [], None, 0
    for value in column:
        if np.isnan(value):
            missing += 1
            if missing > span:
                average = None
            out.append(NAN)
            continue
        missing = 0
        average = value if average is None else average * (span - 1) / (span + 1) + value * 2 / (span + 1)
        out.append(average)
    return out


@pytest.mark.parametrize("span", [1, 2, 5])
def test_smoothing_is_the_average_of_a_loop_over_stocks(span):
    rng = np.random.default_rng(span)
    scores = np.where(rng.random((60, 12)) < 0.5, NAN, rng.normal(size=(60, 12)))
    expected = np.transpose([slow_average(scores[:, n], span) for n in range(12)])
    np.testing.assert_allclose(smoothed(scores, span), expected)


def test_smoothing_without_gaps_is_the_exponential_average_of_that_span():
    scores = np.random.default_rng(3).normal(size=(40, 3))
    expected = [pl.Series(scores[:, n]).ewm_mean(span=5, adjust=False).to_numpy() for n in range(3)]
    np.testing.assert_allclose(smoothed(scores, 5), np.transpose(expected))
    np.testing.assert_array_equal(smoothed(scores, 1), scores)


def test_an_average_is_kept_for_as_many_missing_sessions_as_its_span_and_then_forgotten():
    kept, forgotten = [1.0, NAN, NAN, NAN, 0.0], [1.0, NAN, NAN, NAN, NAN, 0.0]
    assert smoothed(np.array([kept]).T, 3)[-1, 0] == 0.5
    assert smoothed(np.array([forgotten]).T, 3)[-1, 0] == 0.0


# Property -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 7, 20, 39])
def test_no_later_session_changes_a_smoothed_score(cut):
    rng = np.random.default_rng(4)
    scores = np.where(rng.random((40, 6)) < 0.3, NAN, rng.normal(size=(40, 6)))
    later = scores.copy()
    later[cut:] = np.where(rng.random((40 - cut, 6)) < 0.5, NAN, 99.0)
    np.testing.assert_array_equal(smoothed(later, 5)[:cut], smoothed(scores, 5)[:cut])
    np.testing.assert_array_equal(smoothed(scores[:cut], 5), smoothed(scores, 5)[:cut])


def test_a_span_below_one_is_refused():
    with pytest.raises(InputError, match="at least 1 session, found 0"):
        smoothed(np.zeros((2, 2)), 0)


# The weight: reference and boundary ----------------------------------------------------------------------------


def market(seed, ic_a, ic_b, correlation, *, sessions=250, stocks=60, wander=0.07):
    """Two scores and the target they predict, [T, N]: mean ICs as given, which wander from session to session.

    The wandering, and the noise of the scores, have the given correlation.
    """
    rng = np.random.default_rng(seed)
    other = np.sqrt(1.0 - correlation**2)

    def pair(shape):
        first = rng.standard_normal(shape)
        return first, correlation * first + other * rng.standard_normal(shape)

    target = rng.standard_normal((sessions, stocks))
    scores = []
    for ic, moved, noise in zip((ic_a, ic_b), pair((sessions, 1)), pair((sessions, stocks)), strict=True):
        level = np.clip(ic + wander * moved, -0.9, 0.9)
        scores.append(level * target + np.sqrt(1.0 - level**2) * noise)
    return (*scores, target)


def test_with_sure_evidence_the_weight_is_that_of_the_largest_ic():
    a, b, target = market(1, 0.30, 0.20, 0.2, sessions=400, wander=0.0)
    grid = np.linspace(0, 1, 101)
    earned = [information_coefficient(blended(a, b, w), target).mean() for w in grid]
    weight = blend_weight(a, b, target)
    assert weight.difference_kept > 0.99
    assert weight.network == pytest.approx(grid[np.argmax(earned)], abs=0.02)  # the grid, and the optimum is flat
    assert blend_weight(b, a, target).network == pytest.approx(1.0 - weight.network)


def test_the_evidence_is_recorded_as_it_was_used():
    a, b, target = market(2, 0.05, 0.02, 0.3)
    weight = blend_weight(a, b, target)
    ic_a, ic_b = information_coefficient(a, target), information_coefficient(b, target)
    difference, error = mean_and_error(ic_a - ic_b)
    found = (weight.ic_network, weight.ic_lightgbm, weight.ic_difference, weight.ic_difference_se)
    assert found == pytest.approx((ic_a.mean(), ic_b.mean(), difference, error))
    assert weight.difference_kept == pytest.approx(1 - (error / difference) ** 2)
    assert weight.score_correlation == pytest.approx(information_coefficient(a, b).mean())


def test_a_difference_within_its_error_makes_the_weights_equal():
    for seed in range(20):
        weight = blend_weight(*market(seed, 0.05, 0.05, 0.0))
        if abs(weight.ic_difference) < weight.ic_difference_se:
            assert weight.network == pytest.approx(0.5)
            break
    else:
        pytest.fail("no draw within its error among 20")


def test_two_scores_that_only_lose_give_everything_to_the_better_one():
    a, b, target = market(3, -0.20, -0.05, 0.3)
    assert blend_weight(a, b, target).network == 0.0
    assert blend_weight(b, a, target).network == 1.0


def test_a_blend_that_is_behind_on_the_evidence_is_not_made():
    """Nearly one score, one of them a little worse: within chance, and still nothing to gain."""
    for seed in range(200):
        a, b, target = market(seed, 0.04, 0.035, 0.95)
        weight = blend_weight(a, b, target)
        if weight.difference_kept == 0.0 and "behind" in weight.reason:
            better, worse = (a, b) if weight.ic_difference >= 0 else (b, a)
            assert weight.network == float(better is a)
            half = information_coefficient(blended(better, worse, 0.5), target).mean()
            assert half < information_coefficient(better, target).mean()
            break
    else:
        pytest.fail("no such draw among 200")


def test_a_part_that_cannot_be_ranked_gets_nothing():
    a, _, target = market(4, 0.1, 0.1, 0.0)
    flat = np.zeros_like(a)
    assert blend_weight(a, flat, target).network == 1.0
    assert blend_weight(flat, a, target).network == 0.0
    with pytest.raises(InputError, match="neither part can be ranked"):
        blend_weight(flat, flat, target)


def test_only_sessions_with_targets_decide_the_weight():
    a, b, target = market(5, 0.05, 0.04, 0.3)
    target[200:] = NAN
    first = blend_weight(a, b, target)
    a[200:], b[200:] = 9.0, -9.0
    assert blend_weight(a, b, target) == first
    assert blend_weight(a[:200], b[:200], target[:200]) == first


# The weight: simulated markets ---------------------------------------------------------------------------------

DRAWS = 100
MARKETS = {
    "network useless": (0.0, 0.04, 0.0),
    "LightGBM useless": (0.04, 0.0, 0.0),
    "useless and correlated": (0.04, 0.0, 0.6),
    "useless against weak": (0.015, 0.0, 0.3),
    "equal": (0.03, 0.03, 0.5),
    "equal and nearly one": (0.03, 0.03, 0.95),
    "behind and correlated": (0.04, 0.03, 0.8),
    "a little behind and nearly one": (0.04, 0.036, 0.95),
    "anti-correlated": (0.03, 0.02, -0.6),
    "anti-correlated and wrong": (0.04, -0.03, -0.6),
    "both wrong": (-0.03, -0.02, 0.3),
    "both useless": (0.0, 0.0, 0.3),
}
CHANCE = 0.16
"""How often a normal variable is more than one standard error below its mean."""
SLACK = 3 * np.sqrt(CHANCE * (1 - CHANCE) / DRAWS)


def shortfalls(ics, rule):
    """By draw, in standard errors of the paired test difference: true shortfall behind the better part, and realised.

    `rule(a, b, target)` gets the validation sessions; as many test sessions follow.
    """
    ic_a, ic_b, correlation = ics
    true, realised = [], []
    for seed in range(DRAWS):
        a, b, target = market(seed, *ics, sessions=500)
        w = rule(a[:250], b[:250], target[:250])
        if w == float(ic_a >= ic_b):
            true.append(0.0)
            realised.append(0.0)
            continue
        better = a if ic_a >= ic_b else b
        daily = [information_coefficient(score[250:], target[250:]) for score in (blended(a, b, w), better)]
        difference, error = mean_and_error(daily[0] - daily[1])
        ic = (w * ic_a + (1 - w) * ic_b) / np.sqrt(w**2 + (1 - w) ** 2 + 2 * w * (1 - w) * correlation)
        true.append((max(ic_a, ic_b) - ic) / error)
        realised.append(-difference / error)
    return np.array(true), np.array(realised)


@pytest.mark.parametrize("name", MARKETS)
def test_the_blend_is_not_behind_its_better_part_by_more_than_a_standard_error(name):
    true, realised = shortfalls(MARKETS[name], lambda *panels: blend_weight(*panels).network)
    assert true.mean() < 0.4
    assert np.mean(true > 1.0) < CHANCE + SLACK
    assert np.mean(realised > 1.0) < CHANCE + SLACK


@pytest.mark.parametrize("name", ["network useless", "useless and correlated", "anti-correlated and wrong"])
def test_equal_weights_would_be(name):
    """The yardstick above has something to find."""
    true, realised = shortfalls(MARKETS[name], lambda *_: 0.5)
    assert np.mean(true > 1.0) > 0.9
    assert np.mean(realised > 1.0) > 0.5


@pytest.mark.parametrize(("name", "share"), [("equal", 0.5), ("anti-correlated", 0.9)])
def test_the_blend_gains_where_there_is_something_to_gain(name, share):
    """Of what equal weights gain, which are close to the best ones there."""
    ics = MARKETS[name]
    gain = -shortfalls(ics, lambda *panels: blend_weight(*panels).network)[0].mean()
    assert gain > share * -shortfalls(ics, lambda *_: 0.5)[0].mean() > 0.3
