"""From a run's record to its verdict: only the criterion epoch decides, and only where the run is valid."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from training_runs import Data, evals, hashes, header, settings, train_quietly, validity, verdict

from atft_pipeline.batches.panel import load_panel
from atft_pipeline.config.schema import EvaluationConfig, LossConfig
from atft_pipeline.dataset.layout import membership_path
from atft_pipeline.dataset.splits import make_split
from atft_pipeline.errors import InputError
from atft_pipeline.evaluation.portfolio import long_short
from atft_pipeline.runs.documents import read_verdict
from atft_pipeline.storage.artifact import manifest_path
from atft_pipeline.training.judging import epoch_evaluation, validity_checks
from atft_pipeline.training.judging.epoch_evaluation import EpochEvaluator
from atft_pipeline.training.judging.judge_run import write_verdict
from atft_pipeline.training.judging.scoring import score_sessions
from atft_pipeline.verdict.criterion import changed_criterion

pytestmark = pytest.mark.slow(reason="trained runs, judged")

ITEMS = (
    "reinitialised_weights_score_differently",
    "permuted_scores_earn_nothing",
    "true_returns_earn_most",
    "evaluating_twice_agrees",
    "targets_match_prices",
    "scores_changed_since_last_epoch",
)
LOW, HIGH = {"evaluation.criterion_sharpe": -9.0}, {"evaluation.criterion_sharpe": 9.0}


@pytest.fixture
def copied(trained, tmp_path):
    """A finished run alone in a place of its own."""
    return shutil.copytree(trained(LOW), tmp_path / "alone" / "run")


def test_a_changed_criterion_is_warned_of(trained):
    changed = (
        "not the success criterion as defined: criterion_sharpe -9.0 instead of 0.1, criterion_epoch 2 instead of 20"
    )
    assert changed in verdict(trained(LOW))["warnings"]
    assert changed_criterion(EvaluationConfig(cost_bps=0.0, bootstrap_samples=5)) is None


def test_a_dataset_without_past_returns_has_no_reversal(data, tmp_path, monkeypatch):
    monkeypatch.setattr(validity_checks, "REVERSAL_FEATURES", ("absent",))
    run_dir = tmp_path / "run"
    train_quietly(settings(), data, run_dir)
    assert verdict(run_dir)["reversal_sharpe"] is None
    assert header(run_dir)["status"] == "finished"


def test_the_reversal_beside_the_verdict_is_chosen_on_training_sessions_alone(data, tmp_path, monkeypatch):
    chosen = []
    reversal = validity_checks.one_factor_reversal

    def watched(*arrays, **options):
        chosen.append(arrays[-1])
        return reversal(*arrays, **options)

    monkeypatch.setattr(validity_checks, "one_factor_reversal", watched)
    run_dir = train_quietly(settings(), data, tmp_path / "run").run_dir
    panel = load_panel(data.dataset, "all")
    train_sessions = make_split(panel.sessions, settings().split).train
    assert len(chosen) == 2
    assert all(np.array_equal(sessions, train_sessions) for sessions in chosen)
    assert verdict(run_dir)["reversal_sharpe"] is not None


# The criterion --------------------------------------------------------------------------------------------------


def test_the_threshold_decides(trained):
    assert verdict(trained(LOW))["status"] == "passed"
    assert verdict(trained(HIGH))["status"] == "failed"
    assert verdict(trained(LOW))["criterion"]["value"] == verdict(trained(HIGH))["criterion"]["value"]


def test_the_value_is_that_of_the_criterion_epoch_exactly(trained):
    sharpe = evals(trained(), "sharpe_daily")
    assert len(set(sharpe.values())) == 3
    criterion = verdict(trained())["criterion"]
    assert (criterion["epoch"], criterion["value"]) == (2, sharpe[2])
    assert criterion["se"] == evals(trained(), "sharpe_se")[2]
    assert criterion["sessions"] == evals(trained(), "sessions")[2]
    assert verdict(trained())["final"]["validation"]["sharpe_daily"] == sharpe[3]
    assert verdict(trained())["final"]["test"]["sharpe_daily"] == evals(trained(), "sharpe_daily", "test")[3]


def test_every_epoch_can_be_the_criterion_epoch_neither_best_nor_last(trained):
    sharpe = evals(trained(), "sharpe_daily")
    for epoch in (1, 2, 3):
        run_dir = trained({"evaluation.criterion_epoch": epoch})
        assert evals(run_dir, "sharpe_daily") == sharpe
        assert verdict(run_dir)["criterion"]["value"] == sharpe[epoch]


def test_a_shorter_run_has_no_verdict_and_no_value(trained):
    found = verdict(trained({"train.epochs": 1}))
    assert found["status"] == "not_applicable"
    assert "1 epochs are fewer than the criterion epoch 2" in found["summary"]
    assert found["criterion"]["value"] is None
    assert found["final"]["validation"]["sharpe_daily"] is not None


def test_a_verdict_names_what_it_judged(trained):
    found, run = verdict(trained()), header(trained())
    for name in ("config_key", "dataset_fingerprint"):
        assert found[name] == run[name]
    assert found["run_key"] == run["key"]
    assert found["weights_hash"] == hashes(trained())[3]
    assert found["predictions_hash"] == hashes(trained(), "predictions_hash")[3]


# Validity -------------------------------------------------------------------------------------------------------


def test_a_sound_run_passes_every_item_at_the_criterion_epoch_and_the_last(trained):
    expected = {f"{item} (epoch {epoch})" for epoch in (2, 3) for item in ITEMS}
    assert set(validity(trained())) == expected | {"weights_left_their_start"}
    assert all(passed is True for passed in validity(trained()).values())


def vetoed(data, run_dir, item, overrides=None, epoch=2):
    """Trains; asserts that `item` fails at `epoch` and turns a pass into `invalid`."""
    found = train_quietly(settings(LOW | (overrides or {})), data, run_dir).verdict
    assert validity(run_dir)[f"{item} (epoch {epoch})"] is False
    assert found["status"] == "invalid"
    return found


def test_scores_read_from_elsewhere_are_caught(data, tmp_path, monkeypatch):
    """The original failure: whatever was trained, the scores are those of another run's file."""
    files = {}

    def of_another_run(model, blocks, sessions, **options):
        options["loss"] = LossConfig()
        return files.setdefault(sessions[0], score_sessions(model, blocks, sessions, **options))

    monkeypatch.setattr(epoch_evaluation, "score_sessions", of_another_run)
    found = vetoed(data, tmp_path / "run", ITEMS[0])
    assert found["summary"].startswith(f"invalid: {ITEMS[0]} (epoch 2)")
    assert validity(tmp_path / "run")[f"{ITEMS[5]} (epoch 2)"] is False
    assert len(set(evals(tmp_path / "run", "sharpe_daily").values())) == 1


