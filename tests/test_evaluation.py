"""The one evaluation: hand-computed panels, tables in every shape, and what is refused or never ranked."""

from __future__ import annotations

import datetime as dt
import json
import math
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from atft_pipeline.config import EvaluationConfig
from atft_pipeline.errors import InputError
from atft_pipeline.evaluation import DAILY, STATISTICS, evaluate, evaluate_file, evaluate_table, one_factor_reversal
from atft_pipeline.metrics import sharpe
from atft_pipeline.portfolio import long_short, long_short_tranches

NAN = np.nan
CONFIG = EvaluationConfig()
T, N = 6, 10
SESSIONS = np.datetime64("2012-01-04") + np.arange(T)
CODES = [f"{1000 + 10 * n}" for n in range(N)]


def panel(seed=1, T=T, N=N):
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(T, N))
    return scores, 0.01 * scores + generator.normal(0, 0.02, (T, N))


def run(scores, targets, **kwargs):
    days = np.datetime64("2012-01-04") + np.arange(len(scores))
    codes = [f"{1000 + n:05d}" for n in range(scores.shape[1])]
    return evaluate(scores, targets, days, codes, CONFIG, days_per_year=245, bootstrap=False, **kwargs)


def table(scores, targets, **columns):
    rows = len(scores) * scores.shape[1]
    return pa.table(
        {
            "Date": pa.array(np.repeat(SESSIONS[: len(scores)], scores.shape[1])),
            "Code": CODES[: scores.shape[1]] * len(scores),
            "score": pa.array(scores.ravel(), from_pandas=True),
            "target": pa.array(targets.ravel(), from_pandas=True),
            **{name: pa.array(np.broadcast_to(values, rows)) for name, values in columns.items()},
        }
    )


def of_table(t, **kwargs):
    return evaluate_table(t, score="score", target="target", config=CONFIG, **kwargs)


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
    assert list(result.daily) == list(DAILY)
    json.dumps(result.as_dict(), allow_nan=False)


def test_bootstrap_adds_the_interval():
    scores, targets = panel(T=40)
    days = np.datetime64("2012-01-04") + np.arange(40)
    result = evaluate(scores, targets, days, CODES, CONFIG, days_per_year=245, bootstrap=True)
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


# Property -------------------------------------------------------------------------------------------------------


def test_a_table_gives_what_its_panel_gives_whatever_the_row_order():
    scores, targets = panel()
    scores[1, 2], targets[3, 4] = NAN, NAN
    targets[1, 2] = NAN
    whole = table(scores, targets)
    shuffled = whole.take(pa.array(np.random.default_rng(1).permutation(whole.num_rows)))
    expected = run(scores, targets).values()
    assert {**expected, "dropped_targets": 2.0} == of_table(shuffled).overall.values()  # the row without both, too


@pytest.mark.parametrize("as_type", ["date32", "date64", "timestamp", "tokyo", "iso", "iso time", "dictionary"])
def test_dates_of_every_kind_are_the_same_sessions(as_type):
    scores, targets = panel()
    t = table(scores, targets)
    dates = t["Date"].to_pylist()
    midnight = [dt.datetime(d.year, d.month, d.day) for d in dates]
    columns = {
        "date32": pa.array(dates, pa.date32()),
        "date64": pa.array(dates, pa.date64()),
        "timestamp": pa.array(midnight, pa.timestamp("us")),
        # Midnight in Tokyo is the day before in UTC.
        "tokyo": pa.array([m - dt.timedelta(hours=9) for m in midnight], pa.timestamp("us", "Asia/Tokyo")),
        "iso": pa.array([d.isoformat() for d in dates]),
        "iso time": pa.array([d.isoformat() + "T00:00:00" for d in dates]),
        "dictionary": pa.array([d.isoformat() for d in dates]).dictionary_encode(),
    }
    result = of_table(t.set_column(0, "Date", columns[as_type])).overall
    assert result.sessions.tolist() == SESSIONS.tolist()
    assert result.values() == run(scores, targets).values()


