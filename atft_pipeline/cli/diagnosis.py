"""The command that explains a run: diagnose."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any, get_args

from atft_pipeline.cli.arguments import AddCommand
from atft_pipeline.cli.progress import ProgressBar
from atft_pipeline.cli.reply import Block, Cell, Reply, Sentences, Table, facts
from atft_pipeline.config.schema import Probes

CAUSES_SHOWN = 3


def register(add: AddCommand) -> None:
    diagnose = add("diagnose", _diagnose, "Explain a run from its record and write its report.")
    diagnose.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    diagnose.add_argument(
        "--probes",
        choices=get_args(Probes),
        default="none",
        help="short experiments on the run's own inputs: of the three most probable causes, or all (default: none)",
    )


def _diagnose(options: argparse.Namespace) -> Reply:
    from atft_pipeline.diagnostics.diagnose import diagnose, write_report

    # The plots take half a second to import; meanwhile the diagnosis waits for files.
    Thread(target=import_module, args=("atft_pipeline.diagnostics.report.attribution_plots",)).start()
    with ProgressBar("diagnosing") as bar:
        diagnosis = diagnose(options.run_dir, options.probes)
        bar.stage("writing the report")
        paths = write_report(options.run_dir, diagnosis)
    content = diagnosis.to_dict() | {"report_html": str(paths.html), "report_markdown": str(paths.markdown)}
    return Reply(content, diagnosis_blocks(content))


def diagnosis_blocks(content: Mapping[str, Any]) -> list[Block]:
    """The conclusion, the most probable causes, and the fired rules with their next steps; the report has the rest."""
    fired = [finding for finding in content["findings"] if finding["status"] == "fired"]
    causes = [("healthy", content["healthy"]), ("an unknown cause", content["unknown"])]
    causes += [(cause["name"], cause["probability"]) for cause in content["causes"][:CAUSES_SHOWN]]
    ranked = sorted(causes, key=lambda cause: -(cause[1] or 0.0))
    rows = [[Cell(name), Cell("-" if value is None else f"{value:.2f}")] for name, value in ranked]
    return [
        facts(
            ("run", content["run_dir"]),
            ("verdict", content["verdict"]),
            ("headline", content["headline"]),
            ("report", content["report_html"]),
            timed=True,
        ),
        Table("causes", ["cause", "probability"], rows),
        Sentences("fired", [f"{f['rule']}: {f['cause']} ({f['evidence']})" for f in fired]),
        Sentences("what to do", [f"{f['rule']}: {f['next_step']}" for f in fired if f.get("next_step")]),
        *([Sentences("not read", content["missing"], colour="yellow")] if content["missing"] else []),
    ]
