"""A diagnosis before it is written down: what was read, measured and concluded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from atft_pipeline.diagnostics.experiments.plan import ExperimentAdvice
from atft_pipeline.diagnostics.posterior import Ranking
from atft_pipeline.diagnostics.rule import Finding, Rule
from atft_pipeline.diagnostics.signal import Signals
from atft_pipeline.inspection.attribution import Attribution, Missing
from atft_pipeline.inspection.reader import Record

STATUS_WORDS = {"fired": "yes", "not_fired": "no", "not_assessable": "not assessable"}
SHOWN_CAUSES, SHOWN_PROBABILITY = 3, 0.02


@dataclass(frozen=True)
class Diagnosis:
    """Why one run ended as it did, as far as its record says."""

    record: Record
    """The record that was read; it is still open."""
    final: dict[str, Any]
    verdict_line: str
    warnings: list[str]
    """Warnings of the verdict; a passed verdict may have some too."""
    signals: Signals
    findings: list[Finding]
    rules: Sequence[Rule]
    """The rules that were assessed; each has a finding."""
    ranking: Ranking
    probe_command: str
    """Runs the probes of the leading causes."""
    experiments: list[ExperimentAdvice]
    results: list[dict[str, str]]
    """A row per experiment that was run."""
    probes: list[dict[str, Any]]
    """What each probe of this run measured, or why it could not."""
    siblings: list[dict[str, str]]
    """A row per sibling run. They are shown, and decide nothing."""
    attributions: Mapping[str, Attribution | Missing]
    """Split -> costs, periods, capacity and exposures."""
    missing: list[str]
    headline: str

    @property
    def run_dir(self) -> Path:
        return self.record.run_dir

    @property
    def causes(self) -> list[Finding]:
        """Fired findings that call for a step: decisive ones first, otherwise in the order of the rules."""
        fired = [f for f in self.findings if f.status == "fired" and f.severity != "observation"]
        return sorted(fired, key=lambda f: not f.decisive)

    def table(self) -> list[dict[str, str]]:
        """One short row per finding: fired ones first, then what could not be assessed, then the rest."""
        order = {"fired": 0, "not_assessable": 1, "not_fired": 2}
        return [
            {
                "status": STATUS_WORDS[f.status] + ("" if f.decisive or f.status != "fired" else ", not decisive"),
                "severity": f.severity,
                "group": f.group,
                "cause": f.cause,
                "evidence": f.evidence,
            }
            for f in sorted(self.findings, key=lambda f: order[f.status])
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; infinite values as null."""
        return {
            "run_dir": str(self.run_dir),
            "headline": self.headline,
            "verdict": self.verdict_line,
            "conclusion": self.ranking.conclusion,
            "conclusion_sentence": self.ranking.sentence,
            "causes": [asdict(cause) for cause in self.ranking.causes if cause.probability >= SHOWN_PROBABILITY],
            "healthy": self.ranking.healthy,
            "unknown": self.ranking.unknown,
            "would_decide": list(self.ranking.missing),
            "probes": self.probes,
            "fired": [finding.rule for finding in self.causes],
            "findings": [asdict(finding) for finding in self.findings],
            "experiments": [asdict(advice) for advice in self.experiments],
            "experiment_results": self.results,
            "signals": {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in self.signals.items()
            },
            "attribution": {
                split: {"not_assessable": of.reason} if isinstance(of, Missing) else of.as_dict()
                for split, of in self.attributions.items()
            },
            "missing": self.missing,
        }

    @property
    def title(self) -> str:
        return f"Diagnosis of {self.record.run.get('name') or self.run_dir.name}"
