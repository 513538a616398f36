"""The adjusted prices of a source on disk, month by month: passed once, and continued where something is new.

A product at PATH: `PATH/YYYY-MM.parquet` in `PRICES_COLUMNS`, `PATH.memory/YYYY-MM.npz` where the universe can be
continued after that month, `PATH.quarantine.parquet`, and a manifest. What a changed source changes is found by digests
of the raw rows by month; the pass is taken up at the last memory before the first month that differs.
"""

from __future__ import annotations

KIND = "prices"
CELLS_AT_A_TIME = 4_000_000
"""Sessions times codes of a span of months that is held at once."""
MEMORY, QUARANTINE = "memory", "quarantine.parquet"
