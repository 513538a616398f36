"""The snapshots of `listed`: each stock's sector and market segment at each session, and which codes are funds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from atft_pipeline.market.adjustment import Listings
from atft_pipeline.market.market_facts import FUND_MARKET, NO_INDUSTRY, market_facts
from atft_pipeline.market.price_panel import Categories, day_array, positions
from atft_pipeline.storage.monthly import Days


@dataclass(frozen=True)
class _Attribute:
    """A text column of the snapshots."""

    names: tuple[str, ...]
    number: NDArray[np.int32]
    """[snapshots + 1] position in `names`; the last entry is −1, for a stock that is in no snapshot."""

    @staticmethod
    def of(texts: pl.Series) -> _Attribute:
        names = texts.unique().drop_nulls().sort().to_list()
        return _Attribute(tuple(names), np.append(positions(texts, names), np.int32(-1)))

    def at(self, listing: NDArray[np.int32]) -> Categories:
        return Categories(self.names, self.number[listing])


@dataclass(frozen=True)
class Listed:
    """The snapshots of `listed` for codes that have prices, sorted by code and date."""

    listings: Listings
    sector: _Attribute
    section: _Attribute
    attributes: pl.DataFrame
    """Sector33Code and MarketCode as stated."""

    @staticmethod
    def of(listed: pl.DataFrame, codes: Sequence[str], sessions: Days, market: str) -> Listed:
        """The snapshots of `codes`.

        A fund is recognised by its market. Sector 9999 under a stock's own market marks a stock that was delisted
        later: the stock is kept, with an unknown sector.
        """
        texts = [pl.col(name).str.strip_chars().replace("", None) for name in ("Sector33Code", "MarketCode")]
        stock = pl.Series("n", positions(listed["Code"], codes))
        rows = listed.select("Date", *texts).with_columns(stock).filter(pl.col("n") >= 0).sort("n", "Date")
        sector, section = pl.col("Sector33Code"), pl.col("MarketCode")
        is_fund = (section == FUND_MARKET) | ((sector == NO_INDUSTRY) & section.is_null())
        pattern = market_facts(market).share_class
        share_class = np.zeros(len(codes), np.bool_)
        if pattern is not None:
            share_class = pl.Series(codes, dtype=pl.String).str.contains(pattern).to_numpy()
        listings = Listings(
            start=np.searchsorted(rows["n"].to_numpy(), np.arange(len(codes) + 1)),
            known_from=np.searchsorted(sessions, day_array(rows["Date"])),
            is_fund=rows.select(is_fund.fill_null(value=False)).to_series().to_numpy(),
            share_class=share_class,
        )
        industry = rows.select(pl.when(sector != NO_INDUSTRY).then(sector)).to_series()
        return Listed(listings, _Attribute.of(industry), _Attribute.of(rows["MarketCode"]), rows)