def test_scores_that_stay_from_one_epoch_to_the_next_are_caught(data, tmp_path, monkeypatch):
    evaluated = {}
    split_scores = EpochEvaluator.score_splits

    def stale(self, epoch):
        return evaluated.setdefault("scores", split_scores(self, epoch))

    monkeypatch.setattr(EpochEvaluator, "score_splits", stale)
    vetoed(data, tmp_path / "run", ITEMS[5])


def test_a_rate_of_zero_excuses_scores_that_stay_but_not_untrained_weights(data, tmp_path):
    still = train_quietly(settings({"train.optimizer.lr": 0.0} | LOW), data, tmp_path / "run").run_dir
    assert len(set(hashes(still).values())) == 1
    assert validity(still)[f"{ITEMS[5]} (epoch 2)"] is True
    assert validity(still)["weights_left_their_start"] is False
    assert verdict(still)["status"] == "invalid"
    assert any("parameters_moved" in warning for warning in verdict(still)["warnings"])


def test_scores_that_depend_on_their_batch_are_caught(data, tmp_path, monkeypatch):
    def of_the_batch(model, blocks, sessions, *, batch_size, **options):
        scores = score_sessions(model, blocks, sessions, batch_size=batch_size, **options)
        scores.values[:, 0] *= 1.0 + batch_size / 4000
        return scores

    monkeypatch.setattr(epoch_evaluation, "score_sessions", of_the_batch)
    vetoed(data, tmp_path / "run", ITEMS[3])


