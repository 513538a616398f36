"""The report of a diagnosis: the order of its sections, commands that can be pasted, plots, and atomic files."""

from __future__ import annotations

import base64
import html
import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import Trained
from run_directories import BASE_LR, frozen_failure, healthy

from atft_pipeline.config.overrides import parse_assignments, to_dict, with_overrides
from atft_pipeline.config.presets import preset, quick
from atft_pipeline.diagnostics.commands import ATFT
from atft_pipeline.diagnostics.diagnose import Diagnosis, diagnose, write_report
from atft_pipeline.diagnostics.posterior import rank
from atft_pipeline.diagnostics.report.headline import headline
from atft_pipeline.diagnostics.report.markdown import table, to_html
from atft_pipeline.diagnostics.report.sections import sections, to_markdown
from atft_pipeline.diagnostics.rule import assess
from atft_pipeline.diagnostics.rule_table import RULES
from atft_pipeline.inspection.reader import open_record

SECTIONS = [
    "Key finding",
    "Final results",
    "Stability",
    "Gradient flow",
    "Plateau analysis",
    "Causes with evidence",
    "Probes",
    "Decision points answered",
    "Recommended next steps",
    "Experiments",
    "Comparison with earlier runs",
    "Costs, capacity and exposures",
    "What was validated and what was not",
]


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Diagnosis:
    """A run that learns nothing worth trading, with a Sharpe term too light to matter."""
    return diagnose(healthy(0.0, {"train.loss.sharpe": 0.01}).write(tmp_path_factory.mktemp("a run") / "failed"))


def test_sections_follow_the_validation_report(failed: Diagnosis) -> None:
    assert re.findall(r"^## (.+)$", to_markdown(failed), re.MULTILINE) == SECTIONS


def test_an_interrupted_run_says_so_first_and_is_no_crash(tmp_path: Path) -> None:
    tables = healthy()
    tables.run.update(status="interrupted", reason="interrupted; epoch 3 of 20 is kept, start it again to go on")
    diagnosis = diagnose(tables.write(tmp_path / "run"))
    said = re.search(r"Interrupted \(\d+ of \d+ epochs\), start it again to go on\.", to_markdown(diagnosis))
    assert said
    assert {f.rule for f in diagnosis.findings if f.status == "fired"}.isdisjoint({"run_failed", "run_killed"})


def test_every_line_of_the_validation_report_is_answered(failed: Diagnosis) -> None:
    answers = dict(sections(failed))["Decision points answered"]
    for rule in RULES:
        assert f"| {rule.question.text} | " in answers
    assert "| Sharpe weight too low? | yes | " in answers
    assert "| Is the Sharpe this run's own? | yes (" in answers  # without its dataset some of it cannot be told


def test_causes_come_with_evidence_and_next_steps_with_commands(failed: Diagnosis) -> None:
    text = to_markdown(failed)
    for cause in failed.causes:
        assert cause.evidence in text
    assert "`atft train output/datasets/ml_dataset_d1 output/datasets/stock_graph_d1.parquet" in text


@pytest.mark.parametrize(
    ("experiment", "changed"),
    [
        ("A", {"train.schedule.name": "plateau", "train.schedule.patience": 10, "train.schedule.factor": 0.71}),
        ("B", {"train.loss.sharpe": 0.3}),
        ("C", {"model.hidden_size": 512}),
        ("D", {"train.optimizer.lr": 2e-3}),
    ],
)
def test_experiment_is_this_run_with_one_change_and_a_command(
    failed: Diagnosis, experiment: str, changed: dict[str, object]
) -> None:
    advice = next(e for e in failed.experiments if e.id == experiment)
    assert advice.overrides == changed
    assert shlex.split(advice.command) == ["atft", "experiment", str(failed.run_dir), experiment]


def test_experiment_of_a_run_without_an_evaluation_is_the_training_alone(tmp_path: Path) -> None:
    """Nothing could be compared with it."""
    tables = healthy(0.0)
    tables.daily = []
    run_dir = tables.write(tmp_path / "run")
    advice = next(e for e in diagnose(run_dir).experiments if e.id == "C")
    words = shlex.split(advice.command)
    assert words[:2] == ["atft", "train"]
    assert words[2:5] == [tables.run["dataset_path"], tables.run["graph_path"], f"{run_dir}-experiment-c"]
    assert words[5] == "--preset"
    assert words[7::2] == ["--set"] * len(words[8::2])
    config = with_overrides(preset(words[6]), parse_assignments(words[8::2]))
    expected = with_overrides(quick(), {"train.optimizer.lr": BASE_LR, "model.hidden_size": 512})
    assert to_dict(config) == to_dict(expected)


