"""The training loop: session blocks in, a run directory with checkpoints, lineage and a verdict out.

One run is decided by its configuration, its code, its data and its seed. Every epoch starts from its own seed, so a run
resumed from its last checkpoint takes the same steps as one that was never interrupted.
"""

from __future__ import annotations

import math
import platform
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from atft_pipeline.blocks import Block, BlockDataset, Panel, load_panel
from atft_pipeline.config import PipelineConfig
from atft_pipeline.degeneracy import DegeneracyGuard, dispersions
from atft_pipeline.errors import InputError, RunFailure
from atft_pipeline.files import replacing
from atft_pipeline.graph import load_graph
from atft_pipeline.lineage import RunRecord, exclusive, now, read_run, read_table
from atft_pipeline.losses import CompositeLoss
from atft_pipeline.model.atft_gat_fan import ATFTGATFAN
from atft_pipeline.run_plan import Plan, claim_directory, plan_run, resolve_device, run_header
from atft_pipeline.schedule import LearningRateSchedule
from atft_pipeline.scoring import (
    AUTOCAST,
    Scores,
    covered_slices,
    evaluate_scores,
    evaluation_rows,
    predictions_hash,
    score_sessions,
    to_device,
    weights_hash,
    write_predictions,
)
from atft_pipeline.splits import make_split
from atft_pipeline.verdict import Battery, read_verdict, write_verdict
from atft_pipeline.weight_average import WeightAverage

T = TypeVar("T")
B = TypeVar("B")

GRADIENT_WARNING_L2 = 1e-7
"""A trainable component whose mean gradient l2 over an epoch is below this counts one gradient warning."""


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
) -> Outcome:
    """Trains one run in `run_dir`, or finishes it, or reuses it.

    A finished run of the same key is returned as it is; `force` makes a new attempt beside it. An unfinished one goes
    on after its last complete epoch. `overrides` are recorded as given, for the reader.

    Raises: InputError when inputs or `run_dir` cannot be used; RunFailure when loss or gradient stop being finite (the
    record says so, and no update is made with them).
    """
    plan = plan_run(config, dataset, graph)
    run_dir = claim_directory(run_dir, plan.key, force=force)
    with exclusive(run_dir):
        if (run_dir / "run.json").exists() and read_run(run_dir)["status"] == "finished":
            log(f"run {run_dir.name}: finished before with the same configuration, code and data; reused")
            return Outcome(run_dir, read_verdict(run_dir), reused=True)
        earlier = read_run(run_dir) if (run_dir / "run.json").exists() else {}
        record = RunRecord(run_dir, earlier | run_header(plan, run_dir, resolve_device(device), overrides or {}))
        try:
            trainer = Trainer(plan, record, resolve_device(device), log)
            trainer.run()
        except BaseException as error:
            record.update(status="failed", reason=_reason(error), ended=now())
            raise
        verdict = write_verdict(run_dir)
        record.update(status="finished", ended=now())
        log(f"run {run_dir.name}: {verdict['summary']}")
        return Outcome(run_dir, verdict, reused=False)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


@dataclass
class StepFigures:
    """What one optimizer step leaves for the record."""

    loss: Tensor
    raw: dict[str, Tensor]
    weighted: dict[str, Tensor]
    grad_norm: Tensor
    component_l2: Tensor
    lr: float
    samples: int
    sessions: int