def test_codes_may_be_dictionaries_or_integers():
    scores, targets = panel()
    t, expected = table(scores, targets), run(scores, targets).values()
    assert of_table(t.set_column(1, "Code", t["Code"].dictionary_encode())).overall.values() == expected
    assert of_table(t.set_column(1, "Code", t["Code"].cast(pa.int64()))).overall.values() == expected


def test_splits_and_slices_are_reported_beside_the_whole():
    scores, targets = panel()
    split = np.repeat(["validation", "test"], [4 * N, 2 * N])
    liquid = np.tile(np.arange(N) < 5, T)
    t = table(scores, targets, split=split, is_liquid=liquid)
    result = of_table(t)
    assert result.overall.values() == run(scores, targets).values()
    assert result.by_split["validation"].values() == run(scores[:4], targets[:4]).values()
    assert result.by_split["test"].value("sessions") == 2
    assert result.by_slice["liquid"].values() == run(scores[:, :5], targets[:, :5]).values()
    assert of_table(t, split="validation").overall.values() == run(scores[:4], targets[:4]).values()
    assert of_table(t, universe="liquid").overall.values() == run(scores[:, :5], targets[:, :5]).values()
    json.dumps(result.as_dict(), allow_nan=False)
    assert set(result.as_dict()) >= {*STATISTICS, "valid", "by_split", "by_slice"}
    assert "by_split" not in of_table(table(scores, targets)).as_dict()


def test_a_part_too_small_is_said_so_beside_a_good_whole():
    scores, targets = panel()
    result = of_table(table(scores, targets, split=np.repeat(["validation", "test"], [5 * N, N])))
    assert result.overall.valid
    assert not result.by_split["test"].valid
    assert "only one session" in result.by_split["test"].reason


def test_a_target_of_five_sessions_uses_tranches_where_it_can_and_says_so_where_not():
    scores, returns = panel()
    t = table(scores, returns).rename_columns(["Date", "Code", "score", "target_5d"])
    kwargs = {"score": "score", "target": "target_5d", "config": CONFIG}
    assert "overlap" in evaluate_table(t, **kwargs).overall.notes[0]
    with_1d = t.append_column("target_1d", pa.array(returns.ravel()))
    result = evaluate_table(with_1d, **kwargs).overall
    assert result.notes == ()
    expected = long_short_tranches(scores, returns, 5, quantile=0.2, cost_bps=10.0)
    np.testing.assert_allclose(result.daily["net"], expected.net)


def test_rows_outside_the_universe_decide_nothing():
    scores, targets = panel()
    member = np.ones((T, N), bool)
    member[:, 7:] = False
    inside = run(np.where(member, scores, NAN), targets, member=member)
    assert inside.valid
    assert inside.values() == pytest.approx(run(scores[:, :7], targets[:, :7]).values())


def test_a_file_is_evaluated_by_the_columns_it_has(tmp_path):
    scores, targets = panel()
    plain = table(scores, targets)
    ours = plain.rename_columns(["Date", "Code", "score_1d", "target_1d"])
    expected = run(scores, targets).value("sharpe_daily")
    for name, content in (("plain", plain), ("ours", ours)):
        pq.write_table(content, tmp_path / f"{name}.parquet")
        result = evaluate_file(tmp_path / f"{name}.parquet", CONFIG)
        assert (result["sharpe_daily"], result["score"], result["target"]) == (expected, *content.column_names[2:])
        json.dumps(result, allow_nan=False)


def test_a_file_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.parquet: no such"):
        evaluate_file(tmp_path / "none.parquet", CONFIG)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(InputError, match=r"broken\.parquet: not a readable"):
        evaluate_file(tmp_path / "broken.parquet", CONFIG)
    pq.write_table(table(*panel()), tmp_path / "good.parquet")
    with pytest.raises(InputError, match=r"good\.parquet: predictions: column alpha is missing"):
        evaluate_file(tmp_path / "good.parquet", CONFIG, score="alpha")


def test_the_score_of_a_file_is_that_of_its_shortest_horizon(tmp_path):
    scores, targets = panel()
    t = table(scores, targets).rename_columns(["Date", "Code", "score_5d", "target_5d"])
    pq.write_table(t.append_column("score_20d", t["target_5d"]), tmp_path / "p.parquet")
    found = evaluate_file(tmp_path / "p.parquet", CONFIG)
    assert (found["score"], found["target"]) == ("score_5d", "target_5d")


