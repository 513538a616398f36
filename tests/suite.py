"""The suite's report on itself: seconds per group of tests, what `make test-fast` leaves out, and why.

A test that `make test-fast` leaves out has a mark `process` (it starts a process or a browser) or `slow`, and the mark
says why. No other test may start a process.
"""

from __future__ import annotations

import multiprocessing.process
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

LEFT_OUT = ("process", "slow")
"""Marks of the tests that `make test-fast` leaves out."""

LOOKED_UP = {"lscpu", "uname", "fc-list", "ldconfig", "git"}
"""Programs that libraries ask about the machine, once and whenever they like, and git, asked which files there are."""

Reasons = Counter[str]
"""`FILE: REASON` -> tests."""

_marked = True
"""Whether the test that runs now may start a process; outside of tests everything may."""


def pytest_configure(config: pytest.Config) -> None:
    for mark, what in zip(LEFT_OUT, ("starts processes or a browser", "takes seconds"), strict=True):
        config.addinivalue_line("markers", f"{mark}(reason): {what}; `make test-fast` leaves it out")
    sys.addaudithook(_refuse_processes)
    start = multiprocessing.process.BaseProcess.start

    def marked_start(self: Any) -> None:
        _require_mark("a multiprocessing.Process")
        start(self)

    multiprocessing.process.BaseProcess.start = marked_start  # type: ignore[method-assign]
    config.stash[LEFT] = Counter()


LEFT = pytest.StashKey[Reasons]()
COLLECTED = pytest.StashKey[list[pytest.Item]]()
"""All tests of the named files, those too that a choice then leaves out."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[COLLECTED] = list(items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """Fixtures of every scope included: a process belongs to the test that needs it first."""
    global _marked
    _marked = item.get_closest_marker("process") is not None
    try:
        return (yield)
    finally:
        _marked = True


def _refuse_processes(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("subprocess.Popen", "os.fork", "os.posix_spawn") and not _marked:
        program = Path(str(arguments[0])).name if arguments else "a fork"
        if program not in LOOKED_UP:
            _require_mark(program)


def _require_mark(what: str) -> None:
    if not _marked:
        raise RuntimeError(f"this test starts {what}: mark it `process`, so that `make test-fast` leaves it out")


# What is left out ------------------------------------------------------------------------------------------------


def reason(item: pytest.Item) -> str:
    """Why `make test-fast` leaves the test out: what its marks say; empty when it does not."""
    marks = [mark for name in LEFT_OUT if (mark := item.get_closest_marker(name)) is not None]
    return "; ".join(str(mark.kwargs.get("reason") or f"{mark.name} for no reason") for mark in marks)


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        item.config.stash[LEFT][f"{item.nodeid.split('::')[0]}: {reason(item) or 'deselected'}"] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # of pytest-xdist, whose controller collects nothing
        session.config.workeroutput["left_out"] = dict(session.config.stash[LEFT])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[LEFT] = Counter(getattr(node, "workeroutput", {}).get("left_out", {}))


# Time ------------------------------------------------------------------------------------------------------------


def group(nodeid: str) -> str:
    """The folder of a test's file, or the first word of its name where it lies in none."""
    path = Path(nodeid.split("::")[0])
    return path.parent.name if len(path.parts) > 2 else re.split(r"_|\.", path.name.removeprefix("test_"))[0]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    left = config.stash[LEFT]
    if left:
        terminalreporter.section(f"left out: {left.total()} tests")
        for line, count in sorted(left.items()):
            terminalreporter.write_line(f"{count:5} {line}")
    if config.option.durations is None:
        return
    seconds: Counter[str] = Counter()
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if isinstance(report, pytest.TestReport):
            seconds[group(report.nodeid)] += report.duration
    terminalreporter.section(f"{sum(seconds.values()):.0f} seconds of all workers by group")
    for name, duration in seconds.most_common():
        terminalreporter.write_line(f"{duration:8.1f} s {name}")
