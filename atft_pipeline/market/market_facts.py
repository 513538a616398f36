"""What is true of each market: calendar, close times, days per year, currency floors. One row per market.

The codes below the table are those of the J-Quants columns, which every source has to use.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

from atft_pipeline.errors import InputError


@dataclass(frozen=True)
class MarketFacts:
    calendar: str
    """Name in exchange_calendars."""
    days_per_year: int
    regular_close: tuple[tuple[dt.date, dt.time], ...]
    """(first session, closing time) in the exchange's time zone, ascending."""
    early_closes: dict[dt.date, dt.time]
    """Closes that neither the regular rule nor the library knows."""
    half_days_until: dt.date | None
    """Last date on which the first and the last session of a year end with the morning session."""
    morning_close: dt.time
    """End of the morning session on those half days."""
    extra_sessions: tuple[dt.date, ...]
    """Sessions that the library omits."""
    price_floor: float
    """Currency units, unadjusted close: below it a tick is a return."""
    turnover_floor: float
    """Currency units a session, trailing median: at or above it a stock is liquid (computed in liquidity.py)."""
    turnover_window_sessions: int
    """Sessions of that median."""
    share_class: str | None
    """Pattern of the codes of preferred shares and the like, None where the code does not tell."""
    benchmark: str


MARKETS: dict[str, MarketFacts] = {
    "tokyo": MarketFacts(
        calendar="XTKS",
        days_per_year=245,
        regular_close=((dt.date(1900, 1, 1), dt.time(15, 0)), (dt.date(2024, 11, 5), dt.time(15, 30))),
        # The exchange stopped all trading at 14:40 when orders neared its system's capacity.
        early_closes={dt.date(2006, 1, 18): dt.time(14, 40)},
        half_days_until=dt.date(2009, 1, 5),
        # The morning session ended at 11:00 until it was extended to 11:30 on 2011-11-21.
        morning_close=dt.time(11, 0),
        extra_sessions=(dt.date(2020, 10, 1),),
        price_floor=50.0,
        turnover_floor=100e6,
        turnover_window_sessions=20,
        # The fifth character of an ordinary share's code is 0.
        share_class=r"^\d[0-9A-Z]\d[0-9A-Z][1-9]$",
        benchmark="TOPIX",
    ),
    "us": MarketFacts(
        calendar="XNYS",
        days_per_year=252,
        regular_close=((dt.date(1900, 1, 1), dt.time(16, 0)),),
        early_closes={},
        half_days_until=None,
        morning_close=dt.time(13, 0),
        extra_sessions=(),
        price_floor=1.0,
        turnover_floor=20e6,
        turnover_window_sessions=20,
        share_class=None,
        benchmark="S&P 500",
    ),
}

FUND_MARKET = "0109"
"""MarketCode of funds and other listings that are no stocks."""
NO_INDUSTRY = "9999"
"""Sector33Code of funds, and of stocks that were delisted before the snapshot."""
NO_SECTOR: tuple[str, ...] = (NO_INDUSTRY, "-", "")
"""Sector33Codes that name no industry, so no sector to share."""
INDEX_CODE = "0000"
"""Code of TOPIX in a table of several indices."""
SECTION_OF_MARKET: dict[str, str] = {
    "0101": "TSE1st",
    "0102": "TSE2nd",
    "0104": "TSEMothers",
    "0106": "TSEJASDAQ",
    "0107": "TSEJASDAQ",
    "0111": "TSEPrime",
    "0112": "TSEStandard",
    "0113": "TSEGrowth",
}
"""MarketCode of the listed table to Section of investor_flows: the first five until 2022-04-01, the others from the
reform of 2022-04-04 on. A stock has the flows of the section it is in at that session, so the first release of the new
sections finds no history of theirs. Source: JPX J-Quants API, listed/info and markets/trades_spec."""


def market_facts(market: str) -> MarketFacts:
    """The row of `market`. Raises InputError that lists the known ones."""
    if market not in MARKETS:
        raise InputError(f"dataset.market: expected one of {', '.join(sorted(MARKETS))}, found {market!r}")
    return MARKETS[market]
