"""How a run ends early: a full disk, no memory, numbers that are not finite, a signal, a second writer."""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from atft_process import ATFT, TRAIN_SETTINGS, atft_here, content, environment
from training_runs import (
    Data,
    Stop,
    header,
    poisoned,
    record,
    settings,
    stop_in_training_step,
    train_quietly,
    train_until,
    trainer_of,
)

from atft_pipeline.errors import InputError, RunFailure, RunInterrupted
from atft_pipeline.model.atft_gat_fan import ATFTGATFAN
from atft_pipeline.monitoring.progress import run_snapshot
from atft_pipeline.runs.record import RunRecord
from atft_pipeline.runs.tables import read_table
from atft_pipeline.training import failures, trainer
from atft_pipeline.training import train as training
from atft_pipeline.training.failures import early_end_recorded, first_non_finite, is_out_of_memory, smaller_batches
from atft_pipeline.training.judging.scoring import weights_hash
from atft_pipeline.training.losses import SESSION_TERMS
from atft_pipeline.training.trainer import Trainer

# Disk -----------------------------------------------------------------------------------------------------------

SHORT = {"train.epochs": 2, "train.batch_size": 2000}


class Disk:
    """A disk with room for `room` more files: later ones are links to /dev/full, where the kernel has no space."""

    def __init__(self, patch: pytest.MonkeyPatch, room: float, run_dir: Path) -> None:
        self.room, self.run_dir = room, run_dir
        self.before: dict[str, bytes] | None = None
        self.files: list[str] = []
        make = tempfile.mkdtemp

        def mkdtemp(*, prefix: str, dir: Path) -> str:
            name = prefix[1:-1]
            if len(self.files) >= room and self.before is None:
                self.before = content(run_dir)
            scratch = make(prefix=prefix, dir=dir)
            if len(self.files) >= room:
                (Path(scratch) / name).symlink_to("/dev/full")
            self.files.append(name)
            return scratch

        patch.setattr("atft_pipeline.storage.atomic.tempfile.mkdtemp", mkdtemp)


