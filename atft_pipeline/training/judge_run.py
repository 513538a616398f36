"""From a run's own record to its verdict: the validity battery at the epochs that count, then `verdict.json`.

Everything here is read back from the run directory it judges, so a resumed run is judged like an uninterrupted one, and
no figure of another run can enter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atft_pipeline.batches.blocks import Panel
from atft_pipeline.config.schema import PipelineConfig, from_dict
from atft_pipeline.errors import InputError
from atft_pipeline.evaluation.evaluate import REVERSAL_FEATURES, evaluate, one_factor_reversal
from atft_pipeline.runs.record import read_run, read_table, series_values
from atft_pipeline.storage.atomic import write_json
from atft_pipeline.storage.product import read_membership
from atft_pipeline.training.checkpoints import read_checkpoint
from atft_pipeline.training.scoring import Scores, evaluate_scores, slice_mask
from atft_pipeline.verdict.criterion import (
    CriterionEvidence,
    HealthItem,
    Progress,
    finite_losses,
    gradients_reach_components,
    judge,
    parameters_moved,
    predictions_not_constant,
)
from atft_pipeline.verdict.validity import (
    REPEAT_TOLERANCE_CPU,
    REPEAT_TOLERANCE_GPU,
    ValidityItem,
    forward_returns,
    lag_scan,
    not_assessable,
    validity_battery,
)

Rows = list[dict[str, Any]]


class Battery:
    """Runs the validity battery on one epoch's validation scores and keeps it as `validity/epoch_NNN.json`."""

    def __init__(self, panel: Panel, dataset: Path, config: PipelineConfig) -> None:
        self.panel, self.dataset, self.config = panel, dataset, config

    @cached_property
    def _prices(self) -> dict[str, NDArray[np.float64]]:
        """Adjusted Open, Close and one-session return of the panel's stocks, [T, N] each, NaN where missing."""
        names = ["Open", "Close", "return_1d"]
        table = read_membership(self.dataset, ["Date", "Code", *names])
        code = table["Code"].combine_chunks().dictionary_encode()
        distinct = np.array(code.dictionary.to_pylist(), dtype=np.str_)
        place = np.searchsorted(self.panel.codes, distinct)
        known = self.panel.codes[np.minimum(place, len(self.panel.codes) - 1)] == distinct
        row_place = np.where(known, place, -1)[code.indices.to_numpy()]
        session = np.searchsorted(self.panel.sessions, table["Date"].to_numpy().astype("datetime64[D]"))
        kept = row_place >= 0
        dense = {}
        for name in names:
            dense[name] = np.full((len(self.panel.sessions), len(self.panel.codes)), np.nan)
            dense[name][session[kept], row_place[kept]] = table[name].to_numpy()[kept]
        return dense

    def run(
        self,
        run_dir: Path,
        epoch: int,
        *,
        trained: Scores,
        again: Scores,
        reinitialised: Scores,
        hashes: Mapping[str, str],
        previous_hashes: Mapping[str, str] | None,
        learning_rate: float,
        on_gpu: bool,
        train_sessions: NDArray[np.int64],
    ) -> None:
        """`again` scores the same weights in other blocks; `learning_rate` is the largest of the epoch."""
        panel, config, universe = self.panel, self.config.evaluation, self.config.evaluation.universe
        sessions = trained.sessions
        inside = slice_mask(panel, universe)[sessions]

        def scores(of: Scores) -> NDArray[np.float64]:
            return np.where(inside, of.values[:, :, 0], np.nan).astype(np.float64)

        targets = np.where(inside, panel.targets[sessions, :, 0], np.nan).astype(np.float64)
        first, second = (evaluate_scores(of, panel, universe, config) for of in (trained, again))
        recomputed = forward_returns(self._prices["Open"], self._prices["Close"], panel.manifest["execution"], 1)
        items = validity_battery(
            scores(trained),
            targets,
            quantile=config.quantile,
            seed=self.config.train.seed,
            fresh_scores=scores(reinitialised),
            again_scores=scores(again),
            statistics=first.values() if first.valid else {},
            again_statistics=second.values() if second.valid else {},
            repeat_tolerance=REPEAT_TOLERANCE_GPU if on_gpu else REPEAT_TOLERANCE_CPU,
            recomputed_targets=recomputed[sessions],
            previous_hashes=previous_hashes,
            current_hashes=hashes,
            learning_rate=learning_rate,
        )
        sharpe = first.value("sharpe_daily") if first.valid else None
        scan = lag_scan(scores(trained), self._prices["return_1d"][sessions], sharpe_daily=sharpe)
        content = {
            "epoch": epoch,
            "items": [_finite(item.as_dict()) for item in items],
            "lag_scan": scan,
            "reversal_sharpe": self._reversal_sharpe(sessions, train_sessions),
        }
        write_json(run_dir / "validity" / f"epoch_{epoch:03d}.json", content)

    def _reversal_sharpe(self, sessions: NDArray[np.int64], train_sessions: NDArray[np.int64]) -> float | None:
        """What the best one-factor reversal of the training sessions earns on these, under the same evaluation.

        None where the dataset has neither return that it is made of.
        """
        panel, config = self.panel, self.config.evaluation
        if not set(REVERSAL_FEATURES) & set(panel.feature_names):
            return None
        member = slice_mask(panel, config.universe)
        reversal = one_factor_reversal(
            panel.features,
            panel.feature_names,
            panel.targets[:, :, 0],
            member,
            train_sessions,
            quantile=config.quantile,
        )
        evaluation = evaluate(
            reversal.scores[sessions],
            panel.targets[sessions, :, 0],
            panel.sessions[sessions],
            panel.codes,
            config,
            days_per_year=int(panel.manifest["days_per_year"]),
            bootstrap=False,
            member=member[sessions],
        )
        return evaluation.value("sharpe_daily") if evaluation.valid else None


