"""One pass through the raw quotes: it masks rows, corrects adjustment factors and decides which stocks are investable.

The pass is compiled and goes through the sessions in the order of time. `StockState` carries what it needs of earlier
sessions. So no decision depends on a later session, and a later call continues where an earlier one stopped.
quarantine.py says what each rule means and what it decides.

Shapes: T sessions, N stocks, H hits. The kernels take the arrays in named tuples, which numba unpacks for free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from atft_pipeline.market.price_panel import STALE_SESSIONS, Flags, Matrix

JUMP = 0.6
"""Absolute log move that no session's price limit allows; 80 rows of ten real years exceed it, mostly penny stocks."""
BREAK = math.log(4.5)
"""Absolute log move beyond any real one; an error of scale, a fivefold jump or more with its noise, exceeds it."""
_RISE, _FALL, _WIDEST = math.exp(JUMP), math.exp(-JUMP), math.exp(BREAK)
RATIO_TOLERANCE = 0.06
"""Log distance within which a move counts as a split's. A wider one took a 45 % fall over halted sessions for a
split."""
SPLIT_RATIOS = np.array([2, 3, 4, 5, 10, 20, 50, 100, 200, 500, 1000], dtype=np.float64)
QUIET_TURNOVER = 3.0
"""A split leaves the turnover as it was, a real halving of the price multiplies it. Above this many medians a move is
not a split."""
QUIET_ROWS, QUIET_LEAST = 20, 5
"""Traded rows in the window of that median, and the fewest that it needs."""
RETURN_TOLERANCE = 0.3
"""Log distance from the old level within which a jump counts as reverted."""
_FACTOR_LIMIT, _PRODUCT_LIMIT = 1e4, 1e100
"""No exchange has seen a split or a consolidation of more than ten thousand to one, and no stock has had twenty-five of
them. Without these limits, a source that states a cumulative factor every day would soon overflow."""
SLACK = 1e-9
"""Relative rounding error that adjusted sources have in the last digits of a quote."""

RULES: tuple[str, ...] = (
    "not_listed", "not_common_stock", "price_not_positive", "negative_volume", "negative_turnover", "high_below_low",
    "price_outside_range", "range_too_wide", "bad_factor", "factor_without_jump", "split_without_factor",
    "level_break", "jump_without_factor", "jump_reverts",
)  # fmt: skip
"""Rules that this pass decides, by number."""
(
    _NOT_LISTED, _NOT_COMMON, _NOT_POSITIVE, _NEGATIVE_VOLUME, _NEGATIVE_TURNOVER, _HIGH_BELOW_LOW, _OUTSIDE,
    _TOO_WIDE, _BAD_FACTOR, _USELESS_FACTOR, _SPLIT, _LEVEL, _JUMP, _REVERTS,
) = range(len(RULES))  # fmt: skip


class Hit(NamedTuple):
    """Column numbers of a hit, all floats: the cell, the rule, and the figures of its evidence."""

    session: int = 0
    stock: int = 1
    rule: int = 2
    open: int = 3
    high: int = 4
    low: int = 5
    close: int = 6
    volume: int = 7
    factor: int = 8
    last_close: int = 9
    correction: int = 10
    listing: int = 11
    known_from: int = 12
    turnover: int = 13


HIT = Hit()
_JUMP_ROW = (HIT.open, HIT.close, HIT.factor, HIT.last_close, HIT.correction)


class Listings(NamedTuple):
    """Snapshots of `listed` by stock: those of stock n are rows `start[n]:start[n + 1]`, ascending in time."""

    start: NDArray[np.int64]
    known_from: NDArray[np.int64]
    """First session of the pass at or after the snapshot, 0 for a snapshot before the pass."""
    is_fund: Flags
    share_class: Flags
    """[N] whether the code itself denotes a preferred share or the like."""


