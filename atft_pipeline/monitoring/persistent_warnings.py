"""Warnings of a run that is still training: rules that fire at each of its newest epochs, assessed epoch by epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import duckdb
import pyarrow as pa

from atft_pipeline.diagnostics.gather import recorded
from atft_pipeline.diagnostics.rule import Finding, assess
from atft_pipeline.diagnostics.rule_table import RULES
from atft_pipeline.errors import InputError
from atft_pipeline.inspection.reader import open_record, part_epoch
from atft_pipeline.runs.header import read_run
from atft_pipeline.runs.tables import TABLES

PERSISTENT_EPOCHS = 3
"""Newest complete epochs at which a rule must fire before it warns; fewer may be the noise of one evaluation."""

Files = Mapping[Path, tuple[int, int, int]]
"""File of a table or of predictions -> its epoch, time of change in ns and size."""

Fired = Mapping[str, Finding]
"""Rule -> finding, of the rules that had fired by the end of an epoch, without observations."""

_ASSESSED: dict[tuple[Path, int, str], Fired] = {}
"""(run directory, epoch, stamp of its files) -> what this process has already assessed."""


@dataclass(frozen=True)
class PersistentWarning:
    """A rule that has fired at every epoch from `since_epoch` to the newest complete one.

    `or_earlier`: `since_epoch` is the oldest epoch looked at, and the rule may have fired before it too. Cause and
    evidence are those of the newest epoch.
    """

    rule: str
    cause: str
    evidence: str
    since_epoch: int
    or_earlier: bool


def persistent_warnings(run_dir: Path) -> tuple[PersistentWarning, ...]:
    """Rules fired at each of the newest three complete epochs, in the rules' order; none before there are three.

    Each epoch is judged by the record as it was at its end, once per process while its files stay the same. An
    observation is no warning.

    Raises InputError where the run cannot be read, or holds columns of other types.
    """
    epochs = complete_epochs(run_dir)[::-1]
    if len(epochs) < PERSISTENT_EPOCHS:
        return ()
    fired = _fired_newest_first(run_dir, epochs)
    warnings = []
    for rule, finding in fired[0].items():
        length = sum(1 for _ in takewhile(lambda at, rule=rule: rule in at, fired))  # type: ignore[misc]
        if length >= PERSISTENT_EPOCHS:
            or_earlier = length == len(fired) < len(epochs)
            warnings.append(PersistentWarning(rule, finding.cause, finding.evidence, epochs[length - 1], or_earlier))
    return tuple(warnings)


def complete_epochs(run_dir: Path) -> list[int]:
    """Epochs whose files are all written, ascending: run.json counts an epoch only after its files."""
    done = read_run(run_dir).get("epochs_done")
    named = [part_epoch(path) for path in (run_dir / "series").glob("epoch_*.parquet")]
    return sorted(epoch for epoch in named if isinstance(done, int) and epoch is not None and epoch <= done)


def _fired_newest_first(run_dir: Path, epochs: list[int]) -> list[Fired]:
    """Fired rules by epoch, newest first: at the epochs that make a warning, then at older ones assessed before.

    Older epochs are not assessed only to date a warning: 120 epochs would take a second from a running training.
    """
    files, fired = _files(run_dir), list[Fired]()
    for epoch in epochs:
        key = (run_dir, epoch, _stamp(files, epoch))
        if key not in _ASSESSED:
            if len(fired) >= PERSISTENT_EPOCHS:
                break
            _ASSESSED[key] = _assess(run_dir, epoch)
        fired.append(_ASSESSED[key])
        if not set.intersection(*map(set, fired)):
            break
    return fired


def _assess(run_dir: Path, epoch: int) -> Fired:
    record = open_record(run_dir, until_epoch=epoch)
    try:
        findings = assess(recorded(record), RULES)
    except (duckdb.Error, pa.ArrowException) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{run_dir}: its record until epoch {epoch} is of another version ({why})") from error
    finally:
        record.connection.close()
    return {f.rule: f for f in findings if f.status == "fired" and f.severity != "observation" and f.group != "noise"}


def _files(run_dir: Path) -> Files:
    paths = [path for folder in (*TABLES, "predictions") for path in (run_dir / folder).glob("epoch_*.parquet")]
    states = {path: path.stat() for path in sorted(paths)}
    return {path: (part_epoch(path) or 0, state.st_mtime_ns, state.st_size) for path, state in states.items()}


def _stamp(files: Files, epoch: int) -> str:
    """Changes with every file that an assessment of `epoch` reads."""
    read = [(str(path), changed_ns, size) for path, (of, changed_ns, size) in files.items() if of <= epoch]
    return hashlib.sha256(repr(read).encode()).hexdigest()
