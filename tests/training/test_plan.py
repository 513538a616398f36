"""A run before it starts: its key, the directory it may write to, its device."""

from __future__ import annotations

import json

import pytest
import torch
from training_runs import settings

from atft_pipeline.errors import InputError
from atft_pipeline.runs.lock import exclusive
from atft_pipeline.training.plan import plan_run, resolve_device, resolve_run_dir, run_header


def run_at(path, key="k", status="finished"):
    path.mkdir()
    (path / "run.json").write_text(json.dumps({"key": key, "status": status}))
    return path


def listing(path):
    return sorted((p.name, p.read_bytes() if p.is_file() else None) for p in path.rglob("*"))


# The plan -------------------------------------------------------------------------------------------------------


def test_the_data_describes_itself_whatever_the_configuration_says(data):
    asked = settings({"graph.lookback_sessions": 999, "dataset.min_history_sessions": 5})
    plan = plan_run(asked, data.dataset, data.graph)
    assert plan.config.graph.lookback_sessions == 60
    assert plan.config.dataset.min_history_sessions == 60
    assert plan.key == plan_run(settings(), data.dataset, data.graph).key


def test_another_seed_is_another_run(data):
    keys = {plan_run(settings({"train.seed": seed}), data.dataset, data.graph).key for seed in (1, 2)}
    assert len(keys) == 2


def test_the_header_says_what_the_contract_promises(data, tmp_path):
    plan = plan_run(settings(), data.dataset, data.graph)
    header = run_header(plan, tmp_path, torch.device("cpu"), {"train.epochs": 3})
    assert json.loads(json.dumps(header)) == header
    assert (header["seed"], header["device"], header["epochs_planned"]) == (1, "cpu", 3)
    assert (header["status"], header["epochs_done"], header["ended"]) == ("running", 0, None)
    assert (header["features"], header["overrides"]) == (82, {"train.epochs": 3})


# Devices --------------------------------------------------------------------------------------------------------


def test_devices_have_their_names():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_cuda_device_counts_only_where_there_are_as_many(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(InputError, match="cuda:2 was asked for and this machine has 2 CUDA devices"):
        resolve_device("cuda:2")


# Directories ----------------------------------------------------------------------------------------------------


def test_a_new_and_an_empty_directory_are_free(tmp_path):
    assert resolve_run_dir(tmp_path / "new", "k", force=False) == tmp_path / "new"
    assert not (tmp_path / "new").exists()
    assert resolve_run_dir(tmp_path, "k", force=True) == tmp_path


def test_what_a_run_killed_at_its_start_leaves_is_free(tmp_path):
    with exclusive(tmp_path):
        (tmp_path / ".run.json.x8k").mkdir()
    assert resolve_run_dir(tmp_path, "k", force=False) == tmp_path


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "series"])
def test_a_directory_of_something_else_is_refused_untouched(name, tmp_path):
    (tmp_path / name).write_text("mine")
    before = listing(tmp_path)
    for force in (False, True):
        with pytest.raises(InputError, match="not empty and not a run; choose another directory"):
            resolve_run_dir(tmp_path, "k", force=force)
    assert listing(tmp_path) == before


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        resolve_run_dir(tmp_path / "file", "k", force=False)


def test_another_run_is_refused_untouched(tmp_path):
    run = run_at(tmp_path / "run", key="other")
    before = listing(run)
    for force in (False, True):
        with pytest.raises(InputError, match="holds run other of another configuration, code, dataset or number"):
            resolve_run_dir(run, "k", force=force)
    assert listing(run) == before


@pytest.mark.parametrize(
    ("status", "force", "name"),
    [
        ("finished", False, "run"),
        ("failed", False, "run"),
        ("running", True, "run"),
        ("failed", True, "run"),
        ("finished", True, "run-attempt2"),
    ],
)
def test_force_only_leaves_a_finished_run(status, force, name, tmp_path):
    run = run_at(tmp_path / "run", status=status)
    assert resolve_run_dir(run, "k", force=force).name == name


def test_an_attempt_takes_the_next_place_that_is_its_own(tmp_path):
    run = run_at(tmp_path / "run")
    (tmp_path / "run-attempt2").mkdir()
    (tmp_path / "run-attempt2" / "notes.txt").touch()
    run_at(tmp_path / "run-attempt3", key="other", status="failed")
    run_at(tmp_path / "run-attempt4")
    assert resolve_run_dir(run, "k", force=True).name == "run-attempt5"
    run_at(tmp_path / "run-attempt5", status="failed")
    assert resolve_run_dir(run, "k", force=True).name == "run-attempt5", "it goes on"
