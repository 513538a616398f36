"""Short experiments that confirm or refute a cause: from seconds to two epochs, on the run's own inputs and seed.

A probe computes again, with the code at hand, what the run claims: scores from its checkpoints, its data from the
source, its graph, its first epoch. Its figures are stored in the run's `probes/NAME.json` and read as signals like the
rest; a probe that cannot be made says why, and its figures stay not measured.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from atft_pipeline.dataset.layout import read_membership
from atft_pipeline.diagnostics.experiments.commands import experiment_overrides
from atft_pipeline.diagnostics.run_inputs import RunInputs
from atft_pipeline.errors import InputError, RunFailure
from atft_pipeline.evaluation.metrics import information_coefficient, mean_and_error
from atft_pipeline.runs.reader import Record, read_scores
from atft_pipeline.storage.artifact import read_artifact
from atft_pipeline.storage.atomic import write_json

Figures = dict[str, float | str | None]

PROBE_EPOCHS = 2
REPRODUCES = 1e-3
"""Largest difference over the spread of the scores at which predictions count as those of a checkpoint."""
RECOMPUTED_SESSIONS = 4
"""Sessions before the end of the validation whose features are computed again without any later data."""
VALUE_TOLERANCE = 1e-5
"""Relative: a feature is float32, and sums run over fewer sessions."""


def rescore(inputs: RunInputs) -> Figures:
    """Scores the validation sessions anew from the run's checkpoints and holds them against the stored predictions.

    `rescored_gap`: largest difference over the spread of the scores, of the checkpoint of the predictions' own epoch;
    `rescored_correlation`: of the two; `rescored_epoch`: the epoch whose checkpoint gives the predictions, -1 none.
    """
    predictions = inputs.record.predictions
    epoch = max(predictions, default=0)
    if not epoch:
        raise InputError("no readable predictions")
    if epoch not in inputs.checkpoints:
        raise InputError(f"no checkpoint of epoch {epoch}, whose predictions are stored")
    panel = inputs.panel
    stored = _placed(predictions[epoch], panel.sessions[inputs.split.validation], panel.codes)
    own = inputs.scores(inputs.model(epoch))
    both = np.isfinite(own) & np.isfinite(stored)
    if not both.any():
        raise InputError("the predictions hold none of the validation rows")
    gap = _gap(own, stored)
    others = (
        e for e in inputs.checkpoints if e != epoch and _gap(inputs.scores(inputs.model(e)), stored) <= REPRODUCES
    )
    varies = np.ptp(own[both]) > 0 and np.ptp(stored[both]) > 0
    return {
        "rescored_gap": gap,
        "rescored_correlation": float(np.corrcoef(own[both], stored[both])[0, 1]) if varies else None,
        "rescored_epoch": float(epoch if gap <= REPRODUCES else next(others, -1)),
        "rescored_ic": mean_and_error(information_coefficient(own, inputs.targets))[0],
    }


def _gap(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    both = np.isfinite(a) & np.isfinite(b)
    spread = float(np.std(a[both])) if both.any() else 0.0
    largest = float(np.abs(a - b)[both].max()) if both.any() else math.inf
    return largest / spread if spread > 0 else (0.0 if largest == 0 else math.inf)


def _placed(file: Path, sessions: NDArray[np.datetime64], codes: NDArray[np.str_]) -> NDArray[np.float64]:
    """Stored validation scores of horizon 1 as `[T, N]`, NaN where there is none."""
    table = read_scores(file, [1])
    if table is None:
        raise InputError(f"{file.name}: its columns are not those of predictions")
    table = table.filter(pc.equal(table["split"], "validation"))
    cells = np.full((len(sessions), len(codes)), np.nan)
    dates, names = table["Date"].to_numpy().astype("datetime64[D]"), np.array(table["Code"].to_pylist(), np.str_)
    t, n = np.searchsorted(sessions, dates), np.searchsorted(codes, names)
    known = (t < len(sessions)) & (n < len(codes))
    t, n, value = t[known], n[known], table["score_1d"].to_numpy()[known]
    here = (sessions[t] == dates[known]) & (codes[n] == names[known])
    cells[t[here], n[here]] = value[here]
    return cells


def data(inputs: RunInputs) -> Figures:
    """Holds the dataset's files against its manifest, and its rows against a dataset made anew from the source.

    `parts_unlike_manifest`: months whose content is not the one described. The rows of the last sessions before the end
    of the validation are computed without any later quote: `features_know_later`, features that come out otherwise;
    `rows_unlike_source`: share of rows that only one of the two has; `targets_unlike_source`: share of the targets
    known by then that differ.
    """
    found: Figures = {"parts_unlike_manifest": float(_unlike_manifest(inputs.dataset, inputs.manifest))}
    source = Path(inputs.manifest["source"]["path"])
    if not source.is_dir():
        return found
    sessions = inputs.sessions[: inputs.split.validation[-1] + 1]
    made = _made_until(source, sessions[-1], inputs.config.dataset)
    return found | _differences(inputs, made, sessions)


def _unlike_manifest(dataset: Path, manifest: dict[str, Any]) -> int:
    from atft_pipeline.dataset.rows import partition_record

    tables = read_artifact(dataset), read_membership(dataset)
    months = [np.datetime_as_string(table["Date"].to_numpy().astype("datetime64[M]")) for table in tables]

    def differs(name: str, described: dict[str, Any]) -> bool:
        features, members = (t.filter(pa.array(of == name)) for t, of in zip(tables, months, strict=True))
        return any(described.get(key) != value for key, value in partition_record(features, members).items())

    return sum(differs(name, part) for name, part in manifest["parts"].items() if part["rows"])


def _made_until(source: Path, last: np.datetime64, config: Any) -> pa.Table:
    """Features and targets of the source's rows up to the session `last`."""
    from atft_pipeline.dataset.rows import build_dataset
    from atft_pipeline.market.contracts import read_checked
    from atft_pipeline.market.sources import RAW_TABLES, open_source
    from atft_pipeline.market.universe import build_prices

    tables = dict(read_checked(open_source(source)).tables)
    for name, table in tables.items():
        day = RAW_TABLES[name].date
        # Snapshots of the listing may follow the quotes by years, and then describe all before them.
        tables[name] = table if name == "listed" else table.filter(table[day] <= last.item())
    prices = build_prices(tables, config)
    return build_dataset(prices.panel, prices.quarantine, tables, config, {"path": str(source)})[0]


