"""Atomic replacement: a reader sees the old or the new content, whatever happens in between."""

from __future__ import annotations

import json

import pytest

from atft_pipeline.storage.atomic import relink, replacing, write_json


def test_a_file_is_replaced_when_its_writer_ends_well(tmp_path):
    path = tmp_path / "new" / "file"
    for text in ("first", "second"):
        with replacing(path) as temporary:
            temporary.write_text(text)
            assert temporary != path
        assert path.read_text() == text
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(error, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "folder"
    for name in ("old", "new"):
        with replacing(path) as temporary:
            temporary.mkdir()
            (temporary / name).touch()
    assert [p.name for p in path.iterdir()] == ["new"]


def test_a_writer_that_writes_nothing_does_not_cost_the_old_folder(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert (path / "old").exists()


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"value": 1.5})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"value": float("nan")})
    assert json.loads(path.read_text()) == {"value": 1.5}


def test_a_link_is_relative_and_moves_to_its_new_target(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        relink(tmp_path / "latest", tmp_path / name)
        assert (tmp_path / "latest").readlink().as_posix() == name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "latest"]
