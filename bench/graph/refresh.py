"""Time of one refresh of the stock graph against brute force and the matmul ceiling: `python -m bench.graph.refresh`.

Prints one JSON line per case, each measured in a fresh process on synthetic returns. `median_ms` and `best_ms` are the
time of one refresh alone from its window, with sector means and edge attributes, over several sessions and repetitions.
`cpu_ms` is its processor time on all threads. `long_build_ms` is the time per refresh in a build of many.
`brute_force_ms` is the definition in plain numpy (standardise, full product, common counts, argpartition). `ceiling` is
the time of that float32 product by numpy's BLAS on all cores, over the median: at 1 the graph would cost no more than
the product. Times hold for one machine on one day; quote them with both. `--increment DIR` instead times one session
appended to ten years of 4,000 stocks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from atft_pipeline.config.schema import GraphConfig
from atft_pipeline.graph.build import CLIP, MINIMUM_SECTOR_MEMBERS, StockGraph, graph_at
from atft_pipeline.graph.kernels import Search
from atft_pipeline.graph.membership import Membership, windows
from atft_pipeline.graph.store import build_graph_file, content_sha256, load_graph
from atft_pipeline.storage.artifact import write_manifest

CASES = [(stocks, window) for window in (60, 250) for stocks in (1000, 4000)]
SECTORS = 33
REFRESHES, REPETITIONS = 5, 5


def returns_of(stocks: int, sessions: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns with market and sector factors, one in fifty missing; member, sector and market; all `[T, N]`."""
    rng = np.random.default_rng(0)
    sector = np.tile((np.arange(stocks) % SECTORS).astype(np.int32), (sessions, 1))
    returns = rng.normal(size=(sessions, stocks)).astype(np.float32)
    returns += 0.7 * rng.normal(size=(sessions, SECTORS)).astype(np.float32)[:, sector[0]]
    returns += rng.normal(size=(sessions, 1)).astype(np.float32)
    returns[rng.random(returns.shape) < 0.02] = np.nan
    return 0.01 * returns, np.ones(returns.shape, dtype=bool), sector, sector % 3


def milliseconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - started)


def brute_force(window: np.ndarray, neighbours: int) -> tuple[np.ndarray, np.ndarray]:
    """Correlations `[n, n]` of already demeaned returns, -inf for pairs without an edge, and each row's best."""
    has = np.isfinite(window)
    z = (window - np.nanmean(window, axis=0)) / np.nanstd(window, axis=0)
    z = np.where(has, np.clip(z, -CLIP, CLIP), np.float32(0.0))
    z /= np.sqrt((z * z).sum(axis=0))
    corr = z.T @ z.copy()
    node = 3 * has.sum(axis=0) >= 2 * len(window)
    common = has.T.astype(np.float32) @ has.astype(np.float32)
    corr[(2 * common < len(window)) | ~(node & node[:, None]) | (corr <= 0.0)] = -np.inf
    np.fill_diagonal(corr, -np.inf)
    return corr, np.argpartition(corr, -neighbours, axis=1)[:, -neighbours:]


def identical(graph: StockGraph, corr: np.ndarray, best: np.ndarray) -> bool:
    """Whether the graph has brute force's neighbours, up to pairs that differ by less than 1e-6."""
    expected = np.sort(np.take_along_axis(corr, best, axis=1), axis=1)[:, ::-1]
    actual = np.full_like(expected, -np.inf)
    rank = np.arange(len(graph.target)) - np.searchsorted(graph.target, graph.target)
    actual[graph.target, rank] = corr[graph.target, graph.source]
    with np.errstate(invalid="ignore"):
        return bool(((actual == expected) | (np.abs(actual - expected) < 1e-6)).all())


def build(rows: tuple[np.ndarray, ...], days: np.ndarray, codes: np.ndarray, config: GraphConfig) -> StockGraph:
    """The graph of returns, members, sectors and markets `[T, N]` at every refresh."""
    returns, member, sector, market = rows
    inputs = (returns.astype(np.float32), member, sector.astype(np.int32), market.astype(np.int32))
    return graph_at(Membership(days, codes, *inputs), windows(len(days), config), config)


