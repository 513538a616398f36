"""The evaluation: hand-computed panels, refused inputs, and cells that are never ranked."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from evaluation_panels import CODES, CONFIG, SESSIONS, N, T, of_table, panel, run, table
from scipy import stats

from atft_pipeline.errors import InputError
from atft_pipeline.evaluation.evaluate import DAILY_SERIES, STATISTICS, EvaluationPanel, evaluate_panel
from atft_pipeline.evaluation.metrics import sharpe
from atft_pipeline.evaluation.portfolio import long_short_tranches

NAN = np.nan

# Reference ------------------------------------------------------------------------------------------------------


def test_statistics_follow_their_definitions():
    scores, targets = panel()
    targets[2, 3] = NAN
    result = run(scores, targets)
    gross = []
    ics = []
    for t in range(T):
        known = np.flatnonzero(np.isfinite(targets[t]))
        k = len(known) // 5
        order = known[np.argsort(-scores[t, known], kind="stable")]
        gross.append(targets[t, order[:k]].mean() - targets[t, order[-k:]].mean())
        ics.append(stats.pearsonr(scores[t, known], targets[t, known]).statistic)
    expected = np.mean(gross) / np.std(gross, ddof=1)
    assert result.value("sharpe_daily") == pytest.approx(expected)
    assert result.value("sharpe_annualised") == pytest.approx(expected * math.sqrt(245))
    assert result.value("ic_mean") == pytest.approx(np.mean(ics))
    assert result.value("icir") == pytest.approx(np.mean(ics) / np.std(ics, ddof=1))
    assert result.statistics["ic_mean"].se == pytest.approx(np.std(ics, ddof=1) / math.sqrt(T))
    assert result.statistics["sharpe_daily"].se == result.value("sharpe_se")
    assert result.value("sharpe_daily_net") == pytest.approx(sharpe(result.daily["net"]))
    assert result.value("turnover_mean") == pytest.approx(result.daily["turnover"].mean())
    assert (result.value("sessions"), result.value("dropped_targets")) == (T, 1)
    assert result.value("jpx_spread_sharpe") is None
    assert result.value("sharpe_ci_low") is None
    assert (result.valid, result.reason, result.notes) == (True, "", ())
    assert list(result.statistics) == list(STATISTICS)
    assert list(result.daily) == list(DAILY_SERIES)
    json.dumps(result.as_dict(), allow_nan=False)


def test_bootstrap_adds_the_interval():
    scores, targets = panel(T=40)
    days = np.datetime64("2012-01-04") + np.arange(40)
    result = evaluate_panel(scores, EvaluationPanel(days, CODES, targets, 245), CONFIG, bootstrap=True)
    assert result.value("sharpe_ci_low") < result.value("sharpe_daily") < result.value("sharpe_ci_high")


def test_more_trials_deflate():
    scores, targets = panel(T=40)
    assert run(scores, targets, trials=50).value("deflated_sharpe") < run(scores, targets).value("deflated_sharpe")


def test_a_model_that_nobody_tried_is_refused():
    with pytest.raises(InputError, match="trials must be at least 1, found 0"):
        run(*panel(), trials=0)


def test_a_wide_market_has_a_jpx_spread():
    scores, targets = panel(T=3, N=400)
    assert run(scores, targets).value("jpx_spread_sharpe") > 0


def test_overlapping_horizons_are_held_in_tranches():
    scores, returns = panel(T=12)
    five = np.stack([returns[t : t + 5].sum(axis=0) if t + 5 <= 12 else np.full(N, NAN) for t in range(12)])
    result = run(scores, five, horizon_sessions=5, returns_1d=returns)
    expected = long_short_tranches(scores, returns, 5, quantile=0.2, cost_bps=10.0)
    np.testing.assert_allclose(result.daily["gross"], expected.gross)
    with pytest.raises(InputError, match="tranches"):
        run(scores, five, horizon_sessions=5)


# Never ranked ---------------------------------------------------------------------------------------------------


def assert_invalid(result, *words):
    assert not result.valid
    assert all(word in result.reason for word in words), result.reason
    ranked = {k: v for k, v in result.values().items() if k not in ("sessions", "dropped_targets")}
    assert set(ranked.values()) == {None}
    assert np.isnan(result.daily["gross"]).all()


@pytest.mark.parametrize("value", [0.0, 0.3, -1e12, 1e-300])
def test_constant_scores_are_invalid(value):
    _, targets = panel()
    assert_invalid(run(np.full((T, N), value), targets), "constant", "6 of 6 sessions", "2012-01-04")
    assert_invalid(of_table(table(np.full((T, N), value), targets)).overall, "constant")


def test_one_constant_session_is_invalid_and_named():
    scores, targets = panel()
    scores[3] = 0.5
    assert_invalid(run(scores, targets), "constant", "1 of 6", "2012-01-07")


def test_constant_up_to_rounding_is_constant_and_tiny_dispersion_is_not():
    scores, targets = panel()
    assert_invalid(run(1.0 + 1e-14 * scores, targets), "constant")
    assert run(1e-14 * scores, targets).valid
    assert run(1.0 + 1e-9 * scores, targets).valid


def test_scores_that_vary_only_between_sessions_are_invalid():
    _, targets = panel()
    assert_invalid(run(np.repeat(np.arange(T, dtype=float)[:, None], N, axis=1), targets), "constant")


@pytest.mark.parametrize("bad", [NAN, np.inf, -np.inf])
def test_a_score_that_is_not_finite_beside_a_target_is_invalid(bad):
    scores, targets = panel()
    scores[2, 1] = scores[4, 5] = bad
    assert_invalid(run(scores, targets), "not finite", "2 of 60", "2012-01-06")
    assert_invalid(of_table(table(scores, targets)).overall, "not finite", "2 of 60")


def test_a_missing_score_without_a_target_is_fine_and_so_are_ties():
    scores, targets = panel()
    scores[2, 1], targets[2, 1] = np.inf, NAN
    assert run(scores, targets).valid
    assert run(np.sign(panel()[0]), targets).valid


# Refused --------------------------------------------------------------------------------------------------------


def test_a_panel_out_of_order_or_of_other_shapes_is_refused():
    scores, targets = panel()
    with pytest.raises(InputError, match="ascending"):
        evaluate_panel(scores, EvaluationPanel(SESSIONS, CODES[::-1], targets, 245), CONFIG)
    with pytest.raises(InputError, match="shape"):
        evaluate_panel(scores[:3], EvaluationPanel(SESSIONS, CODES, targets, 245), CONFIG)


def test_too_few_stocks_for_a_leg_have_an_ic_and_no_sharpe():
    scores, targets = panel(N=4)
    result = run(scores, targets)
    assert result.valid
    assert result.value("sharpe_daily") is None
    assert result.value("ic_mean") is not None
    assert result.value("sessions_without_portfolio") == T
    assert "5 stocks" in result.notes[0]


@pytest.mark.process(reason="a fresh interpreter")
def test_the_training_path_imports_nothing_heavy():
    code = (
        "import sys, atft_pipeline.verdict.criterion, atft_pipeline.evaluation.evaluate;"
        "print({'pandas', 'scipy', 'sklearn', 'polars', 'arch', 'skfolio', 'lightgbm', 'numba'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
