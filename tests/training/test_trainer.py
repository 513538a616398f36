"""The training loop: its blocks, its reaction to collapsed predictions, and its record."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from training_runs import (
    COLLAPSED,
    evals,
    hashes,
    header,
    record,
    series,
    settings,
    train_quietly,
    trainer_of,
    validity,
    verdict,
)

from atft_pipeline.batches.block_dataset import BlockDataset
from atft_pipeline.batches.panel_storage import prefetched
from atft_pipeline.runs.tables import read_table
from atft_pipeline.training.judging.scoring import weights_hash
from atft_pipeline.training.trainer import Trainer

# Blocks ---------------------------------------------------------------------------------------------------------


def test_blocks_are_made_ahead_in_other_threads_and_change_nothing(data, trained, tmp_path, monkeypatch):
    makers = set()
    make = BlockDataset.block

    def noted(self, sessions):
        makers.add(threading.current_thread())
        return make(self, sessions)

    monkeypatch.setattr(BlockDataset, "block", noted)
    run_dir = train_quietly(settings({"train.loader_workers": 2}), data, tmp_path / "run").run_dir
    assert len(makers - {threading.main_thread()}) >= 1
    assert {k: v for k, v in record(run_dir).items() if k != "verdict"} == {
        k: v for k, v in record(trained()).items() if k != "verdict"
    }


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_prefetching_keeps_the_order(workers):
    def slow_first(item):
        time.sleep(0.02 * (item == 0))
        return item * item

    assert list(prefetched(slow_first, range(9), workers)) == [i * i for i in range(9)]
    assert list(prefetched(slow_first, [], workers)) == []


def test_prefetching_makes_no_more_than_two_per_worker_ahead():
    made = []
    source = prefetched(lambda item: made.append(item) or item, range(50), 2)
    assert next(source) == 0
    source.close()
    assert len(made) <= 1 + 2 * 2


def test_prefetching_passes_on_the_error_of_its_item():
    source = prefetched(lambda item: 1 // item, [1, 0, 1], 2)
    assert next(source) == 1
    with pytest.raises(ZeroDivisionError):
        next(source)


def test_an_epoch_covers_every_training_session_once_from_changing_offsets(data, tmp_path):
    trainer = trainer_of(data, tmp_path)
    members = trainer.panel.member.any(axis=1)
    expected = [t for t in trainer.split.train if members[t]]
    assert not members[0], "the law below is hardest where the first sessions have no member"
    cuts = set()
    for epoch in range(1, 8):
        blocks = trainer._shuffled_blocks(epoch)
        assert sorted(np.concatenate(blocks)) == expected
        assert len(blocks) * trainer.config.train.epochs <= trainer.schedule.total_steps
        cuts.add(tuple(sorted(int(block[0]) for block in blocks)))
    assert len(cuts) > 1
    first = trainer._shuffled_blocks(1)
    assert [b.tolist() for b in trainer._shuffled_blocks(1)] == [b.tolist() for b in first]
    assert [b[0] for b in first] != sorted(b[0] for b in first)


# Collapse -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def collapsed(data, tmp_path_factory):
    """A run whose head starts at zero weights and cannot learn: every stock has the same score until it is re-drawn."""
    new_model = Trainer._new_model

    def flat(self, seed):
        model = new_model(self, seed)
        if seed == self.config.train.seed:
            torch.nn.init.zeros_(model.prediction_head.output.weight)
        return model

    states, save = {}, Trainer._save

    def kept(self, epoch):
        save(self, epoch)
        states[epoch] = torch.load(self.record.run_dir / "checkpoints" / "resume.pt")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_new_model", flat)
        patch.setattr(Trainer, "_save", kept)
        run_dir = train_quietly(settings(COLLAPSED), data, tmp_path_factory.mktemp("collapsed") / "run").run_dir
    return run_dir, states


def test_collapse_is_counted_after_warm_up_and_resets_the_head_after_patience(collapsed):
    run_dir, states = collapsed
    assert series(run_dir, "degeneracy_event") == {1: 0.0, 2: 1.0, 3: 1.0, 4: 0.0}
    assert series(run_dir, "degeneracy_reset") == {1: 0.0, 2: 0.0, 3: 1.0, 4: 0.0}
    assert [series(run_dir, "dispersion_ratio")[epoch] for epoch in (1, 2, 3)] == pytest.approx([0, 0, 0], abs=1e-7)
    assert series(run_dir, "dispersion_ratio")[4] > 1e-3
    assert [states[epoch]["guard_low_checks"] for epoch in (1, 2, 3, 4)] == [0, 1, 0, 0]


def test_a_reset_redraws_the_head_of_both_models_and_the_optimizer_forgets_it(collapsed):
    _, states = collapsed
    name = "prediction_head.output.weight"
    before, after = states[2], states[3]
    assert not before["model"][name].any()
    assert after["model"][name].all()
    assert torch.equal(after["model"][name], after["average"][name])
    assert len(before["optimizer"]["state"]) - len(after["optimizer"]["state"]) == 2
    assert torch.equal(
        before["model"]["prediction_head.hidden.0.weight"], after["model"]["prediction_head.hidden.0.weight"]
    )


def test_the_checkpoint_of_a_reset_epoch_holds_the_weights_that_were_evaluated(collapsed):
    run_dir, _ = collapsed
    weights = torch.load(run_dir / "checkpoints" / "epoch_003.pt")["weights"]
    assert not weights["prediction_head.output.weight"].any()


def test_constant_scores_are_recorded_as_invalid_and_veto_the_verdict(collapsed):
    run_dir, _ = collapsed
    assert evals(run_dir, "valid") == {1: 0.0, 2: 0.0, 3: 0.0, 4: 1.0}
    assert set(evals(run_dir, "sharpe_daily")) == {4}
    assert verdict(run_dir)["status"] == "invalid"
    assert "constant" in verdict(run_dir)["summary"]
    assert verdict(run_dir)["criterion"]["value"] is None


def test_a_healthy_run_has_no_event(trained):
    assert set(series(trained(), "degeneracy_event").values()) == {0.0}
    assert set(series(trained(), "degeneracy_reset").values()) == {0.0}
    assert set(evals(trained(), "valid").values()) == {1.0}


# The record -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_reproduces_the_hash_recorded_for_its_epoch(data, trained, tmp_path):
    model = trainer_of(data, tmp_path).model
    for epoch, recorded in hashes(trained()).items():
        content = torch.load(trained() / "checkpoints" / f"epoch_{epoch:03d}.pt")
        model.load_state_dict(content["weights"])
        assert weights_hash(model) == recorded
        assert (content["epoch"], content["run_key"]) == (epoch, header(trained())["key"])


def test_epoch_losses_are_the_session_means_of_the_steps(trained):
    rows = [row for row in read_table(trained(), "series").to_pylist() if row["split"] == "train"]
    steps = [row for row in rows if row["step"] is not None and row["metric"] == "loss"]
    assert [row["step"] for row in steps] == list(range(len(steps)))
    totals = series(trained(), "loss_weighted", split="train", term="total")
    weighted = {
        epoch: sum(series(trained(), "loss_weighted", split="train", component="loss", term=t)[epoch] for t in ("mse",))
        for epoch in totals
    }
    for epoch, total in totals.items():
        of_epoch = [row["value"] for row in steps if row["epoch"] == epoch]
        assert min(of_epoch) <= total <= max(of_epoch)
        assert total == pytest.approx(weighted[epoch], rel=1e-6)  # float32 terms, every other weight is 0


def test_gradient_norms_before_and_after_clipping(data, tmp_path):
    run_dir = train_quietly(
        settings({"train.epochs": 1, "train.optimizer.clip_norm": 0.05}), data, tmp_path / "r"
    ).run_dir
    rows = [
        row
        for row in read_table(run_dir, "series").to_pylist()
        if row["metric"] == "grad_norm" and row["step"] is not None
    ]
    before = {row["step"]: row["value"] for row in rows if row["term"] == "before_clip"}
    after = {row["step"]: row["value"] for row in rows if row["term"] == "after_clip"}
    assert after == {step: min(norm, 0.05) for step, norm in before.items()}
    assert series(run_dir, "clipped_share") == {1: np.mean([norm > 0.05 for norm in before.values()])}
    total = series(run_dir, "grad_norm", component="total", term="before_clip")[1]
    assert total == pytest.approx(np.mean(list(before.values())))


def test_every_component_with_parameters_is_recorded_every_epoch(data, trained, tmp_path):
    trainer = trainer_of(data, tmp_path)
    for metric in ("grad_l2", "weight_l2", "update_to_weight", "gradient_warning"):
        for name in trainer.components:
            assert set(series(trained(), metric, component=name)) == {1, 2, 3}, (metric, name)


def test_a_model_without_graph_trains_without_the_component(data, tmp_path):
    run_dir = train_quietly(settings({"train.epochs": 1, "model.graph": False}), data, tmp_path / "run").run_dir
    assert series(run_dir, "grad_l2", component="gat") == {}
    assert series(run_dir, "grad_l2", component="fusion") != {}
    assert all(passed for passed in validity(run_dir).values())
