"""The training loop: session blocks in, a run directory with checkpoints, lineage and a verdict out.

One run is decided by its configuration, its code, its data and its seed. Every epoch starts from its own seed, so a run
resumed from its last checkpoint takes the same steps as one that was never interrupted.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
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
from atft_pipeline.graph.store import load_graph
from atft_pipeline.model.atft_gat_fan import ATFTGATFAN
from atft_pipeline.runs.header import now, read_run
from atft_pipeline.runs.lock import exclusive
from atft_pipeline.runs.record import RunRecord, UnwrittenRecord
from atft_pipeline.runs.tables import TABLES, read_table
from atft_pipeline.storage.atomic import remove_remnants
from atft_pipeline.training.checkpoints import packed, read_checkpoint, unpacked, write_checkpoint
from atft_pipeline.training.degeneracy import DegeneracyGuard, dispersions
from atft_pipeline.training.distributed.process_group import ALONE, PeerLost, Processes
from atft_pipeline.training.failures import (
    Culprit,
    construction_explained,
    early_end_recorded,
    non_finite_gradient,
    non_finite_loss,
    shortage_of_memory_explained,
)
from atft_pipeline.training.judge_run import write_verdict
from atft_pipeline.training.losses import CompositeLoss, LossTerms
from atft_pipeline.training.plan import Plan, claim_directory, plan_run, resolve_device, run_header
from atft_pipeline.training.schedule import LearningRateSchedule
from atft_pipeline.training.scoring import (
    Scores,
    evaluable_slices,
    evaluate_scores,
    evaluation_rows,
    predictions_hash,
    score_sessions,
    to_device,
    weights_hash,
    write_predictions,
)
from atft_pipeline.training.telemetry.activations import observing
from atft_pipeline.training.telemetry.input_sample import InputsSeen
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
from atft_pipeline.training.validity_checks import Battery
from atft_pipeline.training.weight_average import WeightAverage
from atft_pipeline.verdict.read import read_verdict

SCORING_BATCH_RATIO = 4
"""Samples per block when scoring, over those when training: the warm-up sessions of a longer block weigh less."""


@dataclass(frozen=True)
class Outcome:
    """Where a run's record is, what it was judged, and whether an earlier finished run of the same key was reused."""

    run_dir: Path
    verdict: dict[str, Any]
    reused: bool


def train(
    config: PipelineConfig,
    dataset: Path,
    graph: Path,
    run_dir: Path,
    *,
    device: str = "auto",
    force: bool = False,
    overrides: dict[str, Any] | None = None,
    log: Callable[[str], None] = print,
    processes: Processes = ALONE,
) -> Outcome:
    """Trains one run in `run_dir`, or finishes it, or reuses it.

    A finished run of the same key is returned as it is; `force` makes a new attempt beside it. An unfinished one goes
    on after its last complete epoch. `overrides` are recorded as given, for the reader. Several processes call this
    alike; all return what the leading one has written.

    Raises: InputError when inputs or `run_dir` cannot be used; RunFailure when loss or gradient stop being finite (the
    record says so, and no update is made with them) and when memory or disk do not suffice; RunInterrupted for Ctrl-C.
    """
    plan, chosen = plan_run(config, dataset, graph, processes.size), resolve_device(device, processes)
    if not processes.leads:
        return _follow(plan, run_dir, chosen, processes)
    run_dir = claim_directory(run_dir, plan.key, force=force)
    with exclusive(run_dir):
        claim_directory(run_dir, plan.key, force=False)  # another process may have made it its own before the lock
        _remove_remnants(run_dir)
        earlier = read_run(run_dir) if (run_dir / "run.json").exists() else {}
        if earlier.get("status") == "finished" and (run_dir / "verdict.json").exists():
            log(f"run {run_dir.name}: finished before with the same configuration, code and data; reused")
            return processes.from_leader(Outcome(run_dir, read_verdict(run_dir), reused=True))
        progress = {name: earlier[name] for name in ("started", "epochs_done") if name in earlier}
        record = RunRecord(run_dir, earlier | run_header(plan, run_dir, chosen, overrides or {}) | progress)
        with early_end_recorded(record):
            record.update()
            try:
                with construction_explained():
                    trainer = Trainer(plan, record, chosen, log, processes)
            except InputError:
                if not earlier:  # nothing was trained, so the directory stays free for corrected settings
                    (run_dir / "run.json").unlink()
                raise
            processes.from_leader(None)  # there is something to train, and it can be
            trainer.run()
            verdict = write_verdict(run_dir)
            record.update(status="finished", ended=now())
        log(f"run {run_dir.name}: {verdict['summary']}")
        return processes.from_leader(Outcome(run_dir, verdict, reused=False))


