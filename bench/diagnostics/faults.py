"""Faults that are planted into real runs: each is a small change of settings, data, code or the written record.

A plant changes one thing in the training process, which is a child of the bench; the diagnosis runs in another process
with unchanged code. A plant looks up by name what it changes, so it fails loudly where the name no longer exists.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import nn

from atft_pipeline.batches.block_dataset import BlockDataset
from atft_pipeline.batches.panel import Panel
from atft_pipeline.dataset.layout import membership_path
from atft_pipeline.evaluation import evaluate
from atft_pipeline.market import synthetic
from atft_pipeline.model.atft_gat_fan import ATFTGATFAN
from atft_pipeline.training import losses
from atft_pipeline.training import trainer as training
from atft_pipeline.training.judging import epoch_evaluation
from atft_pipeline.training.losses import CompositeLoss
from atft_pipeline.training.schedule import LearningRateSchedule
from atft_pipeline.training.weight_average import WeightAverage

Settings = dict[str, object]


@dataclass(frozen=True)
class Fault:
    """One plant. `cause`: the id that a diagnosis must name; several plants may share it, and differ in `id`."""

    id: str
    cause: str
    settings: Settings = field(default_factory=dict)
    market: Settings = field(default_factory=dict)
    """Arguments of the generator."""
    generate: Callable[[], None] | None = None
    """Changes the generator; the fault gets a market of its own."""
    data: Callable[[Path, Path], None] | None = None
    """Changes copies of dataset and graph on disk, before training."""
    code: Callable[[], None] | None = None
    """Changes code in the training process."""
    record: Callable[[Path, Path], None] | None = None
    """Changes what the finished run has written; the second path is a healthy run of the same market."""
    resumed: bool = False
    """The run is killed after half of its epochs and resumed; `code` applies only to the second half."""
    only_report: bool = False
    """The model is unchanged but the report is provably false, so the plant counts without a loss of IC."""

    @property
    def only_record(self) -> bool:
        """Whether the plant changes only the record, after the training."""
        early = (self.settings, self.market, self.generate, self.data, self.code, self.resumed)
        return self.record is not None and not any(early)


class Planted(RuntimeError):
    """The crash that a plant causes."""


def replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replaces attribute `name` of `owner` by `make(original)`."""
    setattr(owner, name, make(getattr(owner, name)))


# Evaluation ------------------------------------------------------------------------------------------------------


