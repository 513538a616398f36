"""`run.json`: what cannot be used is refused, and the artifacts that it names are found again."""

from __future__ import annotations

from pathlib import Path

import pytest

from atft_pipeline.errors import InputError
from atft_pipeline.runs.header import located, read_run
from atft_pipeline.storage.artifact import write_manifest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no run.json in it"),
        (b"", "is not JSON"),
        (b'{"key": "k", "sta', "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[1, 2]", "is not a JSON object"),
        (b'{"key": "k"}', "has no 'status'"),
    ],
)
def test_a_header_that_cannot_be_used_is_refused_in_one_sentence(content, message, tmp_path):
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_run(tmp_path)


def product(path: Path, fingerprint: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(path, {"kind": "ml_dataset", "fingerprint": fingerprint})
    return path


def test_a_relative_dataset_is_looked_for_here_and_above_the_run(tmp_path, monkeypatch):
    """Only the one that the run was made on counts: another checkout has another of the same name."""
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    run_dir = checkout / "output" / "runs" / "run"
    run_dir.mkdir(parents=True)
    header = {"dataset_path": "output/data", "dataset_fingerprint": "d", "graph_path": None}

    def place(**changed):
        return located(header | changed, run_dir)["dataset_path"]

    product(elsewhere / "output" / "data", "another")
    product(run_dir.parent / "output" / "data", "another")
    monkeypatch.chdir(elsewhere)
    assert place() == "output/data"
    mine = product(checkout / "output" / "data", "d")
    assert place() == str(mine)
    assert place(dataset_fingerprint="e") == "output/data"
    assert place(dataset_path=str(elsewhere / "output" / "data")) == str(elsewhere / "output" / "data")
    monkeypatch.chdir(checkout)
    assert located(header, run_dir) == header
    (elsewhere / "runs").symlink_to(run_dir.parent)
    monkeypatch.chdir(tmp_path)
    assert located(header, elsewhere / "runs" / "run")["dataset_path"] == str(mine)


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "loop/data", "file/data"])
def test_a_path_that_no_file_can_have_stays_as_it_is(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    header = {"dataset_path": path, "dataset_fingerprint": "d"}
    assert located(header, tmp_path / "run") == header