class StockState(NamedTuple):
    """What the pass keeps of each stock after a session, `[N]` unless stated."""

    published: Matrix
    """Product of the published factors so far."""
    correction: Matrix
    """Product of the corrections so far."""
    last_close: Matrix
    """Last traded close as printed, NaN before the first."""
    last_published: Matrix
    """`published` at the last trade."""
    last_session: NDArray[np.int64]
    """Number of the last traded session, counted from the first of the data; a large negative one before any."""
    history: NDArray[np.int64]
    """Traded sessions so far."""
    last_move: Matrix
    """[N, 7] if the last trade was a jump: log move, log correction, and `_JUMP_ROW`; else 0."""
    last_useless: Flags
    """Whether the last trade's factor was read as 1 because the price did not jump."""
    turnovers: Matrix
    """[N, QUIET_ROWS] turnover of the last traded rows, a ring buffer."""
    reported: Flags
    """[N, 2] whether a hit already says that the stock is not listed, or not common."""

    @staticmethod
    def of(stocks: int) -> StockState:
        """The state before the first session."""
        return StockState(
            published=np.ones(stocks),
            correction=np.ones(stocks),
            last_close=np.full(stocks, np.nan),
            last_published=np.ones(stocks),
            last_session=np.full(stocks, -(10**9)),
            history=np.zeros(stocks, np.int64),
            last_move=np.zeros((stocks, 2 + len(_JUMP_ROW))),
            last_useless=np.zeros(stocks, np.bool_),
            turnovers=np.full((stocks, QUIET_ROWS), np.nan),
            reported=np.zeros((stocks, 2), np.bool_),
        )

    def aligned(self, codes: Sequence[str], to: Sequence[str]) -> StockState:
        """Widens the state of `codes` to the stocks `to`, which contain them; the others start as new."""
        columns = np.searchsorted(np.array(to), np.array(codes)) if len(codes) else np.empty(0, np.int64)
        wider = StockState.of(len(to))
        for values, all_values in zip(self, wider, strict=True):
            all_values[columns] = values
        return wider

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays by the names that the state's file uses."""
        return self._asdict()


class Passed(NamedTuple):
    """Results of the pass for every cell, `[T, N]`."""

    cumulative_factor: Matrix
    is_traded: Flags
    is_investable: Flags
    has_row: Flags
    is_backfilled: Flags
    listing: NDArray[np.int32]
    """Row of the snapshot in force among the listings, −1 where the stock is in no snapshot."""

    @staticmethod
    def of(shape: tuple[int, int]) -> Passed:
        """Empty arrays, to be filled."""
        return Passed(
            cumulative_factor=np.empty(shape),
            is_traded=np.empty(shape, np.bool_),
            is_investable=np.empty(shape, np.bool_),
            has_row=np.empty(shape, np.bool_),
            is_backfilled=np.empty(shape, np.bool_),
            listing=np.empty(shape, np.int32),
        )


class Quotes(NamedTuple):
    """Quotes and published factors: `[T, N]` arrays of the pass, or the numbers of one row."""

    open: Any
    high: Any
    low: Any
    close: Any
    volume: Any
    turnover: Any
    factor: Any


_NO_QUOTE = Quotes(*(7 * [math.nan]))


class Jump(NamedTuple):
    """How a trade's move was judged; without a jump nothing is corrected."""

    log_move: float
    log_correction: float
    is_useless: bool
    """Whether the published factor is read as 1 because the price did not jump."""
    applied: float
    """Factor by which the stock's correction is multiplied."""


_NO_JUMP = Jump(0.0, 0.0, False, 1.0)


class Rules(NamedTuple):
    """Settings of a pass. They include a constant of another module, because numba's cache notices changes of this file
    only."""

    first_session: int
    """Number of the first row, counted from the first session of the data."""
    factors_from: int
    """First row at which any stock has a stated factor; before it a missing factor is no fault."""
    price_floor: float
    min_history_sessions: int
    stale_sessions: int
    log_ratios: Matrix
    """Logs of `SPLIT_RATIOS`."""


