"""A report as files: markdown, one self-contained HTML page with plots, and a table of findings."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from atft_pipeline.diagnostics.report.diagnosis import Diagnosis
from atft_pipeline.diagnostics.report.markdown import to_html
from atft_pipeline.diagnostics.report.sections import sections, to_markdown
from atft_pipeline.storage.atomic import replacing

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c }
table { border-collapse: collapse; margin: .8rem 0 } th, td { border: 1px solid #d0d0d0; padding: .25rem .6rem;
text-align: left; vertical-align: top } th { background: #f4f4f4 } code, pre { background: #f4f4f4; font-size: .9em }
pre { padding: .6rem; overflow-x: auto; white-space: pre-wrap; word-break: break-word } img { max-width: 100% }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; border-bottom: 1px solid #d0d0d0; margin-top: 2rem }
"""

PLOTS_OF_SECTION: dict[str, tuple[str, ...]] = {
    "Final results": ("Sharpe by epoch", "IC and RankIC"),
    "Gradient flow": ("Gradient l2 by component",),
    "Plateau analysis": ("Losses", "Learning rate"),
}


@dataclass(frozen=True)
class ReportPaths:
    findings: Path
    markdown: Path
    html: Path


def write_report(run_dir: Path, diagnosis: Diagnosis) -> ReportPaths:
    """`findings.parquet`, `report.md` and `report.html` of a run, each replaced in one step."""
    paths = ReportPaths(run_dir / "findings.parquet", run_dir / "report.md", run_dir / "report.html")
    pictures = _pictures(diagnosis)
    with replacing(paths.findings) as temporary:
        pq.write_table(pa.Table.from_pylist([asdict(finding) for finding in diagnosis.findings]), temporary)
    with replacing(paths.markdown) as temporary:
        temporary.write_text(to_markdown(diagnosis), encoding="utf-8")
    with replacing(paths.html) as temporary:
        temporary.write_text(_page(diagnosis, pictures), encoding="utf-8")
    return paths


def _pictures(diagnosis: Diagnosis) -> dict[str, dict[str, bytes]]:
    """Section -> title -> PNG."""
    from atft_pipeline.diagnostics.report.attribution_plots import draw_attributions  # half of what a diagnosis imports
    from atft_pipeline.diagnostics.report.plots import draw

    drawn = draw(diagnosis.record)
    by_section = {name: {t: drawn[t] for t in titles if t in drawn} for name, titles in PLOTS_OF_SECTION.items()}
    return by_section | {"Costs, capacity and exposures": draw_attributions(diagnosis.attributions)}


def _page(diagnosis: Diagnosis, pictures: Mapping[str, Mapping[str, bytes]]) -> str:
    title = html.escape(diagnosis.title)
    body = []
    for name, text in sections(diagnosis):
        shown = "".join(_image(plot, png) for plot, png in pictures.get(name, {}).items())
        body.append(f"<h2>{html.escape(name)}</h2>\n{shown}{to_html(text)}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"</head><body><h1>{title}</h1>\n{''.join(body)}</body></html>\n"
    )


def _image(title: str, png: bytes) -> str:
    return f'<p><img alt="{html.escape(title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></p>\n'
