"""A trained run compared with its dataset: every gap is 0 on an honest run, and each fault opens its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import Trained
from training_runs import (
    Data,
    change_inputs,
    change_predictions,
    exchange_inputs,
    header,
    newest_predictions,
    of_other_sessions,
    split_sessions,
    with_scores,
    without_inputs,
)

from atft_pipeline.dataset.layout import membership_path
from atft_pipeline.diagnostics import gather
from atft_pipeline.diagnostics.diagnose import diagnose
from atft_pipeline.diagnostics.report.sections import to_markdown
from atft_pipeline.diagnostics.signal import Value
from atft_pipeline.diagnostics.topics import dataset as dataset_topic
from atft_pipeline.inspection.reader import open_record
from atft_pipeline.storage.artifact import read_manifest, write_manifest

pytestmark = pytest.mark.slow(reason="trained runs, spoilt")

GAPS = (
    "validation_elsewhere", "validation_in_training", "targets_unlike_dataset", "rows_not_scored", "ic_gap",
    "squared_error_gap", "tied_scores", "inputs_unlike_dataset", "inputs_constant", "inputs_scaled", "inputs_exchanged",
    "inputs_drifted", "labels_unlike_dataset", "stocks_not_given", "trained_elsewhere", "train_not_seen",
)  # fmt: skip
"""Signals that are 0 where everything is what it says."""
OF_DATASET = (
    "validation_elsewhere", "validation_in_training", "targets_unlike_dataset", "rows_not_scored",
    "inputs_unlike_dataset", "inputs_constant", "inputs_constant_share", "inputs_scaled", "inputs_exchanged",
    "inputs_exchanged_example", "labels_unlike_dataset", "stocks_not_given", "trained_elsewhere", "train_not_seen",
)  # fmt: skip
"""Signals that cannot be told without the very dataset of the run."""
OF_INPUTS = (
    "inputs_unlike_dataset", "inputs_constant", "inputs_constant_share", "inputs_scaled", "inputs_exchanged",
    "inputs_exchanged_example", "inputs_drifted", "labels_unlike_dataset", "stocks_not_given",
    "trained_elsewhere", "train_not_seen", "feature_ic", "feature_ic_name",
)  # fmt: skip
OF_PREDICTIONS = (
    "validation_elsewhere", "validation_in_training", "targets_unlike_dataset", "rows_not_scored",
    "predicted_ic_correlation", "squared_error_gap", "squared_error_gap_negated", "tied_scores",
)  # fmt: skip
OF_LARGE_MARKETS = {"codes_that_leave"}
"""Open on these small ones in any case."""
SIGNALS = gather.audited_names()
RETURNS = "returns_1d"


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    """A copy of a trained run, to be spoilt."""
    return Path(shutil.copytree(trained(), tmp_path / "run"))


def audited(run_dir: Path) -> dict[str, Value]:
    record = open_record(run_dir)
    try:
        return gather.audited(record)
    finally:
        record.connection.close()


def rewrite_predictions(run_dir: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    path = newest_predictions(run_dir)
    pq.write_table(change(pq.read_table(path)), path)


def rewrite_inputs(run_dir: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    path = run_dir / "inputs.parquet"
    pq.write_table(change(pq.read_table(path)), path)


def of_feature(name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    return lambda run: change_inputs(run, lambda row: change(row) if row["name"] == name else {})


# The honest run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"train.universe": "liquid"}, {"evaluation.universe": "all"}, {"model.graph": False}],
    ids=str,
)
def test_every_gap_of_an_honest_run_is_zero(settings: dict[str, Any], trained: Trained) -> None:
    found = audited(trained(settings))
    assert set(found) == set(SIGNALS)
    assert {name: found[name] for name in GAPS} == pytest.approx(dict.fromkeys(GAPS, 0.0), abs=1e-6)
    assert found["predicted_ic_correlation"] == pytest.approx(1.0)
    assert found["sharpe_ratio_to_daily"] == pytest.approx(1.0)
    assert found["squared_error_gap_negated"] > 1e-4


def test_every_figure_of_a_feature_is_what_its_rows_say(trained: Trained) -> None:
    """The largest mean IC, computed row by row."""
    rows = [row for row in pq.read_table(trained() / "inputs.parquet").to_pylist() if row["ic"] is not None]
    by_name: dict[str, list[float]] = {}
    for row in rows:
        if not row["name"].startswith("target_"):
            by_name.setdefault(row["name"], []).append(row["ic"])
    means = {name: abs(sum(ics) / len(ics)) for name, ics in by_name.items() if len(ics) >= 8}
    found = audited(trained())
    assert found["feature_ic_name"] == max(means, key=means.__getitem__)
    assert found["feature_ic"] == pytest.approx(max(means.values()))


# Falsehoods ------------------------------------------------------------------------------------------------------


def test_targets_shifted_by_one_session_are_seen(run: Path) -> None:
    def shifted(rows: dict[str, Any]) -> dict[str, Any]:
        order = np.lexsort((rows["Date"], rows["Code"]))
        targets = rows["target_1d"].copy()
        targets[order[:-1]] = rows["target_1d"][order[1:]]
        return rows | {"target_1d": targets}

    change_predictions(run, shifted)
    assert audited(run)["targets_unlike_dataset"] > 0.9


@pytest.mark.parametrize("missing", [None, float("nan")], ids=["null", "NaN"])
def test_targets_left_out_are_seen(missing: float | None, run: Path) -> None:
    """Every third; null is how a missing target is stored."""

    def thinned(targets: pa.ChunkedArray) -> pa.Array:
        values = [missing if i % 3 == 0 else value for i, value in enumerate(targets.to_pylist())]
        return pa.array(values, targets.type)

    rewrite_predictions(run, _columns(("target_1d",), thinned))
    assert audited(run)["targets_unlike_dataset"] == pytest.approx(1 / 3, abs=0.01)


def test_sign_of_the_scores_shows_in_the_daily_ics_and_in_the_squared_error(run: Path, trained: Trained) -> None:
    honest = audited(trained())
    with_scores(lambda scores: -scores)(run)
    found = audited(run)
    assert found["predicted_ic_correlation"] == pytest.approx(-1.0)
    assert found["squared_error_gap"] == pytest.approx(honest["squared_error_gap_negated"], abs=1e-6)
    assert found["squared_error_gap_negated"] == pytest.approx(0.0, abs=1e-6)


def test_training_sessions_evaluated_as_validation_are_counted(run: Path) -> None:
    change_predictions(run, of_other_sessions(split_sessions(run).train))
    found = audited(run)
    assert (found["validation_in_training"], found["validation_elsewhere"]) == (1.0, 1.0)


def test_one_session_too_many_is_a_share_of_them(run: Path) -> None:
    sessions = split_sessions(run)
    change_predictions(run, of_other_sessions(np.concatenate((sessions.validation[1:], sessions.test[:1]))))
    found = audited(run)
    assert found["validation_elsewhere"] == pytest.approx(1 / len(sessions.validation))
    assert found["validation_in_training"] == 0.0


def test_rows_left_out_are_a_share_of_the_universe(run: Path) -> None:
    change_predictions(
        run, lambda rows: {name: values[np.arange(len(values)) % 4 > 0] for name, values in rows.items()}
    )
    found = audited(run)
    assert found["rows_not_scored"] == pytest.approx(0.25, abs=0.001)
    assert found["targets_unlike_dataset"] == 0.0


def test_last_sessions_left_out_are_rows_left_out(run: Path) -> None:
    last = split_sessions(run).validation[-5:]
    change_predictions(run, lambda rows: {n: v[~np.isin(rows["Date"], last)] for n, v in rows.items()})
    assert audited(run)["rows_not_scored"] > 0.05


def test_ties_are_counted_within_a_session(run: Path) -> None:
    with_scores(lambda scores: np.where(np.arange(len(scores)) % 5 == 0, 0.0, scores))(run)
    assert audited(run)["tied_scores"] == pytest.approx(0.2, abs=0.01)


def test_figures_that_do_not_follow_from_the_daily_rows(run: Path) -> None:
    for path in (run / "evals").glob("*.parquet"):
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            row["value"] = {"ic_mean": 0.5, "sharpe_daily": (row["value"] or 0.0) * 3.0}.get(
                row["metric"], row["value"]
            )
        pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path)
    found = audited(run)
    assert found["ic_gap"] > 0.3
    assert found["sharpe_ratio_to_daily"] == pytest.approx(3.0)


def _without_second_half(run_dir: Path) -> None:
    """Of the training sessions sampled."""
    rows = pq.read_table(run_dir / "inputs.parquet").to_pylist()
    dates = sorted({row["date"] for row in rows if row["split"] == "train"})
    middle = dates[len(dates) // 2 - 1]
    without_inputs(run_dir, lambda row: row["split"] == "train" and row["date"] > middle)


INPUT_FAULTS: dict[str, tuple[Callable[[Path], None], dict[str, float]]] = {
    "constant": (
        of_feature(RETURNS, lambda _: {"std": 0.0, "mean": 0.0, "ic": None}),
        {"inputs_constant": 1.0, "inputs_unlike_dataset": 1.0, "inputs_scaled": 0.0},
    ),
    "not found": (
        of_feature(RETURNS, lambda _: {"std": None, "mean": None, "ic": None, "present": 0}),
        {"inputs_constant": 1.0, "inputs_unlike_dataset": 1.0},
    ),
    "scaled": (
        of_feature(RETURNS, lambda row: {"std": 100 * row["std"], "mean": 100 * row["mean"]}),
        {"inputs_scaled": 1.0, "inputs_constant": 0.0, "inputs_unlike_dataset": 1.0},
    ),
    "of another spread and other values": (
        of_feature(RETURNS, lambda row: {"std": 100 * row["std"], "ic": row["ic"] and 0.5 - row["ic"]}),
        {"inputs_scaled": 0.0, "inputs_unlike_dataset": 1.0, "inputs_exchanged": 0.0},
    ),
    "exchanged": (
        lambda run: exchange_inputs(run, RETURNS, "returns_5d"),
        {"inputs_exchanged": 2.0, "inputs_scaled": 0.0, "inputs_constant": 0.0},
    ),
    "exchanged in one session": (
        lambda run: exchange_inputs(run, RETURNS, "returns_5d", split_sessions(run).validation[0].item()),
        {"inputs_exchanged": 0.0, "inputs_unlike_dataset": 0.0},
    ),
    "shifted": (
        of_feature(RETURNS, lambda row: {"mean": row["mean"] + row["std"]}),
        {"inputs_unlike_dataset": 1.0, "inputs_scaled": 0.0, "inputs_constant": 0.0},
    ),
    "one odd session": (
        lambda run: _without_spread(run, split_sessions(run).validation[0].item()),
        {"inputs_unlike_dataset": 0.0, "inputs_constant": 0.0},
    ),
    "labels permuted": (
        lambda run: change_inputs(
            run,
            lambda row: {"ic": 0.5 - row["ic"]} if row["split"] == "train" and row["ic"] is not None else {},
        ),
        {"labels_unlike_dataset": 1.0, "inputs_unlike_dataset": 0.0},
    ),
    "labels of validation permuted": (
        lambda run: change_inputs(
            run, lambda row: {"ic": 0.5 - row["ic"]} if row["split"] != "train" and row["ic"] is not None else {}
        ),
        {"labels_unlike_dataset": 0.0},
    ),
    "unit changes in validation": (
        lambda run: change_inputs(
            run,
            lambda row: {"std": 50 * row["std"]} if row["name"] == RETURNS and row["split"] == "validation" else {},
        ),
        {"inputs_drifted": 1.0},
    ),
    "stocks left out in training": (
        lambda run: change_inputs(run, lambda row: {"stocks": 3, "mean": 9.0} if row["split"] == "train" else {}),
        {"stocks_not_given": 0.9, "inputs_unlike_dataset": 0.0},
    ),
    "half of the training never comes by": (
        _without_second_half,
        {"train_not_seen": 0.5, "trained_elsewhere": 0.0},
    ),
    "trains on validation": (
        lambda run: change_inputs(run, lambda row: {"split": "train"} if row["split"] == "validation" else {}),
        {"trained_elsewhere": 0.5, "train_not_seen": 0.0},
    ),
    "knows tomorrow": (of_feature(RETURNS, lambda _: {"ic": 0.9}), {"feature_ic": 0.9}),
}


def _without_spread(run_dir: Path, day: Any) -> None:
    change_inputs(run_dir, lambda row: {"std": 0.0} if row["date"] == day else {})


@pytest.mark.parametrize("name", INPUT_FAULTS)
def test_what_the_model_was_given_is_held_against_the_dataset(name: str, run: Path) -> None:
    spoil, expected = INPUT_FAULTS[name]
    spoil(run)
    found = audited(run)
    assert {signal: found[signal] for signal in expected} == pytest.approx(expected, abs=0.1)


# What cannot be told ---------------------------------------------------------------------------------------------


def test_dataset_that_is_another_by_now_leaves_its_signals_open(run: Path) -> None:
    (run / "run.json").write_text(json.dumps(header(run) | {"dataset_fingerprint": "another"}))
    found = audited(run)
    assert {name for name in SIGNALS if found[name] is None} == set(OF_DATASET) | OF_LARGE_MARKETS


def test_missing_inputs_leave_their_signals_open(run: Path) -> None:
    (run / "inputs.parquet").unlink()
    found = audited(run)
    assert {name for name in SIGNALS if found[name] is None} == set(OF_INPUTS) | OF_LARGE_MARKETS


def test_missing_predictions_leave_their_signals_open(run: Path) -> None:
    shutil.rmtree(run / "predictions")
    found = audited(run)
    assert {name for name in SIGNALS if found[name] is None} == set(OF_PREDICTIONS) | OF_LARGE_MARKETS


def _columns(names: tuple[str, ...], change: Callable[[pa.ChunkedArray], Any]) -> Callable[[pa.Table], pa.Table]:
    def changed(table: pa.Table) -> pa.Table:
        for name in names:
            table = table.set_column(table.column_names.index(name), name, change(table[name]))
        return table

    return changed


def _nothing(column: pa.ChunkedArray) -> pa.Array:
    return pa.array([float("nan")] * len(column), pa.float32())


def _infinite(column: pa.ChunkedArray) -> pa.Array:
    return pa.array([float("inf")] * len(column), pa.float32())


def _nulls(column: pa.ChunkedArray) -> pa.Array:
    return pa.nulls(len(column), column.type)


def _words(column: pa.ChunkedArray) -> pa.Array:
    return pa.array(["high"] * len(column), pa.string())


SCORES, TARGETS = (tuple(f"{kind}_{h}d" for h in (1, 5, 10, 20)) for kind in ("score", "target"))
FIGURES = ("mean", "std", "ic")

SURVIVED: dict[str, Callable[[Path], object]] = {
    "scores NaN": lambda run: rewrite_predictions(run, _columns(SCORES, _nothing)),
    "scores infinite": lambda run: rewrite_predictions(run, _columns(SCORES, _infinite)),
    "scores null": lambda run: rewrite_predictions(run, _columns(SCORES, _nulls)),
    "scores words": lambda run: rewrite_predictions(run, _columns(SCORES, _words)),
    "scores constant": with_scores(lambda scores: 0.0 * scores),
    "targets NaN": lambda run: rewrite_predictions(run, _columns(TARGETS, _nothing)),
    "targets infinite": lambda run: rewrite_predictions(run, _columns(TARGETS, _infinite)),
    "targets words": lambda run: rewrite_predictions(run, _columns(TARGETS, _words)),
    "dates words": lambda run: rewrite_predictions(run, _columns(("Date",), _words)),
    "dates as text": lambda run: rewrite_predictions(run, _columns(("Date",), lambda c: pc.cast(c, pa.string()))),
    "dates as time": lambda run: rewrite_predictions(
        run, _columns(("Date",), lambda c: pc.cast(c, pa.timestamp("ns")))
    ),
    "codes as numbers": lambda run: rewrite_predictions(
        run, _columns(("Code",), lambda c: pa.array(np.arange(len(c))))
    ),
    "split NaN": lambda run: rewrite_predictions(run, _columns(("split",), _nothing)),
    "liquid null": lambda run: rewrite_predictions(run, _columns(("is_liquid",), _nulls)),
    "liquid words": lambda run: rewrite_predictions(run, _columns(("is_liquid",), _words)),
    "rows twice": lambda run: rewrite_predictions(run, lambda table: pa.concat_tables([table, table])),
    "no rows": lambda run: rewrite_predictions(run, lambda table: table.slice(0, 0)),
    "one row": lambda run: rewrite_predictions(run, lambda table: table.slice(0, 1)),
    "no scores": lambda run: rewrite_predictions(run, lambda table: table.drop_columns(list(SCORES))),
    "predictions torn": lambda run: newest_predictions(run).write_bytes(b"PAR1"),
    "inputs torn": lambda run: (run / "inputs.parquet").write_bytes(b"PAR1"),
    "inputs NaN": lambda run: rewrite_inputs(run, _columns(FIGURES, _nothing)),
    "inputs infinite": lambda run: rewrite_inputs(run, _columns(FIGURES, _infinite)),
    "inputs null": lambda run: rewrite_inputs(run, _columns(("stocks", "present", *FIGURES), _nulls)),
    "inputs words": lambda run: rewrite_inputs(run, _columns(FIGURES, _words)),
    "inputs dates as text": lambda run: rewrite_inputs(run, _columns(("date",), lambda c: pc.cast(c, pa.string()))),
    "inputs of other names": lambda run: rewrite_inputs(run, _columns(("name",), _words)),
    "inputs of quoted names": lambda run: rewrite_inputs(
        run, _columns(("name",), lambda c: pa.array(["target_'\"); DROP TABLE daily; --"] * len(c)))
    ),
    "inputs lack a column": lambda run: rewrite_inputs(run, lambda table: table.drop_columns(["present"])),
    "inputs empty": lambda run: rewrite_inputs(run, lambda table: table.slice(0, 0)),
}
"""Spoilt files that a killed disk, another version or another program may leave."""


@pytest.mark.parametrize("name", SURVIVED)
def test_spoilt_files_are_no_traceback_and_never_an_honest_gap(name: str, run: Path) -> None:
    SURVIVED[name](run)
    diagnosis = diagnose(run)
    assert to_markdown(diagnosis)
    assert all(value is None or isinstance(value, float | str) for value in diagnosis.signals.values())


@pytest.mark.parametrize("name", ["scores words", "scores null", "no rows", "no scores", "predictions torn"])
def test_newest_predictions_that_say_nothing_are_not_read_as_good(name: str, run: Path) -> None:
    """Those of the epoch before are read instead, and named, or nothing is."""
    for path in sorted((run / "predictions").glob("*.parquet"))[:-1]:
        path.unlink()
    SURVIVED[name](run)
    found = audited(run)
    assert found["predicted_ic_correlation"] is None
    assert found["squared_error_gap"] is None


@pytest.mark.parametrize("name", ["inputs torn", "inputs words", "inputs lack a column", "inputs empty"])
def test_inputs_that_say_nothing_leave_their_signals_open(name: str, run: Path) -> None:
    SURVIVED[name](run)
    found = audited(run)
    assert {signal for signal in SIGNALS if found[signal] is None} == set(OF_INPUTS) | OF_LARGE_MARKETS


DATASETS: dict[str, Callable[[Path], object]] = {
    "torn": lambda dataset: dataset.write_bytes(b"PAR1" + bytes(100)),
    "without targets": lambda dataset: pq.write_table(pq.read_table(dataset, columns=["Date", "Code"]), dataset),
    "of words": lambda dataset: pq.write_table(_columns(("target_1d",), _words)(pq.read_table(dataset)), dataset),
    "NaN": lambda dataset: pq.write_table(_columns(("target_1d", RETURNS), _nothing)(pq.read_table(dataset)), dataset),
    "gone": lambda dataset: dataset.unlink(),
}


@pytest.mark.parametrize("name", DATASETS)
def test_dataset_whose_file_cannot_be_read_is_no_traceback(name: str, run: Path, data: Data, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data.dataset.parent, tmp_path / "data", symlinks=True))
    dataset = folder / data.dataset.name
    DATASETS[name](dataset.resolve())
    (run / "run.json").write_text(json.dumps(header(run) | {"dataset_path": str(dataset)}))
    diagnosis = diagnose(run)
    assert to_markdown(diagnosis)
    assert diagnosis.signals["targets_unlike_dataset"] in (None, 1.0)


def test_a_dataset_named_from_where_the_run_was_started_is_found_from_anywhere(
    run: Path, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`output/datasets/...`, and the report is asked for in another folder, or in the checkout after it has moved."""
    expected = audited(run)
    checkout = tmp_path / "checkout"
    shutil.copytree(data.dataset.parent, checkout / "datasets", symlinks=True)
    moved = Path(shutil.copytree(run, checkout / "output" / "runs" / "run"))
    relative = {f"{what}_path": f"datasets/{getattr(data, what).name}" for what in ("dataset", "graph")}
    (moved / "run.json").write_text(json.dumps(header(moved) | relative))
    for place in (checkout, tmp_path):
        monkeypatch.chdir(place)
        assert audited(moved) == expected
        assert not diagnose(moved).missing
    (moved / "run.json").write_text(json.dumps(header(moved) | {"dataset_path": "datasets/gone"}))
    assert audited(moved)["targets_unlike_dataset"] is None


