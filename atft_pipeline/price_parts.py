"""The adjusted prices of a source on disk, month by month: passed once, and continued where something is new.

A product at PATH: `PATH/YYYY-MM.parquet` in `PRICES_COLUMNS`, `PATH.memory/YYYY-MM.npz` where the universe can be
continued after that month, `PATH.quarantine.parquet`, and a manifest. What a changed source changes is found by digests
of the raw rows by month; the pass is taken up at the last memory before the first month that differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import hashlib
import numpy as np
import polars as pl

from atft_pipeline.adjustment import StockMemory
from atft_pipeline.config import DatasetConfig, to_dict
from atft_pipeline.contracts import check_prices, check_table
from atft_pipeline.dataset import read_manifest, sha256_of, write_manifest
from atft_pipeline.errors import InputError
from atft_pipeline.files import replacing
from atft_pipeline.month_parts import (
    PartsWriter,
    beside,
    first_difference,
    load_arrays,
    month_digests,
    part,
    save_arrays,
    sessions_by_month,
    spans,
    writing_parts,
)
from atft_pipeline.price_panel import Days, PricePanel
from atft_pipeline.sources import Source
from atft_pipeline.universe import PricesResult, UniverseMemory, build_prices

KIND = "prices"
CELLS_AT_A_TIME = 4_000_000
"""Sessions times codes of a span of months that is held at once."""
MEMORY, QUARANTINE = "memory", "quarantine.parquet"
