"""The most important thing about a run, in one or two sentences."""

from __future__ import annotations

from collections.abc import Sequence

from atft_pipeline.diagnostics.posterior import Ranking
from atft_pipeline.diagnostics.rule import Finding
from atft_pipeline.diagnostics.signal import Signals
from atft_pipeline.inspection.reader import Record


def headline(record: Record, signals: Signals, findings: Sequence[Finding], ranking: Ranking) -> str:
    """The most important thing about the run in one or two sentences, with its figures."""
    state, figures = _state(record), _figures(signals, record)
    proven = [f for f in findings if f.decisive and f.status == "fired" and f.severity == "invalid"]
    evidence = {f.rule: f.evidence for f in findings}
    conclusion = ranking.sentence
    if ranking.conclusion == "cause" and ranking.causes[0].evidence:
        conclusion = f"{conclusion} Evidence: {evidence[ranking.causes[0].evidence[0]]}."
    ended = [f for f in findings if f.status == "fired" and f.severity == "failure"]
    if ended and ended[0].evidence not in conclusion:
        conclusion = f"{ended[0].cause[0].upper()}{ended[0].cause[1:]}: {ended[0].evidence}. {conclusion}"
    unassessed = _unassessed(sum(f.status == "not_assessable" for f in findings))
    if proven:
        invalid = f"Invalid: the Sharpe must not be read: {proven[0].cause} ({proven[0].evidence})."
        return f"{state}{invalid} {conclusion}{unassessed}"
    return f"{state}{figures} {conclusion}{unassessed}"


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


def _unassessed(count: int) -> str:
    return f" {count} rules could not be assessed." if count else ""