@pytest.mark.parametrize(
    "split", [{"validation_sessions": 10**6, "scheme": "sessions"}, {"scheme": "unheard of"}, None, "x"], ids=repr
)
def test_split_that_the_dataset_cannot_have_leaves_its_signals_open(split: Any, run: Path) -> None:
    run_json = header(run)
    run_json["config"]["split"] = run_json["config"]["split"] | split if isinstance(split, dict) else split
    (run / "run.json").write_text(json.dumps(run_json))
    found = diagnose(run).signals
    assert found["validation_elsewhere"] is None
    assert found["targets_unlike_dataset"] is None
    assert found["predicted_ic_correlation"] == pytest.approx(1.0)


def test_stocks_that_leave_are_counted_where_some_should_have_left(
    run: Path, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert audited(run)["codes_that_leave"] is None  # a small market: none leaving would say nothing
    monkeypatch.setattr(dataset_topic, "LEAVING_ROWS", 1)
    monkeypatch.setattr(dataset_topic, "LEAVING_SESSIONS", 1)
    monkeypatch.setattr(dataset_topic, "LEAVING_TAIL", 100)
    rows = pq.read_table(membership_path(data.dataset), columns=["Date", "Code"]).to_pylist()
    cut = sorted({row["Date"] for row in rows})[-100]
    last: dict[str, Any] = {}
    for row in rows:
        last[row["Code"]] = max(row["Date"], last.get(row["Code"], row["Date"]))
    assert audited(run)["codes_that_leave"] == sum(day < cut for day in last.values())


def test_day_on_which_nothing_traded_moves_no_split(run: Path, data: Data, tmp_path: Path) -> None:
    """The manifest lists it as a session, no panel has it."""
    folder = Path(shutil.copytree(data.dataset.parent, tmp_path / "data", symlinks=True))
    dataset = folder / data.dataset.name
    manifest = read_manifest(dataset)
    days = manifest["session_dates"]
    write_manifest(dataset, manifest | {"session_dates": [*days[:100], *days[100:110], *days[100:]]})
    (run / "run.json").write_text(json.dumps(header(run) | {"dataset_path": str(dataset)}))
    found = audited(run)
    assert (found["validation_elsewhere"], found["validation_in_training"], found["rows_not_scored"]) == (0, 0, 0)


def test_exchanged_features_are_named_with_the_one_in_whose_place_they_stand(run: Path) -> None:
    exchange_inputs(run, RETURNS, "returns_5d")
    assert audited(run)["inputs_exchanged_example"] == f"returns_5d in the place of {RETURNS} (test)"