def _rewritten(run_dir: Path, table: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    for file in sorted((run_dir / table).glob("epoch_*.parquet")):
        rows = pl.read_parquet(file)
        change(rows).cast(dict(rows.schema)).select(rows.columns).write_parquet(file)


def _verdict(run_dir: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = run_dir / "verdict.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def metric_of_other_run(run_dir: Path, other: Path) -> None:
    theirs = json.loads((other / "verdict.json").read_text())

    def change(verdict: dict[str, Any]) -> None:
        verdict["criterion"]["value"] = theirs["criterion"]["value"]
        verdict["final"] = theirs["final"]

    _verdict(run_dir, change)


def evals_of_other_run(run_dir: Path, other: Path) -> None:
    """The whole table of evaluations is another run's, with its hashes."""
    for file in (run_dir / "evals").glob("epoch_*.parquet"):
        file.write_bytes((other / "evals" / file.name).read_bytes())


def frozen_at_other_run(run_dir: Path, other: Path) -> None:
    """Every epoch reports the Sharpe with which another run ended, the same value at every epoch."""
    theirs = json.loads((other / "verdict.json").read_text())["final"]["validation"]["sharpe_daily"]
    frozen = (pl.col("metric") == "sharpe_daily") & (pl.col("split") == "validation")
    value = pl.when(frozen).then(theirs).otherwise(pl.col("value"))
    _rewritten(run_dir, "evals", lambda rows: rows.with_columns(value=value))

    def change(verdict: dict[str, Any]) -> None:
        verdict["criterion"]["value"] = theirs
        verdict["final"]["validation"]["sharpe_daily"] = theirs

    _verdict(run_dir, change)


def maximum_over_history(run_dir: Path, other: Path) -> None:
    rows = pl.read_parquet(run_dir / "evals" / "epoch_*.parquet")
    rows = rows.filter(pl.col("metric") == "sharpe_daily", pl.col("split") == "validation", pl.col("slice") == "all")
    best = float(rows["value"].max())  # type: ignore[arg-type]
    _verdict(run_dir, lambda verdict: verdict["criterion"].update(value=best))


def early_epoch_as_final(run_dir: Path, other: Path) -> None:
    """Predictions, evaluations and daily rows of epochs 20 and 24 are those of epoch 5."""
    for table in ("evals", "daily"):
        early = pl.read_parquet(run_dir / table / "epoch_005.parquet")
        for epoch in (20, 24):
            file = run_dir / table / f"epoch_{epoch:03d}.parquet"
            early.with_columns(epoch=pl.lit(epoch, pl.Int32)).write_parquet(file)
    for epoch in (20, 24):
        early_file = run_dir / "predictions" / "epoch_005.parquet"
        (run_dir / "predictions" / f"epoch_{epoch:03d}.parquet").write_bytes(early_file.read_bytes())
    rows = pl.read_parquet(run_dir / "evals" / "epoch_005.parquet")
    rows = rows.filter((pl.col("split") == "validation") & (pl.col("slice") == "all"))
    values = dict(zip(rows["metric"], rows["value"], strict=True))
    hashes = rows.select("weights_hash", "predictions_hash").row(0, named=True)

    def change(verdict: dict[str, Any]) -> None:
        verdict["criterion"]["value"] = values["sharpe_daily"]
        verdict["final"]["validation"] = values
        verdict.update(hashes)

    _verdict(run_dir, change)


def annualised_as_daily(run_dir: Path, other: Path) -> None:
    scale = pl.when(pl.col("metric") == "sharpe_daily").then(math.sqrt(245)).otherwise(1.0)
    _rewritten(run_dir, "evals", lambda rows: rows.with_columns(value=pl.col("value") * scale))
    _verdict(run_dir, lambda v: v["criterion"].update(value=v["criterion"]["value"] * math.sqrt(245)))


def evaluate_initial_weights() -> None:
    replace(WeightAverage, "update", lambda original: lambda self, model, step: None)


def evaluate_old_weights() -> None:
    """The averaged weights stop moving after a fifth of the steps."""
    replace(
        WeightAverage,
        "update",
        lambda original: lambda self, model, step: original(self, model, step) if step < 48 else None,
    )


def other_weights_scored() -> None:
    """From epoch 8 on, the weights of epoch 3 are scored as if they were the current ones."""
    kept: dict[str, Any] = {}

    def make(original: Any) -> Any:
        def score_splits(self: Any, epoch: int) -> Any:
            if epoch == 3:
                kept.update({k: v.clone() for k, v in self.average.model.state_dict().items()})
            if epoch < 8:
                return original(self, epoch)
            current = {k: v.clone() for k, v in self.average.model.state_dict().items()}
            self.average.model.load_state_dict(kept)
            scores = original(self, epoch)
            self.average.model.load_state_dict(current)
            return scores

        return score_splits

    replace(epoch_evaluation.EpochEvaluator, "score_splits", make)


def cached_predictions() -> None:
    cache: dict[int, Any] = {}

    def make(original: Any) -> Any:
        def score(model: Any, data: Any, sessions: Any, **options: Any) -> Any:
            if options.get("loss") is None and len(cache) < 1:
                return original(model, data, sessions, **options)
            key = int(sessions[0])
            if key not in cache:
                cache[key] = original(model, data, sessions, **options)
            return cache[key]

        return score

    replace(epoch_evaluation, "score_sessions", make)


def validation_overlaps_training() -> None:
    def make(original: Any) -> Any:
        def split(sessions: Any, config: Any) -> Any:
            correct = original(sessions, config)
            shifted = correct.train[-len(correct.validation) :]
            return type(correct)(**{**vars(correct), "validation": shifted})

        return split

    replace(training, "make_split", make)


def _panel(change: Callable[[Panel], None]) -> Callable[[], None]:
    """A plant that changes the panel in place after it is loaded."""

    def plant() -> None:
        def make(original: Any) -> Any:
            def load(*arguments: Any, **options: Any) -> Panel:
                panel = original(*arguments, **options)
                change(panel)
                return panel

            return load

        replace(training, "load_panel", make)

    return plant


def trains_on_validation() -> None:
    """Training also draws the sessions of validation."""

    def make(original: Any) -> Any:
        def shuffled(self: Any, epoch: int) -> Any:
            rng = np.random.default_rng([self.config.train.seed, epoch])
            sessions = np.concatenate([self.split.train, self.split.validation])
            blocks = self.data.sessions_per_block(sessions, self.config.train.batch_size)
            return [blocks[number] for number in rng.permutation(len(blocks))]

        return shuffled

    replace(training.Trainer, "_shuffled_blocks", make)


def _shift_targets(panel: Panel) -> None:
    panel.targets[1:] = panel.targets[:-1].copy()


def sign_inverted() -> None:
    def make(original: Any) -> Any:
        def score(*arguments: Any, **options: Any) -> Any:
            scores = original(*arguments, **options)
            return type(scores)(scores.sessions, -scores.values, scores.loss_raw, scores.loss_weighted)

        return score

    replace(epoch_evaluation, "score_sessions", make)


def sign_inverted_in_metric() -> None:
    def make(original: Any) -> Any:
        def evaluated(scores: Any, *arguments: Any) -> Any:
            flipped = type(scores)(scores.sessions, -scores.values, scores.loss_raw, scores.loss_weighted)
            return original(flipped, *arguments)

        return evaluated

    replace(epoch_evaluation, "evaluate_scores", make)


def sharpe_of_rows() -> None:
    """Reports the Sharpe of single positions: mean over std of the score-signed returns of all rows."""

    def make(original: Any) -> Any:
        def evaluated(scores: Any, panel: Panel, universe: Any, config: Any) -> Any:
            result = original(scores, panel, universe, config)
            values, target = scores.values[:, :, 0], panel.targets[scores.sessions, :, 0]
            signed = (np.sign(values - np.nanmedian(values, axis=1, keepdims=True)) * target).ravel()
            signed = signed[np.isfinite(signed)]
            pooled = type(result.statistics["sharpe_daily"])(float(signed.mean() / signed.std()), "per session", None)
            result.statistics["sharpe_daily"] = pooled
            return result

        return evaluated

    replace(epoch_evaluation, "evaluate_scores", make)


def constant_scores_ranked() -> None:
    def make_scores(original: Any) -> Any:
        def score(*arguments: Any, **options: Any) -> Any:
            scores = original(*arguments, **options)
            values = np.where(np.isfinite(scores.values), np.float32(0.25), np.float32(np.nan))
            return type(scores)(scores.sessions, values, scores.loss_raw, scores.loss_weighted)

        return score

    replace(epoch_evaluation, "score_sessions", make_scores)
    replace(evaluate, "_unrankable", lambda original: lambda *arguments: "")


def nan_scores_ranked() -> None:
    """A third of the scores is missing and is ranked as 0."""

    def make(original: Any) -> Any:
        def score(*arguments: Any, **options: Any) -> Any:
            scores = original(*arguments, **options)
            values = scores.values.copy()
            values[:, ::3] = np.where(np.isfinite(values[:, ::3]), np.float32(0.0), np.float32(np.nan))
            return type(scores)(scores.sessions, values, scores.loss_raw, scores.loss_weighted)

        return score

    replace(epoch_evaluation, "score_sessions", make)


def batch_dependent() -> None:
    """In evaluation, a stock's mean score over the block is subtracted from its scores."""

    def make(original: Any) -> Any:
        def forward(self: Any, block: Any) -> Any:
            scores = original(self, block)
            return scores if self.training else scores - scores.mean(dim=1, keepdim=True)

        return forward

    replace(ATFTGATFAN, "forward", make)


# Data ------------------------------------------------------------------------------------------------------------


def _dataset_file(change: Callable[[pl.DataFrame], pl.DataFrame]) -> Callable[[Path, Path], None]:
    def plant(dataset: Path, graph: Path) -> None:
        target = dataset.resolve()
        rows = pl.read_parquet(target)
        change(rows).select(rows.columns).cast(dict(rows.schema)).write_parquet(target)

    return plant


def look_ahead(rows: pl.DataFrame) -> pl.DataFrame:
    """`returns_1d` contains a share of the future target."""
    past = pl.col("returns_1d")
    z = pl.col("target_1d").fill_null(0.0) / pl.col("target_1d").std()
    return rows.with_columns(returns_1d=past + 0.3 * past.std() * z)


def future_graph(dataset: Path, graph: Path) -> None:
    """Every graph is replaced by the one 12 refreshes later."""
    edges = pl.read_parquet(graph.resolve())
    dates = edges["Date"].unique().sort()
    earlier = dict(zip(dates[12:], dates[:-12], strict=True))
    kept = edges.filter(pl.col("Date").is_in(dates[12:])).with_columns(
        Date=pl.col("Date").replace_strict(earlier, return_dtype=edges.schema["Date"])
    )
    kept.sort("Date", maintain_order=True).write_parquet(graph.resolve())


def _few_names_found(panel: Panel) -> None:
    """All but the last 13 features are not found by name, so their columns stay 0."""
    panel.features[:, :, :-13] = 0.0


def _unit_error(panel: Panel) -> None:
    """From validation on, volatilities are in per cent."""
    start = int(0.6 * len(panel.sessions))
    scaled = [number for number, name in enumerate(panel.feature_names) if "volatility" in name or name == "bb_width"]
    panel.features[start:, :, scaled] *= 100.0


def _sorted_by_name(panel: Panel) -> None:
    """From validation on, columns are sorted by name."""
    start = int(0.6 * len(panel.sessions))
    panel.features[start:] = panel.features[start:][:, :, np.argsort(panel.feature_names)]


def filter_on_validation() -> None:
    """From validation on, only rows with a target beyond 0.01 count: a filter that was meant for training."""

    def make(original: Any) -> Any:
        def load(*arguments: Any, **options: Any) -> Panel:
            panel = original(*arguments, **options)
            start = int(0.6 * len(panel.sessions))
            large = np.nan_to_num(np.abs(panel.targets[start:, :, 0])) > 0.01
            panel.member[start:] &= large
            return panel

        return load

    replace(training, "load_panel", make)


def regime_shift() -> None:
    """From session 300 on, every signal changes its sign."""
    seen = {"sessions": 0}

    def make(original: Any) -> Any:
        def combine(self: Any, *arguments: Any) -> Any:
            seen["sessions"] += 1
            return original(self, *arguments) * (1.0 if seen["sessions"] < 300 else -1.0)

        return combine

    replace(synthetic._Signals, "combine", make)


def survivors_only(dataset: Path, graph: Path) -> None:
    """The dataset lacks the stocks that lost most over the whole period."""
    rows = pl.read_parquet(dataset.resolve())
    total = rows.group_by("Code").agg(total=pl.col("target_1d").mean())
    kept = total.filter(pl.col("total") > total["total"].quantile(0.4))["Code"].to_list()
    for path in (dataset.resolve(), membership_path(dataset)):
        pl.read_parquet(path).filter(pl.col("Code").is_in(kept)).write_parquet(path)


# Optimisation ----------------------------------------------------------------------------------------------------


def scheduler_never_steps() -> None:
    replace(LearningRateSchedule, "step", lambda original: lambda self: None)


def scheduler_wrong_direction() -> None:
    """The plateau schedule waits for the loss to rise instead of to fall."""
    replace(LearningRateSchedule, "epoch_end", lambda original: lambda self, loss: original(self, -loss))


def decays_every_step_as_epoch() -> None:
    """The schedule is given a twelfth of the steps."""

    def make(original: Any) -> Any:
        def init(self: Any, optimizer: Any, config: Any, total_steps: int) -> None:
            original(self, optimizer, config, total_steps // 12)

        return init

    replace(LearningRateSchedule, "__init__", make)


def sgd_clipped_hard() -> None:
    """Trains with plain SGD: unlike Adam, it does not rescale clipped gradients."""

    def make(original: Any) -> Any:
        def optimizer(model: nn.Module, config: Any) -> Any:
            return torch.optim.SGD(model.parameters(), lr=config.train.optimizer.lr)

        return optimizer

    replace(training, "_optimizer", make)


def parameters_in_bf16() -> None:
    """Parameters are rounded to bf16 after each step, so small updates are lost."""

    def make(original: Any) -> Any:
        def step(self: Any, *arguments: Any, **options: Any) -> Any:
            result = original(self, *arguments, **options)
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.copy_(parameter.bfloat16().float())
            return result

        return step

    replace(torch.optim.AdamW, "step", make)


def steps_skipped() -> None:
    """No step is taken, as with a loss scaler that finds no scale."""
    replace(torch.optim.AdamW, "step", lambda original: lambda self, *arguments, **options: None)


def _without(*components: str) -> Callable[[], None]:
    """A plant that leaves the components out of the optimizer."""

    def plant() -> None:
        def make(original: Any) -> Any:
            def optimizer(model: nn.Module, config: Any) -> Any:
                optimizer_of_all = original(model, config)
                left_out = {id(p) for name in components for p in model.get_submodule(name).parameters()}
                for group in optimizer_of_all.param_groups:
                    group["params"] = [p for p in group["params"] if id(p) not in left_out]
                return optimizer_of_all

            return optimizer

        replace(training, "_optimizer", make)

    return plant


def _frozen(*components: str) -> Callable[[], None]:
    def plant() -> None:
        def make(original: Any) -> Any:
            def new_model(self: Any, seed: int) -> Any:
                model = original(self, seed)
                for name in components:
                    model.get_submodule(name).requires_grad_(False)
                return model

            return new_model

        replace(training.Trainer, "_new_model", make)

    return plant


def encoder_bypassed() -> None:
    """The temporal encoder's output is multiplied by 0 before the graph and the fusion read it."""
    from atft_pipeline.model.temporal_encoder import BackboneProjection

    replace(BackboneProjection, "forward", lambda original: lambda self, state: 0.0 * original(self, state))


def zeros_reach_head() -> None:
    """The head reads zeros of padding instead of the last session's state."""
    from atft_pipeline.model.prediction_head import PredictionHead

    replace(PredictionHead, "forward", lambda original: lambda self, state: original(self, torch.zeros_like(state)))


# Loss ------------------------------------------------------------------------------------------------------------


def _term(name: str, change: Callable[[Any], Any]) -> Callable[[], None]:
    def plant() -> None:
        losses.SESSION_TERMS[name] = change(losses.SESSION_TERMS[name])

    return plant


def sharpe_swallowed() -> None:
    """An exception in the Sharpe term is swallowed, and 0 is returned."""
    replace(CompositeLoss, "_sharpe", lambda original: lambda self, batch, epoch: 0.0 * batch.score.sum())


def ic_detached() -> None:
    replace(
        losses, "correlation_loss", lambda original: lambda batch: original(batch._replace(score=batch.score.detach()))
    )
    losses.SESSION_TERMS["ic"] = losses.correlation_loss


def _loss_on(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
    """A plant that changes the targets `[N, S, H]` of the training loss only; blocks and evaluation keep theirs."""

    def plant() -> None:
        def make(original: Any) -> Any:
            def call(self: Any, score: Any, target: Any, *arguments: Any, **options: Any) -> Any:
                return original(self, score, change(target) if score.requires_grad else target, *arguments, **options)

            return call

        replace(CompositeLoss, "__call__", make)

    return plant


def _of_three_stocks(target: torch.Tensor) -> torch.Tensor:
    reduced = target.clone()
    reduced[3:] = float("nan")
    return reduced


def weight_read_by_nothing() -> None:
    """The training loss is the squared error alone, whatever the configuration says."""

    def make(original: Any) -> Any:
        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            loss = original(self, *arguments, **options)
            if not loss.total.requires_grad:
                return loss
            batch = losses.standardise(*arguments[:3])
            total = losses.averaged("mse", batch, self.config.horizon_weights) * self.config.mse
            return loss._replace(total=total)

        return call

    replace(CompositeLoss, "__call__", make)


def labels_of_other_stocks() -> None:
    """In training only, targets are matched to the stocks in another order."""

    def make(original: Any) -> Any:
        def block(self: BlockDataset, indices: Any) -> Any:
            result = original(self, indices)
            limit = int(0.6 * len(self.panel.sessions))
            if int(indices[-1]) < limit - 21:
                order = torch.randperm(result.target.shape[0], generator=torch.Generator().manual_seed(int(indices[0])))
                result.target.copy_(result.target[order])
            return result

        return block

    replace(BlockDataset, "block", make)


def labels_of_previous_session() -> None:
    """In training only, every session has the targets of the session before it in its block."""

    def make(original: Any) -> Any:
        def block(self: BlockDataset, indices: Any) -> Any:
            result = original(self, indices)
            if int(indices[-1]) < int(0.6 * len(self.panel.sessions)) - 21:
                result.target.copy_(result.target.roll(1, dims=1))
            return result

        return block

    replace(BlockDataset, "block", make)


def penalty_floor_out_of_reach() -> None:
    """Sets the dispersion floor to 10: scores would reach a floor of 1, and the squared error then corrects them."""
    losses.DISPERSION_FLOOR = 10.0


# Capacity --------------------------------------------------------------------------------------------------------


def predictions_collapse() -> None:
    """The head's last layer shrinks after every step."""

    def make(original: Any) -> Any:
        def step(self: Any, block: Any, epoch: int, **options: Any) -> Any:
            result = original(self, block, epoch, **options)
            with torch.no_grad():
                self.model.prediction_head.output.weight.mul_(0.2)
            return result

        return step

    replace(training.Trainer, "_step", make)


def _states(change: Callable[[Any], Any], *components: str) -> Callable[[], None]:
    """A plant that changes the output of components, `[N, S, D]`."""

    def plant() -> None:
        def make(original: Any) -> Any:
            def init(self: Any, *arguments: Any, **options: Any) -> None:
                original(self, *arguments, **options)
                for name in components:
                    self.get_submodule(name).register_forward_hook(lambda module, inputs, output: change(output))

            return init

        replace(ATFTGATFAN, "__init__", make)

    return plant


def _smoothed(output: Any) -> Any:
    """Nearly the same state for all stocks. Their mean would not do: it depends on which stocks are in the block.

    Differences are scaled by as little as a millionth, because AdamW makes the same update of any gradient far above
    its epsilon of 1e-8.
    """
    return 1e-6 * output + torch.linspace(-1.0, 1.0, output.shape[-1])


def graph_alone_and_smooth() -> None:
    """The fusion reads the graph's states only, and these are nearly the same for all stocks."""
    from atft_pipeline.model.fusion import Fusion

    _states(_smoothed, "gat")()
    replace(Fusion, "forward", lambda original: lambda self, states: original(self, [states[1]] * len(states)))


def _mostly_dead(output: Any) -> Any:
    alive = torch.zeros(output.shape[-1])
    alive[:1] = 1.0
    return output * alive


def _sharpened(factor: float) -> Callable[[], None]:
    """A plant by which attention puts all weight on one position, whatever it has learnt."""

    def plant() -> None:
        def make(original: Any) -> Any:
            def init(self: Any, *arguments: Any, **options: Any) -> None:
                original(self, *arguments, **options)
                for name, module in self.named_modules():
                    if name.endswith("attention_map"):
                        module.register_forward_hook(
                            lambda module, inputs, output: (factor * (output + 1e-12).log()).softmax(dim=-1)
                        )

            return init

        replace(ATFTGATFAN, "__init__", make)

    return plant


# Runtime ---------------------------------------------------------------------------------------------------------


def slow_loader() -> None:
    def make(original: Any) -> Any:
        def block(self: Any, indices: Any) -> Any:
            time.sleep(0.2)
            return original(self, indices)

        return block

    replace(BlockDataset, "block", make)


def not_deterministic() -> None:
    """Seeds are taken from the clock."""
    replace(torch, "manual_seed", lambda original: lambda seed: original(time.time_ns() % 2**62))


def infinite_scores() -> None:
    def make(original: Any) -> Any:
        def forward(self: Any, block: Any) -> Any:
            scores = original(self, block)
            planted = self.training and int(block.session_index[0]) % 7 == 0
            return scores * torch.inf if planted else scores

        return forward

    replace(ATFTGATFAN, "forward", make)


def resumed_without_optimizer() -> None:
    """A resumed run has lost the state of schedule and optimizer."""

    def make(original: Any) -> Any:
        def load(self: Any, state: dict[str, Any]) -> None:
            self.model.load_state_dict(state["model"])
            self.average.model.load_state_dict(state["average"])
            self.step, self.guard.low_checks = state["step"], state["guard_low_checks"]

        return load

    replace(training.Trainer, "_load_state", make)


def crash_at_epoch_8() -> None:
    def make(original: Any) -> Any:
        def epoch(self: Any, number: int) -> None:
            if number == 8:
                raise Planted("the data source went away")
            original(self, number)

        return epoch

    replace(training.Trainer, "_epoch", make)


# Faults without a rule -------------------------------------------------------------------------------------------


def noisy_gradients() -> None:
    """Noise 20 times as large as the gradient is added before every step."""

    def make(original: Any) -> Any:
        def step(self: Any, *arguments: Any, **options: Any) -> Any:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        size = parameter.grad.norm() / max(parameter.numel(), 1) ** 0.5
                        parameter.grad += 20.0 * size * torch.randn_like(parameter.grad)
            return original(self, *arguments, **options)

        return step

    replace(torch.optim.AdamW, "step", make)


def ascent_every_second_step() -> None:
    """Every second step goes up the loss."""
    count = {"steps": 0}

    def make(original: Any) -> Any:
        def step(self: Any, *arguments: Any, **options: Any) -> Any:
            count["steps"] += 1
            if count["steps"] % 2 == 0:
                for group in self.param_groups:
                    for parameter in group["params"]:
                        if parameter.grad is not None:
                            parameter.grad.neg_()
            return original(self, *arguments, **options)

        return step

    replace(torch.optim.AdamW, "step", make)


def weights_forgotten_every_epoch() -> None:
    """At the end of every epoch the weights are initialised again."""

    def make(original: Any) -> Any:
        def epoch(self: Any, number: int) -> None:
            original(self, number)
            self.model.load_state_dict(self._new_model(number).state_dict())

        return epoch

    replace(training.Trainer, "_epoch", make)


BODY = ("variable_selection", "temporal_encoder", "backbone_projection", "gat", "fusion")
"""Every learning component except the head."""
NARROW: Settings = {
    "model.skip": False, "model.hidden_size": 4, "model.attention_heads": 1, "model.gat_heads": 1,
}  # fmt: skip
"""A model of 4 units: with 16, a head would learn nearly as much from random features as from learned ones."""
SHARPE_TERM: Settings = {"train.loss.sharpe": 0.3}
IC_TERM: Settings = {"train.loss.ic": 0.5}

_ALL: tuple[Fault, ...] = (
    # Evaluation
    Fault("metric_of_other_run", "metric_of_other_run", record=metric_of_other_run, only_report=True),
    Fault("evals_of_other_run", "metric_of_other_run", record=evals_of_other_run, only_report=True),
    Fault("frozen_at_other_run", "metric_of_other_run", record=frozen_at_other_run, only_report=True),
    Fault("maximum_over_history", "maximum_over_history", record=maximum_over_history, only_report=True),
    Fault("early_epoch_as_final", "early_epoch_as_final", record=early_epoch_as_final, only_report=True),
    Fault("initial_checkpoint", "initial_checkpoint", code=evaluate_initial_weights, only_report=True),
    Fault("old_checkpoint", "wrong_checkpoint", code=evaluate_old_weights, only_report=True),
    Fault("other_weights_scored", "cached_predictions", code=other_weights_scored, only_report=True),
    Fault("cached_predictions", "cached_predictions", code=cached_predictions, only_report=True),
    Fault("wrong_split", "wrong_split", code=validation_overlaps_training, only_report=True),
    Fault("trains_on_validation", "wrong_split", code=trains_on_validation, only_report=True),
    Fault("target_shifted", "target_shifted", code=_panel(_shift_targets), only_report=True),
    Fault("sign_inverted", "sign_inverted", code=sign_inverted, only_report=True),
    Fault("sign_inverted_in_metric", "sign_inverted", code=sign_inverted_in_metric, only_report=True),
    Fault("annualised_as_daily", "unit_of_sharpe", record=annualised_as_daily, only_report=True),
    Fault("sharpe_of_rows", "unit_of_sharpe", code=sharpe_of_rows, only_report=True),
    Fault("constant_scores_ranked", "unrankable_scores_ranked", code=constant_scores_ranked, only_report=True),
    Fault("nan_scores_ranked", "unrankable_scores_ranked", code=nan_scores_ranked, only_report=True),
    Fault("batch_dependent", "evaluation_depends_on_batch", code=batch_dependent, only_report=True),
    # Data
    Fault("look_ahead", "look_ahead_in_feature", data=_dataset_file(look_ahead), only_report=True),
    Fault("future_graph", "future_graph", data=future_graph, only_report=True),
    Fault("features_not_found", "features_missing", code=_panel(_few_names_found)),
    Fault("unit_error", "unit_error", {"model.normalisation": "none"}, code=_panel(_unit_error)),
    Fault("columns_sorted", "inputs_altered", code=_panel(_sorted_by_name)),
    Fault("filter_on_validation", "train_filter_on_validation", code=filter_on_validation, only_report=True),
    Fault("regime_shift", "regime_shift", generate=regime_shift),
    Fault("survivorship", "survivorship", data=survivors_only, only_report=True),
    Fault("no_signal", "no_signal", market={"strength": 0.0}),
    # Optimisation
    Fault("lr_too_high", "lr_too_high", {"train.optimizer.lr": 0.3}),
    Fault("lr_too_low", "lr_too_low", {"train.optimizer.lr": 1e-6}),
    Fault("lr_decayed_early", "lr_decayed_early", code=decays_every_step_as_epoch),
    Fault("scheduler_never_steps", "scheduler_never_steps", code=scheduler_never_steps),
    Fault(
        "scheduler_wrong_direction",
        "scheduler_wrong_direction",
        {
            "train.schedule.name": "plateau", "train.schedule.patience": 1, "train.schedule.factor": 0.05,
            "train.optimizer.lr": 2e-4,
        },
        code=scheduler_wrong_direction,
    ),
    Fault("clipping_too_tight", "clipping_too_tight", {
        "train.optimizer.clip_norm": 1e-3, "train.optimizer.lr": 0.1}, code=sgd_clipped_hard),
    Fault("parameters_in_bf16", "updates_lost", {"train.optimizer.lr": 1e-4}, code=parameters_in_bf16),
    Fault("steps_skipped", "updates_lost", code=steps_skipped),
    Fault("optimizer_lacks_all_but_head", "not_in_optimizer", NARROW, code=_without(*BODY)),
    Fault("frozen", "frozen_component", NARROW, code=_frozen(*BODY)),
    Fault("encoder_bypassed", "encoder_bypassed", {"model.skip": False, "model.graph": True}, code=encoder_bypassed),
    Fault("zeros_reach_head", "zeros_reach_head", code=zeros_reach_head),
    # Loss
    Fault("sharpe_swallowed", "term_without_effect", {"train.loss.mse": 0.0, **SHARPE_TERM}, code=sharpe_swallowed),
    Fault("ic_detached", "term_without_effect", {"train.loss.mse": 0.0, **IC_TERM}, code=ic_detached),
    Fault("weight_read_by_nothing", "term_without_effect", {"train.loss.mse": 0.0, **IC_TERM},
          code=weight_read_by_nothing),
    Fault("terms_in_conflict", "terms_in_conflict", {"train.loss.rank_ic": 1.0},
          code=_term("rank_ic", lambda original: lambda batch: 2.0 - original(batch))),
    Fault("variance_penalty_dominates", "variance_penalty_dominates", {"train.loss.variance_penalty": 30.0},
          code=penalty_floor_out_of_reach),
    Fault("trained_towards_minus", "term_reversed", code=_loss_on(torch.neg)),
    Fault("loss_of_few_stocks", "loss_altered", code=_loss_on(_of_three_stocks)),
    Fault("loss_of_other_stocks", "loss_altered", code=_loss_on(lambda target: target.roll(1, 0))),
    Fault("labels_of_other_stocks", "labels_misaligned", code=labels_of_other_stocks),
    Fault("labels_of_previous_session", "labels_misaligned", code=labels_of_previous_session),
    # Capacity
    Fault("underfit", "underfit", {
        **NARROW, "model.graph": False, "model.dropout": 0.9, "train.optimizer.weight_decay": 30.0}),
    Fault("overfit", "overfit", {
        "split.train_fraction": 0.2, "train.batch_size": 1200, "train.optimizer.lr": 5e-3,
        "train.optimizer.weight_decay": 0.0, "model.hidden_size": 32, "train.weight_ema": 0.0}),
    Fault("predictions_collapse", "predictions_collapse", code=predictions_collapse),
    Fault("over_smoothing", "over_smoothing", {"model.skip": False}, code=graph_alone_and_smooth),
    Fault("no_dispersion", "no_dispersion", code=_states(_smoothed, "fusion")),
    Fault("dead_units", "dead_units", {"model.skip": False, "model.graph": False},
          code=_states(_mostly_dead, "variable_selection", "temporal_encoder", "fusion")),
    Fault("attention_collapse", "attention_collapse", {"model.skip": False}, code=_sharpened(1e4)),
    # Runtime
    Fault("slow_loader", "starved_loader", code=slow_loader, only_report=True),
    Fault("not_deterministic", "not_deterministic", code=not_deterministic, only_report=True),
    Fault("infinite_scores", "non_finite", code=infinite_scores, only_report=True),
    Fault("resumed_without_optimizer", "resumed_wrongly", code=resumed_without_optimizer, resumed=True,
          only_report=True),
    Fault("crash", "crashed", code=crash_at_epoch_8, only_report=True),
)  # fmt: skip

_STRANGE: tuple[Fault, ...] = (
    Fault("noisy_gradients", "unknown", code=noisy_gradients),
    Fault("ascent_every_second_step", "unknown", code=ascent_every_second_step),
    Fault("weights_forgotten", "unknown", code=weights_forgotten_every_epoch),
)

FAULTS: dict[str, Fault] = {fault.id: fault for fault in (*_ALL, *_STRANGE)}
"""Plants by id."""
UNKNOWN_FAULTS: frozenset[str] = frozenset(fault.id for fault in _STRANGE)
"""Plants without a rule or cause of their own: the diagnosis must not name another cause with confidence."""
