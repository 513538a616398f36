"""Whether the preset `cpu` does well on other years, histories and universes.

`python -m bench.evaluation.robustness SOURCE WORK_DIR [--document FILE.md]`

SOURCE is a folder of raw tables of several years (the real decade, or another market). A fold is a test year, the
validation year before it and two, three or five training years before that. Every fold trains the network with one or
several seeds, and LightGBM, ridge and the best one-factor reversal on the same sessions. The pipeline's own evaluation
judges all on the test year, with differences paired by day. Network, LightGBM and blend are those of `combine_runs`,
whose weight follows the validation year alone.

Prints one JSON line per fold and one per case, failures included. `--document FILE` puts the table of cases between the
markers `<!-- robustness -->`. Finished runs in WORK_DIR are read again, not trained again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from atft_pipeline.batches.panel import load_panel
from atft_pipeline.config.overrides import from_dict
from atft_pipeline.dataset.splits import make_split
from atft_pipeline.ensemble.ensemble import combine_runs
from atft_pipeline.ensemble.ensemble_scores import ENSEMBLE, EnsembleScores, ic_difference, sharpe_by_cost
from atft_pipeline.evaluation.baselines import fit_baselines
from atft_pipeline.evaluation.evaluate import Evaluation, evaluate_panel
from atft_pipeline.evaluation.slices import panel_of_slice
from atft_pipeline.runs.header import read_run
from bench.harness import command, put_between, trained

EPOCHS = 8
THIN_SHARE = 3
"""The thin market keeps one code in this many."""

FIVE_SESSIONS: dict[str, object] = {"train.loss.horizon_weights": [0.3, 1.0, 0.5, 0.2]}
"""Settings of a user who wants the 5-session score."""


@dataclass(frozen=True)
class Case:
    """Folds that answer one question."""

    train_years: int
    seeds: tuple[int, ...] = (1, 2, 3)
    universe: str = "liquid"
    thin: bool = False
    horizon_sessions: int = 1
    settings: dict[str, object] = field(default_factory=dict)


WIDE: dict[str, object] = {"train.batch_size": 25_600}
"""Sixteen sessions of all 1,600 investable stocks; the preset's batch is sixteen sessions of 420 liquid ones."""

ONE_SEED = (1,)
CASES: dict[str, Case] = {
    "five years of training": Case(5),
    "three years": Case(3),
    "two years": Case(2, seeds=ONE_SEED),
    "two years, 20 epochs": Case(2, seeds=ONE_SEED, settings={"train.epochs": 20}),
    "five years, all investable stocks": Case(5, seeds=ONE_SEED, universe="all", settings=WIDE),
    "three years, all investable stocks": Case(3, seeds=ONE_SEED, universe="all", settings=WIDE),
    "five years, a third of the codes": Case(5, thin=True),
    "three years, a third of the codes": Case(3, seeds=ONE_SEED, thin=True),
    "five years, 5-session horizon": Case(5, horizon_sessions=5, settings=FIVE_SESSIONS),
    "three years, 5-session horizon": Case(3, seeds=ONE_SEED, horizon_sessions=5, settings=FIVE_SESSIONS),
    "five years, 20 epochs": Case(5, seeds=ONE_SEED, settings={"train.epochs": 20}),
}


def thinned(source: Path, out: Path) -> Path:
    """The source with one code in `THIN_SHARE`, written where it is missing."""
    if not out.exists():
        out.mkdir(parents=True)
        for file in sorted(source.glob("*.parquet")):
            table = pl.read_parquet(file)
            if file.stem in ("prices", "listed"):
                codes = pl.read_parquet(source / "prices.parquet", columns=["Code"])["Code"].unique().sort()
                table = table.filter(pl.col("Code").is_in(codes.gather_every(THIN_SHARE).to_list()))
            table.write_parquet(out / file.name)
    return out


def prepared(source: Path, folder: Path, case: Case) -> tuple[Path, Path]:
    """Dataset and graph of the case, made where they are missing."""
    name = "thin" if case.thin else "full"
    dataset, graph = folder / f"{name}_dataset", folder / f"{name}_graph_{case.universe}"
    command("dataset", thinned(source, folder / "thin") if case.thin else source, dataset, "--update")
    command("graph", dataset, graph, "--update", "--set", f"graph.universe={case.universe}")
    return dataset, graph


def folds(dataset: Path, train_years: int) -> Iterator[dict[str, object]]:
    """One split per test year. Training never starts before the second year, because the long windows are full then."""
    days = np.sort(pl.scan_parquet(f"{dataset}.membership/*.parquet").select("Date").collect()["Date"].unique())
    years = days.astype("datetime64[Y]").astype(int) + 1970
    for test in range(int(years[0]) + train_years + 2, int(years[-1]) + 1):
        yield {
            "split.scheme": "dates",
            "split.train_start": f"{test - 1 - train_years}-01-01",
            "split.validation_start": f"{test - 1}-01-01",
            "split.test_start": f"{test}-01-01",
            "split.test_end": f"{test}-12-31",
        }


def settings_of(case: Case, split: dict[str, object]) -> dict[str, object]:
    """What differs from the preset `cpu` in the fold, except the seed."""
    universes = dict.fromkeys(("train.universe", "evaluation.universe"), case.universe)
    return {"train.epochs": EPOCHS, **universes, **case.settings, **split}


