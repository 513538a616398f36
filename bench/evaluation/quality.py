"""What the network learns from a market whose answer is known.

`python -m bench.evaluation.quality WORK_DIR [--document FILE.md]`

The market: `atft synthesize --hard`, 1,000 stocks x 1,250 sessions, all investable stocks. The figure: correlation
across stocks of the score with the true expected return of `target_1d`, mean over the test sessions. Every model has
one configuration for all its seeds, and its last epoch counts. LightGBM and ridge are the pipeline's own baselines;
`with neighbours` adds to each feature its mean over the stock's neighbours in the graph. The ablations follow: the
network with one component left out or one loss term changed, for the first seed only.

Prints one JSON line per model, failures included, and with `--document` puts the table between the markers
`<!-- quality -->` of that file. Finished runs in WORK_DIR are read again, not trained again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from atft_pipeline.batches.block_dataset import BlockDataset
from atft_pipeline.batches.panel import Panel, load_panel
from atft_pipeline.config.overrides import with_overrides
from atft_pipeline.config.presets import preset
from atft_pipeline.dataset.splits import make_split
from atft_pipeline.evaluation.baselines import fit_baselines
from atft_pipeline.graph.build import StockGraph
from atft_pipeline.graph.store import load_graph
from atft_pipeline.runs.header import read_run
from bench.harness import command, put_between, trained

STOCKS, SESSIONS, MARKET_SEED = 1000, 1250, 0
SEEDS = (1, 2, 3)
COMMON: dict[str, object] = {
    "split.scheme": "fraction",
    "train.universe": "all",
    "train.batch_size": 15_000,
    "train.epochs": 8,
    "train.optimizer.lr": 4e-3,
    "train.optimizer.weight_decay": 3.0,
    "model.normalisation": "none",
}
"""What differs from the preset `cpu`. This market's signals are levels, so no normalisation: it would leave noise."""
MODELS: dict[str, dict[str, object]] = {
    "network": {},
    "network without graph": {"model.graph": False},
}
ABLATIONS: dict[str, dict[str, object]] = {
    "no encoder": {"model.encoder_layers": 0},
    "no feature gates": {"model.feature_gates": False},
    "no skip path": {"model.skip": False},
    "no graph": {"model.graph": False},
    **{f"normalisation {name}": {"model.normalisation": name} for name in ("san", "revin", "fan")},
    "IC instead of squared error": {"train.loss.mse": 0.0, "train.loss.ic": 1.0},
    "RankIC instead of squared error": {"train.loss.mse": 0.0, "train.loss.rank_ic": 1.0},
    "Sharpe instead of squared error": {"train.loss.mse": 0.0, "train.loss.sharpe": 1.0},
    "IC beside it, weight 0.5": {"train.loss.ic": 0.5},
    "RankIC beside it, weight 0.5": {"train.loss.rank_ic": 0.5},
    "Sharpe beside it, weight 0.1": {"train.loss.sharpe": 0.1},
    "variance penalty beside it, weight 1": {"train.loss.variance_penalty": 1.0},
    "all horizons weighted 1": {"train.loss.horizon_weights": [1.0, 1.0, 1.0, 1.0]},
}
"""The network with one component or one loss term changed at a time."""


def prepared(folder: Path) -> tuple[Path, Path, Path]:
    """Source, dataset and graph of the hard market, made where they are missing."""
    source, dataset, graph = folder / "hard", folder / "hard_dataset", folder / "hard_graph"
    if not source.exists():
        command("market", source, "--stocks", STOCKS, "--sessions", SESSIONS, "--seed", MARKET_SEED, "--hard")
    command("features", source, dataset, "--update")
    if not graph.exists():
        command("graph", dataset, graph, "--set", "graph.universe=all")
    return source, dataset, graph


def truth(source: Path, panel: Panel) -> NDArray[np.float64]:
    """Expected `target_1d` `[T, N]`, NaN where the generator gives none."""
    table = pl.read_parquet(source / "truth.parquet").filter(
        pl.col("Code").is_in(panel.codes.tolist()),
        pl.col("Date").is_in(panel.sessions.astype("datetime64[D]").tolist()),
    )
    return placed(table, "expected_target_1d", panel)


