"""After each epoch: scores of the averaged weights, what they earn, and the validity checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from atft_pipeline.batches.block import Block
from atft_pipeline.batches.block_dataset import BlockDataset
from atft_pipeline.config.schema import PipelineConfig
from atft_pipeline.dataset.splits import Split
from atft_pipeline.evaluation.evaluate import Evaluation
from atft_pipeline.evaluation.slices import evaluable_slices
from atft_pipeline.runs.record import RunRecord
from atft_pipeline.runs.tables import read_table
from atft_pipeline.training.distributed.process_group import ProcessGroup
from atft_pipeline.training.judging.scoring import (
    Scores,
    evaluate_scores,
    evaluation_rows,
    predictions_hash,
    score_sessions,
    weights_hash,
    write_predictions,
)
from atft_pipeline.training.judging.validity_checks import ValidityChecks
from atft_pipeline.training.telemetry.activations import observing
from atft_pipeline.training.telemetry.input_sample import InputSample
from atft_pipeline.training.weight_average import WeightAverage

SCORING_BATCH_RATIO = 4
"""Samples per block when scoring, over those when training: the warm-up sessions of a longer block weigh less."""

HASHES = ("weights_hash", "predictions_hash")


class EpochEvaluator:
    """Judges one run's averaged weights after each epoch."""

    def __init__(
        self,
        config: PipelineConfig,
        dataset: Path,
        record: RunRecord,
        log: Callable[[str], None],
        *,
        data: BlockDataset,
        split: Split,
        average: WeightAverage,
        input_sample: InputSample,
        device: torch.device,
        workers: int,
        processes: ProcessGroup,
    ) -> None:
        self.config, self.record, self.log = config, record, log
        self.data, self.panel, self.split, self.average = data, data.panel, split, average
        self.input_sample, self.device, self.workers, self.processes = input_sample, device, workers, processes
        self.validity_checks = ValidityChecks(self.panel, dataset, config)
        with_members = split.validation[self.panel.member[split.validation].any(axis=1)]
        self.observed_session = int(with_members[len(with_members) // 2])
        """Session in the middle of validation whose block's activations are recorded."""

    def score_splits(self, epoch: int) -> dict[str, Scores]:
        """Scores of validation; at epochs whose predictions are kept, of test too, and both are written."""
        model = self.processes.sharded(self.average.model)
        validation, around = self.split.validation, partial(self._observed, "validation", epoch)
        scores = {"validation": self._score(model, validation, epoch, with_loss=True, around=around)}
        if self._keeps_predictions(epoch):
            scores["test"] = self._score(model, self.split.test, epoch, around=partial(self._observed, "test", epoch))
            if self.processes.is_leader:
                path = self.record.run_dir / "predictions" / f"epoch_{epoch:03d}.parquet"
                write_predictions(path, self.panel, scores)
        return scores

    def _keeps_predictions(self, epoch: int) -> bool:
        return epoch in (1, 5, self.config.evaluation.criterion_epoch, self.config.train.epochs) or epoch % 10 == 0

    def evaluate(self, epoch: int, scores: dict[str, Scores]) -> Evaluation:
        """Records what the scores earn in every slice; returns the evaluation that the criterion reads."""
        config = self.config.evaluation
        weights = weights_hash(self.average.model)
        evaluations = {}
        for split, split_scores in scores.items():
            predictions = predictions_hash(split_scores, self.panel)
            for universe in evaluable_slices(self.panel, split_scores.sessions, self.config.train.universe):
                evaluation = evaluate_scores(split_scores, self.panel, universe, config)
                evaluations[split, universe] = evaluation
                rows, daily = evaluation_rows(
                    evaluation,
                    epoch=epoch,
                    split=split,
                    universe=universe,
                    weights=weights,
                    predictions=predictions,
                )
                self.record.log_evaluation(rows, daily)
                if not evaluation.valid:
                    self.log(f"epoch {epoch}: evaluation of {split}, {universe}, is invalid: {evaluation.reason}")
        self._log_validation_loss(epoch, scores["validation"])
        return evaluations["validation", config.universe]

    def _log_validation_loss(self, epoch: int, validation: Scores) -> None:
        for metric, terms in (("loss_raw", validation.loss_raw), ("loss_weighted", validation.loss_weighted)):
            for term, value in terms.items():
                self.record.log(metric, value, epoch=epoch, split="validation", component="loss", term=term)

    def is_checked(self, epoch: int) -> bool:
        """Whether the validity checks are run after this epoch: the criterion epoch and the last one."""
        return epoch in (self.config.evaluation.criterion_epoch, self.config.train.epochs)

    def check_validity(self, epoch: int, validation: Scores, fresh_model: nn.Module, largest_lr: float) -> None:
        """Runs the validity checks on this epoch's scores and keeps them for the verdict.

        `fresh_model` has newly drawn weights; `largest_lr` is the largest rate of the epoch.
        """
        model, sessions = self.average.model, self.split.validation
        self.validity_checks.run(
            self.record.run_dir,
            epoch,
            trained=validation,
            # In other blocks: a score that depended on its batch would show here.
            again=self._score(model, sessions, epoch, batch_size=self.config.train.batch_size),
            reinitialised=self._score(fresh_model, sessions, epoch),
            hashes=self._hashes(model, validation),
            previous_hashes=self._hashes_before(epoch),
            learning_rate=largest_lr,
            on_gpu=self.device.type == "cuda",
            train_sessions=self.split.train,
        )

    def initial_hashes(self) -> dict[str, str]:
        """Hashes of the initial weights and of what they score: a trained run must differ from them."""
        model = self.average.model
        return self._hashes(model, self._score(model, self.split.validation, epoch=1))

    def _hashes(self, model: nn.Module, scores: Scores) -> dict[str, str]:
        return {"weights_hash": weights_hash(model), "predictions_hash": predictions_hash(scores, self.panel)}

    def _hashes_before(self, epoch: int) -> dict[str, str] | None:
        """Hashes of the previous epoch as recorded, or of the initial weights before the first."""
        if epoch == 1:
            return {name: self.record.header[f"initial_{name}"] for name in HASHES}
        evals = read_table(self.record.run_dir, "evals").to_pylist()
        rows = [row for row in evals if row["epoch"] == epoch - 1 and row["split"] == "validation"]
        return {name: rows[0][name] for name in HASHES} if rows else None

    def _score(
        self,
        model: nn.Module,
        sessions: NDArray[np.int64],
        epoch: int,
        *,
        batch_size: int | None = None,
        with_loss: bool = False,
        around: Callable[[Block], AbstractContextManager[object]] = nullcontext,
    ) -> Scores:
        return score_sessions(
            model,
            self.data,
            sessions,
            batch_size=batch_size or SCORING_BATCH_RATIO * self.config.train.batch_size,
            device=self.device,
            loss=self.config.train.loss if with_loss else None,
            epoch=epoch,
            workers=self.workers,
            around=around,
        )

    @contextmanager
    def _observed(self, split: str, epoch: int, block: Block) -> Iterator[None]:
        """Records the inputs of `split`, and the activations that the model has for the observed session's block.

        Of several processes the leader records, for its own sessions.
        """
        self.input_sample.observe(split, block)
        own_block = self.processes.part_of(block)
        if not self.processes.is_leader or own_block is None or self.observed_session not in block.session_index:
            yield
            return
        with observing(self.average.model) as activations:
            yield
        for component, figures in activations.figures(own_block.member).items():
            for metric, value in figures.items():
                self.record.log(metric, value, epoch=epoch, split=split, component=component)
