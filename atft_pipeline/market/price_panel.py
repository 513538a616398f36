"""Adjusted prices and memberships: dense in memory, and as the long table that is written to disk.

Shapes: T sessions, N stocks, R rows of the long table (session-major, then code). A stock has a row at a session while
it has traded within the last `STALE_SESSIONS` sessions; elsewhere the arrays hold NaN, False or −1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from numba import njit
from numpy.typing import NDArray

from atft_pipeline.storage.monthly import Days

Matrix = NDArray[np.float64]
"""A dense array of floats: `[T, N]` with a row a session and a column a stock, or a series `[T]`."""
Flags = NDArray[np.bool_]

QUOTES: tuple[str, ...] = ("Open", "High", "Low", "Close", "Volume", "TurnoverValue")
FLAGS: tuple[str, ...] = ("is_traded", "is_investable", "is_liquid", "is_listed_backfilled")
PRICES_COLUMNS: tuple[str, ...] = (
    "Date", "Code", *QUOTES, "cumulative_factor", *FLAGS, "Sector33Code", "MarketCode",
)  # fmt: skip
"""Columns of the prices table, in order."""
STALE_SESSIONS = 5
"""A stock stays a member, and its last close a price, for this many sessions after its last trade."""


@dataclass(frozen=True)
class Categories:
    """A text attribute of every cell: `names[number]`, −1 where there is none."""

    names: tuple[str, ...]
    number: NDArray[np.int32]
    """[T, N]"""

    def numbered(self, names: Mapping[str, int]) -> NDArray[np.int32]:
        """[T, N] by another numbering, −1 for what it does not have."""
        lookup = np.array([*(names.get(name, -1) for name in self.names), -1], np.int32)
        return lookup[self.number]

    def followed_by(self, later: Categories) -> Categories:
        """Both, one after the other."""
        names = tuple(sorted({*self.names, *later.names}))
        numbers = {name: number for number, name in enumerate(names)}
        return Categories(names, np.concatenate([self.numbered(numbers), later.numbered(numbers)]))

    def series(self, name: str, cells: NDArray[np.int64]) -> pl.Series:
        """Text of the flat positions `cells`, null where there is none."""
        number = self.number.reshape(-1)[cells]
        texts = pl.Series(name, self.names, dtype=pl.String)
        return texts.gather(pl.Series(number).cast(pl.UInt32, strict=False))


@dataclass(frozen=True)
class PricePanel:
    """One market's prices table, dense. Prices and volumes are forward adjusted, TurnoverValue is not."""

    sessions: Days
    codes: tuple[str, ...]
    """Ascending."""
    quotes: dict[str, Matrix]
    """`QUOTES`, null on an untraded session."""
    cumulative_factor: Matrix
    is_traded: Flags
    is_investable: Flags
    is_liquid: Flags
    is_listed_backfilled: Flags
    has_row: Flags
    sector: Categories
    section: Categories

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.sessions), len(self.codes)

    def of_codes(self, codes: Sequence[str]) -> PricePanel:
        """The same for `codes`, which contain these; what a new column holds is absent."""
        if tuple(codes) == self.codes:
            return self
        columns = np.searchsorted(np.array(codes), np.array(self.codes))

        def wider(cells: NDArray[Any], absent: Any) -> NDArray[Any]:
            out = np.full((len(self.sessions), len(codes)), absent, dtype=cells.dtype)
            out[:, columns] = cells
            return out

        flags: dict[str, Any] = {name: wider(getattr(self, name), False) for name in (*FLAGS, "has_row")}
        return replace(
            self,
            codes=tuple(codes),
            quotes={name: wider(panel, np.nan) for name, panel in self.quotes.items()},
            cumulative_factor=wider(self.cumulative_factor, np.nan),
            **flags,
            sector=Categories(self.sector.names, wider(self.sector.number, -1)),
            section=Categories(self.section.names, wider(self.section.number, -1)),
        )

    def last(self, sessions: int) -> PricePanel:
        """The last `sessions` of it, copied, so that the rest can go."""
        rows = slice(max(0, len(self.sessions) - sessions), None)
        flags: dict[str, Any] = {name: getattr(self, name)[rows].copy() for name in (*FLAGS, "has_row")}
        return replace(
            self,
            sessions=self.sessions[rows].copy(),
            quotes={name: panel[rows].copy() for name, panel in self.quotes.items()},
            cumulative_factor=self.cumulative_factor[rows].copy(),
            **flags,
            sector=Categories(self.sector.names, self.sector.number[rows].copy()),
            section=Categories(self.section.names, self.section.number[rows].copy()),
        )

    def followed_by(self, later: PricePanel) -> PricePanel:
        """Both, one after the other, for the codes of either."""
        codes = sorted({*self.codes, *later.codes})
        one, two = self.of_codes(codes), later.of_codes(codes)
        return PricePanel(
            sessions=np.concatenate([one.sessions, two.sessions]),
            codes=tuple(codes),
            quotes={name: np.concatenate([one.quotes[name], two.quotes[name]]) for name in QUOTES},
            cumulative_factor=np.concatenate([one.cumulative_factor, two.cumulative_factor]),
            **{name: np.concatenate([getattr(one, name), getattr(two, name)]) for name in (*FLAGS, "has_row")},
            sector=one.sector.followed_by(two.sector),
            section=one.section.followed_by(two.section),
        )

    def frame(self) -> pl.DataFrame:
        """The long table: `PRICES_COLUMNS`, sorted by Date, Code."""
        cells = np.flatnonzero(self.has_row)
        t, n = np.divmod(cells, len(self.codes))
        panels = {**self.quotes, "cumulative_factor": self.cumulative_factor}
        return pl.DataFrame(
            {
                "Date": dates_of(self.sessions)[t],
                "Code": pl.Series(self.codes, dtype=pl.String).gather(n),
                **{name: pl.Series(panel.reshape(-1)[cells]).fill_nan(None) for name, panel in panels.items()},
                **{name: getattr(self, name).reshape(-1)[cells] for name in FLAGS},
                "Sector33Code": self.sector.series("Sector33Code", cells),
                "MarketCode": self.section.series("MarketCode", cells),
            }
        ).select(PRICES_COLUMNS)

    @staticmethod
    def from_frame(frame: pl.DataFrame, sessions: Days | None = None) -> PricePanel:
        """The panel of a long table, over `sessions` where they are given, else over the dates it has rows of."""
        sessions = day_array(frame["Date"].unique().sort()) if sessions is None else sessions
        codes = frame["Code"].unique().sort().to_list()
        t = np.searchsorted(sessions, day_array(frame["Date"]))
        cells = t * len(codes) + positions(frame["Code"], codes)
        shape = (len(sessions), len(codes))

        def panel(name: str) -> Matrix:
            return scattered(frame[name].cast(pl.Float64).fill_null(np.nan).to_numpy(), cells, shape, np.nan)

        def flag(name: str) -> Flags:
            return scattered(frame[name].fill_null(value=False).to_numpy(), cells, shape, False)

        def categories(name: str) -> Categories:
            names = frame[name].unique().drop_nulls().sort().to_list()
            return Categories(tuple(names), scattered(positions(frame[name], names), cells, shape, -1))

        return PricePanel(
            sessions=sessions,
            codes=tuple(codes),
            quotes={name: panel(name) for name in QUOTES},
            cumulative_factor=panel("cumulative_factor"),
            **{name: flag(name) for name in FLAGS},
            has_row=scattered(np.ones(frame.height, np.bool_), cells, shape, False),
            sector=categories("Sector33Code"),
            section=categories("MarketCode"),
        )


