"""Why a run got the Sharpe it got: findings with evidence and next steps, from that run's own directory alone.

Only what the portfolio is held against (market, sectors, turnover values) comes from the dataset that the run names,
and only while that is the one it was made on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from atft_pipeline.attribution import SPLITS, Attribution, Missing, attribute_predictions
from atft_pipeline.config import from_dict
from atft_pipeline.diagnostics.experiments import ExperimentAdvice, advise, commands
from atft_pipeline.diagnostics.record import Record, open_record
from atft_pipeline.diagnostics.report import Diagnosis, ReportPaths, headline, write_report
from atft_pipeline.diagnostics.rules import Finding, assess
from atft_pipeline.diagnostics.signals import measure
from atft_pipeline.errors import InputError

__all__ = ["Diagnosis", "ExperimentAdvice", "Finding", "ReportPaths", "attributions", "diagnose", "write_report"]


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
            attributions=attributions(record),
            missing=list(record.missing),
            headline=headline(record, signals, findings),
        )
    finally:
        record.connection.close()


def attributions(record: Record) -> Mapping[str, Attribution | Missing]:
    """Split -> costs, periods, capacity and exposures of the last predictions that the run kept."""
    if not record.predictions:
        return dict.fromkeys(SPLITS, Missing("the run has no readable predictions"))
    try:
        config = from_dict(record.run["config"]).evaluation
        dataset = Path(record.run["dataset_path"])
    except (InputError, KeyError, TypeError) as error:
        return dict.fromkeys(SPLITS, Missing(f"run.json does not say how the run is evaluated, or on what ({error})"))
    fingerprint = record.run.get("dataset_fingerprint")
    last = record.predictions[max(record.predictions)]
    return attribute_predictions(last, config, dataset=dataset, dataset_fingerprint=fingerprint)
