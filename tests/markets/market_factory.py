"""Small markets for tests: the generator's tables, and what the data layer makes of them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from atft_pipeline.config.schema import DatasetConfig
from atft_pipeline.dataset.rows import build_dataset
from atft_pipeline.features.compute import FeaturePanel, build_features, build_market
from atft_pipeline.features.inputs import Market
from atft_pipeline.market.price_panel import PricePanel
from atft_pipeline.market.synthetic import generate_market
from atft_pipeline.market.universe import PricesResult, build_prices
from markets.eventful_market import eventful_tables

Tables = dict[str, pl.DataFrame]
CONFIG = DatasetConfig()
SOURCE = {"path": "sample", "tables": {"prices": {"rows": 1, "sha256": "ab"}}}
Built = tuple[pa.Table, pa.Table, dict[str, Any]]

QUIET = "quiet"
"""The generator's market as it is; the other markets are the periods of `eventful_market`."""
LONG = (QUIET, "segments")
"""Markets in which every feature has values."""


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


# --- markets by name: the only calls of the data layer that the laws make ---


def tables_of(market: str) -> Tables:
    return dict(raw_tables()) if market == QUIET else eventful_tables(market)


@cache
def prices_of(market: str) -> PricesResult:
    return build_prices(tables_of(market), CONFIG)


@cache
def panels_of(market: str) -> Market:
    """Dense panels of a market that no test may change."""
    return build_market(prices_of(market).panel, beside_prices(tables_of(market)), CONFIG)


def panels(prices: pl.DataFrame, tables: Mapping[str, pl.DataFrame], config: DatasetConfig = CONFIG) -> Market:
    """Panels of an adjusted prices table, or a part of it, and the tables beside it."""
    return build_market(PricePanel.from_frame(prices), beside_prices(tables), config)


@cache
def features_of(market: str) -> FeaturePanel:
    return build_features(prices_of(market).panel, beside_prices(tables_of(market)), CONFIG)


def build(tables: Mapping[str, pl.DataFrame], config: DatasetConfig = CONFIG) -> Built:
    """Features with targets, membership and manifest of raw tables."""
    return dataset_of(build_prices(tables, config), tables, config)


def dataset_of(result: PricesResult, tables: Mapping[str, pl.DataFrame], config: DatasetConfig = CONFIG) -> Built:
    return build_dataset(result.panel, result.quarantine, beside_prices(tables), config, SOURCE)


@cache
def built_of(market: str) -> Built:
    return dataset_of(prices_of(market), tables_of(market))
