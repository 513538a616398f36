"""The sections of a report, in the order of the validation report.

Every question of the validation report has an answer, even if it is "not assessable".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from atft_pipeline.diagnostics.experiments.plan import ExperimentAdvice
from atft_pipeline.diagnostics.questions import Question
from atft_pipeline.diagnostics.report.attribution_tables import attribution_tables, not_assessable
from atft_pipeline.diagnostics.report.diagnosis import SHOWN_CAUSES, SHOWN_PROBABILITY, STATUS_WORDS, Diagnosis
from atft_pipeline.diagnostics.report.markdown import figure, table, table_of
from atft_pipeline.diagnostics.rule import Group, Rule
from atft_pipeline.diagnostics.signal import Signals
from atft_pipeline.inspection.attribution import Attribution, Missing

FINAL_FIGURES = (
    "sharpe_daily", "sharpe_se", "sharpe_daily_net", "sharpe_annualised", "ic_mean", "rank_ic_mean", "rank_icir",
    "max_drawdown", "turnover_mean", "psr_0", "sessions",
)  # fmt: skip

Section = tuple[str, str]
"""Title and markdown body."""


def to_markdown(diagnosis: Diagnosis) -> str:
    """The whole report."""
    return (
        f"# {diagnosis.title}\n\n" + "\n\n".join(f"## {title}\n\n{body}" for title, body in sections(diagnosis)) + "\n"
    )


def sections(diagnosis: Diagnosis) -> list[Section]:
    """Title and markdown of every section, in the order of the validation report."""
    return [
        ("Key finding", f"**{diagnosis.headline}**"),
        ("Final results", _final_results(diagnosis)),
        ("Stability", _stability(diagnosis.signals)),
        (
            "Gradient flow",
            _rules_of(diagnosis, ("gradients",)) + f"\n\nEarly to late l2: {_shown(diagnosis, 'gradient_summary')}.",
        ),
        ("Plateau analysis", _rules_of(diagnosis, ("curves", "learning rate"))),
        ("Causes with evidence", _causes(diagnosis)),
        ("Probes", _probes(diagnosis)),
        ("Decision points answered", _decision_points(diagnosis)),
        ("Recommended next steps", _next_steps(diagnosis)),
        ("Experiments", _experiments(diagnosis.experiments, diagnosis.results)),
        ("Comparison with earlier runs", _compared(diagnosis.siblings)),
        ("Costs, capacity and exposures", _attributions(diagnosis.attributions)),
        ("What was validated and what was not", _coverage(diagnosis)),
    ]


def _final_results(diagnosis: Diagnosis) -> str:
    verdict = f"Verdict: {diagnosis.verdict_line}"
    verdict += "".join(f"\n\nWarning: {warning}" for warning in diagnosis.warnings)
    splits = {name: s for name, s in diagnosis.final.items() if isinstance(s, Mapping)}
    if not splits:
        by_epoch = _shown(diagnosis, "sharpe_by_epoch")
        return f"{verdict}\n\nValidation Sharpe ({diagnosis.record.slice}): {by_epoch}. No final figures were written."
    rows = [[name] + [figure(split.get(name)) for split in splits.values()] for name in FINAL_FIGURES]
    return (
        f"{verdict}\n\n{table(['figure', *splits], rows)}\n\n"
        f"Validation Sharpe ({diagnosis.record.slice}) by epoch: {_shown(diagnosis, 'sharpe_by_epoch')}."
    )


def _attributions(attributions: Mapping[str, Attribution | Missing]) -> str:
    blocks = [f"### {title}\n\n{table_of(rows)}" for title, rows in attribution_tables(attributions).items() if rows]
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
    return table(["measure", "value"], [[label, figure(signals.get(name))] for label, name in names.items()])


def _rules_of(diagnosis: Diagnosis, groups: Sequence[Group]) -> str:
    rows = [[f.cause, STATUS_WORDS[f.status], f.evidence] for f in diagnosis.findings if f.group in groups]
    return table(["cause", "seen", "evidence"], rows)


def _causes(diagnosis: Diagnosis) -> str:
    ranking, evidence = diagnosis.ranking, {f.rule: f for f in diagnosis.findings}
    rows = [
        [f"{ranking.healthy:.2f}", "nothing is wrong", "", ""],
        [f"{ranking.unknown:.2f}", "an unknown cause", "", ""],
    ]
    for cause in ranking.causes:
        if cause.probability >= SHOWN_PROBABILITY or cause in ranking.causes[:SHOWN_CAUSES]:
            reasons = "; ".join(evidence[rule].evidence for rule in cause.evidence[:3])
            rows.append([f"{cause.probability:.2f}", cause.name, reasons or "none", cause.probe])
    ranked = table(["probability", "cause", "evidence", "probe"], sorted(rows, key=lambda row: row[0], reverse=True))
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
        return f"None was run: `{diagnosis.probe_command}` runs those of the three most probable causes."
    rows = []
    for probe in diagnosis.probes:
        measured = ", ".join(f"{name} {figure(value)}" for name, value in (probe.get("figures") or {}).items())
        rows.append(
            [str(probe.get("probe")), measured or f"not made: {probe.get('not_made')}", figure(probe.get("seconds"))]
        )
    return table(["probe", "measured", "seconds"], rows)


def _compared(siblings: Sequence[Mapping[str, str]]) -> str:
    if not siblings:
        return "This run has no sibling: no other run of its dataset lies in the same folder."
    return table_of(siblings)


def _decision_points(diagnosis: Diagnosis) -> str:
    rows = [[question.text, *_answer(question, rules, diagnosis)] for question, rules in _by_question(diagnosis.rules)]
    return table(["question", "answer", "on the evidence of"], rows)


def _by_question(rules: Sequence[Rule]) -> list[tuple[Question, list[Rule]]]:
    """Questions in the order of their first rules."""
    by_question: dict[Question, list[Rule]] = {}
    for rule in rules:
        by_question.setdefault(rule.question, []).append(rule)
    return list(by_question.items())


def _answer(question: Question, rules: Sequence[Rule], diagnosis: Diagnosis) -> tuple[str, str]:
    of_question = {rule.id for rule in rules}
    observations = {rule.id for rule in rules if rule.severity == "observation"}
    findings = [f for f in diagnosis.findings if f.rule in of_question]
    fired = [f for f in findings if f.status == "fired" and f.rule not in observations]
    unassessed = [f for f in findings if f.status == "not_assessable"]
    if fired:
        veto = "" if any(f.decisive for f in fired) else ", not decisive"
        return question.fired + veto, "; ".join(f.evidence for f in fired)
    if len(unassessed) == len(findings):
        return "not assessable", "; ".join(dict.fromkeys(f.evidence for f in unassessed))
    partly = f" ({len(unassessed)} of {len(findings)} rules not assessable)" if unassessed else ""
    return question.quiet + partly, "; ".join(f.evidence for f in findings if f.status != "not_assessable")


def _next_steps(diagnosis: Diagnosis) -> str:
    """Next steps: first those of the leading cause's rules, then the others."""
    leading = diagnosis.ranking.causes[0].evidence if diagnosis.ranking.conclusion == "cause" else ()
    by_command: dict[str, str] = {}
    for finding in sorted(diagnosis.causes, key=lambda f: leading.index(f.rule) if f.rule in leading else len(leading)):
        if finding.decisive:
            by_command.setdefault(_sentence_and_command(finding.next_step)[1] or finding.next_step, finding.next_step)
    steps = list(by_command.values())
    if diagnosis.ranking.conclusion == "inconclusive" and not diagnosis.probes:
        steps.append(f"measure what would decide: `{diagnosis.probe_command}`")
    if not steps:
        return "The record asks for none."
    return "\n".join(f"{number}. {_as_code(step)}" for number, step in enumerate(steps, start=1))


