"""Commands that a report names, filled with the run's own paths.

A caller that starts runs in another way passes its own `CommandStyle`.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from atft_pipeline.config.overrides import leaves, to_dict
from atft_pipeline.config.presets import PRESETS
from atft_pipeline.config.schema import EXPERIMENT_IDS
from atft_pipeline.diagnostics.changes import plan_changes, text_of, values_of
from atft_pipeline.diagnostics.rule import Rule
from atft_pipeline.errors import InputError
from atft_pipeline.inspection.reader import Record
from atft_pipeline.storage.artifact import read_manifest

TRAINING_SECTIONS = ("split", "model", "train", "evaluation")
"""Sections that a training command sets; its input files fix the sections `dataset` and `graph`."""


class CommandStyle(Protocol):
    """One way to start builds and runs. Every command is one line of shell that works when pasted."""

    def build_dataset(self, record: Record) -> str: ...

    def build_graph(self, record: Record) -> str: ...

    def ask_baselines(self, record: Record) -> str:
        """Measures whether simple models find a signal in the run's dataset."""

    def diagnose(self, record: Record, probes: str) -> str: ...

    def evaluate(self, record: Record) -> str | None:
        """Computes the figures of the newest predictions; None where the run kept none."""

    def train(self, record: Record, overrides: Mapping[str, Any], name: str) -> str:
        """Trains the run again with `overrides`; `name` distinguishes the new run."""

    def rerun(self, record: Record) -> str:
        """Trains the same run again from the start, and keeps the old one."""

    def resume(self, record: Record) -> str:
        """Continues the run after its last complete epoch."""

    def experiment(self, record: Record, id: str) -> str:
        """Trains the experiment, compares it with the run and renews the run's report."""


class AtftCommands:
    """The commands of `atft`."""

    def build_dataset(self, record: Record) -> str:
        return f"atft dataset {_source(record)} {_path(record, 'dataset_path')}"

    def build_graph(self, record: Record) -> str:
        return f"atft graph {_path(record, 'dataset_path')} {_path(record, 'graph_path')}"

    def ask_baselines(self, record: Record) -> str:
        return self.diagnose(record, "all")

    def diagnose(self, record: Record, probes: str) -> str:
        return f"atft diagnose {_quote(record.run_dir)} --probes {probes}"

    def evaluate(self, record: Record) -> str | None:
        if not record.predictions:
            return None
        newest = _quote(record.predictions[max(record.predictions)])
        return f"atft evaluate {newest} --score score_1d --target target_1d --split validation --slice {record.slice}"

    def train(self, record: Record, overrides: Mapping[str, Any], name: str) -> str:
        return _train(record, f"{record.run_dir}-{name}", overrides)

    def rerun(self, record: Record) -> str:
        return _train(record, f"{record.run_dir}-again", {})

    def resume(self, record: Record) -> str:
        return _train(record, str(record.run_dir), {})

    def experiment(self, record: Record, id: str) -> str:
        return f"atft experiment {_quote(record.run_dir)} {id}"


ATFT = AtftCommands()


def next_steps(record: Record, style: CommandStyle = ATFT) -> Callable[[Rule], str]:
    """A function from a fired rule to its sentence, what its changes do to this run's settings, and the command."""

    @cache
    def commands() -> dict[str, str]:
        return _named(record, style)

    @cache
    def values() -> dict[str, Any]:
        return values_of(record)

    def next_step(rule: Rule) -> str:
        sentence = rule.next_step.format_map(commands())
        if not rule.changes:
            return sentence
        settings = plan_changes(rule.changes, values())
        if not settings.overrides:
            return f"{sentence}: no setting of this run is left to change ({settings.sentence})"
        return f"{sentence} ({settings.sentence}): {code(style.train(record, settings.overrides, 'next'))}"

    return next_step


def _named(record: Record, style: CommandStyle) -> dict[str, str]:
    """Placeholder of a rule's next step -> command."""
    evaluate = style.evaluate(record)
    experiments = {f"experiment_{id.lower()}": code(style.experiment(record, id)) for id in EXPERIMENT_IDS}
    return experiments | {
        "build_dataset": code(style.build_dataset(record)),
        "build_graph": code(style.build_graph(record)),
        "ask_baselines": code(style.ask_baselines(record)),
        "diagnose_all": code(style.diagnose(record, "all")),
        "rerun": code(style.rerun(record)),
        "resume": code(style.resume(record)),
        "evaluate": code(evaluate) if evaluate else "no predictions were kept",
    }


def code(command: str) -> str:
    return f"`{command}`"


def _train(record: Record, run_dir: str, overrides: Mapping[str, Any]) -> str:
    preset, base = _nearest_preset(record)
    start_from = f"--preset {preset} " if preset else ""
    changed = base | dict(overrides)
    fields = " ".join(f"--set {shlex.quote(f'{name}={text_of(value)}')}" for name, value in changed.items())
    paths = f"{_path(record, 'dataset_path')} {_path(record, 'graph_path')} {_quote(run_dir)}"
    return f"atft train {paths} {start_from}{fields}".rstrip()


def _path(record: Record, name: str) -> str:
    stored = record.run.get(name)
    return _quote(stored) if stored else name.removesuffix("_path").upper()


def _source(record: Record) -> str:
    """The source folder that the dataset's manifest names; the word SOURCE where it cannot be read."""
    with suppress(InputError, OSError, KeyError, TypeError):
        return _quote(read_manifest(Path(str(record.run.get("dataset_path"))), "ml_dataset")["source"]["path"])
    return "SOURCE"


def _quote(path: object) -> str:
    return shlex.quote(str(path))


def _nearest_preset(record: Record) -> tuple[str | None, dict[str, Any]]:
    """The preset with the fewest fields to set for this run's configuration, and those fields."""
    config = record.run.get("config")
    if not isinstance(config, dict):
        return None, {}
    run_fields = leaves({section: config[section] for section in TRAINING_SECTIONS if section in config})
    differences = {}
    for name, build in PRESETS.items():
        preset_fields = leaves(to_dict(build()))
        differences[name] = {field: value for field, value in run_fields.items() if preset_fields.get(field) != value}
    best = min(differences, key=lambda name: len(differences[name]))
    return best, differences[best]
