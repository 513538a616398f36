"""A diagnosis as a person reads it: markdown for the UI, one self-contained HTML file with plots, one table of rows.

Sections stand in the order of the validation report, whose questions are all answered, if only by "not assessable".
"""

from __future__ import annotations

import base64
import html
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from atft_pipeline.diagnostics.experiments.commands import ExperimentAdvice
from atft_pipeline.diagnostics.posterior import Ranking
from atft_pipeline.diagnostics.report.attribution_tables import attribution_tables, not_assessable
from atft_pipeline.diagnostics.rules.rule import RULES, Finding, Group
from atft_pipeline.diagnostics.signals.recorded import Signals
from atft_pipeline.evaluation.attribution import Attribution, Missing
from atft_pipeline.runs.reader import Record
from atft_pipeline.storage.atomic import replacing

STATUS_WORDS = {"fired": "yes", "not_fired": "no", "not_assessable": "not assessable"}
FINAL_FIGURES = (
    "sharpe_daily", "sharpe_se", "sharpe_daily_net", "sharpe_annualised", "ic_mean", "rank_ic_mean", "rank_icir",
    "max_drawdown", "turnover_mean", "psr_0", "sessions",
)  # fmt: skip

SHOWN_CAUSES, SHOWN_PROBABILITY = 3, 0.02

Section = tuple[str, str]
"""Title and markdown body."""


@dataclass(frozen=True)
class ReportPaths:
    findings: Path
    markdown: Path
    html: Path


@dataclass(frozen=True)
class Diagnosis:
    """What one run's record says about why it ended as it did."""

    record: Record
    """What all of it was read from, still open."""
    final: dict[str, Any]
    verdict_line: str
    warnings: list[str]
    """What the verdict warns of, whatever its status."""
    signals: Signals
    findings: list[Finding]
    ranking: Ranking
    experiments: list[ExperimentAdvice]
    results: list[dict[str, str]]
    """Of the experiments that were run, a row each."""
    probes: list[dict[str, Any]]
    """What the probes made of this run measured, or why one could not be made."""
    earlier: list[dict[str, str]]
    """Other runs beside this one, a row each; read for comparison alone, no figure of them enters anything."""
    attributions: Mapping[str, Attribution | Missing]
    """Split -> what its return is made of and would cost."""
    missing: list[str]
    headline: str

    @property
    def run_dir(self) -> Path:
        return self.record.run_dir

    @property
    def causes(self) -> list[Finding]:
        """Fired findings that call for something, the decisive ones first, each part in the table's order."""
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

    def to_markdown(self) -> str:
        head = f"# Diagnosis of {self.record.run.get('name') or self.run_dir.name}\n\n"
        return head + "\n\n".join(f"## {title}\n\n{body}" for title, body in self.sections()) + "\n"

    def sections(self) -> list[Section]:
        return [
            ("Key finding", f"**{self.headline}**"),
            ("Final results", _final_results(self)),
            ("Stability", _stability(self.signals)),
            (
                "Gradient flow",
                _rules_of(self, ("gradients",)) + f"\n\nEarly to late l2: {_shown(self, 'gradient_summary')}.",
            ),
            ("Plateau analysis", _rules_of(self, ("curves", "learning rate"))),
            ("Causes with evidence", _causes(self)),
            ("Probes", _probes(self)),
            ("Decision points answered", _decision_points(self)),
            ("Recommended next steps", _next_steps(self)),
            ("Experiments", _experiments(self.experiments, self.results)),
            ("Comparison with earlier runs", _compared(self.earlier)),
            ("Costs, capacity and exposures", _attributions(self.attributions)),
            ("What was validated and what was not", _coverage(self)),
        ]


# Headline --------------------------------------------------------------------------------------------------------


