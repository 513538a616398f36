"""Daily returns of the portfolios that a score would have held: the only code that turns scores into returns.

T sessions, N stocks. `scores[t]` is known at the close of session t. `targets[t]` is the forward return from the
execution price: with the default, next open and one session, it is earned from the open of t+1 to the open of t+2. A
position of session t is entered at the start of that interval and left, or kept, at its end. The value filed under t is
therefore known only at the end of its interval. Columns are codes in ascending order, which breaks ties.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

JPX_PORTFOLIO_SIZE = 200
"""Names per side of the JPX spread portfolio; a session with fewer than twice as many has none."""
JPX_TOP_WEIGHT = 2.0
"""Weight of the first name of a side; the last one has weight 1."""

COSTS_BPS: tuple[float, ...] = (0.0, 5.0, 10.0)
"""Trading costs at which reports show a portfolio."""
_BPS = 1e-4
_WHOLE = 1e-9  # 0.29 * 100 is 28.999999999999996: without it a leg would lose a stock


@dataclass(frozen=True)
class DailyPortfolio:
    """One value per session, [T]; NaN where the session has no portfolio."""

    gross: NDArray[np.float64]
    net: NDArray[np.float64]
    turnover: NDArray[np.float64]
    """Sum of absolute weight changes, 2 for entering both legs, 4 for reversing them."""
    stocks: NDArray[np.int64]
    """Stocks ranked: those with both a score and a target."""


def rankable(scores: NDArray[np.floating], targets: NDArray[np.floating]) -> NDArray[np.bool_]:
    """[T, N] cells that enter the ranking: score and target finite. Null targets leave before ranking."""
    return np.isfinite(scores) & np.isfinite(targets)


def rank_order(scores: NDArray[np.floating], usable: NDArray[np.bool_]) -> NDArray[np.int64]:
    """[T, N] column indices, best score first, equal scores by code ascending, unusable cells last."""
    keys = np.where(usable, -np.asarray(scores, np.float64), np.inf)
    return np.argsort(keys, axis=1, kind="stable")


def long_short_weights(scores: NDArray[np.floating], usable: NDArray[np.bool_], quantile: float) -> NDArray[np.float64]:
    """Weights [T, N] as shares of capital: 1/k on the first k = floor(n * quantile) stocks, -1/k on the last k.

    n counts the session's usable stocks. Rows of a session with k < 1 are all zero.
    """
    position = np.empty(usable.shape, np.int64)
    order = rank_order(scores, usable)
    np.put_along_axis(position, order, np.broadcast_to(np.arange(usable.shape[1]), usable.shape), axis=1)
    stocks = usable.sum(axis=1, keepdims=True)
    leg = np.floor(stocks * quantile + _WHOLE).astype(np.int64)
    side = (position < leg).astype(np.float64) - ((position >= stocks - leg) & usable)
    return side / np.maximum(leg, 1)


def after_costs(gross: NDArray[np.float64], turnover: NDArray[np.float64], cost_bps: float) -> NDArray[np.float64]:
    """Daily returns [T] of a portfolio that pays `cost_bps` of every traded amount; NaN where `gross` is."""
    return gross - cost_bps * _BPS * turnover


def long_short(
    scores: NDArray[np.floating], targets: NDArray[np.floating], *, quantile: float, cost_bps: float
) -> DailyPortfolio:
    """Equal-weight long-short portfolio, rebalanced every session.

    Gross is the mean return of the first leg minus the mean return of the last. Turnover of t is the sum of absolute
    differences to the weights of the session before, which have drifted with their returns:
    w (1 + r) / (1 + gross). The first session's turnover is the entry, 2. Net = gross - cost_bps/1e4 * turnover.
    A session with floor(n * quantile) < 1 has no portfolio (NaN); the next one trades against the last weights held.
    After a total loss (1 + gross <= 0) no weight is left: the next session is an entry again.
    """
    usable = rankable(scores, targets)
    weights = long_short_weights(scores, usable, quantile)
    returns = np.where(usable, targets, 0.0).astype(np.float64)
    held = weights.any(axis=1)
    gross = np.where(held, (weights * returns).sum(axis=1), np.nan)
    turnover = np.full(len(gross), np.nan)
    turnover[held] = np.abs(_changes(weights[held], returns[held], gross[held])).sum(axis=1)
    return DailyPortfolio(gross, after_costs(gross, turnover, cost_bps), turnover, usable.sum(axis=1))


@dataclass(frozen=True)
class Book:
    """What `long_short` holds and trades, stock by stock; rows [T, N] of a session without a portfolio are zero."""

    weights: NDArray[np.float64]
    trades: NDArray[np.float64]
    """Signed change to the drifted weights of the session before; |trades| of a session sum to its turnover."""
    ranked: NDArray[np.bool_]


def long_short_book(scores: NDArray[np.floating], targets: NDArray[np.floating], *, quantile: float) -> Book:
    """Weights and trades behind the figures of `long_short` for the same arguments."""
    usable = rankable(scores, targets)
    weights = long_short_weights(scores, usable, quantile)
    returns = np.where(usable, targets, 0.0).astype(np.float64)
    held = weights.any(axis=1)
    trades = np.zeros_like(weights)
    trades[held] = _changes(weights[held], returns[held], (weights[held] * returns[held]).sum(axis=1))
    return Book(weights, trades, usable)


def _changes(
    weights: NDArray[np.float64], returns: NDArray[np.float64], gross: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Differences [T, N] to the weights of the session before, drifted with their returns; the first is the entry."""
    capital = 1.0 + gross[:, None]
    solvent = capital > 0.0
    drifted = np.where(solvent, weights * (1.0 + returns) / np.where(solvent, capital, 1.0), 0.0)
    before = np.vstack([np.zeros((1, weights.shape[1])), drifted[:-1]])
    return weights - before


