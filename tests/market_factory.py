"""Small markets for tests: the generator's tables, and what the data layer makes of them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from functools import cache

import numpy as np
import polars as pl

from atft_pipeline.config import DatasetConfig
from atft_pipeline.features.market import Market
from atft_pipeline.features.panel import build_market
from atft_pipeline.synthetic import generate_market
from atft_pipeline.universe import PricesResult, build_prices

Tables = dict[str, pl.DataFrame]
CONFIG = DatasetConfig()


@cache
def raw_tables(stocks: int = 45, sessions: int = 430, seed: int = 3) -> Tables:
    """Five raw tables: three sectors of fifteen, listings, splits, thin stocks and funds among them."""
    return generate_market(stocks=stocks, sessions=sessions, seed=seed).tables


@cache
def sample(stocks: int = 45, sessions: int = 430, seed: int = 3) -> tuple[PricesResult, Tables]:
    """Prices, and the tables that the features read beside them."""
    tables = raw_tables(stocks, sessions, seed)
    return build_prices(tables, CONFIG), beside_prices(tables)


@cache
def sample_market(stocks: int = 45, sessions: int = 430, seed: int = 3) -> Market:
    result, tables = sample(stocks, sessions, seed)
    return build_market(result.panel, tables, CONFIG)


def beside_prices(tables: Mapping[str, pl.DataFrame]) -> Tables:
    return {name: tables[name] for name in ("index", "investor_flows", "statements") if name in tables}


def sessions_of(prices: pl.DataFrame) -> list[dt.date]:
    return prices["Date"].unique().sort().to_list()


def days(*iso: str) -> np.ndarray:
    return np.array(iso, dtype="datetime64[D]")
