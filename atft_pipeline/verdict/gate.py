"""The gate of the long run: it opens when the short run of the same data and configuration has passed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GateDecision:
    """Whether the gate is open, and why."""

    open: bool
    message: str
    override_recorded: str | None = None
    """The reason given for overriding; None when none was given."""


def gate_decision(
    check: Mapping[str, Any] | None,
    newest: Mapping[str, Any] | None,
    current: Mapping[str, Any],
    override_reason: str | None = None,
    *,
    model: str = "the short run",
    way_on: str = "train it again until it passes",
) -> GateDecision:
    """Whether the long run may start, given the last check of the short run's success criterion.

    `check`: the verdict's `status`, `timestamp` in seconds, `dataset_fingerprint`, `config_key` (which leaves out the
    epochs), and where known `summary` and `run_id`. `newest`: `timestamp` and where known `run_id` of the newest
    `model`. A check with the same `run_id` belongs to it, whatever the order of the two events. `current`:
    `dataset_fingerprint` and `config_key` of the long run. An `override_reason` opens the gate and is recorded, even
    where it was not needed; a blank one counts as none. `model` names the short run in messages, and `way_on` says what
    opens a shut gate.
    """
    refusal = _refusal(check, newest, current, model)
    reason = (override_reason or "").strip() or None
    if refusal is None:
        summary = (check or {}).get("summary") or "passed"
        return GateDecision(True, f"gate open: {model}: {summary}", reason)
    if reason is not None:
        return GateDecision(True, f"gate opened by override ({reason}), although {refusal}", reason)
    return GateDecision(False, f"gate shut: {refusal}; {way_on}")


def _refusal(
    check: Mapping[str, Any] | None,
    newest: Mapping[str, Any] | None,
    current: Mapping[str, Any],
    model: str,
) -> str | None:
    """Why the gate stays shut, or None."""
    if newest is None:
        return f"{model} was never trained"
    if check is None:
        return f"the success criterion of {model} was never evaluated"
    same_run = check.get("run_id") is not None and check.get("run_id") == newest.get("run_id")
    if not same_run and float(check["timestamp"]) < float(newest["timestamp"]):
        return f"the last evaluation of the success criterion is older than the newest training of {model}"
    for key, what in (("dataset_fingerprint", "another dataset"), ("config_key", "another configuration")):
        if not check.get(key) or check.get(key) != current.get(key):
            judged, expected = str(check.get(key) or "unknown")[:12], str(current.get(key) or "unknown")[:12]
            return f"the verdict of {model} is of {what} ({key} {judged}, now {expected})"
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
