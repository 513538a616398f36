"""With which weight each loss term really pulls at the scores, read from the gradient that training used.

Shapes: N stocks, S sessions, H horizons, K terms. A configured weight says what was meant. Here the gradient of the
trained loss with respect to the scores is decomposed into the gradients that the terms, computed anew, have: a term
that is detached, swallowed by an exception or read by nothing has an effective weight of 0 whatever its value does.
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
    gradients = _own_gradients(scores, target, member, config)
    detached = {term: 0.0 for term, found in gradients.items() if found is not None and not found.size}
    own = {term: found for term, found in gradients.items() if found is not None and np.any(found)}
    given = _flat(gradient)
    if not own:
        return LossGradients(detached, {}, {}, float(np.any(given)))
    terms = list(own)
    size = {term: _norm(own[term]) for term in terms}
    basis = [own[term] / size[term] for term in terms]
    gram = np.array([[_dot(a, b) for b in basis] for a in basis])
    # Singular where two terms pull exactly alike: the least squares of least norm share the weight.
    solution = np.linalg.pinv(gram) @ np.array([_dot(a, given) for a in basis])
    unexplained = given - sum(share * part for share, part in zip(solution, basis, strict=True))
    pulls = {term: weights[term] * own[term] for term in terms if weights[term] > 0}
    together = sum(_norm(pull) for pull in pulls.values())
    return LossGradients(
        detached | {term: float(share / size[term]) for term, share in zip(terms, solution, strict=True)},
        {term: _norm(pull) / together for term, pull in pulls.items()},
        _cosines(pulls),
        _norm(unexplained) / _norm(given) if np.any(given) else 1.0,
    )


def _flat(values: Tensor) -> Values:
    return values.detach().double().cpu().numpy().reshape(-1)


def _dot(a: Values, b: Values) -> float:
    """Summed by numpy in one thread: a matrix product's rounding depends on how many threads are free."""
    return float((a * b).sum())


def _norm(a: Values) -> float:
    return math.sqrt(_dot(a, a))


@torch.enable_grad()
def _own_gradients(scores: Tensor, target: Tensor, member: Tensor, config: LossConfig) -> dict[str, Values | None]:
    """Gradient of each term's raw value with respect to the scores, flat.

    None where it cannot be computed alone, without any element where the value does not depend on the scores.
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


def _cosines(pulls: dict[str, Values]) -> dict[str, float]:
    if len(pulls) < 2:
        return {}
    everything = np.sum(list(pulls.values()), axis=0)
    rest = {term: everything - pull for term, pull in pulls.items()}
    return {term: _dot(pull, rest[term]) / max(_norm(pull) * _norm(rest[term]), 1e-300) for term, pull in pulls.items()}
