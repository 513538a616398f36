"""The score that is handed on: seeds averaged, blended with LightGBM, smoothed; each step only where it is asked for.

T sessions, N stocks in ascending code order. A delivery belongs to finished runs that differ in their seed alone, and
is evaluated by the code that evaluated them; how scores are combined is in score_panels.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from atft_pipeline.batches.panel import load_panel
from atft_pipeline.config.schema import HORIZONS
from atft_pipeline.dataset.splits import make_split
from atft_pipeline.ensemble.combine import (
    BlendWeight,
    Scores,
    blend_weight,
    blended,
    ensemble,
    require_span,
    smoothed,
    standardised,
)
from atft_pipeline.ensemble.members import FinishedRun, Predictions, read_ensemble, read_predictions
from atft_pipeline.errors import InputError
from atft_pipeline.evaluation import metrics
from atft_pipeline.evaluation.baselines import fit_lightgbm
from atft_pipeline.evaluation.evaluate import Evaluation, evaluate
from atft_pipeline.evaluation.portfolio import COSTS_BPS, after_costs
from atft_pipeline.storage.artifact import (
    read_manifest,
    replacing_artifact,
    sha256_of,
    write_manifest,
    write_partition,
)
from atft_pipeline.storage.code_version import code_revision

Blend = Literal["none", "lightgbm"]

BLENDS: tuple[Blend, ...] = ("none", "lightgbm")
SPLITS = ("validation", "test")
DELIVERED = "delivered"

_BOOTSTRAP_SEED = 20
_SAME_IC = 1e-6
"""A part that is delivered whole differs from itself by the rounding of float32 scores."""


def _lightgbm_scores(run: FinishedRun, rows: Predictions, horizon_sessions: int) -> Scores:
    """Scores [T, N] of LightGBM for `rows`, fitted for one horizon on the sessions that the run was trained on.

    Raises InputError where the run's dataset is gone or is another one now.
    """
    dataset, expected = Path(run.header["dataset_path"]), run.header["dataset_fingerprint"]
    found = read_manifest(dataset, kind="ml_dataset")["fingerprint"]
    if found != expected:
        raise InputError(
            f"{dataset}: its fingerprint is {found[:12]}, {run.run_dir} was trained on {expected[:12]}; train the run"
            " again, or deliver it without the blend"
        )
    panel = load_panel(dataset, run.config.train.universe)
    split = make_split(panel.sessions, run.config.split)
    scores = fit_lightgbm(panel, split, run.seed, horizon_sessions=horizon_sessions)
    t = np.searchsorted(panel.sessions, rows.sessions).clip(max=len(panel.sessions) - 1)
    n = np.searchsorted(panel.codes, rows.codes).clip(max=len(panel.codes) - 1)
    same = (panel.sessions[t] == rows.sessions).all() and (panel.codes[n] == rows.codes).all()
    aligned = scores[np.ix_(t, n)]
    if not same or not np.isfinite(aligned[rows.member]).all():
        raise InputError(f"{run.predictions}: has rows that {dataset} does not score; train the run again")
    return np.where(rows.member, aligned, np.nan)


@dataclass(frozen=True)
class Delivery:
    """A score with its parts, what made it and what each earns."""

    table: pa.Table
    """Date, Code, split, is_liquid, `score_{h}d`, `score_{h}d_PART` of every part, and the targets."""
    manifest: dict[str, Any]
    evaluations: dict[str, dict[str, Evaluation]]
    """Split -> part -> evaluation; `delivered` is the last part."""
    differences: list[dict[str, Any]]
    """A row per split, score and part: mean daily IC of the score minus the part's, with error and interval."""

    @property
    def problems(self) -> list[str]:
        """Why the delivered score cannot be ranked, by split; empty where it can."""
        found = {split: parts[DELIVERED] for split, parts in self.evaluations.items()}
        return [f"{split}: {evaluation.reason}" for split, evaluation in found.items() if not evaluation.valid]

    def figures(self) -> list[dict[str, Any]]:
        """A row per split and part: IC, RankIC, turnover, and the Sharpe at each cost."""
        return [
            {"split": split, "part": part}
            | {name: e.value(name) for name in ("ic_mean", "rank_ic_mean", "turnover_mean")}
            | sharpe_by_cost(e)
            for split, parts in self.evaluations.items()
            for part, e in parts.items()
        ]

    def against_better_part(self) -> list[dict[str, Any]]:
        """By split the blend against that of its two parts which has the higher mean IC; empty without a blend.

        `within_one_se` is whether it is behind by at most one standard error. The blend is taken before it is smoothed,
        as its parts are: smoothing gives up IC on purpose.
        """
        rows = []
        for split, parts in self.evaluations.items():
            blend = "blend" if "blend" in parts else DELIVERED
            earned = {part: parts[part].value("ic_mean") for part in ("network", "lightgbm") if "lightgbm" in parts}
            ranked = {part: value for part, value in earned.items() if value is not None}
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
            split: {part: e.as_dict() | sharpe_by_cost(e) for part, e in parts.items()}
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
        f"sharpe_net_{bps:g}bps": metrics.finite_or_none(metrics.sharpe(after_costs(gross, turnover, bps)))
        for bps in COSTS_BPS
    }


