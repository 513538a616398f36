"""The verdict on a run and the gate of the long one: pure rules over numbers that others measured.

The success criterion: `sharpe_daily`, gross, horizon 1, in the configured slice of the validation split, with the
weights at the end of the criterion epoch, is strictly above the threshold. It is read at that epoch only, never as a
maximum, and only of a run whose validity battery holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from atft_pipeline.config.schema import EvaluationConfig
from atft_pipeline.verdict.validity import ValidityItem

Status = Literal["passed", "failed", "invalid", "not_applicable"]

SUFFICIENT_PSR = 0.95
"""A pass with a lower probability of a positive Sharpe reads "insufficient evidence"."""
GRADIENT_FLOOR_L2 = 1e-7
HEALTHY_DISPERSION_RATIO = 1e-3
MAX_DEGENERACY_RESETS = 5
TARGET_SHARPE = 0.849


@dataclass(frozen=True)
class CriterionEvidence:
    """The evaluation at the end of the criterion epoch."""

    value: float | None
    se: float | None
    psr_0: float | None
    sessions: int | None
    valid: bool = True
    reason: str = ""
    """Why the evaluation is invalid: constant or non-finite scores."""


@dataclass(frozen=True)
class Progress:
    """What the milestones are held against."""

    sharpe_by_epoch: Mapping[int, float | None] = field(default_factory=dict)
    """Validation `sharpe_daily` of the epochs evaluated."""
    gradient_warnings: int | None = 0
    degeneracy_resets: int | None = 0
    crashed: bool = False


@dataclass(frozen=True)
class HealthItem:
    name: str
    passed: bool | None
    """None: not recorded."""
    value: float | None
    tolerance: float | None
    explanation: str


@dataclass(frozen=True)
class Milestone:
    """An expectation of the validation report; missing it warns, it never decides."""

    name: str
    epoch: int | None
    value: float | None
    expected: str
    passed: bool | None
    """None: not reached or not measured."""


MILESTONES: tuple[tuple[int, float, float], ...] = ((5, 0.08, 0.10), (20, 0.10, 0.15), (50, 0.15, 0.30))
"""Epoch and the range of the daily Sharpe expected by then; above the range is no miss."""
BEYOND_50: tuple[float, float] = (0.30, 0.85)


CRITERION_FIELDS: tuple[str, ...] = ("criterion_sharpe", "criterion_epoch", "universe", "quantile")
"""Fields of the evaluation that define the criterion; their defaults are the definition."""


def changed_criterion(config: EvaluationConfig) -> str | None:
    """How `config` departs from the success criterion as defined, or None."""
    defined = EvaluationConfig()
    changes = [
        f"{name} {getattr(config, name)} instead of {getattr(defined, name)}"
        for name in CRITERION_FIELDS
        if getattr(config, name) != getattr(defined, name)
    ]
    return ", ".join(changes) or None


def judge(
    *,
    config: EvaluationConfig,
    epochs_planned: int,
    epochs_done: int,
    evidence: CriterionEvidence | None,
    validity: Sequence[ValidityItem],
    health: Sequence[HealthItem],
    progress: Progress,
    reversal_sharpe: float | None,
    final: Mapping[str, Any],
    identifiers: Mapping[str, str | None],
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Content of `verdict.json`, plain JSON types, NaN as null.

    Order of the rules: a run that stopped before the criterion epoch although it was planned to reach it fails; an
    invalid evaluation or a validity item that failed, is not assessable or was never measured is `invalid`; a run
    planned shorter is `not_applicable`; then the threshold decides, and a missing value never passes.
    `identifiers` holds run_key, config_key, dataset_fingerprint, weights_hash and predictions_hash; `warnings` are
    further ones, such as the lag scan's. `reversal_sharpe` is that of the best one-factor reversal under the same
    evaluation.
    """
    status, why = _status(config, epochs_planned, epochs_done, evidence, validity)
    if epochs_done < config.criterion_epoch:
        evidence = None  # another epoch's figures must not stand under the criterion's name
    milestones = progress_milestones(progress, epochs_planned)
    return {
        "status": status,
        "summary": _summary(status, why, config, evidence),
        "criterion": {
            "metric": "sharpe_daily",
            "threshold": config.criterion_sharpe,
            "epoch": config.criterion_epoch,
            "value": _number(evidence.value) if evidence else None,
            "se": _number(evidence.se) if evidence else None,
            "psr_0": _number(evidence.psr_0) if evidence else None,
            "split": "validation",
            "slice": config.universe,
            "sessions": evidence.sessions if evidence else None,
            "gross": True,
        },
        "final": _plain(final),
        "warnings": [
            *([f"not the success criterion as defined: {changed}"] if (changed := changed_criterion(config)) else []),
            *_evidence_warnings(status, evidence),
            *_reversal_warning(evidence, reversal_sharpe),
            *(f"training health: {item.name}: {item.explanation}" for item in health if item.passed is not True),
            *(_milestone_warning(m) for m in milestones if m.passed is False),
            *warnings,
        ],
        "validity": [_plain(asdict(item)) for item in validity],
        "health": [_plain(asdict(item)) for item in health],
        "milestones": [_plain(asdict(item)) for item in milestones],
        "reversal_sharpe": _number(reversal_sharpe),
        **identifiers,
    }


