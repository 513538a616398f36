"""Commands that watch runs: status and monitor."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from atft_pipeline.cli.arguments import AddCommand
from atft_pipeline.cli.console import discard_output
from atft_pipeline.cli.reply import Block, Cell, Reply, Sentences, Table
from atft_pipeline.monitoring.number_format import colour, count, duration, gibibytes, number

RUNS = Path("output/runs")
ABSENT = "-"
MINUTE = len("2026-11-30T18:55")
"""Characters of a timestamp up to its minute."""


def register(add: AddCommand) -> None:
    status = add("status", _status, "One snapshot of the runs: state, epoch, ETA, losses, gradients, GPU.")
    status.add_argument("--runs", type=Path, default=RUNS, help="folder of runs (default: %(default)s)")

    monitor = add(
        "monitor",
        _monitor,
        "The runs, live: progress, losses, gradients, degeneracy, GPU, and the rules that have fired for three epochs."
        " Ctrl-C ends the watching, not the runs (exit 130).",
    )
    watched = monitor.add_mutually_exclusive_group()
    watched.add_argument("--runs", type=Path, default=RUNS, help="folder of runs (default: %(default)s)")
    watched.add_argument(
        "--run", type=Path, metavar="RUN_DIR", help="this run only, until it has ended; exits 1 when it did not succeed"
    )
    monitor.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="pause (default: %(default)s)")
    monitor.add_argument("--once", action="store_true", help="one frame, then exit")


def _status(options: argparse.Namespace) -> Reply:
    from atft_pipeline.monitoring.progress import run_snapshots

    snapshots = run_snapshots(options.runs)
    return Reply({"runs": snapshots}, status_blocks(snapshots, options.runs))


def status_blocks(snapshots: list[dict[str, Any]], runs: Path) -> list[Block]:
    """A row per run, and a sentence per run that says why it ended or cannot be read."""
    if not snapshots:
        return [Sentences("runs", [], none=f"none in {runs}; `atft train` writes one")]
    figures = ("epoch", "ETA", "train", "validation", "gradient", "rate", "samples/s", "GPU memory")
    reasons = [f"{row['run']}: {row['reason']}" for row in snapshots if row["reason"]]
    header = ("run", "state", *figures, "started")
    table = Table("runs", header, [_status_row(row) for row in snapshots], words=("state", "started"))
    return [table, *([Sentences("reasons", reasons)] if reasons else [])]


def _status_row(row: Mapping[str, Any]) -> list[Cell]:
    eta, speed, memory = (row.get(name) for name in ("eta_s", "samples_per_s", "gpu_memory_bytes"))
    figures = (number(row.get(name), ABSENT) for name in ("train_loss", "validation_loss", "grad_norm", "lr"))
    return [
        Cell(str(row["run"])),
        Cell(str(row["state"]), colour(row["state"])),
        Cell(f"{count(row.get('epoch'), ABSENT)}/{count(row.get('epochs'), ABSENT)}"),
        Cell(ABSENT if eta is None else duration(eta)),
        *map(Cell, figures),
        Cell(ABSENT if speed is None else f"{speed:,.0f}"),
        Cell(ABSENT if memory is None else gibibytes(memory)),
        Cell(str(row["started"] or ABSENT)[:MINUTE].replace("T", " ")),
    ]


def _monitor(options: argparse.Namespace) -> Reply:
    """Prints a frame after every look by itself, so the reply is empty."""
    from atft_pipeline.monitoring.monitor import watch_folder, watch_run

    def watch(show: Callable[[Any], None]) -> Reply:
        how: dict[str, Any] = {"every_s": options.every, "once": options.once}
        code = watch_run(options.run, show, **how) if options.run else watch_folder(options.runs, show, **how)
        return Reply({}, code=code)

    try:
        if options.json:
            return watch(lambda frame: print(json.dumps(frame.as_dict(), allow_nan=False), flush=True))
        from atft_pipeline.monitoring.dashboard import screen

        with screen() as show:
            return watch(show)
    except BrokenPipeError:
        discard_output()
        return Reply({})
