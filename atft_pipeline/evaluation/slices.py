"""Which cells of a panel a slice covers, and which slices of it can be evaluated: the only place that decides it.

The names of the slices and the columns that mark them are in config/slices.py, what makes a stock liquid in
market/liquidity.py. T sessions, N stocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from atft_pipeline.config.slices import Slice
from atft_pipeline.evaluation.evaluate import EvaluationPanel

if TYPE_CHECKING:
    from atft_pipeline.batches.panel import Panel

Cells = NDArray[np.bool_]


class Sliced(Protocol):
    """What has slices, each flag [T, N]: a panel of a dataset, or the rows of a run's predictions."""

    @property
    def member(self) -> Cells: ...
    @property
    def investable(self) -> Cells: ...
    @property
    def liquid(self) -> Cells: ...


def slice_mask(panel: Sliced, universe: Slice) -> Cells:
    """[T, N] cells that a reported slice covers; never more than the model scores."""
    return panel.member & (panel.liquid if universe == "liquid" else panel.investable)


def evaluable_slices(panel: Panel, sessions: NDArray[np.int64], train_universe: Slice) -> tuple[Slice, ...]:
    """Slices that a model trained on `train_universe` scores in full and that `sessions` can be evaluated in.

    A model of `liquid` does not report `all`. A Sharpe needs two sessions in which two stocks have a target.
    """
    covered: tuple[Slice, ...] = ("liquid",) if train_universe == "liquid" else ("liquid", "all")
    has_target = np.isfinite(panel.targets[sessions, :, 0])
    return tuple(
        universe
        for universe in covered
        if ((slice_mask(panel, universe)[sessions] & has_target).sum(axis=1) >= 2).sum() >= 2
    )


def marked_slice(universe: Slice) -> Slice | None:
    """The slice to ask a run's predictions for, None for all of their rows.

    They hold the rows that the model scored, mark the liquid ones and have no column for the others: a run that is
    judged on `all` has scored the investable stocks and no more.
    """
    return "liquid" if universe == "liquid" else None


def panel_of_slice(panel: Panel, sessions: NDArray[np.int64], universe: Slice) -> EvaluationPanel:
    """Targets of horizon 1 for the stocks of a slice in some sessions (indices) of a dataset."""
    return EvaluationPanel(
        sessions=panel.sessions[sessions],
        codes=panel.codes,
        targets=panel.targets[sessions, :, 0],
        days_per_year=int(panel.manifest["days_per_year"]),
        member=slice_mask(panel, universe)[sessions],
    )
