"""Full build and appended session of a source in several files: `python -m bench.pipeline.update SOURCE WORK_DIR`.

Splits the source's prices into one file per year and one for the last session, builds prices, dataset and graph without
that session, then updates them with it. Each stage is an `atft` command in a fresh process and prints one JSON line;
the first line is the start-up time that each of them contains.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl

from bench.pipeline.stages import measured

DATES = {"listed": "Date", "index": "Date", "investor_flows": "PublishedDate", "statements": "DisclosedDate"}


def split(source: Path, folder: Path) -> tuple[Path, Path]:
    """Writes the source as it was before its last session, and the prices of that session as a file of their own."""
    before, prices_folder = folder / "source", folder / "source" / "prices"
    prices_folder.mkdir(parents=True)
    prices = pl.scan_parquet(source / "prices.parquet")
    last = prices.select(pl.col("Date").max()).collect().item()
    first = prices.select(pl.col("Date").min()).collect().item()
    for year in range(first.year, last.year + 1):
        of_year = prices.filter(pl.col("Date").dt.year() == year, pl.col("Date") < last).collect()
        if of_year.height:
            of_year.write_parquet(prices_folder / f"{year}.parquet")
    newest = folder / f"{last}.parquet"
    prices.filter(pl.col("Date") == last).collect().write_parquet(newest)
    for table, date in DATES.items():
        file = source / f"{table}.parquet"
        if file.is_file():
            rows = pl.read_parquet(file)
            rows.filter(pl.col(date).cast(pl.String) < str(last)).write_parquet(before / f"{table}.parquet")
    return before, newest


def start_up() -> dict[str, Any]:
    """Time to start Python and to load libraries and compiled kernels, for a command that builds features."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", "import atft_pipeline.market.price_store, atft_pipeline.dataset.store"], check=True
    )
    return {"stage": "start-up", "wall_s": round(time.perf_counter() - started, 1)}


def shown(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("work_dir", type=Path)
    options = parser.parse_args()
    folder = options.work_dir / "update"
    shutil.rmtree(folder, ignore_errors=True)
    before, newest = split(options.source, folder)
    dataset, graph = str(folder / "dataset"), str(folder / "graph")
    shown(start_up())
    shown(measured("features", "features", str(before), dataset))
    shown(measured("graph", "graph", dataset, graph))
    shutil.move(newest, before / "prices" / newest.name)
    for table in DATES:
        file = options.source / f"{table}.parquet"
        if file.is_file():
            shutil.copy(file, before / file.name)
    shown(measured("features, one more session", "features", str(before), dataset, "--update"))
    shown(measured("graph, one more session", "graph", dataset, graph, "--update"))


if __name__ == "__main__":
    main()
