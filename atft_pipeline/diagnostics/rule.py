"""What a rule is, and how it is assessed on the signals of a run. The rules themselves are in `topics/`.

A rule fires when all of its conditions hold. It is `not_assessable` as soon as one of its signals was not measured,
whatever the others say: missing evidence is never "fine". While a validity rule fires, no other finding counts: a
figure that is not this run's own explains nothing about it.
"""

from __future__ import annotations

import math
import operator
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from atft_pipeline.diagnostics.changes import Change
from atft_pipeline.diagnostics.questions import Question
from atft_pipeline.diagnostics.signal import Signals, Value

Status = Literal["fired", "not_fired", "not_assessable"]
Severity = Literal["invalid", "failure", "defect", "explanation", "observation"]
"""`invalid`: the Sharpe must not be read. `failure`: the run did not end. `defect`: wrong whatever the Sharpe is.
`explanation`: would explain a low Sharpe; it is an observation where the Sharpe is not low. `observation`: describes
without a judgement."""
Group = Literal[
    "validity", "runtime", "data", "curves", "learning rate", "loss terms", "ic", "gradients", "experiments", "noise"
]

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Condition:
    signal: str
    comparison: str
    threshold: float

    def __str__(self) -> str:
        return f"{self.signal} {self.comparison} {self.threshold:g}"


def all_of(*conditions: tuple[str, str, float]) -> tuple[Condition, ...]:
    """The conditions of a rule as (signal, comparison, threshold)."""
    return tuple(Condition(*condition) for condition in conditions)


SHARPE_IS_LOW = ("sharpe_shortfall", ">", 0.0)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`evidence` is a template of signals, `next_step` of commands (commands.next_steps)."""

    id: str
    cause: str
    group: Group
    severity: Severity
    when: tuple[Condition, ...]
    evidence: str
    next_step: str
    changes: tuple[Change, ...] = ()
    """Settings that the next step tries. The command that trains with them follows the sentence."""
    experiments: tuple[str, ...] = ()
    """Ids of the experiments that the rule asks for when it fires."""
    question: Question
    """The question of the report that this rule answers. An observation answers nothing by itself."""
    channel: str
    """Rules of one channel see the same thing, so only the strongest of them counts for a cause."""
    suspects: tuple[str, ...] = ()
    """Ids of the causes that the rule is evidence for, the likeliest first; empty where it only describes."""
    root: bool = False
    """Only its own suspects can cause it, so while it fires only they are reported."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Signals without which it is not assessable."""
        return tuple(dict.fromkeys(condition.signal for condition in self.when))


@dataclass(frozen=True)
class Finding:
    """A rule with its outcome for one run."""

    rule: str
    cause: str
    group: Group
    severity: Severity
    status: Status
    decisive: bool
    """Fired, and no validity rule forbids reading it."""
    evidence: str
    condition: str
    next_step: str
    report_line: str
    """Text of the question that the rule answers."""


def assess(signals: Signals, rules: Sequence[Rule], next_step: Callable[[Rule], str] = lambda _: "") -> list[Finding]:
    """Assesses every rule on `signals`, in the order of `rules`; `next_step` says what to do after a fired one.

    An explanation of a Sharpe that is not low is an observation. While a validity rule fires, nothing else is decisive.
    """
    statuses = {rule.id: status_of(rule, signals) for rule in rules}
    vetoed = any(statuses[rule.id] == "fired" and rule.severity == "invalid" for rule in rules)
    shortfall = signals.get("sharpe_shortfall")
    is_low = not isinstance(shortfall, float) or shortfall > 0
    return [_finding(rule, statuses[rule.id], signals, next_step, vetoed=vetoed, is_low=is_low) for rule in rules]


def status_of(rule: Rule, signals: Signals) -> Status:
    values = [(signals.get(condition.signal), condition) for condition in rule.when]
    if any(not isinstance(value, float) for value, _ in values):
        return "not_assessable"
    holds = all(OPERATORS[c.comparison](value, c.threshold) for value, c in values if isinstance(value, float))
    return "fired" if holds else "not_fired"


def _finding(
    rule: Rule, status: Status, signals: Signals, next_step: Callable[[Rule], str], *, vetoed: bool, is_low: bool
) -> Finding:
    fired = status == "fired"
    severity: Severity = "observation" if rule.severity == "explanation" and not is_low else rule.severity
    return Finding(
        rule=rule.id,
        cause=rule.cause,
        group=rule.group,
        severity=severity,
        status=status,
        decisive=fired and (rule.severity == "invalid" or not vetoed),
        evidence=_evidence(rule, status, signals),
        condition=" and ".join(map(str, rule.when)),
        next_step=next_step(rule) if fired else "",
        report_line=rule.question.text,
    )


def _evidence(rule: Rule, status: Status, signals: Signals) -> str:
    """The rule's sentence where it fired, else the figures alone: the sentence would accuse a run that is fine."""
    if status == "fired":
        return _fill(rule.evidence, signals)
    if status == "not_assessable":
        return f"not measured: {', '.join(name for name in rule.needs if not isinstance(signals.get(name), float))}"
    return ", ".join(f"{name.replace('_', ' ')} {_fill(f'{{{name}:.4g}}', signals)}" for name in rule.needs)


class _Evidence(string.Formatter):
    """Says in words what a number format cannot: a signal that was not measured, an epoch that never came."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            return "not measured"
        return "never" if value == math.inf else str(format(value, format_spec))


def _fill(template: str, signals: Signals) -> str:
    values: dict[str, Value] = dict(signals)
    return _Evidence().vformat(template, (), values)
