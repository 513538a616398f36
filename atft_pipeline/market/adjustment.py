"""Session after session through the raw quotes: what is masked, what each factor is worth, who is a member.

One compiled pass, in the order of time, with what it remembers of each stock in `StockState`: nothing that it decides
at a session can depend on a later one, and a later call continues where an earlier one stopped. The rules themselves
and what they mean are in universe.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from atft_pipeline.market.price_panel import STALE_SESSIONS, Flags, Matrix

JUMP = 0.6
"""Absolute log move that no session's price limit allows; 80 rows of ten real years exceed it, mostly penny stocks."""
BREAK = math.log(4.5)
"""Absolute log move beyond any real one: from here on up a fivefold jump with its noise is an error of scale."""
_RISE, _FALL, _WIDEST = math.exp(JUMP), math.exp(-JUMP), math.exp(BREAK)
RATIO_TOLERANCE = 0.06
"""Log distance within which a move is a split's; a wider one took a 45 % fall over halted sessions for a split."""
SPLIT_RATIOS = np.array([2, 3, 4, 5, 10, 20, 50, 100, 200, 500, 1000], dtype=np.float64)
QUIET_TURNOVER = 3.0
"""A split leaves the turnover where it was, a real halving multiplies it: above this many medians it is not a split."""
QUIET_ROWS, QUIET_LEAST = 20, 5
"""Traded rows of that median, and the fewest that make one."""
RETURN_TOLERANCE = 0.3
"""Log distance from the old level within which a jump has come back."""
_FACTOR_LIMIT, _PRODUCT_LIMIT = 1e4, 1e100
"""No exchange has seen a split or a consolidation of more than ten thousand to one, and no stock has had twenty-five of
them: a source that states a cumulative factor every day would soon leave the range of numbers."""
SLACK = 1e-9
"""Relative rounding that adjusted sources carry in the last digits of a quote."""

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
    """Columns of a hit, as floats: where, which rule, and the figures that its detail is made of."""

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


@dataclass(frozen=True)
class StockState:
    """What is remembered of each stock after a session, `[N]` unless stated."""

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
    """[N, 7] of the last trade, where it was a jump: log move, log correction, and `_JUMP_ROW`; else 0."""
    last_useless: Flags
    """Whether the last trade's factor was read as 1 for want of a jump."""
    turnovers: Matrix
    """[N, QUIET_ROWS] of the last traded rows, a ring."""
    reported: Flags
    """[N, 2] whether a hit already says that the stock is not listed, or not common."""

    @staticmethod
    def of(stocks: int) -> StockState:
        """Nothing seen yet."""
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
        """The state of `codes` as that of `to`, which contains them; the further ones have not been seen."""
        place = np.searchsorted(np.array(to), np.array(codes)) if len(codes) else np.empty(0, np.int64)
        wider = StockState.of(len(to))
        for column in fields(self):
            getattr(wider, column.name)[place] = getattr(self, column.name)
        return wider

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {column.name: getattr(self, column.name) for column in fields(self)}


@dataclass(frozen=True)
class Listings:
    """Snapshots of `listed` by stock: those of stock n are `start[n]:start[n + 1]`, ascending in time."""

    start: NDArray[np.int64]
    known_from: NDArray[np.int64]
    """First session of the pass at or after the snapshot, 0 for earlier ones."""
    is_fund: Flags
    share_class: Flags
    """[N] whether the code itself is that of a preferred share or the like."""


