"""With which weight each loss term really pulls at the scores, read from the gradient that training used.

Shapes: N stocks, S sessions, H horizons, K terms. A configured weight says what was meant. Here the gradient of the
trained loss with respect to the scores is decomposed into the gradients that the terms, computed anew, have: a term
that is detached, swallowed by an exception or read by nothing has an effective weight of 0 whatever its value does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from atft_pipeline.config import LOSS_TERMS, LossConfig
from atft_pipeline.losses import SHARPE_SESSIONS, averaged, negative_sharpe, portfolio_returns, standardise


class LossGradients(NamedTuple):
    """Of one block's loss. A term that has no gradient of its own there (a penalty not in force) is in none of them."""

    effective_weight: dict[str, float]
    """Least-squares coefficient of the term's gradient in the loss's: its weight, if the loss is what it says. 0 for a
    term that is computed without a way back to the scores."""
    share: dict[str, float]
    """l2 of the term's gradient times its configured weight, over the sum of these."""
    cosine: dict[str, float]
    """Cosine of the term's gradient with the sum of the other weighted ones; negative where they pull apart."""
    residual: float
    """Share of the loss's gradient l2 that the terms do not explain."""


def loss_gradients(
    gradient: Tensor, scores: Tensor, target: Tensor, member: Tensor, config: LossConfig, epoch: int
) -> LossGradients | None:
    """Decomposition of `gradient: [N, S, H]`, that of the loss with respect to `scores: [N, S, H]`.

    None where the Sharpe term has a weight and fewer sessions than it needs: it then lends from earlier blocks.
    """
    weights = config.weights_at(epoch)
    if weights["sharpe"] > 0 and member.shape[1] < SHARPE_SESSIONS:
        return None
    gradients = {term: _own_gradient(term, scores, target, member, config) for term in LOSS_TERMS}
    detached = {term: 0.0 for term, found in gradients.items() if found is not None and not found.numel()}
    own = {term: found for term, found in gradients.items() if found is not None and float(found.norm()) > 0.0}
    if not own:
        return LossGradients(detached, {}, {}, float(gradient.norm() > 0.0))
    terms, given = list(own), gradient.detach().reshape(-1).double()
    norms = torch.stack([own[term].norm() for term in terms])
    basis = torch.stack([own[term] for term in terms], dim=1) / norms  # [N S H, K]
    solution = torch.linalg.lstsq(basis.T @ basis, (basis.T @ given).unsqueeze(1)).solution.squeeze(1)
    unexplained = float((given - basis @ solution).norm() / given.norm().clamp(min=1e-30))
    pulls = {term: weights[term] * own[term] for term in terms if weights[term] > 0}
    together = sum(float(pull.norm()) for pull in pulls.values())
    return LossGradients(
        detached | dict(zip(terms, (solution / norms).tolist(), strict=True)),
        {term: float(pull.norm()) / together for term, pull in pulls.items()},
        _cosines(pulls),
        unexplained if float(given.norm()) > 0.0 else 1.0,
    )


def _own_gradient(term: str, scores: Tensor, target: Tensor, member: Tensor, config: LossConfig) -> Tensor | None:
    """Gradient of the term's raw value with respect to the scores, flat.

    None where it cannot be computed alone, without any element where the value does not depend on the scores.
    """
    if term == "sharpe" and member.shape[1] < SHARPE_SESSIONS:
        return None
    with torch.enable_grad():
        leaf = scores.detach().clone().requires_grad_()
        batch = standardise(leaf, target, member)
        if term == "sharpe":
            returns = portfolio_returns(batch)
            value = negative_sharpe(returns) if len(returns) >= SHARPE_SESSIONS else 0.0 * returns.sum()
        else:
            value = averaged(term, batch, config.horizon_weights)
        if not value.requires_grad:
            return scores.new_empty(0)
        (found,) = torch.autograd.grad(value, leaf)
    return found.reshape(-1).double()


def _cosines(pulls: dict[str, Tensor]) -> dict[str, float]:
    if len(pulls) < 2:
        return {}
    everything = torch.stack(list(pulls.values())).sum(dim=0)
    return {
        term: float(torch.nn.functional.cosine_similarity(pull, everything - pull, dim=0))
        for term, pull in pulls.items()
    }
