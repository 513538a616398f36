"""One frozen dataclass per stage of the pipeline.

Every field changes behaviour. A field is set by a caller's mapping, by `atft train --set model.hidden_size=512`, or by
a variable of the validation report (`SHARPE_WEIGHT`, ...). All three end in `overrides.configured`, so an unknown name
is refused in one place. The values that a field allows are written once, in its `Literal`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from atft_pipeline.config.slices import DEFAULT_SLICE, Slice
from atft_pipeline.errors import InputError

HORIZONS: tuple[int, ...] = (1, 5, 10, 20)
"""Forecast horizons in sessions; the columns `target_{h}d` and the outputs of the prediction head, in this order."""

LOSS_TERMS: tuple[str, ...] = ("mse", "ic", "rank_ic", "sharpe", "variance_penalty")

Execution = Literal["next_open", "next_close", "same_close"]
EXECUTION_DELAY_SESSIONS: dict[Execution, int] = {"next_open": 1, "next_close": 1, "same_close": 0}
SplitScheme = Literal["fraction", "sessions", "dates"]
Normalisation = Literal["san", "fan", "revin", "none"]
ScheduleName = Literal["cosine", "plateau", "constant"]
Precision = Literal["float32", "bf16-mixed"]
PanelPlace = Literal["auto", "memory", "map"]
Probes = Literal["none", "leading", "all"]
EXPERIMENT_IDS = ("A", "B", "C", "D")
"""Experiments of the validation report."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _require_one_of(field: str, literal: Any, value: object) -> None:
    """Refuses a value that is not in the `Literal`."""
    *others, last = get_args(literal)
    require(value in (*others, last), f"{field}: expected {', '.join(others)} or {last}, found {value!r}")


@dataclass(frozen=True)
class DatasetConfig:
    """Which market, which rows are investable, and at which price a position is entered."""

    market: str = "tokyo"
    execution: Execution = "next_open"
    min_history_sessions: int = 60
    """A stock is investable from its n-th traded session on."""

    def __post_init__(self) -> None:
        _require_one_of("dataset.execution", Execution, self.execution)
        require(self.min_history_sessions >= 1, "dataset.min_history_sessions: expected at least 1")


@dataclass(frozen=True)
class GraphConfig:
    """Trailing-correlation k-NN graph. 250 sessions find twice as many true peers as 60."""

    lookback_sessions: int = 250
    neighbours: int = 10
    refresh_sessions: int = 5
    """Sessions between two graphs; a session uses the newest graph at or before it."""
    sector_demeaned: bool = True
    shrinkage: float = 0.1
    """Weight of the zero matrix: edge_attr corr = (1 - shrinkage) * sample correlation."""
    universe: Slice = DEFAULT_SLICE

    def __post_init__(self) -> None:
        require(self.lookback_sessions >= 20, "graph.lookback_sessions: expected at least 20")
        require(self.neighbours >= 1, "graph.neighbours: expected at least 1")
        require(self.refresh_sessions >= 1, "graph.refresh_sessions: expected at least 1")
        require(0.0 <= self.shrinkage < 1.0, "graph.shrinkage: expected 0 <= value < 1")
        _require_one_of("graph.universe", Slice, self.universe)


@dataclass(frozen=True)
class SplitConfig:
    """Calendar split into train, validation and test, purged by the longest horizon plus the execution delay.

    `fraction` cuts the sessions by share; `sessions` takes the last `test_sessions` as test and the
    `validation_sessions` before them as validation; `dates` uses ISO dates (train_start <= train < validation_start <=
    validation < test_start <= test <= test_end).
    """

    scheme: SplitScheme = "fraction"
    train_fraction: float = 0.6
    validation_fraction: float = 0.2
    validation_sessions: int = 250
    test_sessions: int = 250
    train_start: str | None = None
    validation_start: str | None = None
    test_start: str | None = None
    test_end: str | None = None
    embargo_sessions: int = 0
    """Sessions left out after the purge, on top of it."""

    def __post_init__(self) -> None:
        _require_one_of("split.scheme", SplitScheme, self.scheme)
        require(
            self.train_fraction > 0
            and self.validation_fraction > 0
            and self.train_fraction + self.validation_fraction < 1,
            "split: train_fraction and validation_fraction must be positive and leave something for test",
        )
        require(
            self.validation_sessions >= 2 and self.test_sessions >= 2,
            "split: validation_sessions and test_sessions must be at least 2",
        )
        require(self.embargo_sessions >= 0, "split.embargo_sessions: expected at least 0")
        if self.scheme == "dates":
            require(
                self.validation_start is not None and self.test_start is not None,
                "split.scheme=dates needs validation_start and test_start",
            )