def case(stocks: int, window: int, neighbours: int) -> dict[str, Any]:
    step = window - 1
    config = GraphConfig(lookback_sessions=window, neighbours=neighbours, refresh_sessions=step)
    rows = returns_of(stocks, REFRESHES * step + 1)  # every refresh has a whole window
    codes = np.array([f"{i:05}" for i in range(stocks)])
    days = np.datetime64("2020-01-01") + np.arange(REFRESHES * step + 1)

    def refresh(g: int) -> StockGraph:
        inside = slice(g * step, g * step + window)
        return build(tuple(values[inside] for values in rows), days[inside], codes, config)

    refresh(0)
    cpu = time.process_time()
    times = [milliseconds(lambda g=g: refresh(g)) for _ in range(REPETITIONS) for g in range(REFRESHES)]
    cpu_ms = 1e3 * (time.process_time() - cpu) / len(times)
    long_build = [milliseconds(lambda: build(rows, days, codes, config)) for _ in range(REPETITIONS)]
    peak_rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    with Search.open() as search:
        residual = search.demeaned(*rows[:3], MINIMUM_SECTOR_MEMBERS)
    brute, same = [], True
    for g in range(REFRESHES):
        started = time.perf_counter()
        corr, best = brute_force(residual[g * step : g * step + window], neighbours)
        brute.append(1e3 * (time.perf_counter() - started))
        same &= identical(refresh(g), corr, best)
    z = np.random.default_rng(1).normal(size=(stocks, window)).astype(np.float32)
    other, product = z.copy(), np.empty((stocks, stocks), dtype=np.float32)
    matmul = statistics.median(milliseconds(lambda: np.matmul(z, other.T, out=product)) for _ in range(15))
    median = statistics.median(times)
    return {
        "stocks": stocks,
        "window": window,
        "neighbours": neighbours,
        "median_ms": round(median, 2),
        "best_ms": round(min(times), 2),
        "cpu_ms": round(cpu_ms, 2),
        "long_build_ms": round(statistics.median(long_build) / REFRESHES, 2),
        "brute_force_ms": round(statistics.median(brute), 1),
        "identical": same,
        "matmul_ms": round(matmul, 2),
        "matmul_gflops": round(2e-6 * stocks * stocks * window / matmul, 1),
        "ceiling": round(matmul / median, 2),
        "peak_rss_mb": round(peak_rss_mb),
    }


def write_dataset_months(path: Path, rows: tuple[np.ndarray, ...], days: np.ndarray, only: set[str] | None) -> None:
    """Writes the membership partitions of the months `only`, or of all months, and the manifest of all."""
    folder = path.with_name(f"{path.name}.membership")
    folder.mkdir(parents=True, exist_ok=True)
    returns, member, sector, market = rows
    codes = pa.array([f"{i:05}" for i in range(returns.shape[1])])
    month_at = days.astype("datetime64[M]")
    partitions = {}
    for month in np.unique(month_at):
        inside = np.flatnonzero(month_at == month)
        digest = hashlib.sha256(returns[inside].tobytes()).hexdigest()
        partitions[str(month)] = {"rows": int(returns[inside].size), "membership_sha256": digest}
        if only is None or str(month) in only:
            table = {
                "Date": pa.array(np.repeat(days[inside], returns.shape[1]), pa.date32()),
                "Code": pa.chunked_array([codes] * len(inside)),
                "is_liquid": member[inside].ravel(),
                "return_1d": pa.array(returns[inside].ravel().astype(np.float64), from_pandas=True),
                "Sector33Code": pa.array(sector[inside].ravel()).cast(pa.string()),
                "MarketCode": pa.array(market[inside].ravel()).cast(pa.string()),
            }
            pq.write_table(pa.table(table), folder / f"{month}.parquet", compression="zstd", compression_level=1)
    write_manifest(
        path,
        {
            "kind": "ml_dataset",
            "fingerprint": f"{len(days)}",
            "source": {"path": "made here"},
            "parts": partitions,
            "session_dates": days.astype(str).tolist(),
        },
    )


def increment(folder: Path, stocks: int, sessions: int, neighbours: int) -> dict[str, Any]:
    """Seconds of a full build by month, and of one more session, which is a refresh."""
    config = GraphConfig(neighbours=neighbours)
    sessions -= (sessions - 1) % config.refresh_sessions
    days = np.busday_offset("2015-01-05", np.arange(sessions))
    rows = returns_of(stocks, sessions)
    write_dataset_months(folder / "d", tuple(values[:-1] for values in rows), days[:-1], None)
    full_s = milliseconds(lambda: build_graph_file(folder / "d", folder / "g", config)) / 1e3
    write_dataset_months(folder / "d", rows, days, {str(days[-1].astype("datetime64[M]"))})
    times, manifests = [], []
    for _ in range(REPETITIONS):
        work = lambda: manifests.append(build_graph_file(folder / "d", folder / "new", config, folder / "g"))  # noqa: E731
        times.append(milliseconds(work) / 1e3)
    made = manifests[0]
    last = made["months_computed"][-1]
    return {
        "stocks": stocks,
        "sessions": sessions,
        "neighbours": neighbours,
        "full_build_s": round(full_s, 1),
        "increment_s": round(statistics.median(times), 3),
        "best_increment_s": round(min(times), 3),
        "months_computed": made["months_computed"],
        "months_reused": len(made["months_reused"]),
        "part_as_recorded": content_sha256(load_graph(folder / "new" / f"{last}.parquet"))
        == made["parts"][last]["sha256"],
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=int, nargs=2, metavar=("STOCKS", "WINDOW"), help="one case, in this process")
    parser.add_argument("--neighbours", type=int, default=20)
    parser.add_argument("--increment", type=Path, metavar="DIR", help="an empty folder; it needs about 2 GB")
    parser.add_argument("--stocks", type=int, default=4000)
    parser.add_argument("--sessions", type=int, default=2450)
    options = parser.parse_args()
    if options.increment:
        print(json.dumps(increment(options.increment, options.stocks, options.sessions, options.neighbours)))
        shutil.rmtree(options.increment)
    elif options.case:
        print(json.dumps(case(*options.case, options.neighbours)))
    else:
        for stocks, window in CASES:
            again = ["--case", str(stocks), str(window), "--neighbours", str(options.neighbours)]
            subprocess.run([sys.executable, __file__, *again], check=True)


if __name__ == "__main__":
    main()
