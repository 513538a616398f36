"""What can be wrong with a run: one row per cause, in the order in which they should be ruled out.

One row covers several faults where nothing in a run's record or inputs can tell them apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from atft_pipeline.diagnostics.changes import Change, lowered, raised, switched
from atft_pipeline.diagnostics.experiments.plan import BY_ID as EXPERIMENTS

CauseGroup = Literal["evaluation", "data", "optimisation", "loss", "capacity", "runtime", "noise"]

HEALTHY, UNKNOWN = "healthy", "unknown"
"""The classes beside the causes: nothing is wrong; something is wrong that no row describes."""

PROVABLE: tuple[CauseGroup, ...] = ("evaluation",)
"""Groups whose causes make the report false. While a rule proves one of them, no other cause is ranked."""


@dataclass(frozen=True)
class Cause:
    id: str
    name: str
    group: CauseGroup
    probe: str
    """Name of the probe (probes.run.PROBES) that confirms or refutes it."""
    prior: float
    """Relative odds before any evidence. Not learned: planted runs show how causes look, not how often they occur."""


def _rows(group: CauseGroup, *rows: tuple[str, str, str, float]) -> tuple[Cause, ...]:
    return tuple(Cause(id, name, group, probe, prior) for id, name, probe, prior in rows)


CAUSES: tuple[Cause, ...] = (
    *_rows(
        "evaluation",
        ("metric_of_other_run", "the figures reported are another run's", "rescore", 1.0),
        ("maximum_over_history", "the Sharpe reported is the best of all epochs, not the criterion's", "rescore", 1.0),
        ("early_epoch_as_final", "an early epoch is presented as a later one", "rescore", 1.0),
        ("initial_checkpoint", "the initial weights were evaluated", "rescore", 1.0),
        ("wrong_checkpoint", "weights of an outdated checkpoint were evaluated", "rescore", 1.0),
        (
            "cached_predictions",
            "the predictions are not the current weights': cached, or scored with a fixed checkpoint",
            "rescore",
            1.0,
        ),
        ("wrong_split", "training or evaluation used other sessions than the split's", "data", 1.0),
        ("target_shifted", "the evaluated targets are not the dataset's, e.g. shifted by a session", "data", 1.0),
        ("sign_inverted", "the sign of the scores is inverted between model and evaluation", "rescore", 1.0),
        ("unit_of_sharpe", "the Sharpe is not a daily one: annualised, or pooled over rows", "rescore", 1.0),
        ("unrankable_scores_ranked", "constant or missing scores were ranked", "rescore", 1.0),
        ("evaluation_depends_on_batch", "a score depends on the batch it is computed in, or on chance", "rescore", 1.0),
        ("train_filter_on_validation", "the evaluation left out rows of its universe", "data", 1.0),
    ),
    *_rows(
        "data",
        ("look_ahead_in_feature", "a feature contains information from the future", "data", 1.0),
        ("future_graph", "the graph uses correlations that were not known yet", "graph", 0.5),
        ("features_missing", "features do not reach the model: not found, filled or constant", "data", 1.0),
        ("unit_error", "a feature changes its unit", "data", 1.0),
        ("inputs_altered", "the model reads other columns or values than the dataset holds", "data", 0.5),
        ("labels_misaligned", "training targets belong to other stocks or sessions than their features", "data", 0.5),
        ("survivorship", "the dataset lacks stocks or rows that its source has", "data", 0.5),
        ("regime_shift", "relations of the training sessions reverse in validation", "baseline", 0.5),
        ("no_signal", "the features do not predict the target", "baseline", 1.0),
    ),
    *_rows(
        "optimisation",
        ("lr_too_high", "the learning rate is too high", "remedy", 1.0),
        ("lr_too_low", "the learning rate is too low", "remedy", 1.0),
        ("lr_decayed_early", "the learning rate decayed too early", "remedy", 1.0),
        ("scheduler_never_steps", "the scheduler does not step", "remedy", 1.0),
        ("scheduler_wrong_direction", "the plateau schedule follows the wrong metric or direction", "remedy", 0.5),
        ("clipping_too_tight", "gradients are clipped to almost nothing, which SGD does not undo", "remedy", 0.5),
        ("updates_lost", "updates are lost: undone, skipped, or below the precision of the parameters", "replay", 0.5),
        ("not_in_optimizer", "parameters are missing from the optimizer", "ablate", 1.0),
        ("frozen_component", "a component is frozen", "ablate", 1.0),
        ("encoder_bypassed", "the encoder is bypassed: its output does not reach the head", "ablate", 1.0),
        ("zeros_reach_head", "the head reads zeros or padding", "ablate", 0.5),
    ),
    *_rows(
        "loss",
        (
            "term_without_effect",
            "a loss term has a weight and no effect: left out, detached, or its weight is never read",
            "remedy",
            1.0,
        ),
        ("term_reversed", "the training raises a loss term instead of lowering it: a wrong sign", "remedy", 0.5),
        ("loss_altered", "the loss that is minimised is not that of these scores, targets and weights", "remedy", 0.5),
        ("sharpe_term_light", "the loss has no Sharpe term, or a negligible one", "remedy", 0.3),
        ("terms_in_conflict", "the gradients of loss terms oppose each other", "remedy", 0.5),
        ("variance_penalty_dominates", "the variance penalty dominates the loss", "remedy", 0.5),
    ),
    *_rows(
        "capacity",
        ("underfit", "underfitting: the model is too small or too constrained for the signal", "baseline", 1.0),
        ("overfit", "overfitting: the training loss falls, and validation does not follow", "baseline", 1.0),
        ("predictions_collapse", "the predictions collapse towards a constant", "ablate", 1.0),
        ("no_dispersion", "the stocks look alike to the head: no cross-sectional dispersion", "ablate", 1.0),
        ("over_smoothing", "the graph smooths the stocks' differences away", "ablate", 0.5),
        ("dead_units", "most units are dead", "ablate", 0.5),
        ("attention_collapse", "attention puts almost all its weight on one position", "ablate", 0.5),
    ),
    *_rows(
        "runtime",
        ("crashed", "the run ended with an error, or was killed", "replay", 1.0),
        ("non_finite", "a loss or gradient was not finite", "replay", 1.0),
        ("starved_loader", "training waits for data", "replay", 0.5),
        ("not_deterministic", "the same seed gives other weights: a source of randomness is not seeded", "replay", 0.5),
        ("resumed_wrongly", "the run resumed from another state than it had stored", "replay", 0.5),
    ),
    *_rows("noise", ("sampling_noise", "too few sessions to tell the Sharpe from the threshold", "rescore", 0.3)),
)  # fmt: skip

BY_ID: dict[str, Cause] = {cause.id: cause for cause in CAUSES}
HEALTHY_PRIOR = 25.0
"""About the sum of all causes' priors: half of the diagnosed runs are assumed to be healthy."""
UNKNOWN_PRIOR = 2.0

REMEDIES: dict[str, tuple[Change, ...]] = {
    "lr_too_high": (lowered("train.optimizer.lr", 0.1),),
    "lr_too_low": (raised("train.optimizer.lr", 10, at_least=1e-3),),
    "lr_decayed_early": (switched("train.schedule.name", "constant"),),
    "scheduler_never_steps": (
        switched("train.schedule.name", "constant"),
        lowered("train.schedule.warmup_fraction", 0),
    ),
    "clipping_too_tight": (raised("train.optimizer.clip_norm", 10, at_least=1),),
    "sharpe_term_light": EXPERIMENTS["B"].changes,
    "terms_in_conflict": (lowered("train.loss.rank_ic", 0), lowered("train.loss.sharpe", 0)),
    "variance_penalty_dominates": (lowered("train.loss.variance_penalty", 0),),
}
"""Cause -> changes of settings that should remove it, which the probe `remedy` tries. Not every cause has a remedy."""
