"""Scores over sessions, their hashes, and the figures recorded for them."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from training_runs import evals, settings

from atft_pipeline.batches.block_dataset import BlockDataset
from atft_pipeline.batches.panel import load_panel
from atft_pipeline.config.schema import HORIZONS, EvaluationConfig, LossConfig
from atft_pipeline.dataset.splits import make_split
from atft_pipeline.evaluation.evaluate import STATISTICS
from atft_pipeline.evaluation.predictions_table import evaluate_table
from atft_pipeline.evaluation.slices import evaluable_slices
from atft_pipeline.graph.store import load_graph
from atft_pipeline.model.atft_gat_fan import ATFTGATFAN
from atft_pipeline.runs.tables import read_table
from atft_pipeline.training.judging.epoch_evaluation import SCORING_BATCH_RATIO
from atft_pipeline.training.judging.scoring import (
    Scores,
    predictions_hash,
    score_sessions,
    to_device,
    weights_hash,
    write_predictions,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def panel(data):
    return load_panel(data.dataset, "all")


@pytest.fixture(scope="module")
def model(panel):
    torch.manual_seed(0)
    model = ATFTGATFAN(settings().model, len(panel.feature_names))
    # As the averaged weights: torch may pick another kernel, and other last bits, for weights that take gradients.
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def blocks(panel, model, data):
    return BlockDataset(panel, load_graph(data.graph), model.receptive_field)


def score(model, blocks, sessions, batch_size=400, loss=None, workers=0):
    return score_sessions(
        model, blocks, sessions, batch_size=batch_size, device=CPU, loss=loss, epoch=1, workers=workers
    )


# Scores ---------------------------------------------------------------------------------------------------------


def test_scores_do_not_depend_on_their_blocks_and_keep_the_models_mode(model, blocks):
    sessions = np.arange(200, 230)
    model.train()
    one, other = score(model, blocks, sessions, batch_size=1), score(model, blocks, sessions, batch_size=10**6)
    assert model.training
    np.testing.assert_allclose(one.values, other.values, rtol=0, atol=1e-5)
    model.eval()
    score(model, blocks, sessions)
    assert not model.training


def test_blocks_made_ahead_change_no_score(model, blocks, monkeypatch):
    makers = []
    make = BlockDataset.block

    def slow_first(self, sessions):
        makers.append(threading.current_thread())
        time.sleep(0.05 * (sessions[0] == 200))
        return make(self, sessions)

    monkeypatch.setattr(BlockDataset, "block", slow_first)
    sessions = np.arange(200, 230)
    alone, ahead = score(model, blocks, sessions), score(model, blocks, sessions, workers=2)
    assert {thread is threading.main_thread() for thread in makers[: len(makers) // 2]} == {True}
    assert {thread is threading.main_thread() for thread in makers[len(makers) // 2 :]} == {False}
    np.testing.assert_array_equal(alone.values, ahead.values)


def test_exactly_the_members_are_scored(model, blocks, panel):
    sessions = np.arange(40, 120)  # the first members come after 60 sessions of history
    scores = score(model, blocks, sessions)
    assert not panel.member[sessions[0]].any()
    np.testing.assert_array_equal(np.isfinite(scores.values), panel.member[sessions][..., None].repeat(4, axis=2))


def test_losses_are_means_over_the_scored_sessions(model, blocks):
    sessions = np.arange(200, 210)
    config = LossConfig(mse=2.0, ic=1.0)
    whole = score(model, blocks, sessions, batch_size=10**6, loss=config)
    parts = [score(model, blocks, part, loss=config) for part in (sessions[:3], sessions[3:])]
    for term in ("mse", "ic", "variance_penalty"):
        mean = (3 * parts[0].loss_raw[term] + 7 * parts[1].loss_raw[term]) / 10
        assert whole.loss_raw[term] == pytest.approx(mean, rel=1e-4)
    expected = 2.0 * whole.loss_raw["mse"] + whole.loss_raw["ic"]
    assert whole.loss_weighted["total"] == pytest.approx(expected, rel=1e-5)
    assert score(model, blocks, sessions).loss_raw == {}


def test_a_block_that_is_there_is_not_copied(blocks):
    block = blocks.block(np.arange(200, 203))
    assert to_device(block, CPU) is block


# Hashes ---------------------------------------------------------------------------------------------------------


def test_a_hash_of_weights_sees_one_changed_number(model):
    before = weights_hash(model)
    assert weights_hash(model) == before
    bias = model.prediction_head.output.bias
    with torch.no_grad():
        old = bias[0].item()
        bias[0] = float(np.nextafter(np.float32(old), np.float32(1)))
        assert weights_hash(model) != before
        bias[0] = old
    assert weights_hash(model) == before


def test_a_hash_of_predictions_sees_values_sessions_and_codes(panel):
    values = np.zeros((3, len(panel.codes), 4), np.float32)
    scores = Scores(np.array([200, 201, 202]), values, {}, {})
    changed = values.copy()
    changed[1, 2, 3] = 1e-30
    renamed = dataclasses.replace(panel, codes=panel.codes[::-1])
    hashes = {
        predictions_hash(scores, panel),
        predictions_hash(dataclasses.replace(scores, values=changed), panel),
        predictions_hash(dataclasses.replace(scores, sessions=scores.sessions + 1), panel),
        predictions_hash(scores, renamed),
    }
    assert len(hashes) == 4


# Slices ---------------------------------------------------------------------------------------------------------


def test_a_slice_is_reported_where_it_is_scored_in_full_and_can_be_evaluated(panel):
    sessions = np.arange(200, 230)
    assert evaluable_slices(panel, sessions, "all") == ("liquid", "all")
    assert evaluable_slices(panel, sessions, "liquid") == ("liquid",)
    illiquid = dataclasses.replace(panel, liquid=np.zeros_like(panel.liquid))
    assert evaluable_slices(illiquid, sessions, "all") == ("all",)
    assert evaluable_slices(panel, sessions[:1], "all") == ()
    assert evaluable_slices(panel, np.arange(len(panel.sessions))[-3:], "all") == (), "no target is known yet"


# The record -----------------------------------------------------------------------------------------------------


def test_a_predictions_file_holds_every_score_with_its_target(panel, tmp_path):
    generator = np.random.default_rng(1)
    sessions = np.arange(len(panel.sessions) - 12, len(panel.sessions))
    values = generator.normal(size=(12, len(panel.codes), 4)).astype(np.float32)
    write_predictions(tmp_path / "p.parquet", panel, {"test": Scores(sessions, values, {}, {})})
    rows = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert len(rows) == panel.member[sessions].sum()
    place = {str(code): i for i, code in enumerate(panel.codes)}
    day = {session.item(): t for t, session in enumerate(panel.sessions[sessions].astype("datetime64[D]"))}
    for row in rows[::17]:
        t, i = day[row["Date"]], place[row["Code"]]
        assert (row["split"], row["is_liquid"]) == ("test", panel.liquid[sessions[t], i])
        for h, horizon in enumerate(HORIZONS):
            target = float(panel.targets[sessions[t], i, h])
            assert row[f"score_{horizon}d"] == values[t, i, h]
            assert row[f"target_{horizon}d"] == (None if np.isnan(target) else target)


def predictions(run_dir, epoch):
    return pq.read_table(run_dir / "predictions" / f"epoch_{epoch:03d}.parquet")


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("universe", ["liquid", "all"])
def test_recorded_figures_are_those_of_the_recorded_predictions(split, universe, trained):
    for epoch in (1, 2, 3):
        table = predictions(trained(), epoch)
        result = evaluate_table(
            table,
            score="score_1d",
            target="target_1d",
            config=EvaluationConfig(),
            split=split,
            # members of a run on `all` are the investable stocks: the file's rows
            universe="liquid" if universe == "liquid" else None,
        ).overall
        for name in STATISTICS:
            recorded, known = evals(trained(), name, split, universe)[epoch], result.value(name)
            # the file's panel has only the stocks of the split, so sums run in another order
            assert recorded == (known and pytest.approx(known, rel=1e-9, abs=1e-12)), (name, epoch)


def test_daily_returns_summarise_to_the_recorded_sharpe(trained):
    for epoch in (1, 2, 3):
        rows = [
            row
            for row in read_table(trained(), "daily").to_pylist()
            if (row["epoch"], row["split"], row["slice"]) == (epoch, "validation", "liquid")
        ]
        for column, name in (("gross", "sharpe_daily"), ("net", "sharpe_daily_net"), ("ic", "icir")):
            values = np.array([row[column] for row in rows if row[column] is not None])
            assert evals(trained(), name)[epoch] == pytest.approx(values.mean() / values.std(ddof=1), rel=1e-12)
        dates = [row["date"] for row in rows]
        assert dates == sorted(set(dates))


def test_a_run_on_liquid_stocks_reports_no_other_slice(trained):
    run_dir = trained({"train.universe": "liquid", "train.epochs": 1})
    assert evals(run_dir, "sharpe_daily", universe="liquid") != {}
    assert evals(run_dir, "sharpe_daily", universe="all") == {}


def test_a_checkpoint_scores_what_was_recorded(model, blocks, panel, trained):
    split = make_split(panel.sessions, settings().split)
    content = torch.load(trained() / "checkpoints" / "epoch_002.pt")
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        model.load_state_dict(content["weights"])
        values = score(model, blocks, split.validation, SCORING_BATCH_RATIO * settings().train.batch_size).values
    finally:
        model.load_state_dict(own)
    table = predictions(trained(), 2)
    recorded = table.filter([s == "validation" for s in table["split"].to_pylist()])["score_1d"].to_numpy()
    np.testing.assert_array_equal(values[..., 0][panel.member[split.validation]], recorded)
