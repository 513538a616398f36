"""Statistics against scipy, skfolio, loops and published numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from atft_pipeline.evaluation.metrics import (
    bootstrap_interval,
    deflated_sharpe,
    expected_best_sharpe,
    information_coefficient,
    lo_annualised_sharpe,
    max_drawdown,
    mean_and_error,
    minimum_track_record,
    probabilistic_sharpe,
    rank_information_coefficient,
    sharpe,
    sharpe_standard_error,
)

NAN = np.nan


def returns(seed=1, n=250, mean=0.001, std=0.01):
    return np.random.default_rng(seed).normal(mean, std, n)


def panels(seed):
    generator = np.random.default_rng(seed)
    scores, targets = generator.integers(0, 5, (7, 11)).astype(float), generator.normal(size=(7, 11))
    scores[generator.random((7, 11)) < 0.2] = NAN
    targets[generator.random((7, 11)) < 0.2] = NAN
    return scores, targets


# Reference ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_correlations_equal_scipy_session_by_session(seed):
    scores, targets = panels(seed)
    ic, rank_ic = information_coefficient(scores, targets), rank_information_coefficient(scores, targets)
    for t in range(len(scores)):
        both = np.isfinite(scores[t]) & np.isfinite(targets[t])
        assert ic[t] == pytest.approx(stats.pearsonr(scores[t, both], targets[t, both]).statistic, abs=1e-12)
        assert rank_ic[t] == pytest.approx(stats.spearmanr(scores[t, both], targets[t, both]).statistic, abs=1e-12)


def test_hand_computed_rank_ic_with_a_tie_and_a_null():
    scores = np.array([[1.0, 2.0, 2.0, NAN, 3.0]])  # ranks 1, 2.5, 2.5, 4
    targets = np.array([[0.4, 0.1, 0.2, 9.0, 0.3]])  # ranks 4, 1, 2, 3
    # Deviations (-1.5, 0, 0, 1.5) and (1.5, -1.5, -0.5, 0.5): -1.5 / sqrt(4.5 * 5)
    assert rank_information_coefficient(scores, targets) == pytest.approx([-1.5 / math.sqrt(22.5)])


def test_sharpe_uses_ddof_1_and_skips_nan():
    assert sharpe(np.array([0.01, NAN, 0.03])) == pytest.approx(0.02 / (0.02 / math.sqrt(2)))


def test_mean_and_error():
    assert mean_and_error(np.array([1.0, 3.0, NAN])) == pytest.approx((2.0, math.sqrt(2) / math.sqrt(2)))


def test_standard_error_is_mertens_and_about_lo_for_normal_returns():
    x = returns()
    ratio, skew, kurtosis = sharpe(x), stats.skew(x), stats.kurtosis(x, fisher=False)
    expected = math.sqrt((1 - skew * ratio + (kurtosis - 1) / 4 * ratio**2) / 249)
    assert sharpe_standard_error(x) == pytest.approx(expected)
    assert sharpe_standard_error(x) == pytest.approx(0.063, abs=0.001)


def test_standard_error_agrees_with_the_spread_of_simulated_sharpes():
    draws = np.random.default_rng(1).exponential(size=(2000, 250)) - 0.8  # skewed, so that the correction matters
    assert np.std([sharpe(x) for x in draws], ddof=1) == pytest.approx(
        np.mean([sharpe_standard_error(x) for x in draws]), rel=0.05
    )


def test_lo_correction_equals_the_formula_written_out():
    x = returns(seed=3)
    centred = x - x.mean()
    rho = [float(centred[k:] @ centred[:-k] / (centred @ centred)) for k in range(1, 5)]  # 4 lags at 250 sessions
    eta = 245 / math.sqrt(245 + 2 * sum((245 - k) * r for k, r in enumerate(rho, start=1)))
    assert lo_annualised_sharpe(x, 245) == pytest.approx(eta * sharpe(x))


def test_lo_correction_lowers_what_positive_autocorrelation_inflates():
    noise = returns(n=600, mean=0.0)
    smooth = 0.002 + np.convolve(noise, [0.5, 0.5], mode="valid")
    assert lo_annualised_sharpe(smooth, 245) < 0.85 * sharpe(smooth) * math.sqrt(245)
    assert lo_annualised_sharpe(smooth, 245, lags=0) == pytest.approx(sharpe(smooth) * math.sqrt(245))


SAMPLES = {
    "normal": returns(),
    "fat tails": 0.001 + 0.01 * np.random.default_rng(2).standard_t(3, 400),
    "skewed": np.random.default_rng(3).exponential(0.01, 80) - 0.008,
    "losing": returns(seed=4, mean=-0.002),
    "gaps": np.where(np.arange(120) % 7, returns(seed=5, n=120), NAN),
    "three": np.array([0.01, -0.02, 0.03]),
}


@pytest.fixture(scope="module")
def skfolio() -> Any:
    import skfolio.measures  # seconds, which other tests need not wait for

    return skfolio.measures


@pytest.mark.parametrize("benchmark", [0.0, 0.03, -0.2])
@pytest.mark.parametrize("x", SAMPLES.values(), ids=SAMPLES)
def test_psr_equals_skfolio(x, benchmark, skfolio):
    assert probabilistic_sharpe(x, benchmark) == pytest.approx(
        skfolio.probabilistic_sharpe_ratio(x, benchmark), abs=1e-12
    )


@pytest.mark.parametrize("trials", [1, 2, 7, 1000])
def test_the_expected_best_of_worthless_trials_equals_skfolio(trials, skfolio):
    expected = skfolio.expected_max_sharpe_ratio(trials, 0.07)
    assert expected_best_sharpe(trials, 0.07) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("x", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize("trials", [1, 2, 30])
def test_deflated_sharpe_equals_skfolio_given_the_sharpes_of_the_trials(x, trials, skfolio):
    tried = np.random.default_rng(6).normal(0.02, 0.07, trials)
    spread = float(tried.std(ddof=1)) if trials > 1 else 0.0
    assert deflated_sharpe(x, trials, spread) == pytest.approx(skfolio.deflated_sharpe_ratio(x, tried), abs=1e-12)


@pytest.mark.parametrize("benchmark", [0.0, 0.03])
def test_error_and_minimum_track_record_are_those_inside_the_psr_of_skfolio(benchmark, skfolio):
    # skfolio 1.12 has neither; both follow from its PSR: z = (SR - benchmark) / error, and z grows with sqrt(n - 1).
    x = returns(mean=0.002)
    z = stats.norm.ppf(skfolio.probabilistic_sharpe_ratio(x, benchmark))
    assert (sharpe(x) - benchmark) / sharpe_standard_error(x) == pytest.approx(z, abs=1e-9)
    needed = 1 + (len(x) - 1) * (stats.norm.ppf(0.95) / z) ** 2
    assert minimum_track_record(x, benchmark) == pytest.approx(needed, rel=1e-9)


def test_psr_and_minimum_track_record_are_each_others_inverse():
    x = returns()
    needed = minimum_track_record(x)
    z = (needed - 1) ** 0.5 * probabilistic_z(x)
    assert stats.norm.cdf(z) == pytest.approx(0.95)
    assert probabilistic_sharpe(x) == pytest.approx(stats.norm.cdf(sharpe(x) / sharpe_standard_error(x)))


def probabilistic_z(x):
    return sharpe(x) / (sharpe_standard_error(x) * math.sqrt(len(x) - 1))


def test_minimum_track_record_of_the_paper():
    # Bailey and Lopez de Prado (2012): annual Sharpe 2 against 1, normal, weekly-free case: about 2.73 years daily.
    ratio, benchmark = 2 / math.sqrt(250), 1 / math.sqrt(250)
    x = stats.norm.ppf((np.arange(20000) + 0.5) / 20000)
    x = x / x.std(ddof=1) + ratio
    assert minimum_track_record(x, benchmark) / 250 == pytest.approx(2.73, abs=0.02)


@pytest.mark.parametrize("trials", [2, 10, 100])
def test_deflated_sharpe_is_measured_against_the_best_of_simulated_trials(trials):
    x = returns()
    best = np.random.default_rng(1).normal(0.0, 0.05, (20000, trials)).max(axis=1).mean()
    expected = stats.norm.cdf((sharpe(x) - best) / sharpe_standard_error(x))
    # The benchmark is an asymptotic law: 8 % below the true mean for two trials, 2 % above it for ten.
    assert deflated_sharpe(x, trials, 0.05) == pytest.approx(expected, abs=0.015)


def test_trials_disperse_as_chance_does_where_nobody_says_otherwise():
    x = returns()
    assert deflated_sharpe(x, 20) == pytest.approx(deflated_sharpe(x, 20, 1 / math.sqrt(249)), abs=1e-15)


def test_deflated_sharpe_falls_with_trials_and_is_psr_for_one():
    x = returns()
    values = [deflated_sharpe(x, trials) for trials in (1, 2, 10, 100)]
    assert values[0] == probabilistic_sharpe(x)
    assert values == sorted(values, reverse=True)
    assert values[3] < values[0] - 0.1


def test_drawdown_is_compounded_and_counts_a_loss_from_the_start():
    assert max_drawdown(np.array([-0.1, 0.2, NAN, -0.5, -0.5])) == pytest.approx(-0.75)
    assert max_drawdown(np.array([-0.1, -0.1])) == pytest.approx(-0.19)
    assert max_drawdown(np.array([0.1, 0.0])) == 0.0
    assert max_drawdown(np.array([0.1, -1.5, 3.0])) == -1.0


def test_bootstrap_interval_holds_the_sharpe_and_repeats():
    x = returns()
    low, high = bootstrap_interval(x, samples=200, seed=1)
    assert low < sharpe(x) < high
    assert (high - low) / (2 * 1.96 * sharpe_standard_error(x)) == pytest.approx(1.0, abs=0.3)
    assert (low, high) == bootstrap_interval(x, samples=200, seed=1)


def test_the_error_of_an_overlapping_horizon_is_that_of_its_long_run_variance():
    x = np.convolve(returns(n=400), np.ones(5), mode="valid")
    n, lags = len(x), 8
    total = sum((a - x.mean()) ** 2 for a in x)
    for k in range(1, lags + 1):
        total += 2 * (1 - k / (lags + 1)) * sum((x[t] - x.mean()) * (x[t - k] - x.mean()) for t in range(k, n))
    assert mean_and_error(x, 5) == pytest.approx((x.mean(), math.sqrt(total / (n - 1) / n)))
    assert mean_and_error(x, 1) == mean_and_error(x)


def test_the_error_of_an_overlapping_horizon_is_close_to_what_means_scatter_by():
    """A sum of h sessions: the independent error is sqrt(h) too small, this one by a tenth or so (its missing lags)."""
    draws = [np.convolve(returns(seed, n=500), np.ones(5), mode="valid") for seed in range(300)]
    scatter = np.std([x.mean() for x in draws])
    assert 0.8 < np.mean([mean_and_error(x, 5)[1] for x in draws]) / scatter < 1.0
    assert np.mean([mean_and_error(x)[1] for x in draws]) / scatter < 0.55


def test_bootstrap_interval_of_a_mean_is_about_its_normal_one():
    x = returns()
    low, high = bootstrap_interval(x, samples=2000, seed=1, statistic=lambda values: float(np.mean(values)))
    mean, error = mean_and_error(x)
    assert (low + high) / 2 == pytest.approx(mean, abs=0.2 * error)
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1.0, abs=0.3)


def test_interval_is_not_known_where_a_resample_has_no_sharpe():
    x = np.zeros(25)
    x[3] = 0.01  # a resample misses the only return that is not 0 with probability (24/25)^25
    assert np.isnan(bootstrap_interval(x, samples=50, seed=1)).all()


# Boundary -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [[], [0.1], [0.1, NAN], [0.1, 0.1, 0.1], [0.0, 0.0], [NAN, NAN]])
def test_what_has_no_dispersion_has_no_sharpe(x):
    x = np.array(x, float)
    assert math.isnan(sharpe(x))
    for statistic in (sharpe_standard_error, probabilistic_sharpe, minimum_track_record):
        assert math.isnan(statistic(x))
    assert math.isnan(deflated_sharpe(x, 5))
    assert math.isnan(lo_annualised_sharpe(x, 245))
    assert np.isnan(bootstrap_interval(x, samples=10, seed=1)).all()


def test_a_losing_record_has_no_minimum_length():
    assert math.isnan(minimum_track_record(-np.abs(returns())))


def test_correlation_without_pairs_or_dispersion_is_nan():
    scores = np.array([[1.0, NAN, NAN], [1.0, 1.0, 1.0], [1.0, 2.0, 3.0], [0.1, 0.1, 0.1], [NAN, NAN, NAN]])
    targets = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 1.0, NAN], [1.0, 2.0, 4.0], [1.0, 2.0, 3.0]])
    assert np.isnan(information_coefficient(scores, targets)).all()
    assert np.isnan(rank_information_coefficient(scores, targets)).all()


def test_correlation_does_not_depend_on_scale():
    scores, targets = panels(4)
    np.testing.assert_allclose(
        information_coefficient(scores * 1e-160, targets * 1e-160), information_coefficient(scores, targets), atol=1e-9
    )


def test_no_session_at_all():
    assert len(information_coefficient(np.zeros((0, 3)), np.zeros((0, 3)))) == 0
    assert len(rank_information_coefficient(np.zeros((0, 3)), np.zeros((0, 3)))) == 0
    assert math.isnan(max_drawdown(np.array([])))
