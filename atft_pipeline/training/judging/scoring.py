"""Scores of a model over sessions, their hashes, and the rows that they leave in a run's record.

Shapes: T sessions, N stocks in panel order, H horizons.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import nn

from atft_pipeline.batches.block import Block
from atft_pipeline.batches.block_dataset import BlockDataset
from atft_pipeline.batches.panel import Panel
from atft_pipeline.batches.panel_storage import prefetched
from atft_pipeline.config.schema import HORIZONS, EvaluationConfig, LossConfig
from atft_pipeline.config.slices import Slice
from atft_pipeline.evaluation.evaluate import Evaluation, evaluate_panel
from atft_pipeline.evaluation.slices import panel_of_slice
from atft_pipeline.runs.record import statistics_rows, write_parquet
from atft_pipeline.storage.json_values import finite_or_none
from atft_pipeline.training.losses import CompositeLoss


@dataclass(frozen=True)
class Scores:
    """A model's output for `sessions` of a panel."""

    sessions: NDArray[np.int64]
    """Indices into the panel's sessions, [T]."""
    values: NDArray[np.float32]
    """[T, N, H]; NaN for stocks outside the training universe at that session."""
    loss_raw: dict[str, float]
    """Mean over sessions of each loss term, and of the total; empty when no loss was asked for."""
    loss_weighted: dict[str, float]


@torch.no_grad()
def score_sessions(
    model: nn.Module,
    data: BlockDataset,
    sessions: NDArray[np.int64],
    *,
    batch_size: int,
    device: torch.device,
    loss: LossConfig | None = None,
    epoch: int = 1,
    workers: int = 0,
    around: Callable[[Block], AbstractContextManager[object]] = nullcontext,
) -> Scores:
    """The model's scores in evaluation mode; the mode of the model is restored.

    The score of a stock does not depend on the block that it is computed in, so `batch_size` only decides speed and
    memory. `workers` threads make blocks ahead. `around` is entered with every block while the model scores it.

    Scores are computed in float32 whatever the precision of training: rounded to bf16, the scores of two block
    partitions differ by 5 % of their spread.
    """
    panel = data.panel
    values = np.full((len(sessions), len(panel.codes), len(HORIZONS)), np.nan, dtype=np.float32)
    criterion = None if loss is None else CompositeLoss(loss)
    sums: dict[str, defaultdict[str, float]] = {"raw": defaultdict(float), "weighted": defaultdict(float)}
    was_training = model.training
    model.eval()
    done = 0
    parts = data.sessions_per_block(sessions, batch_size)
    for indices, made in zip(parts, prefetched(data.block, parts, workers), strict=True):
        block = to_device(made, device)
        with around(block):
            scores = model(block)  # [n, S, H]
        if criterion is not None:
            terms = criterion(scores, block.target, block.member, epoch)
            for name, value in terms.raw.items():
                sums["raw"][name] += float(value) * len(indices)
            for name, value in (terms.weighted | {"total": terms.total}).items():
                sums["weighted"][name] += float(value) * len(indices)
        masked = scores.masked_fill(~block.member[..., None], torch.nan)
        rows = np.searchsorted(sessions, indices)
        values[np.ix_(rows, block.stock_index.cpu().numpy())] = masked.transpose(0, 1).cpu().numpy()
        done += len(indices)
    model.train(was_training)
    return Scores(
        sessions,
        values,
        {name: total / max(done, 1) for name, total in sums["raw"].items()},
        {name: total / max(done, 1) for name, total in sums["weighted"].items()},
    )


def to_device(block: Block, device: torch.device) -> Block:
    """The block with its tensors on `device`; itself when they are there."""
    if block.x.device == device:
        return block
    return Block(**{f.name: getattr(block, f.name).to(device, non_blocking=True) for f in fields(block)})


def weights_hash(model: nn.Module) -> str:
    """Hash of every parameter and buffer, with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def predictions_hash(scores: Scores, panel: Panel) -> str:
    """Hash of the scores with the sessions and codes they belong to."""
    digest = hashlib.sha256()
    digest.update(panel.sessions[scores.sessions].astype("datetime64[D]").astype(np.int64).tobytes())
    digest.update("\n".join(panel.codes.tolist()).encode())
    digest.update(np.ascontiguousarray(scores.values).tobytes())
    return digest.hexdigest()[:16]


def evaluate_scores(scores: Scores, panel: Panel, universe: Slice, config: EvaluationConfig) -> Evaluation:
    """Evaluation of horizon 1's scores over the scored sessions, stocks of `universe` only."""
    return evaluate_panel(scores.values[:, :, 0], panel_of_slice(panel, scores.sessions, universe), config)


def evaluation_rows(
    evaluation: Evaluation,
    *,
    epoch: int,
    split: str,
    universe: Slice,
    weights: str,
    predictions: str,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of `evals` and of `daily` for one evaluation. An invalid one has `valid` = 0 and no figures."""
    row = {"epoch": epoch, "split": split, "slice": universe}
    figures: dict[str, tuple[float | None, str, float | None]] = {}
    if evaluation.valid:
        figures = {name: (s.value, s.unit, s.se) for name, s in evaluation.statistics.items()}
    figures["valid"] = (float(evaluation.valid), "flag", None)
    rows = statistics_rows(figures, **row, weights_hash=weights, predictions_hash=predictions)
    if not evaluation.valid:
        return rows, []
    columns = {name: evaluation.daily[name] for name in ("ic", "rank_ic", "gross", "net", "turnover")}
    daily = [
        row | {"date": session.item()} | {name: finite_or_none(column[t]) for name, column in columns.items()}
        for t, session in enumerate(evaluation.sessions)
    ]
    return rows, daily


def write_predictions(path: Path, panel: Panel, scores_by_split: dict[str, Scores]) -> None:
    """Writes Date, Code, split, is_liquid, and score and target per horizon, of the scored cells."""
    write_parquet(path, pa.concat_tables([_prediction_table(panel, s, split) for split, s in scores_by_split.items()]))


def _prediction_table(panel: Panel, scores: Scores, split: str) -> pa.Table:
    member = panel.member[scores.sessions]
    session, stock = np.nonzero(member)
    targets = panel.targets[scores.sessions]
    columns: dict[str, Any] = {
        "Date": pa.array(panel.sessions[scores.sessions][session].astype("datetime64[D]")),
        "Code": pa.array(panel.codes[stock].tolist(), pa.string()),
        "split": pa.array([split] * len(session), pa.string()),
        "is_liquid": pa.array(panel.liquid[scores.sessions][session, stock]),
    }
    for h, horizon in enumerate(HORIZONS):
        columns[f"score_{horizon}d"] = pa.array(scores.values[session, stock, h])
    for h, horizon in enumerate(HORIZONS):
        columns[f"target_{horizon}d"] = pa.array(targets[session, stock, h], from_pandas=True)
    return pa.table(columns)
