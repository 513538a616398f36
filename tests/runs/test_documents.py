"""JSON documents of a run directory: one reader, which says why a document cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from atft_pipeline.errors import InputError
from atft_pipeline.inspection.reader import open_record
from atft_pipeline.runs.documents import read_document, read_validity, read_verdict
from atft_pipeline.runs.header import read_run
from atft_pipeline.runs.paths import UnreadableFile


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "not written"),
        (b'{"status": "pas', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[1]", "not a JSON object"),
    ],
)
def test_a_document_that_cannot_be_used_says_why_to_every_reader(
    content: bytes | None, problem: str, tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text('{"key": "k", "status": "failed"}')
    if content is not None:
        (tmp_path / "verdict.json").write_bytes(content)
    with pytest.raises(UnreadableFile, match=problem):
        read_document(tmp_path, "verdict.json")
    with pytest.raises(InputError, match="no verdict.json; the run has not finished" if content is None else problem):
        read_verdict(tmp_path)
    record = open_record(tmp_path)
    assert any(item.startswith(f"verdict.json: {problem}") for item in record.missing)
    record.connection.close()


@pytest.mark.parametrize("name", ["run.json", "verdict.json"])
def test_a_document_of_another_run_is_not_read_through_a_link(name: str, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        folder.mkdir()
        (folder / "run.json").write_text('{"key": "k", "status": "finished"}')
    (other / "verdict.json").write_text('{"status": "passed"}')
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(other / name)
    with pytest.raises(InputError, match="a link to a file outside this run"):
        (read_run if name == "run.json" else read_verdict)(run)


def test_validity_results_come_by_epoch_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    assert read_validity(tmp_path) == []
    (tmp_path / "validity").mkdir()
    for epoch in (20, 5):
        (tmp_path / "validity" / f"epoch_{epoch:03d}.json").write_text(json.dumps({"epoch": epoch}))
    assert [result["epoch"] for result in read_validity(tmp_path)] == [5, 20]
    (tmp_path / "validity" / "epoch_005.json").write_text("{")
    with pytest.raises(InputError, match=r"epoch_005\.json: not JSON"):
        read_validity(tmp_path)
