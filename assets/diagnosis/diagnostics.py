"""Why a run got the Sharpe it got: findings with evidence and next steps, written into the run's own directory."""

from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg

from assets.diagnosis.commands import DAGSTER
from assets.judging.checks import recorded_run
from assets.metadata import as_dagster_failure, markdown_table, numeric_metadata
from assets.training.training_run import run_asset_key
from atft_pipeline.config.schema import Probes

if TYPE_CHECKING:
    from atft_pipeline.diagnostics.diagnose import Diagnosis, ReportPaths


class DiagnosticsConfig(dg.Config):
    probes: Probes = "leading"
    """Short experiments on the run's own inputs: of the three most probable causes, or all."""


def diagnostics_asset(epochs: int) -> dg.AssetsDefinition:
    """`diagnostics_{epochs}ep`."""

    @dg.asset(
        key=diagnostics_key(epochs),
        group_name="diagnostics",
        deps=[run_asset_key(epochs), f"evaluation_{epochs}ep"],
        kinds={"duckdb"},
        description=f"Findings over the lineage of the {epochs}-epoch run, with evidence, next steps and experiments.",
    )
    def diagnostics(context: dg.AssetExecutionContext, config: DiagnosticsConfig) -> dg.MaterializeResult:
        with as_dagster_failure(context):
            run_dir = recorded_run(context, epochs)
            return dg.MaterializeResult(metadata=explained(context, run_dir, config.probes))

    return diagnostics


def diagnostics_key(epochs: int) -> dg.AssetKey:
    return dg.AssetKey(f"diagnostics_{epochs}ep")


def explained(
    context: dg.AssetExecutionContext | dg.OpExecutionContext, run_dir: Path, probes: Probes = "none"
) -> dict[str, dg.MetadataValue | str]:
    """Diagnoses a run and writes its report; what of it the UI shows."""
    from atft_pipeline.diagnostics.diagnose import diagnose, write_report

    diagnosis = diagnose(run_dir, probes, DAGSTER)
    report = write_report(run_dir, diagnosis)
    context.log.info(f"{diagnosis.headline} Report: {report.html}")
    return explanation(diagnosis, report)


def explanation(diagnosis: "Diagnosis", report: "ReportPaths") -> dict[str, dg.MetadataValue | str]:
    """A written report as metadata."""
    from atft_pipeline.diagnostics.report.sections import to_markdown

    statuses = [finding.status for finding in diagnosis.findings]
    return {
        "run_dir": dg.MetadataValue.path(str(diagnosis.run_dir)),
        "headline": diagnosis.headline,
        "conclusion": diagnosis.ranking.sentence,
        "verdict": diagnosis.verdict_line,
        "warnings": markdown_table([{"warning": warning} for warning in diagnosis.warnings]),
        "report_html": dg.MetadataValue.path(str(report.html)),
        **numeric_metadata({status: statuses.count(status) for status in ("fired", "not_fired", "not_assessable")}),
        "findings": markdown_table(diagnosis.table()),
        "report": dg.MetadataValue.md(to_markdown(diagnosis)),
    }