def headline(record: Record, signals: Signals, findings: Sequence[Finding], ranking: Ranking) -> str:
    """The most important thing about the run in one or two sentences, with its figures."""
    state, figures = _state(record), _figures(signals, record)
    proven = [f for f in findings if f.decisive and f.status == "fired" and f.severity == "invalid"]
    evidence = {f.rule: f.evidence for f in findings}
    said = ranking.sentence
    if ranking.conclusion == "cause" and ranking.causes[0].evidence:
        said = f"{said} Evidence: {evidence[ranking.causes[0].evidence[0]]}."
    ended = [f for f in findings if f.status == "fired" and f.severity == "failure"]
    if ended and ended[0].evidence not in said:
        said = f"{ended[0].cause[0].upper()}{ended[0].cause[1:]}: {ended[0].evidence}. {said}"
    blind = _blind(sum(f.status == "not_assessable" for f in findings))
    if proven:
        return f"{state}Invalid: the Sharpe must not be read: {proven[0].cause} ({proven[0].evidence}). {said}{blind}"
    return f"{state}{figures} {said}{blind}"


def _state(record: Record) -> str:
    if record.state == "running":
        return f"Still training ({record.epochs_done} of {record.epochs_planned} epochs). "
    if record.run.get("status") == "interrupted":
        return f"Interrupted ({record.epochs_done} of {record.epochs_planned} epochs), start it again to go on. "
    return ""


def _figures(signals: Signals, record: Record) -> str:
    sharpe, se, demanded = (signals.get(name) for name in ("sharpe", "sharpe_se", "sharpe_demanded"))
    if not isinstance(sharpe, float) or not isinstance(demanded, float):
        return "No Sharpe was measured."
    interval = f" ± {se:.4f}" if isinstance(se, float) else ""
    verb = "above" if sharpe > demanded else "not above"
    is_early = demanded != record.criterion_sharpe
    milestone = f", the milestone before the criterion's epoch {record.criterion_epoch}" if is_early else ""
    ics = ", ".join(
        f"{label} {value:.4f}"
        for label, name in (("IC", "ic_last"), ("RankIC", "rank_ic_last"))
        if isinstance(value := signals.get(name), float)
    )
    return (
        f"Sharpe {sharpe:.4f}{interval} at epoch {signals['sharpe_epoch']:.0f} (validation, {record.slice}, gross) is"
        f" {verb} {demanded:.2f}{milestone}{'; ' + ics if ics else ''}."
    )


def _blind(count: int) -> str:
    return f" {count} rules could not be assessed." if count else ""


# Sections --------------------------------------------------------------------------------------------------------


def _final_results(diagnosis: Diagnosis) -> str:
    verdict = f"Verdict: {diagnosis.verdict_line}"
    verdict += "".join(f"\n\nWarning: {warning}" for warning in diagnosis.warnings)
    splits = {name: s for name, s in diagnosis.final.items() if isinstance(s, Mapping)}
    if not splits:
        by_epoch = _shown(diagnosis, "sharpe_by_epoch")
        return f"{verdict}\n\nValidation Sharpe ({diagnosis.record.slice}): {by_epoch}. No final figures were written."
    rows = [[name] + [_number(split.get(name)) for split in splits.values()] for name in FINAL_FIGURES]
    return (
        f"{verdict}\n\n{_table(['figure', *splits], rows)}\n\n"
        f"Validation Sharpe ({diagnosis.record.slice}) by epoch: {_shown(diagnosis, 'sharpe_by_epoch')}."
    )


def _attributions(attributions: Mapping[str, Attribution | Missing]) -> str:
    blocks = [
        f"### {title}\n\n{_table(list(rows[0]), [list(row.values()) for row in rows])}"
        for title, rows in attribution_tables(attributions).items()
        if rows
    ]
    if reasons := not_assessable(attributions):
        blocks.append("Not assessable:\n\n" + "\n".join(f"- {reason}" for reason in reasons))
    return "\n\n".join(blocks)


