"""Ensemble scores of finished runs: how they are made, what is reported and exported, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from atft_process import atft_here
from training_runs import header, settings, verdict

from atft_pipeline.batches.panel import load_panel
from atft_pipeline.config.schema import HORIZONS, EvaluationConfig
from atft_pipeline.dataset.splits import make_split
from atft_pipeline.ensemble.combine import blended, smoothed, standardised
from atft_pipeline.ensemble.ensemble import combine_runs
from atft_pipeline.ensemble.export import write_ensemble_scores
from atft_pipeline.errors import InputError
from atft_pipeline.evaluation.baselines import fit_lightgbm
from atft_pipeline.evaluation.predictions_table import evaluate_file
from atft_pipeline.storage.artifact import read_manifest

pytestmark = pytest.mark.slow(reason="three trained runs, delivered in every way")

NAN = np.nan

# Scores and figures ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(trained):
    """Finished runs of seeds 1, 2 and 3."""
    return [trained({"train.seed": seed}) for seed in (1, 2, 3)]


def copied(run_dir, to):
    return Path(shutil.copytree(run_dir, to / run_dir.parent.name))


def edited(run_dir, file, **fields):
    path = run_dir / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return run_dir


def replaced_predictions(run_dir, change):
    path = run_dir / "predictions" / "epoch_003.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    return run_dir


def column(table, name):
    return table[name].to_numpy().astype(float)


def test_the_score_of_one_run_is_the_one_that_was_judged(runs):
    combined = combine_runs(runs[:1])
    assert set(combined.evaluations["test"]) == {"network", "ensemble"}
    for split, recorded in verdict(runs[0])["final"].items():
        for name in ("sharpe_daily", "sharpe_daily_net", "ic_mean", "rank_ic_mean", "turnover_mean", "sessions"):
            found = combined.evaluations[split]["ensemble"].value(name)
            assert found == pytest.approx(recorded[name], rel=1e-4), f"{split} {name}"  # z-scores in float32
    assert combined.manifest["weight"] is None
    assert combined.against_better_part() == []


def test_seeds_are_averaged_whatever_their_order(runs):
    combined = combine_runs([runs[2], runs[0], runs[1]])
    assert combined.table.equals(combine_runs(runs).table)
    assert [run["seed"] for run in combined.manifest["runs"]] == [1, 2, 3]
    z_score = (pl.col("score_1d") - pl.col("score_1d").mean().over("Date")) / pl.col("score_1d").std().over("Date")
    members = [
        pl.read_parquet(run / "predictions" / "epoch_003.parquet").with_columns(score_1d=z_score) for run in runs
    ]
    for seed, member in enumerate(members, start=1):
        np.testing.assert_allclose(column(combined.table, f"score_1d_seed_{seed}"), member["score_1d"], atol=1e-5)
    mean = sum(member["score_1d"] for member in members) / 3
    expected = members[0].with_columns(score_1d=mean).select(z_score).to_series()
    np.testing.assert_allclose(column(combined.table, "score_1d"), expected, atol=1e-5)


def test_the_manifest_names_what_the_score_is_made_of(runs):
    manifest = combine_runs(runs[:2], blend="lightgbm", smoothing_sessions=3).manifest
    for run, said in zip(runs, manifest["runs"], strict=False):
        assert said["key"] == header(run)["key"]
        assert said["weights_hash"] == verdict(run)["weights_hash"]
        assert said["epochs"] == 3
    assert manifest["dataset_fingerprint"] == header(runs[0])["dataset_fingerprint"]
    assert (manifest["horizon_sessions"], manifest["smoothing_sessions"], manifest["blend"]) == (1, 3, "lightgbm")
    weight = manifest["weight"]["network"]
    assert manifest["definition"] == (
        f"horizon 1: mean of the z-scores per session of seeds 1, 2; {weight:.3f} of it and {1 - weight:.3f} of"
        " LightGBM's; trailing exponential average of span 3 within each split"
    )


def test_every_argument_changes_the_fingerprint(runs):
    prints = {
        combine_runs(runs[:1]).manifest["fingerprint"],
        combine_runs(runs[:2]).manifest["fingerprint"],
        combine_runs(runs[:1], blend="lightgbm").manifest["fingerprint"],
        combine_runs(runs[:1], smoothing_sessions=2).manifest["fingerprint"],
        combine_runs(runs[:1], horizon_sessions=5).manifest["fingerprint"],
    }
    assert len(prints) == 5


@pytest.mark.parametrize("horizon", HORIZONS)
def test_lightgbm_is_fitted_for_the_horizon_on_the_run_s_own_sessions(runs, data, horizon):
    combined = combine_runs(runs[:1], blend="lightgbm", horizon_sessions=horizon)
    panel = load_panel(data.dataset, "all")
    scores = fit_lightgbm(panel, make_split(panel.sessions, settings().split), 1, horizon_sessions=horizon)
    t, n = np.nonzero(np.isfinite(scores))
    expected = standardised(scores)[t, n]
    np.testing.assert_allclose(column(combined.table, f"score_{horizon}d_lightgbm"), expected, atol=1e-5)
    weight = combined.manifest["weight"]["network"]
    parts = (panelled(combined, f"score_{horizon}d_network", panel), scores)
    np.testing.assert_allclose(column(combined.table, f"score_{horizon}d"), blended(*parts, weight)[t, n], atol=1e-5)


def panelled(combined, name, panel):
    out = np.full((len(panel.sessions), len(panel.codes)), NAN)
    days = combined.table["Date"].to_numpy().astype("datetime64[D]")
    t, n = np.searchsorted(panel.sessions, days), np.searchsorted(panel.codes, combined.table["Code"].to_pylist())
    out[t, n] = column(combined.table, name)
    return out


def test_the_weight_is_of_the_validation_sessions_of_the_judged_slice(runs, tmp_path):
    """Other targets in the test sessions, or of stocks outside the slice, leave it; others of the validation do not."""

    def weight_with_negated_targets(name, rows):
        def change(table):
            frame = pl.from_arrow(table)
            assert frame.filter(rows).height
            target = pl.when(rows).then(-pl.col("target_1d")).otherwise(pl.col("target_1d"))
            return frame.with_columns(target_1d=target).to_arrow().cast(table.schema)

        return combine_runs(
            [replaced_predictions(copied(runs[0], tmp_path / name), change)], blend="lightgbm"
        ).manifest["weight"]

    weight = combine_runs(runs[:1], blend="lightgbm").manifest["weight"]
    test, liquid = pl.col("split") == "test", pl.col("is_liquid")
    assert weight_with_negated_targets("test", test) == weight
    assert weight_with_negated_targets("illiquid", ~liquid) == weight
    other = weight_with_negated_targets("validation", ~test & liquid)
    assert other["ic_network"] == pytest.approx(-weight["ic_network"])


def test_each_split_is_smoothed_by_itself(runs):
    plain, combined = combine_runs(runs[:1]), combine_runs(runs[:1], smoothing_sessions=4)
    for split in ("validation", "test"):
        chosen = np.asarray(plain.table["split"].to_pylist()) == split
        table = plain.table.filter(pa.array(chosen))
        days, t = np.unique(table["Date"].to_numpy(), return_inverse=True)
        codes, n = np.unique(table["Code"].to_pylist(), return_inverse=True)
        scores = np.full((len(days), len(codes)), NAN)
        scores[t, n] = column(table, "score_1d")
        expected = smoothed(scores, 4)[t, n]
        np.testing.assert_allclose(column(combined.table, "score_1d")[chosen], expected, atol=1e-5)
    turnover = [d.evaluations["test"]["ensemble"].value("turnover_mean") for d in (plain, combined)]
    assert turnover[1] < turnover[0]


def test_the_written_table_evaluates_to_the_figures_reported(runs, tmp_path):
    for horizon in (1, 5):
        combined = combine_runs(runs[:2], blend="lightgbm", smoothing_sessions=3, horizon_sessions=horizon)
        path = tmp_path / f"h{horizon}.parquet"
        write_ensemble_scores(combined, path)
        assert read_manifest(path, "ensemble_scores")["fingerprint"] == combined.manifest["fingerprint"]
        for split, parts in combined.evaluations.items():
            for part, evaluation in parts.items():
                name = f"score_{horizon}d" + ("" if part == "ensemble" else f"_{part}")
                where = {"score": None if part == "ensemble" else name, "target": f"target_{horizon}d"}
                if part == "ensemble":
                    where["target"] = None
                figures = combined.as_dict()[split][part]
                for bps in (0, 5, 10):
                    found = evaluate_file(
                        path,
                        EvaluationConfig(cost_bps=bps, bootstrap_samples=1000),
                        split=split,
                        universe="liquid",
                        **where,
                    )
                    assert found["score"] == name
                    assert found["target"] == f"target_{horizon}d"
                    assert found["sharpe_daily_net"] == pytest.approx(figures[f"sharpe_net_{bps}bps"], rel=1e-9)
                for key in ("ic_mean", "sharpe_daily", "turnover_mean", "sharpe_ci_low", "sessions"):
                    assert found[key] == pytest.approx(evaluation.value(key), rel=1e-9), f"{split} {part} {key}"


def test_paired_differences_are_those_of_the_daily_ics(runs):
    combined = combine_runs(runs[:2], blend="lightgbm", smoothing_sessions=3)
    rows = {(r["split"], r["score"], r["part"]): r for r in combined.differences}
    parts = ("seed_1", "seed_2", "network", "lightgbm")
    assert set(rows) == {(s, d, p) for s in ("validation", "test") for d in ("blend", "ensemble") for p in parts}
    daily = {part: e.daily["ic"] for part, e in combined.evaluations["test"].items()}
    for part in parts:
        values = daily["ensemble"] - daily[part]
        values = values[np.isfinite(values)]
        row = rows["test", "ensemble", part]
        assert row["sessions"] == len(values)
        assert row["ic_difference"] == pytest.approx(values.mean())
        assert row["se"] == pytest.approx(values.std(ddof=1) / np.sqrt(len(values)))
        assert row["ci_low"] < row["ic_difference"] < row["ci_high"]


def test_the_blend_is_held_against_the_better_of_its_two_parts(runs):
    combined = combine_runs(runs[:2], blend="lightgbm", smoothing_sessions=3)
    for row in combined.against_better_part():
        earned = {p: combined.evaluations[row["split"]][p].value("ic_mean") for p in ("network", "lightgbm")}
        assert row["part"] == max(earned, key=earned.get)
        assert row["score"] == "blend"
        assert row["within_one_se"] == (row["ic_difference"] >= -row["se"])
    assert [row["split"] for row in combined.against_better_part()] == ["validation", "test"]
    unsmoothed = combine_runs(runs[:2], blend="lightgbm").against_better_part()
    assert {row["score"] for row in unsmoothed} == {"ensemble"}


# Refusals ---------------------------------------------------------------------------------------------


def test_runs_that_differ_in_more_than_the_seed_are_refused_by_the_field(runs, trained, tmp_path):
    other = trained({"train.seed": 2, "train.optimizer.lr": 2e-3})
    with pytest.raises(
        InputError, match=r"train\.optimizer\.lr is 0\.002, but 0\.001 in .*differ in train\.seed alone"
    ):
        combine_runs([runs[0], other])
    for field in ("dataset_fingerprint", "graph_fingerprint", "code_revision"):
        changed = edited(copied(runs[1], tmp_path / field), "run.json", **{field: "another"})
        with pytest.raises(InputError, match=f"{field} is 'another', but"):
            combine_runs([runs[0], changed])


def test_one_seed_twice_is_refused(runs):
    with pytest.raises(InputError, match=r"train\.seed is 1 as in .*different seeds"):
        combine_runs([runs[0], runs[0]])


def test_a_run_that_is_not_finished_is_refused(runs, tmp_path):
    for status in ("running", "failed"):
        run = edited(copied(runs[0], tmp_path / status), "run.json", status=status)
        with pytest.raises(InputError, match=f"it is '{status}', not finished"):
            combine_runs([run])


def test_a_run_whose_verdict_is_invalid_is_refused_and_a_failed_one_is_not(runs, tmp_path):
    run = edited(copied(runs[0], tmp_path / "invalid"), "verdict.json", status="invalid", summary="invalid: why")
    with pytest.raises(InputError, match=r"its verdict is invalid \(invalid: why\)"):
        combine_runs([run])
    failed = edited(copied(runs[0], tmp_path / "failed"), "verdict.json", status="failed", summary="failed: why")
    assert combine_runs([failed]).manifest["runs"][0]["verdict"] == "failed"


def test_runs_that_scored_other_rows_are_refused(runs, tmp_path):
    run = replaced_predictions(copied(runs[1], tmp_path / "rows"), lambda table: table.slice(1))
    with pytest.raises(InputError, match="has other rows than"):
        combine_runs([runs[0], run])


def test_the_blend_needs_the_dataset_that_the_run_was_trained_on(runs, tmp_path):
    gone = edited(copied(runs[0], tmp_path / "gone"), "run.json", dataset_path=str(tmp_path / "nowhere.parquet"))
    with pytest.raises(InputError, match="nowhere"):
        combine_runs([gone], blend="lightgbm")
    other = edited(copied(runs[0], tmp_path / "other"), "run.json", dataset_fingerprint="another")
    with pytest.raises(InputError, match="was trained on another; train the run again"):
        combine_runs([other], blend="lightgbm")
    combine_runs([gone])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"horizon_sessions": 3}, "horizon: expected one of 1, 5, 10, 20, found 3"),
        ({"blend": "ridge"}, "blend: expected one of none, lightgbm, found 'ridge'"),
        ({"smoothing_sessions": 0}, "smoothing: expected a span of at least 1 session, found 0"),
    ],
)
def test_arguments_out_of_range_are_refused(runs, arguments, message):
    with pytest.raises(InputError, match=message):
        combine_runs(runs[:1], **arguments)
    with pytest.raises(InputError, match="name at least one"):
        combine_runs([])


# The command ---------------------------------------------------------------------------------------------------


def test_the_command_exports_and_says_what(runs, tmp_path, capsys):
    out = tmp_path / "out.parquet"
    arguments = ("deliver", *runs, out, "--blend", "lightgbm", "--smooth", 5, "--horizon", 5)
    assert atft_here(*arguments, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert {path.name for path in tmp_path.iterdir()} == {"out.parquet", "out.parquet.manifest.json"}
    manifest = read_manifest(out, "ensemble_scores")
    assert {name: said[name] for name in manifest} == manifest
    assert set(said["validation"]) == {"seed_1", "seed_2", "seed_3", "network", "lightgbm", "blend", "ensemble"}
    parts = [f"score_5d_{name}" for name in said["parts"] if name != "ensemble"]
    assert pq.read_schema(out).names == [
        "Date", "Code", "split", "is_liquid", "score_5d", *parts, *(f"target_{h}d" for h in HORIZONS),
    ]  # fmt: skip
    assert atft_here("evaluate", out, "--split", "test", "--slice", "liquid", "--json") == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["ic_mean"] == pytest.approx(said["test"]["ensemble"]["ic_mean"], rel=1e-9)
    assert atft_here(*arguments) == 0
    text = capsys.readouterr().out
    assert "definition: horizon 5" in text
    assert "test ensemble" in text


def refused(capsys, *arguments):
    assert atft_here(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    return err


def test_what_the_command_cannot_use_exits_2_and_leaves_nothing(runs, tmp_path, capsys):
    out = tmp_path / "out.parquet"
    assert "train.seed is 1 as in" in refused(capsys, "deliver", runs[0], runs[0], out)
    assert "no run.json" in refused(capsys, "deliver", tmp_path / "no", out)
    assert "horizon: expected" in refused(capsys, "deliver", runs[0], out, "--horizon", 2)
    assert "--blend" in refused(capsys, "deliver", runs[0], out, "--blend", "ridge")
    assert list(tmp_path.iterdir()) == []
    out.write_text("something else")
    assert "is no ensemble_scores" in refused(capsys, "deliver", runs[0], out)
    assert out.read_text() == "something else"
    assert "is no ensemble_scores" in refused(capsys, "deliver", *runs[:2])


def test_scores_that_cannot_be_ranked_exit_1(runs, tmp_path, capsys):
    def constant(table):
        zeros = pa.array(np.zeros(table.num_rows, np.float32))
        return table.set_column(table.column_names.index("score_1d"), "score_1d", zeros)

    run = replaced_predictions(copied(runs[0], tmp_path / "constant"), constant)
    assert atft_here("deliver", run, tmp_path / "out.parquet", "--json") == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["test"]["ensemble"]["valid"] is False
    assert [line.split(": ")[2] for line in err.splitlines()] == ["validation", "test"]
    assert "scores are constant" in err