def deliver(
    run_dirs: Sequence[Path], *, horizon_sessions: int = 1, blend: Blend = "none", smoothing_sessions: int = 1
) -> Delivery:
    """The score of one or several runs for one horizon, from the predictions of their last epoch.

    Several runs are an ensemble of seeds. `blend` lightgbm adds LightGBM, fitted for the horizon on the runs' dataset
    and training sessions, with a weight from the validation sessions of the evaluated slice. `smoothing_sessions` above
    1 smooths the result within each split, which starts without memory: the sessions between the two have no score. The
    smoothed score trades some IC for turnover; the parts stay as they are, and `blend` shows what it was before. Longer
    horizons are evaluated in tranches.

    Raises InputError where the runs cannot be delivered together, an argument is out of range or the dataset is gone.
    """
    require_arguments(horizon_sessions, blend, smoothing_sessions)
    if not run_dirs:
        raise InputError("delivery: no run directory given; name at least one")
    runs = read_ensemble(run_dirs)
    column = f"score_{horizon_sessions}d"
    rows, members = read_predictions(runs, column)
    network = ensemble(list(members.values()))
    parts: dict[str, Scores] = {**(members if len(members) > 1 else {}), "network": network}
    score, weight = network, None
    if blend == "lightgbm":
        parts["lightgbm"] = standardised(_lightgbm_scores(runs[0], rows, horizon_sessions))
        judged = rows.of_split("validation")[:, None] & _evaluated_cells(runs[0], rows)
        targets = np.where(judged, rows.panel(f"target_{horizon_sessions}d"), np.nan)
        weight = blend_weight(network, parts["lightgbm"], targets, horizon_sessions)
        score = blended(network, parts["lightgbm"], weight.network)
    if smoothing_sessions > 1:
        if weight is not None:
            parts["blend"] = score  # without smoothing it is what is delivered
        score = _smoothed_within_splits(score, rows, smoothing_sessions)
    parts[DELIVERED] = score
    evaluations = _evaluations(runs[0], rows, parts, horizon_sessions)
    return Delivery(
        table=_table(rows, parts, column),
        manifest=_manifest(runs, rows, list(parts), horizon_sessions, blend, weight, smoothing_sessions),
        evaluations=evaluations,
        differences=_differences(evaluations, horizon_sessions, runs[0].config.evaluation.bootstrap_samples),
    )


def require_arguments(horizon_sessions: int, blend: str, smoothing_sessions: int) -> None:
    """Raises InputError for an argument of `deliver` that is out of range, before anything is read or trained."""
    if horizon_sessions not in HORIZONS:
        raise InputError(f"horizon: expected one of {', '.join(map(str, HORIZONS))}, found {horizon_sessions}")
    if blend not in BLENDS:
        raise InputError(f"blend: expected one of {', '.join(BLENDS)}, found {blend!r}")
    require_span(smoothing_sessions)


def write_delivery(delivery: Delivery, path: Path) -> None:
    """Writes the table to `path` and its manifest beside it; an earlier delivery there is replaced."""
    with replacing_artifact(path) as temporary:
        write_partition(temporary, delivery.table)
    write_manifest(path, delivery.manifest)


def _smoothed_within_splits(score: Scores, rows: Predictions, span_sessions: int) -> Scores:
    out = np.full(score.shape, np.nan)
    for split in SPLITS:
        sessions = rows.of_split(split)
        out[sessions] = smoothed(score[sessions], span_sessions)
    return out