def test_experiment_of_a_phased_run_changes_the_phases_that_name_the_sharpe_term(tmp_path: Path) -> None:
    phases = [
        {"first_epoch": 1, "last_epoch": 5, "weights": {"mse": 1.0}},
        {"first_epoch": 6, "last_epoch": 20, "weights": {"sharpe": 0.01}},
    ]
    diagnosis = diagnose(healthy(0.0, {"train.loss.phases": phases}).write(tmp_path / "run"))
    config = with_overrides(quick(), next(e for e in diagnosis.experiments if e.id == "B").overrides)
    assert [config.train.loss.weights_at(epoch)["sharpe"] for epoch in (1, 6)] == [0.0, 0.3]


def test_evidence_decides_which_experiments_are_asked_for(failed: Diagnosis, tmp_path: Path) -> None:
    asked = {e.id: e.asked_for for e in failed.experiments}
    assert asked["B"] is True
    assert asked["A"] is False
    assert asked["D"] is False
    early = healthy(0.0)
    early.set_series("lr", lambda epoch: 1e-3 * 0.3**epoch)
    assert next(e for e in diagnose(early.write(tmp_path / "early")).experiments if e.id == "A").asked_for is True
    blind = healthy(0.0)
    blind.drop_series("lr")
    assert next(e for e in diagnose(blind.write(tmp_path / "blind")).experiments if e.id == "A").asked_for is None


def test_table_puts_what_fired_first(failed: Diagnosis) -> None:
    rows = failed.table()
    assert len(rows) == len(RULES)
    assert rows[0]["status"] == "yes"
    statuses = [row["status"] for row in rows]
    assert statuses == sorted(statuses, key=["yes", "not assessable", "no"].index)


