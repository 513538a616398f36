"""One run from its plan to its verdict: reused, started, or resumed after its last complete epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from atft_pipeline.config.schema import PipelineConfig
from atft_pipeline.errors import InputError
from atft_pipeline.runs.documents import read_verdict
from atft_pipeline.runs.header import now, read_run
from atft_pipeline.runs.lock import exclusive
from atft_pipeline.runs.record import NullRecord, RunRecord
from atft_pipeline.runs.state import with_earlier_end
from atft_pipeline.runs.tables import TABLES
from atft_pipeline.storage.atomic import remove_remnants
from atft_pipeline.training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from atft_pipeline.training.failures import construction_explained, early_end_recorded
from atft_pipeline.training.judging.judge_run import write_verdict
from atft_pipeline.training.plan import Plan, plan_run, resolve_device, resolve_run_dir, run_header
from atft_pipeline.training.trainer import Trainer


@dataclass(frozen=True)
class TrainingResult:
    """Where the record of a run is, its verdict, and whether the run was finished before and is reused."""

    run_dir: Path
    verdict: dict[str, Any]
    reused: bool


def train(
    config: PipelineConfig,
    dataset: Path,
    graph: Path,
    run_dir: Path,
    *,
    device: str = "auto",
    force: bool = False,
    overrides: dict[str, Any] | None = None,
    log: Callable[[str], None] = print,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> TrainingResult:
    """Trains one run in `run_dir`, or resumes it, or reuses it.

    A finished run of the same key is returned as it is; with `force` a new attempt is made beside it. An unfinished run
    is resumed after its last complete epoch. `overrides` are recorded as given, for the reader. Every process of a
    group makes the same call; all return what the leader has written.

    Raises: InputError when the inputs or `run_dir` cannot be used; RunFailure when the loss or the gradient is no
    longer finite (the record says so, and no update is made with them) and when memory or disk do not suffice;
    RunInterrupted for Ctrl-C.
    """
    plan, chosen = plan_run(config, dataset, graph, processes.size), resolve_device(device, processes)
    if not processes.is_leader:
        return _follow(plan, run_dir, chosen, processes)
    run_dir = resolve_run_dir(run_dir, plan.key, force=force)
    with exclusive(run_dir):
        resolve_run_dir(run_dir, plan.key, force=False)  # another run may have taken it before the lock was held
        _remove_remnants(run_dir)
        earlier = read_run(run_dir) if (run_dir / "run.json").exists() else {}
        if earlier.get("status") == "finished" and (run_dir / "verdict.json").exists():
            log(f"run {run_dir.name}: finished before with the same configuration, code and data; reused")
            return processes.from_leader(TrainingResult(run_dir, read_verdict(run_dir), reused=True))
        header = _header(earlier, run_header(plan, run_dir, chosen, overrides or {}))
        verdict = _lead(plan, RunRecord(run_dir, header), chosen, log, processes, is_first_start=not earlier)
        log(f"run {run_dir.name}: {verdict['summary']}")
        return processes.from_leader(TrainingResult(run_dir, verdict, reused=False))


def _header(earlier: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`run.json` of a start: new, but for the first start, the epochs that are done, and how earlier starts ended."""
    progress = {name: earlier[name] for name in ("started", "epochs_done") if name in earlier}
    return with_earlier_end(earlier) | new | progress


def _lead(
    plan: Plan,
    record: RunRecord,
    device: torch.device,
    log: Callable[[str], None],
    processes: ProcessGroup,
    *,
    is_first_start: bool,
) -> dict[str, Any]:
    """Trains, judges and records the run; returns its verdict."""
    with early_end_recorded(record):
        record.update()
        try:
            with construction_explained():
                trainer = Trainer(plan, record, device, log, processes)
        except InputError:
            if is_first_start:  # nothing was trained, so the directory stays free for corrected settings
                (record.run_dir / "run.json").unlink()
            raise
        processes.from_leader(None)  # tells the others that there is a run to train
        trainer.run()
        verdict = write_verdict(record.run_dir)
        record.update(status="finished", ended=now())
    return verdict


def _follow(plan: Plan, run_dir: Path, device: torch.device, processes: ProcessGroup) -> TrainingResult:
    """The work of a process that does not lead: it computes its share of every block and writes nothing."""
    ignored: Any = None
    reused: TrainingResult | None = processes.from_leader(ignored)
    if reused is not None:
        return reused
    Trainer(plan, NullRecord(run_dir, {}), device, lambda _: None, processes).run()
    result: TrainingResult = processes.from_leader(ignored)
    return result


def _remove_remnants(run_dir: Path) -> None:
    """Removes half-written files of a start that was killed. The lock is held, so nobody still writes them."""
    for name in (*TABLES, "predictions", "checkpoints", "validity"):
        remove_remnants(run_dir / name)
    for name in ("run.json", "verdict.json", "inputs.parquet"):
        remove_remnants(run_dir, name)
