"""Adjusted prices on the exchange's sessions: which rows are investable, which are quarantined, and why.

Everything of session t is decided from what was public at its close: prices and factors up to t, and `listed` as of t
(back-filled, and flagged so, where no snapshot precedes). The one exception is marked `mask_target`: a jump that comes
back later nulls forward returns at the bad row and touches no price, flag or membership.

Adjustment is forward: P~_t = P_t / prod_{s<=t} AdjustmentFactor_s, V~_t = V_t * prod_{s<=t} AdjustmentFactor_s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from atft_pipeline import trading_calendar
from atft_pipeline.config import DatasetConfig
from atft_pipeline.errors import InputError
from atft_pipeline.trading_calendar import MarketFacts, market_facts

PRICES_COLUMNS: tuple[str, ...] = (
    "Date", "Code", "Open", "High", "Low", "Close", "Volume", "TurnoverValue", "cumulative_factor",
    "is_traded", "is_investable", "is_liquid", "is_listed_backfilled", "Sector33Code", "MarketCode",
)  # fmt: skip
"""Columns of the prices table, in order."""

PRICE_FIELDS = ("Open", "High", "Low", "Close")
STALE_SESSIONS = 5
"""A stock stays a member, and its last close a price, for this many sessions after its last trade."""
JUMP = 0.6
"""Absolute log move that no session's price limit allows; 80 rows of ten real years exceed it, mostly penny stocks."""
BREAK = math.log(4.5)
"""Absolute log move beyond any real one: from here on up a fivefold jump with its noise is an error of scale."""
RATIO_TOLERANCE = 0.06
"""Log distance within which a move is a split's; a wider one took a 45 % fall over halted sessions for a split."""
SPLIT_RATIOS = (2, 3, 4, 5, 10, 20, 50, 100, 200, 500, 1000)
QUIET_TURNOVER = 3.0
"""A split leaves the turnover where it was, a real halving multiplies it: above this many medians it is not a split."""


@dataclass(frozen=True)
class QuarantineRule:
    decision: str
    explanation: str


QUARANTINE_RULES: dict[str, QuarantineRule] = {
    "no_trade_date": QuarantineRule("drop", "no stock traded and the exchange was closed: rows of a holiday"),
    "not_listed": QuarantineRule("drop", "the code is in no snapshot of listed, so it cannot be known to be a stock"),
    "not_common_stock": QuarantineRule("drop", "fund, REIT or preferred share by market, sector or share class"),
    "price_not_positive": QuarantineRule("mask", "a traded row with a price that is null, infinite or <= 0"),
    "negative_volume": QuarantineRule("mask", "volume below 0"),
    "high_below_low": QuarantineRule("mask", "high below low"),
    "price_outside_range": QuarantineRule("mask", "open or close outside [low, high]"),
    "range_too_wide": QuarantineRule("mask", "high over 4.5 times low: one field is off in scale"),
    "bad_factor": QuarantineRule("ignore_factor", "AdjustmentFactor null on a traded row, or <= 0: read as 1"),
    "factor_without_jump": QuarantineRule("ignore_factor", "a split's factor and a price that did not move: read as 1"),
    "split_without_factor": QuarantineRule(
        "rebase", "open and close jumped by a split's ratio on ordinary turnover: the ratio is used as the factor"
    ),
    "level_break": QuarantineRule("rebase", "open and close over 4.5 times the last close: overnight move taken out"),
    "jump_without_factor": QuarantineRule(
        "flag", "open and close jumped by a split's ratio, on heavy turnover or after a gap: kept as a real move"
    ),
    "jump_reverts": QuarantineRule(
        "mask_target", "a jump of over 4.5 times came back on the next traded session: no return starts or ends here"
    ),
}  # fmt: skip
"""What is quarantined. `drop` and `mask` remove a row or its prices; `ignore_factor` and `rebase` correct the factor;
`flag` changes nothing; `mask_target` nulls forward returns whose execution or exit price is of that row."""


