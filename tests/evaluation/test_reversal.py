"""The best one-factor reversal is chosen on the training sessions alone."""

from __future__ import annotations

import numpy as np
import pytest
from evaluation_panels import N

from atft_pipeline.errors import InputError
from atft_pipeline.evaluation.metrics import sharpe
from atft_pipeline.evaluation.portfolio import long_short
from atft_pipeline.evaluation.reversal import one_factor_reversal

NAN = np.nan


def reversal_panel(seed=1, sign=-1.0, T=60):
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(T, N, 3))
    return features, 0.01 * sign * features[:, :, 2] + generator.normal(0, 0.02, (T, N)), np.ones((T, N), bool)


NAMES = ["volatility_20d", "returns_1d", "returns_5d"]


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_reversal_finds_the_planted_factor_and_sign(sign):
    features, targets, member = reversal_panel(sign=sign)
    factor = one_factor_reversal(features, NAMES, targets, member, np.arange(40))
    assert (factor.feature, factor.sign) == ("returns_5d", sign)
    np.testing.assert_array_equal(factor.scores, sign * features[:, :, 2])
    train = long_short(factor.scores[:40], targets[:40], quantile=0.2, cost_bps=0.0).gross
    assert factor.train_sharpe == pytest.approx(sharpe(train))


def test_the_reversal_never_reads_a_target_outside_training():
    features, targets, member = reversal_panel()
    chosen = one_factor_reversal(features, NAMES, targets, member, np.arange(40))
    targets[40:] *= -50
    assert one_factor_reversal(features, NAMES, targets, member, np.arange(40)).sign == chosen.sign


def test_the_reversal_scores_members_only_and_a_missing_return_as_zero():
    features, targets, member = reversal_panel()
    member[:, 0] = False
    features[50, 1, 2] = NAN
    scores = one_factor_reversal(features, NAMES, targets, member, np.arange(40)).scores
    assert np.isnan(scores[:, 0]).all()
    assert scores[50, 1] == 0.0
    assert np.isfinite(scores[:, 1:]).all()


def test_the_reversal_needs_one_of_its_features():
    features, targets, member = reversal_panel()
    with pytest.raises(InputError, match="returns_1d, returns_5d"):
        one_factor_reversal(features, ["a", "b", "c"], targets, member, np.arange(40))
