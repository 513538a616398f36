"""`make test-fast` leaves out only tests whose mark says why, and no other test starts a process."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import suite

MAKEFILE = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")


def test_what_test_fast_leaves_out_says_why(request: pytest.FixtureRequest) -> None:
    collected = request.config.stash[suite.COLLECTED]
    assert [item.nodeid for item in collected if "for no reason" in suite.reason(item)] == []


def test_test_fast_leaves_out_what_is_marked_and_nothing_else() -> None:
    (recipe,) = re.findall(r"^test-fast:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    (expression,) = re.findall(r"-m '([^']*)'", recipe)
    assert expression == " and ".join(f"not {mark}" for mark in suite.LEFT_OUT)
    assert not re.search(r"-k|--ignore|--deselect|tests/", recipe)


def forked() -> None:
    if os.fork() == 0:
        os._exit(0)


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(lambda: subprocess.run([sys.executable, "--version"], check=True), id="a program"),
        pytest.param(forked, id="a fork"),
        pytest.param(multiprocessing.get_context("spawn").Process(target=print).start, id="a worker"),
    ],
)
def test_a_process_in_a_test_without_the_mark_is_refused(start: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match="mark it `process`"):
        start()


@pytest.mark.process(reason="shows that a marked test may")
def test_a_process_in_a_test_with_the_mark_is_not() -> None:
    assert subprocess.run([sys.executable, "-c", ""], check=True).returncode == 0


@pytest.mark.parametrize(
    ("nodeid", "group"),
    [
        ("tests/test_assets_checks.py::test_a", "assets"),
        ("tests/test_kill.py::test_a[x/y::z]", "kill"),
        ("tests/training/test_kill.py::test_a", "training"),
    ],
)
def test_groups_are_folders_or_first_words(nodeid: str, group: str) -> None:
    assert suite.group(nodeid) == group