def _finite(item: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(v, float) and not np.isfinite(v) else v for name, v in item.items()}


def write_verdict(run_dir: Path) -> dict[str, Any]:
    """Judges the run from its record, writes `verdict.json` and returns its content."""
    header = read_run(run_dir)
    config = from_dict(header["config"])
    evals = read_table(run_dir, "evals").to_pylist()
    batteries = [json.loads(path.read_text()) for path in sorted((run_dir / "validity").glob("epoch_*.json"))]
    last = header["epochs_done"]
    judged = config.evaluation.criterion_epoch if last >= config.evaluation.criterion_epoch else last
    battery = next((b for b in batteries if b["epoch"] == judged), None)
    final_hashes = [row for row in evals if row["epoch"] == last and row["split"] == "validation"]
    verdict = judge(
        config=config.evaluation,
        epochs_planned=header["epochs_planned"],
        epochs_done=last,
        evidence=_evidence(evals, config, judged),
        validity=[*_validity(batteries), _weights_left_their_start(header, evals, judged)] if battery else [],
        health=_health(run_dir),
        progress=_progress(run_dir, evals, config),
        reversal_sharpe=battery["reversal_sharpe"] if battery else None,
        final={split: _statistics(evals, last, split, config.evaluation.universe) for split in ("validation", "test")},
        identifiers={
            "run_key": header["key"],
            "config_key": header["config_key"],
            "dataset_fingerprint": header["dataset_fingerprint"],
            "weights_hash": final_hashes[0]["weights_hash"] if final_hashes else None,
            "predictions_hash": final_hashes[0]["predictions_hash"] if final_hashes else None,
        },
        warnings=battery["lag_scan"]["warnings"] if battery else [],
    )
    write_json(run_dir / "verdict.json", verdict)
    return verdict


def read_verdict(run_dir: Path) -> dict[str, Any]:
    """`verdict.json`; raises InputError where the run has none yet or it cannot be read."""
    path = run_dir / "verdict.json"
    if not path.is_file():
        raise InputError(f"run directory {run_dir}: no verdict.json; the run has not finished, start it again to go on")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error}); remove the run directory and train again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no verdict; remove the run directory and train again")
    return content


