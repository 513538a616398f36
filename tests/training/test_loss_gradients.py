"""The effective weight of each loss term, recovered from the gradient, whatever the configuration says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from atft_pipeline.config.schema import LOSS_TERMS, LossConfig, LossPhase
from atft_pipeline.training.losses import SHARPE_SESSIONS, CompositeLoss, averaged, standardise
from atft_pipeline.training.telemetry.loss_gradients import LossGradients, loss_gradients

STOCKS, SESSIONS, HORIZONS = 12, 20, 4
IN_FORCE = 0.01
"""Size of scores so small that the variance penalty is in force."""


class Case:
    """Random scores and targets of one block, with a missing target and a stock that is no member for a while."""

    def __init__(self, seed: int = 0, sessions: int = SESSIONS, size: float = IN_FORCE) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (STOCKS, sessions, HORIZONS)
        self.scores = (size * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
        self.target = 0.02 * torch.randn(shape, generator=generator, dtype=torch.float64)
        self.target[2, 1, 1] = torch.nan
        self.member = torch.ones(STOCKS, sessions, dtype=torch.bool)
        self.member[5, :2] = False

    def total(self, config: LossConfig) -> Tensor:
        return CompositeLoss(config)(self.scores, self.target, self.member, 1).total

    def raw(self, term: str) -> Tensor:
        return averaged(term, standardise(self.scores, self.target, self.member), LossConfig().horizon_weights)

    def decomposed(self, loss: Tensor, config: LossConfig) -> LossGradients | None:
        (gradient,) = torch.autograd.grad(loss, self.scores)
        return loss_gradients(gradient, self.scores, self.target, self.member, config, 1)


def measured(loss: Callable[[Case], Tensor], config: LossConfig, case: Case | None = None) -> LossGradients:
    case = case or Case()
    found = case.decomposed(loss(case), config)
    assert found is not None
    return found


def random_config(seed: int) -> LossConfig:
    generator = torch.Generator().manual_seed(seed)
    weights = (0.05 + torch.rand(len(LOSS_TERMS), generator=generator)).tolist()
    horizons = tuple((0.1 + torch.rand(HORIZONS, generator=generator)).tolist())
    return LossConfig(**dict(zip(LOSS_TERMS, weights, strict=True)), horizon_weights=horizons)


@pytest.mark.parametrize("seed", range(5))
def test_effective_weights_are_the_configured_ones_whatever_they_are(seed: int) -> None:
    config = random_config(seed)
    found = measured(lambda case: case.total(config), config, Case(seed))
    expected = {term: getattr(config, term) for term in LOSS_TERMS}
    assert found.effective_weight == pytest.approx(expected, rel=1e-6)
    assert found.residual < 1e-6
    assert sum(found.share.values()) == pytest.approx(1.0)


def test_other_horizon_weights_than_configured_show_in_the_residual() -> None:
    meant = LossConfig(mse=1.0, horizon_weights=(1.0, 0.0, 0.0, 0.0))
    computed = LossConfig(mse=1.0, horizon_weights=(1.0, 1.0, 1.0, 1.0))
    assert measured(lambda case: case.total(computed), meant).residual > 0.8


def test_penalty_that_is_not_in_force_has_no_weight_to_be_told() -> None:
    config = LossConfig(mse=1.0, variance_penalty=0.5)
    found = measured(lambda case: case.total(config), config, Case(size=1.0))
    assert "variance_penalty" not in found.effective_weight
    assert found.effective_weight["mse"] == pytest.approx(1.0, rel=1e-6)


def test_idle_term_has_an_effective_weight_of_zero() -> None:
    config = LossConfig(mse=1.0)
    found = measured(lambda case: case.total(config), config)
    assert found.effective_weight["ic"] == pytest.approx(0.0, abs=1e-6)
    assert found.share == {"mse": pytest.approx(1.0)}
    assert found.cosine == {}


FAULTS: dict[str, tuple[Callable[[Case], Tensor], float]] = {
    "detached": (lambda case: case.raw("mse") + 0.5 * case.raw("ic").detach(), 0.0),
    "swallowed": (lambda case: case.raw("mse"), 0.0),
    "sign turned": (lambda case: case.raw("mse") - 0.5 * case.raw("ic"), -0.5),
    "doubled": (lambda case: case.raw("mse") + 2 * 0.5 * case.raw("ic"), 1.0),
}
"""A loss that is not mse + 0.5 ic, and the weight that its ic has."""


@pytest.mark.parametrize("name", FAULTS)
def test_term_that_is_not_what_it_says_is_seen(name: str) -> None:
    loss, effective = FAULTS[name]
    found = measured(loss, LossConfig(mse=1.0, ic=0.5))
    assert found.effective_weight["ic"] == pytest.approx(effective, abs=1e-6)
    assert found.effective_weight["mse"] == pytest.approx(1.0, rel=1e-6)
    assert found.residual < 1e-6


def test_what_is_added_to_the_loss_shows_in_the_residual() -> None:
    config = LossConfig(mse=1.0, ic=0.5)
    foreign = torch.randn(STOCKS, SESSIONS, HORIZONS, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def loss(case: Case) -> Tensor:
        return case.total(config) + (foreign * case.scores).sum()

    assert measured(lambda case: case.total(config), config).residual < 1e-6
    assert measured(loss, config).residual > 0.3


def test_loss_without_gradient_is_explained_by_nothing() -> None:
    config = LossConfig(mse=1.0, ic=0.5)
    found = measured(lambda case: 0.0 * case.scores.sum(), config)
    assert found.effective_weight["mse"] == 0.0
    assert found.residual == 1.0


def test_terms_that_pull_apart_have_a_negative_cosine() -> None:
    """The mse wants small scores where the penalty wants them spread: of scores unlike the targets."""
    config = LossConfig(mse=1.0, variance_penalty=0.1)
    case = Case(size=IN_FORCE)
    z = standardise(case.scores.detach(), case.target, case.member).z
    case.scores = (-IN_FORCE * z).requires_grad_()
    found = measured(lambda case: case.total(config), config, case)
    assert found.cosine["mse"] < -0.5
    assert found.cosine["mse"] == pytest.approx(found.cosine["variance_penalty"])


@pytest.mark.parametrize(("sessions", "told"), [(SHARPE_SESSIONS - 1, False), (SHARPE_SESSIONS, True)])
def test_sharpe_term_is_told_only_from_as_many_sessions_as_it_needs(sessions: int, told: bool) -> None:
    case, config = Case(sessions=sessions), LossConfig(mse=1.0, sharpe=0.3)
    found = case.decomposed(case.total(config), config)
    assert (found is not None) == told
    if found is not None:
        assert found.effective_weight["sharpe"] == pytest.approx(0.3, rel=1e-6)


def test_few_sessions_suffice_where_the_sharpe_term_has_no_weight() -> None:
    config = LossConfig(mse=1.0, ic=0.2)
    found = measured(lambda case: case.total(config), config, Case(sessions=3))
    assert "sharpe" not in found.effective_weight
    assert found.effective_weight["ic"] == pytest.approx(0.2, rel=1e-6)


def test_constant_scores_give_finite_figures() -> None:
    case, config = Case(), random_config(0)
    case.scores = torch.full_like(case.scores, 0.25).requires_grad_()
    found = measured(lambda case: case.total(config), config, case)
    figures = [*found.effective_weight.values(), *found.share.values(), *found.cosine.values(), found.residual]
    assert torch.tensor(figures).isfinite().all()
    assert "variance_penalty" not in found.effective_weight


def test_block_without_a_member_says_nothing_and_is_no_traceback() -> None:
    case, config = Case(), LossConfig(mse=1.0)
    case.member[:] = False
    found = measured(lambda case: case.total(config), config, case)
    assert found == LossGradients({}, {}, {}, 0.0)


def test_phase_of_the_epoch_says_which_weights_were_meant() -> None:
    """In epoch 1 the sharpe term has no weight by its phase, so that few sessions suffice and it has no share."""
    config = LossConfig(mse=1.0, ic=0.5, sharpe=0.3, phases=(LossPhase(1, 1, {"ic": 2.0, "sharpe": 0.0}),))
    found = measured(lambda case: case.total(config), config, Case(sessions=3))
    assert found.effective_weight["ic"] == pytest.approx(2.0, rel=1e-6)
    assert set(found.share) == {"mse", "ic"}


def test_scores_keep_their_own_gradient() -> None:
    case, config = Case(), LossConfig(mse=1.0)
    case.decomposed(case.total(config), config)
    assert case.scores.grad is None