def test_an_evaluation_that_earns_by_itself_is_caught(data, tmp_path, monkeypatch):
    def generous(scores, targets, **options):
        portfolio = long_short(scores, targets, **options)
        return dataclasses.replace(portfolio, gross=portfolio.gross + 0.01)

    monkeypatch.setattr("atft_pipeline.verdict.validity.long_short", generous)
    vetoed(data, tmp_path / "run", ITEMS[1])


def test_a_portfolio_on_the_wrong_side_is_caught(data, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "atft_pipeline.verdict.validity.long_short", lambda s, t, **options: long_short(-s, t, **options)
    )
    vetoed(data, tmp_path / "run", ITEMS[2])


def test_targets_that_prices_do_not_give_are_caught(data, tmp_path):
    """The opens of one stock are not those its targets were made from."""
    copy = Data(tmp_path / data.dataset.name, data.graph)
    for path in (data.dataset, manifest_path(data.dataset)):
        shutil.copy(path, tmp_path / path.name)
    table = pq.read_table(membership_path(data.dataset))
    wrong = np.array(table["Code"].to_pylist()) == table["Code"][-1].as_py()
    drift = np.where(wrong, 1.0 + 1e-3 * np.arange(len(wrong)), 1.0)
    opens = pa.array(table["Open"].to_numpy() * drift, from_pandas=True)
    table = table.set_column(table.column_names.index("Open"), "Open", opens)
    pq.write_table(table, membership_path(copy.dataset))
    vetoed(copy, tmp_path / "run", ITEMS[4])


def test_training_in_bf16_is_evaluated_in_float32_and_valid(data, trained, tmp_path):
    """Scores rounded to bf16 differ between block partitions by more than any tolerance that would still mean one."""
    config = settings({"train.precision": "bf16-mixed", "train.epochs": 1})
    half = train_quietly(config, data, tmp_path / "run").run_dir
    assert hashes(half)[1] != hashes(trained())[1]
    assert all(passed is True for passed in validity(half).values())


# Its own record, and nothing else -------------------------------------------------------------------------------


def test_a_verdict_is_read_back_from_the_run_directory_alone(copied):
    first = (copied / "verdict.json").read_text()
    write_verdict(copied)
    assert (copied / "verdict.json").read_text() == first


def test_the_evaluation_of_a_neighbouring_run_cannot_enter(copied, trained):
    shutil.copytree(trained(LOW), copied.with_name("run-attempt2"))
    (copied / "evals" / "epoch_002.parquet").unlink()
    found = write_verdict(copied)
    assert found["status"] == "invalid"
    assert "the hash of the initial or of the judged weights is not recorded" in found["summary"]
    assert found["criterion"]["value"] is None


def test_checks_that_are_missing_at_the_criterion_epoch_are_not_made_up_for_by_others(copied):
    (copied / "validity" / "epoch_002.json").unlink()
    found = write_verdict(copied)
    assert (found["status"], found["validity"]) == ("invalid", [])


def test_a_failed_item_at_any_epoch_vetoes(copied):
    path = copied / "validity" / "epoch_003.json"
    content = json.loads(path.read_text())
    content["items"][0]["passed"] = False
    path.write_text(json.dumps(content))
    assert write_verdict(copied)["status"] == "invalid"


def test_a_verdict_that_is_missing_or_broken_is_refused(copied):
    (copied / "verdict.json").write_text('{"status": "pas')
    with pytest.raises(InputError, match="not JSON"):
        read_verdict(copied)
    (copied / "verdict.json").unlink()
    with pytest.raises(InputError, match="has not finished"):
        read_verdict(copied)