@pytest.fixture(scope="module")
def places(data: Data, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished short run, and the names of the files that it wrote, in order."""
    run_dir = tmp_path_factory.mktemp("roomy") / "run"
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, float("inf"), run_dir)
        train_quietly(settings(SHORT), data, run_dir)
    return run_dir, disk.files


@pytest.mark.slow(reason="a full disk at every file of a run")
def test_a_full_disk_at_any_file_stops_in_one_sentence_and_loses_nothing(
    data: Data, places: tuple[Path, list[str]], tmp_path: Path
) -> None:
    undisturbed, files = places
    assert {"run.json", "resume.pt", "epoch_001.parquet", "epoch_002.json", "verdict.json"} <= set(files)
    for room, name in enumerate(files):
        run_dir = tmp_path / f"{room} before {name}"
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, room, run_dir)
            with pytest.raises(RunFailure) as failure:
                train_quietly(settings(SHORT), data, run_dir)
        resume = run_dir / "checkpoints" / "resume.pt"
        done = torch.load(resume)["epoch"] if resume.exists() else 0
        kept = f"epoch {done} of 2 is kept" if done else "no epoch was complete"
        said = f"run {run_dir}: No space left on device; {kept}, make room and start it again to go on"
        assert str(failure.value) == said, name
        assert content(run_dir) == disk.before, f"{name}: the files before it"
        train_quietly(settings(SHORT), data, run_dir)
        assert record(run_dir) == record(undisturbed), name
        shutil.rmtree(run_dir)


def test_a_folder_that_cannot_be_made_is_a_full_disk_too(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_inode(**_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("atft_pipeline.storage.atomic.tempfile.mkdtemp", no_inode)
    with pytest.raises(RunFailure, match="No space left on device; no epoch was complete"):
        train_quietly(settings(SHORT), data, tmp_path / "run")


def test_another_error_of_the_disk_stays_what_it_is(tmp_path: Path) -> None:
    run = RunRecord(tmp_path, {"key": "k", "status": "running", "epochs_planned": 3, "epochs_done": 1})
    run.update()
    with pytest.raises(PermissionError), early_end_recorded(run):
        raise PermissionError(13, "Permission denied", "x")
    assert (header(tmp_path)["status"], run_snapshot(tmp_path)["state"]) == ("failed", "failed")
    assert header(tmp_path)["reason"].startswith("PermissionError")


# Processes ------------------------------------------------------------------------------------------------------

EPOCHS = 20
LONG = (*TRAIN_SETTINGS, "--set", f"train.epochs={EPOCHS}", "--set", "train.batch_size=2000",
        "--set", "evaluation.criterion_sharpe=-99")  # fmt: skip


def command(data: Data, run_dir: Path, *more: str) -> list[str]:
    return [str(part) for part in ("train", data.dataset, data.graph, run_dir, *LONG, *more)]


@pytest.fixture(scope="module")
def undisturbed(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `command` that nothing disturbs."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert atft_here(*command(data, run_dir)) == 0
    return run_dir


@contextmanager
def started(data: Data, run_dir: Path, epoch: int) -> Iterator[subprocess.Popen[str]]:
    """`atft train` in a process of its own that has finished `epoch`."""
    with subprocess.Popen(
        [str(ATFT), *command(data, run_dir)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    ) as process:  # fmt: skip
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith(f"epoch {epoch}/"):
                    break
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.process(reason="trainings that are interrupted, rivalled and short of room")
def test_an_interrupted_command_exits_130_and_goes_on_to_the_same_end(
    number: int, data: Data, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    with started(data, run_dir, epoch=3) as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    stopped = header(run_dir)
    done = stopped["epochs_done"]
    assert 3 <= done < EPOCHS, "the test tests nothing"
    *epochs, last = err.splitlines()
    sentence = f"interrupted; epoch {done} of {EPOCHS} is kept, start it again to go on"
    assert (process.returncode, out, last) == (130, "", f"atft train: run {run_dir}: {sentence}")
    assert all(line.startswith("epoch ") for line in epochs)
    assert (stopped["status"], stopped["reason"]) == ("interrupted", sentence)
    assert torch.load(run_dir / "checkpoints" / "resume.pt")["epoch"] == done
    capsys.readouterr()
    assert atft_here("status", "--runs", tmp_path) == 0
    said = capsys.readouterr().out
    assert "interrupted" in said
    assert f"{run_dir.name}: {sentence}" in said

    assert atft_here(*command(data, run_dir)) == 0
    assert f"goes on after epoch {done}" in capsys.readouterr().err
    assert record(run_dir) == record(undisturbed)


@pytest.mark.process(reason="trainings that are interrupted, rivalled and short of room")
def test_a_second_process_is_refused_and_the_first_goes_on_undisturbed(
    data: Data, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    with started(data, run_dir, epoch=1) as process:
        capsys.readouterr()
        assert atft_here(*command(data, run_dir)) == 2
        assert "another process is training this run; wait for it to end" in capsys.readouterr().err
        assert atft_here(*command(data, run_dir, "--force")) == 2
        assert atft_here(*command(data, run_dir, "--set", "train.seed=2")) == 2
        assert "of another configuration, code, dataset or number of processes" in capsys.readouterr().err
        assert process.poll() is None, "the first had ended: the test tests nothing"
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert record(run_dir) == record(undisturbed)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]

    before = content(run_dir)
    assert atft_here(*command(data, run_dir)) == 0
    assert content(run_dir) == before, "a finished run is reused as it is"


def test_a_rival_that_comes_between_the_look_and_the_lock_is_no_run_of_ours(
    data: Data, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rival has finished another configuration in the directory that was free a moment ago."""
    lock, theirs = training.exclusive, trained({"train.seed": 2})

    @contextmanager
    def rival_first(run_dir: Path) -> Iterator[None]:
        shutil.copytree(theirs, run_dir)
        with lock(run_dir):
            yield

    monkeypatch.setattr(training, "exclusive", rival_first)
    with pytest.raises(InputError, match="of another configuration, code, dataset or number of processes"):
        train_quietly(settings(), data, tmp_path / "run")


@pytest.mark.process(reason="trainings that are interrupted, rivalled and short of room")
def test_a_file_over_the_limit_of_the_process_stops_in_one_sentence(
    data: Data, undisturbed: Path, tmp_path: Path
) -> None:
    """The limit is under the size of a checkpoint that holds the optimizer, so the first epoch cannot be kept."""
    sizes = {name: (undisturbed / "checkpoints" / name).stat().st_size for name in ("epoch_001.pt", "resume.pt")}
    limit = (sizes["epoch_001.pt"] + sizes["resume.pt"]) // 2
    run_dir = tmp_path / "run"
    done = subprocess.run(
        [str(ATFT), *command(data, run_dir)], capture_output=True, text=True, env=environment(), check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    sentence = "File too large; no epoch was complete, make room and start it again to go on"
    assert (done.returncode, done.stderr) == (1, f"atft train: run {run_dir}: {sentence}\n")
    assert (header(run_dir)["status"], header(run_dir)["reason"]) == ("failed", sentence)
    assert not list((run_dir / "checkpoints").glob(".*")), "the half of a file that had room"
    assert atft_here(*command(data, run_dir)) == 0
    assert record(run_dir) == record(undisturbed)


def test_a_second_ctrl_c_does_not_cost_the_record_of_the_first(tmp_path: Path) -> None:
    class Impatient(RunRecord):
        def update(self, **fields: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            super().update(**fields)

    RunRecord(tmp_path, {"key": "k", "status": "running"}).update()
    run = Impatient(tmp_path, {"key": "k", "status": "running", "epochs_planned": 3, "epochs_done": 1})
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as interrupt, early_end_recorded(run):
        raise KeyboardInterrupt
    assert interrupt.type is RunInterrupted
    assert header(tmp_path)["status"] == "interrupted"
    assert signal.getsignal(signal.SIGINT) is handler


# Numbers that are not finite ------------------------------------------------------------------------------------


def non_finite_rows(run_dir: Path) -> list[tuple[str, str]]:
    rows = read_table(run_dir, "series").to_pylist()
    return [(row["component"], row["term"]) for row in rows if row["metric"] == "non_finite"]


def at_step(patch: pytest.MonkeyPatch, number: int, spoil: Any) -> None:
    """Calls `spoil(trainer)` before the step of that number."""
    step = Trainer._step

    def spoilt(self: Trainer, *arguments: Any, **options: Any) -> Any:
        if self.step == number:
            spoil(self)
        return step(self, *arguments, **options)

    patch.setattr(Trainer, "_step", spoilt)


def put_nan(trainer: Trainer) -> None:
    with torch.no_grad():
        trainer.model.temporal_encoder.layers[0].attention.query.weight[0, 0] = torch.nan


def test_a_broken_weight_is_named_by_step_component_and_tensor(data: Data, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, put_nan)
        with pytest.raises(RunFailure) as failure:
            train_quietly(settings(), data, run_dir)
    tensor = "weight of temporal_encoder.layers.0.attention.query"
    assert "epoch 1, step 2: the loss is nan; stopped before the update: loss term mse;" in str(failure.value)
    assert f"first in the forward pass is the {tensor}, in component temporal_encoder" in str(failure.value)
    assert non_finite_rows(run_dir) == [("loss", tensor)]


def test_a_broken_loss_term_is_named(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ic = SESSION_TERMS["ic"]
    monkeypatch.setitem(SESSION_TERMS, "ic", lambda batch: ic(batch) * torch.inf)
    with pytest.raises(RunFailure, match="loss term ic; all activations of a second forward pass are finite"):
        train_quietly(settings({"train.loss.ic": 0.5}), data, tmp_path / "run")
    assert non_finite_rows(tmp_path / "run") == [("loss", "ic")]


def test_a_term_of_weight_zero_is_not_the_culprit(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SESSION_TERMS, "rank_ic", lambda batch: batch.z.sum(dim=0) * torch.nan)
    with pytest.MonkeyPatch.context() as patch:
        poisoned(patch, lambda total, _: total * torch.nan)
        with pytest.raises(RunFailure, match="no loss term alone, but their sum; all activations"):
            train_quietly(settings(), data, tmp_path / "run")


def test_a_broken_gradient_is_named_and_the_others_are_not_blamed(data: Data, tmp_path: Path) -> None:
    names = [name for name, _ in trainer_of(data, tmp_path).model.named_parameters()]
    name = next(name for name in names if name.startswith("variable_selection."))

    def spoil(trainer: Trainer) -> None:
        dict(trainer.model.named_parameters())[name].register_hook(lambda gradient: gradient * torch.nan)

    run_dir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 1, spoil)
        with pytest.raises(RunFailure) as failure:
            train_quietly(settings(), data, run_dir)
    said = f"1 of {len(names)} gradients; first on the way back is that of {name}, in component variable_selection"
    assert f"epoch 1, step 1: the gradient is nan; stopped before the update: {said}." in str(failure.value)
    assert non_finite_rows(run_dir) == [("gradient", name)]


def with_gradients(**factors: float) -> torch.nn.Module:
    """Two layers whose gradients are 1, times the factor of those named."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    for name, parameter in model.named_parameters():
        parameter.grad = torch.full_like(parameter, factors.get(f"layer{name.replace('.', '_')}", 1.0))
    return model


def test_of_several_broken_gradients_the_one_nearest_to_the_loss_is_named() -> None:
    broken = failures.non_finite_gradient(with_gradients(layer0_weight=torch.nan, layer1_weight=torch.inf))
    assert broken.tensor == "1.weight"
    assert broken.sentence.startswith("2 of 4 gradients")


def test_a_norm_that_overflows_names_the_largest_gradient() -> None:
    assert failures.non_finite_gradient(with_gradients(layer0_bias=-3e38)).tensor == "0.bias"


def test_a_healthy_model_has_nothing_to_name_and_keeps_no_hook(data: Data, tmp_path: Path) -> None:
    trainer = trainer_of(data, tmp_path)
    block = trainer.data.block(trainer.split.train[-3:])
    assert first_non_finite(trainer.model, block) is None
    put_nan(trainer)
    assert first_non_finite(trainer.model, block) is not None
    modules = list(trainer.model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_a_healthy_run_never_looks_for_a_culprit(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(failures, "first_non_finite", never)
    monkeypatch.setattr(trainer, "non_finite_loss", never)
    monkeypatch.setattr(trainer, "non_finite_gradient", never)
    train_quietly(settings(SHORT), data, tmp_path / "run")


# Memory ---------------------------------------------------------------------------------------------------------

NO_MEMORY = {
    "CPU": lambda: torch.empty(1 << 50),
    "numpy": lambda: bytearray(1 << 50),
    "CUDA": lambda: _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")),
}


def _raise(error: Exception) -> None:
    raise error


def limited(patch: pytest.MonkeyPatch, samples: int, fail: Any, from_call: int = 0) -> list[Any]:
    """Forward passes with gradient over more than `samples` fail, from that call on; what they held, as references."""
    held: list[Any] = []
    calls = itertools.count()
    forward = ATFTGATFAN.forward

    def forward_in_little_memory(self: ATFTGATFAN, block: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return forward(self, block)
        if next(calls) >= from_call and int(block.member.sum()) > samples:
            activation = torch.zeros(9)
            held.append(weakref.ref(activation))
            fail()
        assert not any(reference() is not None for reference in held), "the failed pass still holds its memory"
        return forward(self, block)

    patch.setattr(ATFTGATFAN, "forward", forward_in_little_memory)
    return held


@pytest.mark.parametrize("kind", NO_MEMORY)
def test_out_of_memory_says_which_batch_size_fits_and_keeps_the_run(
    kind: str, data: Data, trained: Any, tmp_path: Path
) -> None:
    """In epoch 2 memory for more than 250 of the 800 samples of a batch is gone."""
    run_dir = tmp_path / "run"
    trainer = trainer_of(data, tmp_path / "unused")
    steps = len(trainer._shuffled_blocks(1))
    with pytest.MonkeyPatch.context() as patch:
        held = limited(patch, 250, NO_MEMORY[kind], from_call=steps)
        with pytest.raises(RunFailure) as failure:
            train_quietly(settings(), data, run_dir)
    assert len(held) >= 2, "no trial failed: the test tests nothing"
    sentence = str(failure.value)
    assert "\n" not in sentence
    assert "out of memory" in sentence
    size = int(sentence.split("train.batch_size=")[1].split()[0])
    assert 125 < size <= 250, sentence
    failed = header(run_dir)
    assert (failed["status"], failed["epochs_done"]) == ("failed", 1)
    assert failed["reason"] == f"RunFailure: {sentence}"

    with pytest.MonkeyPatch.context() as patch:
        limited(patch, 250, NO_MEMORY[kind])
        train_quietly(settings({"train.batch_size": size, "train.epochs": 1}), data, tmp_path / "smaller")
    train_quietly(settings(), data, run_dir)
    assert record(run_dir) == record(trained())


def test_a_session_that_does_not_fit_needs_a_smaller_model(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, 0, NO_MEMORY["CPU"])
    with pytest.raises(RunFailure, match=r"tried to allocate \d+ bytes\); not even one session fits"):
        train_quietly(settings(), data, tmp_path / "run")


def test_a_trial_changes_no_weight_and_leaves_no_gradient(data: Data, tmp_path: Path) -> None:
    trainer = trainer_of(data, tmp_path)
    before = weights_hash(trainer.model)
    trainer.try_block(trainer.split.train[-2:])
    assert weights_hash(trainer.model) == before
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_smaller_batches_go_down_to_one_session(data: Data, tmp_path: Path) -> None:
    trainer = trainer_of(data, tmp_path)
    members, batch = trainer.panel.member.sum(axis=1), trainer.config.train.batch_size
    found = smaller_batches(trainer.data, trainer.split.train, batch)
    sizes = list(found)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] <= batch / 2
    assert sizes[-1] == members[trainer.split.train].max()
    assert len(found[sizes[-1]]) == 1
    assert all(members[sessions].sum() <= size for size, sessions in found.items())


def test_another_error_is_not_taken_for_a_lack_of_memory(data: Data, tmp_path: Path) -> None:
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    train_until(stop_in_training_step, Stop("power"), settings(), data, tmp_path / "run")
    train_until(stop_in_training_step, RuntimeError("shape mismatch"), settings(), data, tmp_path / "run")
