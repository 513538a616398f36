"""The validation report's four experiments and every command a diagnosis names, filled with this run's own paths."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atft_pipeline.config.overrides import leaves, to_dict
from atft_pipeline.config.presets import PRESETS
from atft_pipeline.diagnostics.rules.rule import Finding
from atft_pipeline.errors import InputError
from atft_pipeline.runs.reader import Record
from atft_pipeline.storage.artifact import read_manifest

TRAINING_SECTIONS = ("split", "model", "train", "evaluation")
"""What a training command decides; `dataset` and `graph` come with the files it is given."""
DAGSTER_RUN_LENGTHS = (5, 20, 50, 120)
"""Epochs of the training assets."""
CRITERION_RUN_LENGTH = 20
DAGSTER_JOB = "experiments"
"""Job of the code location that runs one experiment, named by its partition."""
DAGSTER_OP = "experiment"
REPORTED_HIDDEN_SIZE = 512
REPORTED_LR = 1e-3
MIN_SHARPE_WEIGHT = 0.3


@dataclass(frozen=True)
class Experiment:
    id: str
    title: str
    answers: tuple[str, ...]
    """Rules whose firing asks for it."""


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment("A", "schedule: more patience, slower decay", ("lr_decayed_early",)),
    Experiment(
        "B",
        "loss weights: a heavier Sharpe term",
        ("sharpe_term_absent", "sharpe_term_light", "both_fall_sharpe_flat", "ic_rises_sharpe_flat"),
    ),
    Experiment("C", f"capacity: hidden size {REPORTED_HIDDEN_SIZE}", ("both_losses_flat",)),
    Experiment(
        "D",
        f"learning rate {REPORTED_LR:g}",
        ("lr_around_1e6", "both_losses_flat", "gradient_warnings", "encoder_gradient_low"),
    ),
)


@dataclass(frozen=True)
class ExperimentAdvice:
    """`asked_for`: True or False by the evidence, None where the record cannot tell."""

    id: str
    title: str
    asked_for: bool | None
    why: str
    overrides: dict[str, Any]
    command: str
    """Trains the experiment, compares it with the run and writes the run's report anew; where the run has nothing to be
    compared with, only trains it."""
    dagster: str
    """The same through Dagster."""


def experiment_overrides(record: Record) -> dict[str, dict[str, Any]]:
    """Fields each experiment sets, relative to what the run had."""
    patience = int(record.number("train.schedule.patience", 5))
    factor = record.number("train.schedule.factor", 0.5)
    weight = max(MIN_SHARPE_WEIGHT, 3 * record.number("train.loss.sharpe", 0.0))
    sharpe: dict[str, Any] = {"train.loss.sharpe": weight}
    if record.phases:  # a phase that names the term would hide the base weight
        sharpe["train.loss.phases"] = [
            phase | {"weights": phase["weights"] | ({"sharpe": weight} if "sharpe" in phase["weights"] else {})}
            for phase in record.phases
        ]
    return {
        "A": {
            "train.schedule.name": "plateau",
            "train.schedule.patience": max(10, 2 * patience),
            "train.schedule.factor": round(abs(factor) ** 0.5, 2),
        },
        "B": sharpe,
        "C": {"model.hidden_size": REPORTED_HIDDEN_SIZE},
        "D": {"train.optimizer.lr": REPORTED_LR},
    }


def commands(record: Record) -> dict[str, str]:
    """Name -> shell command, for the `next_step` of the rules."""
    epochs = sorted(record.predictions)
    evaluate = "no predictions were kept"
    if epochs:
        predictions = _quote(record.predictions[epochs[-1]])
        evaluate = (
            f"atft evaluate {predictions} --score score_1d --target target_1d --split validation --slice {record.slice}"
        )
    return {
        "features": f"atft dataset {_source(record)} {_path(record, 'dataset_path')}",
        "diagnose_all": f"atft diagnose {_quote(record.run_dir)} --probes all",
        "train": _train(record, f"{record.run_dir}-next", {}),
        "rerun": _train(record, f"{record.run_dir}-again", {}),
        "resume": _train(record, str(record.run_dir), {}),
        "evaluate": evaluate,
    } | {f"experiment_{experiment.id.lower()}": experiment_command(record, experiment.id) for experiment in EXPERIMENTS}


def _train(record: Record, run_dir: str, overrides: Mapping[str, Any]) -> str:
    preset, base = _nearest_preset(record)
    start_from = f"--preset {preset} " if preset else ""
    fields = " ".join(
        f"--set {shlex.quote(f'{name}={_text(value)}')}" for name, value in (base | dict(overrides)).items()
    )
    paths = f"{_path(record, 'dataset_path')} {_path(record, 'graph_path')} {_quote(run_dir)}"
    return f"atft train {paths} {start_from}{fields}".rstrip()


def _path(record: Record, name: str) -> str:
    stored = record.run.get(name)
    return _quote(stored) if stored else name.removesuffix("_path").upper()


def _source(record: Record) -> str:
    """Folder that the dataset was made from, as its manifest says; a word in its place where it cannot be read."""
    with suppress(InputError, OSError, KeyError, TypeError):
        return _quote(read_manifest(Path(str(record.run.get("dataset_path"))), "ml_dataset")["source"]["path"])
    return "SOURCE"


def _quote(path: object) -> str:
    return shlex.quote(str(path))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _nearest_preset(record: Record) -> tuple[str | None, dict[str, Any]]:
    """The preset with the fewest fields to set for this run's configuration, and those fields."""
    config = record.run.get("config")
    if not isinstance(config, dict):
        return None, {}
    mine = leaves({section: config[section] for section in TRAINING_SECTIONS if section in config})
    differences = {}
    for name, build in PRESETS.items():
        theirs = leaves(to_dict(build()))
        differences[name] = {field: value for field, value in mine.items() if theirs.get(field) != value}
    best = min(differences, key=lambda name: len(differences[name]))
    return best, differences[best]


