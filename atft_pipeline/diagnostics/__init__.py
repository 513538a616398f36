"""Why a run got the Sharpe it got: findings with evidence and next steps, from that run's own directory alone."""

from __future__ import annotations

from pathlib import Path

from atft_pipeline.diagnostics.experiments import ExperimentAdvice, advise, commands
from atft_pipeline.diagnostics.record import open_record
from atft_pipeline.diagnostics.report import Diagnosis, ReportPaths, headline, write_report
from atft_pipeline.diagnostics.rules import Finding, assess
from atft_pipeline.diagnostics.signals import measure

__all__ = ["Diagnosis", "ExperimentAdvice", "Finding", "ReportPaths", "diagnose", "write_report"]


def diagnose(run_dir: Path) -> Diagnosis:
    """Every rule held against the record of one run, whatever state it is in.

    Raises InputError where `run_dir` holds nothing readable of a run.
    """
    record = open_record(Path(run_dir))
    try:
        signals = measure(record)
        findings = assess(signals, commands(record))
        final = record.verdict.get("final")
        return Diagnosis(
            run_dir=record.run_dir,
            run=record.run,
            final=final if isinstance(final, dict) else {},
            verdict_line=str(record.verdict.get("summary") or "no verdict was written"),
            warnings=[str(warning) for warning in record.verdict.get("warnings") or []],
            slice=record.slice,
            criterion_epoch=record.criterion_epoch,
            signals=signals,
            findings=findings,
            experiments=advise(record, findings),
            missing=list(record.missing),
            headline=headline(record, signals, findings),
        )
    finally:
        record.connection.close()
