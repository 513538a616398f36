"""Why a run got the Sharpe it got: findings with evidence and next steps, written into the run's own directory."""

from typing import Literal

import dagster as dg

from assets.checks import recorded_run
from assets.outcomes import failing_with_one_sentence, markdown_table, numbers
from assets.training import run_asset_key


class DiagnosticsConfig(dg.Config):
    probes: Literal["none", "leading", "all"] = "leading"
    """Short experiments on the run's own inputs: of the three most probable causes, or all."""


def diagnostics_asset(epochs: int) -> dg.AssetsDefinition:
    """`diagnostics_{epochs}ep`."""
    name = f"diagnostics_{epochs}ep"

    @dg.asset(
        name=name,
        group_name="diagnostics",
        deps=[run_asset_key(epochs), f"evaluation_{epochs}ep"],
        kinds={"duckdb"},
        description=f"Findings over the lineage of the {epochs}-epoch run, with evidence, next steps and experiments.",
    )
    def diagnostics(context: dg.AssetExecutionContext, config: DiagnosticsConfig) -> dg.MaterializeResult:
        from atft_pipeline.diagnostics import diagnose, write_report

        with failing_with_one_sentence(context):
            run_dir = recorded_run(context, epochs)
            diagnosis = diagnose(run_dir, config.probes)
            report = write_report(run_dir, diagnosis)
        context.log.info(f"{diagnosis.headline} Report: {report.html}")
        statuses = [finding.status for finding in diagnosis.findings]
        return dg.MaterializeResult(
            metadata={
                "run_dir": dg.MetadataValue.path(str(run_dir)),
                "headline": diagnosis.headline,
                "conclusion": diagnosis.ranking.sentence,
                "verdict": diagnosis.verdict_line,
                "warnings": markdown_table([{"warning": warning} for warning in diagnosis.warnings]),
                "report_html": dg.MetadataValue.path(str(report.html)),
                **numbers({status: statuses.count(status) for status in ("fired", "not_fired", "not_assessable")}),
                "findings": markdown_table(diagnosis.table()),
                "report": dg.MetadataValue.md(diagnosis.to_markdown()),
            }
        )

    return diagnostics