def _statistics(evals: Rows, epoch: int, split: str, universe: str) -> dict[str, float | None]:
    return {
        row["metric"]: row["value"]
        for row in evals
        if (row["epoch"], row["split"], row["slice"]) == (epoch, split, universe)
    }


def _evidence(evals: Rows, config: PipelineConfig, epoch: int) -> CriterionEvidence | None:
    """The validation figures at exactly `epoch`; None when that epoch was never evaluated."""
    figures = _statistics(evals, epoch, "validation", config.evaluation.universe)
    if not figures:
        return None
    sessions = figures.get("sessions")
    return CriterionEvidence(
        value=figures.get("sharpe_daily"),
        se=figures.get("sharpe_se"),
        psr_0=figures.get("psr_0"),
        sessions=None if sessions is None else int(sessions),
        valid=figures.get("valid") == 1.0,
        reason=f"the scores of epoch {epoch} are constant within a session or not finite",
    )


def _validity(batteries: Rows) -> list[ValidityItem]:
    """Every item of every battery that was run; a later one cannot make up for an earlier one."""
    return [
        ValidityItem(**(item | {"name": f"{item['name']} (epoch {battery['epoch']})"}))
        for battery in batteries
        for item in battery["items"]
    ]


def _weights_left_their_start(header: Mapping[str, Any], evals: Rows, epoch: int) -> ValidityItem:
    """Passes when the weights judged are not the initial ones: a Sharpe of untrained weights is luck."""
    name = "weights_left_their_start"
    judged = {row["weights_hash"] for row in evals if row["epoch"] == epoch}
    initial = header.get("initial_weights_hash")
    if not judged or initial is None:
        return not_assessable(name, "the hash of the initial or of the judged weights is not recorded")
    same = initial in judged
    return ValidityItem(
        name,
        not same,
        float(same),
        0.0,
        "the weights judged are the initial ones" if same else "trained weights",
    )


def _health(run_dir: Path) -> list[HealthItem]:
    series = read_table(run_dir, "series")
    rows = series.to_pylist()
    components = sorted({row["component"] for row in rows if row["metric"] == "grad_l2"})
    mean_l2 = {
        name: float(np.mean(list(series_values(series, "grad_l2", component=name).values()))) for name in components
    }
    ratios = series_values(series, "dispersion_ratio")
    return [
        finite_losses([row["value"] for row in rows if row["metric"] in ("loss", "loss_raw", "loss_weighted")]),
        gradients_reach_components(mean_l2),
        parameters_moved(_movement(run_dir, components)),
        predictions_not_constant(ratios[max(ratios)] if ratios else None),
    ]


def _movement(run_dir: Path, components: list[str]) -> dict[str, float]:
    """l2 distance between the last epoch's weights and the initial ones, per component."""
    checkpoints = sorted((run_dir / "checkpoints").glob("epoch_*.pt"))
    if len(checkpoints) < 2:
        return {}
    this_run = {"run_key": read_run(run_dir)["key"]}
    first, last = (read_checkpoint(path, this_run)["weights"] for path in (checkpoints[0], checkpoints[-1]))
    return {
        name: float(sum(((last[k] - first[k]).double() ** 2).sum() for k in first if k.startswith(f"{name}."))) ** 0.5
        for name in components
    }


def _progress(run_dir: Path, evals: Rows, config: PipelineConfig) -> Progress:
    series = read_table(run_dir, "series").to_pylist()
    counts = {
        metric: sum(int(row["value"]) for row in series if row["metric"] == metric)
        for metric in ("gradient_warning", "degeneracy_reset")
    }
    sharpe = {
        row["epoch"]: row["value"]
        for row in evals
        if row["metric"] == "sharpe_daily"
        and (row["split"], row["slice"]) == ("validation", config.evaluation.universe)
    }
    return Progress(sharpe, counts["gradient_warning"], counts["degeneracy_reset"], crashed=False)
