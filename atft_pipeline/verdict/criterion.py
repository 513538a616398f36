"""The verdict on a run: pure rules over numbers that were measured elsewhere.

The success criterion: `sharpe_daily`, gross, horizon 1, in the configured slice of the validation split, with the
weights at the end of the criterion epoch, is strictly above the threshold. It is read at that epoch only, never as a
maximum over epochs, and only where the validity checks pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from atft_pipeline.config.schema import EvaluationConfig
from atft_pipeline.storage.json_values import finite_or_none, plain_json
from atft_pipeline.verdict.health import HealthItem
from atft_pipeline.verdict.milestones import TrainingProgress, milestone_warning, progress_milestones
from atft_pipeline.verdict.validity import ValidityItem

Status = Literal["passed", "failed", "invalid", "not_applicable"]

SUFFICIENT_PSR = 0.95
"""Probability of a positive Sharpe below which a pass reads "insufficient evidence"."""


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


CRITERION_FIELDS: tuple[str, ...] = ("criterion_sharpe", "criterion_epoch", "universe", "quantile")
"""Fields of the evaluation that define the criterion. Their defaults are the definition."""


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
    progress: TrainingProgress,
    reversal_sharpe: float | None,
    final: Mapping[str, Any],
    identifiers: Mapping[str, str | None],
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Content of `verdict.json` in plain JSON types, NaN as null.

    The first rule that applies decides:

    1. A run that was planned to reach the criterion epoch and stopped before it is `failed`.
    2. A run with an invalid evaluation is `invalid`, and so is one with a validity item that failed, is not assessable
       or was never measured.
    3. A run that was planned shorter is `not_applicable`.
    4. The threshold decides between `passed` and `failed`. A missing value never passes.

    `identifiers` holds run_key, config_key, dataset_fingerprint, weights_hash and predictions_hash. `warnings` are
    added to those of the rules. `reversal_sharpe` is the Sharpe of the best one-factor reversal under the same
    evaluation.
    """
    status, why = _status(config, epochs_planned, epochs_done, evidence, validity)
    if epochs_done < config.criterion_epoch:
        evidence = None  # figures of another epoch must not appear as the criterion's
    milestones = progress_milestones(progress, epochs_planned)
    return {
        "status": status,
        "summary": _summary(status, why, config, evidence),
        "criterion": _criterion_section(config, evidence),
        "final": plain_json(final),
        "warnings": [
            *_changed_warning(config),
            *_evidence_warnings(status, evidence),
            *_reversal_warning(evidence, reversal_sharpe),
            *(f"training health: {item.name}: {item.explanation}" for item in health if item.passed is not True),
            *(milestone_warning(m) for m in milestones if m.passed is False),
            *warnings,
        ],
        "validity": [plain_json(asdict(item)) for item in validity],
        "health": [plain_json(asdict(item)) for item in health],
        "milestones": [plain_json(asdict(item)) for item in milestones],
        "reversal_sharpe": finite_or_none(reversal_sharpe),
        **identifiers,
    }


def _criterion_section(config: EvaluationConfig, evidence: CriterionEvidence | None) -> dict[str, Any]:
    """What was asked of the run, and what was measured at the criterion epoch."""
    return {
        "metric": "sharpe_daily",
        "threshold": config.criterion_sharpe,
        "epoch": config.criterion_epoch,
        "value": finite_or_none(evidence.value) if evidence else None,
        "se": finite_or_none(evidence.se) if evidence else None,
        "psr_0": finite_or_none(evidence.psr_0) if evidence else None,
        "split": "validation",
        "slice": config.universe,
        "sessions": evidence.sessions if evidence else None,
        "gross": True,
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
        return "invalid", "the validity checks were not run"
    for item in validity:
        if item.passed is False:
            return "invalid", f"{item.name}: {item.explanation}"
    for item in validity:
        if item.passed is None:
            return "invalid", f"{item.name} is {item.explanation}"
    if planned < epoch:
        return "not_applicable", f"{planned} epochs are fewer than the criterion epoch {epoch}"
    value = finite_or_none(evidence.value) if evidence else None
    if value is None:
        return "failed", f"no Sharpe was measured at epoch {epoch}"
    return ("passed" if value > config.criterion_sharpe else "failed"), ""


def _summary(status: Status, why: str, config: EvaluationConfig, evidence: CriterionEvidence | None) -> str:
    """The verdict in one line that is understood without context."""
    label = status.replace("_", " ")
    if why:
        return f"{label}: {' '.join(why.split())}"
    assert evidence is not None
    if status == "passed" and not _sufficient(evidence):
        label = "passed, insufficient evidence"
    figures = [f"daily, gross, {config.universe}, validation, epoch {config.criterion_epoch}"]
    if (se := finite_or_none(evidence.se)) is not None:
        figures.append(f"se {se:.3f}, {evidence.sessions} sessions")
    if label != status and (psr := finite_or_none(evidence.psr_0)) is not None:
        figures.append(f"PSR(0) {psr:.2f} < {SUFFICIENT_PSR}")
    sign = ">" if status == "passed" else "not above"
    sharpe, threshold = _distinguishable(float(evidence.value or 0.0), config.criterion_sharpe)
    return f"{label}: Sharpe {sharpe} ({'; '.join(figures)}) {sign} {threshold}"


def _distinguishable(value: float, threshold: float) -> tuple[str, str]:
    """Both as text, with enough digits to show which is larger: 0.1002 > 0.10, not 0.100 > 0.10."""
    for digits in range(3, 10):
        text = f"{value:.{digits}f}"
        if value == threshold or float(text) != threshold:
            break
    return text, f"{threshold:.2f}" if float(f"{threshold:.2f}") == threshold else repr(threshold)


def _sufficient(evidence: CriterionEvidence) -> bool:
    psr = finite_or_none(evidence.psr_0)
    return psr is not None and psr >= SUFFICIENT_PSR


def _changed_warning(config: EvaluationConfig) -> list[str]:
    changed = changed_criterion(config)
    return [] if changed is None else [f"not the success criterion as defined: {changed}"]


def _evidence_warnings(status: Status, evidence: CriterionEvidence | None) -> list[str]:
    if status != "passed" or evidence is None or _sufficient(evidence):
        return []
    psr = finite_or_none(evidence.psr_0)
    shown = "unknown" if psr is None else f"{psr:.2f}"
    return [
        f"insufficient evidence: PSR(0) is {shown}, below {SUFFICIENT_PSR}; more validation sessions would settle it"
    ]


def _reversal_warning(evidence: CriterionEvidence | None, reversal_sharpe: float | None) -> list[str]:
    reversal, value = finite_or_none(reversal_sharpe), finite_or_none(evidence.value) if evidence else None
    if evidence is None or value is None:
        return []
    if reversal is None:
        return ["the one-factor reversal was not measured, so it is open whether the model earns more than one factor"]
    if reversal < value:
        return []
    return [f"one-factor reversal earns as much: daily Sharpe {reversal:.3f} against the model's {value:.3f}"]