@dataclass(frozen=True)
class ModelConfig:
    hidden_size: int = 32
    window_sessions: int = 20
    """W, the sessions of history that a score may read: the lengths of the temporal encoder's bands sum to it."""
    feature_gates: bool = True
    """False leaves out the feature weights of the variable selection, so that every feature counts the same."""
    encoder_layers: int = 1
    """0 leaves the temporal encoder out: a score then reads its own session and the window of the normalisation."""
    attention_heads: int = 4
    normalisation: Normalisation = "san"
    normalisation_window_sessions: int = 20
    """Trailing sessions of the normalisation's statistics (`none` has none); they lengthen the receptive field."""
    fan_frequencies: int = 2
    """Fourier components that `fan` removes of each feature, the largest ones: K in the paper."""
    skip: bool = True
    """MLP of the session's own features straight into the fusion, beside the temporal path."""
    graph: bool = True
    """False leaves the `gat` component out."""
    gat_heads: int = 2
    dropout: float = 0.1

    def __post_init__(self) -> None:
        require(
            self.attention_heads >= 1 and self.gat_heads >= 1,
            f"model.attention_heads, model.gat_heads: expected at least 1, found {self.attention_heads} and"
            f" {self.gat_heads}",
        )
        require(
            self.hidden_size >= 4
            and self.hidden_size % self.attention_heads == 0
            and self.hidden_size % self.gat_heads == 0,
            f"model.hidden_size: expected at least 4 and a multiple of attention_heads ({self.attention_heads}) and"
            f" gat_heads ({self.gat_heads}), found {self.hidden_size}",
        )
        require(self.window_sessions >= 2, "model.window_sessions: expected at least 2")
        require(
            0 <= self.encoder_layers < self.window_sessions,
            "model.encoder_layers: expected at least 0 and fewer than window_sessions",
        )
        _require_one_of("model.normalisation", Normalisation, self.normalisation)
        require(self.normalisation_window_sessions >= 2, "model.normalisation_window_sessions: expected at least 2")
        require(
            self.normalisation != "fan" or 1 <= self.fan_frequencies <= self.normalisation_window_sessions // 2,
            "model.fan_frequencies: expected 1 to half of normalisation_window_sessions"
            f" ({self.normalisation_window_sessions}), found {self.fan_frequencies}",
        )
        require(0.0 <= self.dropout < 1.0, "model.dropout: expected 0 <= value < 1")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. `clip_norm` bounds the global gradient l2 norm."""

    lr: float = 1e-3
    weight_decay: float = 1e-2
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        require(0.0 <= self.lr <= 1e30, f"train.optimizer.lr: expected 0 to 1e30, found {self.lr}")
        require(self.weight_decay >= 0.0, "train.optimizer.weight_decay: expected at least 0")
        require(self.clip_norm > 0.0, "train.optimizer.clip_norm: expected a positive value")


@dataclass(frozen=True)
class ScheduleConfig:
    """`cosine`: linear warm-up, then cosine to `min_lr_ratio`. `plateau`: lr *= factor after `patience` epochs without
    a better validation loss. `constant`: the warm-up, then flat."""

    name: ScheduleName = "cosine"
    warmup_fraction: float = 0.05
    min_lr_ratio: float = 0.01
    patience: int = 5
    factor: float = 0.5

    def __post_init__(self) -> None:
        _require_one_of("train.schedule.name", ScheduleName, self.name)
        require(0.0 <= self.warmup_fraction < 1.0, "train.schedule.warmup_fraction: expected 0 <= value < 1")
        require(0.0 <= self.min_lr_ratio <= 1.0, "train.schedule.min_lr_ratio: expected 0 <= value <= 1")
        require(self.patience >= 0, "train.schedule.patience: expected at least 0")
        require(0.0 < self.factor < 1.0, "train.schedule.factor: expected 0 < value < 1")


@dataclass(frozen=True)
class LossPhase:
    """Weights that replace the base weights from `first_epoch` to `last_epoch`, both included, counted from 1."""

    first_epoch: int
    last_epoch: int
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        require(
            1 <= self.first_epoch <= self.last_epoch,
            f"train.loss.phases: expected 1 <= first <= last epoch, found {self.first_epoch}-{self.last_epoch}",
        )
        unknown = sorted(set(self.weights) - set(LOSS_TERMS))
        require(not unknown, f"train.loss.phases: unknown loss terms {unknown}; expected some of {list(LOSS_TERMS)}")
        for term, weight in self.weights.items():
            require(weight >= 0.0, f"train.loss.phases: weight of {term}: expected at least 0, found {weight}")


@dataclass(frozen=True)
class LossConfig:
    """Weights of the five terms and of the horizons; a phase replaces weights of terms for some epochs."""

    mse: float = 1.0
    ic: float = 0.0
    rank_ic: float = 0.0
    sharpe: float = 0.0
    variance_penalty: float = 0.0
    horizon_weights: tuple[float, ...] = (1.0, 0.5, 0.25, 0.25)
    phases: tuple[LossPhase, ...] = ()

    def __post_init__(self) -> None:
        for term in LOSS_TERMS:
            weight = getattr(self, term)
            require(weight >= 0.0, f"train.loss.{term}: expected at least 0, weights must not be negative: {weight}")
        require(
            len(self.horizon_weights) == len(HORIZONS) and all(w >= 0 for w in self.horizon_weights),
            f"train.loss.horizon_weights: expected {len(HORIZONS)} values, none negative, for horizons {HORIZONS}",
        )
        require(
            self.horizon_weights[0] > 0,
            "train.loss.horizon_weights: horizon 1 decides the verdict, its weight must be positive",
        )
        spans = sorted((p.first_epoch, p.last_epoch) for p in self.phases)
        require(
            all(earlier[1] < later[0] for earlier, later in itertools.pairwise(spans)),
            "train.loss.phases: two phases cover the same epoch",
        )

    def weights_at(self, epoch: int) -> dict[str, float]:
        """Weight of each term in `epoch`, from 1. A phase sets the terms it names; the others keep theirs."""
        weights = {term: float(getattr(self, term)) for term in LOSS_TERMS}
        for phase in self.phases:
            if phase.first_epoch <= epoch <= phase.last_epoch:
                weights.update(phase.weights)
        return weights


@dataclass(frozen=True)
class GuardConfig:
    """Degeneracy guard: within-session std of predictions under `dispersion_ratio` of the target's for `patience`
    checks (one per epoch) in a row after `warmup_epochs` re-draws the head's last layer. Healthy is 0.014 to 0.1."""

    dispersion_ratio: float = 1e-3
    patience: int = 3
    warmup_epochs: int = 1

    def __post_init__(self) -> None:
        require(self.dispersion_ratio > 0.0, "train.guard.dispersion_ratio: expected a positive value")
        require(self.patience >= 1, "train.guard.patience: expected at least 1")
        require(self.warmup_epochs >= 0, "train.guard.warmup_epochs: expected at least 0")


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = 20
    seed: int = 1
    batch_size: int = 4096
    """Stock-session samples per batch: the most whole sessions that fit, at least one."""
    universe: Slice = DEFAULT_SLICE
    precision: Precision = "float32"
    weight_ema: float = 0.995
    """Decay of the averaged weights that are evaluated and kept; 0 evaluates the raw weights."""
    panel: PanelPlace = "auto"
    """Where the panel is kept; it changes no result. `memory`: in memory, on the device where it fits. `map`: a memory
    map of a file in the run directory. `auto`: maps a panel that does not fit into memory."""
    loader_workers: int = 0
    """Threads that prepare blocks ahead; a panel in a memory map always has one."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "train.epochs: expected at least 1")
        different = min(self.epochs, 1 + max((phase.last_epoch for phase in self.loss.phases), default=0))
        without = next((e for e in range(1, different + 1) if not any(self.loss.weights_at(e).values())), None)
        require(without is None, f"train.loss: at least one weight must be positive; in epoch {without} none is")
        require(self.batch_size >= 1, "train.batch_size: expected at least 1")
        require(0 <= self.seed < 2**63, "train.seed: expected 0 <= value < 2**63")
        _require_one_of("train.universe", Slice, self.universe)
        _require_one_of("train.precision", Precision, self.precision)
        require(0.0 <= self.weight_ema < 1.0, "train.weight_ema: expected 0 <= value < 1")
        _require_one_of("train.panel", PanelPlace, self.panel)
        require(self.loader_workers >= 0, "train.loader_workers: expected at least 0")


@dataclass(frozen=True)
class EvaluationConfig:
    """Definition of the reported Sharpe, and of the criterion that it must meet."""

    cost_bps: float = 10.0
    quantile: float = 0.2
    """Share of the stocks in each leg: floor(n * quantile)."""
    universe: Slice = DEFAULT_SLICE
    criterion_sharpe: float = 0.10
    criterion_epoch: int = 20
    bootstrap_samples: int = 1000

    def __post_init__(self) -> None:
        require(0.0 <= self.cost_bps < math.inf, "evaluation.cost_bps: expected at least 0 and finite")
        require(0.0 < self.quantile <= 0.5, "evaluation.quantile: expected 0 < value <= 0.5")
        _require_one_of("evaluation.universe", Slice, self.universe)
        require(self.criterion_epoch >= 1, "evaluation.criterion_epoch: expected at least 1")
        require(self.bootstrap_samples >= 1, "evaluation.bootstrap_samples: expected at least 1")


@dataclass(frozen=True)
class PipelineConfig:
    """Everything that decides a run, stage by stage."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    graph: GraphConfig = field(default_factory=GraphConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
