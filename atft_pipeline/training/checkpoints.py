"""Checkpoints: tensors, and the features, model and run that they belong to.

They are read without executing what is in the file.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atft_pipeline.errors import InputError
from atft_pipeline.storage.atomic import replacing


class RunCheckpoints:
    """The checkpoints of one run: the weights of each evaluated epoch, and the state that the next epoch starts from.

    `identity` names the features, the model and the run; a checkpoint of another identity is not loaded.
    """

    def __init__(self, run_dir: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = run_dir / "checkpoints", dict(identity)

    def save_evaluated(self, epoch: int, model: nn.Module) -> None:
        """Saves the weights that the epoch's evaluation is of, before the guard may re-draw their head."""
        content = self.identity | {"epoch": epoch, "weights": model.state_dict()}
        write_checkpoint(self.folder / f"epoch_{epoch:03d}.pt", content)

    def save_resume(self, epoch: int, state: Mapping[str, Any]) -> None:
        """Saves what the next epoch starts from. It is written last: a kill before it repeats the epoch."""
        write_checkpoint(self.folder / "resume.pt", self.identity | {"epoch": epoch} | dict(state))

    def read_resume(self, device: torch.device) -> dict[str, Any] | None:
        """The state after the last complete epoch; None before the first. Raises InputError as `read_checkpoint`."""
        path = self.folder / "resume.pt"
        return read_checkpoint(path, self.identity, device) if path.exists() else None


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Writes `content` to `path`, atomically.

    The bytes are made in memory first: where torch writes the file itself, a full disk raises no OSError that says so.
    """
    content_bytes = packed(content)
    with replacing(path) as temporary:
        temporary.write_bytes(content_bytes)


def packed(content: Mapping[str, Any]) -> bytes:
    """`content` as the bytes of a checkpoint."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    return buffer.getvalue()


def unpacked(content: bytes, device: torch.device) -> dict[str, Any]:
    """The content of bytes that `packed` made, with its tensors on `device`."""
    return dict(torch.load(io.BytesIO(content), map_location=device, weights_only=True))


def read_checkpoint(path: Path, expected: Mapping[str, Any], device: torch.device | str = "cpu") -> dict[str, Any]:
    """The content of a checkpoint whose fields equal `expected`.

    Raises InputError that names the fields that differ, and for a file that is damaged or holds more than tensors and
    plain values. Nothing in the file is executed.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except torch.OutOfMemoryError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        first_line = str(error).split("\n")[0][:200]
        raise InputError(
            f"{path}: damaged, or more than tensors, and not loaded ({first_line}); remove it and train again"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a checkpoint of `atft train`; remove it")
    differing = list(_differences(content, expected))
    if differing:
        raise InputError(f"{path}: belongs to something else: {'; '.join(differing)}; use another directory or file")
    return content


def _differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    """Says how each field differs: a list by its missing and unknown names, a configuration by its own fields."""
    for name, wanted in expected.items():
        have = found.get(name)
        if have == wanted:
            continue
        if isinstance(wanted, Mapping) and isinstance(have, Mapping):
            prefix = name.removesuffix("_config")
            for field in sorted({*wanted, *have}):
                if have.get(field) != wanted.get(field):
                    yield f"{prefix}.{field} is {have.get(field)!r}, expected {wanted.get(field)!r}"
        elif isinstance(wanted, list) and isinstance(have, list):
            lacking, unknown = sorted({*wanted} - {*have}), sorted({*have} - {*wanted})
            yield f"{name}: lacks {_some(lacking)}, has besides {_some(unknown)}"
        else:
            yield f"{name} is {have!r}, expected {wanted!r}"


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