def _as_code(step: str) -> str:
    """A next step with its command, if it has one, on a line of its own."""
    sentence, command = _sentence_and_command(step)
    return f"{sentence}:\n\n   {command}\n" if command else step


def _sentence_and_command(step: str) -> tuple[str, str]:
    sentence, separator, command = step.rpartition(": `")
    return (sentence, f"`{command}") if separator and command.endswith("`") else (step, "")


def _experiments(experiments: Sequence[ExperimentAdvice], results: Sequence[Mapping[str, str]]) -> str:
    made = [f"### Results\n\n{table_of(results)}"] if results else []
    return "\n\n".join([*made, _advice(experiments)])


def _advice(experiments: Sequence[ExperimentAdvice]) -> str:
    words = {True: "**asked for**", False: "not asked for", None: "cannot be told"}
    return "\n\n".join(
        f"### {e.id}. {e.title}: {words[e.asked_for]}\n\nWhy: {e.why}.\n\nIt would {e.changes or 'change nothing'}."
        f"\n\n```\n{e.command}\n```"
        for e in experiments
    )


def _coverage(diagnosis: Diagnosis) -> str:
    def listed(status: str) -> str:
        return ", ".join(f"`{f.rule}`" for f in diagnosis.findings if f.status == status) or "none"

    files = "\n".join(f"- {item}" for item in diagnosis.missing) or "- nothing"
    return (
        f"Assessed and not seen: {listed('not_fired')}.\n\nSeen: {listed('fired')}.\n\nNot assessable, which does"
        f" not mean fine: {listed('not_assessable')}.\n\nFiles that could not be used:\n\n{files}\n\n"
        "Gradients alone do not show whether a component contributes. The probe `ablate` does: it permutes the"
        " component's output over the stocks and measures the IC that is lost."
    )


def _shown(diagnosis: Diagnosis, name: str) -> str:
    value = diagnosis.signals.get(name)
    return "not measured" if value is None else str(value)
