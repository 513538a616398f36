"""From fired and quiet rules to causes with a probability: prior odds plus capped log likelihood ratios.

Classes are the causes, `healthy` and `unknown`. A rule that was assessed is evidence for or against every class,
by how often it fires in runs of that class. The rates are counted on planted runs (`likelihoods.json`, written by the
diagnostics bench) and smoothed towards the rule table's expectation. The rules of one channel see the same thing, so
only the strongest of them counts for a class. A rule that could not be assessed is no evidence.

While a validity rule fires, only evaluation faults are ranked. While a root rule fires, only its own suspects are
reported.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from atft_pipeline.diagnostics.causes import BY_ID, CAUSES, HEALTHY, HEALTHY_PRIOR, PROVABLE, UNKNOWN, UNKNOWN_PRIOR
from atft_pipeline.diagnostics.rule import Finding, Rule, Status
from atft_pipeline.diagnostics.rule_table import RULES

Conclusion = Literal["healthy", "cause", "unknown", "inconclusive"]

CAP = 6.9
"""Largest log likelihood ratio of one channel: no single rule is worth more than 1,000 to 1. One that never fired in
the healthy runs it was fitted on must be able to outweigh the odds of 25 to 1 that nothing is wrong."""
SMOOTHING = 2.0
"""Planted runs that the rule table's own expectation counts for."""
ONLY_WITNESS, MAIN_SUSPECT, OTHER_SUSPECT = 0.95, 0.6, 0.4
"""Rates at which a rule is expected to fire: for its first suspect where no other channel names that cause first, for
its first suspect where others do, and for its further suspects."""
QUIET = 0.01
"""Rate at which a rule is expected to fire in a healthy run, and for a cause that it does not suspect."""
OFTEN_FINE = 0.05
"""The same for observations and explanations: what explains a low Sharpe occurs in healthy runs too."""
UNKNOWN_FLOOR = 0.015
"""Smallest rate at which an unknown fault fires a rule: it may fire any rule but a root rule."""
NEVER_FINE = ("invalid", "failure", "defect")
"""Severities that are wrong whatever the results are: while such a rule fires, no run is called healthy."""
DEFECT_AGAINST_HEALTHY = 2.3
"""A fired defect lowers the log odds of `healthy` by this much (10 to 1)."""
CONCLUSIVE, MARGIN = 0.5, 3.0
"""A conclusion needs this probability of the leading class, and these odds against the next one."""


@dataclass(frozen=True)
class RankedCause:
    id: str
    name: str
    group: str
    probability: float
    evidence: tuple[str, ...]
    """Ids of the fired rules that are evidence for it, the strongest first."""
    probe: str


@dataclass(frozen=True)
class Ranking:
    conclusion: Conclusion
    """`cause` names the first of `causes`; `unknown`: something is wrong and no known cause fits."""
    causes: tuple[RankedCause, ...]
    """Causes in the order of their probability, without the classes `healthy` and `unknown`."""
    healthy: float
    unknown: float
    missing: tuple[str, ...]
    """Signals not measured that could move the leading classes most."""
    sentence: str


Counts = Mapping[str, Mapping[str, Sequence[int]]]
"""Rule -> class -> (fired, assessed) in planted runs."""
Statuses = Mapping[str, Status]
"""Rule -> its status in one run."""


@cache
def learned() -> Counts:
    """Counts from the planted runs of the diagnostics bench."""
    path = Path(__file__).with_name("likelihoods.json")
    content: Counts = json.loads(path.read_text(encoding="utf-8"))["rules"]
    return content


def rank(findings: Sequence[Finding], counts: Counts | None = None, rules: Sequence[Rule] = RULES) -> Ranking:
    """The classes by probability, given the findings of one run."""
    likelihoods = Likelihoods(learned() if counts is None else counts, rules)
    status: Statuses = {finding.rule: finding.status for finding in findings}
    fired = [rule for rule in rules if status.get(rule.id) == "fired"]
    scores = _log_odds(_classes(fired), rules, status, likelihoods)
    _penalise(scores, fired)
    probability = _normalised(scores)
    causes = _ranked_causes(probability, rules, status, likelihoods)
    missing = _deciding(causes, rules, status)
    contradicting = _contradicting(max(probability, key=probability.__getitem__), fired)
    conclusion = _concluded(probability, contradicting)
    return Ranking(
        conclusion=conclusion,
        causes=tuple(causes),
        healthy=probability.get(HEALTHY, 0.0),
        unknown=probability[UNKNOWN],
        missing=missing,
        sentence=_sentence(conclusion, causes, probability, missing, contradicting),
    )


