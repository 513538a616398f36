"""Baselines find what is planted, read training sessions only, and score members of validation and test."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from atft_pipeline.config.schema import HORIZONS, EvaluationConfig
from atft_pipeline.errors import InputError
from atft_pipeline.evaluation.baselines import (
    evaluate_baselines,
    fit_baselines,
    fit_lightgbm,
    ridge,
    standardised_targets,
)
from atft_pipeline.evaluation.evaluate import EvaluationPanel, evaluate_panel
from atft_pipeline.evaluation.metrics import information_coefficient

NAN = np.nan
T, N = 120, 25
NAMES = ["returns_1d", "returns_5d", "rsi_14", "beta_60d"]
SPLIT = SimpleNamespace(train=np.arange(70), validation=np.arange(80, 100), test=np.arange(105, 120))


def panel(seed=1):
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(T, N, len(NAMES))).astype(np.float32)
    signal = 0.5 * features[:, :, 2] - 0.8 * features[:, :, 1]
    targets = np.full((T, N, len(HORIZONS)), NAN, np.float32)
    targets[:, :, 0] = 0.01 * (signal + generator.normal(size=(T, N)))
    features[generator.random(features.shape) < 0.05] = NAN
    targets[generator.random((T, N)) < 0.05, 0] = NAN
    member = np.ones((T, N), bool)
    member[:, 0] = False
    return SimpleNamespace(
        sessions=np.datetime64("2012-01-04") + np.arange(T),
        codes=np.array([f"{1000 + n}" for n in range(N)]),
        features=features,
        targets=targets,
        member=member,
        investable=np.ones((T, N), bool),
        liquid=np.broadcast_to(np.arange(N) >= 10, (T, N)),
        manifest={"days_per_year": 245},
        feature_names=NAMES,
    )


@pytest.fixture(scope="module")
def scores():
    return fit_baselines(panel(), SPLIT, seed=1)


def test_each_baseline_finds_the_planted_signal(scores):
    targets = panel().targets[:, :, 0]
    assert set(scores) == {"ridge", "lightgbm", "reversal"}
    for values in scores.values():
        assert np.nanmean(information_coefficient(values, targets)) > 0.3


def test_members_of_validation_and_test_have_scores_and_nothing_else(scores):
    expected = np.zeros((T, N), bool)
    expected[np.r_[80:100, 105:120], 1:] = True
    for values in scores.values():
        np.testing.assert_array_equal(np.isfinite(values), expected)


def test_no_target_outside_training_decides_a_score(scores):
    other = panel()
    other.targets[70:] *= -30
    for name, values in fit_baselines(other, SPLIT, seed=1).items():
        np.testing.assert_array_equal(values, scores[name])


def test_no_stock_outside_the_universe_decides_a_score(scores):
    other = panel()
    other.targets[:, 0] = 9.0
    other.features[:, 0] = -9.0
    for name, values in fit_baselines(other, SPLIT, seed=1).items():
        np.testing.assert_array_equal(values, scores[name])


def test_a_missing_feature_is_zero(scores):
    other = panel()
    other.features[np.isnan(other.features)] = 0.0
    for name, values in fit_baselines(other, SPLIT, seed=1).items():
        np.testing.assert_array_equal(values, scores[name])


def test_the_panel_is_left_as_it_was():
    given = panel()
    fit_baselines(given, SPLIT, seed=1)
    np.testing.assert_array_equal(given.features, panel().features)
    np.testing.assert_array_equal(given.targets, panel().targets)


def test_ridge_solves_its_normal_equations():
    generator = np.random.default_rng(1)
    X = generator.normal(size=(300, 3)).astype(np.float32)
    y = X @ np.array([1.0, -2.0, 0.5]) + 3.0
    new = generator.normal(size=(5, 3)).astype(np.float32)
    centred = X.astype(float) - X.mean(axis=0)
    beta = np.linalg.solve(centred.T @ centred + 0.01 * 300 * np.eye(3), centred.T @ (y - y.mean()))
    expected = (new - X.mean(axis=0)) @ beta + y.mean()
    np.testing.assert_allclose(ridge(X.copy(), y, new), expected, atol=1e-4)  # float32


def test_targets_are_z_scores_of_the_sessions_members():
    targets = np.array([[1.0, 2.0, 3.0, 100.0], [1.0, 1.0, NAN, 1.0], [NAN, 1.0, NAN, NAN]])
    member = np.array([[True, True, True, False]] * 3)
    np.testing.assert_allclose(standardised_targets(targets, member)[0, :3], [-1, 0, 1])
    assert np.isnan(standardised_targets(targets, member)[1:]).all()
    assert np.isnan(standardised_targets(targets, member)[0, 3])
    outlier = np.zeros((1, 100))
    outlier[0, 0] = 1.0
    assert standardised_targets(outlier, np.ones((1, 100), bool))[0, 0] == 5.0


def test_training_without_targets_is_refused():
    empty = panel()
    empty.targets[:70] = NAN
    with pytest.raises(InputError, match="no training row has a target"):
        fit_baselines(empty, SPLIT, seed=1)


@pytest.mark.parametrize("universe", ["liquid", "all"])
def test_each_split_of_a_slice_is_evaluated_as_the_network_is(scores, universe):
    given, config = panel(), EvaluationConfig(universe=universe, bootstrap_samples=20)
    stocks = slice(10, None) if universe == "liquid" else slice(1, None)  # the first is in no universe
    evaluations = evaluate_baselines(scores, given, SPLIT, config)
    assert all(list(by_split) == ["validation", "test"] for by_split in evaluations.values())
    for model, by_split in evaluations.items():
        for part, evaluation in by_split.items():
            rows = getattr(SPLIT, part)
            alone = EvaluationPanel(given.sessions[rows], given.codes[stocks], given.targets[rows, stocks, 0], 245)
            expected = evaluate_panel(scores[model][rows, stocks], alone, config, bootstrap=True)
            for name, value in expected.values().items():
                found = evaluation.value(name)
                assert found is None if value is None else found == pytest.approx(value, rel=1e-9), name
        # The bootstrap needs 20 sessions, which the validation has.
        assert by_split["validation"].value("sharpe_ci_low") is not None


# One horizon ---------------------------------------------------------------------------------------------------


def test_lightgbm_of_horizon_1_is_the_baseline(scores):
    np.testing.assert_array_equal(fit_lightgbm(panel(), SPLIT, 1, horizon_sessions=1), scores["lightgbm"])


def test_lightgbm_is_fitted_to_the_targets_of_its_horizon_and_to_no_other():
    given = panel()
    five = HORIZONS.index(5)
    given.targets[:, :, five] = -given.targets[:, :, 0]
    values = fit_lightgbm(given, SPLIT, 1, horizon_sessions=5)
    assert np.nanmean(information_coefficient(values, given.targets[:, :, five])) > 0.3
    given.targets[:, :, 0] = NAN
    np.testing.assert_array_equal(fit_lightgbm(given, SPLIT, 1, horizon_sessions=5), values)
    with pytest.raises(InputError, match="no training row has a target"):
        fit_lightgbm(given, SPLIT, 1, horizon_sessions=10)