def _differences(inputs: RunInputs, made: pa.Table, sessions: NDArray[np.datetime64]) -> Figures:
    import polars as pl

    days = sessions[-RECOMPUTED_SESSIONS:].astype("datetime64[D]").tolist()
    until = sessions[-1].item()
    stored = pl.scan_parquet(inputs.rows)
    theirs = stored.filter(pl.col("Date").is_in(days)).collect()
    ours = pl.from_arrow(made)
    assert isinstance(ours, pl.DataFrame)
    recent = ours.filter(pl.col("Date").is_in(days))
    joined = theirs.join(recent, on=["Date", "Code"], suffix="_made")
    keys = ["Date", "Code"]
    all_theirs, all_ours = stored.filter(pl.col("Date") <= until).select(keys).collect(), ours.select(keys)
    alone = (
        all_theirs.join(all_ours, on=keys, how="anti").height + all_ours.join(all_theirs, on=keys, how="anti").height
    )
    differing = [name for name in inputs.manifest["features"] if _unlike(joined[name], joined[f"{name}_made"])]
    # A target reaches past the cut: those of the sessions a month before it are known on both sides.
    known = stored.filter(pl.col("Date") <= until).select([*keys, "target_1d"]).collect()
    both = known.join(ours.select([*keys, "target_1d"]), on=keys, suffix="_made").drop_nulls("target_1d_made")
    wrong = (both["target_1d"].fill_null(float("inf")) - both["target_1d_made"]).abs() > VALUE_TOLERANCE
    return {
        "features_know_later": float(len(differing)),
        "features_know_later_names": ", ".join(differing[:5]) or "none",
        "rows_unlike_source": alone / max(all_theirs.height + all_ours.height, 1),
        "targets_unlike_source": float(wrong.mean() or 0.0) if both.height else None,  # type: ignore[arg-type]
    }