def pass_through(
    raw: Mapping[str, Matrix],
    present: Flags,
    listings: Listings,
    state: StockState,
    *,
    first_session: int,
    factors_from: int,
    price_floor: float,
    min_history_sessions: int,
) -> tuple[Passed, Matrix]:
    """Adjusts the quotes of `raw` and updates `state`, both in place; returns the cells and the hits `[H, Hit]`.

    raw: Open, High, Low, Close, Volume, TurnoverValue, AdjustmentFactor as published. present: where there is a row.
    first_session, factors_from: see `Rules`.
    """
    N = present.shape[1]
    passed = Passed.of(present.shape)
    columns = ("Open", "High", "Low", "Close", "Volume", "TurnoverValue", "AdjustmentFactor")
    quotes = Quotes(*(raw[name] for name in columns))
    rules = Rules(first_session, factors_from, price_floor, min_history_sessions, STALE_SESSIONS, np.log(SPLIT_RATIOS))

    def of_stocks(stocks: slice) -> Matrix:
        return _pass(stocks.start, stocks.stop, present, quotes, listings, state, passed, rules)

    halves = [slice(0, N // 2), slice(N // 2, N)]
    with ThreadPoolExecutor(len(halves)) as pool:
        hits = np.concatenate(list(pool.map(of_stocks, halves)))
    return passed, hits


_compiled = njit(cache=True, nogil=True, error_model="numpy")


@_compiled
def _pass(
    first_stock: Any, last_stock: Any, present: Any, quotes: Any, listings: Any, state: Any, passed: Any, rules: Any
) -> Any:
    # Arrays are unpacked once, because numba counts a reference at every access to a tuple: 200 ns a row.
    open_, high, low, close, volume, turnover, factor = quotes
    start, known_from, is_fund, share_class = listings
    published, correction, last_close, last_published, last_session, history, last_move, last_useless = state[:8]
    cumulative, is_traded, is_investable, has_row, is_backfilled, listing = passed
    hits, count = np.empty((64, len(HIT))), 0
    newest = start[:-1].copy()
    for t in range(len(present)):
        now = rules.first_session + t
        for n in range(first_stock, last_stock):
            while newest[n] + 1 < start[n + 1] and known_from[newest[n] + 1] <= t:
                newest[n] += 1
            snapshot = newest[n] if start[n] < start[n + 1] else -1
            is_stock = present[t, n]
            if is_stock and (snapshot < 0 or share_class[n] or is_fund[snapshot]):
                is_stock = False
                hits, count = _note_unlisted(hits, count, t, n, snapshot, state.reported)

            quote, traded, broken = _NO_QUOTE, False, -1
            if is_stock:
                quote = Quotes(
                    _finite(open_[t, n]), _finite(high[t, n]), _finite(low[t, n]), _finite(close[t, n]),
                    volume[t, n], turnover[t, n], factor[t, n],
                )  # fmt: skip
                traded = _has_traded(quote)
                broken = _broken_rule(quote, rules.price_floor) if traded else -1
                if broken >= 0:
                    traded = False
                    hits, count = _note_quote(hits, count, t, n, broken, quote)
                if _is_usable(quote.factor, published[n]):
                    published[n] *= quote.factor
                elif quote.factor == quote.factor or (traded and t >= rules.factors_from):
                    hits, count = _note_factor(hits, count, t, n, quote.factor)
            paid = np.nan
            if traded:
                paid = quote.turnover if quote.turnover == quote.turnover else quote.close * quote.volume
                step, last = published[n] / last_published[n], last_close[n]
                jump = _NO_JUMP
                if last == last and (_is_suspect(quote.close / last / step, step) or abs(last_move[n, 0]) > BREAK):
                    hits, count, jump = _jump(hits, count, t, n, quote, paid, state, rules)
                    correction[n] *= jump.applied
                last_move[n, 0], last_move[n, 1], last_useless[n] = jump.log_move, jump.log_correction, jump.is_useless
                last_move[n, 2], last_move[n, 3], last_move[n, 4] = quote.open, quote.close, step
                last_move[n, 5], last_move[n, 6] = last, jump.applied
                state.turnovers[n, history[n] % QUIET_ROWS] = paid
                last_close[n], last_published[n], last_session[n] = quote.close, published[n], now
                history[n] += 1

            scale = published[n] * correction[n]
            open_[t, n] = quote.open / scale if traded else np.nan
            high[t, n] = quote.high / scale if traded else np.nan
            low[t, n] = quote.low / scale if traded else np.nan
            close[t, n] = quote.close / scale if traded else np.nan
            turnover[t, n] = paid
            volume[t, n] = quote.volume * scale if traded else np.nan
            cumulative[t, n], is_traded[t, n] = scale, traded
            has_row[t, n] = now - last_session[n] <= rules.stale_sessions
            is_old_enough = history[n] >= rules.min_history_sessions
            is_investable[t, n] = has_row[t, n] and is_old_enough and last_close[n] >= rules.price_floor
            listing[t, n] = snapshot if has_row[t, n] else -1
            is_backfilled[t, n] = has_row[t, n] and snapshot >= 0 and known_from[snapshot] > t
    return hits[:count]


# --- one row ----------------------------------------------------------------------------------------------------------


@_compiled
def _finite(x: Any) -> Any:
    return x if np.isfinite(x) else np.nan


@_compiled
def _has_traded(quote: Any) -> Any:
    """Whether the row has volume; where volume is not stated, whether it has any price."""
    if quote.volume == quote.volume:
        return quote.volume != 0.0
    is_priced = quote.open == quote.open or quote.high == quote.high
    return is_priced or quote.low == quote.low or quote.close == quote.close


@_compiled
def _broken_rule(quote: Any, price_floor: Any) -> Any:
    """The first rule that a traded row's quote breaks, −1 for none."""
    o, h, lo, c = quote.open, quote.high, quote.low, quote.close
    if not (o > 0.0 and h > 0.0 and lo > 0.0 and c > 0.0):
        return _NOT_POSITIVE
    if quote.volume < 0.0 or quote.volume == np.inf:
        return _NEGATIVE_VOLUME
    if quote.turnover < 0.0 or quote.turnover == np.inf:
        return _NEGATIVE_TURNOVER
    if h < lo * (1.0 - SLACK):
        return _HIGH_BELOW_LOW
    if min(o, c) < lo * (1.0 - SLACK) or max(o, c) > h * (1.0 + SLACK):
        return _OUTSIDE
    # Only above the price floor: a penny stock may trade at 1 and at 9 yen in one session.
    if h > lo * _WIDEST and c >= price_floor:
        return _TOO_WIDE
    return -1


@_compiled
def _is_usable(factor: Any, published: Any) -> Any:
    """Whether a published factor, and the product of all factors so far, are in a believable range."""
    return (
        1.0 / _FACTOR_LIMIT <= factor <= _FACTOR_LIMIT and 1.0 / _PRODUCT_LIMIT <= published * factor <= _PRODUCT_LIMIT
    )


# --- jumps ------------------------------------------------------------------------------------------------------------


@_compiled
def _is_suspect(move: Any, step: Any) -> Any:
    """Whether the close's move or the published step exceeds what one session allows; NaN counts as suspect."""
    return not (_FALL <= move <= _RISE and _FALL <= step <= _RISE)


@_compiled
def _jump(hits: Any, count: Any, t: Any, n: Any, quote: Any, paid: Any, state: Any, rules: Any) -> Any:
    """Judges a suspect move, or the trade after one; returns the hits and the judged jump with its correction."""
    step, last = state.published[n] / state.last_published[n], state.last_close[n]
    opened, log_move = np.log(quote.open / last / step), np.log(quote.close / last / step)
    gap = rules.first_session + t - state.last_session[n]
    is_quiet = _is_quiet(paid, state.turnovers[n])
    rule, log_correction = _judged(opened, log_move, np.log(step), last, is_quiet, gap, rules)
    is_useless = rule == _USELESS_FACTOR
    before = state.last_move[n]
    has_returned = abs(before[0]) > BREAK and abs(before[0] + log_move) < RETURN_TOLERANCE
    # The return undoes exactly the correction of the first jump, so one bad quote leaves no step.
    applied = np.exp(-before[1] if has_returned and not is_useless else log_correction)
    if rule >= 0:
        hits, count = _note_jump(hits, count, t, n, rule, t, (quote.open, quote.close, step, last, applied))
    if has_returned and not state.last_useless[n]:
        # The bad row is the previous one, at the session of the last trade.
        bad = state.last_session[n] - rules.first_session
        figures = (before[2], before[3], before[4], before[5], before[6])
        hits, count = _note_jump(hits, count, bad, n, _REVERTS, t, figures)
    return hits, count, Jump(log_move, log_correction, is_useless, applied)


@_compiled
def _is_quiet(turnover: Any, ring: Any) -> Any:
    """Whether the turnover is below QUIET_TURNOVER medians of the last traded rows."""
    turnovers = np.sort(ring[ring == ring])
    n = len(turnovers)
    if n < QUIET_LEAST:
        return False
    return turnover < QUIET_TURNOVER * 0.5 * (turnovers[(n - 1) // 2] + turnovers[n // 2])


@_compiled
def _split_ratio(opened: Any, closed: Any, log_ratios: Any) -> Any:
    """Log of the split ratio nearest to the open's or the close's move; NaN where none is near enough."""
    best, nearest = np.inf, np.nan
    for step in log_ratios:
        distance = min(abs(abs(closed) - step), abs(abs(opened) - step))
        if distance < best:
            best, nearest = distance, step
    return nearest if best < RATIO_TOLERANCE else np.nan


@_compiled
def _judged(opened: Any, closed: Any, factor: Any, last: Any, is_quiet: Any, gap: Any, rules: Any) -> Any:
    """Rule (−1 for none) and log correction of a traded row.

    opened, closed: log moves that remain after the published factor. factor: log of the published step.
    """
    if abs(factor) > JUMP and abs(closed + factor) < 0.25 * abs(factor):
        return _USELESS_FACTOR, -factor
    jumped = opened * closed > 0.0 and min(abs(opened), abs(closed)) > JUMP and last >= rules.price_floor
    if not jumped:
        return -1, 0.0
    split = _split_ratio(opened, closed, rules.log_ratios)
    rebased = split * np.sign(closed)
    looks_split = split == split
    if looks_split and is_quiet and gap <= rules.stale_sessions:
        return _SPLIT, rebased
    if min(opened, closed) > BREAK:
        return _LEVEL, rebased if looks_split else opened
    return (_JUMP, 0.0) if looks_split else (-1, 0.0)


# --- hits -------------------------------------------------------------------------------------------------------------


@_compiled
def _noted(hits: Any, count: Any, t: Any, n: Any, rule: Any) -> Any:
    """Adds a hit without its figures, and makes room for it where needed."""
    if count == len(hits):
        wider = np.empty((2 * count + 16, hits.shape[1]))
        wider[:count] = hits
        hits = wider
    hits[count] = np.nan
    hits[count, HIT.session], hits[count, HIT.stock], hits[count, HIT.rule], hits[count, HIT.known_from] = t, n, rule, t
    return hits


@_compiled
def _note_unlisted(hits: Any, count: Any, t: Any, n: Any, listing: Any, reported: Any) -> Any:
    """Notes, once per stock, that its code is not listed or that it is no common stock."""
    is_listed = listing >= 0
    reason = 1 if is_listed else 0
    if reported[n, reason]:
        return hits, count
    reported[n, reason] = True
    hits = _noted(hits, count, t, n, _NOT_COMMON if is_listed else _NOT_LISTED)
    hits[count, HIT.listing] = listing
    return hits, count + 1


@_compiled
def _note_quote(hits: Any, count: Any, t: Any, n: Any, rule: Any, quote: Any) -> Any:
    """Notes a quote that breaks `rule`."""
    hits = _noted(hits, count, t, n, rule)
    hits[count, HIT.open], hits[count, HIT.high], hits[count, HIT.low] = quote.open, quote.high, quote.low
    hits[count, HIT.close], hits[count, HIT.volume], hits[count, HIT.turnover] = (
        quote.close, quote.volume, quote.turnover,
    )  # fmt: skip
    return hits, count + 1


@_compiled
def _note_factor(hits: Any, count: Any, t: Any, n: Any, factor: Any) -> Any:
    """Notes a published factor that cannot be used."""
    hits = _noted(hits, count, t, n, _BAD_FACTOR)
    hits[count, HIT.factor] = factor
    return hits, count + 1


@_compiled
def _note_jump(hits: Any, count: Any, t: Any, n: Any, rule: Any, known_from: Any, figures: Any) -> Any:
    """Notes a jump at t, decided at `known_from`; figures: those of `_JUMP_ROW`."""
    hits = _noted(hits, count, t, n, rule)
    hits[count, HIT.known_from] = known_from
    for k in range(len(figures)):
        hits[count, _JUMP_ROW[k]] = figures[k]
    return hits, count + 1