def _classes(fired: Sequence[Rule]) -> list[str]:
    """The classes to rank: all of them, or only evaluation faults while a rule proves the report false."""
    classes = [cause.id for cause in CAUSES] + [HEALTHY, UNKNOWN]
    if not any(rule.severity == "invalid" and _group(rule) in PROVABLE for rule in fired):
        return classes
    return [name for name in classes if name == UNKNOWN or (name in BY_ID and BY_ID[name].group in PROVABLE)]


def _log_odds(
    classes: Sequence[str], rules: Sequence[Rule], status: Statuses, likelihoods: Likelihoods
) -> dict[str, float]:
    """Class -> log prior odds plus the strongest log likelihood ratio of each channel, capped."""
    scores = {name: math.log(_prior(name)) for name in classes}
    for channel in dict.fromkeys(rule.channel for rule in rules):
        assessed = [r for r in rules if r.channel == channel and status.get(r.id) in ("fired", "not_fired")]
        for name in classes:
            # Where rules of the channel suspect the cause, the others do not count for it.
            speaking = [rule for rule in assessed if name in rule.suspects]
            speaking = speaking or [rule for rule in assessed if rule.severity != "observation"]
            ratios = [likelihoods.log_ratio(rule, status[rule.id] == "fired", name) for rule in speaking]
            if ratios:
                scores[name] += max(-CAP, min(CAP, max(ratios, key=abs)))
    return scores


def _penalise(scores: dict[str, float], fired: Sequence[Rule]) -> None:
    """Lowers the causes that a fired root rule excludes, and `healthy` while a rule of `NEVER_FINE` fires."""
    for name in scores:
        if name in BY_ID and any(rule.root and name not in rule.suspects for rule in fired):
            scores[name] -= CAP
    if HEALTHY in scores and any(rule.severity in NEVER_FINE for rule in fired):
        scores[HEALTHY] -= DEFECT_AGAINST_HEALTHY


def _normalised(scores: Mapping[str, float]) -> dict[str, float]:
    top = max(scores.values())
    weights = {name: math.exp(score - top) for name, score in scores.items()}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _ranked_causes(
    probability: Mapping[str, float], rules: Sequence[Rule], status: Statuses, likelihoods: Likelihoods
) -> list[RankedCause]:
    causes = [
        RankedCause(
            id=cause.id,
            name=cause.name,
            group=cause.group,
            probability=probability[cause.id],
            evidence=_speaking(cause.id, rules, status, likelihoods),
            probe=cause.probe,
        )
        for cause in CAUSES
        if cause.id in probability
    ]
    return sorted(causes, key=lambda ranked: -ranked.probability)


def _contradicting(first: str, fired: Sequence[Rule]) -> list[str]:
    """Fired rules that the leading class cannot explain: root rules of other causes, any defect of a healthy run."""
    if first in BY_ID:
        return [rule.id for rule in fired if rule.root and first not in rule.suspects]
    return [rule.id for rule in fired if rule.severity in NEVER_FINE]


