"""The contribution of each loss term to the gradient that training used.

A configured weight says what was meant. Here the gradient of the trained loss with respect to the scores is decomposed
into the gradients of the terms, which are computed anew. So a term that is detached, swallowed by an exception or read
by nothing has an effective weight of 0, whatever its value does.

Shapes: N stocks, S sessions, H horizons.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atft_pipeline.config.schema import LOSS_TERMS, LossConfig
from atft_pipeline.training.losses import SHARPE_SESSIONS, averaged, negative_sharpe, portfolio_returns, standardise

Values = NDArray[np.float64]


class LossGradients(NamedTuple):
    """Contributions to the gradient of one block's loss. A term without a gradient of its own there, such as a penalty
    that is not in force, has none."""

    effective_weight: dict[str, float]
    """Least-squares coefficient of the term's gradient in that of the loss: the configured weight, if the loss is what
    it says. 0 for a term whose value does not depend on the scores."""
    share: dict[str, float]
    """l2 of the term's contribution, its gradient times its configured weight, over the sum over terms."""
    cosine: dict[str, float]
    """Cosine of the term's contribution with the sum of the others; negative where they oppose each other."""
    residual: float
    """Share of the l2 of the loss's gradient that the terms do not explain."""


def loss_gradients(
    gradient: Tensor, scores: Tensor, target: Tensor, member: Tensor, config: LossConfig, epoch: int
) -> LossGradients | None:
    """Decomposition of `gradient: [N, S, H]`, that of the loss with respect to `scores: [N, S, H]`.

    None where the Sharpe term has a weight and fewer sessions than it needs: it then borrows from earlier blocks.
    """
    weights = config.weights_at(epoch)
    if weights["sharpe"] > 0 and member.shape[1] < SHARPE_SESSIONS:
        return None
    gradients = _term_gradients(scores, target, member, config)
    detached = {term: 0.0 for term, values in gradients.items() if values is not None and not values.size}
    of_terms = {term: values for term, values in gradients.items() if values is not None and np.any(values)}
    given = _flat(gradient)
    if not of_terms:
        return LossGradients(detached, {}, {}, float(np.any(given)))
    terms = list(of_terms)
    size = {term: _norm(of_terms[term]) for term in terms}
    basis = [of_terms[term] / size[term] for term in terms]
    gram = np.array([[_dot(a, b) for b in basis] for a in basis])
    # Singular where two terms have the same direction: the least-squares solution of least norm shares the weight.
    solution = np.linalg.pinv(gram) @ np.array([_dot(a, given) for a in basis])
    unexplained = given - sum(share * part for share, part in zip(solution, basis, strict=True))
    contributions = {term: weights[term] * of_terms[term] for term in terms if weights[term] > 0}
    total_l2 = sum(_norm(contribution) for contribution in contributions.values())
    return LossGradients(
        detached | {term: float(share / size[term]) for term, share in zip(terms, solution, strict=True)},
        {term: _norm(contribution) / total_l2 for term, contribution in contributions.items()},
        _cosines(contributions),
        _norm(unexplained) / _norm(given) if np.any(given) else 1.0,
    )


def _flat(values: Tensor) -> Values:
    return values.detach().double().cpu().numpy().reshape(-1)


def _dot(a: Values, b: Values) -> float:
    """The dot product, summed by numpy in one thread: the rounding of a matrix product depends on the free threads."""
    return float((a * b).sum())


def _norm(a: Values) -> float:
    return math.sqrt(_dot(a, a))


@torch.enable_grad()
def _term_gradients(scores: Tensor, target: Tensor, member: Tensor, config: LossConfig) -> dict[str, Values | None]:
    """Flat gradient of each term's raw value with respect to the scores.

    None where the block is too small for the term; empty where the value does not depend on the scores.
    """
    leaf = scores.detach().clone().requires_grad_()
    batch = standardise(leaf, target, member)

    def gradient(term: str) -> Values | None:
        if term == "sharpe":
            if member.shape[1] < SHARPE_SESSIONS:
                return None
            returns = portfolio_returns(batch)
            value = negative_sharpe(returns) if len(returns) >= SHARPE_SESSIONS else 0.0 * returns.sum()
        else:
            value = averaged(term, batch, config.horizon_weights)
        return _flat(torch.autograd.grad(value, leaf, retain_graph=True)[0]) if value.requires_grad else np.empty(0)

    return {term: gradient(term) for term in LOSS_TERMS}


def _cosines(contributions: dict[str, Values]) -> dict[str, float]:
    """Cosine of each contribution with the sum of the others; empty for a single one."""
    if len(contributions) < 2:
        return {}
    total = np.sum(list(contributions.values()), axis=0)
    return {
        term: _dot(own, total - own) / max(_norm(own) * _norm(total - own), 1e-300)
        for term, own in contributions.items()
    }
