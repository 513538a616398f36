"""Small panels of scores and targets, as arrays and as predictions tables, and their evaluation."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from atft_pipeline.config.schema import EvaluationConfig
from atft_pipeline.evaluation.evaluate import EvaluationPanel, evaluate_panel
from atft_pipeline.evaluation.predictions_table import evaluate_table

CONFIG = EvaluationConfig()
T, N = 6, 10
SESSIONS = np.datetime64("2012-01-04") + np.arange(T)
CODES = [f"{1000 + 10 * n}" for n in range(N)]


def panel(seed=1, T=T, N=N):
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(T, N))
    return scores, 0.01 * scores + generator.normal(0, 0.02, (T, N))


def run(scores, targets, trials=1, **of_panel):
    days = np.datetime64("2012-01-04") + np.arange(len(scores))
    codes = [f"{1000 + n:05d}" for n in range(scores.shape[1])]
    held_against = EvaluationPanel(days, codes, targets, **{"days_per_year": 245} | of_panel)
    return evaluate_panel(scores, held_against, CONFIG, trials=trials)


def table(scores, targets, **columns):
    rows = len(scores) * scores.shape[1]
    return pa.table(
        {
            "Date": pa.array(np.repeat(SESSIONS[: len(scores)], scores.shape[1])),
            "Code": CODES[: scores.shape[1]] * len(scores),
            "score": pa.array(scores.ravel(), from_pandas=True),
            "target": pa.array(targets.ravel(), from_pandas=True),
            **{name: pa.array(np.broadcast_to(values, rows)) for name, values in columns.items()},
        }
    )


def of_table(t, **kwargs):
    return evaluate_table(t, score="score", target="target", config=CONFIG, **kwargs)
