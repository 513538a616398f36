"""Run directories for tests: a small healthy run whose figures follow from its predictions, with ways to spoil it."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from atft_pipeline.config.overrides import to_dict, with_overrides
from atft_pipeline.config.presets import quick
from atft_pipeline.config.schema import LOSS_TERMS
from atft_pipeline.inspection.paired import Difference, PairedResult, write_experiment_result
from atft_pipeline.runs.tables import TABLES

EPOCHS, SESSIONS, STOCKS = 20, 80, 20
COMPONENTS = ("variable_selection", "temporal_encoder", "backbone_projection", "fusion", "prediction_head", "gat")
Row = dict[str, Any]


@dataclass
class Tables:
    """A run directory before it is written."""

    run: Row
    verdict: Row
    series: list[Row]
    evals: list[Row]
    daily: list[Row]
    predictions: dict[int, list[Row]] = field(default_factory=dict)
    experiments: dict[str, float] = field(default_factory=dict)
    """Experiment -> standard errors of the daily IC that it gained."""
    probes: dict[str, Row] = field(default_factory=dict)
    """Probe -> figures, as if it had been made on this run."""

    def set_series(self, metric: str, value: Callable[[int], float], **where: str) -> None:
        """Replaces the per-epoch values of a metric; `value` gets the epoch."""
        touched = [r for r in self.series if r["metric"] == metric and all(r[k] == v for k, v in where.items())]
        assert touched, f"no series {metric} {where}"
        for row in touched:
            row["value"] = value(row["epoch"])

    def set_evals(self, metric: str, value: Callable[[int], float | None], split: str = "validation") -> None:
        for row in self.evals:
            if row["metric"] == metric and row["split"] == split:
                row["value"] = value(row["epoch"])

    def drop_series(self, metric: str, **where: str) -> None:
        self.series = [
            r for r in self.series if not (r["metric"] == metric and all(r[k] == v for k, v in where.items()))
        ]

    def write(self, run_dir: Path) -> Path:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "run.json").write_text(json.dumps(self.run))
        (run_dir / "verdict.json").write_text(json.dumps(self.verdict))
        for name in ("series", "evals", "daily"):
            rows = getattr(self, name)
            (run_dir / name).mkdir(exist_ok=True)
            for epoch in sorted({row["epoch"] for row in rows}):
                part = pa.Table.from_pylist([r for r in rows if r["epoch"] == epoch], TABLES[name])
                pq.write_table(part, run_dir / name / f"epoch_{epoch:03d}.parquet")
        (run_dir / "predictions").mkdir(exist_ok=True)
        for epoch, stored in self.predictions.items():
            pq.write_table(pa.Table.from_pylist(stored), run_dir / "predictions" / f"epoch_{epoch:03d}.parquet")
        for name, figures in self.probes.items():
            write_probe(run_dir, name, figures, self.run.get("key"))
        for id, gain_t in self.experiments.items():
            write_experiment_result(run_dir, id, _experiment(gain_t))
        return run_dir


def _experiment(gain_t: float) -> PairedResult:
    gained = Difference(0.002 * gain_t, 0.002, None, None, SESSIONS)
    return PairedResult(
        "model_20ep-k1", "experiment-k2", "experiment-k2", {}, True, "d1", "liquid", EPOCHS, SESSIONS, gained, gained,
        0.2, 0.2,
    )  # fmt: skip


def write_probe(run_dir: Path, name: str, figures: Row, run_key: object) -> None:
    (run_dir / "probes").mkdir(exist_ok=True)
    content = {"figures": figures, "probe": name, "run_key": run_key, "seconds": 1.0}
    (run_dir / "probes" / f"{name}.json").write_text(json.dumps(content))


BASE_LR = 1e-3


def healthy(skill: float = 0.5, overrides: Row | None = None) -> Tables:
    """20 epochs of a run that learns: losses fall, IC and Sharpe rise, every hash changes.

    `skill`: weight of the true signal in the last epoch's scores; 0 is a run that learns nothing worth trading.
    """
    config = with_overrides(quick(), {"train.optimizer.lr": BASE_LR} | (overrides or {}))
    evals, daily, predictions = pickle.loads(_evaluated(skill))
    tables = Tables(_run_json(config), {}, [], evals, daily, predictions)
    for epoch in range(1, EPOCHS + 1):
        _log_series(tables, config, epoch)
    tables.verdict = _verdict(tables)
    return tables


@cache
def _evaluated(skill: float) -> bytes:
    """Pickled rows of evals and daily, and rows of predictions by epoch: the same for every configuration."""
    rng = np.random.default_rng(7)
    signal = rng.standard_normal((SESSIONS, STOCKS))
    # An IC near 0.1 at the end: clearly above zero, and not too good to be true.
    targets = (0.0025 * signal + 0.02 * rng.standard_normal((SESSIONS, STOCKS))).astype(np.float32).astype(float)
    sessions = [date(2024, 1, 1) + timedelta(days=t) for t in range(SESSIONS)]
    tables = Tables({}, {}, [], [], [])
    noise = rng.standard_normal((SESSIONS, STOCKS))
    for epoch in range(1, EPOCHS + 1):
        level = skill * epoch / EPOCHS
        scores = 0.05 * (level * signal + (1 - level) * noise + 0.1 * rng.standard_normal(noise.shape))
        scores = scores.astype(np.float32).astype(float)
        _log_evaluation(tables, epoch, sessions, scores, targets)
        if epoch in (1, 5, 10, EPOCHS):
            tables.predictions[epoch] = _prediction_rows(sessions, scores, targets)
    return pickle.dumps((tables.evals, tables.daily, tables.predictions))


def honest_probes() -> dict[str, Row]:
    """What every probe finds on a run that is what it says, on features that hold a signal."""
    return {
        "rescore": {"rescored_gap": 0.0, "rescored_correlation": 1.0, "rescored_epoch": 20.0, "rescored_ic": 0.1},
        "data": {
            "parts_unlike_manifest": 0.0,
            "features_know_later": 0.0,
            "features_know_later_names": "none",
            "rows_unlike_source": 0.0,
            "targets_unlike_source": 0.0,
        },
        "graph": {"edges_unlike_dataset": 0.0},
        "baseline": {"baseline_ic": 0.06, "baseline_ic_t": 3.0, "baseline_train_ic": 0.08, "over_baseline_t": 1.0},
        "ablate": {"drop_t_temporal_encoder": 3.0, "drop_t_gat": 3.0},
        "replay": {"replay_differs": 0.0, "replay_initial_differs": 0.0},
    }


def _run_json(config: Any) -> Row:
    return {
        "name": "model_20ep-k1",
        "key": "k1",
        "config": to_dict(config),
        "config_key": "c1",
        "dataset_fingerprint": "d1",
        "dataset_path": "output/datasets/ml_dataset_d1",
        "graph_path": "output/datasets/stock_graph_d1.parquet",
        "initial_weights_hash": "w0",
        "started": "2025-01-01T00:00:00+00:00",
        "ended": "2025-01-01T00:05:00+00:00",
        "status": "finished",
        "reason": None,
        "epochs_planned": EPOCHS,
        "epochs_done": EPOCHS,
        "features": 82,
        "live_features": 82,
        "optimizer": "AdamW",
        "overrides": {"preset": "quick"},
    }


def _log_series(tables: Tables, config: Any, epoch: int) -> None:
    progress = epoch / EPOCHS

    def log(metric: str, value: float, split: str = "train", component: str = "", term: str = "") -> None:
        tables.series.append(
            {"step": None, "epoch": epoch, "split": split, "component": component, "term": term, "metric": metric}
            | {"value": float(value)}
        )

    tables.series += [
        {"step": 3 * epoch + n, "epoch": epoch, "split": "train", "component": "", "term": "total", "metric": "loss"}
        | {"value": 1.0 + 0.01 * (n - 1)}
        for n in range(3)
    ]
    weights = config.train.loss.weights_at(epoch)
    for split, fall in (("train", 0.03), ("validation", 0.01)):
        values = dict.fromkeys(LOSS_TERMS, -0.1 - 0.01 * progress) | {"mse": 1.0 - fall * progress}
        for term in LOSS_TERMS:
            log("loss_raw", values[term], split, "loss", term)
            log("loss_weighted", weights[term] * values[term], split, "loss", term)
        log("loss_weighted", sum(weights[t] * values[t] for t in LOSS_TERMS), split, "loss", "total")
    for term, weight in weights.items():
        log("loss_weight", weight, "train", "loss", term)
    warmup = config.train.schedule.warmup_fraction
    cosine = 0.5 * (1 + math.cos(math.pi * max(0.0, (progress - warmup) / (1 - warmup))))
    lr = BASE_LR * (0.01 + 0.99 * cosine)
    log("lr", lr, component="all")
    for component in COMPONENTS:
        log("grad_l2", 0.2 + 0.05 * progress, component=component)
        log("weight_l2", 5.0, component=component)
        log("gradient_warning", 0.0, component=component)
        log("update_to_weight", 4.0 * lr, component=component)
        log("unchanged_share", 0.0, component=component)
        log("trainable_share", 1.0, component=component)
        log("optimized_share", 1.0, component=component)
        log("parameter_bits", 32.0, component=component)
        log("stock_spread", 0.5, "validation", component)
        log("dead_units", 0.0, "validation", component)
    log("attention_entropy", 0.8, "validation", "temporal_encoder")
    _log_gradient_contributions(log, weights)
    log("sessions", 500.0)
    log("clipped_share", 0.1)
    for place, norm in (("before_clip", 0.5), ("after_clip", 0.45)):
        log("grad_norm", norm, component="total", term=place)
    log("dispersion_ratio", 0.05, "validation")
    log("degeneracy_event", 0.0, "validation")
    log("degeneracy_reset", 0.0, "validation")
    log("epoch_s", 10.0)
    log("loader_wait_s", 0.2)


def _log_gradient_contributions(log: Callable[..., None], weights: dict[str, float]) -> None:
    """The loss pulls with the configured weights, and its terms pull alike."""
    pulling = {term: weight for term, weight in weights.items() if weight > 0}
    for term, weight in weights.items():
        log("effective_weight", weight, component="loss", term=term)
    for term, weight in pulling.items():
        log("gradient_share", weight / sum(pulling.values()), component="loss", term=term)
        if len(pulling) > 1:
            log("gradient_cosine", 0.2, component="loss", term=term)
    log("gradient_residual", 1e-6, component="loss", term="total")


def _log_evaluation(tables: Tables, epoch: int, sessions: list[date], scores: np.ndarray, targets: np.ndarray) -> None:
    gross, ic = [], []
    for t, session in enumerate(sessions):
        order = sorted(range(STOCKS), key=lambda i, t=t: (-scores[t, i], i))
        leg = STOCKS // 5
        gross.append(float(np.mean(targets[t, order[:leg]]) - np.mean(targets[t, order[-leg:]])))
        ic.append(float(np.corrcoef(scores[t], targets[t])[0, 1]))
        row = {"epoch": epoch, "split": "validation", "slice": "liquid", "date": session}
        tables.daily.append(
            row | {"ic": ic[-1], "rank_ic": ic[-1], "gross": gross[-1], "net": gross[-1], "turnover": 1.0}
        )
    sharpe = float(np.mean(gross) / np.std(gross, ddof=1))
    error = math.sqrt((1 + sharpe**2 / 2) / len(gross))
    figures = {
        "sharpe_daily": sharpe,
        "sharpe_se": error,
        "ic_mean": np.mean(ic),
        "rank_ic_mean": np.mean(ic),
        "valid": 1,
    }
    for metric, value in figures.items():
        tables.evals.append(
            {"epoch": epoch, "split": "validation", "slice": "liquid", "metric": metric, "unit": ""}
            | {"weights_hash": f"w{epoch}", "predictions_hash": f"p{epoch}", "value": float(value)}
            | {"se": error if metric == "sharpe_daily" else None}
        )


def _prediction_rows(sessions: list[date], scores: np.ndarray, targets: np.ndarray) -> list[Row]:
    return [
        {"Date": session, "Code": f"{i:04d}", "split": "validation", "is_liquid": True}
        | {"score_1d": float(scores[t, i]), "target_1d": float(targets[t, i])}
        for t, session in enumerate(sessions)
        for i in range(STOCKS)
    ]


def _verdict(tables: Tables) -> Row:
    value = next(r["value"] for r in tables.evals if r["epoch"] == EPOCHS and r["metric"] == "sharpe_daily")
    return {
        "status": "passed" if value > 0.10 else "failed",
        "summary": f"{'passed' if value > 0.10 else 'failed'}: Sharpe {value:.4f} at epoch 20",
        "criterion": {"epoch": EPOCHS, "split": "validation", "slice": "liquid", "value": value, "threshold": 0.10},
        "final": {"validation": {"sharpe_daily": value}, "test": {"sharpe_daily": 0.2}},
        "validity": [{"name": "evaluating_twice_agrees", "passed": True, "explanation": "same hash"}],
        "run_key": "k1",
        "config_key": "c1",
        "dataset_fingerprint": "d1",
        "weights_hash": f"w{EPOCHS}",
        "predictions_hash": f"p{EPOCHS}",
    }


def frozen_failure() -> Tables:
    """The original failure: 50 epochs, Sharpe 0.0818 at epochs 5, 20 and 50, constant predictions, foreign hashes."""
    tables = healthy(skill=0.0)
    tables.run["epochs_planned"] = tables.run["epochs_done"] = 50
    tables.evals = [
        {
            "epoch": epoch,
            "split": "validation",
            "slice": "liquid",
            "metric": "sharpe_daily",
            "unit": "",
            "value": 0.0818,
        }
        | {"se": None, "weights_hash": f"w{epoch}", "predictions_hash": "constant"}
        for epoch in (5, 20, 50)
    ]
    tables.daily = []
    for rows in tables.predictions.values():
        for row in rows:
            row["score_1d"] = 0.25
    tables.set_series("dispersion_ratio", lambda _: 0.0)
    tables.verdict |= {"weights_hash": "elsewhere", "predictions_hash": "elsewhere"}
    tables.verdict["criterion"]["value"] = 0.0818
    last = [row for row in tables.series if row["epoch"] == EPOCHS]
    tables.series += [row | {"epoch": epoch} for epoch in range(EPOCHS + 1, 51) for row in last]
    return tables
