"""The writer of a run directory stores everything that it is given."""

from __future__ import annotations

from atft_pipeline.runs.header import read_run
from atft_pipeline.runs.record import RunRecord, statistics_rows
from atft_pipeline.runs.tables import read_table

NAN = float("nan")


def test_a_loss_that_is_not_finite_is_kept_and_a_statistic_becomes_null(tmp_path):
    record = RunRecord(tmp_path, {})
    record.log("loss", NAN, epoch=1)
    record.close_epoch(1)
    (row,) = read_table(tmp_path, "series").to_pylist()
    assert row["value"] != row["value"]
    rows = statistics_rows({"a": (1.0, "u", NAN), "b": (None, "u", None), "c": (NAN, "u", 2.0)}, epoch=3)
    assert [(r["epoch"], r["metric"], r["value"], r["se"]) for r in rows] == [
        (3, "a", 1.0, None),
        (3, "b", None, None),
        (3, "c", None, 2.0),
    ]


def test_the_header_keeps_what_it_is_given(tmp_path):
    record = RunRecord(tmp_path, {"key": "k", "status": "running"})
    record.update(epochs_done=3)
    record.update(status="failed")
    assert read_run(tmp_path) == {"key": "k", "status": "failed", "epochs_done": 3}
