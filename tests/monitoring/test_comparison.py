"""The table over finished runs, and the alarm for figures that different weights cannot share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from atft_process import atft_here
from run_directories import EPOCHS, Tables, frozen_failure, healthy

from atft_pipeline.errors import InputError
from atft_pipeline.evaluation.evaluate import STATISTICS
from atft_pipeline.monitoring.comparison import REPEATABLE, Comparison, Row, compare, read_baselines, setting
from atft_pipeline.runs.lock import exclusive

pytestmark = pytest.mark.slow(reason="trained runs, compared")


def another(skill: float = 0.4, weights: str = "v") -> Tables:
    """A second healthy run: other scores and so other figures, and hashes of its own."""
    tables = healthy(skill)
    for row in tables.evals:
        row["weights_hash"] = f"{weights}{row['epoch']}"
        row["predictions_hash"] = f"{weights}-p{row['epoch']}"
    tables.run |= {"name": "another", "key": "k2"}
    return tables


def row_of(comparison: Comparison, name: str) -> Row:
    return next(row for row in comparison.rows if row.name == name)


def value(tables: Tables, metric: str, epoch: int) -> float:
    return next(row["value"] for row in tables.evals if (row["metric"], row["epoch"]) == (metric, epoch))


def stored(tables: Tables, **changes: Any) -> dict[str, Any]:
    """What the asset `baselines` stores for the data and split of these runs."""
    config = tables.run["config"]

    def part(sharpe: float) -> dict[str, Any]:
        figures = {
            "sharpe_daily": (sharpe, 0.06),
            "sharpe_daily_net": (sharpe / 3, None),
            "ic_mean": (sharpe / 9, 0.01),
        }
        return {"reason": "", "statistics": {name: {"value": v, "se": se} for name, (v, se) in figures.items()}}

    models = {
        name: {"validation": part(sharpe), "test": part(sharpe / 2)}
        for name, sharpe in (("ridge", 0.123), ("lightgbm", 0.321))
    }
    return {
        "kind": "baselines",
        "dataset_fingerprint": "d1",
        **setting(config["split"], config["evaluation"]),
        "seed": 0,
        "runtime_s": 35.0,
        "models": models,
    } | changes


# --- the table ---------------------------------------------------------------------------------------------------


def test_a_finished_run_shows_the_figures_of_its_last_epoch(tmp_path: Path) -> None:
    tables = healthy()
    row = row_of(compare({"run": tables.write(tmp_path / "run")}), "run")
    assert (row.state, row.reason, row.epochs, row.verdict, row.weights_hash) == ("finished", "", 20, "passed", "w20")
    assert row.sharpe == value(tables, "sharpe_daily", EPOCHS)
    assert row.sharpe_se == value(tables, "sharpe_se", EPOCHS)
    assert row.ic == value(tables, "ic_mean", EPOCHS)
    assert row.runtime_s == 20 * 10.0
    assert (row.degeneracy_resets, row.gradient_warnings) == (0, 0)
    assert (row.sharpe_net, row.sharpe_test) == (None, None), "not recorded is not zero"


def test_every_cell_of_the_table_says_something(tmp_path: Path) -> None:
    runs: dict[str, Path | str] = {
        "finished": healthy().write(tmp_path / "a"),
        "gone": tmp_path / "gone",
        "never trained": "training_run_50ep was never materialized",
    }
    for row in compare(runs, baselines=stored(healthy())).table():
        assert all(cell.strip() for cell in row.values())
        if row["run"] in ("gone", "never trained"):
            assert {cell for name, cell in row.items() if name not in ("run", "state")} == {"missing"}
            assert row["state"].startswith("missing: ")


@pytest.mark.parametrize(
    ("epochs", "sharpe", "expected", "answer"),
    [
        (3, 0.2, "nothing below 5 epochs", None),
        (5, 0.079, "0.08 to 0.10 at epoch 5", False),
        (5, 0.08, "0.08 to 0.10 at epoch 5", True),
        (20, 0.0818, "0.10 to 0.15 at epoch 20", False),
        (20, 0.4, "0.10 to 0.15 at epoch 20", True),
        (50, 0.14, "0.15 to 0.30 at epoch 50", False),
        (120, 0.31, "0.30 to 0.85 at epoch 120", True),
    ],
)
def test_expectations_are_those_of_the_report_by_run_length(
    epochs: int, sharpe: float, expected: str, answer: bool | None, tmp_path: Path
) -> None:
    tables = healthy()
    tables.run |= {"epochs_planned": epochs, "epochs_done": epochs}
    last = [row for row in tables.evals if row["epoch"] == EPOCHS]
    tables.evals = [row | {"epoch": epochs} for row in last]
    tables.series = [row | {"epoch": epochs} for row in tables.series if row["epoch"] == EPOCHS]
    tables.set_evals("sharpe_daily", lambda _: sharpe)
    comparison = compare({"run": tables.write(tmp_path / "run")})
    row = row_of(comparison, "run")
    assert (row.sharpe, row.expected, row.as_expected) == (sharpe, expected, answer)
    cell = comparison.table()[0]["as expected"]
    assert cell == {None: "not applicable", True: "yes", False: "no"}[answer]
    missed = {item["expectation"] for item in comparison.missed()}
    assert ("target_sharpe" in missed) == (epochs == 120), "0.849 is expected of the long run alone"


def test_resets_and_warnings_are_counted_over_the_run(tmp_path: Path) -> None:
    tables = healthy()
    tables.set_series("degeneracy_reset", lambda epoch: float(epoch > 15))
    tables.set_series("gradient_warning", lambda epoch: float(epoch == 1), component="gat")
    comparison = compare({"run": tables.write(tmp_path / "run")})
    row = row_of(comparison, "run")
    assert (row.degeneracy_resets, row.gradient_warnings) == (5, 1)
    assert {"degeneracy_resets", "gradient_warnings"} <= {item["expectation"] for item in comparison.missed()}


def test_counts_that_were_never_recorded_are_not_zero(tmp_path: Path) -> None:
    tables = healthy()
    for metric in ("degeneracy_reset", "gradient_warning", "epoch_s"):
        tables.drop_series(metric)
    comparison = compare({"run": tables.write(tmp_path / "run")})
    row = row_of(comparison, "run")
    assert (row.degeneracy_resets, row.gradient_warnings, row.runtime_s) == (None, None, None)
    cells = comparison.table()[0]
    assert (cells["runtime"], cells["gradient warnings (0)"]) == ("not measured", "not measured")


def _of_other_data(tables: Tables) -> None:
    tables.run["dataset_fingerprint"] = "d2"


def _of_another_split(tables: Tables) -> None:
    tables.run["config"]["split"]["validation_fraction"] = 0.1


def _of_another_quantile(tables: Tables) -> None:
    tables.run["config"]["evaluation"]["quantile"] = 0.1


def _failed(tables: Tables) -> None:
    tables.run |= {"status": "failed", "reason": "RunFailure: loss is nan", "epochs_planned": 50}


def _killed(tables: Tables) -> None:
    tables.run |= {"status": "running", "epochs_planned": 50}


def _invalid(tables: Tables) -> None:
    tables.evals = [row for row in tables.evals if row["epoch"] < EPOCHS or row["metric"] == "valid"]
    tables.set_evals("valid", lambda epoch: float(epoch < EPOCHS))


@pytest.mark.parametrize(
    ("spoil", "state", "reason"),
    [
        (_of_other_data, "other dataset", "trained on dataset d2, the others on d1"),
        (_of_another_split, "other split", "split.validation_fraction 0.1 instead of 0.2"),
        (_of_another_quantile, "other split", "evaluation.quantile 0.1 instead of 0.2"),
        (_failed, "unfinished", "20 of 50 epochs: RunFailure: loss is nan"),
        (_killed, "unfinished", "20 of 50 epochs: killed"),
        (_invalid, "invalid", "the scores of epoch 20 are constant"),
    ],
)
def test_a_run_that_cannot_be_compared_says_why_and_shows_no_figure(
    spoil: Callable[[Tables], None], state: str, reason: str, tmp_path: Path
) -> None:
    tables = another()
    spoil(tables)
    comparison = compare({"sound": healthy().write(tmp_path / "a"), "odd": tables.write(tmp_path / "b")})
    row = row_of(comparison, "odd")
    assert row.state == state
    assert reason in row.reason
    assert (row.sharpe, row.ic, row.sharpe_test) == (None, None, None)
    assert comparison.table()[1]["Sharpe, validation"] == state
    assert row_of(comparison, "sound").state == "finished"


def test_a_run_in_training_says_so_and_one_that_stopped_is_a_crash(tmp_path: Path) -> None:
    tables = healthy()
    _killed(tables)
    run_dir = tables.write(tmp_path / "run")
    stopped = compare({"run": run_dir})
    assert [item["expectation"] for item in stopped.missed()] == ["no_crash"]
    with exclusive(run_dir):
        going_on = compare({"run": run_dir})
    assert "still training" in row_of(going_on, "run").reason
    assert going_on.missed() == []


def test_torn_records_and_records_of_elsewhere_are_not_read(tmp_path: Path) -> None:
    sound, torn, linked = (tables.write(tmp_path / name) for name, tables in
                           (("a", healthy()), ("b", another()), ("c", another(0.3, "u"))))  # fmt: skip
    (torn / "evals" / "epoch_020.parquet").write_bytes(b"half")
    part = linked / "evals" / "epoch_020.parquet"
    part.unlink()
    part.symlink_to(sound / "evals" / "epoch_020.parquet")
    comparison = compare({"sound": sound, "torn": torn, "linked": linked, "empty": tmp_path})
    assert [row.state for row in comparison.rows[:4]] == ["finished", "unreadable", "unreadable", "unreadable"]
    assert "torn or unreadable" in comparison.rows[1].reason
    assert "outside this run" in comparison.rows[2].reason
    assert not comparison.alarms


def test_the_named_dataset_decides_whom_to_compare(tmp_path: Path) -> None:
    comparison = compare({"run": healthy().write(tmp_path / "run")}, dataset_fingerprint="d9")
    assert row_of(comparison, "run").state == "other dataset"


# --- baselines ---------------------------------------------------------------------------------------------------


def test_baselines_of_the_same_data_and_split_stand_beside_the_runs(tmp_path: Path) -> None:
    tables = healthy()
    comparison = compare({"run": tables.write(tmp_path / "run")}, baselines=stored(tables))
    ridge = row_of(comparison, "ridge")
    assert (ridge.state, ridge.sharpe, ridge.sharpe_se, ridge.sharpe_test) == ("finished", 0.123, 0.06, 0.0615)
    cells = comparison.table()[1]
    assert (cells["epochs"], cells["expected"], cells["runtime"]) == ("not applicable", "not applicable", "35 s")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dataset_fingerprint": "d0"}, "fitted on dataset d0, the runs on d1"),
        ({"split": {"scheme": "sessions"}}, "split.scheme sessions instead of fraction"),
        ({"evaluation": {"universe": "all", "quantile": 0.2, "cost_bps": 10.0}}, "evaluation.universe all"),
    ],
)
def test_baselines_of_other_data_or_another_split_are_stale(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    tables = healthy()
    comparison = compare({"run": tables.write(tmp_path / "run")}, baselines=stored(tables, **change))
    ridge = row_of(comparison, "ridge")
    assert (ridge.state, ridge.sharpe) == ("stale", None)
    assert reason in ridge.reason
    assert comparison.table()[1]["Sharpe, validation"] == "stale"


def test_no_baselines_is_a_row_and_another_file_is_refused(tmp_path: Path) -> None:
    comparison = compare({"run": healthy().write(tmp_path / "run")}, baselines="never fitted")
    assert (comparison.rows[-1].name, comparison.rows[-1].state) == ("baselines", "missing")
    with pytest.raises(InputError, match="not what the asset `baselines` stored"):
        read_baselines(tmp_path / "run" / "run.json")
    with pytest.raises(InputError, match="no readable baselines"):
        read_baselines(tmp_path / "none.json")


# --- the alarm ---------------------------------------------------------------------------------------------------


def test_sound_runs_raise_no_alarm(tmp_path: Path) -> None:
    comparison = compare({"a": healthy().write(tmp_path / "a"), "b": another().write(tmp_path / "b")})
    assert (comparison.alarms, comparison.notes) == ((), ())


def test_one_equal_figure_of_two_runs_is_named_with_runs_metric_and_value(tmp_path: Path) -> None:
    first, second = healthy(), another()
    copied = value(first, "sharpe_daily", 5)
    second.set_evals(
        "sharpe_daily", lambda epoch, own=second: copied if epoch == 20 else value(own, "sharpe_daily", epoch)
    )
    (alarm,) = compare({"a": first.write(tmp_path / "a"), "b": second.write(tmp_path / "b")}).alarms
    assert (alarm.metric, alarm.split, alarm.slice, alarm.value) == ("sharpe_daily", "validation", "liquid", copied)
    assert [(where.run, where.epoch, where.weights_hash) for where in alarm.occurrences] == [
        ("a", 5, "w5"),
        ("b", 20, "v20"),
    ]
    assert alarm.sentence.startswith(f"sharpe_daily {copied!r} (validation, liquid) is bit-identical under 2 different")
    assert "a epoch 5; b epoch 20" in alarm.sentence


def test_the_next_double_is_another_figure(tmp_path: Path) -> None:
    import math

    first, second = healthy(), another()
    second.set_evals("sharpe_daily", lambda epoch: math.nextafter(value(first, "sharpe_daily", epoch), 1.0))
    assert compare({"a": first.write(tmp_path / "a"), "b": second.write(tmp_path / "b")}).alarms == ()


def test_a_copy_of_a_run_has_the_same_weights_and_raises_no_alarm(tmp_path: Path) -> None:
    shutil.copytree(healthy().write(tmp_path / "a"), tmp_path / "b")
    assert compare({"a": tmp_path / "a", "b": tmp_path / "b"}).alarms == ()


@pytest.mark.parametrize("where", ["split", "slice"])
def test_an_equal_figure_of_another_split_or_slice_is_no_identity(where: str, tmp_path: Path) -> None:
    first, second = healthy(), another()
    for own, model in zip(second.evals, first.evals, strict=True):
        own |= {"value": model["value"], where: "elsewhere"}
    assert compare({"a": first.write(tmp_path / "a"), "b": second.write(tmp_path / "b")}).alarms == ()


def test_counts_and_saturated_probabilities_may_be_equal(tmp_path: Path) -> None:
    assert set(STATISTICS) >= REPEATABLE - {"valid"}
    runs: dict[str, Path | str] = {}
    for name, tables in (("a", healthy()), ("b", another())):
        last = [row for row in tables.evals if row["epoch"] == EPOCHS and row["metric"] == "valid"]
        tables.evals += [row | {"metric": metric, "value": 1.0} for row in last for metric in REPEATABLE - {"valid"}]
        runs[name] = tables.write(tmp_path / name)
    assert compare(runs).alarms == ()


def test_equal_predictions_of_different_weights_are_an_alarm(tmp_path: Path) -> None:
    first, second = healthy(), another()
    for row in second.evals:
        row["predictions_hash"] = f"p{row['epoch']}" if row["epoch"] == 7 else row["predictions_hash"]
    (alarm,) = compare({"a": first.write(tmp_path / "a"), "b": second.write(tmp_path / "b")}).alarms
    assert (alarm.metric, alarm.value) == ("predictions_hash", "p7")
    assert "do not depend on the weights" in alarm.sentence


def test_the_original_failure_is_an_alarm_within_one_run(tmp_path: Path) -> None:
    alarms = {alarm.metric: alarm for alarm in compare({"run": frozen_failure().write(tmp_path / "run")}).alarms}
    assert set(alarms) == {"sharpe_daily", "predictions_hash"}
    assert "sharpe_daily 0.0818 (validation, liquid)" in alarms["sharpe_daily"].sentence
    assert "run epochs 5, 20, 50" in alarms["sharpe_daily"].sentence


def repeating_epoch_19() -> Tables:
    """Epoch 20 records the Sharpe of epoch 19, on weights of its own."""
    tables = healthy()
    repeated = value(tables, "sharpe_daily", 19)
    tables.set_evals(
        "sharpe_daily", lambda epoch, own=tables: repeated if epoch == 20 else value(own, "sharpe_daily", epoch)
    )
    return tables


def test_equal_figures_of_consecutive_epochs_are_an_alarm_while_the_weights_change(tmp_path: Path) -> None:
    tables = repeating_epoch_19()
    (alarm,) = compare({"run": tables.write(tmp_path / "run")}).alarms
    assert alarm.metric == "sharpe_daily"
    for row in tables.evals:
        if row["epoch"] == 20:
            row["weights_hash"] = "w19"
    assert compare({"run": tables.write(tmp_path / "frozen")}).alarms == (), "a learning rate of 0 changes no weight"


def unchanged_holdings(*, gross: bool = True, ic: bool = False) -> Tables:
    """Epoch 20 earns to the bit what epoch 19 did; `gross` and `ic`: whether its daily record does too."""
    tables = repeating_epoch_19()
    before = {row["date"]: row for row in tables.daily if row["epoch"] == 19}
    for row in tables.daily:
        if row["epoch"] == 20:
            row |= {name: before[row["date"]][name] for name, kept in (("gross", gross), ("ic", ic)) if kept}
    return tables


def test_scores_that_moved_no_holding_are_a_note(tmp_path: Path) -> None:
    comparison = compare({"run": unchanged_holdings().write(tmp_path / "run")})
    assert comparison.alarms == ()
    (note,) = comparison.notes
    assert note.sentence.endswith("the daily records explain it: the scores differ, the holdings do not")


def test_two_runs_that_held_the_same_stocks_on_other_scores_are_a_note(tmp_path: Path) -> None:
    first, second = healthy(), another()
    of_first = {row["date"]: row["gross"] for row in first.daily if row["epoch"] == 20}
    for row in second.daily:
        if row["epoch"] == 20:
            row["gross"] = of_first[row["date"]]
    repeated = value(first, "sharpe_daily", 20)
    second.set_evals("sharpe_daily", lambda epoch: repeated if epoch == 20 else 0.001 * epoch)
    runs: dict[str, Path | str] = {"a": first.write(tmp_path / "a"), "b": second.write(tmp_path / "b")}
    comparison = compare(runs)
    assert comparison.alarms == ()
    assert [note.metric for note in comparison.notes] == ["sharpe_daily"]
    for row in second.daily:
        row["ic"] = next(r["ic"] for r in first.daily if (r["epoch"], r["date"]) == (row["epoch"], row["date"]))
    runs["b"] = second.write(tmp_path / "copied")
    assert [alarm.metric for alarm in compare(runs).alarms] == ["sharpe_daily"], "the same scores are no excuse"


@pytest.mark.parametrize(("gross", "ic"), [(False, False), (True, True), (False, True)])
def test_a_daily_record_that_does_not_explain_the_figure_is_no_excuse(gross: bool, ic: bool, tmp_path: Path) -> None:
    comparison = compare({"run": unchanged_holdings(gross=gross, ic=ic).write(tmp_path / "run")})
    assert [alarm.metric for alarm in comparison.alarms] == ["sharpe_daily"]


def test_a_network_that_scores_to_the_bit_like_a_baseline_is_an_alarm(tmp_path: Path) -> None:
    tables = healthy()
    baselines = stored(tables)
    baselines["models"]["ridge"]["validation"]["statistics"]["ic_mean"]["value"] = value(tables, "ic_mean", 20)
    (alarm,) = compare({"run": tables.write(tmp_path / "run")}, baselines=baselines).alarms
    assert "run epoch 20; ridge" in alarm.sentence


def test_a_run_of_other_data_is_held_against_the_others_all_the_same(tmp_path: Path) -> None:
    first, second = healthy(), another()
    _of_other_data(second)
    second.set_evals("ic_mean", lambda epoch: value(first, "ic_mean", epoch))
    comparison = compare({"a": first.write(tmp_path / "a"), "b": second.write(tmp_path / "b")})
    assert len(comparison.alarms) == 20


# --- the command -------------------------------------------------------------------------------------------------


def test_compare_exits_by_the_alarm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound, odd, frozen = (tables.write(tmp_path / name) for name, tables in
                          (("a", healthy()), ("b", another()), ("c", frozen_failure())))  # fmt: skip
    assert atft_here("compare", sound, odd, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["state"]) for row in said["runs"]] == [
        ("a", "finished"), ("b", "finished"), ("baselines", "missing"),
    ]  # fmt: skip
    assert said["alarm"] is False
    assert atft_here("compare", sound, frozen, "--json") == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["alarm"] is True
    assert "sharpe_daily 0.0818 (validation, liquid) is bit-identical" in err
    assert atft_here("compare", sound, tmp_path / "gone") == 0
    text = capsys.readouterr().out
    assert "gone: " + str(tmp_path / "gone") + ": no such run directory" in text
    assert [line.split()[0] for line in text.splitlines()[1:5]] == ["runs:", "run", "state", "epochs"]
    assert "alarms: none" in text


def test_compare_reads_stored_baselines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = healthy()
    (tmp_path / "b.json").write_text(json.dumps(stored(tables)))
    assert atft_here("compare", tables.write(tmp_path / "a"), "--baselines", tmp_path / "b.json", "--json") == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["runs"]] == ["a", "ridge", "lightgbm"]


def test_compare_of_nothing_readable_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert atft_here("compare", tmp_path / "gone", tmp_path) == 2
    assert "no such run directory" in capsys.readouterr().err


def test_two_runs_of_one_name_stay_apart_and_one_run_given_twice_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = healthy().write(tmp_path / "x" / "run"), another().write(tmp_path / "y" / "run")
    assert atft_here("compare", first, second, first, "--json") == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)["runs"]]
    assert names == [str(first), str(second), "baselines"]
    assert atft_here("compare", first, first.parent / "." / ".." / "x" / "run", "--json") == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["runs"]] == ["run", "baselines"]


def test_comparing_writes_nothing_into_a_run(tmp_path: Path) -> None:
    run_dir = healthy().write(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    compare({"run": run_dir})
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
    assert pq.read_metadata(run_dir / "evals" / "epoch_020.parquet").num_rows
