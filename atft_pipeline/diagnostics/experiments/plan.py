"""The four experiments of the validation report: what each changes, and whether a run's evidence asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from atft_pipeline.diagnostics.changes import Change, Settings, plan_changes, raised, switched, values_of
from atft_pipeline.diagnostics.commands import CommandStyle
from atft_pipeline.diagnostics.rule import Finding, Rule
from atft_pipeline.inspection.reader import Record


@dataclass(frozen=True)
class Experiment:
    """A training with other settings. Rules ask for it by its id (`Rule.experiments`)."""

    id: str
    title: str
    changes: tuple[Change, ...]


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "A",
        "schedule: more patience, slower decay",
        (
            switched("train.schedule.name", "plateau"),
            raised("train.schedule.patience", 2, at_least=10),
            raised("train.schedule.factor", 1.42, at_most=0.95),
        ),
    ),
    Experiment("B", "loss weights: a heavier Sharpe term", (raised("train.loss.sharpe", 3, at_least=0.3),)),
    Experiment("C", "capacity: a larger hidden size", (raised("model.hidden_size", 2, at_least=512, at_most=1024),)),
    Experiment("D", "a higher learning rate", (raised("train.optimizer.lr", 2, at_least=1e-3, at_most=1e-2),)),
)
BY_ID = {experiment.id: experiment for experiment in EXPERIMENTS}


def experiment_settings(record: Record, id: str) -> Settings:
    """What the experiment changes in the run of `record`."""
    return plan_changes(BY_ID[id].changes, values_of(record))


@dataclass(frozen=True)
class ExperimentAdvice:
    """`asked_for`: True or False by the evidence, None where the record cannot tell."""

    id: str
    title: str
    asked_for: bool | None
    why: str
    changes: str
    """In words, with old and new values."""
    overrides: dict[str, Any]
    command: str
    """Trains the experiment, compares it with the run and renews the run's report. A run without evaluations cannot be
    compared: the command then only trains."""


def advise(
    record: Record, findings: Sequence[Finding], rules: Sequence[Rule], style: CommandStyle
) -> list[ExperimentAdvice]:
    """For each experiment whether the evidence asks for it, why, and how to run it."""
    by_id = {finding.rule: finding for finding in findings}
    comparable = _is_comparable(record)
    advice = []
    for experiment in EXPERIMENTS:
        settings = experiment_settings(record, experiment.id)
        asking = [by_id[rule.id] for rule in rules if experiment.id in rule.experiments]
        asked_for, why = _judge(findings, asking, settings)
        command = (
            style.experiment(record, experiment.id)
            if comparable
            else style.train(record, settings.overrides, f"experiment-{experiment.id.lower()}")
        )
        advice.append(
            ExperimentAdvice(
                id=experiment.id,
                title=experiment.title,
                asked_for=asked_for,
                why=why,
                changes=settings.sentence,
                overrides=settings.overrides,
                command=command,
            )
        )
    return advice


def _is_comparable(record: Record) -> bool:
    named = all(record.run.get(name) for name in ("config", "dataset_path", "graph_path", "dataset_fingerprint"))
    query = "SELECT count(*) FROM daily WHERE split = 'validation' AND slice = ? AND isfinite(gross)"
    return named and bool(record.scalar(query, record.slice))


def _judge(findings: Sequence[Finding], asking: Sequence[Finding], settings: Settings) -> tuple[bool | None, str]:
    if any(f.status == "fired" and f.severity == "invalid" for f in findings):
        return False, "not before the evaluation is valid: its result could not be read"
    if not settings.overrides:
        return False, f"this run already has its settings ({settings.sentence})"
    fired = [f for f in asking if f.status == "fired" and f.severity != "observation"]
    if fired:
        return True, "; ".join(f"{f.cause} ({f.evidence})" for f in fired)
    observed = [f.cause for f in asking if f.status == "fired"]
    if observed:
        return False, f"seen, but the Sharpe is not low: {'; '.join(observed)}"
    unassessed = [f for f in asking if f.status == "not_assessable"]
    if unassessed:
        return None, "; ".join(f"{f.cause}: {f.evidence}" for f in unassessed)
    return False, f"not seen in the record: {'; '.join(f.cause for f in asking)}"
