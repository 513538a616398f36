"""The composite loss: five terms per session across its stocks, averaged over sessions, weighted by horizon and phase.

Shapes: N stocks, S sessions, H horizons, A anchors. Targets are raw forward returns; here they become per-session
z-scores (ddof 0) clipped at ± `TARGET_CLIP`. A stock counts where it is a member with a target; a session counts for a
horizon when at least two such stocks differ in their target. The mean over an empty set of sessions is 0, without
gradient. With an eps inside every root, all terms and their gradients are finite on constant predictions.

Scores are not standardised: the dispersion of the predictions is part of what is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from atft_pipeline.config.schema import LOSS_TERMS, LossConfig

TARGET_CLIP: float = 5.0
SCORE_VARIANCE_EPS: float = 1e-8
"""Added to the variance of the scores in correlations. It is a std of 1e-4, far under a healthy one of 0.014."""

RANK_ANCHORS: int = 32
RANK_TEMPERATURE: float = 0.1
"""Width of the step of a soft rank, in std of the session's scores."""

SHARPE_SESSIONS: int = 16
"""Sessions that the Sharpe term needs for a usable std. Smaller batches borrow from earlier ones."""

RETURN_VARIANCE_EPS: float = 1e-8
"""Added to the variance of the portfolio return. It is a daily std of 1e-4, a hundredth of a usual one."""

EXPOSURE_EPS: float = 1e-6
"""Added to the mean absolute score that scales the soft portfolio's weights."""

DISPERSION_FLOOR: float = 0.02
"""Ratio of within-session stds, predictions over target, under which the variance penalty starts. Healthy networks have
0.014 to 0.1. A larger floor would work against the squared error."""


class LossTerms(NamedTuple):
    """`total` carries the gradient; `raw` and `weighted` are detached scalars, one per loss term."""

    total: Tensor
    raw: dict[str, Tensor]
    weighted: dict[str, Tensor]


class Batch(NamedTuple):
    """Scores and standardised targets of a batch, 0 where invalid."""

    score: Tensor
    """[N, S, H]"""
    z: Tensor
    """[N, S, H] standardised, clipped target."""
    returns: Tensor
    """[N, S, H] raw target."""
    valid: Tensor
    """[N, S, H] bool."""
    stocks: Tensor
    """[S, H] valid stocks, at least 1."""
    usable: Tensor
    """[S, H] bool."""


def standardise(scores: Tensor, target: Tensor, member: Tensor) -> Batch:
    """The batch that the terms read: `scores, target: [N, S, H]` (NaN targets are missing), `member: [N, S]`."""
    valid = member.unsqueeze(-1) & target.isfinite()
    valid_stocks = valid.sum(dim=0)
    count = valid_stocks.clamp(min=1).to(scores.dtype)
    returns = torch.where(valid, target, 0.0).to(scores.dtype)
    centred = torch.where(valid, returns - returns.sum(dim=0) / count, 0.0)
    std = ((centred * centred).sum(dim=0) / count).sqrt()
    # Relative to the size of the returns: the mean of equal returns has a rounding error, which is no dispersion.
    usable = (valid_stocks >= 2) & (std > 1e-6 * returns.abs().amax(dim=0))
    valid = valid & usable
    z = torch.where(valid, centred / torch.where(usable, std, 1.0), 0.0).clamp(-TARGET_CLIP, TARGET_CLIP)
    return Batch(torch.where(valid, scores, 0.0), z, returns, valid, count, usable)


def squared_error(batch: Batch) -> Tensor:
    """Mean over stocks of (score - z)^2: `[S, H]`."""
    return (batch.score - batch.z).square().sum(dim=0) / batch.stocks


def correlation_loss(batch: Batch) -> Tensor:
    """1 - Pearson correlation of score and z: `[S, H]`."""
    return 1.0 - _pearson(batch.score, batch.z, batch, eps=SCORE_VARIANCE_EPS)