def _stability(signals: Signals) -> str:
    names = {
        "epochs done": "epochs_done",
        "epochs planned": "epochs_planned",
        "values not finite": "non_finite_losses",
        "degeneracy events": "degeneracy_events",
        "degeneracy resets": "degeneracy_resets",
        "gradient warnings": "gradient_warnings",
        "share of steps clipped": "clipped_share",
        "share of time waiting for data": "loader_wait_share",
        "std of scores within a session, targets 1": "score_dispersion",
        "live features": "live_features",
        "features": "features",
    }
    return _table(["measure", "value"], [[label, _number(signals.get(name))] for label, name in names.items()])


def _rules_of(diagnosis: Diagnosis, groups: Sequence[Group]) -> str:
    rows = [[f.cause, STATUS_WORDS[f.status], f.evidence] for f in diagnosis.findings if f.group in groups]
    return _table(["cause", "seen", "evidence"], rows)


def _causes(diagnosis: Diagnosis) -> str:
    ranking, evidence = diagnosis.ranking, {f.rule: f for f in diagnosis.findings}
    rows = [
        [f"{ranking.healthy:.2f}", "nothing is wrong", "", ""],
        [f"{ranking.unknown:.2f}", "a cause not known", "", ""],
    ]
    for cause in ranking.causes:
        if cause.probability >= SHOWN_PROBABILITY or cause in ranking.causes[:SHOWN_CAUSES]:
            told = "; ".join(evidence[rule].evidence for rule in cause.evidence[:3])
            rows.append([f"{cause.probability:.2f}", cause.name, told or "none", cause.probe])
    ranked = _table(["probability", "cause", "evidence", "probe"], sorted(rows, key=lambda row: row[0], reverse=True))
    return f"{ranking.sentence}\n\n{ranked}\n\n### Rules that fired\n\n{_fired(diagnosis)}"


def _fired(diagnosis: Diagnosis) -> str:
    if not diagnosis.causes:
        return "None."
    lines = []
    for number, cause in enumerate(diagnosis.causes, start=1):
        note = "" if cause.decisive else " (not decisive: the evaluation is invalid)"
        lines.append(
            f"{number}. **{cause.cause}** [{cause.severity}]{note}: {cause.evidence}. Fired on: `{cause.condition}`."
        )
    return "\n".join(lines)


def _probes(diagnosis: Diagnosis) -> str:
    if not diagnosis.probes:
        return f"None were made: `{_with_probes(diagnosis)}` makes those of the three most probable causes."
    rows = []
    for probe in diagnosis.probes:
        measured = ", ".join(f"{name} {_figure(value)}" for name, value in (probe.get("figures") or {}).items())
        rows.append(
            [str(probe.get("probe")), measured or f"not made: {probe.get('not_made')}", _number(probe.get("seconds"))]
        )
    return _table(["probe", "measured", "seconds"], rows)


def _with_probes(diagnosis: Diagnosis) -> str:
    return f"atft diagnose {shlex.quote(str(diagnosis.run_dir))} --probes leading"


def _figure(value: object) -> str:
    return value if isinstance(value, str) else _number(value)


def _compared(earlier: Sequence[Mapping[str, str]]) -> str:
    if not earlier:
        return "No other run lies beside this one."
    return _table(list(earlier[0]), [list(row.values()) for row in earlier])


def _decision_points(diagnosis: Diagnosis) -> str:
    lines: dict[str, list[Finding]] = {rule.report_line: [] for rule in RULES}
    for finding in diagnosis.findings:
        lines[finding.report_line].append(finding)
    return _table(["question", "answer", "on the evidence of"], [[q, *_answer(q, fs)] for q, fs in lines.items()])


AFFIRMATIVE_WHEN_QUIET = (
    "Is the Sharpe this run's own?",
    "Does the Sharpe depend on the weights?",
    "Is the criterion decided?",
    "Is the run whole, repeatable and fed in time?",
    "Do the features reach the model as the dataset has them?",
    "Is the dataset what its source gives?",
    "Does every component contribute?",
)
"""Questions whose rules fire for a no."""
OBSERVATIONS = frozenset(rule.id for rule in RULES if rule.severity == "observation")
"""Rules that answer nothing by themselves."""


