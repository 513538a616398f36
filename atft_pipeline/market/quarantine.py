"""The quarantine: each rule, its decision, and how a hit states its evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from atft_pipeline.market.adjustment import HIT, RULES
from atft_pipeline.market.listed import Listed
from atft_pipeline.market.price_panel import Matrix, dates_of
from atft_pipeline.storage.monthly import Days


@dataclass(frozen=True)
class QuarantineRule:
    decision: str
    explanation: str


QUARANTINE_RULES: dict[str, QuarantineRule] = {
    "no_trade_date": QuarantineRule("drop", "no stock traded and the exchange was closed: rows of a holiday"),
    "not_listed": QuarantineRule("drop", "the code is in no snapshot of listed, so it cannot be known to be a stock"),
    "not_common_stock": QuarantineRule("drop", "fund, REIT or preferred share by market, sector or share class"),
    "price_not_positive": QuarantineRule("mask", "a traded row with a price that is null, infinite or <= 0"),
    "negative_volume": QuarantineRule("mask", "volume below 0 or infinite"),
    "negative_turnover": QuarantineRule("mask", "turnover below 0 or infinite"),
    "high_below_low": QuarantineRule("mask", "high below low"),
    "price_outside_range": QuarantineRule("mask", "open or close outside [low, high]"),
    "range_too_wide": QuarantineRule("mask", "high over 4.5 times low: one field is off in scale"),
    "bad_factor": QuarantineRule("ignore_factor", "factor null on a traded row, or not in 1e-4 to 1e4: read as 1"),
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


# --- rows of the table ------------------------------------------------------------------------------------------------

_QUOTE = ("open", "high", "low", "close", "volume")


def _text(figure: str) -> pl.Expr:
    return pl.col(figure).cast(pl.String).fill_null("null")


_QUOTED = pl.format("O {} H {} L {} C {} V {}", *(_text(name) for name in _QUOTE))
_JUMPED = pl.format(
    "last close {}, open {}, close {}, published factor {}, correction {}",
    "last_close", "open", "close", pl.col("factor").round(6), pl.col("correction").round(6),
)  # fmt: skip
_LISTED_AS = pl.format("MarketCode {} Sector33Code {}", _text("MarketCode"), _text("Sector33Code"))
_DETAILS: dict[str, pl.Expr] = {
    "not_listed": _LISTED_AS,
    "not_common_stock": _LISTED_AS,
    "price_not_positive": _QUOTED,
    "negative_volume": _QUOTED,
    "negative_turnover": pl.format("{} turnover {}", _QUOTED, _text("turnover")),
    "high_below_low": _QUOTED,
    "price_outside_range": _QUOTED,
    "range_too_wide": _QUOTED,
    "bad_factor": pl.format("factor {}", _text("factor")),
    "factor_without_jump": _JUMPED,
    "split_without_factor": _JUMPED,
    "level_break": _JUMPED,
    "jump_without_factor": _JUMPED,
    "jump_reverts": _JUMPED,
}
"""How each rule states its evidence."""


def quarantine_rows(
    hits: Matrix, sessions: Days, passed: int, codes: Sequence[str], listed: Listed
) -> list[pl.DataFrame]:
    """The pass's hits as rows of the quarantine table.

    sessions: all sessions so far. passed: how many of them came before the pass.
    """
    session = hits[:, HIT.session].astype(np.int64) + passed
    listing = pl.Series("listing", hits[:, HIT.listing]).fill_nan(None).cast(pl.Int64, strict=False)
    frame = pl.DataFrame(
        {
            "rule": hits[:, HIT.rule].astype(np.int64),
            "Date": dates_of(sessions[session]),
            "known_from": dates_of(sessions[hits[:, HIT.known_from].astype(np.int64) + passed]),
            "Code": pl.Series(codes, dtype=pl.String).gather(hits[:, HIT.stock].astype(np.int64)),
            **{
                name: pl.Series(hits[:, column], dtype=pl.Float64).fill_nan(None) for name, column in _figures().items()
            },
            "listing": pl.Series(np.where(listing.is_null(), -1, listing.fill_null(-1))),
        }
    )
    stated = listed.attributes.select("Sector33Code", "MarketCode").with_row_index("listing")
    frame = frame.join(stated.with_columns(pl.col("listing").cast(pl.Int64)), on="listing", how="left")
    return [
        as_quarantine_rows(RULES[number], rows, _DETAILS[RULES[number]])
        for (number,), rows in frame.partition_by("rule", as_dict=True).items()
        if isinstance(number, int)
    ]


def _figures() -> dict[str, int]:
    return {
        name: column
        for name, column in HIT._asdict().items()
        if name not in ("session", "stock", "rule", "listing", "known_from")
    }


def as_quarantine_rows(rule: str, rows: pl.DataFrame, detail: pl.Expr) -> pl.DataFrame:
    return rows.select(
        pl.lit(rule).alias("rule"),
        pl.lit(QUARANTINE_RULES[rule].decision).alias("decision"),
        "Date",
        "Code",
        detail.cast(pl.String).alias("detail"),
        "known_from",
    )
