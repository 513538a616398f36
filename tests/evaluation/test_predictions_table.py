"""Evaluation of a table of predictions: columns of every kind, splits and slices, and what is refused."""

from __future__ import annotations

import datetime as dt
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluation_panels import CONFIG, SESSIONS, N, T, of_table, panel, run, table

from atft_pipeline.errors import InputError
from atft_pipeline.evaluation.evaluate import STATISTICS
from atft_pipeline.evaluation.portfolio import long_short_tranches
from atft_pipeline.evaluation.predictions_table import evaluate_file, evaluate_table

NAN = np.nan

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
