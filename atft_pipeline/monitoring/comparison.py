"""Finished runs and baselines side by side, and an alarm where two figures are too equal to have been measured twice.

Each run is read from its own directory (a link that leaves it is refused). What cannot be compared, because it is
missing, unfinished or of other data, is a row that says so. The alarm finds figures that were read from another run's
files: different weights score differently, and a mean over hundreds of sessions in float64 does not repeat itself to
the last bit.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from atft_pipeline.errors import InputError
from atft_pipeline.inspection.reader import Record, open_record
from atft_pipeline.runs.state import has_crashed
from atft_pipeline.verdict.milestones import (
    MAX_DEGENERACY_RESETS,
    MILESTONES,
    Milestone,
    TrainingProgress,
    progress_milestones,
)

State = Literal["finished", "invalid", "unfinished", "missing", "unreadable", "other dataset", "other split", "stale"]

REPEATABLE: frozenset[str] = frozenset(
    {
        # Counts: equal for every model of one market.
        "valid", "sessions", "sessions_without_portfolio", "dropped_targets",
        # Probabilities end at exactly 0 and 1, and the doubles next to them are few.
        "psr_0", "deflated_sharpe",
        # A few sessions decide it, in which two models may well hold the same stocks.
        "max_drawdown",
    }
)  # fmt: skip
"""Metrics that two honest evaluations may share to the last bit; the alarm compares every other one."""

SCORE_METRICS: tuple[str, ...] = ("ic_mean", "icir")
"""Metrics that change with every score, even where no rank changes."""
RANK_METRICS: tuple[str, ...] = ("rank_ic_mean", "rank_icir")

TOO_SHORT = f"nothing below {MILESTONES[0][0]} epochs"

BASELINES_KIND = "baselines"
BASELINES = "baselines"
"""Name of the row that says why there are no baselines."""
EPOCHS_NAMED = 6
"""More epochs of one run than this are counted instead of listed."""
EVALUATION_FIELDS: tuple[str, ...] = ("universe", "quantile", "cost_bps")
"""Fields of the evaluation that two figures must share to be comparable."""


@dataclass(frozen=True)
class Row:
    """One run or baseline. A figure is None where it was not measured or must not be compared; `state` says why."""

    name: str
    state: State
    reason: str = ""
    """Empty where the row has figures."""
    kind: Literal["run", "baseline"] = "run"
    epochs: int | None = None
    sharpe: float | None = None
    """Daily, gross, validation, in the slice that decides, after the last epoch."""
    sharpe_se: float | None = None
    sharpe_net: float | None = None
    sharpe_test: float | None = None
    sharpe_test_se: float | None = None
    ic: float | None = None
    rank_ic: float | None = None
    runtime_s: float | None = None
    """Recorded time of training and validation over all epochs; the pauses of a resumed run do not count."""
    degeneracy_resets: int | None = None
    gradient_warnings: int | None = None
    expected: str | None = None
    """The report's expectation of the Sharpe for the run's length."""
    as_expected: bool | None = None
    verdict: str | None = None
    weights_hash: str | None = None
    milestones: tuple[Milestone, ...] = ()


@dataclass(frozen=True)
class Occurrence:
    """Where a figure was recorded."""

    run: str
    epoch: int | None
    """None for a baseline."""
    weights_hash: str


@dataclass(frozen=True)
class Identity:
    """A figure, or a hash of predictions, that was recorded for different weights."""

    metric: str
    """`predictions_hash`, or a metric of `evals`."""
    split: str
    slice: str
    value: float | str
    occurrences: tuple[Occurrence, ...]
    sentence: str


@dataclass(frozen=True)
class Comparison:
    dataset_fingerprint: str | None
    rows: tuple[Row, ...]
    alarms: tuple[Identity, ...]
    notes: tuple[Identity, ...]
    """Identities that the daily records explain: the weights are too close to each other to change a holding."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "dataset_fingerprint": self.dataset_fingerprint,
            "alarm": bool(self.alarms),
            "runs": [asdict(row) for row in self.rows],
            "alarms": [asdict(alarm) for alarm in self.alarms],
            "notes": [note.sentence for note in self.notes],
        }

    def table(self) -> list[dict[str, str]]:
        """A row per run and baseline in words and rounded figures; no cell is empty."""
        return [_cells(row) for row in self.rows]

    def missed(self) -> list[dict[str, str]]:
        """Expectations of the validation report that a run missed or did not measure."""
        return [
            {
                "run": row.name,
                "expectation": milestone.name,
                "expected": milestone.expected,
                "found": "not measured" if milestone.value is None else f"{milestone.value:.3g}",
            }
            for row in self.rows
            for milestone in row.milestones
            if milestone.passed is not True
        ]