def test_to_dict_is_json(failed: Diagnosis) -> None:
    content = json.loads(json.dumps(failed.to_dict(), allow_nan=False))
    assert content["fired"][0] == failed.causes[0].rule
    assert content["causes"][0]["id"] == failed.ranking.causes[0].id
    assert content["conclusion"] == failed.ranking.conclusion
    assert len(content["findings"]) == len(RULES)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: dict[str, bytes] = {}
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "img":
            source = values["src"] or ""
            self.images[values["alt"] or ""] = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        self.links += [values[name] or "" for name in ("href", "src") if name in values]
        if tag not in ("img", "br", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_files_are_complete_and_self_contained(tmp_path: Path) -> None:
    run_dir = healthy().write(tmp_path / "run")
    before = {path.name for path in run_dir.iterdir()}
    diagnosis = diagnose(run_dir)
    paths = write_report(run_dir, diagnosis)
    assert {path.name for path in run_dir.iterdir()} - before == {"findings.parquet", "report.md", "report.html"}
    assert pq.read_table(paths.findings).column("rule").to_pylist() == [rule.id for rule in RULES]
    assert paths.markdown.read_text() == to_markdown(diagnosis)
    page = _Page()
    page.feed(paths.html.read_text())
    assert page.open == []
    assert set(page.images) == {
        "Losses", "Sharpe by epoch", "IC and RankIC", "Learning rate", "Gradient l2 by component",
        "Sharpe after costs", "Sharpe by month and year",
    }  # fmt: skip
    assert all(png.startswith(b"\x89PNG") for png in page.images.values())
    assert all(link.startswith("data:") for link in page.links)


def test_report_replaces_an_earlier_one_and_reads_its_own_run_only(tmp_path: Path) -> None:
    run_dir = healthy().write(tmp_path / "run")
    write_report(run_dir, diagnose(run_dir))
    diagnosis = diagnose(run_dir)
    assert all(item.startswith("output/datasets/") for item in diagnosis.missing)
    assert write_report(run_dir, diagnosis).markdown.read_text() == to_markdown(diagnosis)


def test_report_of_the_original_failure_says_what_is_not_decisive(tmp_path: Path) -> None:
    run_dir = frozen_failure().write(tmp_path / "run")
    text = write_report(run_dir, diagnose(run_dir)).markdown.read_text()
    assert "**Invalid: " in text
    assert "not decisive" in text
    assert "not before the evaluation is valid" in text


def test_report_of_a_run_without_tables_still_says_what_is_missing(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "run.json").write_text('{"status": "failed", "reason": "RunFailure: <nan> & more"}')
    paths = write_report(run_dir, diagnose(run_dir))
    assert "- verdict.json: not written" in paths.markdown.read_text()
    assert "&lt;nan&gt; &amp; more" in paths.html.read_text()
    assert "<img" not in paths.html.read_text()


def test_a_cell_becomes_html_with_every_character_as_it_is() -> None:
    shown = to_html(table(["a", "b"], [["x | y", "`<k>`"], ["two\nlines", "a_b_c"]]))
    assert "<td>x | y</td>" in shown
    assert "<td><code>&lt;k&gt;</code></td>" in shown
    assert "<td>two lines</td>" in shown
    assert "<td>a_b_c</td>" in shown
    assert to_html("**bold** text") == "<p><strong>bold</strong> text</p>\n"
    assert to_html("1. first:\n\n   `command`\n\n2. second").count("<li>") == 2
    assert to_html("```\n--set 'x=\"1\"' & more\n```") == (
        "<pre><code>--set 'x=&quot;1&quot;' &amp; more\n</code></pre>\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        "<img src=x onerror=alert(1)>", "![x](http://x)", "[x](http://x)", "<http://x>", "[x]: http://x", "&lt;b&gt;",
        "a\\_b", "> said", "    four spaces",
    ],
)  # fmt: skip
def test_text_of_a_record_is_never_markup(text: str) -> None:
    """An error's own words, a path: no picture, link or entity comes of them."""
    page = _Page()
    shown = to_html(text)
    page.feed(shown)
    assert (page.images, page.links) == ({}, [])
    assert html.escape(text.strip()) in shown


def test_a_quiet_rule_says_its_figures_and_not_its_accusation(tmp_path: Path) -> None:
    diagnosis = diagnose(healthy().write(tmp_path / "run"))
    for rule, finding in zip(RULES, diagnosis.findings, strict=True):
        if finding.status == "not_fired":
            assert finding.evidence.startswith(rule.needs[0].replace("_", " "))


def test_an_observation_answers_no_question(failed: Diagnosis) -> None:
    (clipping,) = (rule for rule in RULES if rule.id == "clipping_bites")
    (finding,) = assess({"clipped_share": 1.0}, [clipping])
    assert (finding.status, finding.severity) == ("fired", "observation")
    observed = dict(sections(replace(failed, rules=[clipping], findings=[finding], ranking=rank([]))))
    answered = f"| {finding.report_line} | no | {finding.evidence} |"
    assert answered in observed["Decision points answered"]


@pytest.mark.parametrize("warnings", [5, None, "text", {"a": 1}])
def test_warnings_of_another_shape_are_no_error(tmp_path: Path, warnings: object) -> None:
    tables = healthy()
    tables.verdict["warnings"] = warnings
    assert diagnose(tables.write(tmp_path / "run")).warnings == []


def test_a_recorded_error_stands_in_the_headline(tmp_path: Path) -> None:
    tables = healthy()
    tables.run.update(status="failed", reason="RuntimeError: the source went away", epochs_done=0)
    tables.series, tables.evals, tables.daily, tables.predictions, tables.verdict = [], [], [], {}, {}
    diagnosis = diagnose(tables.write(tmp_path / "run"))
    assert diagnosis.ranking.causes[0].id == "crashed"
    assert diagnosis.headline.count("the source went away") == 1
    record = open_record(diagnosis.run_dir)
    undecided = replace(diagnosis.ranking, conclusion="inconclusive", sentence="Inconclusive.")
    said = headline(record, diagnosis.signals, diagnosis.findings, undecided)
    record.connection.close()
    assert said.count("the source went away") == 1


def test_tables_without_a_finite_value_are_named(tmp_path: Path) -> None:
    tables = healthy()
    for row in (*tables.series, *tables.evals):
        row["value"] = float("nan")
    missing = diagnose(tables.write(tmp_path / "run")).missing
    assert {item.split("/:")[0] for item in missing if "without one finite value" in item} == {"series", "evals"}


def test_the_threshold_before_the_criterions_epoch_is_called_a_milestone(tmp_path: Path) -> None:
    tables = healthy()
    tables.run["epochs_planned"] = tables.run["epochs_done"] = 5
    for name in ("series", "evals", "daily"):
        setattr(tables, name, [row for row in getattr(tables, name) if row["epoch"] <= 5])
    tables.verdict = {}
    headline = diagnose(tables.write(tmp_path / "run")).headline
    assert "the milestone before the criterion's epoch 20" in headline
    assert "milestone" not in diagnose(healthy().write(tmp_path / "whole")).headline


def test_the_command_that_builds_the_dataset_names_its_source(trained: Trained, tmp_path: Path) -> None:
    record = open_record(trained())
    dataset = shlex.quote(record.run["dataset_path"])
    assert ATFT.build_dataset(record) == f"atft dataset market {dataset}"
    record.connection.close()
    unreadable = open_record(healthy().write(tmp_path / "run"))
    assert ATFT.build_dataset(unreadable).startswith("atft dataset SOURCE ")
    unreadable.connection.close()
