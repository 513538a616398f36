"""Probes: short computations that confirm or refute a cause, from seconds to two epochs.

A probe computes again, with the code at hand, what the run claims: scores from its checkpoints, its data from the
source, its graph, its first epoch. Its figures are stored in the run's `probes/NAME.json` and read like all other
signals. A probe that cannot run says why, and its figures count as not measured.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from types import ModuleType
from typing import Any

import pyarrow as pa

from atft_pipeline.diagnostics.probes import ablate, baseline, data, graph, replay, rescore
from atft_pipeline.diagnostics.probes.figures import Figures
from atft_pipeline.diagnostics.probes.remedy import remedy
from atft_pipeline.diagnostics.run_inputs import RunInputs
from atft_pipeline.diagnostics.signal import Value
from atft_pipeline.errors import InputError, RunFailure
from atft_pipeline.inspection.reader import Record
from atft_pipeline.storage.atomic import write_json

MODULES: dict[str, ModuleType] = {
    "rescore": rescore,
    "data": data,
    "graph": graph,
    "baseline": baseline,
    "ablate": ablate,
    "replay": replay,
}
"""Probes that need nothing but the run. Each module has `measure` and the `SIGNALS` that rules may read."""

PROBES: dict[str, Callable[[RunInputs], Figures]] = {name: module.measure for name, module in MODULES.items()}
PROBE_SIGNALS: dict[str, tuple[str, ...]] = {name: module.SIGNALS for name, module in MODULES.items()}

REMEDY = "remedy"
"""The probe that tries a cause's remedy; it is stored once per cause, as `remedy_CAUSE`."""


def run_probes(record: Record, names: Iterable[str]) -> None:
    """Runs the named probes and stores their figures, which replace those of an earlier call."""
    inputs = RunInputs(record)
    for name in dict.fromkeys(names):
        _run(inputs, name, PROBES[name])


def run_remedies(record: Record, causes: Iterable[str]) -> None:
    """Tries the remedy of each cause and stores what it gained."""
    inputs = RunInputs(record)
    for cause in dict.fromkeys(causes):
        _run(inputs, f"{REMEDY}_{cause}", partial(remedy, cause=cause))


def _run(inputs: RunInputs, name: str, probe: Callable[[RunInputs], Figures]) -> None:
    started = time.perf_counter()
    try:
        content: dict[str, Any] = {"figures": probe(inputs)}
    except (InputError, RunFailure, OSError, KeyError, RuntimeError, pa.ArrowException) as error:
        content = {"figures": {}, "not_made": str(error).splitlines()[0] if str(error) else type(error).__name__}
    content |= {"probe": name, "run_key": inputs.record.run.get("key"), "seconds": time.perf_counter() - started}
    content["figures"] = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in content["figures"].items()
    }
    write_json(inputs.record.run_dir / "probes" / f"{name}.json", content)


def stored_probes(record: Record) -> list[dict[str, Any]]:
    """Contents of `probes/NAME.json`, of the files that can be read and belong to this run."""
    contents = []
    for path in sorted((record.run_dir / "probes").glob("*.json")):
        with suppress(OSError, ValueError):
            content = json.loads(path.read_text(encoding="utf-8"))
            is_probe = isinstance(content, dict) and "probe" in content and isinstance(content.get("figures"), dict)
            if is_probe and content.get("run_key") == record.run.get("key"):
                contents.append(content)
    return contents


def probe_figures(record: Record) -> dict[str, Value]:
    """Figures of the stored probes that rules read. The gain of a remedy is only shown."""
    figures = [item for probe in stored_probes(record) if probe["probe"] in PROBES for item in probe["figures"].items()]
    return {name: value for name, value in figures if isinstance(value, float | str)}
