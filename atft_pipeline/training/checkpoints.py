"""Checkpoints: tensors, and the features, model and run they belong to. Read without executing what is in the file."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from atft_pipeline.errors import InputError
from atft_pipeline.storage.atomic import replacing


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """`content` at `path`, atomically.

    Through memory: torch writes files itself, and a full disk is then no OSError that says so.
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
    """The content of `packed` bytes, tensors on `device`."""
    return dict(torch.load(io.BytesIO(content), map_location=device, weights_only=True))


def read_checkpoint(path: Path, expected: Mapping[str, Any], device: torch.device | str = "cpu") -> dict[str, Any]:
    """The content of a checkpoint whose fields equal `expected`.

    Raises InputError that names the fields that differ, or for a file that is damaged or holds more than tensors and
    plain values; nothing in it is executed.
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
    """Each field that differs, by name; of features those missing and unknown, of a configuration its own fields."""
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
