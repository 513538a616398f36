"""The training loop of one run: blocks of sessions in, weights, checkpoints and the run's record out.

A run is decided by its configuration, its code, its data and its seed. Every epoch starts from its own seed, so a run
resumed from its last checkpoint takes the same steps as one that was never interrupted.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from atft_pipeline.batches.block import Block
from atft_pipeline.batches.block_dataset import BlockDataset
from atft_pipeline.batches.panel import Panel, load_panel
from atft_pipeline.batches.panel_storage import PanelStorage, prefetched
from atft_pipeline.config.schema import PipelineConfig
from atft_pipeline.dataset.splits import Split, make_split
from atft_pipeline.errors import InputError, RunFailure
from atft_pipeline.evaluation.evaluate import Evaluation
from atft_pipeline.evaluation.slices import evaluable_slices
from atft_pipeline.graph.store import load_graph
from atft_pipeline.model.atft_gat_fan import ATFTGATFAN
from atft_pipeline.runs.record import RunRecord
from atft_pipeline.training.checkpoints import RunCheckpoints, packed, unpacked
from atft_pipeline.training.degeneracy import DegeneracyGuard, dispersions
from atft_pipeline.training.distributed.process_group import SINGLE_PROCESS, PeerLost, ProcessGroup
from atft_pipeline.training.failures import (
    NonFiniteOrigin,
    non_finite_gradient,
    non_finite_loss,
    shortage_of_memory_explained,
)
from atft_pipeline.training.judging.epoch_evaluation import EpochEvaluator
from atft_pipeline.training.judging.scoring import (
    Scores,
    to_device,
)
from atft_pipeline.training.losses import CompositeLoss, LossTerms
from atft_pipeline.training.plan import Plan
from atft_pipeline.training.schedule import LearningRateSchedule
from atft_pipeline.training.telemetry.input_sample import InputSample
from atft_pipeline.training.telemetry.loss_gradients import loss_gradients
from atft_pipeline.training.telemetry.step_metrics import (
    EpochFigures,
    StepFigures,
    l2_norm,
    log_epoch,
    log_loss_gradients,
    log_machine,
    log_steps,
    log_update,
)
from atft_pipeline.training.weight_average import WeightAverage


class Trainer:
    """One run in progress."""

    def __init__(
        self,
        plan: Plan,
        record: RunRecord,
        device: torch.device,
        log: Callable[[str], None],
        processes: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.plan, self.config, self.record, self.device, self.log = plan, plan.config, record, device, log
        self.processes = processes
        settings = self.config.train
        # The leader alone, on its machine, has a run directory.
        folder = record.run_dir if record.run_dir.exists() else Path(tempfile.gettempdir())
        storage = PanelStorage.now(settings.panel, device, folder, processes.size)
        self.panel = load_panel(plan.dataset, settings.universe, storage.allocate)
        self.panel_place = storage.place(self.panel.nbytes)
        self.workers = storage.workers(self.panel.nbytes, settings.loader_workers)
        self.split = make_split(self.panel.sessions, self.config.split)
        _require_usable(self.panel, self.split, plan)
        self.model = self._new_model(settings.seed)
        graph = load_graph(plan.graph) if self.config.model.graph else None
        self.data = BlockDataset(self.panel, graph, self.model.receptive_field, storage.block_device(self.panel.nbytes))
        self.components = {
            name: parameters for name, child in self.model.named_children() if (parameters := list(child.parameters()))
        }
        self.optimizer = _optimizer(self.model, self.config)
        # A random offset cuts an epoch into one block more at most (_shuffled_blocks).
        steps_per_epoch = len(self.data.sessions_per_block(self.split.train, settings.batch_size)) + 1
        self.schedule = LearningRateSchedule(
            self.optimizer, settings.schedule, total_steps=steps_per_epoch * settings.epochs
        )
        self.loss = CompositeLoss(settings.loss)
        self.average = WeightAverage(self.model, settings.weight_ema)
        self.guard = DegeneracyGuard(settings.guard)
        self.input_sample = InputSample(self.panel, self.split)
        self.evaluator = EpochEvaluator(
            self.config,
            plan.dataset,
            record,
            log,
            data=self.data,
            split=self.split,
            average=self.average,
            input_sample=self.input_sample,
            device=device,
            workers=self.workers,
            processes=processes,
        )
        self.checkpoints = RunCheckpoints(record.run_dir, _identity(plan, self.panel))
        self.step = 0

    def _new_model(self, seed: int) -> ATFTGATFAN:
        torch.manual_seed(seed)
        return ATFTGATFAN(self.config.model, len(self.panel.feature_names)).to(self.device)

    def run(self) -> None:
        """All epochs that are still to do."""
        with shortage_of_memory_explained(self.data, self.split.train, self.config.train.batch_size, self.try_block):
            self._run()

    def _run(self) -> None:
        epochs_done = self.processes.from_leader(self._resume() if self.processes.is_leader else 0)
        self.record.update(
            train_sessions=len(self.split.train),
            validation_sessions=len(self.split.validation),
            test_sessions=len(self.split.test),
            stocks=len(self.panel.codes),
            panel_place=self.panel_place,
            panel_bytes=self.panel.nbytes,
            parameters=sum(p.numel() for p in self.model.parameters()),
            optimizer=type(self.optimizer).__name__,
            epochs_done=epochs_done,
        )
        if epochs_done == 0 and self.processes.is_leader:
            self.input_sample.start()
            self._save_start()
        for epoch in range(epochs_done + 1, self.config.train.epochs + 1):
            self._epoch(epoch)

    # One epoch -------------------------------------------------------------------------------------------------

    def _epoch(self, epoch: int) -> None:
        self._take_leaders_state()
        started = time.perf_counter()
        trained = self.train_epoch(epoch)
        epoch_s = time.perf_counter() - started

        scores = self.evaluator.score_splits(epoch)
        self._write_input_sample()
        if not self.processes.is_leader:
            self.record.close_epoch(epoch)
            return
        scoring_s = time.perf_counter() - started - epoch_s
        validation = scores["validation"]
        evaluation = self.evaluator.evaluate(epoch, scores)
        if self.evaluator.is_checked(epoch):
            fresh_model = self._new_model(_seed_of_epoch(self.config.train.seed, -1))
            self.evaluator.check_validity(epoch, validation, fresh_model, trained.largest_lr)
        self.checkpoints.save_evaluated(epoch, self.average.model)
        self._guard(epoch, validation)
        self.schedule.epoch_end(validation.loss_weighted["total"])

        stocks_scored = sum(int(self.panel.member[s.sessions].sum()) for s in scores.values())
        self.record.log("epoch_s", epoch_s, epoch=epoch)
        self.record.log("samples_per_s", trained.samples / epoch_s, epoch=epoch)
        self.record.log("scored_per_s", stocks_scored / scoring_s, epoch=epoch)
        self.record.log("validation_s", time.perf_counter() - started - epoch_s, epoch=epoch, split="validation")
        log_machine(self.record, epoch, self.device)
        self.record.close_epoch(epoch)
        self._save(epoch)
        self.record.update(epochs_done=epoch)
        self.log(self._summary(epoch, trained, validation, evaluation, trained.samples / epoch_s))

    def _summary(
        self, epoch: int, trained: EpochFigures, validation: Scores, evaluation: Evaluation, samples_per_s: float
    ) -> str:
        return (
            f"epoch {epoch}/{self.config.train.epochs}  loss {trained.loss:.4f}"
            f"  validation {validation.loss_weighted['total']:.4f}  ic {_or_nan(evaluation.value('ic_mean')):+.4f}"
            f"  rank_ic {_or_nan(evaluation.value('rank_ic_mean')):+.4f}"
            f"  sharpe {_or_nan(evaluation.value('sharpe_daily')):+.3f}  lr {self.schedule.lr:.2e}"
            f"  grad {trained.grad_norm:.3f}  {samples_per_s:,.0f} samples/s"
        )

    def train_epoch(self, epoch: int) -> EpochFigures:
        """Every training session once, in blocks whose order and offset follow from the seed and the epoch."""
        torch.manual_seed(_seed_of_epoch(self.config.train.seed, epoch) + self.processes.rank)
        self.model.train()
        settings = self.config.train
        sessions = self._shuffled_blocks(epoch)
        blocks = prefetched(self.data.block, sessions, self.workers)
        first_step, clip_norm = self.step, settings.optimizer.clip_norm
        steps: list[StepFigures] = []
        waited_s = 0.0
        # Measure on the last of the largest blocks: only they hold enough sessions for the Sharpe term.
        measured = max(range(len(sessions)), key=lambda number: (len(sessions[number]), number))
        try:
            for number in range(len(sessions)):
                asked = time.perf_counter()
                block = to_device(next(blocks), self.device)
                waited_s += time.perf_counter() - asked
                steps.append(self._step(block, epoch, measured=number == measured))
        except RunFailure:
            # The steps on the way to the failure are evidence; the epoch has nothing else to record.
            self._write_input_sample()
            log_steps(self.record, epoch, steps, first_step=first_step, clip_norm=clip_norm)
            self.record.close_epoch(epoch)
            raise
        log_steps(self.record, epoch, steps, first_step=first_step, clip_norm=clip_norm)
        self.record.log("loader_wait_s", waited_s, epoch=epoch)
        return log_epoch(
            self.record,
            epoch,
            steps,
            components=list(self.components),
            loss_weights=settings.loss.weights_at(epoch),
            clip_norm=clip_norm,
        )

    def _shuffled_blocks(self, epoch: int) -> list[NDArray[np.int64]]:
        """The training sessions in blocks; the first cut falls at a random session of what would be the first block."""
        rng = np.random.default_rng([self.config.train.seed, epoch])
        sessions, batch = self.split.train, self.config.train.batch_size
        cut = rng.choice(self.data.sessions_per_block(sessions, batch)[0])
        parts = (sessions[sessions < cut], sessions[sessions >= cut])
        blocks = [block for part in parts for block in self.data.sessions_per_block(part, batch)]
        return [blocks[i] for i in rng.permutation(len(blocks))]

    def _write_input_sample(self) -> None:
        self.input_sample.write(self.record.run_dir / "inputs.parquet")

    # One step --------------------------------------------------------------------------------------------------

    def _step(self, block: Block, epoch: int, *, measured: bool) -> StepFigures:
        """One optimizer step; a measured one also records the update and what each loss term contributes."""
        self.input_sample.observe("train", block)
        with self._autocast():
            scores = self.processes.sharded(self.model)(block)  # [n, S, H]
        # Of several processes each holds the gradient of its own stocks alone.
        keeps_gradient = measured and self.processes.size == 1
        if keeps_gradient:
            scores.retain_grad()
        terms = self.loss(scores, block.target, block.member, epoch, with_idle=measured)
        self._require_finite("loss", terms.total, epoch, lambda: self._origin_in_loss(terms, block, epoch))
        self.optimizer.zero_grad(set_to_none=True)
        terms.total.backward()
        self.processes.sum_gradients(list(self.model.parameters()))
        component_l2 = torch.stack([l2_norm(_gradients(parameters)) for parameters in self.components.values()])
        # Clipping by a norm that is NaN would make every gradient NaN, and hide where it began.
        grad_norm = nn.utils.get_total_norm(_gradients(self.model.parameters()))
        self._require_finite("gradient", grad_norm, epoch, lambda: non_finite_gradient(self.model))
        nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.train.optimizer.clip_norm, grad_norm)
        before = {name: [p.detach().clone() for p in ps] for name, ps in self.components.items() if measured}
        lr = self.schedule.lr
        self.optimizer.step()
        self.schedule.step()
        self.average.update(self.model, self.step)
        self.step += 1
        if measured:
            log_update(self.record, epoch, self.components, before, self.optimizer)
        if keeps_gradient:
            self._log_gradient_contributions(block, scores, epoch)
        return StepFigures(
            terms.total.detach(),
            terms.raw,
            terms.weighted,
            grad_norm.detach(),
            component_l2.detach(),
            lr,
            int(block.member.sum()),
            len(block.session_index),
        )

    def _log_gradient_contributions(self, block: Block, scores: Tensor, epoch: int) -> None:
        gradient = torch.zeros_like(scores) if scores.grad is None else scores.grad
        contributions = loss_gradients(gradient, scores, block.target, block.member, self.config.train.loss, epoch)
        log_loss_gradients(self.record, epoch, contributions)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16-mixed")

    def _require_finite(self, what: str, value: Tensor, epoch: int, find_origin: Callable[[], NonFiniteOrigin]) -> None:
        if bool(torch.isfinite(value)):
            return
        if not self.processes.is_leader:
            raise PeerLost(f"epoch {epoch}, step {self.step}: the {what} is not finite; the leading process says where")
        number, origin = float(value.detach()), find_origin()
        self.record.log("non_finite", number, epoch=epoch, step=self.step, component=what, term=origin.tensor)
        raise RunFailure(
            f"epoch {epoch}, step {self.step}: the {what} is {number}; stopped before the update: {origin.sentence}."
            f" Look at `atft diagnose {self.record.run_dir}`; a lower train.optimizer.lr is the usual remedy"
        )

    def _origin_in_loss(self, terms: LossTerms, block: Block, epoch: int) -> NonFiniteOrigin:
        used = [name for name, weight in self.config.train.loss.weights_at(epoch).items() if weight > 0]
        with self._autocast():
            return non_finite_loss({name: terms.raw[name] for name in used}, self.model, block)

    def try_block(self, sessions: NDArray[np.int64]) -> None:
        """Forward and backward over this process's part of a block, to see whether memory suffices. Keeps nothing."""
        self.optimizer.zero_grad(set_to_none=True)
        own_block = self.processes.part_of(to_device(self.data.block(sessions), self.device))
        if own_block is None:
            return
        self.model.train()
        try:
            with self._autocast():
                scores = self.model(own_block)
            CompositeLoss(self.config.train.loss)(scores, own_block.target, own_block.member, 1).total.backward()
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    # Collapsed predictions -------------------------------------------------------------------------------------

    def _guard(self, epoch: int, validation: Scores) -> None:
        predicted, target = dispersions(validation, self.panel)
        ratio = predicted / target if target > 0 else math.nan
        event, reset = self.guard.check(ratio, epoch)
        if reset:
            self._redraw_head(epoch)
            self.log(f"epoch {epoch}: predictions collapsed (dispersion ratio {ratio:.1e}); the head was re-drawn")
        for metric, value in (
            ("prediction_dispersion", predicted),
            ("target_dispersion", target),
            ("dispersion_ratio", ratio),
            ("degeneracy_event", float(event)),
            ("degeneracy_reset", float(reset)),
        ):
            self.record.log(metric, value, epoch=epoch, split="validation")

    def _redraw_head(self, epoch: int) -> None:
        """Draws the head's last layer anew, in the averaged model too, and drops its state in the optimizer."""
        for model in {id(m): m for m in (self.model, self.average.model)}.values():
            generator = torch.Generator(device="cpu").manual_seed(_seed_of_epoch(self.config.train.seed, epoch))
            model.prediction_head.reset_output(generator)
        for parameter in self.model.prediction_head.output.parameters():
            self.optimizer.state.pop(parameter, None)

    # Checkpoints -----------------------------------------------------------------------------------------------

    def _save_start(self) -> None:
        """The initial weights and what they score: what a trained run must differ from."""
        self.checkpoints.save_evaluated(0, self.average.model)
        hashes = self.evaluator.initial_hashes()
        self.record.update(**{f"initial_{name}": value for name, value in hashes.items()})

    def _save(self, epoch: int) -> None:
        self.checkpoints.save_resume(epoch, self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "guard_low_checks": self.guard.low_checks,
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.model.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.guard.low_checks = state["step"], state["guard_low_checks"]

    def _take_leaders_state(self) -> None:
        """Gives the others what the leader resumed, or changed after an epoch: the rate, a re-drawn head."""
        if self.processes.size == 1:
            return
        content = self.processes.from_leader(packed(self._state()) if self.processes.is_leader else b"")
        if not self.processes.is_leader:
            self._load_state(unpacked(content, self.device))

    def _resume(self) -> int:
        """Loads the last complete epoch, if any; returns its number, 0 for a fresh start."""
        state = self.checkpoints.read_resume(self.device)
        if state is None:
            return 0
        self._load_state(state)
        self.record.update(resumed_after_epoch=state["epoch"])
        self.log(f"run {self.record.run_dir.name}: goes on after epoch {state['epoch']}")
        return int(state["epoch"])


def _identity(plan: Plan, panel: Panel) -> dict[str, Any]:
    """What a checkpoint belongs to."""
    return {
        "registry_fingerprint": panel.manifest["registry_fingerprint"],
        "features": panel.feature_names,
        "model_config": asdict(plan.config.model),
        "run_key": plan.key,
    }


def _require_usable(panel: Panel, split: Split, plan: Plan) -> None:
    """Raises InputError when there is nothing to train on, or nothing that the criterion could be read from."""
    train, evaluation = plan.config.train, plan.config.evaluation
    if not panel.member[split.train].any():
        raise InputError(
            f"{plan.dataset}: no stock is in the universe {train.universe!r} in the {len(split.train)} training"
            " sessions; give more history or set train.universe"
        )
    for name, sessions in (("validation", split.validation), ("test", split.test)):
        if evaluation.universe not in evaluable_slices(panel, sessions, train.universe):
            raise InputError(
                f"{plan.dataset}: fewer than two of the {len(sessions)} {name} sessions have two stocks of the slice"
                f" {evaluation.universe!r} with a target; give more history or set evaluation.universe"
            )


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _optimizer(model: nn.Module, config: PipelineConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019); matrices decay, biases, norms and gates' vectors do not."""
    settings = config.train.optimizer
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr)


def _seed_of_epoch(seed: int, epoch: int) -> int:
    """The seed of an epoch: another one for every epoch of every run seed."""
    return int(np.random.SeedSequence([seed, epoch + 1]).generate_state(1, np.uint64)[0] >> 1)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)
