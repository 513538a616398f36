"""The collapse of predictions: its measure compared with a slow reference, and its guard step by step."""

from __future__ import annotations

import math

import numpy as np
import pytest

from atft_pipeline.batches.panel import Panel
from atft_pipeline.config.schema import GuardConfig
from atft_pipeline.training.degeneracy import DegeneracyGuard, dispersions
from atft_pipeline.training.judging.scoring import Scores

LOW, HIGH = 1e-5, 0.05


def checks(ratios, **config):
    guard = DegeneracyGuard(GuardConfig(**config))
    return [guard.check(ratio, epoch) for epoch, ratio in enumerate(ratios, start=1)]


@pytest.mark.parametrize(
    ("ratios", "events", "resets"),
    [
        ([LOW, LOW, LOW, LOW], "0111", "0001"),
        ([HIGH, LOW, LOW, HIGH, LOW, LOW, LOW, LOW], "01101111", "00000010"),
        ([HIGH] * 4, "0000", "0000"),
        ([HIGH, math.nan, math.nan, math.nan], "0111", "0001"),
        ([HIGH, 1e-3, 0.99e-3], "001", "000"),
    ],
    ids=["warm-up is free", "only in a row, and anew after a reset", "healthy", "unknown counts", "threshold"],
)
def test_the_guard_counts_events_and_resets_after_patience(ratios, events, resets):
    found = checks(ratios, dispersion_ratio=1e-3, patience=3, warmup_epochs=1)
    assert "".join(str(int(event)) for event, _ in found) == events
    assert "".join(str(int(reset)) for _, reset in found) == resets


def test_dispersions_are_mean_within_session_deviations_of_members():
    generator = np.random.default_rng(0)
    T, N = 6, 8
    member = generator.random((T, N)) < 0.8
    member[5] = False
    targets = generator.normal(0.001, 0.02, (T, N, 4)).astype(np.float32)
    targets[0, :3] = np.nan
    targets[1] = 0.01  # no dispersion: no z-score
    values = np.where(member[2:, :, None], generator.normal(size=(T - 2, N, 4)), np.nan).astype(np.float32)
    panel = Panel(np.arange(T), np.arange(N), [], np.empty(0), targets, member, member, member, {})

    sessions = np.arange(2, T)
    predicted, standardised = [], []
    for row, t in enumerate(sessions):
        inside = [i for i in range(N) if member[t, i]]
        if len(inside) < 2:
            continue
        predicted.append(np.std([float(values[row, i, 0]) for i in inside], ddof=1))
        y = np.array([float(targets[t, i, 0]) for i in inside])
        standardised.append(np.std(np.clip((y - y.mean()) / y.std(ddof=1), -5, 5), ddof=1))
    found = dispersions(Scores(sessions, values, {}, {}), panel)
    assert found == pytest.approx((np.mean(predicted), np.mean(standardised)))

    whole = np.where(member[..., None], 0.5, np.nan).astype(np.float32) * np.ones(4, np.float32)
    assert dispersions(Scores(np.arange(T), whole, {}, {}), panel)[0] == 0.0