def day_array(dates: pl.Series) -> Days:
    """A column of dates as datetime64[D]."""
    return dates.cast(pl.Date).to_physical().to_numpy().astype("datetime64[D]")


def positions(texts: pl.Series, names: Sequence[str]) -> NDArray[np.int32]:
    """Position of each text among `names`, −1 for null and for what is not among them."""
    number = texts.cast(pl.Enum(names), strict=False).to_physical()
    return number.cast(pl.Int32).fill_null(-1).to_numpy()


def scattered(values: NDArray[Any], cells: NDArray[np.integer], shape: tuple[int, int], absent: Any) -> NDArray[Any]:
    """`[T, N]` with each value at its flat position, `absent` elsewhere."""
    panel = np.full(shape, absent, dtype=values.dtype)
    panel.reshape(-1)[cells] = values
    return panel


@njit(cache=True, nogil=True)
def _move(cells: Any, width: Any, columns: Any) -> None:
    for t in range(len(cells) // width):
        for k in range(len(columns)):
            cells[t * len(columns) + k] = cells[t * width + columns[k]]


def compacted(cells: NDArray[Any], columns: NDArray[np.intp]) -> NDArray[Any]:
    """`[T, len(columns)]` of an owned `[T, N]` in C order, ascending columns; its memory is taken over, not copied.

    Every column moves left or stays: fresh pages for a copy of every panel cost more than all passes over the quotes.
    """
    if len(columns) < cells.shape[1]:
        _move(cells.reshape(-1), cells.shape[1], columns)
    return cells.reshape(-1)[: len(cells) * len(columns)].reshape(len(cells), len(columns))


def dates_of(sessions: Days) -> pl.Series:
    """datetime64[D] as a column of dates."""
    return pl.Series(sessions.astype("datetime64[D]").astype(np.int32)).cast(pl.Date)
