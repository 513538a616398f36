"""Our features against other libraries', on one market in one go: `python -m bench.features.beside_peers WORK_DIR`.

Makes the synthetic market in WORK_DIR if it has no prices.parquet, then runs ours and every peer of `peers.py` in turn,
`--repeats` times, each in a fresh process. So other load on the machine affects all of them alike. Prints one JSON line
per contender, with the medians over the repeats of

- `wall_s`, `cpu_s`, `peak_rss_gb` as `peers.py` defines them;
- `times_ours`, `cpu_times_ours`: wall and processor time over ours in the same round; above 1 is slower than ours;
- `million_values_per_s`: rows x features over wall time, since the lists of features differ;
- `times_floor`: wall time over `floor_s`, the time of a copy on all cores of the bytes that must be touched.

Peers need environments of their own (`peers.py` says how): pass their interpreters as `--peers-python` and
`--qlib-python`; without one its peers are skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MEDIANS = ("wall_s", "cpu_s", "peak_rss_gb", "worker_rss_gb", "prepare_s", "floor_s", "gb_per_s")

Line = dict[str, Any]


def run(python: str, peer: str, source: Path) -> Line:
    """Runs one contender in a fresh process: its line, or `failed` with the last line of its stderr."""
    command = [python, str(Path(__file__).with_name("peers.py")), peer, str(source)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        return {"peer": peer, "failed": f"exit code {process.returncode}: {last}"}
    line: Line = json.loads(process.stdout)
    return line


def summary(runs: list[Line], ours: list[Line], floors: list[Line]) -> Line:
    """Medians and ratios of one contender; ratios pair the runs of a round."""
    line = {**runs[0], "repeats": len(runs)}
    line |= {name: round(median(run[name] for run in runs), 4) for name in MEDIANS if name in runs[0]}
    if line["peer"] != "floor":
        if ours:
            line["times_ours"] = _ratio(runs, ours, "wall_s", "wall_s")
            line["cpu_times_ours"] = _ratio(runs, ours, "cpu_s", "cpu_s")
        line["million_values_per_s"] = round(line["rows"] * line["features"] / line["wall_s"] / 1e6, 1)
        if floors:
            line["times_floor"] = _ratio(runs, floors, "wall_s", "floor_s")
    return line


def _ratio(runs: list[Line], others: list[Line], name: str, other_name: str) -> float:
    return round(median(run[name] / other[other_name] for run, other in zip(runs, others, strict=False)), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--stocks", type=int, default=1000)
    parser.add_argument("--sessions", type=int, default=1250)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers-python", help="interpreter with bench/features/requirements-peers.txt")
    parser.add_argument("--qlib-python", help="interpreter with bench/features/requirements-qlib.txt")
    options = parser.parse_args()
    source = options.work_dir.resolve()
    if not (source / "prices.parquet").exists():
        size = ("--stocks", str(options.stocks), "--sessions", str(options.sessions))
        command = [sys.executable, "-m", "atft_pipeline.cli", "market", str(source), *size]
        subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=True)
    pythons = {
        "floor": sys.executable,
        "atft": sys.executable,
        "polars-talib": options.peers_python,
        "talib-pandas": options.peers_python,
        "qlib-alpha158": options.qlib_python,
    }
    runs: dict[str, list[Line]] = {peer: [] for peer, python in pythons.items() if python}
    ended: dict[str, Line] = {
        peer: {"peer": peer, "skipped": "no interpreter given for it; see --help"}
        for peer, python in pythons.items()
        if not python
    }
    for repeat in range(options.repeats):
        for peer in runs:
            if peer in ended:
                continue
            line = run(pythons[peer], peer, source)
            print(f"{repeat + 1}/{options.repeats} load {os.getloadavg()[0]:.1f} {line}", file=sys.stderr, flush=True)
            if "skipped" in line or "failed" in line:
                ended[peer] = line
            else:
                runs[peer].append(line)
    for peer in pythons:
        done = peer not in ended
        content = summary(runs[peer], _of(runs, ended, "atft"), _of(runs, ended, "floor")) if done else ended[peer]
        print(json.dumps(content), flush=True)


def _of(runs: dict[str, list[Line]], ended: dict[str, Line], peer: str) -> list[Line]:
    return [] if peer in ended else runs[peer]


if __name__ == "__main__":
    main()
