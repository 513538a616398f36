"""Figures of `atft evaluate` against alphalens, empyrical, skfolio, pandas and the JPX competition metric, to 1e-9.

One table of Date, Code, score and target with tied scores, null targets, a universe that changes and a session too
small for a portfolio is evaluated by this library and, as a pandas frame, by each peer.
"""

from __future__ import annotations

import math

import alphalens.performance
import alphalens.utils
import empyrical
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from skfolio.measures import expected_max_sharpe_ratio, probabilistic_sharpe_ratio

from atft_pipeline.config.schema import EvaluationConfig
from atft_pipeline.evaluation.evaluate import Evaluation
from atft_pipeline.evaluation.predictions_table import evaluate_table

TOLERANCE = 1e-9
"""What agreement means here; peers sum in another order, which alone makes 2e-15 of these figures."""

T, N = 80, 43


def market(T: int = T, N: int = N, seed: int = 1) -> pd.DataFrame:
    """Rows Date, Code, score, target in Code order: every third stock enters late or leaves early."""
    generator = np.random.default_rng(seed)
    score = generator.normal(size=(T, N)).round(1)
    target = 0.004 * score + generator.normal(0, 0.03, (T, N))
    target[generator.random((T, N)) < 0.03] = np.nan
    session, stock = np.indices((T, N))
    there = ~((stock % 3 == 0) & (session < T // 4)) & ~((stock % 3 == 1) & (session > 3 * T // 4))
    there &= (session != T // 2) | (stock < 4)  # four stocks: no fifth to hold
    return pd.DataFrame(
        {
            "Date": pd.bdate_range("2015-01-05", periods=T).to_numpy("datetime64[D]")[session[there]],
            "Code": [f"{1000 + n}" for n in stock[there]],
            "score": score[there],
            "target": target[there],
        }
    )


def evaluated(rows: pd.DataFrame, trials: int = 1) -> Evaluation:
    columns = {name: pa.array(rows[name].to_numpy(), from_pandas=True) for name in ("Date", "score", "target")}
    table = pa.table(columns | {"Code": pa.array(rows["Code"].tolist())})
    return evaluate_table(table, score="score", target="target", config=EvaluationConfig(), trials=trials).overall


def factor_data(rows: pd.DataFrame) -> pd.DataFrame:
    """The frame alphalens works on: rows with a target, keyed by date and asset."""
    keyed = rows.rename(columns={"Date": "date", "Code": "asset", "score": "factor", "target": "1D"})
    keyed["date"] = pd.to_datetime(keyed["date"])
    return keyed.dropna().set_index(["date", "asset"])


def by_session(ours: np.ndarray, evaluation: Evaluation) -> pd.Series:
    return pd.Series(ours, pd.to_datetime(evaluation.sessions)).dropna()


def assert_same_sessions(ours: pd.Series, theirs: pd.Series) -> None:
    theirs = theirs.dropna()
    assert list(ours.index) == list(theirs.index)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def test_the_market_has_what_the_comparison_is_about() -> None:
    rows = market()
    assert rows.duplicated(["Date", "score"]).any()
    assert rows["target"].isna().any()
    assert rows.groupby("Code").size().nunique() > 2
    result = evaluated(rows)
    assert result.value("sessions_without_portfolio") == 1
    assert result.value("dropped_targets") == rows["target"].isna().sum()


def test_rank_ic_equals_alphalens() -> None:
    rows = market()
    result = evaluated(rows)
    ic = alphalens.performance.factor_information_coefficient(factor_data(rows))["1D"]
    assert_same_sessions(by_session(result.daily["rank_ic"], result), ic)
    mean = alphalens.performance.mean_information_coefficient(factor_data(rows))["1D"]
    assert result.value("rank_ic_mean") == pytest.approx(mean, abs=TOLERANCE)
    assert result.value("rank_icir") == pytest.approx(empyrical.sharpe_ratio(ic, annualization=1), abs=TOLERANCE)


def test_ic_equals_pandas() -> None:
    # alphalens has the rank correlation only.
    rows = market()
    result = evaluated(rows)
    ic = factor_data(rows).groupby("date")[["factor", "1D"]].apply(lambda day: day["factor"].corr(day["1D"]))
    assert_same_sessions(by_session(result.daily["ic"], result), ic)
    assert result.value("ic_mean") == pytest.approx(ic.mean(), abs=TOLERANCE)
    assert result.value("icir") == pytest.approx(empyrical.sharpe_ratio(ic, annualization=1), abs=TOLERANCE)


def spread(data: pd.DataFrame) -> pd.Series:
    """Fifth quantile minus first of alphalens, which reports it per unit of gross exposure: half of ours."""
    means, _ = alphalens.performance.mean_return_by_quantile(data, by_date=True, demeaned=False)
    halved, _ = alphalens.performance.compute_mean_returns_spread(means, upper_quant=5, lower_quant=1)
    return 2.0 * halved["1D"]


def test_long_short_equals_the_quantile_spread_of_alphalens_where_fifths_are_whole() -> None:
    # 40 stocks without a tie: pandas.qcut puts eight in the outer fifths, as floor(n / 5) does. Of 43 stocks it puts
    # nine in both, and it never splits a tie; there the legs have to be given, as in the next test.
    generator = np.random.default_rng(2)
    rows = market(N=40)
    rows = rows[rows.groupby("Date")["Code"].transform("size") == 40].assign(target=lambda f: f["target"].fillna(0.01))
    rows["score"] = generator.normal(size=len(rows))
    data = factor_data(rows)
    data["factor_quantile"] = alphalens.utils.quantize_factor(data, quantiles=5)
    result = evaluated(rows)
    assert result.value("sessions") == rows["Date"].nunique() > 30
    assert_same_sessions(by_session(result.daily["gross"], result), spread(data))


def test_long_short_equals_the_spread_of_alphalens_between_legs_with_ties_and_nulls() -> None:
    rows = market()
    data = factor_data(rows)
    days = data.groupby("date")["factor"]
    place, stocks = days.rank(ascending=False, method="first"), days.transform("size")
    leg = stocks // 5
    data["factor_quantile"] = np.select([place <= leg, place > stocks - leg], [5, 1], 3)
    result = evaluated(rows)
    assert_same_sessions(by_session(result.daily["gross"], result), spread(data))


def test_sharpe_and_drawdown_equal_empyrical() -> None:
    result = evaluated(market())
    gross, net = (pd.Series(result.daily[name], pd.to_datetime(result.sessions)) for name in ("gross", "net"))
    assert gross.isna().sum() == 1, "a session without a portfolio"
    for name, expected in {
        "sharpe_daily": empyrical.sharpe_ratio(gross, risk_free=0, annualization=1),
        "sharpe_daily_net": empyrical.sharpe_ratio(net, risk_free=0, annualization=1),
        "sharpe_annualised": empyrical.sharpe_ratio(gross, risk_free=0, annualization=245),
        "max_drawdown": empyrical.max_drawdown(gross),
    }.items():
        assert result.value(name) == pytest.approx(expected, abs=TOLERANCE), name


def test_drawdown_is_that_of_the_cumulative_returns_of_empyrical() -> None:
    result = evaluated(market())
    wealth = np.concatenate([[1.0], empyrical.cum_returns(pd.Series(result.daily["gross"]), starting_value=1.0)])
    lowest = min(wealth[t] / wealth[: t + 1].max() for t in range(len(wealth))) - 1.0
    assert lowest < -0.01
    assert result.value("max_drawdown") == pytest.approx(lowest, abs=TOLERANCE)


def test_probabilistic_and_deflated_sharpe_of_a_table_equal_skfolio() -> None:
    result = evaluated(market(), trials=12)
    gross = result.daily["gross"]
    best = expected_max_sharpe_ratio(12, 1.0 / math.sqrt(np.isfinite(gross).sum() - 1))
    assert result.value("deflated_sharpe") == pytest.approx(probabilistic_sharpe_ratio(gross, best), abs=TOLERANCE)
    assert result.value("psr_0") == pytest.approx(probabilistic_sharpe_ratio(gross), abs=TOLERANCE)
    assert result.value("deflated_sharpe") < result.value("psr_0")


# JPX Tokyo Stock Exchange Prediction (Kaggle, 2022) --------------------------------------------------------------


def calc_spread_return_per_day(df: pd.DataFrame, portfolio_size: int = 200, toprank_weight_ratio: float = 2) -> float:
    """The competition's metric of one day: Rank 0 is bought with weight 2, the last Rank is sold with weight 2."""
    assert sorted(df["Rank"]) == list(range(len(df)))
    weights = np.linspace(toprank_weight_ratio, 1, portfolio_size)
    ascending = df.sort_values("Rank")["Target"].to_numpy()
    bought = (ascending[:portfolio_size] * weights).sum() / weights.mean()
    sold = (ascending[::-1][:portfolio_size] * weights).sum() / weights.mean()
    return float(bought - sold)


def calc_spread_return_sharpe(df: pd.DataFrame) -> tuple[float, pd.Series]:
    daily = df.groupby("Date")[["Rank", "Target"]].apply(calc_spread_return_per_day)
    return float(daily.mean() / daily.std()), daily


def test_jpx_spread_sharpe_equals_the_competition_metric() -> None:
    rows = market(T=20, N=640)
    known = rows.dropna()
    wide = known[known.groupby("Date")["Code"].transform("size") >= 400].rename(columns={"target": "Target"})
    wide["Rank"] = wide.groupby("Date")["score"].rank(ascending=False, method="first").astype(int) - 1
    expected, daily = calc_spread_return_sharpe(wide)
    result = evaluated(rows)
    assert len(daily) == 19
    theirs = daily.set_axis(pd.to_datetime(daily.index))
    assert_same_sessions(by_session(result.daily["jpx_spread"], result), theirs)
    assert result.value("jpx_spread_sharpe") == pytest.approx(expected, abs=TOLERANCE)