def placed(table: pl.DataFrame, column: str, panel: Panel) -> NDArray[np.float64]:
    """A column of a table by Date and Code, as `[T, N]` of the panel; NaN where the table has no row."""
    cells = np.full(panel.member.shape, np.nan)
    t = np.searchsorted(panel.sessions, table["Date"].to_numpy().astype("datetime64[D]"))
    n = np.searchsorted(panel.codes, table["Code"].to_numpy().astype(str))
    cells[t, n] = table[column].to_numpy()
    return cells


def correlation(scores: NDArray[np.floating], expected: NDArray[np.float64], member: NDArray[np.bool_]) -> float:
    """Pearson correlation across the members of each session, mean over sessions."""
    by_session = []
    for score, true, used in zip(scores, expected, member & np.isfinite(scores) & np.isfinite(expected), strict=True):
        by_session.append(np.corrcoef(score[used], true[used])[0, 1])
    return float(np.mean(by_session))


def network(
    folder: Path, dataset: Path, graph: Path, changes: dict[str, object], seed: int, panel: Panel
) -> NDArray[Any]:
    """Scores [T, N] of the last epoch on the test sessions, NaN elsewhere."""
    run = trained(folder, dataset, graph, COMMON | changes | {"train.seed": seed})
    epochs = read_run(run)["epochs_done"]
    table = pl.read_parquet(run / "predictions" / f"epoch_{epochs:03d}.parquet").filter(pl.col("split") == "test")
    return placed(table, "score_1d", panel)


def with_neighbours(panel: Panel, graph: StockGraph) -> Panel:
    """The panel with further features: the mean of each feature over a stock's neighbours."""
    T, N, F = panel.features.shape
    joined = np.zeros((T, N, 2 * F), np.float32)
    data = BlockDataset(panel, graph, receptive_field=1)
    for t in np.flatnonzero(panel.member.any(axis=1)):
        block = data.block(np.array([t]))
        features, table = block.x[:, 0], block.neighbours  # [n, F]
        is_edge = table.is_edge[0].unsqueeze(-1)  # [n, K, 1]
        sums = (features[table.source[0]] * is_edge).sum(dim=1)
        joined[t, block.stock_index] = torch.cat((features, sums / is_edge.sum(dim=1).clamp(min=1)), dim=1)
    names = [*panel.feature_names, *(f"neighbours_{name}" for name in panel.feature_names)]
    return Panel(**{**vars(panel), "features": joined, "feature_names": names})


def table_of(lines: list[dict[str, Any]]) -> str:
    rows = ["| model | correlation with the true expected return, test | seeds |", "| --- | --- | --- |"]
    for line in lines:
        each = ", ".join(f"{value:.3f}" for value in line["by_seed"])
        rows.append(f"| {line['model']} | {line['mean']:.3f} | {each} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--document", type=Path)
    options = parser.parse_args()
    folder = options.work_dir
    source, dataset, graph = prepared(folder)
    config = with_overrides(preset("cpu"), COMMON)
    panel = load_panel(dataset, config.train.universe)
    split, expected = make_split(panel.sessions, config.split), truth(source, panel)
    lines: list[dict[str, Any]] = []

    def report(model: str, scores: list[NDArray[Any]]) -> None:
        test = split.test
        by_seed = [correlation(values[test], expected[test], panel.member[test]) for values in scores]
        lines.append({"model": model, "mean": float(np.mean(by_seed)), "by_seed": by_seed})
        print(json.dumps(lines[-1]), flush=True)

    for name in MODELS:
        report(name, [network(folder, dataset, graph, MODELS[name], seed, panel) for seed in SEEDS])
    fitted = fit_baselines(panel, split, config.train.seed)
    fitted_with_neighbours = fit_baselines(with_neighbours(panel, load_graph(graph)), split, config.train.seed)
    report("LightGBM", [fitted["lightgbm"]])
    report("LightGBM with neighbours", [fitted_with_neighbours["lightgbm"]])
    report("ridge", [fitted["ridge"]])
    report("ridge with neighbours", [fitted_with_neighbours["ridge"]])
    for name, changes in ABLATIONS.items():
        report(f"ablation: {name}", [network(folder, dataset, graph, changes, SEEDS[0], panel)])
    if options.document is not None:
        put_between(options.document, "quality", table_of(lines))


if __name__ == "__main__":
    main()
