"""model_120ep starts only when the newest verdict of the newest model_20ep of the same inputs is `passed`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster_runs import EVER, NEVER, failures, made, make, outcomes, training

import atft_pipeline.training.train
from assets.training.gate_history import GATE_MODEL, last_check, last_materialization
from atft_pipeline.config.overrides import with_overrides
from atft_pipeline.config.presets import preset
from atft_pipeline.errors import RunFailure
from atft_pipeline.runs.keys import config_key
from atft_pipeline.training.plan import plan_run

pytestmark = pytest.mark.slow(reason="assets made in this process")

LONG = 'key:"model_120ep"'


@pytest.fixture
def work(upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(upstream / "output", tmp_path / "output", symlinks=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATFT_PRESET", "quick")
    monkeypatch.delenv("ATFT_SOURCE", raising=False)
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the long run records of its overrides once it starts; 120 epochs would show no more."""
    recorded: dict[str, Any] = {}
    train = atft_pipeline.training.train.train

    def starts(settings: Any, *inputs: Any, overrides: dict[str, Any], **options: Any) -> Any:
        if settings.train.epochs < 120:
            return train(settings, *inputs, overrides=overrides, **options)
        recorded.update(overrides)
        raise RunFailure("seen enough")

    monkeypatch.setattr(atft_pipeline.training.train, "train", starts)
    return recorded


def identity(work: Path, **changed: str) -> dict[str, str]:
    """Fingerprint and configuration of the long run under test, with `changed` replaced."""
    overrides = training(120, EVER)["train_120ep"]["config"]["overrides"]
    datasets = work / "output" / "datasets"
    plan = plan_run(
        with_overrides(preset("quick"), overrides),
        (datasets / "ml_dataset_latest_full.parquet").resolve(),
        (datasets / "stock_graph_latest.parquet").resolve(),
    )
    return {
        "dataset_fingerprint": plan.dataset_manifest["fingerprint"],
        "config_key": config_key(plan.config),
    } | changed


def materialized(instance: dg.DagsterInstance, **identity: str) -> None:
    instance.report_runless_asset_event(dg.AssetMaterialization(GATE_MODEL, metadata=identity))


def checked(instance: dg.DagsterInstance, status: str, **identity: str) -> None:
    instance.report_runless_asset_event(
        dg.AssetCheckEvaluation(
            check_name="success_criterion",
            asset_key=GATE_MODEL,
            passed=status in ("passed", "not_applicable"),
            metadata={"status": status, "summary": f"{status}: of the test", **identity},
        )
    )


def refusal(instance: dg.DagsterInstance, **config: Any) -> str:
    """The sentence with which model_120ep refuses to start; fails the test when it starts."""
    result = make(LONG, instance, training(120, EVER, **config))
    assert not result.success
    assert not made(result)
    sentence = failures(result)["train_120ep"]
    assert sentence.startswith("gate shut: ")
    assert "dagster asset materialize --select model_20ep" in sentence
    assert "override_reason" in sentence
    assert not list(Path("output").glob("runs/*"))
    return sentence


def test_gate_refuses_without_any_short_run(work: Path, instance: dg.DagsterInstance) -> None:  # noqa: ARG001
    assert "model_20ep was never trained" in refusal(instance)


def test_gate_refuses_a_short_run_that_was_never_judged(work: Path, instance: dg.DagsterInstance) -> None:
    materialized(instance, **identity(work))
    assert "was never evaluated" in refusal(instance)


@pytest.mark.parametrize(
    ("status", "said"),
    [("failed", "failed (failed: of the test)"), ("invalid", "no valid verdict"), ("not_applicable", "did not apply")],
)
def test_gate_refuses_every_verdict_but_passed(
    work: Path, instance: dg.DagsterInstance, status: str, said: str
) -> None:
    materialized(instance, **identity(work))
    checked(instance, status, **identity(work))
    assert said in refusal(instance)


def test_gate_refuses_when_the_model_was_made_again_after_its_check(work: Path, instance: dg.DagsterInstance) -> None:
    checked(instance, "passed", **identity(work))
    materialized(instance, **identity(work))
    assert "older than the newest training" in refusal(instance)


@pytest.mark.parametrize(
    ("changed", "said"), [("dataset_fingerprint", "another dataset"), ("config_key", "another configuration")]
)
def test_gate_refuses_a_verdict_of_other_data_or_configuration(
    work: Path, instance: dg.DagsterInstance, changed: str, said: str
) -> None:
    materialized(instance, **identity(work, **{changed: "0" * 12}))
    checked(instance, "passed", **identity(work, **{changed: "0" * 12}))
    assert said in refusal(instance)


