"""The portfolio against a dictionary-of-holdings simulation and hand-computed tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atft_pipeline.evaluation.portfolio import jpx_spread_returns, long_short, long_short_tranches

NAN = np.nan


def slow_long_short(scores, targets, quantile, cost_bps):
    """One session at a time, holdings in a dictionary of column -> weight."""
    gross, net, turnover, held = [], [], [], {}
    for row_scores, row_targets in zip(scores, targets, strict=True):
        names = [n for n in range(len(row_scores)) if math.isfinite(row_scores[n]) and math.isfinite(row_targets[n])]
        names.sort(key=lambda n: (-row_scores[n], n))
        k = math.floor(len(names) * quantile + 1e-9)
        if k < 1:
            gross.append(NAN), net.append(NAN), turnover.append(NAN)
            continue
        wanted = dict.fromkeys(names[:k], 1 / k) | dict.fromkeys(names[-k:], -1 / k)
        traded = sum(abs(wanted.get(n, 0) - held.get(n, 0)) for n in {*wanted, *held})
        earned = sum(w * row_targets[n] for n, w in wanted.items())
        held = {n: w * (1 + row_targets[n]) / (1 + earned) for n, w in wanted.items()}
        gross.append(earned), turnover.append(traded), net.append(earned - cost_bps / 1e4 * traded)
    return np.array(gross), np.array(net), np.array(turnover)


# Reference ------------------------------------------------------------------------------------------------------


def test_hand_computed_two_sessions_of_five_stocks():
    scores = np.array([[5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    targets = np.array([[0.10, 0.0, 0.0, 0.0, -0.10], [0.02, 0.0, 0.0, 0.0, 0.05]])
    result = long_short(scores, targets, quantile=0.2, cost_bps=10.0)
    # Session 1: long A +10 %, short E -10 %: 0.20. Capital 1.2: A drifts to 1.1/1.2, E to -0.9/1.2.
    # Session 2: long E, short A: |-1 - 1.1/1.2| + |1 + 0.9/1.2|.
    assert result.gross == pytest.approx([0.20, 0.03])
    assert result.turnover == pytest.approx([2.0, (1 + 1.1 / 1.2) + (1 + 0.9 / 1.2)])
    assert result.net == pytest.approx(result.gross - 0.001 * result.turnover)
    assert result.stocks.tolist() == [5, 5]


@pytest.mark.parametrize("quantile", [0.1, 0.2, 0.29, 0.5])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_equals_the_slow_simulation_with_ties_and_nulls(seed, quantile):
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 6, (12, 17)).astype(float)
    targets = generator.normal(0, 0.05, (12, 17))
    targets[generator.random((12, 17)) < 0.2] = NAN
    scores[generator.random((12, 17)) < 0.1] = NAN
    targets[4] = NAN
    result = long_short(scores, targets, quantile=quantile, cost_bps=25.0)
    gross, net, turnover = slow_long_short(scores, targets, quantile, 25.0)
    np.testing.assert_allclose(result.gross, gross, atol=1e-12)
    np.testing.assert_allclose(result.net, net, atol=1e-12)
    np.testing.assert_allclose(result.turnover, turnover, atol=1e-12)


def test_jpx_spread_equals_the_competition_formula():
    generator = np.random.default_rng(1)
    scores, targets = generator.normal(size=(3, 450)), generator.normal(size=(3, 450))
    targets[1, :30], targets[2, :51] = NAN, NAN  # 420 names, then 399
    spread = jpx_spread_returns(scores, targets)
    weights = np.linspace(2, 1, 200)
    for t in (0, 1):
        kept = np.flatnonzero(np.isfinite(targets[t]))
        ranked = targets[t, kept[np.argsort(-scores[t, kept])]]
        bought, sold = (ranked[:200] * weights).sum(), (ranked[::-1][:200] * weights).sum()
        assert spread[t] == pytest.approx((bought - sold) / weights.mean())
    assert np.isnan(spread[2])


def test_tranches_equal_a_buy_and_hold_ledger():
    generator = np.random.default_rng(4)
    scores, returns = generator.normal(size=(9, 10)), generator.normal(0, 0.03, (9, 10))
    h = 3
    result = long_short_tranches(scores, returns, h, quantile=0.2, cost_bps=10.0)
    ledger, pending = [np.zeros(10) for _ in range(h)], 0.0  # holdings of each tranche in units of capital
    for t in range(9):
        order = np.argsort(-scores[t])
        wanted = np.zeros(10)
        wanted[order[:2]], wanted[order[-2:]] = 1 / 2 / h, -1 / 2 / h
        before = sum(ledger)
        ledger[t % h] = wanted
        pending += np.abs(sum(ledger) - before).sum()
        earned = float(sum(ledger) @ returns[t])
        if t < h - 1:
            assert np.isnan(result.gross[t])
        else:
            assert result.gross[t] == pytest.approx(earned)
            assert result.turnover[t] == pytest.approx(pending)
            assert result.net[t] == pytest.approx(earned - 0.001 * pending)
            pending = 0.0
        ledger = [w * (1 + returns[t]) / (1 + earned) for w in ledger]


# Property -------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_one_session_tranches_are_the_daily_portfolio(seed):
    generator = np.random.default_rng(seed)
    scores, returns = generator.normal(size=(6, 8)), generator.normal(0, 0.05, (6, 8))
    daily = long_short(scores, returns, quantile=0.25, cost_bps=10.0)
    tranches = long_short_tranches(scores, returns, 1, quantile=0.25, cost_bps=10.0)
    np.testing.assert_allclose(tranches.net, daily.net, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_negated_scores_earn_the_opposite_where_no_scores_tie(seed):
    generator = np.random.default_rng(seed)
    scores, returns = generator.normal(size=(5, 9)), generator.normal(0, 0.05, (5, 9))
    up = long_short(scores, returns, quantile=0.2, cost_bps=0.0).gross
    down = long_short(-scores, returns, quantile=0.2, cost_bps=0.0).gross
    np.testing.assert_allclose(up, -down, atol=1e-12)


def test_any_monotone_transform_of_the_scores_gives_the_same_portfolio():
    generator = np.random.default_rng(5)
    scores, returns = generator.normal(size=(5, 9)), generator.normal(0, 0.05, (5, 9))
    first = long_short(scores, returns, quantile=0.2, cost_bps=10.0)
    second = long_short(np.exp(scores) * 1e-9, returns, quantile=0.2, cost_bps=10.0)
    np.testing.assert_array_equal(first.net, second.net)


def test_weights_that_drift_with_equal_returns_need_no_trade():
    scores = np.tile([4.0, 3.0, 2.0, 1.0], (3, 1))
    result = long_short(scores, np.zeros((3, 4)), quantile=0.5, cost_bps=10.0)
    assert result.turnover.tolist() == [2.0, 0.0, 0.0]


# Boundary -------------------------------------------------------------------------------------------------------


def test_equal_scores_go_by_code_ascending():
    targets = np.array([[0.1, 0.2, 0.3, 0.4]])
    result = long_short(np.ones((1, 4)), targets, quantile=0.25, cost_bps=0.0)
    assert result.gross == pytest.approx([0.1 - 0.4])


def test_a_null_target_leaves_before_ranking():
    scores, targets = np.array([[9.0, 5, 4, 3, 2, 1]]), np.array([[NAN, 0.5, 0, 0, 0, 0.1]])
    result = long_short(scores, targets, quantile=0.2, cost_bps=0.0)
    assert result.gross == pytest.approx([0.4])
    assert result.stocks.tolist() == [5]


def test_too_few_stocks_make_no_portfolio_and_the_next_session_trades_from_the_last_weights():
    scores = np.tile([4.0, 3.0, 2.0, 1.0, 0.0], (3, 1))
    targets = np.zeros((3, 5))
    targets[1, 0] = NAN  # four stocks, floor(4 * 0.2) = 0
    result = long_short(scores, targets, quantile=0.2, cost_bps=10.0)
    assert np.isnan([result.gross[1], result.net[1], result.turnover[1]]).all()
    assert result.turnover[[0, 2]].tolist() == [2.0, 0.0]


def test_a_leg_is_the_exact_floor_although_floats_round_down():
    scores = np.arange(100.0)[None]
    targets = np.zeros((1, 100))
    targets[0, 100 - 29] = 29.0  # the 29th best; 0.29 * 100 is 28.999999999999996
    assert long_short(scores, targets, quantile=0.29, cost_bps=0.0).gross == pytest.approx([1.0])


def test_capital_lost_whole_is_entered_anew():
    scores = np.tile([2.0, 1.0], (2, 1))
    targets = np.array([[-0.5, 1.0], [0.0, 0.0]])
    assert long_short(scores, targets, quantile=0.5, cost_bps=0.0).turnover.tolist() == [2.0, 2.0]