def _answer(question: str, findings: Sequence[Finding]) -> tuple[str, str]:
    fired = [f for f in findings if f.status == "fired" and f.rule not in OBSERVATIONS]
    blind = [f for f in findings if f.status == "not_assessable"]
    yes, no = ("no", "yes") if question in AFFIRMATIVE_WHEN_QUIET else ("yes", "no")
    if fired:
        veto = "" if any(f.decisive for f in fired) else ", not decisive"
        return yes + veto, "; ".join(f.evidence for f in fired)
    if len(blind) == len(findings):
        return "not assessable", "; ".join(dict.fromkeys(f.evidence for f in blind))
    partly = f" ({len(blind)} of {len(findings)} rules not assessable)" if blind else ""
    return no + partly, "; ".join(f.evidence for f in findings if f.status != "not_assessable")


def _next_steps(diagnosis: Diagnosis) -> str:
    """What the leading cause's rules ask for first, then the others'."""
    leading = diagnosis.ranking.causes[0].evidence if diagnosis.ranking.conclusion == "cause" else ()
    by_command: dict[str, str] = {}
    for finding in sorted(diagnosis.causes, key=lambda f: leading.index(f.rule) if f.rule in leading else len(leading)):
        if finding.decisive:
            by_command.setdefault(finding.next_step.partition(": atft ")[2] or finding.next_step, finding.next_step)
    steps = list(by_command.values())
    if diagnosis.ranking.conclusion == "inconclusive" and not diagnosis.probes:
        steps.append(f"measure what would decide: {_with_probes(diagnosis)}")
    if not steps:
        return "None that the record asks for."
    return "\n".join(f"{number}. {_as_code(step)}" for number, step in enumerate(steps, start=1))


def _as_code(step: str) -> str:
    """The command of a next step, where it ends in one, set as code."""
    text, separator, command = step.partition(": atft ")
    return f"{text}:\n\n   `atft {command}`\n" if separator else step


def _experiments(experiments: Sequence[ExperimentAdvice], results: Sequence[Mapping[str, str]]) -> str:
    made = [f"### Results\n\n{_table(list(results[0]), [list(row.values()) for row in results])}"] if results else []
    return "\n\n".join([*made, _advice(experiments)])


def _advice(experiments: Sequence[ExperimentAdvice]) -> str:
    words = {True: "**asked for**", False: "not asked for", None: "cannot be told"}
    return "\n\n".join(
        f"### {e.id}. {e.title}: {words[e.asked_for]}\n\nWhy: {e.why}.\n\n```\n{e.command}\n```\n\nWith Dagster:"
        f"\n\n```\n{e.dagster}\n```"
        for e in experiments
    )


def _coverage(diagnosis: Diagnosis) -> str:
    def listed(status: str) -> str:
        return ", ".join(f"`{f.rule}`" for f in diagnosis.findings if f.status == status) or "none"

    files = "\n".join(f"- {item}" for item in diagnosis.missing) or "- nothing"
    return (
        f"Assessed and not seen: {listed('not_fired')}.\n\nSeen: {listed('fired')}.\n\nNot assessable, which does"
        f" not mean fine: {listed('not_assessable')}.\n\nFiles that could not be used:\n\n{files}\n\n"
        "Gradients alone do not decide whether a component contributes: the probe `ablate` does, which permutes its"
        " output over the stocks and measures the IC."
    )


def _shown(diagnosis: Diagnosis, name: str) -> str:
    value = diagnosis.signals.get(name)
    return "not measured" if value is None else str(value)


def _number(value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.4g}"
    return "not measured"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# Files -----------------------------------------------------------------------------------------------------------