def long_short_tranches(
    scores: NDArray[np.floating],
    returns_1d: NDArray[np.floating],
    horizon_sessions: int,
    *,
    quantile: float,
    cost_bps: float,
) -> DailyPortfolio:
    """Daily returns of a score whose horizon spans h sessions: h tranches, one formed each session, each held for h.

    Each new tranche gets 1/h of the capital and drifts without trades until it is replaced, so that every session's
    return is counted once although the forecasts overlap. `returns_1d` [T, N] is the one-session forward return
    (`target_1d`); a holding without one earns 0 that session. A tranche of a session without a portfolio is cash.
    The book is reported from session h-1 on, when every tranche is invested; that session pays for all the entries.
    """
    returns = np.where(np.isfinite(returns_1d), returns_1d, 0.0).astype(np.float64)
    usable = rankable(scores, returns_1d)
    formed = long_short_weights(scores, usable, quantile) / horizon_sessions
    book = np.zeros((horizon_sessions, scores.shape[1]))
    gross = np.full(len(scores), np.nan)
    turnover = np.full(len(scores), np.nan)
    entries = 0.0
    for t in range(len(scores)):
        before = book.sum(axis=0)
        book[t % horizon_sessions] = formed[t]
        weights = book.sum(axis=0)
        entries += np.abs(weights - before).sum()
        earned = float(weights @ returns[t])
        if t >= horizon_sessions - 1 and book.any():
            gross[t], turnover[t], entries = earned, entries, 0.0
        book *= (1.0 + returns[t]) / (1.0 + earned) if earned > -1.0 else 0.0
    return DailyPortfolio(gross, after_costs(gross, turnover, cost_bps), turnover, usable.sum(axis=1))


def jpx_spread_returns(scores: NDArray[np.floating], targets: NDArray[np.floating]) -> NDArray[np.float64]:
    """Daily spread return [T] of the JPX competition: 200 names a side, weights linearly 2 to 1 from the best inwards.

    Each side is sum(weight * return) / mean(weight), so the level is about 200 times a portfolio return; only its
    Sharpe is meant to be read. NaN in a session with fewer than 400 rankable names.
    Source: JPX Tokyo Stock Exchange Prediction (Kaggle, 2022), evaluation metric.
    """
    usable = rankable(scores, targets)
    spread = np.full(len(scores), np.nan)
    enough = usable.sum(axis=1) >= 2 * JPX_PORTFOLIO_SIZE
    if not enough.any():
        return spread
    weights = np.linspace(JPX_TOP_WEIGHT, 1.0, JPX_PORTFOLIO_SIZE)
    order = rank_order(scores[enough], usable[enough])
    ranked = np.take_along_axis(np.asarray(targets, np.float64)[enough], order, axis=1)
    last = usable[enough].sum(axis=1)[:, None] - 1 - np.arange(JPX_PORTFOLIO_SIZE)
    bought = ranked[:, :JPX_PORTFOLIO_SIZE] @ weights
    sold = np.take_along_axis(ranked, last, axis=1) @ weights
    spread[enough] = (bought - sold) / weights.mean()
    return spread