def _unlike(stored: Any, made: Any) -> bool:
    a, b = (column.cast(float).fill_null(np.nan).to_numpy() for column in (stored, made))
    spread = float(np.nanstd(a)) if np.isfinite(a).any() else 0.0
    same = np.isclose(a, b, rtol=VALUE_TOLERANCE, atol=VALUE_TOLERANCE * spread, equal_nan=True)
    return not bool(same.all())


def graph(inputs: RunInputs) -> Figures:
    """Builds the graph again from the run's dataset. `edges_unlike_dataset`: share of edges that only one has."""
    from atft_pipeline.graph.store import build_graph_file, load_graph

    if not inputs.config.model.graph:
        raise InputError("the run has no graph")
    path = inputs.graph
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "graph.parquet"
        build_graph_file(inputs.dataset, made, inputs.config.graph)
        ours, theirs = load_graph(made), load_graph(path)
    edges = [_edges(g) for g in (ours, theirs)]
    return {"edges_unlike_dataset": len(edges[0] ^ edges[1]) / max(len(edges[0] | edges[1]), 1)}


def _edges(of: Any) -> set[tuple[Any, ...]]:
    refresh = np.repeat(of.refreshes.astype("datetime64[D]").astype(int), np.diff(of.offsets))
    return set(zip(refresh.tolist(), of.codes[of.source].tolist(), of.codes[of.target].tolist(), strict=True))


def baseline(inputs: RunInputs) -> Figures:
    """Ridge on the run's training sessions, judged on its validation sessions: is there anything to learn?

    `baseline_ic` and its t; `over_baseline_t`: of the run's daily IC minus ridge's; `baseline_train_ic`: in sample.
    """
    from atft_pipeline.evaluation.baselines import fit_ridge

    panel, split = inputs.panel, inputs.split
    scores = fit_ridge(panel, split, np.concatenate([split.train, split.validation]))
    ic = information_coefficient(scores[split.validation], inputs.targets)
    trained = information_coefficient(scores[split.train], panel.targets[split.train, :, 0].astype(np.float64))
    mean, error = mean_and_error(ic)
    own = _daily_ic(inputs.record, panel.sessions[split.validation])
    difference = mean_and_error(own - ic)
    return {
        "baseline_ic": mean,
        "baseline_ic_t": mean / error if error else None,
        "baseline_train_ic": mean_and_error(trained)[0],
        "over_baseline_t": difference[0] / difference[1] if difference[1] else None,
    }


def _daily_ic(record: Record, sessions: NDArray[np.datetime64]) -> NDArray[np.float64]:
    rows = record.rows(
        """SELECT date, ic FROM daily WHERE split = 'validation' AND slice = ?
           AND epoch = (SELECT max(epoch) FROM daily) AND isfinite(ic)""",
        record.slice,
    )
    values = dict(rows)
    return np.array([values.get(day, math.nan) for day in sessions.astype("datetime64[D]").tolist()], float)


