"""The `atft` command as its users start it, and a market small enough to run all of it on."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from atft_pipeline.cli import main
from atft_pipeline.config.overrides import REPORT_VARIABLES

REPO = Path(__file__).resolve().parents[1]
ATFT = Path(sys.executable).with_name("atft")

STOCKS, SESSIONS = 40, 330
DATASET_SETTINGS = ("--set", "dataset.min_history_sessions=20")
GRAPH_SETTINGS = ("--set", "graph.universe=all", "--set", "graph.lookback_sessions=60")
TRAIN_SETTINGS = (
    "--preset", "quick", "--device", "cpu",
    "--set", "model.hidden_size=8",
    "--set", "model.window_sessions=5",
    "--set", "model.normalisation_window_sessions=5",
    "--set", "train.epochs=2",
    "--set", "train.universe=all",
    "--set", "evaluation.universe=all",
    "--set", "evaluation.criterion_epoch=1",
)  # fmt: skip
"""A model of a second or two on the market of this file."""


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The caller's environment without the report's variables, one thread, and `extra`."""
    kept = {name: value for name, value in os.environ.items() if name not in REPORT_VARIABLES}
    return kept | {"OMP_NUM_THREADS": "1"} | dict(extra or {})


def atft(*arguments: object, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`atft ARGUMENTS` as a process of its own."""
    return subprocess.run(
        [str(ATFT), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(env),
        timeout=600,
        check=False,
    )


def atft_here(*arguments: object) -> int:
    """The same command in this process, where starting one costs more than it shows."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as exit_:  # argparse leaves by it
        return int(exit_.code or 0)


def atft_captured(*arguments: object, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`atft ARGUMENTS` in this process, with what one of its own would return; fixtures have no `capsys`."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        for name in REPORT_VARIABLES:
            patch.delenv(name, raising=False)
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        code = atft_here(*arguments)
    return subprocess.CompletedProcess([str(a) for a in arguments], code, out.getvalue(), err.getvalue())


def content(folder: Path) -> dict[str, bytes]:
    """Every file under `folder` by its relative name, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
