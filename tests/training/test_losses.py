"""Each loss term compared with a slow, obvious implementation, and its gradient with finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from atft_pipeline.config.schema import HORIZONS, LOSS_TERMS, LossConfig, LossPhase
from atft_pipeline.training.losses import (
    DISPERSION_FLOOR,
    EXPOSURE_EPS,
    RETURN_VARIANCE_EPS,
    SCORE_VARIANCE_EPS,
    SESSION_TERMS,
    SHARPE_SESSIONS,
    TARGET_CLIP,
    CompositeLoss,
    negative_sharpe,
    portfolio_returns,
    rank_correlation_loss,
    standardise,
)

N, S, H = 12, 3, len(HORIZONS)


def example(seed: int = 0, n: int = N, s: int = S) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, raw targets with missing ones and an outlier, and members, in float64."""
    g = torch.Generator().manual_seed(seed)
    scores = 0.1 * torch.randn(n, s, H, generator=g, dtype=torch.float64)
    target = 0.02 * torch.randn(n, s, H, generator=g, dtype=torch.float64)
    target[0, 0, 1] = torch.nan
    target[3, :, :] = 0.9
    member = torch.rand(n, s, generator=g) > 0.2
    return scores, target, member


def sessions_of(scores: torch.Tensor, target: torch.Tensor, member: torch.Tensor, h: int) -> list[tuple]:
    """(score, z, raw target) of the valid stocks, session by session, as numpy arrays."""
    found = []
    for s in range(scores.shape[1]):
        rows = [i for i in range(len(scores)) if member[i, s] and math.isfinite(target[i, s, h])]
        y = target[rows, s, h].numpy()
        if len(rows) < 2 or y.std() == 0.0:
            continue
        z = np.clip((y - y.mean()) / y.std(), -TARGET_CLIP, TARGET_CLIP)
        found.append((scores[rows, s, h].detach().numpy(), z, y))
    return found


def slow_mse(score: np.ndarray, z: np.ndarray) -> float:
    return float(np.mean((score - z) ** 2))


def slow_ic(score: np.ndarray, z: np.ndarray) -> float:
    return 1.0 - float(np.corrcoef(score, z)[0, 1])


def slow_variance_penalty(score: np.ndarray, z: np.ndarray) -> float:
    return max(0.0, 1.0 - score.std() / z.std() / DISPERSION_FLOOR) ** 2


@pytest.mark.parametrize(
    ("term", "slow", "scale"),
    [("mse", slow_mse, 1.0), ("ic", slow_ic, 1.0), ("variance_penalty", slow_variance_penalty, 0.05)],
)
def test_term_matches_its_definition_session_by_session(term: str, slow: Callable, scale: float) -> None:
    scores, target, member = example()
    scores = scores * scale
    loss = CompositeLoss(LossConfig())(scores, target, member, epoch=1)
    shares = np.array(LossConfig().horizon_weights) / sum(LossConfig().horizon_weights)
    expected = sum(
        share * np.mean([slow(score, z) for score, z, _ in sessions_of(scores, target, member, h)])
        for h, share in enumerate(shares)
    )
    # The eps inside the root moves a correlation by eps / (2 variance), here 1e-6.
    assert loss.raw[term].item() == pytest.approx(expected, abs=2e-6)
    assert expected > 0.0


@pytest.mark.parametrize("shape", ["normal", "heavy-tailed"])
def test_rank_term_is_near_one_minus_spearman(shape: str) -> None:
    rng = np.random.default_rng(3)
    y = rng.normal(size=300)
    y[:60] = 0.0  # ties
    score = 0.5 * y + rng.normal(size=300)
    score = score**3 if shape == "heavy-tailed" else score
    order = lambda v: np.array([(v < x).sum() + ((v == x).sum() + 1) / 2 for x in v])  # noqa: E731
    spearman = np.corrcoef(order(score), order(y))[0, 1]
    batch = standardise(
        torch.from_numpy(score)[:, None, None], torch.from_numpy(y)[:, None, None], torch.ones(300, 1, dtype=torch.bool)
    )
    # A soft rank blurs by a tenth of a std: neighbours in the crowded middle of heavy tails blur more.
    assert rank_correlation_loss(batch).item() == pytest.approx(1 - spearman, abs=0.01 if shape == "normal" else 0.05)


def slow_portfolio(score: np.ndarray, y: np.ndarray) -> float:
    deviation = score - score.mean()
    weight = deviation / (np.abs(deviation).sum() + EXPOSURE_EPS * len(score))
    return float(weight @ (y - y.mean()))