def experiment_command(record: Record, id: str) -> str:
    """Shell command of an experiment: with its comparison where the run was evaluated, else the training alone."""
    if _is_comparable(record):
        return f"atft experiment {_quote(record.run_dir)} {id}"
    return _train(record, f"{record.run_dir}-experiment-{id.lower()}", experiment_overrides(record)[id])


def experiment_dagster_command(record: Record, id: str) -> str:
    """The same as one partition of the job, from the checkout; it ends with the job, like `dagster asset materialize`.

    `dagster job launch` knows no partition and leaves the run to a code server, `dagster job execute` reads no
    configuration from its arguments.
    """
    if not _is_comparable(record):
        return _dagster_training(record, experiment_overrides(record)[id])
    config = json.dumps({"ops": {DAGSTER_OP: {"config": {"run_dir": str(record.run_dir)}}}})
    return f"dg launch --job {DAGSTER_JOB} --partition {id} --config-json {shlex.quote(config)}"


def _dagster_training(record: Record, overrides: Mapping[str, Any]) -> str:
    """The change alone as run config of the training op, on top of what this run was given."""
    given = record.run.get("overrides")
    recorded: dict[str, Any] = given if isinstance(given, dict) else {}
    kept = {field: value for field, value in recorded.items() if "." in field and field != "train.epochs"}
    epochs = min(DAGSTER_RUN_LENGTHS, key=lambda length: abs(length - (record.epochs_planned or CRITERION_RUN_LENGTH)))
    config = json.dumps({"ops": {f"train_{epochs}ep": {"config": {"overrides": kept | dict(overrides)}}}})
    preset = recorded.get("preset")
    prefix = f"ATFT_PRESET={_quote(preset)} " if preset else ""
    return f"{prefix}dagster asset materialize --select model_{epochs}ep --config-json {shlex.quote(config)}"


def _is_comparable(record: Record) -> bool:
    named = all(record.run.get(name) for name in ("config", "dataset_path", "graph_path", "dataset_fingerprint"))
    query = "SELECT count(*) FROM daily WHERE split = 'validation' AND slice = ? AND isfinite(gross)"
    return named and bool(record.scalar(query, record.slice))


def advise(record: Record, findings: Sequence[Finding]) -> list[ExperimentAdvice]:
    """For each experiment whether the evidence asks for it, why, and how to run it."""
    by_id = {finding.rule: finding for finding in findings}
    vetoed = any(f.status == "fired" and f.severity == "invalid" for f in findings)
    everything, lines = experiment_overrides(record), commands(record)
    advice = []
    for experiment in EXPERIMENTS:
        overrides = everything[experiment.id]
        asked, why = _judge(record, [by_id[rule] for rule in experiment.answers], overrides, vetoed=vetoed)
        command = lines[f"experiment_{experiment.id.lower()}"]
        dagster = experiment_dagster_command(record, experiment.id)
        advice.append(ExperimentAdvice(experiment.id, experiment.title, asked, why, overrides, command, dagster))
    return advice


def _judge(
    record: Record, findings: Sequence[Finding], overrides: Mapping[str, Any], *, vetoed: bool
) -> tuple[bool | None, str]:
    if vetoed:
        return False, "not before the evaluation is valid: its result could not be read"
    if all(record.config(name) == value for name, value in overrides.items()):
        return False, "this run already has these settings"
    fired = [f for f in findings if f.status == "fired" and f.severity != "observation"]
    if fired:
        return True, "; ".join(f"{f.cause} ({f.evidence})" for f in fired)
    observed = [f.cause for f in findings if f.status == "fired"]
    if observed:
        return False, f"seen, but the Sharpe is not low: {'; '.join(observed)}"
    blind = [f for f in findings if f.status == "not_assessable"]
    if blind:
        return None, "; ".join(f"{f.cause}: {f.evidence}" for f in blind)
    return False, f"not seen in the record: {'; '.join(f.cause for f in findings)}"