@dataclass(frozen=True)
class PricesResult:
    prices: pl.DataFrame
    """Columns PRICES_COLUMNS, sorted by Date, Code; one row per stock and session from its first trade to
    STALE_SESSIONS after its last. An untraded session's OHLCV is null. Prices and volumes are forward adjusted,
    TurnoverValue is not."""
    quarantine: pl.DataFrame
    """rule, decision, Date, Code, detail; one row per hit, per code where the whole code is dropped."""
    summary: dict[str, Any]
    """rows, sessions, stocks, listed_backfilled_rows, quarantine (hits per rule), warnings."""


def build_prices(tables: Mapping[str, pl.DataFrame], config: DatasetConfig) -> PricesResult:
    """The universe of `tables` (prices, listed, index as `Source.read` gives them).

    Investable at t: common stock, at least `min_history_sessions` traded sessions up to t, last traded close at or
    above the market's price floor, traded within 5 sessions. Liquid: investable, and the median turnover of the
    trailing 20 sessions at or above the market's floor, untraded sessions left out and two thirds of them needed.

    Raises: InputError when fewer than two common stocks trade.
    """
    facts = market_facts(config.market)
    hits: list[pl.DataFrame] = []
    raw = _with_traded(tables["prices"].sort("Code", "Date"))
    raw, sessions = _on_exchange_days(raw, tables["index"], config.market, hits)
    raw = _common_stocks(raw, tables["listed"], config.market, hits)
    raw = _masked(raw, facts, hits)
    raw = _with_cumulative_factor(raw, sessions, facts, hits)
    stocks = raw.filter("is_traded")["Code"].unique()
    if stocks.is_empty():
        raise InputError(
            f"prices: no traded row of a common stock is left ({_counts(hits) or 'Volume is 0 throughout'}); check Code"
            " against the table listed, and prices and Volume"
        )
    if len(stocks) == 1:
        raise InputError(
            f"prices: one stock only (Code {stocks[0]}) is left of the common stocks; a cross-section needs several"
        )
    panel = _with_attributes(_session_rows(raw, sessions), tables["listed"])
    prices = _memberships(_adjusted(panel), config, facts).select(PRICES_COLUMNS).sort("Date", "Code")
    quarantine = pl.concat(hits).sort("Date", "Code", "rule")
    return PricesResult(prices, quarantine, _summary(prices, quarantine))


def _counts(hits: list[pl.DataFrame]) -> str:
    return ", ".join(f"{hit['rule'][0]} {hit.height}" for hit in hits if hit.height)


def _hit(rule: str, rows: pl.DataFrame, detail: pl.Expr) -> pl.DataFrame:
    return rows.select(
        pl.lit(rule).alias("rule"),
        pl.lit(QUARANTINE_RULES[rule].decision).alias("decision"),
        "Date",
        "Code",
        detail.cast(pl.String).alias("detail"),
    )


# --- rows -------------------------------------------------------------------------------------------------------------


def _with_traded(prices: pl.DataFrame) -> pl.DataFrame:
    """`is_traded`: volume above 0, or prices without a volume. Vendors repeat the last price on a volume of 0."""
    finite = [pl.when(pl.col(c).is_finite()).then(pl.col(c)).alias(c) for c in (*PRICE_FIELDS, "AdjustmentFactor")]
    priced = pl.any_horizontal(pl.col(PRICE_FIELDS).is_not_null())
    return prices.with_columns(is_traded=pl.col("Volume").ne(0).fill_null(priced)).with_columns(finite)