def _status(
    config: EvaluationConfig,
    planned: int,
    done: int,
    evidence: CriterionEvidence | None,
    validity: Sequence[ValidityItem],
) -> tuple[Status, str]:
    epoch = config.criterion_epoch
    if done < epoch <= planned:
        return "failed", f"stopped after epoch {done} of {planned}, before the criterion epoch {epoch}"
    if evidence is not None and not evidence.valid:
        return "invalid", evidence.reason
    if not validity:
        return "invalid", "the validity battery was not run"
    for item in validity:
        if item.passed is False:
            return "invalid", f"{item.name}: {item.explanation}"
    for item in validity:
        if item.passed is None:
            return "invalid", f"{item.name} is {item.explanation}"
    if planned < epoch:
        return "not_applicable", f"{planned} epochs are fewer than the criterion epoch {epoch}"
    value = _number(evidence.value) if evidence else None
    if value is None:
        return "failed", f"no Sharpe was measured at epoch {epoch}"
    return ("passed" if value > config.criterion_sharpe else "failed"), ""


def _summary(status: Status, why: str, config: EvaluationConfig, evidence: CriterionEvidence | None) -> str:
    """One line that needs no other context."""
    label = status.replace("_", " ")
    if why:
        return f"{label}: {' '.join(why.split())}"
    assert evidence is not None
    if status == "passed" and not _sufficient(evidence):
        label = "passed, insufficient evidence"
    figures = [f"daily, gross, {config.universe}, validation, epoch {config.criterion_epoch}"]
    if (se := _number(evidence.se)) is not None:
        figures.append(f"se {se:.3f}, {evidence.sessions} sessions")
    if label != status and (psr := _number(evidence.psr_0)) is not None:
        figures.append(f"PSR(0) {psr:.2f} < {SUFFICIENT_PSR}")
    sign = ">" if status == "passed" else "not above"
    sharpe, threshold = _apart(float(evidence.value or 0.0), config.criterion_sharpe)
    return f"{label}: Sharpe {sharpe} ({'; '.join(figures)}) {sign} {threshold}"


def _apart(value: float, threshold: float) -> tuple[str, str]:
    """Both as text, with the digits it takes to see on which side the value lies: 0.1002 > 0.10, not 0.100 > 0.10."""
    for digits in range(3, 10):
        text = f"{value:.{digits}f}"
        if value == threshold or float(text) != threshold:
            break
    return text, f"{threshold:.2f}" if float(f"{threshold:.2f}") == threshold else repr(threshold)


def _sufficient(evidence: CriterionEvidence) -> bool:
    psr = _number(evidence.psr_0)
    return psr is not None and psr >= SUFFICIENT_PSR


def _evidence_warnings(status: Status, evidence: CriterionEvidence | None) -> list[str]:
    if status != "passed" or evidence is None or _sufficient(evidence):
        return []
    psr = _number(evidence.psr_0)
    known = "unknown" if psr is None else f"{psr:.2f}"
    return [
        f"insufficient evidence: PSR(0) is {known}, below {SUFFICIENT_PSR}; more validation sessions would settle it"
    ]


