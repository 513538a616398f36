"""One topic module is enough for a new diagnosis: its signals, its rule and its line in the report."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from run_directories import healthy

from atft_pipeline.diagnostics import topics
from atft_pipeline.diagnostics.diagnose import diagnose
from atft_pipeline.diagnostics.questions import Question
from atft_pipeline.diagnostics.report.sections import sections
from atft_pipeline.diagnostics.rule import Rule, all_of
from atft_pipeline.diagnostics.rule_table import REPORT_ORDER, RULES, TOPICS, table_of
from atft_pipeline.diagnostics.signal import SignalTable
from atft_pipeline.inspection.reader import Record

SLEEPY = Rule(
    id="sleepy",
    cause="the epochs take longer than a made-up person waits",
    group="runtime",
    severity="defect",
    when=all_of(("longest_epoch_s", ">", 5)),
    evidence="the longest epoch took {longest_epoch_s:.0f} s",
    next_step="sleep: {rerun}",
    question=Question("Does a made-up person wait?", quiet="yes"),
    channel="sleep",
    suspects=("starved_loader",),
)


def made_up(*rules: Rule) -> ModuleType:
    """A topic module with one signal."""
    topic = ModuleType("made_up")
    signals = SignalTable()

    @signals.add
    def longest_epoch_s(record: Record) -> float | None:
        return max(record.curve("epoch_s").values(), default=None)

    vars(topic).update(RULES=rules, SIGNALS=signals)
    return topic


def test_a_new_diagnosis_is_one_topic_that_shows_in_findings_posterior_and_report(tmp_path: Path) -> None:
    run_dir = healthy().write(tmp_path / "run")
    without, with_it = diagnose(run_dir), diagnose(run_dir, table=table_of([*TOPICS, made_up(SLEEPY)]))
    assert with_it.findings[:-1] == without.findings
    finding = with_it.findings[-1]
    assert (finding.rule, finding.status, finding.evidence) == ("sleepy", "fired", "the longest epoch took 10 s")
    before, after = (
        next(cause for cause in diagnosis.ranking.causes if cause.id == "starved_loader")
        for diagnosis in (without, with_it)
    )
    assert after.probability > 2 * before.probability
    assert (before.evidence, after.evidence) == ((), ("sleepy",))
    report = dict(sections(with_it))
    assert "| Does a made-up person wait? | no | the longest epoch took 10 s |" in report["Decision points answered"]
    assert "1. sleep:" in report["Recommended next steps"]
    assert SLEEPY.cause in report["Causes with evidence"]


def test_every_topic_module_is_in_the_table() -> None:
    modules = {path.stem for path in Path(topics.__path__[0]).glob("*.py")} - {"__init__"}
    assert {topic.__name__.rpartition(".")[2] for topic in TOPICS} == modules
    assert len(TOPICS) == len(modules)


def test_rules_are_reported_in_the_order_that_is_written_down() -> None:
    assert tuple(rule.id for rule in RULES) == REPORT_ORDER


def test_two_topics_with_the_same_rule_or_signal_are_refused() -> None:
    with pytest.raises(ValueError, match="two topics define 'sharpe_term_absent'"):
        table_of([*TOPICS, made_up(*(rule for rule in RULES if rule.id == "sharpe_term_absent"))])
    with pytest.raises(ValueError, match="two topics define 'longest_epoch_s'"):
        table_of([made_up(), made_up(SLEEPY)])