def _pictures(diagnosis: Diagnosis) -> dict[str, dict[str, bytes]]:
    """Section -> title -> PNG."""
    from atft_pipeline.diagnostics.report.attribution_plots import draw_attributions  # half of what a diagnosis imports
    from atft_pipeline.diagnostics.report.plots import draw

    drawn = draw(diagnosis.record)
    by_section = {name: {t: drawn[t] for t in titles if t in drawn} for name, titles in PLOTS_OF_SECTION.items()}
    return by_section | {"Costs, capacity and exposures": draw_attributions(diagnosis.attributions)}


def write_report(run_dir: Path, diagnosis: Diagnosis) -> ReportPaths:
    """`findings.parquet`, `report.md` and `report.html` of a run, each replaced in one step."""
    paths = ReportPaths(run_dir / "findings.parquet", run_dir / "report.md", run_dir / "report.html")
    pictures = _pictures(diagnosis)
    with replacing(paths.findings) as temporary:
        pq.write_table(pa.Table.from_pylist([asdict(finding) for finding in diagnosis.findings]), temporary)
    with replacing(paths.markdown) as temporary:
        temporary.write_text(diagnosis.to_markdown(), encoding="utf-8")
    with replacing(paths.html) as temporary:
        temporary.write_text(_page(diagnosis, pictures), encoding="utf-8")
    return paths


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


def _page(diagnosis: Diagnosis, pictures: Mapping[str, Mapping[str, bytes]]) -> str:
    title = html.escape(f"Diagnosis of {diagnosis.record.run.get('name') or diagnosis.run_dir.name}")
    body = []
    for name, text in diagnosis.sections():
        shown = "".join(_image(plot, png) for plot, png in pictures.get(name, {}).items())
        body.append(f"<h2>{html.escape(name)}</h2>\n{shown}{markdown_to_html(text)}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"</head><body><h1>{title}</h1>\n{''.join(body)}</body></html>\n"
    )


def _image(title: str, png: bytes) -> str:
    return f'<p><img alt="{html.escape(title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></p>\n'


def markdown_to_html(text: str) -> str:
    """HTML of the markdown this module writes: paragraphs, tables, lists, level-3 headings, fences, bold and code."""
    blocks: list[str] = []
    for block in text.split("\n\n"):
        lines = block.strip("\n").split("\n")
        first = lines[0].strip()
        if not first:
            continue
        if first.startswith("```"):
            blocks.append(f"<pre>{html.escape(chr(10).join(lines[1:-1]))}</pre>")
        elif first.startswith("### "):
            blocks.append(f"<h3>{_inline(first[4:])}</h3>")
        elif first.startswith("| "):
            blocks.append(_html_table(lines))
        elif first.startswith("- "):
            blocks.append("<ul>" + "".join(f"<li>{_inline(line[2:])}</li>" for line in lines) + "</ul>")
        else:
            blocks.append("<p>" + "<br>".join(_inline(line.strip()) for line in lines) + "</p>")
    return "\n".join(blocks)


def _html_table(lines: Sequence[str]) -> str:
    def cells(line: str) -> list[str]:
        escaped = line.strip().removeprefix("| ").removesuffix(" |").replace("\\|", "\0")
        return [_inline(cell.replace("\0", "|")) for cell in escaped.split(" | ")]

    header = "".join(f"<th>{cell}</th>" for cell in cells(lines[0]))
    rows = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells(line)) + "</tr>" for line in lines[2:])
    return f"<table><tr>{header}</tr>{rows}</table>"


def _inline(text: str) -> str:
    """Escaped text with `code` and **bold**; code is never read as bold."""
    parts = html.escape(text, quote=False).split("`")
    for index, part in enumerate(parts):
        if index % 2:
            parts[index] = f"<code>{part}</code>"
        else:
            pieces = part.split("**")
            parts[index] = "".join(f"<b>{p}</b>" if i % 2 else p for i, p in enumerate(pieces))
    return "".join(parts)
