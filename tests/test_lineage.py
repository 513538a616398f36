"""The run's record: keys, the writer's lock, and tables that are complete or not there."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from training_runs import series, settings

from atft_pipeline import lineage
from atft_pipeline.config import PipelineConfig, to_dict
from atft_pipeline.dataset import write_manifest
from atft_pipeline.errors import InputError
from atft_pipeline.lineage import (
    RunRecord,
    code_revision,
    config_key,
    exclusive,
    is_held,
    located,
    read_run,
    read_table,
    run_key,
    statistics_rows,
)

NAN = float("nan")


# Keys -----------------------------------------------------------------------------------------------------------


def key(config, dataset="d", graph="g"):
    return run_key(config, dataset_fingerprint=dataset, graph_fingerprint=graph)


def test_a_run_key_names_configuration_code_and_data(monkeypatch):
    base = key(settings())
    assert base == key(settings())
    others = [key(settings({"train.seed": 2})), key(settings(), dataset="e"), key(settings(), graph="h")]
    monkeypatch.setattr(lineage, "code_revision", lambda: "other code")
    others.append(key(settings()))
    assert len({base, *others}) == 5


def leaves(values, prefix=""):
    for name, value in values.items():
        dotted = f"{prefix}{name}"
        yield from leaves(value, f"{dotted}.") if isinstance(value, dict) else [(dotted, value)]


def changed(value):
    """Another value of the same JSON type; hashing needs no valid configuration."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return [*value, 0.5] if isinstance(value, list) else f"{value}-other"


@pytest.mark.parametrize("dotted", [name for name, _ in leaves(to_dict(PipelineConfig()))])
def test_every_field_of_the_configuration_is_in_the_run_key(dotted, monkeypatch):
    """A field left out would hand one run's result to another: the failure that this project started from.

    Where the panel lies and who makes blocks change no bit (test_panel_storage.py), and are not.
    """
    values = to_dict(PipelineConfig())
    base = key(PipelineConfig())
    *stages, leaf = dotted.split(".")
    section = values
    for stage in stages:
        section = section[stage]
    section[leaf] = changed(section[leaf])
    monkeypatch.setattr(lineage, "to_dict", lambda _: values)
    assert (key(PipelineConfig()) == base) is (dotted in ("train.panel", "train.loader_workers"))


def test_a_config_key_leaves_out_the_epochs_and_nothing_else():
    assert config_key(settings({"train.epochs": 120})) == config_key(settings({"train.epochs": 20}))
    assert config_key(settings({"train.seed": 2})) != config_key(settings())
    assert config_key(settings({"evaluation.criterion_epoch": 9})) != config_key(settings())
    assert key(settings({"train.epochs": 120})) != key(settings({"train.epochs": 20}))


def test_the_code_revision_changes_with_any_source_file(tmp_path, monkeypatch):
    def revision(**sources):
        for name, text in sources.items():
            (tmp_path / f"{name}.py").write_text(text)
        code_revision.cache_clear()
        return code_revision()

    monkeypatch.setattr(lineage, "__file__", str(tmp_path / "lineage.py"))
    first = revision(a="x = 1", b="y = 1")
    assert revision(a="x = 1") == first
    assert revision(a="x = 2") != first
    code_revision.cache_clear()


# Tables ---------------------------------------------------------------------------------------------------------


def test_rows_appear_when_their_epoch_is_complete(tmp_path):
    record = RunRecord(tmp_path, {})
    record.log("loss", 2.0, epoch=1, step=0, term="total")
    record.log("loss_weighted", 1.0, epoch=1, component="loss", term="total")
    assert read_table(tmp_path, "series").num_rows == 0
    record.close_epoch(1)
    record.log("loss_weighted", 0.5, epoch=2, component="loss", term="total")
    record.close_epoch(2)
    assert series(tmp_path, "loss_weighted", term="total") == {1: 1.0, 2: 0.5}
    assert lineage.series_values(read_table(tmp_path, "series"), "loss", term="total") == {}, "steps are not epochs"
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


# run.json -------------------------------------------------------------------------------------------------------


def test_the_header_keeps_what_it_is_given(tmp_path):
    record = RunRecord(tmp_path, {"key": "k", "status": "running"})
    record.update(epochs_done=3)
    record.update(status="failed")
    assert read_run(tmp_path) == {"key": "k", "status": "failed", "epochs_done": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no run.json in it"),
        (b"", "is not JSON"),
        (b'{"key": "k", "sta', "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[1, 2]", "has no 'key'"),
        (b'{"key": "k"}', "has no 'status'"),
    ],
)
def test_a_header_that_cannot_be_used_is_refused_in_one_sentence(content, message, tmp_path):
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_run(tmp_path)


# Where its products are -----------------------------------------------------------------------------------------


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


# One writer -----------------------------------------------------------------------------------------------------


@pytest.mark.process(reason="a second writer")
def test_a_second_process_is_refused_while_the_first_writes(tmp_path):
    script = (
        "import sys; from pathlib import Path; from atft_pipeline.lineage import exclusive\n"
        f"with exclusive(Path({str(tmp_path)!r})): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == "held\n"
        assert is_held(tmp_path)
        with pytest.raises(InputError, match="another process is training this run"), exclusive(tmp_path):
            pass
        first.kill()
    assert not is_held(tmp_path), "a killed process leaves no lock behind"
    with exclusive(tmp_path):
        assert is_held(tmp_path)


def test_asking_whether_a_run_is_held_does_not_cost_its_writer_the_lock(tmp_path):
    tmp_path.joinpath(".lock").touch()
    asking = threading.Event()

    def ask():
        with tmp_path.joinpath(".lock").open() as handle:
            assert lineage._locked(handle, lineage.fcntl.LOCK_SH)
            asking.set()
            time.sleep(0.06)

    reader = threading.Thread(target=ask)
    reader.start()
    asking.wait()
    with exclusive(tmp_path):
        reader.join()


def test_a_directory_without_a_lock_is_not_held(tmp_path):
    assert not is_held(tmp_path)