class Trainer:
    """One run in progress."""

    def __init__(self, plan: Plan, record: RunRecord, device: torch.device, log: Callable[[str], None]) -> None:
        self.plan, self.config, self.record, self.device, self.log = plan, plan.config, record, device, log
        train_config = self.config.train
        self.panel = load_panel(plan.dataset, train_config.universe)
        self.split = make_split(self.panel.sessions, self.config.split)
        torch.manual_seed(train_config.seed)
        live = torch.tensor(
            [name in set(self.panel.manifest["live_features"]) for name in self.panel.manifest["features"]]
        )
        self.model = ATFTGATFAN(self.config.model, len(live), live).to(device)
        graph = load_graph(plan.graph) if self.config.model.graph else None
        self.data = BlockDataset(self.panel, graph, self.model.receptive_field, _storage(self.panel, device))
        self.components = {
            name: parameters for name, child in self.model.named_children() if (parameters := list(child.parameters()))
        }
        self.optimizer = _optimizer(self.model, self.config)
        if not self.panel.member[self.split.train].any():
            raise InputError(
                f"{plan.dataset}: no stock is in the universe {train_config.universe!r} in the {len(self.split.train)}"
                " training sessions; give more history or set train.universe"
            )
        steps_per_epoch = len(self.data.sessions_per_block(self.split.train, train_config.batch_size)) + 1
        self.schedule = LearningRateSchedule(
            self.optimizer, train_config.schedule, total_steps=steps_per_epoch * train_config.epochs
        )
        self.loss = CompositeLoss(train_config.loss)
        self.average = WeightAverage(self.model, train_config.weight_ema)
        self.guard = DegeneracyGuard(train_config.guard)
        self.step = 0
        self.battery = Battery(self.panel, plan.dataset, self.config)

    def run(self) -> None:
        """All epochs that are still to do."""
        done = self._resume()
        self.record.update(
            train_sessions=len(self.split.train),
            validation_sessions=len(self.split.validation),
            test_sessions=len(self.split.test),
            stocks=len(self.panel.codes),
            parameters=sum(p.numel() for p in self.model.parameters()),
            epochs_done=done,
        )
        if done == 0:
            self._save_start()
        for epoch in range(done + 1, self.config.train.epochs + 1):
            self._epoch(epoch)

    # One epoch -------------------------------------------------------------------------------------------------

    def _epoch(self, epoch: int) -> None:
        torch.manual_seed(_mix(self.config.train.seed, epoch))
        started = time.perf_counter()
        waited = self._train_epoch(epoch)
        elapsed = time.perf_counter() - started
        figures = self._validate(epoch)
        self.record.log("epoch_s", elapsed, epoch=epoch)
        self.record.log("loader_wait_s", waited, epoch=epoch)
        self.record.log("samples_per_s", self.samples / elapsed, epoch=epoch)
        self._log_machine(epoch)
        self.schedule.epoch_end(figures["validation_loss"])
        self.record.close_epoch(epoch)
        self._save(epoch)
        self.record.update(epochs_done=epoch)
        self.log(
            f"epoch {epoch}/{self.config.train.epochs}  loss {self.train_loss:.4f}"
            f"  validation {figures['validation_loss']:.4f}  ic {figures['ic']:+.4f}  rank_ic {figures['rank_ic']:+.4f}"
            f"  sharpe {figures['sharpe']:+.3f}  lr {self.schedule.lr:.2e}  grad {self.grad_norm:.3f}"
            f"  {self.samples / elapsed:,.0f} samples/s"
        )

    def _train_epoch(self, epoch: int) -> float:
        """Every training session once, in blocks of random order and offset; returns seconds waited for blocks."""
        self.model.train()
        blocks = self._shuffled_blocks(epoch)
        steps: list[StepFigures] = []
        waited = 0.0
        source = prefetched(self.data.block, blocks, self.config.train.loader_workers)
        bar = tqdm(total=len(blocks), desc=f"epoch {epoch}", leave=False, disable=None)
        for last in [False] * (len(blocks) - 1) + [True]:
            asked = time.perf_counter()
            block = to_device(next(source), self.device)
            waited += time.perf_counter() - asked
            steps.append(self._step(block, epoch, measure_update=last))
            bar.update()
        bar.close()
        self._log_steps(epoch, steps)
        return waited

    def _shuffled_blocks(self, epoch: int) -> list[NDArray[np.int64]]:
        rng = np.random.default_rng([self.config.train.seed, epoch])
        sessions, batch = self.split.train, self.config.train.batch_size
        offset = int(rng.integers(len(self.data.sessions_per_block(sessions, batch)[0])))
        parts = [part for part in (sessions[:offset], sessions[offset:]) if len(part)]
        blocks = [block for part in parts for block in self.data.sessions_per_block(part, batch)]
        return [blocks[i] for i in rng.permutation(len(blocks))]

    def _step(self, block: Block, epoch: int, *, measure_update: bool) -> StepFigures:
        precision = AUTOCAST[self.config.train.precision]
        with torch.autocast(self.device.type, precision, enabled=precision is not None):
            scores = self.model(block)  # [n, S, H]
        terms = self.loss(scores, block.target, block.member, epoch)
        self._require_finite("loss", terms.total, epoch)
        self.optimizer.zero_grad(set_to_none=True)
        terms.total.backward()
        component_l2 = torch.stack([_l2([p.grad for p in ps if p.grad is not None]) for ps in self.components.values()])
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.optimizer.clip_norm)
        self._require_finite("gradient", grad_norm, epoch)
        before = [p.detach().clone() for p in self.model.parameters()] if measure_update else None
        lr = self.schedule.lr
        self.optimizer.step()
        self.schedule.step()
        self.average.update(self.model, self.step)
        self.step += 1
        if before is not None:
            self._log_update(epoch, before)
        return StepFigures(
            terms.total.detach(),
            {name: value.detach() for name, value in terms.raw.items()},
            {name: value.detach() for name, value in terms.weighted.items()},
            grad_norm.detach(),
            component_l2.detach(),
            lr,
            int(block.member.sum()),
            len(block.session_index),
        )

    def _require_finite(self, what: str, value: Tensor, epoch: int) -> None:
        if not bool(torch.isfinite(value)):
            self.record.log("non_finite", 1.0, epoch=epoch, step=self.step, component=what)
            self.record.close_epoch(epoch)
            raise RunFailure(
                f"epoch {epoch}, step {self.step}: the {what} is {float(value)}; stopped before the update. Look at"
                f" `atft diagnose {self.record.run_dir}`; a lower train.optimizer.lr is the usual remedy"
            )

    # Validation ------------------------------------------------------------------------------------------------

    def _score(
        self, model: nn.Module, sessions: NDArray[np.int64], epoch: int, *, batch_size: int | None = None
    ) -> Scores:
        return score_sessions(
            model,
            self.data,
            sessions,
            batch_size=batch_size or self.config.train.batch_size,
            device=self.device,
            precision=self.config.train.precision,
            loss=self.config.train.loss,
            epoch=epoch,
        )

    def _validate(self, epoch: int) -> dict[str, float]:
        """Scores the validation sessions with the averaged weights, records what they earn, guards against collapse."""
        model, config = self.average.model, self.config.evaluation
        scores = {"validation": self._score(model, self.split.validation, epoch)}
        if self._keeps_predictions(epoch):
            scores["test"] = self._score(model, self.split.test, epoch)
            write_predictions(self.record.run_dir / "predictions" / f"epoch_{epoch:03d}.parquet", self.panel, scores)
        weights = weights_hash(model)
        for split, split_scores in scores.items():
            predictions = predictions_hash(split_scores, self.panel)
            for universe in covered_slices(self.config.train.universe):
                evaluation = evaluate_scores(split_scores, self.panel, universe, config)
                rows, daily = evaluation_rows(
                    evaluation,
                    self.panel.sessions[split_scores.sessions],
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
        for name, value in validation.loss_raw.items():
            self.record.log("loss_raw", value, epoch=epoch, split="validation", component="loss", term=name)
        for name, value in validation.loss_weighted.items():
            self.record.log("loss_weighted", value, epoch=epoch, split="validation", component="loss", term=name)
        self._guard(epoch, validation)
        if epoch in self._battery_epochs():
            hashes = {"weights_hash": weights, "predictions_hash": predictions_hash(validation, self.panel)}
            self._run_battery(epoch, validation, hashes)
        headline = evaluate_scores(validation, self.panel, config.universe, config)
        return {"validation_loss": validation.loss_weighted["total"]} | {
            short: _number(headline.statistics[name].value) if headline.valid else math.nan
            for short, name in (("ic", "ic_mean"), ("rank_ic", "rank_ic_mean"), ("sharpe", "sharpe_daily"))
        }

    def _keeps_predictions(self, epoch: int) -> bool:
        return epoch in (1, 5, self.config.evaluation.criterion_epoch, self.config.train.epochs) or epoch % 10 == 0

    def _battery_epochs(self) -> set[int]:
        return {self.config.evaluation.criterion_epoch, self.config.train.epochs}

    def _run_battery(self, epoch: int, trained: Scores, hashes: dict[str, str]) -> None:
        """The validity battery on this epoch's scores, kept for the verdict."""
        torch.manual_seed(_mix(self.config.train.seed, -1))
        fresh = type(self.model)(self.config.model, len(self.panel.manifest["features"]), self.model.live).to(
            self.device
        )
        # Twice with another block partition: a score that depended on its batch would show here.
        again = self._score(
            self.average.model, self.split.validation, epoch, batch_size=4 * self.config.train.batch_size
        )
        reinitialised = self._score(fresh, self.split.validation, epoch)
        self.battery.run(
            self.record.run_dir,
            epoch,
            trained=trained,
            again=again,
            reinitialised=reinitialised,
            hashes=hashes,
            previous_hashes=self._hashes_before(epoch),
            learning_rate=self.largest_lr,
            on_gpu=self.device.type == "cuda",
            train_sessions=self.split.train,
        )

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

    # Record ----------------------------------------------------------------------------------------------------

    def _log_steps(self, epoch: int, steps: Sequence[StepFigures]) -> None:
        losses = torch.stack([s.loss for s in steps]).double().cpu().tolist()
        norms = torch.stack([s.grad_norm for s in steps]).double().cpu().tolist()
        clip = self.config.train.optimizer.clip_norm
        clipped = [min(norm, clip) for norm in norms]
        first = self.step - len(steps)
        for i, (loss, norm, after) in enumerate(zip(losses, norms, clipped, strict=True)):
            self.record.log("loss", loss, epoch=epoch, step=first + i, term="total")
            self.record.log("lr", steps[i].lr, epoch=epoch, step=first + i, component="all")
            self.record.log("grad_norm", norm, epoch=epoch, step=first + i, term="before_clip")
            self.record.log("grad_norm", after, epoch=epoch, step=first + i, term="after_clip")
        weights = self.config.train.loss.weights_at(epoch)
        sessions = sum(s.sessions for s in steps)
        for metric, terms in (("loss_raw", [s.raw for s in steps]), ("loss_weighted", [s.weighted for s in steps])):
            for name in terms[0]:
                mean = sum(float(t[name]) * s.sessions for t, s in zip(terms, steps, strict=True)) / sessions
                self.record.log(metric, mean, epoch=epoch, component="loss", term=name)
        self.train_loss = sum(x * s.sessions for x, s in zip(losses, steps, strict=True)) / sessions
        self.record.log("loss_weighted", self.train_loss, epoch=epoch, component="loss", term="total")
        for name, weight in weights.items():
            self.record.log("loss_weight", weight, epoch=epoch, component="loss", term=name)
        self.largest_lr = max(s.lr for s in steps)
        self.record.log("lr", steps[-1].lr, epoch=epoch, component="all")
        self.grad_norm = float(np.mean(norms))
        self.record.log("grad_norm", self.grad_norm, epoch=epoch, component="total", term="before_clip")
        self.record.log("grad_norm", float(np.mean(clipped)), epoch=epoch, component="total", term="after_clip")
        self.record.log("clipped_share", float(np.mean([norm > clip for norm in norms])), epoch=epoch)
        component_l2 = torch.stack([s.component_l2 for s in steps]).double().mean(dim=0).cpu().tolist()
        for name, l2 in zip(self.components, component_l2, strict=True):
            self.record.log("grad_l2", l2, epoch=epoch, component=name)
            self.record.log("gradient_warning", float(l2 < GRADIENT_WARNING_L2), epoch=epoch, component=name)
        self.samples = sum(s.samples for s in steps)

    @torch.no_grad()
    def _log_update(self, epoch: int, before: Sequence[Tensor]) -> None:
        """Update-to-weight ratio of the epoch's last step, per component."""
        previous = dict(zip(map(id, self.model.parameters()), before, strict=True))
        for name, parameters in self.components.items():
            weight = float(_l2([previous[id(p)] for p in parameters]))
            update = float(_l2([p - previous[id(p)] for p in parameters]))
            self.record.log("weight_l2", weight, epoch=epoch, component=name)
            self.record.log("update_to_weight", update / max(weight, 1e-12), epoch=epoch, component=name)

    def _log_machine(self, epoch: int) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
        self.record.log("peak_rss_bytes", peak, epoch=epoch)
        if self.device.type == "cuda":
            self.record.log("gpu_memory_bytes", torch.cuda.max_memory_allocated(self.device), epoch=epoch)
            try:
                self.record.log("gpu_utilisation", torch.cuda.utilization(self.device) / 100, epoch=epoch)
            except ModuleNotFoundError:  # needs NVIDIA's management library; absent is not zero, so no row
                return

    # Checkpoints -----------------------------------------------------------------------------------------------

    def _save_start(self) -> None:
        """The initial weights and what they score: what a trained run must differ from."""
        self._write_checkpoint("epoch_000.pt", {"weights": self.average.model.state_dict()})
        scores = self._score(self.average.model, self.split.validation, epoch=1)
        self.record.update(
            initial_weights_hash=weights_hash(self.average.model),
            initial_predictions_hash=predictions_hash(scores, self.panel),
        )

    def _save(self, epoch: int) -> None:
        identity = {
            "epoch": epoch,
            "run_key": self.plan.key,
            "features": self.panel.manifest["features"],
            "registry_fingerprint": self.panel.manifest["registry_fingerprint"],
            "model_config": asdict(self.config.model),
        }
        self._write_checkpoint(f"epoch_{epoch:03d}.pt", identity | {"weights": self.average.model.state_dict()})
        # Replaced last: a kill before this line repeats the epoch, and its parts are written over.
        state = identity | {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "guard_low_checks": self.guard.low_checks,
        }
        self._write_checkpoint("resume.pt", state)

    def _write_checkpoint(self, name: str, content: dict[str, Any]) -> None:
        with replacing(self.record.run_dir / "checkpoints" / name) as temporary:
            torch.save(content, temporary)

    def _resume(self) -> int:
        """Loads the last complete epoch, if any; returns its number, 0 for a fresh start."""
        path = self.record.run_dir / "checkpoints" / "resume.pt"
        if not path.exists():
            return 0
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["run_key"] != self.plan.key:
            raise InputError(
                f"{path}: checkpoint of run {state['run_key']}, expected {self.plan.key}; remove the directory"
            )
        self.model.load_state_dict(state["model"])
        self.average.model.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.guard.low_checks = state["step"], state["guard_low_checks"]
        self.record.update(resumed_after_epoch=state["epoch"])
        self.log(f"run {self.record.run_dir.name}: goes on after epoch {state['epoch']}")
        return int(state["epoch"])


def _optimizer(model: nn.Module, config: PipelineConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019); matrices decay, biases, norms and gates' vectors do not."""
    settings = config.train.optimizer
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr)


def _storage(panel: Panel, device: torch.device) -> torch.device:
    """Where the panel's tensors live: on the device if they take at most half of its free memory, else on the host."""
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    return device if panel.features.nbytes * 1.25 < free / 2 else torch.device("cpu")


def prefetched(make: Callable[[T], B], items: Sequence[T], workers: int) -> Iterator[B]:
    """`map(make, items)` with up to 2 x `workers` results made ahead by threads; in the caller's thread when 0."""
    if workers == 0:
        yield from map(make, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future[B]] = deque()
        for item in items:
            ahead.append(pool.submit(make, item))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _mix(seed: int, epoch: int) -> int:
    """A seed of its own for every epoch of every seed."""
    return int(np.random.SeedSequence([seed, epoch + 1]).generate_state(1, np.uint64)[0] >> 1)


def _l2(tensors: Sequence[Tensor]) -> Tensor:
    """l2 norm over all tensors together; 0 where there are none."""
    norms = torch._foreach_norm(list(tensors)) if tensors else [torch.zeros(())]
    return torch.stack([norm.float() for norm in norms]).norm()


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
