"""Every validity check has a case that passes, one that fails and one that is not assessable."""

from __future__ import annotations

import math

import numpy as np
import pytest

from atft_pipeline.errors import InputError
from atft_pipeline.verdict.validity import (
    evaluating_twice_agrees,
    forward_returns,
    lag_scan,
    mean_long_short_return,
    permuted_scores_earn_nothing,
    reinitialised_weights_score_differently,
    scores_changed,
    targets_match_prices,
    true_returns_earn_most,
    validity_items,
)

NAN = np.nan
EARNS = mean_long_short_return(0.2)
T, N = 40, 20


def panel(seed=1):
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(T, N))
    targets = 0.01 * scores + generator.normal(0, 0.02, (T, N))
    scores[generator.random((T, N)) < 0.1] = NAN
    targets[generator.random((T, N)) < 0.1] = NAN
    return scores, targets


# Re-initialised weights -----------------------------------------------------------------------------------------


def test_independent_scores_come_from_the_weights():
    assert reinitialised_weights_score_differently(panel(1)[0], panel(2)[0]).passed is True


@pytest.mark.parametrize("alike", [lambda s: s, lambda s: 3 * s + 1, np.tanh], ids=["same", "scaled", "squashed"])
def test_scores_that_new_weights_give_too_are_caught(alike):
    scores, _ = panel()
    item = reinitialised_weights_score_differently(scores, alike(scores))
    assert item.passed is False
    assert item.value == pytest.approx(1.0)


def test_two_constant_scores_are_alike_and_one_is_not():
    scores, _ = panel()
    flat = np.where(np.isfinite(scores), 0.5, NAN)
    assert reinitialised_weights_score_differently(flat, flat).passed is False
    assert reinitialised_weights_score_differently(scores, flat).passed is True


def test_scores_without_a_common_stock_are_not_assessable():
    item = reinitialised_weights_score_differently(np.full((T, N), NAN), panel()[0])
    assert (item.passed, item.value) == (None, None)
    assert item.explanation.startswith("not assessable")


# Permutations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_permuted_scores_earn_nothing_however_good_the_scores(seed):
    scores, targets = panel()
    assert permuted_scores_earn_nothing(np.where(np.isnan(targets), scores, targets), targets, EARNS, seed=seed).passed


def test_an_evaluation_that_earns_by_itself_is_caught():
    def leaky(scores, targets):
        return EARNS(scores + 5 * np.nan_to_num(targets), targets)  # looks at what it is asked to predict

    item = permuted_scores_earn_nothing(*panel(), leaky, seed=1)
    assert item.passed is False
    assert abs(item.value) > 4


def test_permutations_keep_the_sessions_scores_and_depend_on_the_seed_only():
    scores, targets = panel()
    seen = []

    def spy(permuted, _):
        seen.append(permuted)
        return EARNS(permuted, targets)

    first = permuted_scores_earn_nothing(scores, targets, spy, seed=1, permutations=5)
    assert permuted_scores_earn_nothing(scores, targets, EARNS, seed=1, permutations=5) == first
    usable = np.isfinite(scores) & np.isfinite(targets)
    assert len(seen) == 5
    for permuted in seen:
        np.testing.assert_array_equal(np.isfinite(permuted), usable)
        for t in range(T):
            assert sorted(permuted[t, usable[t]]) == sorted(scores[t, usable[t]])
    assert not np.array_equal(seen[0], seen[1], equal_nan=True)


def test_permutations_without_a_portfolio_are_not_assessable():
    scores, targets = panel()
    assert permuted_scores_earn_nothing(scores[:, :3], targets[:, :3], EARNS, seed=1).passed is None


# True returns ---------------------------------------------------------------------------------------------------


def test_the_true_returns_earn_most_and_more_than_any_score():
    scores, targets = panel()
    item = true_returns_earn_most(scores, targets, EARNS)
    assert item.passed is True
    assert item.value > 0


def test_the_true_returns_as_scores_tie_with_themselves():
    _, targets = panel()
    assert true_returns_earn_most(targets, targets, EARNS).passed is True


def test_a_portfolio_that_is_upside_down_or_misaligned_is_caught():
    scores, targets = panel()
    assert true_returns_earn_most(scores, targets, lambda s, y: EARNS(-s, y)).passed is False
    assert true_returns_earn_most(targets, targets, lambda s, y: EARNS(np.roll(s, 1, axis=0), y)).passed is not True


