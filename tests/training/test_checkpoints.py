"""Checkpoints: the run that they belong to is checked, and nothing in the file is executed."""

from __future__ import annotations

import ast
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from atft_process import REPO
from training_runs import Data, Stop, header, settings, stop_in_training_step, train_quietly, train_until

from atft_pipeline.errors import InputError
from atft_pipeline.training.checkpoints import read_checkpoint, write_checkpoint

IDENTITY = {
    "registry_fingerprint": "r1",
    "features": ["ret_1d", "ret_5d"],
    "model_config": {"hidden_size": 8, "graph": True},
    "run_key": "k1",
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "resume.pt"
    write_checkpoint(path, IDENTITY | {"epoch": 3, "weights": {"w": torch.arange(3.0)}})
    return path


def test_what_is_written_is_read(checkpoint: Path) -> None:
    content = read_checkpoint(checkpoint, IDENTITY)
    assert content["epoch"] == 3
    assert torch.equal(content["weights"]["w"], torch.arange(3.0))
    assert [path.name for path in checkpoint.parent.iterdir()] == ["resume.pt"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"registry_fingerprint": "r2"}, "registry_fingerprint is 'r1', expected 'r2'"),
        ({"features": ["ret_1d", "vol_5d"]}, "features: lacks vol_5d, has besides ret_5d"),
        ({"model_config": {"hidden_size": 16, "graph": True}}, "model.hidden_size is 8, expected 16"),
        ({"model_config": {"hidden_size": 8, "graph": False, "skip": 1}}, "model.skip is None, expected 1"),
        ({"run_key": "k2"}, "run_key is 'k1', expected 'k2'"),
        ({"code": "c"}, "code is None, expected 'c'"),
    ],
)
def test_what_differs_is_named(changed: dict[str, Any], said: str, checkpoint: Path) -> None:
    with pytest.raises(InputError) as refusal:
        read_checkpoint(checkpoint, IDENTITY | changed)
    assert f"{checkpoint}: belongs to something else: " in str(refusal.value)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("container", ["torch", "plain pickle", "weights within"])
def test_code_in_a_checkpoint_is_refused_and_never_runs(container: str, checkpoint: Path, tmp_path: Path) -> None:
    attack = Attack(tmp_path / "attacked")
    if container == "torch":
        torch.save(attack, checkpoint)
    elif container == "plain pickle":
        checkpoint.write_bytes(pickle.dumps(attack))
    else:
        torch.save(IDENTITY | {"weights": {"w": attack}}, checkpoint)
    with pytest.raises(InputError, match="damaged, or more than tensors, and not loaded") as refusal:
        read_checkpoint(checkpoint, IDENTITY)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "attacked").exists()
    torch.load(checkpoint, weights_only=False) if container == "torch" else pickle.loads(pickle.dumps(attack))
    assert (tmp_path / "attacked").exists(), "no attack: the test tests nothing"


@pytest.mark.parametrize("damage", ["empty", "half", "text", "other archive", "list"])
def test_a_damaged_file_is_refused_in_one_sentence(damage: str, checkpoint: Path) -> None:
    content = checkpoint.read_bytes()
    if damage == "other archive":
        with zipfile.ZipFile(checkpoint, "w") as archive:
            archive.writestr("readme", "nothing")
    elif damage == "list":
        torch.save([1, 2], checkpoint)
    else:
        checkpoint.write_bytes({"empty": b"", "half": content[: len(content) // 2], "text": b"weights"}[damage])
    with pytest.raises(InputError, match=r"resume\.pt: .*remove it") as refusal:
        read_checkpoint(checkpoint, IDENTITY)
    assert "\n" not in str(refusal.value)


def test_a_run_refuses_a_checkpoint_of_other_features_and_model_by_name(data: Data, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train_until(stop_in_training_step, Stop("power"), settings(), data, run_dir)
    path = run_dir / "checkpoints" / "resume.pt"
    content = torch.load(path, weights_only=True)
    content["features"] = content["features"][1:]
    content["registry_fingerprint"] = "of another registry"
    content["model_config"]["hidden_size"] = 16
    write_checkpoint(path, content)
    with pytest.raises(InputError) as refusal:
        train_quietly(settings(), data, run_dir)
    for said in ("registry_fingerprint is 'of another registry'", "features: lacks ", "model.hidden_size is 16"):
        assert said in str(refusal.value)
    assert header(run_dir)["status"] == "failed"


def test_nothing_in_the_library_loads_what_could_execute_code() -> None:
    safe = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
    seen = set()
    for file in sorted(REPO.glob("*/**/*.py")):
        if file.relative_to(REPO).parts[0] not in ("atft_pipeline", "assets", "resources"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in (
                *safe,
                "pickle.load",
                "pickle.loads",
            ):
                seen.add(name)
                option, value = safe[name]
                given = {k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg == option}
                assert given == {option: value}, f"{file.name}:{node.lineno}"
    assert seen == set(safe)