def test_sharpe_term_is_that_of_the_soft_portfolio() -> None:
    scores, target, member = example(s=SHARPE_SESSIONS)
    returns = np.array([slow_portfolio(score, y) for score, _, y in sessions_of(scores, target, member, 0)])
    loss = CompositeLoss(LossConfig(sharpe=1.0))(scores, target, member, epoch=1)
    expected = -returns.mean() / math.sqrt(returns.var(ddof=1) + RETURN_VARIANCE_EPS)
    assert loss.raw["sharpe"].item() == pytest.approx(expected, rel=1e-9)


def test_sharpe_term_borrows_sessions_of_earlier_batches_of_the_epoch() -> None:
    scores, target, member = example(s=24)
    loss = CompositeLoss(LossConfig(mse=0.0, sharpe=1.0))
    batches = [slice(0, 10), slice(10, 20), slice(20, 24)]
    seen = []
    for b in batches:
        part = scores[:, b].clone().requires_grad_()
        terms = loss(part, target[:, b], member[:, b], epoch=1)
        terms.total.backward()
        seen.append((terms.raw["sharpe"].item(), part.grad.abs().max().item()))
    all_returns = portfolio_returns(standardise(scores, target, member))
    assert seen[0] == (0.0, 0.0)  # 10 sessions are fewer than 16
    assert seen[1][0] == pytest.approx(negative_sharpe(all_returns[4:20]).item())
    assert seen[2][0] == pytest.approx(negative_sharpe(all_returns[8:24]).item())
    assert seen[1][1] > 0.0
    next_epoch = loss(scores[:, :10], target[:, :10], member[:, :10], epoch=2)
    assert next_epoch.raw["sharpe"].item() == 0.0


def test_evaluating_does_not_touch_the_training_memory() -> None:
    scores, target, member = example(s=16)
    with_evaluation, without = CompositeLoss(LossConfig(sharpe=1.0)), CompositeLoss(LossConfig(sharpe=1.0))
    results = []
    for loss in (with_evaluation, without):
        first = scores[:, :8].clone().requires_grad_()
        loss(first, target[:, :8], member[:, :8], epoch=1)
        if loss is with_evaluation:
            with torch.no_grad():
                loss(-scores, target, member, epoch=1)
        second = scores[:, 8:].clone().requires_grad_()
        results.append(loss(second, target[:, 8:], member[:, 8:], epoch=1).raw["sharpe"].item())
    assert results[0] == results[1] != 0.0


@pytest.mark.parametrize("term", LOSS_TERMS)
def test_gradient_matches_finite_differences(term: str) -> None:
    scores, target, member = example(seed=1, n=5, s=SHARPE_SESSIONS if term == "sharpe" else 2)
    scores = scores * (0.01 if term == "variance_penalty" else 1.0)
    config = LossConfig(**{**dict.fromkeys(LOSS_TERMS, 0.0), term: 2.0})

    def total(x: torch.Tensor) -> torch.Tensor:
        return CompositeLoss(config)(x, target, member, epoch=1).total

    assert torch.autograd.gradcheck(total, scores.requires_grad_(), eps=1e-7, atol=1e-5)


ALL_TERMS = LossConfig(mse=1.0, ic=1.0, rank_ic=1.0, sharpe=1.0, variance_penalty=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "case", ["constant predictions", "ties", "two stocks", "one stock", "no target", "equal target"]
)
def test_terms_and_gradients_are_finite_on(case: str, dtype: torch.dtype) -> None:
    scores, target, member = example(s=SHARPE_SESSIONS)
    scores, target = scores.to(dtype), target.to(dtype)
    if case == "constant predictions":
        scores = torch.full_like(scores, 0.3)
    elif case == "ties":
        scores = scores.round(decimals=1)
    elif case == "two stocks":
        member[:, 1], member[:2, 1] = False, True
    elif case == "one stock":
        member[:, 1], member[0, 1] = False, True
    elif case == "no target":
        target[:, 2] = torch.nan
    else:
        target[:, 2] = 0.1
    scores = scores.clone().requires_grad_()
    terms = CompositeLoss(ALL_TERMS)(scores, target, member, epoch=1)
    terms.total.backward()
    assert torch.isfinite(terms.total)
    assert all(torch.isfinite(value) for value in terms.raw.values())
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("empty", ["one stock", "no target", "equal target"])
def test_a_session_without_two_different_targets_contributes_nothing(empty: str) -> None:
    scores, target, member = example(s=SHARPE_SESSIONS + 1)
    if empty == "one stock":
        member[:, -1], member[0, -1] = False, True
    else:
        target[:, -1] = torch.nan if empty == "no target" else 0.1
    scores.requires_grad_()
    terms = CompositeLoss(ALL_TERMS)(scores, target, member, epoch=1)
    terms.total.backward()
    without = CompositeLoss(ALL_TERMS)(scores[:, :-1], target[:, :-1], member[:, :-1], epoch=1)
    assert terms.total.item() == pytest.approx(without.total.item(), rel=1e-12)
    assert (scores.grad[:, -1] == 0).all()