def _on_exchange_days(
    raw: pl.DataFrame, index: pl.DataFrame, market: str, hits: list[pl.DataFrame]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Rows on sessions, and the sessions (Date, session = 0, 1, ...): days with a trade, and known sessions without."""
    traded = raw.filter("is_traded")["Date"].unique()
    silent = pl.concat([raw["Date"], index["Date"]]).unique()
    silent = silent.filter(~silent.is_in(traded.implode()))
    if silent.len():
        first, last = silent.min(), silent.max()
        known = trading_calendar.sessions(market, first, last)  # type: ignore[arg-type]
        is_session = np.isin(silent.to_numpy().astype("datetime64[D]"), known)
        closed = raw.filter(pl.col("Date").is_in(silent.filter(~pl.Series(is_session)).implode()))
        per_date = closed.group_by("Date").agg(pl.len(), Code=pl.lit(""))
        hits.append(_hit("no_trade_date", per_date, pl.format("{} rows", pl.col("len"))))
        raw = raw.join(per_date, on="Date", how="anti", maintain_order="left")
        traded = pl.concat([traded, silent.filter(pl.Series(is_session))])
    return raw, pl.DataFrame({"Date": traded.sort()}).with_row_index("session")


def _common_stocks(raw: pl.DataFrame, listed: pl.DataFrame, market: str, hits: list[pl.DataFrame]) -> pl.DataFrame:
    """Rows of common stocks; a code that is dropped gives one hit, at its first row.

    Sector 9999 under a stock's own market code is a stock that has been delisted since: kept, its sector unknown.
    """
    sector, section = pl.col("Sector33Code"), pl.col("MarketCode")
    fund = (section == "0109") | ((sector == "9999") & section.is_null())
    share_class = pl.col("Code").str.contains(r"^\d[0-9A-Z]\d[0-9A-Z][1-9]$") if market == "tokyo" else pl.lit(False)
    codes = listed["Code"].unique()
    days = _as_of(raw.select("Date", "Code"), listed).select(
        reason=pl.when(~pl.col("Code").is_in(codes.implode()))
        .then(pl.lit("not_listed"))
        .when(fund.fill_null(False) | share_class)
        .then(pl.lit("not_common_stock")),
        detail=pl.format("MarketCode {} Sector33Code {}", section.fill_null("null"), sector.fill_null("null")),
    )
    raw = pl.concat([raw, days], how="horizontal")
    dropped = raw.filter(pl.col("reason").is_not_null()).group_by("Code", "reason", maintain_order=True).first()
    hits += [
        _hit(reason, dropped.filter(pl.col("reason") == reason), pl.col("detail"))
        for reason in ("not_listed", "not_common_stock")
    ]
    return raw.filter(pl.col("reason").is_null()).drop("reason", "detail")


def _masked(raw: pl.DataFrame, facts: MarketFacts, hits: list[pl.DataFrame]) -> pl.DataFrame:
    """Rows whose quote cannot be right lose it; the first rule that fires names the row."""
    o, h, lo, c = (pl.col(name) for name in PRICE_FIELDS)
    slack = 1e-9  # adjusted sources carry rounding in the last digits
    broken = pl.min_horizontal(o, c) < lo * (1 - slack)
    rules = {
        "price_not_positive": pl.any_horizontal((pl.col(p).is_null() | (pl.col(p) <= 0)) for p in PRICE_FIELDS),
        "negative_volume": pl.col("Volume") < 0,
        "high_below_low": h < lo * (1 - slack),
        "price_outside_range": broken | (pl.max_horizontal(o, c) > h * (1 + slack)),
        # A penny stock may trade at 1 and at 9 yen in one session.
        "range_too_wide": ((h / lo).log() > BREAK) & (c >= facts.price_floor),
    }
    rule = pl.coalesce(pl.when(fires.fill_null(False)).then(pl.lit(name)) for name, fires in rules.items())
    raw = raw.with_columns(rule=pl.when("is_traded").then(rule))
    quote = pl.format(
        "O {} H {} L {} C {} V {}",
        *(pl.col(name).cast(pl.String).fill_null("null") for name in (*PRICE_FIELDS, "Volume")),
    )
    bad = raw.filter(pl.col("rule").is_not_null())
    hits += [_hit(name, bad.filter(pl.col("rule") == name), quote) for name in rules]
    kept = pl.col("is_traded") & pl.col("rule").is_null()
    return raw.with_columns(is_traded=kept).drop("rule")


# --- adjustment -------------------------------------------------------------------------------------------------------


def _with_cumulative_factor(
    raw: pl.DataFrame, sessions: pl.DataFrame, facts: MarketFacts, hits: list[pl.DataFrame]
) -> pl.DataFrame:
    """`cumulative_factor` of every row: the published factors, corrected on the sessions that show them to be wrong."""
    factor = pl.col("AdjustmentFactor")
    bad = raw.filter((factor <= 0) | (factor.is_null() & pl.col("is_traded")))
    if bad.height < raw.height:  # a source without any factor states no events; it is not wrong on every row
        hits.append(_hit("bad_factor", bad, pl.format("factor {}", factor.cast(pl.String).fill_null("null"))))
    raw = raw.with_columns(AdjustmentFactor=pl.when(factor > 0).then(factor).otherwise(1.0))
    raw = raw.with_columns(published=factor.cum_prod().over("Code"))
    raw = raw.join(sessions, on="Date", how="left", maintain_order="left")
    moves = _jumps(raw.filter("is_traded"), facts)
    hits += _jump_hits(moves)
    corrections = moves.filter(pl.col("correction") != 1.0).select("Date", "Code", "correction")
    return (
        raw.join(corrections, on=["Date", "Code"], how="left", maintain_order="left")
        .with_columns(correction=pl.col("correction").fill_null(1.0).cum_prod().over("Code"))
        .with_columns(cumulative_factor=pl.col("published") * pl.col("correction"))
    )


def _jumps(traded: pl.DataFrame, facts: MarketFacts) -> pl.DataFrame:
    """Traded rows whose move from the last traded close the published factor does not explain: rule and correction.

    `move_open`, `move_close`: log move of open and close against that close, after the published factor.
    """
    turnover = pl.col("TurnoverValue").fill_null(pl.col("Close") * pl.col("Volume"))
    median = turnover.rolling_median(20, min_samples=5).shift(1).over("Code")
    last = pl.col("Close").shift(1).over("Code")
    step = pl.col("published") / pl.col("published").shift(1).over("Code")
    traded = traded.with_columns(
        last_close=last,
        log_factor=step.log(),
        move_open=(pl.col("Open") / last / step).log(),
        move_close=(pl.col("Close") / last / step).log(),
        gap=pl.col("session").cast(pl.Int32).diff().over("Code"),
        quiet=turnover < QUIET_TURNOVER * median,
    )
    traded = traded.with_columns(
        before=pl.col("move_close").shift(1).over("Code"),
        after=pl.col("move_close").shift(-1).over("Code"),
        date_before=pl.col("Date").shift(1).over("Code"),
    )
    suspects = traded.filter(
        (pl.col("move_close").abs() > JUMP) | (pl.col("log_factor").abs() > JUMP) | (pl.col("before").abs() > BREAK)
    )
    return _decide(suspects, facts)


def _decide(moves: pl.DataFrame, facts: MarketFacts) -> pl.DataFrame:
    """`rule` and `correction` (of the factor) of each suspect row, from data up to that row."""
    opened, closed = pl.col("move_open"), pl.col("move_close")
    unmoved = (closed + pl.col("log_factor")).abs() < 0.25 * pl.col("log_factor").abs()
    useless = (pl.col("log_factor").abs() > JUMP) & unmoved
    both = (opened * closed > 0) & (pl.min_horizontal(opened.abs(), closed.abs()) > JUMP)
    jumped = both & ~useless & (pl.col("last_close") >= facts.price_floor)
    ratio = _nearest_ratio(moves)
    moves = moves.with_columns(ratio=ratio)
    looks_split = jumped & pl.col("ratio").is_not_null()
    split = looks_split & pl.col("quiet").fill_null(False) & (pl.col("gap") <= STALE_SESSIONS)
    level = jumped & (pl.min_horizontal(opened, closed) > BREAK) & ~split
    rebased = pl.col("ratio").log() * closed.sign()
    moves = moves.with_columns(
        rule=pl.when(useless).then(pl.lit("factor_without_jump"))
        .when(split).then(pl.lit("split_without_factor"))
        .when(level).then(pl.lit("level_break"))
        .when(looks_split).then(pl.lit("jump_without_factor")),
        log_correction=pl.when(useless).then(-pl.col("log_factor"))
        .when(split).then(rebased)
        .when(level).then(pl.coalesce(rebased, opened))
        .otherwise(0.0),
    )  # fmt: skip
    # The way back undoes exactly what the way out was given, so one bad quote leaves no step in the adjusted level.
    out = moves.select("Code", date_before="Date", correction_before="log_correction")
    moves = moves.join(out, on=["Code", "date_before"], how="left", maintain_order="left")
    returned = (pl.col("before").abs() > BREAK) & ((pl.col("before") + closed).abs() < 0.3) & ~useless
    undone = pl.when(returned.fill_null(False)).then(-pl.col("correction_before").fill_null(0.0))
    return moves.with_columns(
        correction=undone.otherwise(pl.col("log_correction")).exp(),
        reverts=((closed.abs() > BREAK) & ((closed + pl.col("after")).abs() < 0.3) & ~useless).fill_null(False),
    )


def _nearest_ratio(moves: pl.DataFrame) -> pl.Series:
    """The split ratio that the open's or the close's move comes within RATIO_TOLERANCE of; null where none is."""
    ladder = np.log(np.array(SPLIT_RATIOS, dtype=float))
    jumps = moves.select(pl.col("move_close", "move_open").abs().fill_null(np.inf)).to_numpy()
    distance = (
        np.abs(jumps[:, None, :] - ladder[None, :, None]).min(axis=2) if len(jumps) else np.empty((0, len(ladder)))
    )
    best = distance.argmin(axis=1)
    near = distance[np.arange(len(best)), best] < RATIO_TOLERANCE
    return pl.Series(np.where(near, np.array(SPLIT_RATIOS, dtype=float)[best], np.nan)).fill_nan(None)


def _jump_hits(moves: pl.DataFrame) -> list[pl.DataFrame]:
    detail = pl.format(
        "last close {}, open {}, close {}, published factor {}, correction {}",
        "last_close", "Open", "Close", pl.col("log_factor").exp().round(6), pl.col("correction").round(6),
    )  # fmt: skip
    named = moves.filter(pl.col("rule").is_not_null()).partition_by("rule", as_dict=True)
    hits = [_hit(str(rule), rows, detail) for (rule,), rows in sorted(named.items(), key=lambda item: str(item[0]))]
    return [*hits, _hit("jump_reverts", moves.filter("reverts"), detail)]


# --- the panel --------------------------------------------------------------------------------------------------------


def _session_rows(raw: pl.DataFrame, sessions: pl.DataFrame) -> pl.DataFrame:
    """One row per stock and session from its first trade to STALE_SESSIONS after its last, sorted by Code, Date."""
    span = raw.filter("is_traded").group_by("Code", maintain_order=True)
    spans = span.agg(first=pl.col("session").min(), last=pl.col("session").max())
    end = pl.min_horizontal(pl.col("last") + STALE_SESSIONS + 1, pl.lit(sessions.height))
    grid = spans.select("Code", session=pl.int_ranges("first", end, dtype=pl.UInt32)).explode("session")
    quotes = ("Code", "session", *PRICE_FIELDS, "Volume", "TurnoverValue", "is_traded", "cumulative_factor")
    return (
        grid.join(raw.select(quotes), on=["Code", "session"], how="left", maintain_order="left")
        .join(sessions, on="session", how="left", maintain_order="left")
        .with_columns(
            pl.col("is_traded").fill_null(False), pl.col("cumulative_factor").forward_fill().over("Code")
        )
    )  # fmt: skip


def _as_of(rows: pl.DataFrame, listed: pl.DataFrame) -> pl.DataFrame:
    """`rows` (sorted by Code, Date) with Sector33Code, MarketCode as of Date; a code's earliest where none precedes."""
    attributes = ["Sector33Code", "MarketCode"]
    blank = [pl.when(pl.col(a).str.strip_chars() != "").then(pl.col(a)).alias(a) for a in attributes]
    snapshots = listed.select("Code", pl.col("Date").alias("snapshot"), *blank).sort("Code", "snapshot")
    earliest = snapshots.group_by("Code", maintain_order=True).first()
    known = rows.join_asof(
        snapshots, left_on="Date", right_on="snapshot", by="Code", strategy="backward", check_sortedness=False
    )
    missing = pl.col("snapshot").is_null()
    return (
        known.join(earliest, on="Code", how="left", suffix="_earliest", maintain_order="left")
        .with_columns(
            *(pl.when(missing).then(pl.col(f"{a}_earliest")).otherwise(pl.col(a)).alias(a) for a in attributes),
            is_listed_backfilled=missing,
        )
        .drop("snapshot", "snapshot_earliest", *(f"{a}_earliest" for a in attributes))
    )


def _with_attributes(panel: pl.DataFrame, listed: pl.DataFrame) -> pl.DataFrame:
    sector = pl.col("Sector33Code")
    return _as_of(panel, listed).with_columns(Sector33Code=pl.when(sector != "9999").then(sector))


def _adjusted(panel: pl.DataFrame) -> pl.DataFrame:
    """Forward-adjusted quotes; `raw_close` keeps the last traded price as printed, carried over untraded sessions."""
    factor, traded = pl.col("cumulative_factor"), pl.col("is_traded")
    turnover = pl.col("TurnoverValue").fill_null(pl.col("Close") * pl.col("Volume"))
    return panel.with_columns(
        *(pl.when(traded).then(pl.col(name) / factor).alias(name) for name in PRICE_FIELDS),
        Volume=pl.when(traded).then(pl.col("Volume") * factor),
        TurnoverValue=pl.when(traded).then(turnover),
        raw_close=pl.when(traded).then(pl.col("Close")).forward_fill().over("Code"),
    )


def _memberships(panel: pl.DataFrame, config: DatasetConfig, facts: MarketFacts) -> pl.DataFrame:
    window = facts.turnover_window_sessions
    needed = math.ceil(window * 2 / 3)
    panel = panel.with_columns(
        history=pl.col("is_traded").cum_sum().over("Code"),
        last_trade=pl.when("is_traded").then(pl.col("session")).forward_fill().over("Code"),
        median_turnover=pl.col("TurnoverValue").rolling_median(window, min_samples=needed).over("Code"),
    )
    investable = (
        (pl.col("history") >= config.min_history_sessions)
        & (pl.col("raw_close") >= facts.price_floor)
        & (pl.col("session") - pl.col("last_trade") <= STALE_SESSIONS)
    ).fill_null(False)
    liquid = (pl.col("median_turnover") >= facts.turnover_floor).fill_null(False)
    return panel.with_columns(is_investable=investable, is_liquid=investable & liquid)


def _summary(prices: pl.DataFrame, quarantine: pl.DataFrame) -> dict[str, Any]:
    backfilled = int(prices["is_listed_backfilled"].sum())
    warnings = []
    if backfilled:
        warnings.append(
            f"listed: sector and market of {backfilled:,} of {prices.height:,} rows come from a later snapshot"
        )
    return {
        "rows": prices.height,
        "sessions": prices["Date"].n_unique(),
        "stocks": prices["Code"].n_unique(),
        "listed_backfilled_rows": backfilled,
        "quarantine": dict(quarantine.group_by("rule").len().sort("rule").iter_rows()),
        "warnings": warnings,
    }