def test_gate_refuses_a_verdict_that_says_nothing_of_its_data(work: Path, instance: dg.DagsterInstance) -> None:
    materialized(instance, **identity(work))
    checked(instance, "passed")
    assert "another dataset" in refusal(instance)


def test_blank_override_reason_does_not_open_the_gate(work: Path, instance: dg.DagsterInstance) -> None:  # noqa: ARG001
    assert "never trained" in refusal(instance, override_reason="  ")


def test_changed_criterion_needs_a_reason(work: Path, instance: dg.DagsterInstance) -> None:  # noqa: ARG001
    result = make('key:"model_5ep"', instance, training(5, EVER, criterion_reason=None))
    assert failures(result)["train_5ep"] == (
        "model_5ep: overrides change the success criterion (criterion_sharpe -9.0 instead of 0.1);"
        " drop them, or say why in criterion_reason"
    )


def test_criterion_reason_without_a_change_is_refused(work: Path, instance: dg.DagsterInstance) -> None:  # noqa: ARG001
    result = make('key:"model_5ep"', instance, training(5, 0.1))
    assert "no override changes the success criterion" in failures(result)["train_5ep"]


def test_override_reason_belongs_to_the_gated_run_only(work: Path, instance: dg.DagsterInstance) -> None:  # noqa: ARG001
    result = make('key:"model_5ep"', instance, training(5, EVER, override_reason="because"))
    assert failures(result)["train_5ep"] == "model_5ep: override_reason only applies to model_120ep"


def test_gate_opens_for_the_verdict_of_the_same_data_and_configuration(
    work: Path,  # noqa: ARG001
    instance: dg.DagsterInstance,
    started: dict[str, Any],
) -> None:
    """The short run is made and judged in one Dagster run, the long one starts in a later one."""
    overrides = training(20, EVER)["train_20ep"]["config"]["overrides"]
    short = make('key:"model_20ep"', instance, training(20, EVER))
    assert short.success
    assert outcomes(short)["model_20ep:success_criterion"].passed

    make(LONG, instance, training(120, EVER))
    assert started["gate"].startswith("gate open: model_20ep: passed")
    assert "override_reason" not in started
    assert overrides.items() <= started.items()


def test_override_reason_opens_the_gate_and_is_recorded(
    work: Path,  # noqa: ARG001
    instance: dg.DagsterInstance,
    started: dict[str, Any],
) -> None:
    make(LONG, instance, training(120, EVER, override_reason="for the test"))
    assert started["override_reason"] == "for the test"
    assert started["gate"].startswith("gate opened by override (for the test), although model_20ep was never")


def test_failed_criterion_keeps_the_long_run_from_starting_in_the_same_run(
    work: Path,  # noqa: ARG001
    instance: dg.DagsterInstance,
) -> None:
    selection = 'key:"model_20ep" or key:"training_run_20ep" or ' + LONG
    result = make(selection, instance, training(20, NEVER) | training(120, NEVER))
    assert not result.success
    assert made(result) == {"model_20ep", "training_run_20ep"}
    assert "train_120ep" not in {event.step_key for event in result.all_events if event.is_step_start}


def test_a_check_that_was_planned_and_never_ran_is_no_evaluation(work: Path, instance: dg.DagsterInstance) -> None:
    """A later run that stops before it trains leaves the earlier verdict as it was."""
    materialized(instance, **identity(work))
    checked(instance, "passed", **identity(work))
    shutil.rmtree(work / "output" / "datasets")
    assert "train_20ep" in failures(make('key:"model_20ep"', instance, training(20, EVER)))
    assert (last_check(instance) or {})["status"] == "passed"


def test_nothing_is_known_of_an_empty_history(instance: dg.DagsterInstance) -> None:
    assert last_check(instance) is None
    assert last_materialization(instance) is None


def test_refusal_is_never_retried(work: Path, instance: dg.DagsterInstance) -> None:  # noqa: ARG001
    result = make(LONG, instance, training(120, EVER))
    (failure,) = [event for event in result.all_events if event.is_step_failure]
    assert failure.step_failure_data.user_failure_data is not None
    assert failure.step_failure_data.error is not None
    assert not [event for event in result.all_events if event.is_step_up_for_retry]
