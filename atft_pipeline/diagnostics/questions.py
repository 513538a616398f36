"""The questions of a validation report. Each rule answers one of them; the report answers all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Question:
    """`quiet`: the answer while none of its rules fires."""

    text: str
    quiet: Literal["yes", "no"] = "no"

    @property
    def fired(self) -> Literal["yes", "no"]:
        """The answer where one of its rules fires."""
        return "yes" if self.quiet == "no" else "no"


SHARPE_IS_OWN = Question("Is the Sharpe this run's own?", quiet="yes")
SHARPE_FOLLOWS_WEIGHTS = Question("Does the Sharpe depend on the weights?", quiet="yes")
DEGENERATE = Question("Are the predictions degenerate?")
INPUTS_REACH_MODEL = Question("Do the features reach the model as the dataset has them?", quiet="yes")
DATASET_IS_OF_SOURCE = Question("Is the dataset what its source gives?", quiet="yes")
CRASHED = Question("Did the run crash?")
WHOLE = Question("Is the run whole, repeatable and fed in time?", quiet="yes")
CRITERION_DECIDED = Question("Is the criterion decided?", quiet="yes")
IC_FLAT = Question("IC flat?")
IC_RISES_ALONE = Question("IC rising with Sharpe flat?")
OVERFITTING = Question("Validation flat early: overfitting?")
BOTH_FLAT = Question("Both losses flat: capacity or features?")
LOSS_NOT_ALIGNED = Question("Both losses falling, Sharpe flat: loss not aligned?")
DECAYED_EARLY = Question("Learning rate below 1e-5 by epoch 20: decayed too early?")
RATE_TOO_LOW = Question("Learning rate around 1e-6: too low?")
NOT_STEPPING = Question("Learning rate constant: scheduler not stepping?")
SHARPE_TERM_ABSENT = Question("Sharpe term absent from the loss?")
SHARPE_WEIGHT_LOW = Question("Sharpe weight too low?")
GRADIENTS_FALLING = Question("Encoder gradients falling?")
GRADIENTS_LOW = Question("Encoder gradients low?")
GRADIENTS_RISING = Question("Encoder gradients rising?")
GRAPH_DOMINATES = Question("Graph gradients dominating?")
COMPONENTS_CONTRIBUTE = Question("Does every component contribute?", quiet="yes")