def _reversal_warning(evidence: CriterionEvidence | None, reversal_sharpe: float | None) -> list[str]:
    reversal, value = _number(reversal_sharpe), _number(evidence.value) if evidence else None
    if evidence is None or value is None:
        return []
    if reversal is None:
        return ["the one-factor reversal was not measured: nothing says that the model is worth more than one factor"]
    if reversal < value:
        return []
    return [f"one-factor reversal earns as much: daily Sharpe {reversal:.3f} against the model's {value:.3f}"]


def progress_milestones(progress: Progress, epochs_planned: int) -> list[Milestone]:
    """The report's expectations, as far as the run was planned to reach them."""
    items = []
    for epoch, low, high in MILESTONES:
        if epoch <= epochs_planned:
            items.append(_sharpe_milestone(f"sharpe_by_epoch_{epoch}", epoch, low, high, progress))
    if epochs_planned > MILESTONES[-1][0]:
        low, high = BEYOND_50
        items.append(_sharpe_milestone("sharpe_beyond_epoch_50", epochs_planned, low, high, progress))
        items.append(_sharpe_milestone("target_sharpe", epochs_planned, TARGET_SHARPE, math.inf, progress))
    warnings, resets = progress.gradient_warnings, progress.degeneracy_resets
    items.append(_count_milestone("gradient_warnings", warnings, "0", lambda n: n == 0))
    items.append(
        _count_milestone(
            "degeneracy_resets", resets, f"fewer than {MAX_DEGENERACY_RESETS}", lambda n: n < MAX_DEGENERACY_RESETS
        )
    )
    items.append(Milestone("no_crash", None, float(progress.crashed), "no crash", not progress.crashed))
    return items


def _sharpe_milestone(name: str, epoch: int, low: float, high: float, progress: Progress) -> Milestone:
    value = _number(progress.sharpe_by_epoch.get(epoch))
    expected = f"at least {low}" if math.isinf(high) else f"{low:.2f} to {high:.2f}"
    return Milestone(name, epoch, value, expected, None if value is None else value >= low)


def _count_milestone(name: str, count: int | None, expected: str, good: Callable[[int], bool]) -> Milestone:
    if count is None:
        return Milestone(name, None, None, expected, None)
    return Milestone(name, None, float(count), expected, good(count))


def _milestone_warning(milestone: Milestone) -> str:
    value = "none" if milestone.value is None else f"{milestone.value:.3g}"
    return f"milestone {milestone.name}: expected {milestone.expected}, found {value}"


# Training health ------------------------------------------------------------------------------------------------


def finite_losses(losses: Sequence[float | None]) -> HealthItem:
    """Passes when every recorded loss of a step or epoch is finite; value: how many are not."""
    if not losses:
        return HealthItem("finite_losses", None, None, 0.0, "no loss is recorded")
    broken = sum(_number(loss) is None for loss in losses)
    return HealthItem("finite_losses", broken == 0, float(broken), 0.0, f"{broken} of {len(losses)} losses not finite")


def gradients_reach_components(grad_l2: Mapping[str, float | None]) -> HealthItem:
    """Passes when the mean gradient l2 of every trainable component is at least 1e-7; value: the smallest."""
    name = "gradients_reach_every_component"
    if not grad_l2:
        return HealthItem(name, None, None, GRADIENT_FLOOR_L2, "no component's gradient is recorded")
    sizes = {component: _number(l2) or 0.0 for component, l2 in grad_l2.items()}
    starved = sorted(component for component, l2 in sizes.items() if l2 < GRADIENT_FLOOR_L2)
    return HealthItem(
        name,
        not starved,
        min(sizes.values()),
        GRADIENT_FLOOR_L2,
        f"gradient l2 below {GRADIENT_FLOOR_L2:g} in: {', '.join(starved) or 'no component'}",
    )


