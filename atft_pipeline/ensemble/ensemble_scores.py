"""Ensemble scores as a result: the table and its manifest, and what the score earns beside its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from atft_pipeline.evaluation import metrics
from atft_pipeline.evaluation.evaluate import Evaluation
from atft_pipeline.evaluation.portfolio import COSTS_BPS, after_costs
from atft_pipeline.storage.json_values import finite_or_none

ENSEMBLE = "ensemble"
"""Name of the score itself among its parts."""

_SAME_IC = 1e-6
"""A part that gets the whole weight still differs from the score by the rounding of float32."""


@dataclass(frozen=True)
class EnsembleScores:
    """A score with its parts, what it was made of and what each of them earns."""

    table: pa.Table
    """Date, Code, split, is_liquid, `score_{h}d`, `score_{h}d_PART` of every part, and the targets."""
    manifest: dict[str, Any]
    evaluations: dict[str, dict[str, Evaluation]]
    """Split -> part -> evaluation; `ensemble`, the score itself, is the last part."""
    differences: list[dict[str, Any]]
    """A row per split, score and part: mean daily IC of the score minus the part's, with error and interval."""

    @property
    def problems(self) -> list[str]:
        """Why the score cannot be ranked, by split; empty where it can."""
        scores = {split: parts[ENSEMBLE] for split, parts in self.evaluations.items()}
        return [f"{split}: {evaluation.reason}" for split, evaluation in scores.items() if not evaluation.valid]

    def figures(self) -> list[dict[str, Any]]:
        """A row per split and part: IC, RankIC, turnover, and the Sharpe at each cost."""
        return [
            {"split": split, "part": part}
            | {name: evaluation.value(name) for name in ("ic_mean", "rank_ic_mean", "turnover_mean")}
            | sharpe_by_cost(evaluation)
            for split, parts in self.evaluations.items()
            for part, evaluation in parts.items()
        ]

    def against_better_part(self) -> list[dict[str, Any]]:
        """By split the blend against that of its two parts which has the higher mean IC; empty without a blend.

        `within_one_se` is whether it is behind by at most one standard error. The blend is compared before it is
        smoothed, as its parts are: smoothing gives up IC on purpose.
        """
        rows = []
        for split, parts in self.evaluations.items():
            blend = "blend" if "blend" in parts else ENSEMBLE
            ics = {part: parts[part].value("ic_mean") for part in ("network", "lightgbm") if "lightgbm" in parts}
            ranked = {part: ic for part, ic in ics.items() if ic is not None}
            better = max(ranked, key=lambda part: ranked[part], default=None)
            rows += [
                row | {"within_one_se": _within_one_error(row)}
                for row in self.differences
                if (row["split"], row["score"], row["part"]) == (split, blend, better)
            ]
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON: what made the score, every evaluation, and the paired differences."""
        evaluated = {
            split: {part: evaluation.as_dict() | sharpe_by_cost(evaluation) for part, evaluation in parts.items()}
            for split, parts in self.evaluations.items()
        }
        paired = {"differences": self.differences, "against_better_part": self.against_better_part()}
        return self.manifest | evaluated | paired


def _within_one_error(row: Mapping[str, Any]) -> bool | None:
    if row["ic_difference"] is None or row["se"] is None:
        return None
    return bool(row["ic_difference"] >= -row["se"] - _SAME_IC)


def sharpe_by_cost(evaluation: Evaluation) -> dict[str, float | None]:
    """Daily Sharpe of the evaluated portfolio net of each of `COSTS_BPS`; at 0 it is the gross one."""
    gross, turnover = evaluation.daily["gross"], evaluation.daily["turnover"]
    return {
        f"sharpe_net_{bps:g}bps": finite_or_none(metrics.sharpe(after_costs(gross, turnover, bps))) for bps in COSTS_BPS
    }


def ic_difference(score: Evaluation, part: Evaluation, *, horizon_sessions: int, samples: int) -> dict[str, Any]:
    """Mean of the daily IC of `score` minus that of `part`, its standard error and its bootstrap interval."""
    figures = metrics.paired_difference(
        score.daily["ic"], part.daily["ic"], samples=samples, horizon_sessions=horizon_sessions
    )
    return {"ic_difference": figures.pop("difference"), **figures}