def test_true_returns_without_a_portfolio_are_not_assessable():
    scores, targets = panel()
    assert true_returns_earn_most(scores[:, :3], targets[:, :3], EARNS).passed is None


# Evaluating twice -----------------------------------------------------------------------------------------------


FIGURES = {"ic_mean": 0.02, "rank_ic_mean": 0.03, "sharpe_daily": 0.1, "sharpe_daily_net": None, "turnover_mean": 1.5}


def test_equal_and_nearly_equal_passes_agree():
    scores, _ = panel()
    assert evaluating_twice_agrees(scores, scores, FIGURES, FIGURES).value == 0.0
    item = evaluating_twice_agrees(scores, scores + 1e-5, FIGURES, FIGURES | {"sharpe_daily": 0.101})
    assert item.passed is True
    assert 0 < item.value < item.tolerance


@pytest.mark.parametrize(
    ("change", "figures"),
    [
        (lambda s: s + 0.1, FIGURES),
        (lambda s: np.where(np.arange(N) == 3, NAN, s), FIGURES),
        (lambda s: s[:-1], FIGURES),
        (lambda s: s, FIGURES | {"sharpe_daily": 0.2}),
        (lambda s: s, FIGURES | {"sharpe_daily": None}),
    ],
    ids=["scores", "missing", "shape", "sharpe", "no sharpe"],
)
def test_two_passes_that_differ_are_caught(change, figures):
    scores, _ = panel()
    assert evaluating_twice_agrees(scores, change(scores), FIGURES, figures).passed is False


def test_the_tolerance_decides_and_is_stated():
    scores, _ = panel()
    noisy = scores + 0.01
    assert evaluating_twice_agrees(scores, noisy, FIGURES, FIGURES).passed is False
    item = evaluating_twice_agrees(scores, noisy, FIGURES, FIGURES, tolerance=5e-2)
    assert (item.passed, item.tolerance) == (True, 5e-2)


def test_no_scores_are_not_assessable():
    empty = np.full((T, N), NAN)
    assert evaluating_twice_agrees(empty, empty, FIGURES, FIGURES).passed is None


# Targets --------------------------------------------------------------------------------------------------------


def test_forward_returns_by_hand():
    open_ = np.array([[10.0], [11.0], [12.0], [NAN], [15.0]])
    close = np.array([[20.0], [22.0], [24.0], [NAN], [30.0]])
    np.testing.assert_allclose(forward_returns(open_, close, "next_open", 1)[:, 0], [12 / 11 - 1, NAN, NAN, NAN, NAN])
    np.testing.assert_allclose(
        forward_returns(open_, close, "next_open", 3)[:, 0], [15 / 11 - 1, NAN, NAN, NAN, NAN], rtol=1e-12
    )
    np.testing.assert_allclose(forward_returns(open_, close, "next_close", 1)[:, 0], [24 / 22 - 1, NAN, NAN, NAN, NAN])
    np.testing.assert_allclose(forward_returns(open_, close, "same_close", 1)[:, 0], [0.1, 24 / 22 - 1, NAN, NAN, NAN])
    assert np.isnan(forward_returns(open_, close, "next_open", 10)).all()
    with pytest.raises(InputError, match="execution"):
        forward_returns(open_, close, "tomorrow", 1)


def prices():
    steps = np.random.default_rng(1).normal(0, 0.02, (T, N))
    return 100 * np.exp(np.cumsum(steps, axis=0))


def test_targets_from_the_same_prices_match_in_float32():
    recomputed = forward_returns(prices(), prices(), "next_open", 1)
    used = recomputed.astype(np.float32)
    used[3, 4] = NAN  # nulled by quarantine
    item = targets_match_prices(used, recomputed, np.ones((T, N), bool))
    assert item.passed is True
    assert "1 that prices give are null" in item.explanation


@pytest.mark.parametrize("execution", ["same_close", "next_close"])
def test_targets_of_another_execution_are_caught(execution):
    close = prices() * 1.01
    close[5] *= 1.02
    used = forward_returns(prices(), close, execution, 1)
    recomputed = forward_returns(prices(), close, "next_open", 1)
    assert targets_match_prices(used, recomputed, np.ones((T, N), bool)).passed is False