def test_stocks_outside_the_universe_and_without_target_change_nothing() -> None:
    scores, target, member = example(s=SHARPE_SESSIONS)
    before = CompositeLoss(ALL_TERMS)(scores, target, member, epoch=1)
    other = torch.where(member.unsqueeze(-1) & target.isfinite(), scores, 1e6)
    target = torch.where(member.unsqueeze(-1), target, torch.nan)
    assert CompositeLoss(ALL_TERMS)(other, target, member, epoch=1).raw == before.raw


def test_weighted_terms_add_up_and_zero_weights_are_still_recorded() -> None:
    scores, target, member = example(s=SHARPE_SESSIONS)
    config = LossConfig(mse=0.5, ic=0.25)
    terms = CompositeLoss(config)(scores, target, member, epoch=1)
    assert terms.total.item() == pytest.approx(sum(v.item() for v in terms.weighted.values()))
    assert set(terms.raw) == set(terms.weighted) == set(LOSS_TERMS)
    assert terms.raw["rank_ic"].item() != 0.0
    assert terms.weighted["rank_ic"].item() == 0.0
    assert terms.weighted["ic"].item() == pytest.approx(0.25 * terms.raw["ic"].item())


def test_leaving_idle_terms_out_changes_neither_the_loss_nor_its_gradient() -> None:
    results = {}
    for with_idle in (True, False):
        scores, target, member = example(s=SHARPE_SESSIONS)
        scores.requires_grad_(True)
        terms = CompositeLoss(LossConfig(mse=0.5, ic=0.25))(scores, target, member, epoch=1, with_idle=with_idle)
        terms.total.backward()
        results[with_idle] = terms, scores.grad
    (full, gradient), (lean, lean_gradient) = results[True], results[False]
    assert set(full.raw) - set(lean.raw) == {"rank_ic", "variance_penalty"}
    assert all(lean.raw[term] == full.raw[term] for term in lean.raw)
    assert lean.total == full.total
    assert torch.equal(lean_gradient, gradient)


def test_a_phase_replaces_the_weights_it_names() -> None:
    scores, target, member = example()
    config = LossConfig(mse=1.0, phases=(LossPhase(2, 3, {"mse": 0.0, "ic": 2.0}),))
    loss = CompositeLoss(config)
    weighted = {epoch: loss(scores, target, member, epoch).weighted for epoch in (1, 2, 4)}
    assert weighted[1]["mse"] == weighted[4]["mse"] > 0
    assert weighted[2]["mse"] == 0
    assert weighted[2]["ic"] > 0 == weighted[1]["ic"]


def test_horizon_weights_are_shares() -> None:
    scores, target, member = example()
    one = CompositeLoss(LossConfig(horizon_weights=(1.0, 0.5, 0.25, 0.25)))(scores, target, member, 1)
    tenfold = CompositeLoss(LossConfig(horizon_weights=(10.0, 5.0, 2.5, 2.5)))(scores, target, member, 1)
    only_first = CompositeLoss(LossConfig(horizon_weights=(1.0, 0.0, 0.0, 0.0)))(scores, target, member, 1)
    assert one.total.item() == pytest.approx(tenfold.total.item())
    assert one.total.item() != pytest.approx(only_first.total.item())


def test_perfect_scores_have_no_error() -> None:
    _, target, member = example(s=SHARPE_SESSIONS)
    z = standardise(target, target, member).z
    terms = CompositeLoss(ALL_TERMS)(z, target, member, 1)
    assert terms.raw["mse"].item() == 0.0
    assert terms.raw["ic"].item() == pytest.approx(0.0, abs=SCORE_VARIANCE_EPS)
    assert terms.raw["rank_ic"].item() < 0.1
    assert terms.raw["variance_penalty"].item() == 0.0
    assert terms.raw["sharpe"].item() < 0.0


def test_every_term_is_a_session_term_or_the_sharpe() -> None:
    assert {*SESSION_TERMS, "sharpe"} == set(LOSS_TERMS)
