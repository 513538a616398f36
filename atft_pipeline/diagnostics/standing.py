"""Warnings of a run that goes on: rules that have fired at each of its newest epochs, as the run stood at each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import takewhile
from pathlib import Path

from atft_pipeline.diagnostics.experiments import commands
from atft_pipeline.diagnostics.record import open_record, part_epoch
from atft_pipeline.diagnostics.rules import Finding, assess
from atft_pipeline.diagnostics.signals import measure
from atft_pipeline.lineage import TABLES, read_run

STANDING_EPOCHS = 3
"""A rule that fires at this many newest complete epochs is a warning; fewer may be the noise of one evaluation."""

LOOKBACK_EPOCHS = 10
"""How far back the first epoch of a warning is looked for: each epoch not held before is a record to open."""

Stamp = tuple[tuple[str, int, int], ...]
"""Name, time of change and size of every file that an epoch's assessment reads."""

Files = Mapping[Path, tuple[int, int, int]]
"""Part or predictions file -> its epoch, time of change in ns and size."""


@dataclass(frozen=True)
class StandingWarning:
    """A rule that has fired at every epoch from `since_epoch` to the newest complete one.

    `or_earlier`: `since_epoch` is the last epoch looked at, and the rule may have fired before it too. Cause and
    evidence are those of the newest epoch.
    """

    rule: str
    cause: str
    evidence: str
    since_epoch: int
    or_earlier: bool


def standing_warnings(run_dir: Path) -> tuple[StandingWarning, ...]:
    """Rules fired at each of the newest three complete epochs, in the rules' order; none before there are three.

    Each epoch is judged by the record as it stood at its end, once per process while its files stay the same. An
    observation is no warning.

    Raises InputError where the run cannot be read.
    """
    files, epochs = _files(run_dir), complete_epochs(run_dir)
    looked_at = epochs[::-1][:LOOKBACK_EPOCHS]
    if len(looked_at) < STANDING_EPOCHS:
        return ()
    warnings = []
    for rule, finding in _fired_at(run_dir, looked_at[0], files).items():
        stretch = list(takewhile(partial(_has_fired, run_dir, files, rule), looked_at))
        if len(stretch) >= STANDING_EPOCHS:
            or_earlier = stretch[-1] == looked_at[-1] and len(epochs) > len(looked_at)
            warnings.append(StandingWarning(rule, finding.cause, finding.evidence, stretch[-1], or_earlier))
    return tuple(warnings)


def complete_epochs(run_dir: Path) -> list[int]:
    """Epochs whose parts are all written, ascending: run.json counts an epoch after them."""
    done = read_run(run_dir).get("epochs_done")
    named = [part_epoch(path) for path in (run_dir / "series").glob("epoch_*.parquet")]
    return sorted(epoch for epoch in named if isinstance(done, int) and epoch is not None and epoch <= done)


def _has_fired(run_dir: Path, files: Files, rule: str, epoch: int) -> bool:
    return rule in _fired_at(run_dir, epoch, files)


def _fired_at(run_dir: Path, epoch: int, files: Files) -> Mapping[str, Finding]:
    stamp = tuple((str(path), changed, size) for path, (of, changed, size) in files.items() if of <= epoch)
    return _assessed(run_dir, epoch, stamp)


@lru_cache(maxsize=512)
def _assessed(run_dir: Path, epoch: int, stamp: Stamp) -> Mapping[str, Finding]:  # noqa: ARG001
    """Rule -> finding of what had fired by the end of `epoch`; the stamp tells a changed record from a known one."""
    record = open_record(run_dir, until_epoch=epoch)
    try:
        findings = assess(measure(record), commands(record))
    finally:
        record.connection.close()
    return {f.rule: f for f in findings if f.status == "fired" and f.severity != "observation"}


def _files(run_dir: Path) -> Files:
    found = {}
    for folder in (*TABLES, "predictions"):
        for path in sorted((run_dir / folder).glob("epoch_*.parquet")):
            state = path.stat()
            found[path] = (part_epoch(path) or 0, state.st_mtime_ns, state.st_size)
    return found
