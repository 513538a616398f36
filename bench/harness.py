"""Shared by the benches of quality: commands whose failure ends the bench, runs by settings, tables in documents."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from atft_pipeline.storage.artifact import sha256_of
from atft_pipeline.storage.code_version import code_revision


def command(*arguments: object) -> None:
    """Runs one `atft` command without its output; a failure ends the bench with the command's message."""
    line = [sys.executable, "-m", "atft_pipeline.cli", *map(str, arguments), "--json"]
    done = subprocess.run(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 1):
        sys.exit(done.stderr.strip().splitlines()[-1])


def trained(folder: Path, dataset: Path, graph: Path, settings: Mapping[str, object]) -> Path:
    """Trains preset `cpu` with `settings` and returns the run directory in `folder`.

    A finished run of the same code is not repeated.
    """
    named = {**settings, "code": code_revision("run"), "dataset": dataset.name}
    run = folder / f"run_{sha256_of(named)[:16]}"
    assignments = [part for name, value in settings.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    command("train", dataset, graph, run, "--preset", "cpu", *assignments)
    return run


def put_between(document: Path, name: str, table: str) -> None:
    """Puts `table` between the markers `<!-- NAME -->` and `<!-- /NAME -->` of a file."""
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = document.read_text(encoding="utf-8").split(first)
    after = rest.split(last)[1]
    document.write_text(f"{before}{first}\n{table}\n{last}{after}", encoding="utf-8")
