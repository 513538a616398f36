"""Runs the validity checks on the validation scores of one epoch, and keeps the results for the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atft_pipeline.batches.panel import Panel
from atft_pipeline.config.schema import PipelineConfig
from atft_pipeline.dataset.layout import read_membership
from atft_pipeline.evaluation.evaluate import evaluate_panel
from atft_pipeline.evaluation.reversal import REVERSAL_FEATURES, one_factor_reversal
from atft_pipeline.evaluation.slices import panel_of_slice, slice_mask
from atft_pipeline.storage.atomic import write_json
from atft_pipeline.storage.json_values import plain_json
from atft_pipeline.training.judging.scoring import Scores, evaluate_scores
from atft_pipeline.verdict.validity import (
    REPEAT_TOLERANCE_CPU,
    REPEAT_TOLERANCE_GPU,
    forward_returns,
    lag_scan,
    validity_items,
)


class ValidityChecks:
    """Checks one epoch's validation scores and keeps the results as `validity/epoch_NNN.json`."""

    def __init__(self, panel: Panel, dataset: Path, config: PipelineConfig) -> None:
        self.panel, self.dataset, self.config = panel, dataset, config

    @cached_property
    def _prices(self) -> dict[str, NDArray[np.float64]]:
        """Adjusted Open, Close and one-session return of the panel's stocks, each [T, N], NaN where missing."""
        names = ["Open", "Close", "return_1d"]
        table = read_membership(self.dataset, ["Date", "Code", *names])
        code = table["Code"].combine_chunks().dictionary_encode()
        distinct = np.array(code.dictionary.to_pylist(), dtype=np.str_)
        stock = np.searchsorted(self.panel.codes, distinct)
        is_in_panel = self.panel.codes[np.minimum(stock, len(self.panel.codes) - 1)] == distinct
        row_stock = np.where(is_in_panel, stock, -1)[code.indices.to_numpy()]
        session = np.searchsorted(self.panel.sessions, table["Date"].to_numpy().astype("datetime64[D]"))
        kept = row_stock >= 0
        dense = {}
        for name in names:
            dense[name] = np.full((len(self.panel.sessions), len(self.panel.codes)), np.nan)
            dense[name][session[kept], row_stock[kept]] = table[name].to_numpy()[kept]
        return dense

    def run(
        self,
        run_dir: Path,
        epoch: int,
        *,
        trained: Scores,
        again: Scores,
        reinitialised: Scores,
        hashes: Mapping[str, str],
        previous_hashes: Mapping[str, str] | None,
        learning_rate: float,
        on_gpu: bool,
        train_sessions: NDArray[np.int64],
    ) -> None:
        """`again` are scores of the same weights in other blocks; `learning_rate` is the largest of the epoch."""
        panel, config, universe = self.panel, self.config.evaluation, self.config.evaluation.universe
        sessions = trained.sessions
        in_slice = slice_mask(panel, universe)[sessions]

        def scores(of: Scores) -> NDArray[np.float64]:
            return np.where(in_slice, of.values[:, :, 0], np.nan).astype(np.float64)

        targets = np.where(in_slice, panel.targets[sessions, :, 0], np.nan).astype(np.float64)
        first, second = (evaluate_scores(of, panel, universe, config) for of in (trained, again))
        recomputed = forward_returns(self._prices["Open"], self._prices["Close"], panel.manifest["execution"], 1)
        items = validity_items(
            scores(trained),
            targets,
            quantile=config.quantile,
            seed=self.config.train.seed,
            fresh_scores=scores(reinitialised),
            again_scores=scores(again),
            statistics=first.values() if first.valid else {},
            again_statistics=second.values() if second.valid else {},
            repeat_tolerance=REPEAT_TOLERANCE_GPU if on_gpu else REPEAT_TOLERANCE_CPU,
            recomputed_targets=recomputed[sessions],
            previous_hashes=previous_hashes,
            current_hashes=hashes,
            learning_rate=learning_rate,
        )
        sharpe = first.value("sharpe_daily") if first.valid else None
        scan = lag_scan(scores(trained), self._prices["return_1d"][sessions], sharpe_daily=sharpe)
        content = {
            "epoch": epoch,
            "items": [plain_json(item.as_dict()) for item in items],
            "lag_scan": scan,
            "reversal_sharpe": self._reversal_sharpe(sessions, train_sessions),
        }
        write_json(run_dir / "validity" / f"epoch_{epoch:03d}.json", content)

    def _reversal_sharpe(self, sessions: NDArray[np.int64], train_sessions: NDArray[np.int64]) -> float | None:
        """Sharpe of the best one-factor reversal of the training sessions, on `sessions` and under the same evaluation.

        None where the dataset has no return that a reversal is made of.
        """
        panel, config = self.panel, self.config.evaluation
        if not set(REVERSAL_FEATURES) & set(panel.feature_names):
            return None
        member = slice_mask(panel, config.universe)
        reversal = one_factor_reversal(
            panel.features,
            panel.feature_names,
            panel.targets[:, :, 0],
            member,
            train_sessions,
            quantile=config.quantile,
        )
        of_slice = panel_of_slice(panel, sessions, config.universe)
        evaluation = evaluate_panel(reversal.scores[sessions], of_slice, config)
        return evaluation.value("sharpe_daily") if evaluation.valid else None