def test_one_wrong_and_one_invented_target_are_caught_inside_the_universe_only():
    recomputed = forward_returns(prices(), prices(), "next_open", 1)
    everyone = np.ones((T, N), bool)
    shifted = recomputed.copy()
    shifted[7, 2] += 1e-4
    assert targets_match_prices(shifted, recomputed, everyone).passed is False
    invented = recomputed.copy()
    invented[-1, 0] = 0.0  # the last session has no exit price
    assert targets_match_prices(invented, recomputed, everyone).passed is False
    everyone[7, 2] = False
    assert targets_match_prices(shifted, recomputed, everyone).passed is True


def test_no_target_is_not_assessable():
    empty = np.full((T, N), NAN)
    assert targets_match_prices(empty, empty, np.ones((T, N), bool)).passed is None


# Change ---------------------------------------------------------------------------------------------------------


BEFORE = {"weights_hash": "a", "predictions_hash": "b"}


@pytest.mark.parametrize(
    ("now", "lr", "passed"),
    [
        ({"weights_hash": "c", "predictions_hash": "d"}, 1e-3, True),
        ({"weights_hash": "c", "predictions_hash": "b"}, 1e-3, False),
        ({"weights_hash": "a", "predictions_hash": "d"}, 1e-3, False),
        (BEFORE, 1e-3, False),
        (BEFORE, 0.0, True),
        ({"weights_hash": "c"}, 1e-3, None),
        (BEFORE, None, None),
    ],
)
def test_weights_and_scores_change_unless_the_learning_rate_was_zero(now, lr, passed):
    assert scores_changed(BEFORE, now, learning_rate=lr).passed is passed


def test_without_an_earlier_epoch_the_change_is_not_assessable():
    assert scores_changed(None, BEFORE, learning_rate=1e-3).passed is None


# Battery --------------------------------------------------------------------------------------------------------


def test_a_sound_run_passes_all_six_and_a_missing_measurement_never_passes():
    scores, targets = panel()
    sound = {
        "fresh_scores": np.where(np.isfinite(scores), panel(2)[0], NAN),
        "again_scores": scores,
        "statistics": FIGURES,
        "again_statistics": FIGURES,
        "recomputed_targets": targets,
        "previous_hashes": BEFORE,
        "current_hashes": {"weights_hash": "c", "predictions_hash": "d"},
        "learning_rate": 1e-3,
    }
    items = validity_items(scores, targets, quantile=0.2, seed=1, **sound)
    assert [item.passed for item in items] == [True] * 6
    assert len({item.name for item in items}) == 6
    bare = validity_items(scores, targets, quantile=0.2, seed=1)
    assert [item.name for item in bare] == [item.name for item in items]
    assert [item.passed for item in bare] == [None, True, True, None, None, None]


# Lag scan -------------------------------------------------------------------------------------------------------


def scan(scores, returns, **kwargs):
    return lag_scan(scores, returns, **kwargs)


def test_the_scan_finds_the_lag_that_was_planted():
    generator = np.random.default_rng(1)
    returns = generator.normal(size=(60, 30))
    scores = np.roll(returns, 3, axis=0)  # the score of t is the return of t - 3
    scores[:3] = generator.normal(size=(3, 30))
    result = scan(scores, returns)
    assert result["ic_by_lag"][-3] == pytest.approx(1.0)
    assert abs(result["ic_by_lag"][2]) < 0.1
    assert len(result["warnings"]) == 1
    assert "lag -3" in result["warnings"][0]


def test_a_score_of_coming_returns_is_a_leak_until_shown_otherwise():
    generator = np.random.default_rng(2)
    returns = generator.normal(size=(60, 30))
    scores = 0.5 * np.roll(returns, -1, axis=0) + generator.normal(size=(60, 30))
    assert any("a leak until shown otherwise" in w for w in scan(scores, returns)["warnings"])


def test_an_honest_score_gets_no_warning_and_too_good_a_sharpe_does():
    generator = np.random.default_rng(3)
    returns, scores = generator.normal(size=(2, 200, 50))
    assert scan(scores, returns, sharpe_daily=0.2)["warnings"] == []
    assert "too good" in scan(scores, returns, sharpe_daily=0.6)["warnings"][0]


def test_lags_beyond_the_history_are_null():
    generator = np.random.default_rng(3)
    returns, scores = generator.normal(size=(2, 3, 20))
    lags = scan(scores, returns)["ic_by_lag"]
    assert lags[5] is None
    assert math.isfinite(lags[0])