def rank_correlation_loss(batch: Batch) -> Tensor:
    """1 - correlation of the score's soft rank and the target's average rank: `[S, H]`, near 1 - Spearman.

    A soft rank is the share of A anchors below the score, each step a sigmoid `RANK_TEMPERATURE` std wide; the anchors
    are the session's own scores at A evenly spaced ranks, and carry gradient like any other score. Sorting
    costs N log N, ranking N * A, never all pairs.
    """
    infinite = torch.where(batch.valid, batch.score, torch.inf)
    ordered = infinite.sort(dim=0).values  # [N, S, H], invalid last
    steps = (torch.arange(RANK_ANCHORS, device=ordered.device) + 0.5) / RANK_ANCHORS
    positions = (steps[:, None, None] * batch.stocks).long().clamp(max=len(ordered) - 1)  # [A, S, H]
    anchors = torch.where(batch.usable, ordered.gather(0, positions), 0.0)
    mean = batch.score.sum(dim=0) / batch.stocks
    deviation = torch.where(batch.valid, batch.score - mean, 0.0)
    width = RANK_TEMPERATURE * (deviation.square().sum(dim=0) / batch.stocks + SCORE_VARIANCE_EPS).sqrt()  # [S, H]
    rank = ((batch.score - anchors.unsqueeze(1)) / width).sigmoid().mean(dim=0)  # [N, S, H]
    return 1.0 - _pearson(rank, _average_rank(batch), batch, eps=SCORE_VARIANCE_EPS)


def variance_penalty(batch: Batch) -> Tensor:
    """(1 - std(score) / (floor * std(z)))^2 where the ratio is under the floor, else 0: `[S, H]`.

    The gradient is 0 on exactly constant predictions, which have no direction to spread in. There the degeneracy guard
    re-draws the head.
    """
    ratio = (_variance(batch.score, batch) + 1e-12).sqrt() / (_variance(batch.z, batch) + 1e-12).sqrt()
    return (1.0 - ratio / DISPERSION_FLOOR).clamp(min=0.0).square()


def portfolio_returns(batch: Batch) -> Tensor:
    """Return of the soft long-short portfolio of horizon 1 in each usable session: `[S']`.

    Weights are the demeaned scores over the sum of their absolute values: net 0, gross 1.
    """
    sessions = batch.usable[:, 0]
    valid, count = batch.valid[:, sessions, 0], batch.stocks[sessions, 0]
    score, returns = batch.score[:, sessions, 0], batch.returns[:, sessions, 0]
    deviation = torch.where(valid, score - score.sum(dim=0) / count, 0.0)
    weight = deviation / (deviation.abs().sum(dim=0) + EXPOSURE_EPS * count)
    excess = torch.where(valid, returns - torch.where(valid, returns, 0.0).sum(dim=0) / count, 0.0)
    return (weight * excess).sum(dim=0)


def negative_sharpe(returns: Tensor) -> Tensor:
    """- mean / sqrt(variance + eps), ddof 1, not annualised, of the portfolio returns `[S]`."""
    return -returns.mean() / (returns.var(correction=1) + RETURN_VARIANCE_EPS).sqrt()


SESSION_TERMS = {
    "mse": squared_error,
    "ic": correlation_loss,
    "rank_ic": rank_correlation_loss,
    "variance_penalty": variance_penalty,
}


def averaged(term: str, batch: Batch, horizon_weights: Sequence[float]) -> Tensor:
    """Mean of a term over the usable sessions of each horizon, then the weighted mean over horizons."""
    by_session = torch.where(batch.usable, SESSION_TERMS[term](batch), 0.0)  # [S, H]
    by_horizon = by_session.sum(dim=0) / batch.usable.sum(dim=0).clamp(min=1)
    weights = torch.tensor(horizon_weights)
    return (by_horizon * (weights / weights.sum()).to(by_horizon)).sum()