def parameters_moved(movement: Mapping[str, float | None]) -> HealthItem:
    """Passes when the weights of every component differ from their initial ones; value: the smallest movement.

    `movement` is the l2 distance from the initial weights per component with trainable parameters.
    """
    if not movement:
        return HealthItem("parameters_moved", None, None, 0.0, "no component's movement is recorded")
    distances = {component: _number(distance) or 0.0 for component, distance in movement.items()}
    still = sorted(component for component, distance in distances.items() if distance <= 0.0)
    return HealthItem(
        "parameters_moved",
        not still,
        min(distances.values()),
        0.0,
        f"weights as they were initialised in: {', '.join(still) or 'no component'}",
    )


def predictions_not_constant(dispersion_ratio: float | None) -> HealthItem:
    """Passes when the last within-session std of predictions over the target's is at least 0.001."""
    name, floor = "predictions_not_constant", HEALTHY_DISPERSION_RATIO
    ratio = _number(dispersion_ratio)
    if ratio is None:
        return HealthItem(name, None, None, floor, "the dispersion of the predictions is not recorded")
    return HealthItem(name, ratio >= floor, ratio, floor, f"dispersion of predictions is {ratio:.2e} of the target's")


# The gate of the long run -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GateDecision:
    open: bool
    message: str
    override_recorded: str | None = None
    """The reason given for overriding; None when none was given."""


def gate_decision(
    check: Mapping[str, Any] | None,
    materialization: Mapping[str, Any] | None,
    current: Mapping[str, Any],
    override_reason: str | None = None,
    *,
    model: str = "model_20ep",
) -> GateDecision:
    """Whether the long run may start, given the last evaluation of the short run's success criterion.

    `check`: `status` (a verdict's), `timestamp` in seconds, `dataset_fingerprint`, `config_key` (epochs apart), and
    where known `summary` and `run_id`. `materialization`: `timestamp` and where known `run_id` of the last
    materialization of `model`; a check of the same `run_id` belongs to it whatever the order of the two events.
    `current`: `dataset_fingerprint` and `config_key` of the long run. An `override_reason` opens the gate and is
    recorded, even where it was not needed; a blank one counts as none.
    """
    refusal = _refusal(check, materialization, current, model)
    reason = (override_reason or "").strip() or None
    if refusal is None:
        summary = (check or {}).get("summary") or "passed"
        return GateDecision(True, f"gate open: {model}: {summary}", reason)
    if reason is not None:
        return GateDecision(True, f"gate opened by override ({reason}), although {refusal}", reason)
    return GateDecision(
        False,
        f"gate shut: {refusal}; run `dagster asset materialize --select {model}`, or set override_reason in this"
        " asset's config",
    )


def _refusal(
    check: Mapping[str, Any] | None,
    materialization: Mapping[str, Any] | None,
    current: Mapping[str, Any],
    model: str,
) -> str | None:
    """Why the gate stays shut, or None."""
    if materialization is None:
        return f"{model} was never materialized"
    if check is None:
        return f"the success criterion of {model} was never evaluated"
    same_run = check.get("run_id") is not None and check.get("run_id") == materialization.get("run_id")
    if not same_run and float(check["timestamp"]) < float(materialization["timestamp"]):
        return f"the last evaluation of the success criterion is older than the last materialization of {model}"
    for key, what in (("dataset_fingerprint", "another dataset"), ("config_key", "another configuration")):
        if not check.get(key) or check.get(key) != current.get(key):
            found, expected = str(check.get(key) or "unknown")[:12], str(current.get(key) or "unknown")[:12]
            return f"the verdict of {model} is of {what} ({key} {found}, now {expected})"
    status = str(check.get("status"))
    if status != "passed":
        return f"the success criterion of {model} {_REFUSED.get(status, f'has status {status}')}{_quoted(check)}"
    return None


_REFUSED: dict[str, str] = {
    "failed": "failed",
    "invalid": "has no valid verdict",
    "not_applicable": "did not apply to its last run",
}


def _quoted(check: Mapping[str, Any]) -> str:
    return f" ({check['summary']})" if check.get("summary") else ""


# Plain JSON -------------------------------------------------------------------------------------------------------


def _number(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """`value` with every number that is not finite as None, recursively: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return _number(value)
    return value
