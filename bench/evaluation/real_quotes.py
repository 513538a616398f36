"""What each model earns on real quotes: the table of results in README.md.

`python -m bench.evaluation.real_quotes WORK_DIR MARKET=SOURCE... [--document README.md]`

SOURCE is a folder of raw tables of MARKET (`tokyo`, `us`). The folds are those of `robustness` with five years of
training: a test year, the validation year before it, three seeds. The daily series of all test years are joined, and
each figure is computed on the joined series. Prints one JSON line per market and model.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atft_pipeline.evaluation import metrics
from bench.evaluation.robustness import CASES, folds, models_of_fold, settings_of
from bench.harness import command, put_between, trained

CASE = CASES["five years of training"]
NAMES: dict[str, str] = {
    "network": "network, three seeds averaged",
    "lightgbm": "LightGBM",
    "ridge": "ridge",
    "reversal": "one factor",
    "blend": "ensemble scores: network and LightGBM blended",
    "blend, smoothed": "the same, smoothed over 5 sessions",
}
SERIES = ("ic", "gross", "net")

Figures = dict[str, float]


def joined_series(source: Path, folder: Path, market: str) -> dict[tuple[str, str], NDArray[np.float64]]:
    """(model, series) -> its daily values over all test years, in order."""
    dataset, graph = folder / "full_dataset", folder / "full_graph_liquid"
    command("dataset", source, dataset, "--update", "--set", f"dataset.market={market}")
    command("graph", dataset, graph, "--update", "--set", "graph.universe=liquid")
    years: dict[tuple[str, str], list[NDArray[np.float64]]] = {}
    for split in folds(dataset, CASE.train_years):
        fixed = settings_of(CASE, split)
        runs = [trained(folder, dataset, graph, {**fixed, "train.seed": seed}) for seed in CASE.seeds]
        models, _ = models_of_fold(CASE, runs)
        for model, evaluation in models.items():
            for series in SERIES:
                years.setdefault((model, series), []).append(evaluation.daily[series])
    return {key: np.concatenate(values) for key, values in years.items()}


def figures(series: dict[tuple[str, str], NDArray[np.float64]], model: str) -> Figures:
    ic, ic_se = metrics.mean_and_error(series[model, "ic"])
    gross, net = series[model, "gross"], series[model, "net"]
    return {
        "ic": ic,
        "ic_se": ic_se,
        "sharpe": metrics.sharpe(gross),
        "sharpe_se": metrics.sharpe_standard_error(gross),
        "sharpe_net": metrics.sharpe(net),
        "sharpe_net_se": metrics.sharpe_standard_error(net),
        "sessions": float(np.isfinite(gross).sum()),
    }


def table_of(results: dict[str, dict[str, Figures]]) -> str:
    markets = list(results)
    columns = [f"{market}: {name}" for market in markets for name in ("IC", "Sharpe", "net of 10 bps")]
    rows = [f"| {dt.date.today()} | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for model, name in NAMES.items():
        cells = [
            f"{figures_by_model[model][figure]:.{digits}f} ± {figures_by_model[model][f'{figure}_se']:.{digits}f}"
            for figures_by_model in (results[market] for market in markets)
            for figure, digits in (("ic", 4), ("sharpe", 2), ("sharpe_net", 2))
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("sources", nargs="+", metavar="MARKET=SOURCE")
    parser.add_argument("--document", type=Path)
    options = parser.parse_args()
    results: dict[str, dict[str, Figures]] = {}
    for named in options.sources:
        market, _, source = named.partition("=")
        series = joined_series(Path(source), options.work_dir / market, market)
        results[market] = {model: figures(series, model) for model in NAMES}
        for model, values in results[market].items():
            print(json.dumps({"market": market, "model": model, **values}), flush=True)
    if options.document is not None:
        put_between(options.document, "results", table_of(results))


if __name__ == "__main__":
    main()
