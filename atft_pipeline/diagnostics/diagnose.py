"""Why a run got the Sharpe it got: findings with evidence and next steps, from that run's own directory alone.

Only what the portfolio is held against (market, sectors, turnover values) comes from the dataset that the run names,
and only while that is the one it was made on.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from atft_pipeline.config.overrides import from_dict
from atft_pipeline.config.schema import Probes
from atft_pipeline.diagnostics.evidence import gather
from atft_pipeline.diagnostics.experiments.commands import ExperimentAdvice, advise, commands
from atft_pipeline.diagnostics.posterior import Ranking, rank
from atft_pipeline.diagnostics.probes.probes import PROBES, REMEDIES, run_probes, run_remedies, stored_probes
from atft_pipeline.diagnostics.report.report import Diagnosis, ReportPaths, headline, write_report
from atft_pipeline.diagnostics.report.sibling_runs import runs_beside
from atft_pipeline.diagnostics.rules.rule import Finding, assess
from atft_pipeline.diagnostics.run_inputs import RunInputs
from atft_pipeline.diagnostics.signals.recorded import Value
from atft_pipeline.errors import InputError
from atft_pipeline.evaluation.attribution import Attribution, Missing
from atft_pipeline.evaluation.attribution_inputs import attribute_predictions
from atft_pipeline.evaluation.evaluate import SPLITS
from atft_pipeline.runs.paired import experiment_rows
from atft_pipeline.runs.reader import Record, open_record

__all__ = ["Diagnosis", "ExperimentAdvice", "Finding", "ReportPaths", "attributions", "diagnose", "write_report"]


PROBED_CAUSES = 3


def diagnose(run_dir: Path, probes: Probes = "none") -> Diagnosis:
    """Every rule held against the record of one run, whatever state it is in, and the causes ranked.

    `probes`: `leading` makes those of the three most probable causes, which take from seconds to an epoch, and ranks
    again with what they measured; `all` makes every one. Probes made earlier are read in any case.

    Raises InputError where `run_dir` holds nothing readable of a run.
    """
    record = open_record(Path(run_dir))
    try:
        # Both wait for files more than for the interpreter: side by side they take the time of one.
        with ThreadPoolExecutor(1) as pool:
            attributed = pool.submit(attributions, record)
            signals, findings, ranking = _assessed(record)
        if probes != "none":
            leading = ranking.causes[:PROBED_CAUSES]
            run_probes(record, PROBES if probes == "all" else [c.probe for c in leading if c.probe in PROBES])
            signals, findings, ranking = _assessed(record)
            if ranking.conclusion != "healthy":
                run_remedies(record, [c.id for c in ranking.causes[:PROBED_CAUSES] if c.id in REMEDIES])
        final, warnings = record.verdict.get("final"), record.verdict.get("warnings")
        return Diagnosis(
            record=record,
            final=final if isinstance(final, dict) else {},
            verdict_line=str(record.verdict.get("summary") or "no verdict was written"),
            warnings=[str(warning) for warning in warnings] if isinstance(warnings, list) else [],
            signals=signals,
            findings=findings,
            ranking=ranking,
            probes=stored_probes(record),
            earlier=runs_beside(record),
            experiments=advise(record, findings),
            results=experiment_rows(record.run_dir),
            attributions=attributed.result(),
            missing=[*record.missing, *RunInputs(record).unusable],
            headline=headline(record, signals, findings, ranking),
        )
    except BaseException:
        record.connection.close()
        raise


def _assessed(record: Record) -> tuple[dict[str, Value], list[Finding], Ranking]:
    signals = gather(record)
    findings = assess(signals, commands(record))
    return signals, findings, rank(findings)


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
