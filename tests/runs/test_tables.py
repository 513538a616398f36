"""Tables of a run: a partition is either complete or absent."""

from __future__ import annotations

import pytest
from training_runs import series

from atft_pipeline.errors import InputError
from atft_pipeline.runs import tables
from atft_pipeline.runs.record import RunRecord
from atft_pipeline.runs.tables import read_table


def test_rows_appear_when_their_epoch_is_complete(tmp_path):
    record = RunRecord(tmp_path, {})
    record.log("loss", 2.0, epoch=1, step=0, term="total")
    record.log("loss_weighted", 1.0, epoch=1, component="loss", term="total")
    assert read_table(tmp_path, "series").num_rows == 0
    record.close_epoch(1)
    record.log("loss_weighted", 0.5, epoch=2, component="loss", term="total")
    record.close_epoch(2)
    assert series(tmp_path, "loss_weighted", term="total") == {1: 1.0, 2: 0.5}
    assert tables.series_values(read_table(tmp_path, "series"), "loss", term="total") == {}, "steps are not epochs"
    assert read_table(tmp_path, "evals").num_rows == 0


def test_an_epoch_written_again_replaces_itself(tmp_path):
    for value in (1.0, 2.0):
        record = RunRecord(tmp_path, {})
        record.log("loss_weighted", value, epoch=1)
        record.close_epoch(1)
    assert series(tmp_path, "loss_weighted") == {1: 2.0}


def test_a_torn_temporary_file_is_no_part_of_the_table(tmp_path):
    record = RunRecord(tmp_path, {})
    record.log("loss_weighted", 1.0, epoch=1)
    record.close_epoch(1)
    torn = tmp_path / "series" / ".epoch_002.parquet.k3j"
    torn.mkdir()
    (torn / "epoch_002.parquet").write_bytes(b"PAR1 and no more")
    assert series(tmp_path, "loss_weighted") == {1: 1.0}


def test_a_damaged_part_is_named(tmp_path):
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "epoch_001.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match=r"epoch_001\.parquet: not a readable part"):
        read_table(tmp_path, "evals")
