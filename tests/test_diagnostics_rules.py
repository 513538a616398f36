"""Every rule of the table: a run that fires it, the healthy run that does not, and a record that cannot tell."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_directories import EPOCHS, Tables, frozen_failure, healthy

from atft_pipeline.diagnostics import Diagnosis, Finding, diagnose
from atft_pipeline.diagnostics.rules import RULES, Rule, assess, status_of
from atft_pipeline.diagnostics.signals import SIGNALS
from atft_pipeline.errors import InputError

WITH_SHARPE_TERM = {"train.loss.sharpe": 0.5}


def spoilt(change: Callable[[Tables], object], *, skill: float = 0.5, **overrides: object) -> Callable[[], Tables]:
    def build() -> Tables:
        tables = healthy(skill, {name.replace("__", "."): value for name, value in overrides.items()})
        change(tables)
        return tables

    return build


def _foreign_verdict_value(tables: Tables) -> None:
    tables.verdict["criterion"]["value"] = 0.0818


def _foreign_evals(tables: Tables) -> None:
    tables.set_evals("sharpe_daily", lambda epoch: 0.3 + 0.001 * epoch)
    tables.predictions.clear()


def _foreign_predictions(tables: Tables) -> None:
    tables.predictions[20] = tables.predictions[1]


def _same_sharpe(tables: Tables) -> None:
    tables.set_evals("sharpe_daily", lambda _: 0.0818)


def _constant_scores(tables: Tables) -> None:
    for row in tables.predictions[20]:
        row["score_1d"] = 0.25


def _frozen_hash(column: str) -> Callable[[Tables], None]:
    def change(tables: Tables) -> None:
        for row in tables.evals:
            row[column] = "frozen"

    return change


def _failed_item(tables: Tables) -> None:
    tables.verdict["validity"].append({"name": "permutation_earns_nothing", "passed": False, "explanation": "5 se"})


def _losses(train: Callable[[int], float], validation: Callable[[int], float]) -> Callable[[Tables], None]:
    def change(tables: Tables) -> None:
        tables.set_series("loss_weighted", train, split="train", term="total")
        tables.set_series("loss_weighted", validation, split="validation", term="total")

    return change


def _lr(rate: Callable[[int], float]) -> Callable[[Tables], None]:
    return lambda tables: tables.set_series("lr", rate)


def _gradient(component: str, l2: Callable[[int], float]) -> Callable[[Tables], None]:
    return lambda tables: tables.set_series("grad_l2", l2, component=component)


def _ic_rises_alone(tables: Tables) -> None:
    for row in tables.daily:
        row["ic"] = row["rank_ic"] = 0.002 * row["epoch"] + 0.001 * (row["date"].toordinal() % 3)


def _never_learnt(tables: Tables) -> None:
    for row in tables.daily:
        row["ic"] = row["rank_ic"] = 0.05 * (-1) ** row["date"].toordinal()


def _undecided(tables: Tables) -> None:
    tables.set_evals("sharpe_daily", lambda _: 0.15)
    for row in tables.evals:
        row["se"] = 0.06 if row["metric"] == "sharpe_daily" else None


FIRES: dict[str, Callable[[], Tables]] = {
    "verdict_of_other_weights": spoilt(lambda t: t.verdict.update(weights_hash="elsewhere")),
    "verdict_of_other_run": spoilt(lambda t: t.verdict.update(run_key="k2")),
    "verdict_sharpe_not_in_evals": spoilt(_foreign_verdict_value),
    "sharpe_not_of_daily_returns": spoilt(_foreign_evals),
    "sharpe_not_of_predictions": spoilt(_foreign_predictions),
    "sharpe_never_changes": spoilt(_same_sharpe),
    "predictions_constant": spoilt(_constant_scores),
    "evaluation_invalid": spoilt(lambda t: t.set_evals("valid", lambda epoch: float(epoch != 7))),
    "weights_never_change": spoilt(_frozen_hash("weights_hash")),
    "predictions_never_change": spoilt(_frozen_hash("predictions_hash")),
    "validity_item_failed": spoilt(_failed_item),
    "non_finite_loss": spoilt(
        lambda t: t.set_series("loss_raw", lambda e: float("nan") if e == 9 else 1.0 / e, term="mse")
    ),
    "run_failed": spoilt(
        lambda t: t.run.update(status="failed", reason="RunFailure: epoch 3, step 40: the loss is nan")
    ),
    "run_killed": spoilt(lambda t: t.run.update(status="running", ended=None)),
    "loader_starves_training": spoilt(lambda t: t.set_series("loader_wait_s", lambda _: 6.0)),
    "features_missing": spoilt(lambda t: t.run.update(live_features=55)),
    "validation_flat_early": spoilt(_losses(lambda e: 1 - 0.01 * e, lambda e: 1.0 - 0.005 * min(e, 4) + 1e-6 * e)),
    "validation_rising": spoilt(_losses(lambda e: 1 - 0.01 * e, lambda e: 1.0 + 0.01 * abs(e - 5))),
    "both_losses_flat": spoilt(_losses(lambda e: 1 + 1e-5 * (-1) ** e, lambda e: 1 - 1e-5 * (-1) ** e)),
    "both_fall_sharpe_flat": spoilt(lambda _: None, skill=0.0),
    "lr_decayed_early": spoilt(_lr(lambda e: 1e-3 * 0.3**e)),
    "lr_below_plan": spoilt(_lr(lambda e: 1e-3 * 0.5**e)),
    "lr_around_1e6": spoilt(_lr(lambda _: 1e-6)),
    "lr_constant_against_plan": spoilt(_lr(lambda _: 1e-3)),
    "loss_term_swallowed": spoilt(
        lambda t: t.set_series("loss_raw", lambda _: 0.0, term="sharpe"), train__loss__sharpe=0.5
    ),
    "sharpe_term_absent": spoilt(lambda _: None, skill=0.0),
    "sharpe_term_light": spoilt(lambda _: None, skill=0.0, train__loss__sharpe=0.01),
    "ic_rises_sharpe_flat": spoilt(_ic_rises_alone, skill=0.0),
    "ic_flat": spoilt(_never_learnt),
    "component_without_gradient": spoilt(_gradient("gat", lambda _: 0.0)),
    "gradient_warnings": spoilt(
        lambda t: t.set_series("gradient_warning", lambda e: float(e > 15), component="temporal_encoder")
    ),
    "encoder_gradient_falling": spoilt(_gradient("temporal_encoder", lambda e: 0.5**e)),
    "encoder_gradient_low": spoilt(_gradient("temporal_encoder", lambda _: 1e-6)),
    "gradients_rising": spoilt(_gradient("prediction_head", lambda e: 2.0**e)),
    "graph_dominates_encoder": spoilt(_gradient("gat", lambda _: 9.0)),
    "clipping_bites": spoilt(lambda t: t.set_series("clipped_share", lambda _: 0.9)),
    "predictions_collapse": spoilt(lambda t: t.set_series("degeneracy_event", lambda e: float(e == 6))),
    "degeneracy_resets_many": spoilt(lambda t: t.set_series("degeneracy_reset", lambda e: float(e % 4 == 0))),
    "sampling_noise": spoilt(_undecided),
}
"""A run directory per rule in which it must fire. A rule without an entry fails `test_every_rule_has_a_case`."""


@pytest.fixture(scope="module")
def healthy_diagnosis(tmp_path_factory: pytest.TempPathFactory) -> Diagnosis:
    tables = healthy(overrides=WITH_SHARPE_TERM)
    return diagnose(tables.write(tmp_path_factory.mktemp("run") / "healthy"))


def finding(diagnosis: Diagnosis, rule: str) -> Finding:
    return next(f for f in diagnosis.findings if f.rule == rule)


def test_every_rule_has_a_case() -> None:
    assert set(FIRES) == {rule.id for rule in RULES}
    assert len({rule.id for rule in RULES}) == len(RULES)


def test_every_signal_of_a_rule_is_measured_somewhere() -> None:
    assert {name for rule in RULES for name in rule.needs} <= set(SIGNALS)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_rule_fires_on_its_fault(rule: Rule, tmp_path: Path) -> None:
    fired = finding(diagnose(FIRES[rule.id]().write(tmp_path / "run")), rule.id)
    assert fired.status == "fired", f"{fired.condition}: {fired.evidence}"
    assert "not measured" not in fired.evidence
    assert fired.next_step
    assert "{" not in fired.next_step.replace('{"', "")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_rule_is_quiet_on_a_healthy_run(rule: Rule, healthy_diagnosis: Diagnosis) -> None:
    quiet = finding(healthy_diagnosis, rule.id)
    assert quiet.status == "not_fired", f"{quiet.condition}: {quiet.evidence}"


@pytest.mark.parametrize(("rule", "signal"), [(rule, name) for rule in RULES for name in rule.needs])
def test_rule_without_one_of_its_signals_is_not_assessable(
    rule: Rule, signal: str, healthy_diagnosis: Diagnosis
) -> None:
    blind = dict(healthy_diagnosis.signals) | {signal: None}
    assert status_of(rule, blind) == "not_assessable"
    (found,) = assess(blind, {}, [rule])
    assert signal in found.evidence
    assert not found.next_step


def test_record_with_nothing_but_its_header_leaves_every_trained_rule_open(tmp_path: Path) -> None:
    tables = healthy()
    tables.series, tables.evals, tables.daily, tables.predictions = [], [], [], {}
    run_dir = tables.write(tmp_path / "run")
    (run_dir / "verdict.json").unlink()
    diagnosis = diagnose(run_dir)
    assessed = {f.rule for f in diagnosis.findings if f.status != "not_assessable"}
    assert assessed == {"run_failed", "run_killed", "features_missing"}
    assert "No Sharpe was measured" in diagnosis.headline


def test_healthy_run_has_no_cause_and_says_its_figures(healthy_diagnosis: Diagnosis) -> None:
    assert healthy_diagnosis.causes == []
    assert healthy_diagnosis.missing == []
    sharpe = healthy_diagnosis.signals["sharpe"]
    assert healthy_diagnosis.headline.startswith(f"No cause found. Sharpe {sharpe:.4f} ± ")
    assert "above 0.10" in healthy_diagnosis.headline
    assert "RankIC" in healthy_diagnosis.headline


@pytest.mark.parametrize("overrides", [{}, {"train.schedule.name": "constant"}], ids=["mse only", "constant schedule"])
def test_choices_of_a_run_that_passed_are_no_causes(overrides: dict[str, str], tmp_path: Path) -> None:
    tables = healthy(overrides=overrides)
    if overrides:
        tables.set_series("lr", lambda _: 1e-3)
    assert diagnose(tables.write(tmp_path / "run")).causes == []


def test_plateau_that_never_steps_is_seen_only_when_it_should_have_stepped(tmp_path: Path) -> None:
    def plateau(validation: Callable[[int], float]) -> Tables:
        tables = healthy(overrides={"train.schedule.name": "plateau", "train.schedule.patience": 2})
        tables.set_series("lr", lambda _: 1e-3)
        tables.set_series("loss_weighted", validation, split="validation", term="total")
        return tables

    improving = diagnose(plateau(lambda e: 1 - 0.001 * e).write(tmp_path / "improving"))
    stuck = diagnose(plateau(lambda e: 1 + 0.001 * e).write(tmp_path / "stuck"))
    assert finding(improving, "lr_constant_against_plan").status == "not_fired"
    assert finding(stuck, "lr_constant_against_plan").status == "fired"


def test_cosine_end_below_1e5_is_not_an_early_decay(tmp_path: Path) -> None:
    tables = healthy()
    tables.set_series("lr", lambda e: 1e-3 if e < 20 else 5e-6)
    assert finding(diagnose(tables.write(tmp_path / "run")), "lr_decayed_early").status == "not_fired"


def test_zero_learning_rate_excuses_unchanged_weights_and_sharpe(tmp_path: Path) -> None:
    tables = healthy()
    tables.set_series("lr", lambda _: 0.0)
    _frozen_hash("weights_hash")(tables)
    _same_sharpe(tables)
    diagnosis = diagnose(tables.write(tmp_path / "run"))
    assert finding(diagnosis, "weights_never_change").status == "not_assessable"
    assert finding(diagnosis, "sharpe_never_changes").status == "not_assessable"


def test_initial_weights_evaluated_as_trained_ones_fire(tmp_path: Path) -> None:
    tables = healthy()
    for row in tables.evals:
        row["weights_hash"] = "w0" if row["epoch"] == EPOCHS else row["weights_hash"]
    assert finding(diagnose(tables.write(tmp_path / "run")), "weights_never_change").status == "fired"


def test_parameter_free_component_needs_no_gradient(tmp_path: Path) -> None:
    tables = healthy()
    for epoch in range(1, EPOCHS + 1):
        for metric in ("grad_l2", "weight_l2"):
            tables.series.append(
                {"step": None, "epoch": epoch, "split": "train", "component": "adaptive_norm", "term": "", "value": 0.0}
                | {"metric": metric}
            )
    assert finding(diagnose(tables.write(tmp_path / "run")), "component_without_gradient").status == "not_fired"


def test_original_failure_headlines_validity_and_vetoes_the_rest(tmp_path: Path) -> None:
    diagnosis = diagnose(frozen_failure().write(tmp_path / "run"))
    fired = {f.rule: f for f in diagnosis.findings if f.status == "fired"}
    assert {"verdict_of_other_weights", "sharpe_never_changes", "predictions_constant"} <= set(fired)
    assert diagnosis.headline.startswith("Invalid: ")
    assert "constant" in diagnosis.headline
    assert "0.0818" in fired["sharpe_never_changes"].evidence
    assert all(f.decisive == (f.severity == "invalid") for f in fired.values())
    assert any(not f.decisive for f in fired.values())
    assert diagnosis.causes[0].group == "validity"
    assert [advice.asked_for for advice in diagnosis.experiments] == [False] * 4


def test_explanation_of_a_passed_run_is_an_observation(tmp_path: Path) -> None:
    diagnosis = diagnose(FIRES["features_missing"]().write(tmp_path / "run"))
    found = finding(diagnosis, "features_missing")
    assert (found.status, found.severity) == ("fired", "observation")
    assert "55 of 82 live" in found.evidence
    assert "1 observation" in diagnosis.headline


# Half-written directories ----------------------------------------------------------------------------------------


def test_torn_part_is_named_and_the_rest_is_used(tmp_path: Path) -> None:
    run_dir = healthy().write(tmp_path / "run")
    part = run_dir / "series" / "epoch_020.parquet"
    part.write_bytes(part.read_bytes()[:200])
    diagnosis = diagnose(run_dir)
    assert any(item.startswith("series/epoch_020.parquet: torn") for item in diagnosis.missing)
    assert finding(diagnosis, "lr_constant_against_plan").status == "not_fired"


@pytest.mark.parametrize("content", ["", '{"status": "finis', "[]"])
def test_torn_json_is_named(tmp_path: Path, content: str) -> None:
    run_dir = healthy().write(tmp_path / "run")
    (run_dir / "run.json").write_text(content)
    diagnosis = diagnose(run_dir)
    assert any(item.startswith("run.json: ") for item in diagnosis.missing)
    assert finding(diagnosis, "run_failed").status == "not_assessable"
    assert finding(diagnosis, "sharpe_not_of_predictions").status == "not_fired"
    assert any("atft train DATASET GRAPH" in advice.command for advice in diagnosis.experiments)


@pytest.mark.parametrize("strange", [None, "x", [{"a": None}], {}, float("nan")], ids=repr)
@pytest.mark.parametrize("depth", ["leaves", "sections"])
def test_header_of_another_version_never_stops_the_diagnosis(tmp_path: Path, strange: object, depth: str) -> None:
    def replaced(values: dict[str, Any]) -> dict[str, Any]:
        return {k: replaced(v) if depth == "leaves" and isinstance(v, dict) else strange for k, v in values.items()}

    tables = healthy()
    tables.run, tables.verdict = replaced(tables.run), replaced(tables.verdict)
    diagnosis = diagnose(tables.write(tmp_path / "run"))
    assert diagnosis.to_markdown()
    assert finding(diagnosis, "sharpe_not_of_daily_returns").status == "not_fired"


def test_run_that_is_still_written_is_not_called_killed(tmp_path: Path) -> None:
    run_dir = FIRES["run_killed"]().write(tmp_path / "run")
    with (run_dir / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        diagnosis = diagnose(run_dir)
    assert finding(diagnosis, "run_killed").status == "not_fired"
    assert diagnosis.headline.startswith("Still training (20 of 20 epochs).")


def test_files_of_another_run_are_never_read(tmp_path: Path) -> None:
    other = healthy().write(tmp_path / "other")
    run_dir = healthy().write(tmp_path / "run")
    for name in ("evals", "daily", "predictions"):
        for path in (run_dir / name).iterdir():
            path.unlink()
            path.symlink_to(other / name / path.name)
    diagnosis = diagnose(run_dir)
    assert diagnosis.signals["sharpe"] is None
    assert any("a link to a file outside this run" in item for item in diagnosis.missing)


def test_repeated_epoch_counts_once_with_its_later_part(tmp_path: Path) -> None:
    run_dir = healthy().write(tmp_path / "run")
    first = run_dir / "series" / "epoch_003.parquet"
    (run_dir / "series" / "epoch_003_again.parquet").write_bytes(first.read_bytes())
    assert diagnose(run_dir).signals["loader_wait_share"] == pytest.approx(0.02)


@pytest.mark.parametrize(
    "prepare", [lambda _: None, lambda d: d.mkdir(), lambda d: (d.mkdir(), (d / "series").mkdir())]
)
def test_nothing_readable_is_one_sentence(tmp_path: Path, prepare: Callable[[Path], object]) -> None:
    run_dir = tmp_path / "run"
    prepare(run_dir)
    with pytest.raises(InputError, match=r"run") as error:
        diagnose(run_dir)
    assert "\n" not in str(error.value)
