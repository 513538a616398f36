"""The diagnostics bench in small: faults planted into real trainings are named, and a healthy run is not accused.

The bench (`make bench-diagnostics`) has every fault, several markets and the figures. These tests have a few faults of
each kind, on a market of 60 stocks and for six epochs, so that no change breaks the bench unnoticed.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from atft_pipeline.diagnostics.causes import BY_ID
from atft_pipeline.diagnostics.posterior import rank
from atft_pipeline.diagnostics.rule import Finding
from bench.diagnostics.diagnostics import BITES, bite, diagnosed
from bench.diagnostics.faults import FAULTS, UNKNOWN_FAULTS
from bench.diagnostics.planting import PRELOADED, Task, market

pytestmark = pytest.mark.process(reason="trainings with planted faults, each in a process of its own")

SMALL = {
    "train.epochs": 6,
    "evaluation.criterion_epoch": 5,
    "train.batch_size": 60 * 32,
    "train.optimizer.lr": 2e-3,
    "model.window_sessions": 5,
    "model.normalisation_window_sessions": 5,
}
PLANTED = ("maximum_over_history", "cached_predictions", "target_shifted", "look_ahead", "frozen", "ic_detached")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("planted")


def small(*faults: str) -> Any:
    """The task of one run."""
    return Task(f"small-{'+'.join(faults) or 'healthy'}", market(7, size=(60, 260)), 3, faults, SMALL)


def findings(folder: Path, *faults: str) -> list[Finding]:
    return diagnosed(folder, small(*faults))


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_the_first_cause(fault: str, folder: Path) -> None:
    ranking = rank(findings(folder, fault))
    assert ranking.causes[0].id == FAULTS[fault].cause, ranking.sentence
    assert ranking.conclusion == "cause", ranking.sentence


def test_what_is_imported_ahead_exists() -> None:
    """The server that processes are forked off says nothing of a module that is not there."""
    assert all(find_spec(name) for name in PRELOADED)


def test_healthy_run_is_let_be(folder: Path) -> None:
    ranking = rank(findings(folder))
    assert ranking.conclusion not in ("cause", "unknown"), ranking.sentence


def test_a_plant_bites_and_the_same_run_once_more_does_not(folder: Path) -> None:
    for task in (small("ic_detached"), small()):
        diagnosed(folder, task)
    lost = bite(folder, small("ic_detached"))
    assert lost is not None
    assert lost > BITES
    assert bite(folder, small()) == 0.0


def test_every_plant_has_a_cause_and_every_cause_but_noise_a_plant() -> None:
    planted = {fault.cause for fault in FAULTS.values() if fault.id not in UNKNOWN_FAULTS}
    assert planted == {cause.id for cause in BY_ID.values() if cause.group != "noise"} - {"sharpe_term_light"}
