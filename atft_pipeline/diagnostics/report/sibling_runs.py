"""Sibling runs: other runs of the same dataset in the same folder, whose verdicts a report shows for comparison."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from atft_pipeline.inspection.reader import Record

SHOWN = 6


def sibling_rows(record: Record) -> list[dict[str, str]]:
    """A row per run of the same dataset in the same folder, this one first, then the newest.

    `same Sharpe, other weights`: the Sharpe equals this run's to the last bit although the weights differ, which never
    happens between honest runs. Empty where the run has no sibling run.
    """
    this_run = _row(record.run_dir, record.run, record.verdict)
    siblings = []
    for path in record.run_dir.resolve().parent.glob("*/run.json"):
        if path.parent == record.run_dir.resolve():
            continue
        run, verdict = _json(path), _json(path.with_name("verdict.json"))
        if run.get("dataset_fingerprint") == record.run.get("dataset_fingerprint") is not None:
            same = _final(verdict) is not None and _final(verdict) == _final(record.verdict)
            others = verdict.get("weights_hash") != record.verdict.get("weights_hash")
            siblings.append(
                _row(path.parent, run, verdict) | {"same Sharpe, other weights": "YES" if same and others else "no"}
            )
    newest = sorted(siblings, key=lambda row: row["started"], reverse=True)[:SHOWN]
    return [this_run | {"same Sharpe, other weights": "(this run)"}, *newest] if newest else []


def _row(run_dir: Path, run: dict[str, Any], verdict: dict[str, Any]) -> dict[str, str]:
    sharpe = _final(verdict)
    return {
        "run": run_dir.name,
        "started": str(run.get("started") or "not recorded"),
        "epochs": f"{run.get('epochs_done', '?')} of {run.get('epochs_planned', '?')}",
        "status": str(run.get("status") or "not recorded"),
        "Sharpe, validation, last epoch": "not measured" if sharpe is None else f"{sharpe:.4f}",
        "verdict": str(verdict.get("status") or "none"),
    }


def _final(verdict: dict[str, Any]) -> float | None:
    final = verdict.get("final")
    split = final.get("validation") if isinstance(final, dict) else None
    value = split.get("sharpe_daily") if isinstance(split, dict) else None
    return float(value) if isinstance(value, int | float) else None


def _json(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}
