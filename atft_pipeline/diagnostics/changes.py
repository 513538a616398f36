"""Changes of a run's configuration that a remedy or an experiment asks for.

A change is relative to the run's own value. Presets differ by factors of a hundred, so a fixed learning rate that is
lower than one preset's is higher than another's. A change that would not move its setting in the stated direction is
left out, with the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from atft_pipeline.config.overrides import leaves, to_dict, with_overrides
from atft_pipeline.config.schema import PipelineConfig
from atft_pipeline.errors import InputError
from atft_pipeline.inspection.reader import Record

Verb = Literal["raise", "lower", "set"]
Values = Mapping[str, Any]
"""Dotted field -> value, of a whole configuration."""

LOSS = "train.loss."
PHASES = "train.loss.phases"


@dataclass(frozen=True)
class Change:
    """A change of one field, made by `raised`, `lowered` or `switched`."""

    field: str
    verb: Verb
    times: float = 1.0
    at_least: float = -math.inf
    at_most: float = math.inf
    to: Any = None
    only_if: tuple[str, Any] | None = None
    """Another field and the value that it must have: elsewhere the changed field has no effect."""

    def new(self, old: Any) -> Any:
        """The value after the change, of the same type: three digits of a float, whole numbers stay whole."""
        if self.verb == "set":
            return self.to
        value = min(max(old * self.times, self.at_least), self.at_most)
        if isinstance(old, int):
            return math.ceil(value) if self.verb == "raise" else math.floor(value)
        return float(f"{value:.3g}")

    def moves(self, old: Any, new: Any) -> bool:
        """Whether `new` differs from `old` in the direction of the verb."""
        return bool({"raise": new > old, "lower": new < old}[self.verb] if self.verb != "set" else new != old)


def raised(
    field: str,
    times: float,
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    only_if: tuple[str, Any] | None = None,
) -> Change:
    """Raises the field to `times` its value, within `at_least` and `at_most`; no change where that is no rise."""
    return Change(field, "raise", times, at_least=at_least, at_most=at_most, only_if=only_if)


def lowered(field: str, times: float, *, at_least: float = -math.inf, only_if: tuple[str, Any] | None = None) -> Change:
    """Lowers the field to `times` its value, not below `at_least`; no change where that is no fall."""
    return Change(field, "lower", times, at_least=at_least, only_if=only_if)


def switched(field: str, to: Any) -> Change:
    """Sets the field to `to`; no change where it has that value already."""
    return Change(field, "set", to=to)


@dataclass(frozen=True)
class Settings:
    """The result of changes for one run."""

    overrides: dict[str, Any]
    made: tuple[str, ...]
    """What each change does, with old and new value."""
    left_out: tuple[str, ...]
    """Why a change does nothing, for each one that is left out."""

    @property
    def sentence(self) -> str:
        return "; ".join(part for part in (", ".join(self.made), ", ".join(self.left_out)) if part)


def values_of(record: Record) -> dict[str, Any]:
    """The run's configuration by dotted field. A field that is missing or has another type gets its default."""
    defaults = leaves(to_dict(PipelineConfig()))
    return {field: _recorded(record.config(field), default) for field, default in defaults.items()}


def _recorded(value: Any, default: Any) -> Any:
    if isinstance(default, float) and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else default
    return value if type(value) is type(default) or default is None else default


def plan_changes(changes: Sequence[Change], values: Values) -> Settings:
    """Applies the changes to a configuration one after the other; leaves out those that the configuration refuses."""
    overrides: dict[str, Any] = {}
    made: list[str] = []
    left_out: list[str] = []
    without_effect: list[str] = []
    for change in changes:
        if change.only_if and values[change.only_if[0]] != change.only_if[1]:
            without_effect.append(f"`{change.field}` counts only where `{change.only_if[0]}` is {change.only_if[1]}")
            continue
        old = _in_force(change.field, values)
        new = change.new(old)
        if not change.moves(old, new):
            left_out.append(f"`{change.field}` is {text_of(old)} already")
            continue
        fields = _fields(change.field, new, values, overrides)
        refusal = _refusal(values, overrides | fields)
        if refusal:
            left_out.append(f"`{change.field}` stays {text_of(old)}, since {text_of(new)} is refused ({refusal})")
            continue
        overrides |= fields
        made.append(f"{change.verb} `{change.field}` from {text_of(old)} to {text_of(new)}")
    return Settings(overrides, tuple(made), tuple(left_out or ([] if made else without_effect)))


def _phases(values: Values) -> list[dict[str, Any]]:
    phases = values[PHASES]
    return [phase for phase in phases if isinstance(phase, dict) and isinstance(phase.get("weights"), dict)]


def _in_force(field: str, values: Values) -> Any:
    """The field's value; for a loss term its largest weight, because a phase replaces the base weight."""
    term = field.removeprefix(LOSS)
    weights = [phase["weights"][term] for phase in _phases(values) if term in phase["weights"]]
    return max(values[field], *weights) if field.startswith(LOSS) and weights else values[field]


def _fields(field: str, new: Any, values: Values, overrides: Values) -> dict[str, Any]:
    """Fields to set so that `new` takes effect: for a loss term also the phases that name it."""
    term = field.removeprefix(LOSS)
    phases = _phases({PHASES: overrides.get(PHASES, values[PHASES])})
    if not field.startswith(LOSS) or not any(term in phase["weights"] for phase in phases):
        return {field: new}
    renewed = [
        phase | {"weights": phase["weights"] | ({term: new} if term in phase["weights"] else {})} for phase in phases
    ]
    return {field: new, PHASES: renewed}


def _refusal(values: Values, overrides: Values) -> str:
    """Why the configuration does not allow the overrides; empty where it does."""
    try:
        with_overrides(PipelineConfig(), dict(values) | dict(overrides))
    except InputError as error:
        return str(error)
    return ""


def text_of(value: Any) -> str:
    """A value as `--set FIELD=VALUE` takes it."""
    return value if isinstance(value, str) else json.dumps(value)