@dataclass(frozen=True)
class _Figure:
    metric: str
    split: str
    slice: str
    value: float | str
    where: Occurrence


@dataclass
class _Run:
    """A run directory as it was read, or why it could not be."""

    name: str
    record: Record | None
    state: State
    reason: str
    figures: list[_Figure] = field(default_factory=list)

    @property
    def fingerprint(self) -> str | None:
        recorded = self.record.run.get("dataset_fingerprint") if self.record else None
        return str(recorded) if recorded else None

    @property
    def setting(self) -> dict[str, Any] | None:
        """The settings that decide which sessions and stocks its figures cover; None where they are not recorded."""
        if self.record is None or not isinstance(self.record.config("split"), dict):
            return None
        return setting(self.record.config("split"), self.record.config("evaluation") or {})


def setting(split: Mapping[str, Any], evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration, as plain JSON, that two sets of figures must share to be comparable."""
    return {"split": dict(split), "evaluation": {name: evaluation.get(name) for name in EVALUATION_FIELDS}}


def compare(
    runs: Mapping[str, Path | str],
    *,
    dataset_fingerprint: str | None = None,
    baselines: Mapping[str, Any] | str = "none given",
) -> Comparison:
    """The runs side by side: name -> run directory, or the reason why there is none.

    Figures are compared on `dataset_fingerprint`, by default that of the first finished run, and on the split and
    evaluation of the first finished run of that dataset. `baselines` is what the asset of that name stored, or why
    there are none. The alarm compares every figure of every run, at all epochs and on every dataset.
    """
    read = [_read(name, location) for name, location in runs.items()]
    try:
        finished = [run for run in read if run.state in ("finished", "invalid")]
        if dataset_fingerprint is None:
            dataset_fingerprint = next((run.fingerprint for run in finished if run.fingerprint), None)
        common = next((run.setting for run in finished if run.fingerprint == dataset_fingerprint and run.setting), None)
        rows = [_row(run, dataset_fingerprint, common) for run in read]
        rows += _baseline_rows(baselines, dataset_fingerprint, common)
        figures = [figure for run in read for figure in run.figures] + _baseline_figures(baselines)
        alarms, notes = _identities(figures, {run.name: run.record for run in read if run.record})
    finally:
        for run in read:
            if run.record is not None:
                run.record.connection.close()
    return Comparison(dataset_fingerprint, tuple(rows), tuple(alarms), tuple(notes))


def read_baselines(path: Path) -> dict[str, Any]:
    """Reads what the asset `baselines` stored. Raises InputError for another file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no readable baselines ({error}); fit them again") from error
    if not isinstance(content, dict) or content.get("kind") != BASELINES_KIND:
        raise InputError(f"{path}: not what the asset `baselines` stored; give its JSON file")
    return content


# Runs ------------------------------------------------------------------------------------------------------------


def _read(name: str, location: Path | str) -> _Run:
    if isinstance(location, str):
        return _Run(name, None, "missing", location)
    if not location.is_dir():
        return _Run(name, None, "missing", f"{location}: no such run directory")
    try:
        record = open_record(location)
    except InputError as error:
        return _Run(name, None, "unreadable", str(error))
    state, reason = _state(record)
    return _Run(name, record, state, reason, _figures(name, record))


def _state(record: Record) -> tuple[State, str]:
    if not record.run:
        return "unreadable", next((item for item in record.missing if item.startswith("run.json")), "no run.json")
    status, done, planned = record.run.get("status"), record.epochs_done, record.epochs_planned
    if status != "finished":
        how = str(record.run.get("reason") or status)
        if status == "running":
            how = "still training" if record.state == "running" else str(record.state)
        return "unfinished", f"{done} of {planned} epochs: {how}"
    valid = record.rows(
        "SELECT value FROM evals WHERE epoch = ? AND split = 'validation' AND slice = ? AND metric = 'valid'",
        done,
        record.slice,
    )
    if valid and valid[0][0] == 0.0:
        return "invalid", f"the scores of epoch {done} are constant within a session or not finite"
    torn = [item for item in record.missing if item.startswith(("evals/", "series/"))]
    return ("unreadable", "; ".join(torn)) if torn else ("finished", "")


def _figures(name: str, record: Record) -> list[_Figure]:
    """Every recorded value, and every hash of predictions, with the weights it was measured on."""
    rows = record.rows(
        """SELECT epoch, split, slice, metric, value, weights_hash FROM evals
           WHERE isfinite(value) AND weights_hash IS NOT NULL ORDER BY epoch, split, slice, metric"""
    )
    hashes = record.rows(
        """SELECT DISTINCT epoch, split, predictions_hash, weights_hash FROM evals
           WHERE predictions_hash IS NOT NULL AND weights_hash IS NOT NULL ORDER BY ALL"""
    )
    return [
        *(_Figure(m, split, part, float(v), Occurrence(name, int(e), w)) for e, split, part, m, v, w in rows),
        *(_Figure("predictions_hash", split, "", p, Occurrence(name, int(e), w)) for e, split, p, w in hashes),
    ]


def _row(run: _Run, fingerprint: str | None, common: Mapping[str, Any] | None) -> Row:
    record = run.record
    if record is None:
        return Row(run.name, run.state, run.reason)
    planned = record.epochs_planned
    if run.state in ("unreadable", "unfinished"):
        crashed = run.state == "unfinished" and record.state != "running"
        stopped = (Milestone("no_crash", None, 1.0, "no crash", False),) if crashed else ()
        return Row(run.name, run.state, run.reason, epochs=planned, milestones=stopped)
    if run.fingerprint != fingerprint:
        trained_on, expected = (str(value or "unknown")[:12] for value in (run.fingerprint, fingerprint))
        reason = f"trained on dataset {trained_on}, the others on {expected}"
        return Row(run.name, "other dataset", reason, epochs=planned)
    if run.setting is None or run.setting != common:
        return Row(run.name, "other split", _setting_difference(run.setting, common), epochs=planned)
    return _measured(run, record, planned)


def _setting_difference(actual: Mapping[str, Any] | None, expected: Mapping[str, Any] | None) -> str:
    if actual is None or expected is None:
        return "its split is not recorded"
    differing = [
        f"{section}.{name} {actual[section].get(name)} instead of {expected[section].get(name)}"
        for section in ("split", "evaluation")
        for name in sorted({*actual[section], *expected[section]})
        if actual[section].get(name) != expected[section].get(name)
    ]
    return ", ".join(differing)


def _measured(run: _Run, record: Record, planned: int | None) -> Row:
    last = record.epochs_done

    def figure(metric: str, split: str = "validation") -> tuple[float | None, float | None]:
        return record.evaluation(metric, split).get(last, (None, None))

    resets, warnings = (_count(record, metric) for metric in ("degeneracy_reset", "gradient_warning"))
    sharpes = {epoch: value for epoch, (value, _) in record.evaluation("sharpe_daily").items()}
    progress = TrainingProgress(sharpes, warnings, resets, crashed=has_crashed(record.run))
    milestones = progress_milestones(progress, planned or last)
    expectation = next((m for m in reversed(milestones) if m.name.startswith("sharpe_")), None)
    (sharpe, sharpe_se), (sharpe_test, sharpe_test_se) = figure("sharpe_daily"), figure("sharpe_daily", "test")
    return Row(
        run.name,
        run.state,
        run.reason,
        epochs=planned,
        sharpe=sharpe,
        sharpe_se=sharpe_se if sharpe_se is not None else figure("sharpe_se")[0],
        sharpe_net=figure("sharpe_daily_net")[0],
        sharpe_test=sharpe_test,
        sharpe_test_se=sharpe_test_se if sharpe_test_se is not None else figure("sharpe_se", "test")[0],
        ic=figure("ic_mean")[0],
        rank_ic=figure("rank_ic_mean")[0],
        runtime_s=_runtime(record),
        degeneracy_resets=resets,
        gradient_warnings=warnings,
        expected=f"{expectation.expected} at epoch {expectation.epoch}" if expectation else TOO_SHORT,
        as_expected=expectation.passed if expectation else None,
        verdict=str(record.verdict["status"]) if record.verdict.get("status") else None,
        weights_hash=next((f.where.weights_hash for f in reversed(run.figures) if f.where.epoch == last), None),
        milestones=tuple(milestones),
    )


def _count(record: Record, metric: str) -> int | None:
    """A count summed over the epochs; None where it was never recorded, which does not mean 0."""
    total = record.scalar("SELECT sum(value) FROM series WHERE metric = ? AND step IS NULL", metric)
    return None if total is None else int(total)


def _runtime(record: Record) -> float | None:
    trained, validated = record.curve("epoch_s"), record.curve("validation_s", split="validation")
    return sum(trained.values()) + sum(validated.values()) if trained else None


# Baselines -------------------------------------------------------------------------------------------------------


def _baseline_rows(
    baselines: Mapping[str, Any] | str, fingerprint: str | None, common: Mapping[str, Any] | None
) -> list[Row]:
    if isinstance(baselines, str):
        return [Row(BASELINES, "missing", baselines, "baseline")]
    stale = _why_stale(baselines, fingerprint, common)
    rows = []
    for name, splits in baselines["models"].items():
        if stale:
            rows.append(Row(name, "stale", f"{stale}; fit the baselines again", "baseline"))
            continue
        (sharpe, se), (test, test_se) = (_stored(splits, split, "sharpe_daily") for split in ("validation", "test"))
        refusal = splits["validation"]["reason"]
        rows.append(
            Row(
                name,
                "invalid" if refusal else "finished",
                refusal,
                "baseline",
                sharpe=sharpe,
                sharpe_se=se,
                sharpe_net=_stored(splits, "validation", "sharpe_daily_net")[0],
                sharpe_test=test,
                sharpe_test_se=test_se,
                ic=_stored(splits, "validation", "ic_mean")[0],
                rank_ic=_stored(splits, "validation", "rank_ic_mean")[0],
                runtime_s=baselines.get("runtime_s"),
            )
        )
    return rows


def _why_stale(stored: Mapping[str, Any], fingerprint: str | None, common: Mapping[str, Any] | None) -> str:
    if fingerprint is not None and stored["dataset_fingerprint"] != fingerprint:
        return f"fitted on dataset {stored['dataset_fingerprint'][:12]}, the runs on {fingerprint[:12]}"
    fitted = {name: stored[name] for name in ("split", "evaluation")}
    if common is not None and fitted != common:
        return f"fitted with {_setting_difference(fitted, common)}"
    return ""


def _stored(splits: Mapping[str, Any], split: str, metric: str) -> tuple[float | None, float | None]:
    statistic = splits.get(split, {}).get("statistics", {}).get(metric, {})
    return statistic.get("value"), statistic.get("se")


def _baseline_figures(baselines: Mapping[str, Any] | str) -> list[_Figure]:
    """Figures of the baselines, for the alarm: a network that equals a baseline to the bit was read from it."""
    if isinstance(baselines, str):
        return []
    return [
        _Figure(metric, split, baselines["evaluation"]["universe"], statistic["value"], Occurrence(name, None, name))
        for name, splits in baselines["models"].items()
        for split, stored in splits.items()
        for metric, statistic in stored["statistics"].items()
        if statistic["value"] is not None
    ]


# Identities ------------------------------------------------------------------------------------------------------


def _identities(figures: Iterable[_Figure], records: Mapping[str, Record]) -> tuple[list[Identity], list[Identity]]:
    """(alarms, notes): equal figures of different weights that nothing explains, and those that a record explains."""
    groups: defaultdict[tuple[str, str, str, float | str], list[Occurrence]] = defaultdict(list)
    for figure in figures:
        if figure.metric not in REPEATABLE:
            groups[figure.metric, figure.split, figure.slice, figure.value].append(figure.where)
    alarms: list[Identity] = []
    notes: list[Identity] = []
    for (metric, split, slice_name, value), occurrences in sorted(groups.items(), key=lambda group: group[0][:3]):
        if len({where.weights_hash for where in occurrences}) < 2:
            continue
        explained = _holdings_unchanged(metric, split, slice_name, occurrences, records)
        sentence = _sentence(metric, split, slice_name, value, occurrences, explained)
        (notes if explained else alarms).append(
            Identity(metric, split, slice_name, value, tuple(occurrences), sentence)
        )
    return alarms, notes


def _holdings_unchanged(
    metric: str, split: str, slice_name: str, occurrences: Sequence[Occurrence], records: Mapping[str, Record]
) -> bool:
    """Whether the daily records show that the scores differed and the ranking, or the holdings, did not.

    An epoch with a small learning rate moves the weights by millionths, and two runs of one seed start almost equal.
    Their scores and ICs differ, but on a small market no stock may change its rank. A copied figure has no such daily
    record behind it.
    """
    if metric == "predictions_hash" or metric in SCORE_METRICS:
        return False
    by_weights = {where.weights_hash: where for where in occurrences}.values()
    column = "rank_ic" if metric in RANK_METRICS else "gross"
    daily = [_daily(records.get(where.run), where.epoch, split, slice_name, column) for where in by_weights]
    return all(
        one.keys() == other.keys()
        and all(one[day][0] == other[day][0] for day in one)
        and 2 * sum(one[day][1] != other[day][1] for day in one) > len(one)
        for one, other in pairwise(daily)
    )


def _daily(
    record: Record | None, epoch: int | None, split: str, slice_name: str, column: str
) -> dict[Any, tuple[Any, Any]]:
    """Session -> (`column`, IC) as recorded; empty where there is no daily record, as for a baseline."""
    if record is None or epoch is None:
        return {}
    rows = record.rows(
        f"SELECT date, {column}, ic FROM daily WHERE epoch = ? AND split = ? AND slice = ?", epoch, split, slice_name
    )
    return {day: (value, ic) for day, value, ic in rows}


def _sentence(
    metric: str, split: str, slice_name: str, value: float | str, occurrences: Sequence[Occurrence], explained: bool
) -> str:
    what = f"{metric} {value!r}" if isinstance(value, float) else f"{metric} {value}"
    measured_on = f"{split}, {slice_name}" if slice_name else split
    weights = len({where.weights_hash for where in occurrences})
    equal = f"{what} ({measured_on}) is bit-identical under {weights} different weights: {_places(occurrences)}"
    if explained:
        return f"{equal}; the daily records explain it: the scores differ, the holdings do not"
    if metric == "predictions_hash":
        return f"{equal}; the predictions do not depend on the weights, or were copied"
    return f"{equal}; one of them was not measured on its own weights"


def _places(occurrences: Sequence[Occurrence]) -> str:
    epochs: dict[str, list[int]] = {}
    for where in occurrences:
        epochs.setdefault(where.run, []).extend([] if where.epoch is None else [where.epoch])
    return "; ".join(f"{run}{_epochs(at)}" for run, at in epochs.items())


def _epochs(at: Sequence[int]) -> str:
    if len(at) > EPOCHS_NAMED:
        return f" {len(at)} epochs, {at[0]} to {at[-1]}"
    return f" epoch{'s' * (len(at) > 1)} {', '.join(map(str, at))}" if at else ""


# Words -----------------------------------------------------------------------------------------------------------


def _cells(row: Row) -> dict[str, str]:
    absent = "not measured" if row.state == "finished" else row.state

    def number(value: float | None, digits: int = 3) -> str:
        return absent if value is None else f"{value:.{digits}f}"

    def sharpe(value: float | None, se: float | None) -> str:
        return number(value) if value is None or se is None else f"{value:.3f} ± {se:.3f}"

    def of_a_run(value: object) -> str:
        """A baseline has no epochs, no gradients and no verdict."""
        if value is None:
            return "not applicable" if row.kind == "baseline" and row.state == "finished" else absent
        return str(value)

    answer = None if row.as_expected is None else "yes" if row.as_expected else "no"
    if row.expected == TOO_SHORT:
        answer = "not applicable"
    return {
        "run": row.name,
        "state": f"{row.state}: {row.reason}" if row.reason else row.state,
        "epochs": of_a_run(row.epochs),
        "Sharpe, validation": sharpe(row.sharpe, row.sharpe_se),
        "expected": of_a_run(row.expected),
        "as expected": of_a_run(answer),
        "net": number(row.sharpe_net),
        "Sharpe, test": sharpe(row.sharpe_test, row.sharpe_test_se),
        "IC": number(row.ic, 4),
        "RankIC": number(row.rank_ic, 4),
        "runtime": absent if row.runtime_s is None else f"{row.runtime_s:.0f} s",
        f"degeneracy resets (fewer than {MAX_DEGENERACY_RESETS})": of_a_run(row.degeneracy_resets),
        "gradient warnings (0)": of_a_run(row.gradient_warnings),
        "verdict": of_a_run(row.verdict),
    }
