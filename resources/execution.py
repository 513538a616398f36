"""Execution of a run's steps on one machine, and release of the pool slots of killed runs.

A killed run keeps its slot in the pool, and without Dagster's daemon nothing releases it: every later training would
wait for ever. So a run holds a file lock while it executes, and the kernel drops the lock with the process. A run that
starts releases the slots of runs that no longer hold their lock.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg

PRELOADED = [
    "dagster",
    "dagster._cli",  # each step imports the command's script again
    "duckdb",
    "exchange_calendars",
    "pandera",
    "atft_pipeline.diagnostics.report.attribution_plots",
    "matplotlib.backends.backend_agg",
    "torch",
]
"""Modules that take seconds to import and start no threads, which a fork would lose; polars starts some, so it is not
among them."""


class OneProcessPerStep(dg.Executor):
    """Dagster's multiprocess executor; before a run it releases the pool slots of killed runs."""

    def __init__(self, steps: dg.Executor) -> None:
        self._steps = steps

    @property
    def retries(self) -> Any:
        return self._steps.retries

    @property
    def step_dependency_config(self) -> Any:
        return self._steps.step_dependency_config

    def execute(self, plan_context: Any, execution_plan: Any) -> Iterator[dg.DagsterEvent]:
        release_killed_runs(plan_context.instance)
        with executing(plan_context.instance, plan_context.run_id):
            yield from self._steps.execute(plan_context, execution_plan)


def _create(context: dg.InitExecutorContext) -> dg.Executor:
    create = dg.multiprocess_executor.executor_creation_fn
    assert create is not None
    return OneProcessPerStep(create(context))


one_process_per_step = dg.ExecutorDefinition(
    name="one_process_per_step",
    config_schema=dg.multiprocess_executor.config_schema,  # type: ignore[arg-type]  # Dagster accepts its own schema
    requirements=dg.multiprocess_executor.get_requirements,
    executor_creation_fn=_create,
).configured({"start_method": {"forkserver": {"preload_modules": PRELOADED}}})
"""Each step is a process, so its memory is freed when it ends. Steps are forked from a server that has imported the
libraries once: spawned ones take 85 s instead of 26 s for the twelve steps from a small market to its model_5ep."""


@contextmanager
def executing(instance: dg.DagsterInstance, run_id: str) -> Iterator[None]:
    """Marks a run as executing, for as long as this block and this process last."""
    lock = _lock(instance, run_id)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def release_killed_runs(instance: dg.DagsterInstance) -> list[str]:
    """Releases the pool slots of runs whose process is gone and records those runs as failed; returns their ids.

    A run without a lock file was started by another executor; its slots stay until it has finished.
    """
    storage = instance.event_log_storage
    if not storage.supports_global_concurrency_limits:
        return []
    pools = [storage.get_concurrency_info(key) for key in storage.get_concurrency_keys()]
    holders = {slot.run_id for pool in pools for slot in pool.claimed_slots}
    holders |= {step.run_id for pool in pools for step in pool.pending_steps}
    gone = [run_id for run_id in sorted(holders) if _is_over(instance, run_id)]
    for run_id in gone:
        storage.free_concurrency_slots_for_run(run_id)
        run = instance.get_run_by_id(run_id)
        if run is not None and not run.is_finished:
            instance.report_run_failed(run, "The process of this run was killed; its pool slot was taken back.")
        _lock(instance, run_id).unlink(missing_ok=True)
    return gone


def _is_over(instance: dg.DagsterInstance, run_id: str) -> bool:
    run = instance.get_run_by_id(run_id)
    if run is None or run.is_finished:
        return True
    lock = _lock(instance, run_id)
    if not lock.exists():
        return False
    with lock.open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _lock(instance: dg.DagsterInstance, run_id: str) -> Path:
    return Path(instance.storage_directory()) / "executing" / run_id
