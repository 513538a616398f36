"""The parser of `atft`: it takes defaults and choices from the library, and older names of commands still work."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import pkgutil
from pathlib import Path
from typing import Any, get_args

import pytest
from atft_process import atft_here

from atft_pipeline import cli
from atft_pipeline.cli.arguments import DEFAULT_PRESET
from atft_pipeline.cli.parser import GROUPS, atft_parser
from atft_pipeline.config.presets import PRESETS
from atft_pipeline.config.schema import EXPERIMENT_IDS, HORIZONS, EvaluationConfig, Probes
from atft_pipeline.config.slices import SLICES
from atft_pipeline.ensemble.ensemble import BLENDS, combine_runs
from atft_pipeline.evaluation.predictions_table import evaluate_file
from atft_pipeline.market.synthetic import generate_market
from atft_pipeline.training.launcher import Layout

ALIASES = {"market": "synthesize", "features": "dataset", "deliver": "export"}


def commands() -> dict[str, argparse.ArgumentParser]:
    """Every name, aliases included, and its parser."""
    actions = atft_parser()._actions
    return dict(next(action for action in actions if isinstance(action, argparse._SubParsersAction)).choices)


def option(command: str, name: str) -> argparse.Action:
    return next(action for action in commands()[command]._actions if action.dest == name)


def default_of(function: Any, name: str) -> Any:
    return inspect.signature(function).parameters[name].default


def test_defaults_of_evaluate_are_those_of_the_configuration() -> None:
    for field in ("cost_bps", "quantile"):
        assert option("evaluate", field).default == getattr(EvaluationConfig(), field)


@pytest.mark.parametrize(
    ("command", "name", "function", "argument"),
    [
        *(("synthesize", name, generate_market, name) for name in ("stocks", "sessions", "seed", "strength")),
        ("synthesize", "hard", generate_market, "hard"),
        ("synthesize", "tail_freedom", generate_market, "tail_freedom"),
        ("evaluate", "days_per_year", evaluate_file, "days_per_year"),
        ("evaluate", "trials", evaluate_file, "trials"),
        ("export", "horizon", combine_runs, "horizon_sessions"),
        ("export", "blend", combine_runs, "blend"),
        ("export", "smooth", combine_runs, "smoothing_sessions"),
        ("train", "nodes", Layout, "nodes"),
        ("train", "node_rank", Layout, "node_rank"),
    ],
)
def test_defaults_are_those_of_the_library_s_arguments(command: str, name: str, function: Any, argument: str) -> None:
    assert option(command, name).default == default_of(function, argument)


def test_every_number_that_an_option_defaults_to_is_compared_with_the_library() -> None:
    """An option with a number of its own would stand in two places."""
    compared = {
        "stocks", "sessions", "seed", "strength", "tail_freedom", "cost_bps", "quantile", "days_per_year", "trials",
        "horizon", "smooth", "nodes", "node_rank",
    }  # fmt: skip
    own_to_the_command = {"every"}  # how often the monitor looks is no figure of the library
    numbers = {
        action.dest
        for command in commands().values()
        for action in command._actions
        if isinstance(action.default, int | float) and not isinstance(action.default, bool)
    }
    assert numbers == compared | own_to_the_command


def test_choices_are_those_of_the_configuration() -> None:
    assert option("evaluate", "slice").choices == tuple(SLICES)
    assert option("export", "blend").choices == BLENDS
    assert option("diagnose", "probes").choices == get_args(Probes)
    assert option("experiment", "experiment").choices == EXPERIMENT_IDS
    assert all(str(horizon) in (option("export", "horizon").help or "") for horizon in HORIZONS)


@pytest.mark.parametrize("command", ["dataset", "graph", "train"])
def test_every_preset_is_named_by_the_commands_that_take_one(command: str) -> None:
    preset = option(command, "preset")
    assert preset.default == DEFAULT_PRESET in PRESETS
    assert all(name in (preset.help or "") for name in PRESETS)


def test_every_module_that_registers_commands_is_registered() -> None:
    names = {module.name for module in pkgutil.iter_modules(cli.__path__)} - {"__main__"}
    modules = [importlib.import_module(f"atft_pipeline.cli.{name}") for name in sorted(names)]
    assert {module for module in modules if hasattr(module, "register")} == set(GROUPS)


def test_older_names_are_the_same_commands() -> None:
    parsers = commands()
    for alias, name in ALIASES.items():
        assert parsers[alias] is parsers[name]
    assert len(set(parsers.values())) == len(parsers) - len(ALIASES)


def test_an_older_name_says_the_same_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for name in ("synthesize", "market"):
        assert atft_here(name, tmp_path / name, "--stocks", 4, "--sessions", 2, "--json") == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0] | {"path": ""} == said[1] | {"path": ""}


def test_an_error_names_the_command_that_was_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("dataset", "features"):
        assert atft_here(name, tmp_path / "none", tmp_path / "out", "--set", "train.seed=1") == 2
        assert f"atft {name}: override 'train.seed' has no effect here; `atft {name}` reads" in capsys.readouterr().err