def test_a_score_of_another_name_is_not_held_against_itself(tmp_path):
    scores, targets = panel()
    t = table(scores, targets).rename_columns(["Date", "Code", "alpha", "target_1d"])
    pq.write_table(t, tmp_path / "p.parquet")
    with pytest.raises(InputError, match="column target is missing"):
        evaluate_file(tmp_path / "p.parquet", CONFIG, score="alpha")


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


def drop(name):
    return lambda t: t.drop_columns([name])


def replace(name, values):
    return lambda t: t.set_column(t.column_names.index(name), name, pa.array(values(t[name].to_pylist())))


REFUSED = {
    "no score column": (drop("score"), "column score is missing"),
    "no target column": (drop("target"), "column target is missing"),
    "no Date": (drop("Date"), "column Date is missing"),
    "no Code": (drop("Code"), "column Code is missing"),
    "no rows": (lambda t: t.slice(0, 0), "no rows"),
    "text scores": (replace("score", lambda v: [str(x) for x in v]), "column score has type string; expected numbers"),
    "flags as targets": (replace("target", lambda v: [True for _ in v]), "column target has type bool"),
    "text that is no date": (replace("Date", lambda v: ["soon" for _ in v]), "column Date"),
    "numbers as dates": (replace("Date", lambda v: [1.0 for _ in v]), "column Date has type double"),
    "a null date": (replace("Date", lambda v: [None, *v[1:]]), "Date is null in 1 rows"),
    "a null code": (replace("Code", lambda v: [None, *v[1:]]), "Code is null in 1 rows"),
    "float codes": (replace("Code", lambda v: [1.5 for _ in v]), "column Code has type double"),
    "a repeated key": (lambda t: pa.concat_tables([t, t.slice(11, 2)]), r"2 rows repeat .* 2012-01-05 1010"),
    "one session": (lambda t: t.slice(0, N), r"only one session \(2012-01-04\)"),
    "one stock": (lambda t: t.take(list(range(0, T * N, N))), "two stocks"),
    "all targets null": (replace("target", lambda v: [None for _ in v]), "no row has a target"),
    "all targets NaN": (replace("target", lambda v: [NAN for _ in v]), "no row has a target"),
    "an infinite target": (replace("target", lambda v: [np.inf, *v[1:]]), "infinite on 2012-01-04"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_tables_are_refused_in_one_sentence(case):
    change, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as refusal:
        of_table(change(table(*panel())))
    assert "\n" not in str(refusal.value)


def test_a_split_or_slice_that_is_not_there_is_refused():
    t = table(*panel(), split=np.repeat(["train"], T * N))
    with pytest.raises(InputError, match=r"no row of split 'test'.*found train"):
        of_table(t, split="test")
    with pytest.raises(InputError, match="column is_liquid is missing"):
        of_table(t, universe="liquid")


def test_a_panel_out_of_order_or_of_other_shapes_is_refused():
    scores, targets = panel()
    with pytest.raises(InputError, match="ascending"):
        evaluate(scores, targets, SESSIONS, CODES[::-1], CONFIG, days_per_year=245, bootstrap=False)
    with pytest.raises(InputError, match="shape"):
        evaluate(scores[:3], targets, SESSIONS, CODES, CONFIG, days_per_year=245, bootstrap=False)


def test_too_few_stocks_for_a_leg_have_an_ic_and_no_sharpe():
    scores, targets = panel(N=4)
    result = run(scores, targets)
    assert result.valid
    assert result.value("sharpe_daily") is None
    assert result.value("ic_mean") is not None
    assert result.value("sessions_without_portfolio") == T
    assert "5 stocks" in result.notes[0]


# Reversal -------------------------------------------------------------------------------------------------------


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


@pytest.mark.process(reason="a fresh interpreter")
def test_the_training_path_imports_nothing_heavy():
    code = (
        "import sys, atft_pipeline.criterion, atft_pipeline.evaluation;"
        "print({'pandas', 'scipy', 'sklearn', 'polars', 'arch', 'skfolio', 'lightgbm', 'numba'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