def _evaluated_cells(run: FinishedRun, rows: Predictions) -> NDArray[np.bool_]:
    """[T, N] cells of the slice that the run is judged on."""
    return rows.liquid if run.config.evaluation.universe == "liquid" else rows.member


def _evaluations(
    run: FinishedRun, rows: Predictions, parts: Mapping[str, Scores], horizon_sessions: int
) -> dict[str, dict[str, Evaluation]]:
    cells = _evaluated_cells(run, rows)
    targets, returns_1d = rows.panel(f"target_{horizon_sessions}d"), rows.panel("target_1d")
    evaluations: dict[str, dict[str, Evaluation]] = {}
    for split in SPLITS:
        sessions = rows.of_split(split)
        evaluations[split] = {
            part: evaluate(
                # As the table holds them: evaluating the file gives the same figures.
                scores[sessions].astype(np.float32),
                targets[sessions],
                rows.sessions[sessions],
                rows.codes,
                run.config.evaluation,
                days_per_year=int(run.header["days_per_year"]),
                bootstrap=metrics.can_bootstrap(),
                member=cells[sessions],
                horizon_sessions=horizon_sessions,
                returns_1d=returns_1d[sessions],
            )
            for part, scores in parts.items()
        }
    return evaluations


def paired_difference(
    ours: NDArray[np.float64], theirs: NDArray[np.float64], horizon_sessions: int, samples: int
) -> dict[str, Any]:
    """Mean of the daily differences of two ICs, its standard error and its stationary-bootstrap interval."""
    figures = metrics.paired_difference(
        ours, theirs, samples=samples, seed=_BOOTSTRAP_SEED, horizon_sessions=horizon_sessions
    )
    return {"ic_difference": figures.pop("difference"), **figures}


def _differences(
    evaluations: Mapping[str, Mapping[str, Evaluation]], horizon_sessions: int, samples: int
) -> list[dict[str, Any]]:
    made = ("blend", DELIVERED)
    return [
        {"split": split, "score": score, "part": part}
        | paired_difference(parts[score].daily["ic"], e.daily["ic"], horizon_sessions, samples)
        for split, parts in evaluations.items()
        for score in made
        for part, e in parts.items()
        if score in parts and part not in made
    ]


def _table(rows: Predictions, parts: Mapping[str, Scores], column: str) -> pa.Table:
    columns = {name: rows.table[name] for name in ("Date", "Code", "split", "is_liquid")}
    columns[column] = pa.array(rows.rows(parts[DELIVERED]))
    columns |= {f"{column}_{part}": pa.array(rows.rows(s)) for part, s in parts.items() if part != DELIVERED}
    return pa.table(columns | {f"target_{h}d": rows.table[f"target_{h}d"] for h in HORIZONS})


def _manifest(
    runs: Sequence[FinishedRun],
    rows: Predictions,
    parts: list[str],
    horizon_sessions: int,
    blend: Blend,
    weight: BlendWeight | None,
    smoothing_sessions: int,
) -> dict[str, Any]:
    decisive = {
        "runs": [run.identity() for run in runs],
        "dataset_fingerprint": runs[0].header["dataset_fingerprint"],
        "horizon_sessions": horizon_sessions,
        "blend": blend,
        "smoothing_sessions": smoothing_sessions,
        "code_revision": code_revision("run"),
    }
    return {
        "kind": "delivery",
        "fingerprint": sha256_of(decisive),
        **decisive,
        "definition": _definition(runs, horizon_sessions, weight, smoothing_sessions),
        "weight": None if weight is None else asdict(weight),
        "slice": runs[0].config.evaluation.universe,
        "parts": parts,
        "rows": rows.table.num_rows,
        "sessions": len(rows.sessions),
        "stocks": len(rows.codes),
    }


def _definition(
    runs: Sequence[FinishedRun], horizon_sessions: int, weight: BlendWeight | None, smoothing_sessions: int
) -> str:
    seeds = ", ".join(str(run.seed) for run in runs)
    steps = [f"horizon {horizon_sessions}: z-scores per session of seed {seeds}"]
    if len(runs) > 1:
        steps[0] = f"horizon {horizon_sessions}: mean of the z-scores per session of seeds {seeds}"
    if weight is not None:
        steps.append(f"{weight.network:.3f} of it and {1.0 - weight.network:.3f} of LightGBM's")
    if smoothing_sessions > 1:
        steps.append(f"trailing exponential average of span {smoothing_sessions} within each split")
    return "; ".join(steps)
