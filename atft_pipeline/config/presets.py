"""Run sizes as functions. A preset is a whole configuration; what it does not name keeps the stage's default."""

from __future__ import annotations

from collections.abc import Callable

from atft_pipeline.config.schema import (
    GraphConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PipelineConfig,
    SplitConfig,
    TrainConfig,
)
from atft_pipeline.errors import InputError


def quick() -> PipelineConfig:
    """The embedded synthetic market in minutes on two cores.

    It has 75,000 training samples, which a rate of 1e-3 memorises: validation IC peaks at epoch 4 and is gone by epoch
    50. At a tenth of it the IC still stands there, whatever the weight decay (0.01 to 10 tried).
    """
    return PipelineConfig(
        split=SplitConfig(scheme="fraction", train_fraction=0.6, validation_fraction=0.2),
        train=TrainConfig(batch_size=200 * 16, optimizer=OptimizerConfig(lr=1e-4)),
    )


def cpu() -> PipelineConfig:
    """Real quotes on a laptop; the architecture of the trial on the real decade (DESIGN.md), trained to forget noise.

    Chosen on validation years alone (2010, 2011 and 2012, three to five years of training before each, 8 epochs, one
    seed), by the mean of daily ICs: rate 3e-3 with decay 2 and no dropout 0.052; the trial's rate 1e-3 with decay 0.01,
    dropout 0.1 and all horizons weighted 0.042; longer horizons weighted 0.5 and 0.25 0.048; without `san` 0.038.
    Decay times rate bounds how long a step is remembered: at 20 epochs decay 1 had 0.046, decay 3 0.050. The other
    horizons' heads are fitted, and shape nothing else.
    """
    return PipelineConfig(
        split=SplitConfig(scheme="sessions", validation_sessions=250, test_sessions=250),
        model=ModelConfig(dropout=0.0),
        train=TrainConfig(
            batch_size=420 * 16,
            optimizer=OptimizerConfig(lr=3e-3, weight_decay=2.0),
            loss=LossConfig(horizon_weights=(1.0, 0.001, 0.001, 0.001)),
        ),
    )


def production() -> PipelineConfig:
    """Full universe on a CUDA device, bf16-mixed.

    A batch is 16 sessions of 4,000 stocks, the fewest that the Sharpe term uses at once. Two sessions (8,192) would
    encode 61 for the 2 they score: 3.7 times the bytes an epoch, by count (bench/training/gpu.py); no GPU was at hand.
    """
    return PipelineConfig(
        graph=GraphConfig(neighbours=20),
        split=SplitConfig(scheme="sessions", validation_sessions=250, test_sessions=250),
        model=ModelConfig(hidden_size=256, window_sessions=60, encoder_layers=2, attention_heads=8, gat_heads=4),
        train=TrainConfig(
            batch_size=65_536,
            precision="bf16-mixed",
            loader_workers=8,
            optimizer=OptimizerConfig(lr=5e-4),
            loss=LossConfig(mse=1.0, ic=0.1, rank_ic=0.1, sharpe=0.1, variance_penalty=0.01),
        ),
    )


PRESETS: dict[str, Callable[[], PipelineConfig]] = {"quick": quick, "cpu": cpu, "production": production}


def preset(name: str) -> PipelineConfig:
    """The preset called `name`; raises InputError that lists the known ones."""
    if name not in PRESETS:
        raise InputError(f"preset: expected one of {', '.join(sorted(PRESETS))}, found {name!r}")
    return PRESETS[name]()