def _follow(plan: Plan, run_dir: Path, device: torch.device, processes: Processes) -> Outcome:
    """The part of a process that does not lead: its share of every block, and nothing written."""
    nothing: Any = None
    reused: Outcome | None = processes.from_leader(nothing)
    if reused is not None:
        return reused
    Trainer(plan, UnwrittenRecord(run_dir, {}), device, lambda _: None, processes).run()
    outcome: Outcome = processes.from_leader(nothing)
    return outcome


def _remove_remnants(run_dir: Path) -> None:
    """Half-written files of an attempt that was killed; the lock says that it writes no more."""
    for name in (*TABLES, "predictions", "checkpoints", "validity"):
        remove_remnants(run_dir / name)
    for name in ("run.json", "verdict.json", "inputs.parquet"):
        remove_remnants(run_dir, name)


class Trainer:
    """One run in progress."""

    def __init__(
        self,
        plan: Plan,
        record: RunRecord,
        device: torch.device,
        log: Callable[[str], None],
        processes: Processes = ALONE,
    ) -> None:
        self.plan, self.config, self.record, self.device, self.log = plan, plan.config, record, device, log
        self.processes = processes
        settings = self.config.train
        # Another machine of the run has no run directory.
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
        self.battery = Battery(self.panel, plan.dataset, self.config)
        inhabited = self.split.validation[self.panel.member[self.split.validation].any(axis=1)]
        self.observed_session = int(inhabited[len(inhabited) // 2])
        self.step = 0
        self.inputs_seen: InputsSeen | None = None
        """Of the first epoch, until it is written."""

    def _new_model(self, seed: int) -> ATFTGATFAN:
        torch.manual_seed(seed)
        return ATFTGATFAN(self.config.model, len(self.panel.feature_names)).to(self.device)

    def run(self) -> None:
        """All epochs that are still to do."""
        with shortage_of_memory_explained(self.data, self.split.train, self.config.train.batch_size, self.try_block):
            self._run()

    def _run(self) -> None:
        done = self.processes.from_leader(self._resume() if self.processes.leads else 0)
        self.record.update(
            train_sessions=len(self.split.train),
            validation_sessions=len(self.split.validation),
            test_sessions=len(self.split.test),
            stocks=len(self.panel.codes),
            panel_place=self.panel_place,
            panel_bytes=self.panel.nbytes,
            parameters=sum(p.numel() for p in self.model.parameters()),
            optimizer=type(self.optimizer).__name__,
            epochs_done=done,
        )
        if done == 0 and self.processes.leads:
            self.inputs_seen = InputsSeen(self.panel, self.split)
            self._save_start()
        for epoch in range(done + 1, self.config.train.epochs + 1):
            self._epoch(epoch)

    # One epoch -------------------------------------------------------------------------------------------------

    def _epoch(self, epoch: int) -> None:
        self._take_leaders_state()
        started = time.perf_counter()
        trained = self.train_epoch(epoch)
        epoch_s = time.perf_counter() - started

        scores = self._score_splits(epoch)
        self._write_inputs_seen()
        if not self.processes.leads:
            self.record.close_epoch(epoch)
            return
        scoring_s = time.perf_counter() - started - epoch_s
        scored = sum(int(self.panel.member[s.sessions].sum()) for s in scores.values())
        validation = scores["validation"]
        headline = self._evaluate(epoch, scores)
        if epoch in (self.config.evaluation.criterion_epoch, self.config.train.epochs):
            self._run_battery(epoch, validation, trained.largest_lr)
        self._save_evaluated(epoch)
        self._guard(epoch, validation)
        self.schedule.epoch_end(validation.loss_weighted["total"])

        self.record.log("epoch_s", epoch_s, epoch=epoch)
        self.record.log("samples_per_s", trained.samples / epoch_s, epoch=epoch)
        self.record.log("scored_per_s", scored / scoring_s, epoch=epoch)
        self.record.log("validation_s", time.perf_counter() - started - epoch_s, epoch=epoch, split="validation")
        log_machine(self.record, epoch, self.device)
        self.record.close_epoch(epoch)
        self._save(epoch)
        self.record.update(epochs_done=epoch)
        self.log(
            f"epoch {epoch}/{self.config.train.epochs}  loss {trained.loss:.4f}"
            f"  validation {validation.loss_weighted['total']:.4f}  ic {_number(headline.value('ic_mean')):+.4f}"
            f"  rank_ic {_number(headline.value('rank_ic_mean')):+.4f}"
            f"  sharpe {_number(headline.value('sharpe_daily')):+.3f}  lr {self.schedule.lr:.2e}"
            f"  grad {trained.grad_norm:.3f}  {trained.samples / epoch_s:,.0f} samples/s"
        )

    def train_epoch(self, epoch: int) -> EpochFigures:
        """Every training session once, in blocks of random order and offset, which the seed and the epoch decide."""
        torch.manual_seed(_mix(self.config.train.seed, epoch) + self.processes.rank)
        self.model.train()
        settings = self.config.train
        sessions = self._shuffled_blocks(epoch)
        blocks = prefetched(self.data.block, sessions, self.workers)
        first_step, clip_norm = self.step, settings.optimizer.clip_norm
        steps: list[StepFigures] = []
        waited = 0.0
        try:
            # Of the blocks with the most sessions, which alone tell the Sharpe term's pull, the last.
            measured = max(range(len(sessions)), key=lambda number: (len(sessions[number]), number))
            for number in range(len(sessions)):
                asked = time.perf_counter()
                block = to_device(next(blocks), self.device)
                waited += time.perf_counter() - asked
                steps.append(self._step(block, epoch, measured=number == measured))
        except RunFailure:
            # The way to the failure is evidence; the epoch has nothing else to record.
            self._write_inputs_seen()
            log_steps(self.record, epoch, steps, first_step=first_step, clip_norm=clip_norm)
            self.record.close_epoch(epoch)
            raise
        log_steps(self.record, epoch, steps, first_step=first_step, clip_norm=clip_norm)
        self.record.log("loader_wait_s", waited, epoch=epoch)
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

    def _write_inputs_seen(self) -> None:
        if self.inputs_seen is not None:
            self.inputs_seen.write(self.record.run_dir / "inputs.parquet")
            self.inputs_seen = None

    def _step(self, block: Block, epoch: int, *, measured: bool) -> StepFigures:
        if self.inputs_seen is not None:
            self.inputs_seen.see("train", block)
        with self._autocast():
            scores = self.processes.shared(self.model)(block)  # [n, S, H]
        if measured and self.processes.size == 1:  # of several, each holds the gradient of its own stocks alone
            scores.retain_grad()
        terms = self.loss(scores, block.target, block.member, epoch, with_idle=measured)
        self._require_finite("loss", terms.total, epoch, lambda: self._why_loss(terms, block, epoch))
        self.optimizer.zero_grad(set_to_none=True)
        terms.total.backward()
        self.processes.sum_gradients(list(self.model.parameters()))
        component_l2 = torch.stack(
            [l2_norm([p.grad for p in ps if p.grad is not None]) for ps in self.components.values()]
        )
        # Clipping by a norm that is NaN would make every gradient NaN, and hide where it began.
        grad_norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
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
            if self.processes.size == 1:
                self._log_pulls(block, scores, epoch)
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

    def _log_pulls(self, block: Block, scores: Tensor, epoch: int) -> None:
        gradient = torch.zeros_like(scores) if scores.grad is None else scores.grad
        pulls = loss_gradients(gradient, scores, block.target, block.member, self.config.train.loss, epoch)
        log_loss_gradients(self.record, epoch, pulls)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16-mixed")

    def _require_finite(self, what: str, value: Tensor, epoch: int, explain: Callable[[], Culprit]) -> None:
        if bool(torch.isfinite(value)):
            return
        if not self.processes.leads:
            raise PeerLost(f"epoch {epoch}, step {self.step}: the {what} is not finite; the leading process says where")
        found, culprit = float(value.detach()), explain()
        self.record.log("non_finite", found, epoch=epoch, step=self.step, component=what, term=culprit.tensor)
        raise RunFailure(
            f"epoch {epoch}, step {self.step}: the {what} is {found}; stopped before the update: {culprit.sentence}."
            f" Look at `atft diagnose {self.record.run_dir}`; a lower train.optimizer.lr is the usual remedy"
        )

    def _why_loss(self, terms: LossTerms, block: Block, epoch: int) -> Culprit:
        used = [name for name, weight in self.config.train.loss.weights_at(epoch).items() if weight > 0]
        with self._autocast():
            return non_finite_loss({name: terms.raw[name] for name in used}, self.model, block)

    def try_block(self, sessions: NDArray[np.int64]) -> None:
        """Forward and backward over this process's part of a block: whether the memory suffices. Nothing is kept."""
        self.optimizer.zero_grad(set_to_none=True)
        block = to_device(self.data.block(sessions), self.device)
        own = self.processes.own(block)
        if own is None:
            return
        self.model.train()
        try:
            with self._autocast():
                scores = self.model(own)
            CompositeLoss(self.config.train.loss)(scores, own.target, own.member, 1).total.backward()
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    # Validation ------------------------------------------------------------------------------------------------

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

    def _score_splits(self, epoch: int) -> dict[str, Scores]:
        """Scores of the averaged weights; where predictions are kept, of the test sessions too, and written."""
        model = self.processes.shared(self.average.model)
        validation, around = self.split.validation, partial(self._recorded, "validation", epoch)
        scores = {"validation": self._score(model, validation, epoch, with_loss=True, around=around)}
        if epoch in (1, 5, self.config.evaluation.criterion_epoch, self.config.train.epochs) or epoch % 10 == 0:
            scores["test"] = self._score(model, self.split.test, epoch, around=partial(self._recorded, "test", epoch))
            if self.processes.leads:
                path = self.record.run_dir / "predictions" / f"epoch_{epoch:03d}.parquet"
                write_predictions(path, self.panel, scores)
        return scores

    @contextmanager
    def _recorded(self, split: str, epoch: int, block: Block) -> Iterator[None]:
        """Records what the model is given for `split`, and what it makes of one block in the middle of validation.

        Of several processes the first tells, of its own sessions.
        """
        if self.inputs_seen is not None:
            self.inputs_seen.see(split, block)
        own = self.processes.own(block)
        if not self.processes.leads or own is None or self.observed_session not in block.session_index:
            yield
            return
        with observing(self.average.model) as activations:
            yield
        for component, figures in activations.figures(own.member).items():
            for metric, value in figures.items():
                self.record.log(metric, value, epoch=epoch, split=split, component=component)

    def _evaluate(self, epoch: int, scores: dict[str, Scores]) -> Evaluation:
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
        validation = scores["validation"]
        for metric, terms in (("loss_raw", validation.loss_raw), ("loss_weighted", validation.loss_weighted)):
            for term, value in terms.items():
                self.record.log(metric, value, epoch=epoch, split="validation", component="loss", term=term)
        return evaluations["validation", config.universe]

    def _run_battery(self, epoch: int, trained: Scores, largest_lr: float) -> None:
        """The validity battery on this epoch's scores, kept for the verdict."""
        model, sessions = self.average.model, self.split.validation
        fresh = self._new_model(_mix(self.config.train.seed, -1))
        self.battery.run(
            self.record.run_dir,
            epoch,
            trained=trained,
            # In other blocks: a score that depended on its batch would show here.
            again=self._score(model, sessions, epoch, batch_size=self.config.train.batch_size),
            reinitialised=self._score(fresh, sessions, epoch),
            hashes=self._hashes(model, trained),
            previous_hashes=self._hashes_before(epoch),
            learning_rate=largest_lr,
            on_gpu=self.device.type == "cuda",
            train_sessions=self.split.train,
        )

    def _hashes(self, model: nn.Module, scores: Scores) -> dict[str, str]:
        return {"weights_hash": weights_hash(model), "predictions_hash": predictions_hash(scores, self.panel)}

    def _hashes_before(self, epoch: int) -> dict[str, str] | None:
        """Hashes of the previous epoch as recorded, or of the initial weights before the first."""
        if epoch == 1:
            return {name: self.record.header[f"initial_{name}"] for name in ("weights_hash", "predictions_hash")}
        evals = read_table(self.record.run_dir, "evals").to_pylist()
        rows = [row for row in evals if row["epoch"] == epoch - 1 and row["split"] == "validation"]
        return {name: rows[0][name] for name in ("weights_hash", "predictions_hash")} if rows else None

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
        """New weights for the head's last layer, in the averaged model too, and no memory of it in the optimizer."""
        for model in {id(m): m for m in (self.model, self.average.model)}.values():
            generator = torch.Generator(device="cpu").manual_seed(_mix(self.config.train.seed, epoch))
            model.prediction_head.reset_output(generator)
        for parameter in self.model.prediction_head.output.parameters():
            self.optimizer.state.pop(parameter, None)

    # Checkpoints -----------------------------------------------------------------------------------------------

    def _save_start(self) -> None:
        """The initial weights and what they score: what a trained run must differ from."""
        self._save_evaluated(0)
        model = self.average.model
        hashes = self._hashes(model, self._score(model, self.split.validation, epoch=1))
        self.record.update(**{f"initial_{name}": value for name, value in hashes.items()})

    def _save_evaluated(self, epoch: int) -> None:
        """The weights that the epoch's evaluation is of: taken before the guard may re-draw their head."""
        content = self._identity() | {"epoch": epoch, "weights": self.average.model.state_dict()}
        write_checkpoint(self._checkpoint(f"epoch_{epoch:03d}.pt"), content)

    def _save(self, epoch: int) -> None:
        """What the next epoch starts from. Written last: a kill before repeats the epoch, over its own parts."""
        write_checkpoint(self._checkpoint("resume.pt"), self._identity() | {"epoch": epoch} | self._state())

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
        """What the leading process resumed, or decided after an epoch (rate, a re-drawn head), reaches the others."""
        if self.processes.size == 1:
            return
        content = self.processes.from_leader(packed(self._state()) if self.processes.leads else b"")
        if not self.processes.leads:
            self._load_state(unpacked(content, self.device))

    def _identity(self) -> dict[str, Any]:
        return {
            "registry_fingerprint": self.panel.manifest["registry_fingerprint"],
            "features": self.panel.feature_names,
            "model_config": asdict(self.config.model),
            "run_key": self.plan.key,
        }

    def _checkpoint(self, name: str) -> Path:
        return self.record.run_dir / "checkpoints" / name

    def _resume(self) -> int:
        """Loads the last complete epoch, if any; returns its number, 0 for a fresh start."""
        path = self._checkpoint("resume.pt")
        if not path.exists():
            return 0
        state = read_checkpoint(path, self._identity(), self.device)
        self._load_state(state)
        self.record.update(resumed_after_epoch=state["epoch"])
        self.log(f"run {self.record.run_dir.name}: goes on after epoch {state['epoch']}")
        return int(state["epoch"])


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


def _optimizer(model: nn.Module, config: PipelineConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019); matrices decay, biases, norms and gates' vectors do not."""
    settings = config.train.optimizer
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr)


def _mix(seed: int, epoch: int) -> int:
    """A seed of its own for every epoch of every seed."""
    return int(np.random.SeedSequence([seed, epoch + 1]).generate_state(1, np.uint64)[0] >> 1)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