class CompositeLoss:
    """Weighted sum of the terms, with the weights of the epoch's phase.

    The Sharpe term needs `SHARPE_SESSIONS` returns. It adds the newest returns of earlier batches of the epoch
    (detached) to those of the batch, and is 0 while these are too few. The earlier returns are dropped when the epoch
    changes, so that a run restarted from a checkpoint repeats what it would have done. Evaluation under no_grad keeps
    its own.
    """

    def __init__(self, config: LossConfig) -> None:
        self.config = config
        self._earlier_returns: dict[bool, Tensor] = {}
        self._earlier_epoch = 0

    def __call__(
        self, scores: Tensor, target: Tensor, member: Tensor, epoch: int, *, with_idle: bool = True
    ) -> LossTerms:
        """Loss of `scores: [N, S, H]` against raw `target: [N, S, H]` over `member: [N, S]` in `epoch`, from 1.

        A term of weight 0 is computed for the record, without gradient, unless `with_idle` is False.
        """
        weights = self.config.weights_at(epoch)
        batch = standardise(scores, target, member)
        total = 0.0 * scores.sum()
        raw: dict[str, Tensor] = {}
        weighted: dict[str, Tensor] = {}
        for term in LOSS_TERMS:
            if weights[term] == 0.0 and term in SESSION_TERMS and not with_idle:
                continue
            with torch.set_grad_enabled(torch.is_grad_enabled() and weights[term] > 0.0):
                if term == "sharpe":
                    value = self._sharpe(batch, epoch)
                else:
                    value = averaged(term, batch, self.config.horizon_weights)
            if weights[term] > 0.0:
                total = total + weights[term] * value
            raw[term] = value.detach()
            weighted[term] = weights[term] * value.detach()
        return LossTerms(total, raw, weighted)

    def _sharpe(self, batch: Batch, epoch: int) -> Tensor:
        if epoch != self._earlier_epoch:
            self._earlier_returns, self._earlier_epoch = {}, epoch
        returns = portfolio_returns(batch)
        training = batch.score.requires_grad
        earlier = self._earlier_returns.get(training, returns.new_empty(0))
        lacking = max(SHARPE_SESSIONS - len(returns), 0)
        joined = torch.cat([earlier[len(earlier) - min(lacking, len(earlier)) :], returns])
        self._earlier_returns[training] = torch.cat([earlier, returns.detach()])[-SHARPE_SESSIONS:]
        return negative_sharpe(joined) if len(joined) >= SHARPE_SESSIONS else 0.0 * returns.sum()


def _variance(values: Tensor, batch: Batch) -> Tensor:
    """Variance over a session's valid stocks, ddof 0: `[S, H]`."""
    mean = torch.where(batch.valid, values, 0.0).sum(dim=0) / batch.stocks
    return torch.where(batch.valid, values - mean, 0.0).square().sum(dim=0) / batch.stocks


def _pearson(a: Tensor, b: Tensor, batch: Batch, eps: float) -> Tensor:
    """Correlation over a session's valid stocks, eps added to the variance of `a`: `[S, H]`."""
    mean = torch.where(batch.valid, b, 0.0).sum(dim=0) / batch.stocks
    centred = torch.where(batch.valid, b - mean, 0.0)
    covariance = (a * centred).sum(dim=0) / batch.stocks
    variance = centred.square().sum(dim=0) / batch.stocks
    return covariance / ((_variance(a, batch) + eps) * torch.where(batch.usable, variance, 1.0)).sqrt()


@torch.no_grad()
def _average_rank(batch: Batch) -> Tensor:
    """Rank of z among a session's valid stocks, ties sharing their mean, as a share of the count: `[N, S, H]`."""
    values = torch.where(batch.valid, batch.z, torch.inf).permute(1, 2, 0).contiguous()  # [S, H, N]
    ordered = values.sort(dim=-1).values
    below = torch.searchsorted(ordered, values, side="left")
    up_to = torch.searchsorted(ordered, values, side="right")
    return ((below + up_to) / 2.0).to(batch.z.dtype).permute(2, 0, 1) / batch.stocks
