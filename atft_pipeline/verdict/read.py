"""`verdict.json` as it lies in a run directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from atft_pipeline.errors import InputError


def read_verdict(run_dir: Path) -> dict[str, Any]:
    """`verdict.json`; raises InputError where the run has none yet or it cannot be read."""
    path = run_dir / "verdict.json"
    if not path.is_file():
        raise InputError(f"run directory {run_dir}: no verdict.json; the run has not finished, start it again to go on")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error}); remove the run directory and train again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no verdict; remove the run directory and train again")
    return content