def simple_models(run: Path) -> dict[str, Evaluation]:
    """Ridge and the best one-factor reversal on the run's test sessions, horizon 1."""
    header = read_run(run)
    config = from_dict(header["config"])
    panel = load_panel(Path(header["dataset_path"]), config.train.universe)
    split = make_split(panel.sessions, config.split)
    scores = fit_baselines(panel, split, config.train.seed)
    test = panel_of_slice(panel, split.test, config.evaluation.universe)
    return {name: evaluate_panel(scores[name][split.test], test, config.evaluation) for name in ("ridge", "reversal")}


def figures(evaluation: Evaluation) -> dict[str, float | None]:
    return {
        "ic": evaluation.value("ic_mean"),
        "rank_ic": evaluation.value("rank_ic_mean"),
        **sharpe_by_cost(evaluation),
    }


def models_of_fold(case: Case, runs: list[Path]) -> tuple[dict[str, Evaluation], EnsembleScores]:
    """Every model's evaluation on the test year, and the ensemble scores of the runs."""
    scores = combine_runs(runs, horizon_sessions=case.horizon_sessions, blend="lightgbm", smoothing_sessions=5)
    test = scores.evaluations["test"]
    models = {name: test[name] for name in ("network", "lightgbm", "blend")} | {"blend, smoothed": test[ENSEMBLE]}
    return models | (simple_models(runs[0]) if case.horizon_sessions == 1 else {}), scores


def fold_line(case: Case, split: dict[str, object], runs: list[Path]) -> dict[str, Any]:
    """Figures of every model on the test year, and the differences of network and blend to LightGBM."""
    models, scores = models_of_fold(case, runs)
    test = scores.evaluations["test"]
    samples = from_dict(read_run(runs[0])["config"]).evaluation.bootstrap_samples
    against = {
        name: ic_difference(models[name], models["lightgbm"], horizon_sessions=case.horizon_sessions, samples=samples)
        for name in ("network", "blend")
    }
    return {
        "test": str(split["split.test_start"])[:4],
        "models": {name: figures(evaluation) for name, evaluation in models.items()},
        "seeds": [test[name].value("ic_mean") for name in test if name.startswith("seed_")],
        "weight": scores.manifest["weight"]["network"],
        "over_lightgbm": against,
    }


def summary(name: str, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A case over its folds: means, the worst fold, and how many folds the network wins."""

    def mean(model: str, figure: str) -> float:
        return float(np.mean([line["models"][model][figure] for line in lines]))

    models = lines[0]["models"]
    ahead = {who: [line["over_lightgbm"][who]["ic_difference"] for line in lines] for who in ("network", "blend")}
    errors = {who: [line["over_lightgbm"][who]["se"] for line in lines] for who in ahead}
    return {
        "case": name,
        "folds": len(lines),
        "ic": {model: mean(model, "ic") for model in models},
        "rank_ic": {model: mean(model, "rank_ic") for model in models},
        "sharpe_0_5_10_bps": {model: [mean(model, f"sharpe_net_{bps}bps") for bps in (0, 5, 10)] for model in models},
        "network_won": sum(value > 0 for value in ahead["network"]),
        "over_lightgbm": {
            who: {
                "mean": float(np.mean(values)),
                "se": float(np.sqrt(np.sum(np.square(errors[who]))) / len(values)),
                "worst": float(np.min(values)),
            }
            for who, values in ahead.items()
        },
    }


def table_of(summaries: Sequence[dict[str, Any]]) -> str:
    rows = [
        "| folds | IC: network | LightGBM | ridge | one factor | blend | network − LightGBM | worst | won"
        " | blend − LightGBM | worst | Sharpe of the blend at 0, 5, 10 bps | smoothed, 10 bps |",
        "| --- " * 13 + "|",
    ]
    for line in summaries:
        ics = [f"{line['ic'][m]:.4f}" if m in line["ic"] else "" for m in ("network", "lightgbm", "ridge", "reversal")]
        network, blend = line["over_lightgbm"]["network"], line["over_lightgbm"]["blend"]
        cells = [
            line["case"],
            *ics,
            f"{line['ic']['blend']:.4f}",
            f"{network['mean']:+.4f} ± {network['se']:.4f}",
            f"{network['worst']:+.4f}",
            f"{line['network_won']} of {line['folds']}",
            f"{blend['mean']:+.4f} ± {blend['se']:.4f}",
            f"{blend['worst']:+.4f}",
            ", ".join(f"{value:.3f}" for value in line["sharpe_0_5_10_bps"]["blend"]),
            f"{line['sharpe_0_5_10_bps']['blend, smoothed'][2]:.3f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--document", type=Path)
    options = parser.parse_args()
    summaries = []
    for name in options.cases:
        case, lines = CASES[name], []
        dataset, graph = prepared(options.source, options.work_dir, case)
        for split in folds(dataset, case.train_years):
            fixed = settings_of(case, split)
            runs = [trained(options.work_dir, dataset, graph, {**fixed, "train.seed": seed}) for seed in case.seeds]
            line = fold_line(case, split, runs)
            print(json.dumps({"case": name, **line}), flush=True)
            lines.append(line)
        summaries.append(summary(name, lines))
        print(json.dumps(summaries[-1]), flush=True)
    if options.document is not None:
        put_between(options.document, "robustness", table_of(summaries))


if __name__ == "__main__":
    main()