class Likelihoods:
    """How often a rule fires in runs of a class."""

    def __init__(self, counts: Counts, rules: Sequence[Rule]) -> None:
        self.counts = counts
        # Cause -> number of channels that suspect it first: where there are several, one may well be quiet.
        first = {(rule.suspects[0], rule.channel) for rule in rules if rule.suspects}
        self.witnesses = Counter(cause for cause, _ in first)
        self.background = {rule.id: self._background(rule) for rule in rules}

    def log_ratio(self, rule: Rule, fired: bool, name: str) -> float:
        """log P(outcome | class) - log P(outcome | healthy)."""
        of_class, healthy = self.rate(rule, name), self.rate(rule, HEALTHY)
        return math.log(of_class / healthy) if fired else math.log((1.0 - of_class) / (1.0 - healthy))

    def rate(self, rule: Rule, name: str) -> float:
        """P(rule fires | class).

        For a healthy run and for a suspect of the rule: the table's expectation, corrected by planted runs of the
        class. For any other cause: how often the rule fires in runs of all causes that it does not suspect, because
        two runs of one cause are too few to learn a rate for that cause.
        """
        if name == HEALTHY or name in rule.suspects:
            fired, assessed = self._count(rule, name)
            rate = (fired + SMOOTHING * self._expected(rule, name)) / (assessed + SMOOTHING)
        else:
            rate = self.background[rule.id]
            rate = max(rate, UNKNOWN_FLOOR) if name == UNKNOWN and not rule.root else rate
        return min(max(rate, 1e-3), 1.0 - 1e-3)

    def _expected(self, rule: Rule, name: str) -> float:
        if name == HEALTHY:
            return OFTEN_FINE if rule.severity in ("observation", "explanation") else QUIET
        if rule.suspects[0] != name:
            return OTHER_SUSPECT
        return ONLY_WITNESS if self.witnesses[name] == 1 else MAIN_SUSPECT

    def _background(self, rule: Rule) -> float:
        others = [
            count
            for name, count in self.counts.get(rule.id, {}).items()
            if name != HEALTHY and name not in rule.suspects
        ]
        fired, assessed = (sum(count[k] for count in others) for k in (0, 1))
        return (fired + SMOOTHING * self._expected(rule, HEALTHY)) / (assessed + SMOOTHING)

    def _count(self, rule: Rule, name: str) -> tuple[int, int]:
        count = self.counts.get(rule.id, {}).get(name)
        return (int(count[0]), int(count[1])) if count else (0, 0)


def _prior(name: str) -> float:
    return {HEALTHY: HEALTHY_PRIOR, UNKNOWN: UNKNOWN_PRIOR}.get(name) or BY_ID[name].prior


def _group(rule: Rule) -> str:
    return BY_ID[rule.suspects[0]].group if rule.suspects else ""


def _speaking(name: str, rules: Sequence[Rule], status: Statuses, likelihoods: Likelihoods) -> tuple[str, ...]:
    fired = [rule for rule in rules if status.get(rule.id) == "fired" and name in rule.suspects]
    ratios = {rule.id: likelihoods.log_ratio(rule, True, name) for rule in fired}
    return tuple(id for id, ratio in sorted(ratios.items(), key=lambda pair: -pair[1]) if ratio > 0.0)


def _deciding(causes: Sequence[RankedCause], rules: Sequence[Rule], status: Statuses) -> tuple[str, ...]:
    """Rules of the three leading causes that could not be assessed."""
    leading = {cause.id for cause in causes[:3]}
    return tuple(
        rule.id
        for rule in rules
        if status.get(rule.id) == "not_assessable" and rule.suspects and rule.suspects[0] in leading
    )


def _concluded(probability: Mapping[str, float], contradicting: Sequence[str]) -> Conclusion:
    (first, best), (_, second) = sorted(probability.items(), key=lambda pair: -pair[1])[:2]
    if best < CONCLUSIVE or best < MARGIN * second:
        return "inconclusive"
    if first == UNKNOWN:
        return "unknown"
    if contradicting:
        return "inconclusive"
    return "healthy" if first == HEALTHY else "cause"


def _sentence(
    conclusion: Conclusion,
    causes: Sequence[RankedCause],
    probability: Mapping[str, float],
    missing: Sequence[str],
    contradicting: Sequence[str],
) -> str:
    if conclusion == "cause":
        return f"Cause, with probability {causes[0].probability:.2f}: {causes[0].name}."
    if conclusion == "healthy":
        return f"Nothing is wrong with the run, with probability {probability[HEALTHY]:.2f}."
    if conclusion == "unknown":
        return f"Something is wrong that no known cause fits, with probability {probability[UNKNOWN]:.2f}."
    leading = ", ".join(f"{cause.name} ({cause.probability:.2f})" for cause in causes[:3])
    against = f"; {', '.join(contradicting)} fired, which the first does not explain" if contradicting else ""
    would = f"; not measured, and it would decide: {', '.join(missing)}" if missing else ""
    classes = f"healthy {probability.get(HEALTHY, 0.0):.2f}, unknown {probability[UNKNOWN]:.2f}"
    return f"Inconclusive: {classes}, {leading}{against}{would}."
