"""The only code that turns text and mappings into configuration: a preset plus overrides, checked field by field."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from atft_pipeline.config.presets import preset
from atft_pipeline.config.schema import PipelineConfig, require
from atft_pipeline.errors import InputError


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as plain JSON types, tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: Mapping[str, Any]) -> PipelineConfig:
    """The configuration that `to_dict` wrote, validated again."""
    return _build(PipelineConfig, values, "")


def _build(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    require(
        not unknown,
        f"configuration: unknown field {where}{unknown[0] if unknown else ''}; expected one of {', '.join(hints)}",
    )
    return kind(**{name: _coerce(hints[name], value, f"{where}{name}") for name, value in values.items()})


def _coerce(kind: Any, value: Any, where: str) -> Any:
    """`value`, a JSON value, as the type a field declares; refuses rather than guesses."""
    origin = typing.get_origin(kind)
    try:
        if dataclasses.is_dataclass(kind):
            return _build(kind, value, f"{where}.")
        if origin is Literal:
            require(
                value in typing.get_args(kind),
                f"configuration: {where}: expected one of {list(typing.get_args(kind))}, found {value!r}",
            )
            return value
        if origin is tuple:
            return tuple(_coerce(typing.get_args(kind)[0], item, where) for item in value)
        if origin in (types.UnionType, typing.Union):
            inner = next(k for k in typing.get_args(kind) if k is not type(None))
            return None if value is None else _coerce(inner, value, where)
        if origin is not None and issubclass(origin, Mapping):
            return {str(k): _coerce(float, v, f"{where}.{k}") for k, v in value.items()}
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            # JSON has no infinity, so a record could not hold it; Python's parser reads the word all the same.
            require(math.isfinite(value), f"configuration: {where}: expected a finite number, found {value}")
            return float(value)
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
    except (TypeError, AttributeError) as error:
        raise InputError(f"configuration: {where}: cannot use {value!r} ({error})") from error
    raise InputError(f"configuration: {where}: expected {getattr(kind, '__name__', kind)}, found {value!r}")


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a configuration's dictionary by their dotted names."""
    fields: dict[str, Any] = {}
    for name, value in values.items():
        fields |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return fields


def with_overrides(config: PipelineConfig, overrides: Mapping[str, Any]) -> PipelineConfig:
    """`config` with dotted fields replaced, e.g. `{"model.hidden_size": 512}`.

    Raises InputError for a field that does not exist and for a value of another type.
    """
    values = to_dict(config)
    for dotted, value in overrides.items():
        *stages, leaf = dotted.split(".")
        target = values
        for depth, stage in enumerate(stages):
            inner = target.get(stage)
            require(
                isinstance(inner, dict),
                f"configuration: no section {'.'.join(stages[: depth + 1])!r} in {dotted!r};"
                f" sections: {_sections(values)}",
            )
            target = typing.cast(dict[str, Any], inner)
        require(leaf in target, f"configuration: unknown field {dotted!r}; expected one of {', '.join(sorted(target))}")
        # A whole section would quietly reset what the preset says about its other fields.
        require(not isinstance(target[leaf], dict), f"configuration: {dotted!r} is a section; set its fields by name")
        target[leaf] = value
    return from_dict(values)


def configured(
    preset_name: str,
    assigned: Mapping[str, Any],
    environment: Mapping[str, str],
    *,
    sections: Sequence[str],
    reader: str,
    where: str = "",
) -> tuple[PipelineConfig, dict[str, Any]]:
    """The configuration of a command or an asset, and what shaped it: the preset's name and every override.

    The preset comes first, then the report's variables in `environment`, then `assigned`; the later wins. `reader`
    reads only `sections`, and the report's variables count only where `train` is among them. Raises InputError for a
    preset or a field that does not exist, and for an assigned field outside `sections`, which would change nothing;
    `where` begins the latter's message.
    """
    for dotted in assigned:
        read = ", ".join(f"{section}.*" for section in sections)
        require(
            dotted.split(".")[0] in sections,
            f"{where}override {dotted!r} has no effect here; {reader} reads only {read}",
        )
    from_report = report_overrides(environment) if "train" in sections else {}
    overrides = {**from_report, **assigned}
    return with_overrides(preset(preset_name), overrides), {"preset": preset_name, **overrides}


def _sections(values: Mapping[str, Any]) -> str:
    return ", ".join(sorted(name for name, value in values.items() if isinstance(value, dict)))


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """`["train.optimizer.lr=1e-3"]` as `{"train.optimizer.lr": 0.001}`; a value that is not JSON stays a string."""
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        require(bool(separator) and bool(name), f"--set: expected FIELD=VALUE, found {assignment!r}")
        overrides[name.strip()] = _parse_value(text.strip())
    return overrides


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


REPORT_VARIABLES: dict[str, str] = {
    "SHARPE_WEIGHT": "train.loss.sharpe",
    "CS_IC_WEIGHT": "train.loss.ic",
    "RANKIC_WEIGHT": "train.loss.rank_ic",
    "VARIANCE_PENALTY_WEIGHT": "train.loss.variance_penalty",
    "PHASE_LOSS_WEIGHTS": "train.loss.phases",
    "PLATEAU_PATIENCE": "train.schedule.patience",
    "PLATEAU_FACTOR": "train.schedule.factor",
}
"""Variables of the validation report and the field each one sets."""


def report_overrides(environment: Mapping[str, str]) -> dict[str, Any]:
    """Overrides that the report's variables in `environment` ask for.

    `PHASE_LOSS_WEIGHTS` is a JSON object of epoch ranges, e.g. `{"1-5": {"mse": 1.0}, "6-50": {"sharpe": 0.3}}`.
    A `PLATEAU_*` variable also selects the plateau schedule, which alone reads it.
    """
    overrides: dict[str, Any] = {}
    for variable, dotted in REPORT_VARIABLES.items():
        text = environment.get(variable)
        if text is None or text == "":
            continue
        value = _parse_value(text)
        if variable == "PHASE_LOSS_WEIGHTS":
            value = _parse_phases(value)
        else:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            require(number, f"{variable}: expected a number for {dotted}, found {text!r}")
        overrides[dotted] = value
        if variable.startswith("PLATEAU_"):
            overrides["train.schedule.name"] = "plateau"
    return overrides


def _parse_phases(value: Any) -> list[dict[str, Any]]:
    require(isinstance(value, dict), 'PHASE_LOSS_WEIGHTS: expected JSON like {"1-5": {"mse": 1.0}}')
    phases = []
    for span, weights in value.items():
        epochs = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", span.strip())
        if epochs is None:
            raise InputError(f"PHASE_LOSS_WEIGHTS: expected an epoch range like '1-5', found {span!r}")
        first, last = epochs[1], epochs[2] or epochs[1]
        phases.append({"first_epoch": int(first), "last_epoch": int(last), "weights": weights})
    return phases
