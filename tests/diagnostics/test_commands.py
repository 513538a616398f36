"""Commands in a report: the library's own, or those of the style that a caller passes in."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from atft_process import REPO
from run_directories import Tables, healthy

from assets.diagnosis.commands import DAGSTER, EXPERIMENT_JOB, EXPERIMENT_OP
from atft_pipeline.diagnostics.diagnose import Diagnosis, diagnose
from atft_pipeline.diagnostics.report.sections import to_markdown
from atft_pipeline.diagnostics.rule_table import RULES

ORCHESTRATOR = re.compile(r"dagster|dg launch|materiali[sz]e|\bop config|stock_graph`|\bmodel_\d+ep\b", re.IGNORECASE)
"""Words that only whoever schedules the library may use: its name, its commands, its assets."""


def light_sharpe(tables: Tables) -> Tables:
    """A run for which every style has a next step to name."""
    tables.run["live_features"] = 55
    return tables


@pytest.fixture(scope="module")
def of_dagster(tmp_path_factory: pytest.TempPathFactory) -> Diagnosis:
    run_dir = light_sharpe(healthy(0.0)).write(tmp_path_factory.mktemp("a run") / "failed")
    return diagnose(run_dir, commands=DAGSTER)


def test_the_library_names_no_orchestrator() -> None:
    library = REPO / "atft_pipeline"
    naming = [
        file.relative_to(library).as_posix()
        for file in library.rglob("*.py")
        if ORCHESTRATOR.search(file.read_text(encoding="utf-8"))
    ]
    assert not naming


def test_a_report_names_the_commands_of_its_style_alone(of_dagster: Diagnosis) -> None:
    own = diagnose(of_dagster.run_dir)
    assert not re.search("dagster|dg launch", to_markdown(own), re.IGNORECASE)
    assert "`atft dataset SOURCE" in to_markdown(own)
    assert "`dagster asset materialize --select +key:ml_dataset`" in to_markdown(of_dagster)
    assert "`dagster asset materialize --select baselines`" in to_markdown(of_dagster)
    same = [(f.rule, f.status, f.evidence) for f in own.findings]
    assert [(f.rule, f.status, f.evidence) for f in of_dagster.findings] == same


def test_an_experiment_is_one_partition_of_the_job(of_dagster: Diagnosis) -> None:
    for advice in of_dagster.experiments:
        words = shlex.split(advice.command)
        assert words[:-1] == ["dg", "launch", "--job", EXPERIMENT_JOB, "--partition", advice.id, "--config-json"]
        assert json.loads(words[-1]) == {"ops": {EXPERIMENT_OP: {"config": {"run_dir": str(of_dagster.run_dir)}}}}


def test_an_experiment_of_a_run_without_an_evaluation_is_a_training(tmp_path: Path) -> None:
    tables = healthy(0.0)
    tables.daily = []
    diagnosis = diagnose(tables.write(tmp_path / "run"), commands=DAGSTER)
    advice = next(e for e in diagnosis.experiments if e.id == "C")
    words = shlex.split(advice.command)
    assert words[:-1] == [
        "ATFT_PRESET=quick", "dagster", "asset", "materialize", "--select", "model_20ep", "--config-json",
    ]  # fmt: skip
    assert json.loads(words[-1])["ops"]["train_20ep"]["config"]["overrides"] == advice.overrides


def test_jobs_ops_and_assets_of_the_commands_exist() -> None:
    from assets.definitions import defs

    job = defs.resolve_job_def(EXPERIMENT_JOB)
    assert EXPERIMENT_OP in {node.name for node in job.nodes}
    keys = {key.to_user_string() for key in defs.resolve_asset_graph().get_all_asset_keys()}
    assert {"ml_dataset", "stock_graph", "baselines", "model_20ep"} <= keys


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_a_next_step_names_commands_and_writes_none(rule: object) -> None:
    """A command in a rule's own text would be the same in every style."""
    assert not re.search(r"`|\batft ", rule.next_step)  # type: ignore[attr-defined]
