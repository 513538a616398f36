"""Why a run got its Sharpe: findings with evidence and next steps, read from the run's own directory.

The dataset that the run names is read only if it is still the one that the run was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from atft_pipeline.config.overrides import from_dict
from atft_pipeline.config.schema import Probes
from atft_pipeline.diagnostics.causes import REMEDIES
from atft_pipeline.diagnostics.commands import ATFT, CommandStyle, next_steps
from atft_pipeline.diagnostics.experiments.plan import ExperimentAdvice, advise
from atft_pipeline.diagnostics.gather import gather
from atft_pipeline.diagnostics.posterior import Ranking, rank
from atft_pipeline.diagnostics.probes.run import PROBES, run_probes, run_remedies, stored_probes
from atft_pipeline.diagnostics.report.diagnosis import Diagnosis
from atft_pipeline.diagnostics.report.headline import headline
from atft_pipeline.diagnostics.report.page import ReportPaths, write_report
from atft_pipeline.diagnostics.report.sibling_runs import sibling_rows
from atft_pipeline.diagnostics.rule import Finding, assess
from atft_pipeline.diagnostics.rule_table import TABLE, RuleTable
from atft_pipeline.diagnostics.run_inputs import RunInputs
from atft_pipeline.diagnostics.signal import Value
from atft_pipeline.errors import InputError
from atft_pipeline.evaluation.evaluate import SPLITS
from atft_pipeline.inspection.attribution import Attribution, Missing
from atft_pipeline.inspection.attribution_inputs import attribute_predictions
from atft_pipeline.inspection.paired import experiment_rows
from atft_pipeline.inspection.reader import Record, open_record

__all__ = ["Diagnosis", "ExperimentAdvice", "Finding", "ReportPaths", "attributions", "diagnose", "write_report"]


PROBED_CAUSES = 3


def diagnose(
    run_dir: Path, probes: Probes = "none", commands: CommandStyle = ATFT, table: RuleTable = TABLE
) -> Diagnosis:
    """Assesses every rule on the record of one run, whatever its state, and ranks the causes.

    `probes`: `leading` runs the probes of the three most probable causes, which take from seconds to an epoch each, and
    ranks again; `all` runs every probe. Figures of earlier probes are always read. `commands` is the style of the
    commands that findings name.

    Raises InputError where `run_dir` holds nothing readable of a run.
    """
    record = open_record(Path(run_dir))
    try:
        # Both mostly wait for files, so two threads take the time of one.
        with ThreadPoolExecutor(1) as pool:
            attributed = pool.submit(attributions, record)
            signals, findings, ranking = _assessed(record, commands, table)
        if probes != "none":
            leading = ranking.causes[:PROBED_CAUSES]
            run_probes(record, PROBES if probes == "all" else [c.probe for c in leading if c.probe in PROBES])
            signals, findings, ranking = _assessed(record, commands, table)
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
            rules=table.rules,
            ranking=ranking,
            probe_command=commands.diagnose(record, "leading"),
            probes=stored_probes(record),
            siblings=sibling_rows(record),
            experiments=advise(record, findings, table.rules, commands),
            results=experiment_rows(record.run_dir),
            attributions=attributed.result(),
            missing=[*record.missing, *RunInputs(record).unusable],
            headline=headline(record, signals, findings, ranking),
        )
    except BaseException:
        record.connection.close()
        raise


def _assessed(
    record: Record, commands: CommandStyle, table: RuleTable
) -> tuple[dict[str, Value], list[Finding], Ranking]:
    signals = gather(record, table)
    findings = assess(signals, table.rules, next_steps(record, commands))
    return signals, findings, rank(findings, rules=table.rules)


def attributions(record: Record) -> Mapping[str, Attribution | Missing]:
    """Split -> costs, periods, capacity and exposures of the newest predictions that the run kept."""
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