def ablate(inputs: RunInputs) -> Figures:
    """Permutes the output of each component over the stocks of every session and measures what the IC loses.

    Of the graph, which hands its input on, what it adds to it.

    `drop_t_NAME`: t of the paired daily difference, of the last checkpoint's weights on the validation sessions.
    """
    import torch

    from atft_pipeline.model.gat import GraphAttention

    if not inputs.checkpoints:
        raise InputError("no checkpoint")
    model = inputs.model(max(inputs.checkpoints))

    def daily() -> NDArray[np.float64]:
        return information_coefficient(inputs.scores(model), inputs.targets)

    def permuted(module: Any, arguments: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or output.ndim != 3:
            return output
        order = torch.randperm(output.shape[0], generator=torch.Generator().manual_seed(inputs.config.train.seed))
        handed_on = arguments[0] if isinstance(module, GraphAttention) else torch.zeros_like(output)
        return handed_on + (output - handed_on)[order]

    whole, found = daily(), Figures()
    for name, child in model.named_children():
        if name in ("adaptive_norm", "prediction_head") or not any(True for _ in child.parameters()):
            continue
        handle = child.register_forward_hook(permuted)
        mean, error = mean_and_error(whole - daily())
        handle.remove()
        found[f"drop_t_{name}"] = mean / error if error else 0.0
    return found


def replay(inputs: RunInputs) -> Figures:
    """Trains the first epoch again, same code, data and seed. `replay_differs`: 1 where its weights are others,
    `replay_initial_differs`: where the weights it starts from already are.

    Needs the code that the run was trained with and a CPU run of one process: nothing else promises the same bits.
    """
    import torch

    from atft_pipeline.runs.record import RunRecord
    from atft_pipeline.storage.code_version import code_revision
    from atft_pipeline.training.judging.scoring import weights_hash
    from atft_pipeline.training.plan import plan_run, resolve_device, run_header
    from atft_pipeline.training.trainer import Trainer

    record = inputs.record
    if record.run.get("code_revision") != code_revision("run"):
        raise InputError("the code has changed since the run")
    if record.run.get("device") != "cpu" or record.run.get("processes") != 1:
        raise InputError("only runs of one process on a CPU promise the same bits")
    hashes = record.rows("SELECT min(weights_hash) FROM evals WHERE epoch = 1 AND weights_hash IS NOT NULL")
    if not hashes or hashes[0][0] is None:
        raise InputError("no evaluation of epoch 1")
    plan = plan_run(inputs.config, inputs.dataset, inputs.graph)
    threads = torch.get_num_threads()
    torch.set_num_threads(int(record.run.get("threads") or threads))  # sums of several threads run in another order
    try:
        with tempfile.TemporaryDirectory() as folder:
            run_dir = Path(folder)
            fresh = RunRecord(run_dir, run_header(plan, run_dir, resolve_device("cpu"), {}))
            trainer = Trainer(plan, fresh, resolve_device("cpu"), lambda _: None)
            initial = weights_hash(trainer.average.model)
            trainer.train_epoch(1)
            found = weights_hash(trainer.average.model)
    finally:
        torch.set_num_threads(threads)
    recorded = record.run.get("initial_weights_hash")
    return {
        "replay_differs": float(found != hashes[0][0]),
        "replay_initial_differs": float(initial != recorded) if recorded else None,
    }


REMEDIES: dict[str, Callable[[Record], dict[str, Any]]] = {
    "lr_too_high": lambda record: {"train.optimizer.lr": record.number("train.optimizer.lr", 1e-3) / 10},
    "lr_too_low": lambda record: {"train.optimizer.lr": max(10 * record.number("train.optimizer.lr", 1e-4), 1e-3)},
    "lr_decayed_early": lambda _: {"train.schedule.name": "constant"},
    "scheduler_never_steps": lambda _: {"train.schedule.name": "constant", "train.schedule.warmup_fraction": 0.0},
    "clipping_too_tight": lambda _: {"train.optimizer.clip_norm": 1.0},
    "sharpe_term_light": lambda record: experiment_overrides(record)["B"],
    "terms_in_conflict": lambda _: {"train.loss.rank_ic": 0.0, "train.loss.sharpe": 0.0},
    "variance_penalty_dominates": lambda _: {"train.loss.variance_penalty": 0.0},
}
"""Cause -> the settings that would remove it; what settings cannot remove has none."""


def remedy(inputs: RunInputs, cause: str) -> Figures:
    """Two epochs as the run was set and two with the cause's remedy, same seed and batches, IC paired by session.

    The settings are those of this code: where a fault lies in code that has changed since, both are without it.
    """
    from atft_pipeline.config.overrides import with_overrides
    from atft_pipeline.training.train import train

    if cause not in REMEDIES:
        raise InputError("no settings remove this cause")
    short = replace(inputs.config, train=replace(inputs.config.train, epochs=PROBE_EPOCHS))
    ics: list[dict[Any, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in (
            ("as_it_was", short),
            ("changed", with_overrides(short, REMEDIES[cause](inputs.record))),
        ):
            run_dir = Path(folder) / name
            train(settings, inputs.dataset, inputs.graph, run_dir, device="cpu", log=lambda _: None)
            rows = pq.read_table(run_dir / "daily").to_pylist()
            place = (PROBE_EPOCHS, "validation", inputs.record.slice)
            ics.append({row["date"]: row["ic"] for row in rows if (row["epoch"], row["split"], row["slice"]) == place})
    gains = [ics[1][day] - ics[0][day] for day in ics[0] if None not in (ics[0][day], ics[1].get(day))]
    if len(gains) < 2:
        raise InputError("no session has an IC on both sides")
    mean, error = mean_and_error(np.array(gains))
    return {"remedy_ic_gain": mean, "remedy_ic_gain_t": mean / error if error else None}


PROBES: dict[str, Callable[[RunInputs], Figures]] = {
    "rescore": rescore,
    "data": data,
    "graph": graph,
    "baseline": baseline,
    "ablate": ablate,
    "replay": replay,
}
"""Probes that need nothing but the run."""
REMEDY = "remedy"
"""Probe of a cause that settings remove: `remedy` of that cause."""


PROBE_SIGNALS: dict[str, tuple[str, ...]] = {
    "rescore": ("rescored_gap", "rescored_correlation", "rescored_epoch", "rescored_ic"),
    "data": (
        "parts_unlike_manifest", "features_know_later", "features_know_later_names", "rows_unlike_source",
        "targets_unlike_source",
    ),
    "graph": ("edges_unlike_dataset",),
    "baseline": ("baseline_ic", "baseline_ic_t", "baseline_train_ic", "over_baseline_t"),
    "ablate": ("drop_t_temporal_encoder", "drop_t_gat"),
    "replay": ("replay_differs", "replay_initial_differs"),
}  # fmt: skip
"""Signals that rules may ask for, by the probe that measures them."""


def run_probes(record: Record, names: Iterable[str]) -> None:
    """Makes the named probes and stores their figures; those of an earlier call are made again."""
    inputs = RunInputs(record)
    for name in dict.fromkeys(names):
        _run(inputs, name, PROBES[name])


def run_remedies(record: Record, causes: Iterable[str]) -> None:
    """Tries the remedy of each cause and stores what it brought."""
    inputs = RunInputs(record)
    for cause in dict.fromkeys(causes):
        _run(inputs, f"{REMEDY}_{cause}", partial(remedy, cause=cause))


def _run(inputs: RunInputs, name: str, probe: Callable[[RunInputs], Figures]) -> None:
    started = time.perf_counter()
    try:
        content: dict[str, Any] = {"figures": probe(inputs)}
    except (InputError, RunFailure, OSError, KeyError, RuntimeError, pa.ArrowException) as error:
        content = {"figures": {}, "not_made": str(error).splitlines()[0] if str(error) else type(error).__name__}
    content |= {"probe": name, "run_key": inputs.record.run.get("key"), "seconds": time.perf_counter() - started}
    content["figures"] = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in content["figures"].items()
    }
    write_json(inputs.record.run_dir / "probes" / f"{name}.json", content)


def stored_probes(record: Record) -> list[dict[str, Any]]:
    """Contents of the `probes/NAME.json` that were made of this very run, readable ones alone."""
    found = []
    for path in sorted((record.run_dir / "probes").glob("*.json")):
        with suppress(OSError, ValueError):
            content = json.loads(path.read_text(encoding="utf-8"))
            is_probe = isinstance(content, dict) and "probe" in content and isinstance(content.get("figures"), dict)
            if is_probe and content.get("run_key") == record.run.get("key"):
                found.append(content)
    return found


def probe_figures(record: Record) -> dict[str, float | str | None]:
    """What the stored probes of PROBES measured; what a remedy brought is for the reader."""
    figures = [item for probe in stored_probes(record) if probe["probe"] in PROBES for item in probe["figures"].items()]
    return {name: value for name, value in figures if isinstance(value, float | str)}
