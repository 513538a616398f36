"""`kill -9` at any moment: the resumed run ends as if it had not been killed, and no table has a torn row."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest
import torch
from atft_process import environment
from kill_server import PHASES
from training_runs import Data, header, record

from atft_pipeline.runs.tables import TABLES, read_table

pytestmark = pytest.mark.process(reason="trainings in forks, killed at any moment")

SEED = 20240105
KILLS, IN_EACH_PHASE = 32, 8
EPOCHS = 4
LONGEST_DELAY_S = {"starting": 0.3, "training": 0.02, "evaluating": 0.03, "writing": 0.001}
"""About how long one entry of each phase lasts: a delay up to it meets any moment of the phase."""
ENTRIES = {"starting": 1, "training": 12, "evaluating": 6, "writing": 40}
"""A kill waits for one of this many first entries: about an epoch and a half, so that runs also get on."""


@pytest.fixture(scope="module")
def killer(data: Data) -> Iterator[subprocess.Popen[str]]:
    server = Path(__file__).parents[1] / "kill_server.py"
    with subprocess.Popen(
        [sys.executable, str(server), str(data.dataset), str(data.graph)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        assert process.stdin is not None
        process.stdin.close()


def trained_until_killed(process: subprocess.Popen[str], run_dir: Path, phase: str, entry: int, delay_s: float) -> str:
    """The phase in which the kill met the run, or "ended"."""
    assert process.stdin is not None
    assert process.stdout is not None
    order = {"run": str(run_dir), "epochs": EPOCHS, "phase": phase, "entry": entry, "delay_s": delay_s}
    print(json.dumps(order), file=process.stdin, flush=True)
    return process.stdout.readline().strip()


def assert_readable(run_dir: Path) -> None:
    """Every table holds whole epochs only, for this project's reader and for DuckDB, and `run.json` is whole."""
    if not (run_dir / "run.json").exists():
        return
    done = header(run_dir)["epochs_done"]
    for name in TABLES:
        parts = sorted((run_dir / name).glob("*.parquet"))
        rows = read_table(run_dir, name)
        epochs = set(rows["epoch"].to_pylist())
        assert epochs == set(range(1, len(parts) + 1)), (name, epochs)
        assert len(epochs) >= done, "an epoch that is done lacks its rows"
        if parts:
            counted = duckdb.sql(f"SELECT count(*) FROM read_parquet('{run_dir}/{name}/*.parquet')").fetchall()
            assert counted == [(rows.num_rows,)]
    for predictions in (run_dir / "predictions").glob("*.parquet"):
        assert duckdb.sql(f"SELECT count(*) FROM '{predictions}'").fetchall()[0][0] > 0
    for checkpoint in (run_dir / "checkpoints").glob("*.pt"):
        torch.load(checkpoint, weights_only=True)


def state(run_dir: Path) -> dict[str, torch.Tensor]:
    """Everything that the next epoch would start from."""
    content = torch.load(run_dir / "checkpoints" / "resume.pt", weights_only=True)
    moments = content["optimizer"]["state"]
    return (
        {f"model.{name}": value for name, value in content["model"].items()}
        | {f"average.{name}": value for name, value in content["average"].items()}
        | {f"optimizer.{n}.{name}": torch.as_tensor(v) for n, entry in moments.items() for name, v in entry.items()}
        | {"step": torch.tensor(content["step"])}
    )


def remnants(run_dir: Path) -> list[Path]:
    return [path for path in run_dir.rglob(".*") if path.is_dir()]


def test_killed_at_any_moment_a_run_ends_as_if_it_never_was(
    killer: subprocess.Popen[str], tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    """Runs one after the other, each killed until it ends; until every phase was met, and a file half written."""
    undisturbed = tmp_path / "undisturbed"
    assert trained_until_killed(killer, undisturbed, "training", 60_000, 0.0) == "ended"
    expected, final = record(undisturbed), state(undisturbed)
    chance = random.Random(SEED)
    met: Counter[str] = Counter()
    runs = torn = 0
    while met.total() < KILLS or min(met[phase] for phase in PHASES) < IN_EACH_PHASE or not torn:
        runs += 1
        assert runs <= 30, f"{dict(met)}, {torn} half-written files: the kills do not spread"
        run_dir = tmp_path / f"run{runs}"
        for attempt in range(1, 60):
            phase = min(PHASES, key=lambda phase: met[phase])
            entry, delay_s = chance.randint(1, ENTRIES[phase]), chance.uniform(0, LONGEST_DELAY_S[phase])
            where = f"seed {SEED}, run {runs}, attempt {attempt}: {phase} entry {entry} + {delay_s:.4f} s"
            found = trained_until_killed(killer, run_dir, phase, entry, delay_s)
            assert found in (*PHASES, "ended"), f"{where}: {found}"
            assert_readable(run_dir)
            if found == "ended":
                break
            met[found] += 1
            torn += bool(remnants(run_dir))
        assert header(run_dir)["status"] == "finished", where
        assert record(run_dir) == expected, where
        resumed = state(run_dir)
        assert resumed.keys() == final.keys()
        assert all(torch.equal(resumed[name], final[name]) for name in final), where
        assert not remnants(run_dir), "what a killed writer left is removed"
    record_property("kills", dict(met))
    assert met.total() >= KILLS
    print(f"seed {SEED}: {met.total()} kills of {runs} runs, {torn} left half-written files: {dict(met)}")