@dataclass(frozen=True)
class Passed:
    """What the pass says of every cell, `[T, N]`."""

    cumulative_factor: Matrix
    is_traded: Flags
    is_investable: Flags
    has_row: Flags
    is_backfilled: Flags
    listing: NDArray[np.int32]
    """Position among the listings of the attributes in force, −1 where the stock is in no snapshot."""
    hits: Matrix
    """[H, len(Hit)]"""


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
) -> Passed:
    """Goes through the sessions of `raw` and adjusts its quotes in place; `state` is brought up to date in place.

    raw: Open, High, Low, Close, Volume, TurnoverValue, AdjustmentFactor as published; present: where there is a row.
    first_session: number of the first row, counted from the first of the data. factors_from: first row by which anybody
    has stated a factor; before it a missing one is no fault.
    """
    T, N = present.shape
    passed = Passed(
        cumulative_factor=np.empty((T, N)),
        is_traded=np.empty((T, N), np.bool_),
        is_investable=np.empty((T, N), np.bool_),
        has_row=np.empty((T, N), np.bool_),
        is_backfilled=np.empty((T, N), np.bool_),
        listing=np.empty((T, N), np.int32),
        hits=np.empty((0, len(Hit()))),
    )
    quotes = [raw[name] for name in ("Open", "High", "Low", "Close", "Volume", "TurnoverValue", "AdjustmentFactor")]
    cells = [getattr(passed, f.name) for f in fields(passed) if f.name != "hits"]

    def of_stocks(columns: slice) -> Matrix:
        pass_: Any = _pass  # numba's stub of a dispatcher takes no star arguments
        return pass_(
            columns.start,
            columns.stop,
            present,
            *quotes,
            *(getattr(listings, f.name) for f in fields(listings)),
            *state.arrays().values(),
            *cells,
            np.log(SPLIT_RATIOS),
            (first_session, factors_from, min_history_sessions, STALE_SESSIONS),
            price_floor,
        )

    halves = [slice(0, N // 2), slice(N // 2, N)]
    with ThreadPoolExecutor(len(halves)) as pool:
        hits = np.concatenate(list(pool.map(of_stocks, halves)))
    return Passed(**{f.name: getattr(passed, f.name) for f in fields(passed) if f.name != "hits"}, hits=hits)


@njit(cache=True, nogil=True)
def _finite(x: Any) -> Any:
    return x if np.isfinite(x) else np.nan


@njit(cache=True, nogil=True)
def _quote_rule(o: Any, h: Any, lo: Any, c: Any, v: Any, paid: Any, price_floor: Any) -> Any:
    """The first rule that a traded row's quote breaks, −1 for none."""
    if not (o > 0.0 and h > 0.0 and lo > 0.0 and c > 0.0):
        return _NOT_POSITIVE
    if v < 0.0 or v == np.inf:
        return _NEGATIVE_VOLUME
    if paid < 0.0 or paid == np.inf:
        return _NEGATIVE_TURNOVER
    if h < lo * (1.0 - SLACK):
        return _HIGH_BELOW_LOW
    if min(o, c) < lo * (1.0 - SLACK) or max(o, c) > h * (1.0 + SLACK):
        return _OUTSIDE
    # A penny stock may trade at 1 and at 9 yen in one session.
    if h > lo * _WIDEST and c >= price_floor:
        return _TOO_WIDE
    return -1


@njit(cache=True, nogil=True)
def _is_quiet(turnover: Any, ring: Any) -> Any:
    """Whether the turnover is under QUIET_TURNOVER medians of the last traded rows."""
    known = np.sort(ring[ring == ring])
    n = len(known)
    if n < QUIET_LEAST:
        return False
    return turnover < QUIET_TURNOVER * 0.5 * (known[(n - 1) // 2] + known[n // 2])


@njit(cache=True, nogil=True)
def _split_ratio(opened: Any, closed: Any, ladder: Any) -> Any:
    """Log of the split ratio that the open's or the close's move comes nearest to, NaN where none is near."""
    best, nearest = np.inf, np.nan
    for step in ladder:
        distance = min(abs(abs(closed) - step), abs(abs(opened) - step))
        if distance < best:
            best, nearest = distance, step
    return nearest if best < RATIO_TOLERANCE else np.nan


@njit(cache=True, nogil=True)
def _judged(
    opened: Any, closed: Any, factor: Any, last: Any, quiet: Any, gap: Any, ladder: Any, floor: Any, stale: Any
) -> Any:
    """Rule (−1 for none) and log correction of a traded row, from its log moves after the published factor's log."""
    if abs(factor) > JUMP and abs(closed + factor) < 0.25 * abs(factor):
        return _USELESS_FACTOR, -factor
    jumped = opened * closed > 0.0 and min(abs(opened), abs(closed)) > JUMP and last >= floor
    if not jumped:
        return -1, 0.0
    split = _split_ratio(opened, closed, ladder)
    rebased = split * np.sign(closed)
    looks_split = split == split
    if looks_split and quiet and gap <= stale:
        return _SPLIT, rebased
    if min(opened, closed) > BREAK:
        return _LEVEL, rebased if looks_split else opened
    return (_JUMP, 0.0) if looks_split else (-1, 0.0)


@njit(cache=True, nogil=True)
def _noted(hits: Any, count: Any, t: Any, n: Any, rule: Any) -> Any:
    """The hits with room for one more, filled in but for its figures."""
    if count == len(hits):
        wider = np.empty((2 * count + 16, hits.shape[1]))
        wider[:count] = hits
        hits = wider
    hits[count] = np.nan
    hits[count, HIT.session], hits[count, HIT.stock], hits[count, HIT.rule], hits[count, HIT.known_from] = t, n, rule, t
    return hits


@njit(cache=True, nogil=True, error_model="numpy")
def _pass(
    first_stock: Any, last_stock: Any, present: Any,
    open_: Any, high: Any, low: Any, close: Any, volume: Any, turnover: Any, factor: Any,
    start: Any, known_from: Any, is_fund: Any, share_class: Any,
    published: Any, correction: Any, last_close: Any, last_published: Any, last_session: Any, history: Any,
    last_move: Any, last_useless: Any, turnovers: Any, reported: Any,
    cumulative: Any, is_traded: Any, is_investable: Any, has_row: Any, is_backfilled: Any, listing: Any,
    ladder: Any, sessions: Any, price_floor: Any,
) -> Any:  # fmt: skip
    # A constant of another module is an argument: the compiled code is cached by this file alone.
    first_session, factors_from, min_history, stale = sessions
    hits, count = np.empty((64, len(HIT))), 0
    newest = start[:-1].copy()
    for t in range(len(present)):
        now = first_session + t
        for n in range(first_stock, last_stock):
            in_listed = start[n] < start[n + 1]
            while newest[n] + 1 < start[n + 1] and known_from[newest[n] + 1] <= t:
                newest[n] += 1
            listing[t, n] = newest[n] if in_listed else -1
            is_backfilled[t, n] = in_listed and known_from[newest[n]] > t

            there = present[t, n]
            if there and (not in_listed or share_class[n] or is_fund[newest[n]]):
                there = False
                reason = 1 if in_listed else 0
                if not reported[n, reason]:
                    reported[n, reason] = True
                    hits = _noted(hits, count, t, n, _NOT_COMMON if in_listed else _NOT_LISTED)
                    hits[count, HIT.listing] = listing[t, n]
                    count += 1
            traded = False
            o, h, lo, c, paid = np.nan, np.nan, np.nan, np.nan, np.nan
            if there:
                o, h, lo, c = _finite(open_[t, n]), _finite(high[t, n]), _finite(low[t, n]), _finite(close[t, n])
                v, paid, f = volume[t, n], turnover[t, n], factor[t, n]
                traded = v != 0.0 if v == v else (o == o or h == h or lo == lo or c == c)
                rule = _quote_rule(o, h, lo, c, v, paid, price_floor) if traded else -1
                if rule >= 0:
                    traded = False
                    hits = _noted(hits, count, t, n, rule)
                    hits[count, HIT.open], hits[count, HIT.high], hits[count, HIT.low] = o, h, lo
                    hits[count, HIT.close], hits[count, HIT.volume], hits[count, HIT.turnover] = c, v, paid
                    count += 1
                usable = (
                    1.0 / _FACTOR_LIMIT <= f <= _FACTOR_LIMIT
                    and 1.0 / _PRODUCT_LIMIT <= published[n] * f <= _PRODUCT_LIMIT
                )
                if not usable and (f == f or (traded and t >= factors_from)):
                    hits = _noted(hits, count, t, n, _BAD_FACTOR)
                    hits[count, HIT.factor] = f
                    count += 1
                published[n] *= f if usable else 1.0
            if traded:
                money = paid if paid == paid else c * volume[t, n]
                last = last_close[n]
                step = published[n] / last_published[n]
                moved = c / last / step
                log_move, log_correction, useless = 0.0, 0.0, False
                before = last_move[n, 0]
                figures = (o, c, step, last, 1.0)
                suspect = not (_FALL <= moved <= _RISE and _FALL <= step <= _RISE)
                if last == last and (suspect or abs(before) > BREAK):
                    opened, log_move, stated = np.log(o / last / step), np.log(moved), np.log(step)
                    quiet = _is_quiet(money, turnovers[n])
                    rule, log_correction = _judged(
                        opened, log_move, stated, last, quiet, now - last_session[n], ladder, price_floor, stale
                    )
                    useless = rule == _USELESS_FACTOR
                    returned = abs(before) > BREAK and abs(before + log_move) < RETURN_TOLERANCE
                    # The way back undoes exactly what the way out was given, so one bad quote leaves no step.
                    applied = np.exp(-last_move[n, 1] if returned and not useless else log_correction)
                    correction[n] *= applied
                    figures = (o, c, step, last, applied)
                    if rule >= 0:
                        hits = _noted(hits, count, t, n, rule)
                        for k in range(5):
                            hits[count, _JUMP_ROW[k]] = figures[k]
                        count += 1
                    if returned and not last_useless[n]:
                        # The bad row is the one before: the session of the last trade.
                        hits = _noted(hits, count, last_session[n] - first_session, n, _REVERTS)
                        hits[count, HIT.known_from] = t
                        for k in range(5):
                            hits[count, _JUMP_ROW[k]] = last_move[n, 2 + k]
                        count += 1
                last_move[n, 0], last_move[n, 1], last_useless[n] = log_move, log_correction, useless
                for k in range(5):
                    last_move[n, 2 + k] = figures[k]
                turnovers[n, history[n] % QUIET_ROWS] = money
                last_close[n], last_published[n], last_session[n] = c, published[n], now
                history[n] += 1
            scale = published[n] * correction[n]
            cumulative[t, n] = scale
            is_traded[t, n] = traded
            open_[t, n] = o / scale if traded else np.nan
            high[t, n] = h / scale if traded else np.nan
            low[t, n] = lo / scale if traded else np.nan
            close[t, n] = c / scale if traded else np.nan
            turnover[t, n] = money if traded else np.nan
            volume[t, n] = volume[t, n] * scale if traded else np.nan
            has_row[t, n] = now - last_session[n] <= stale
            is_investable[t, n] = has_row[t, n] and history[n] >= min_history and last_close[n] >= price_floor
            listing[t, n] = listing[t, n] if has_row[t, n] else -1
            is_backfilled[t, n] = is_backfilled[t, n] and has_row[t, n]
    return hits[:count]
