"""Ensemble scores on disk: the table that is exported, and the manifest that says what it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from atft_pipeline.config.schema import HORIZONS
from atft_pipeline.ensemble.combine import BlendWeight, Scores
from atft_pipeline.ensemble.ensemble_scores import ENSEMBLE, EnsembleScores
from atft_pipeline.ensemble.members import FinishedRun, Predictions
from atft_pipeline.storage.artifact import replacing_artifact, sha256_of, write_manifest, write_partition
from atft_pipeline.storage.code_version import code_revision

KIND = "ensemble_scores"
"""Of the manifest: what an export may replace."""


def write_ensemble_scores(scores: EnsembleScores, path: Path) -> None:
    """Writes the table to `path` and its manifest beside it; earlier ensemble scores there are replaced."""
    with replacing_artifact(path) as temporary:
        write_partition(temporary, scores.table)
    write_manifest(path, scores.manifest)


def scores_table(rows: Predictions, parts: Mapping[str, Scores], column: str) -> pa.Table:
    """The score as `column`, each part as `column_PART`, between the rows' keys and their targets."""
    columns = {name: rows.table[name] for name in ("Date", "Code", "split", "is_liquid")}
    columns[column] = pa.array(rows.rows(parts[ENSEMBLE]))
    columns |= {f"{column}_{part}": pa.array(rows.rows(scores)) for part, scores in parts.items() if part != ENSEMBLE}
    return pa.table(columns | {f"target_{h}d": rows.table[f"target_{h}d"] for h in HORIZONS})


def scores_manifest(
    runs: Sequence[FinishedRun],
    rows: Predictions,
    parts: list[str],
    *,
    horizon_sessions: int,
    blend: str,
    weight: BlendWeight | None,
    smoothing_sessions: int,
) -> dict[str, Any]:
    """What the score is made of; its fingerprint is the hash of all that decides it."""
    decided_by = {
        "runs": [run.identity() for run in runs],
        "dataset_fingerprint": runs[0].header["dataset_fingerprint"],
        "horizon_sessions": horizon_sessions,
        "blend": blend,
        "smoothing_sessions": smoothing_sessions,
        "code_revision": code_revision("run"),
    }
    return {
        "kind": KIND,
        "fingerprint": sha256_of(decided_by),
        **decided_by,
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
