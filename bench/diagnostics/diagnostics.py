"""Does the diagnosis find the cause? `python -m bench.diagnostics.diagnostics WORK_DIR [--fit] [--document FILE.md]`.

Plants every fault of faults.FAULTS into real runs of the pipeline on small synthetic markets. Among the runs are also
healthy ones, runs with two faults, and faults without a rule. Each is diagnosed from its directory with all probes, and
the results are counted. A plant counts as a fault only if it bites: it costs expected daily IC compared with the same
run without it (paired by session, more than two standard errors), or its report is provably false. Otherwise the run
counts as healthy. The IC is the expected one, from the generator's expected returns, because realised returns of 180
sessions hide the loss of half the IC.

The quoted set has markets and seeds on which nothing was fitted. `--fit` makes the other set instead, and writes the
counts of its findings into `atft_pipeline/diagnostics/likelihoods.json`. Finished runs and diagnoses of the same code
in WORK_DIR are read again. Prints one JSON line per run and the table of figures, failures included.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from atft_pipeline.diagnostics.causes import BY_ID, HEALTHY, UNKNOWN
from atft_pipeline.diagnostics.posterior import learned, rank
from atft_pipeline.diagnostics.rule import Finding
from atft_pipeline.evaluation.metrics import mean_and_error
from atft_pipeline.storage.code_version import code_revision
from bench.diagnostics import planted_run
from bench.diagnostics.faults import FAULTS, UNKNOWN_FAULTS
from bench.diagnostics.planting import AT_ONCE, Task, child, make_run, prepare, tasks, twin_of
from bench.harness import put_between

LIKELIHOODS = Path(__file__).parents[2] / "atft_pipeline" / "diagnostics" / "likelihoods.json"
SETS = {"fit": (100, 200), "quoted": (300,)}
"""First seeds of each set's markets."""
BITES = 2.0
"""A plant bites above this many standard errors of the paired difference in expected daily IC."""
CONFIDENT = 0.8
OF_THE_PLANTING = ("replay_differs", "predictions_not_of_checkpoint")
"""Rules that see the planting and not the fault: a patch in one process is missing when another one computes again,
whereas code that is really wrong stays wrong."""


@dataclass(frozen=True)
class Judged:
    """One run, its true causes and its diagnosis."""

    task: Task
    truth: tuple[str, ...]
    """Causes that bite; empty for a healthy run."""
    bite_t: float | None
    findings: list[Finding]
    first: str
    """The class with the largest probability."""
    confidence: float
    top: tuple[str, ...]
    conclusion: str

    @property
    def group(self) -> str:
        return BY_ID[self.truth[0]].group if self.truth and self.truth[0] in BY_ID else ""

    def line(self) -> dict[str, Any]:
        return {
            "run": self.task.name,
            "truth": list(self.truth) or [HEALTHY],
            "bite_t": self.bite_t,
            "conclusion": self.conclusion,
            "first": self.first,
            "probability": round(self.confidence, 3),
            "top": list(self.top),
            "fired": [finding.rule for finding in self.findings if finding.status == "fired"],
        }


def diagnosed(folder: Path, task: Task) -> list[Finding]:
    """Findings of a run with all probes, from a process with unchanged code; they are stored in `folder`."""
    stored = folder / "findings" / f"{task.name}.json"
    if not stored.exists():
        make_run(folder, task)
        stored.parent.mkdir(parents=True, exist_ok=True)
        stored.write_text(child(planted_run.diagnosed, {"run": str(folder / "runs" / task.name)}))
    return [Finding(**row) for row in json.loads(stored.read_text())]


def bite(folder: Path, task: Task) -> float | None:
    """t of the expected daily IC that the plant costs compared with the same run without it.

    None where there is no IC: no scores, or none that differ between stocks.
    """
    twin = twin_of(task)
    make_run(folder, twin)
    without, planted = (_expected_ic(folder, run) for run in (twin, task))
    joined = without.join(planted, on="Date", suffix="_planted")
    if joined.height < 10:
        return None
    lost, error = mean_and_error((joined["ic"] - joined["ic_planted"]).to_numpy())
    return lost / error if error > 0 else 0.0


def _expected_ic(folder: Path, task: Task) -> pl.DataFrame:
    """Date, ic: the expected IC of the last scores in every session of validation and test.

    It is the covariance with the market's expected returns, over the standard deviations of scores and of realised
    targets: the IC's mean over the noise of returns.
    """
    files = sorted((folder / "runs" / task.name / "predictions").glob("epoch_*.parquet"))
    if not files:
        return pl.DataFrame(schema={"Date": pl.Date, "ic": pl.Float64})
    scored = pl.read_parquet(files[-1])
    expected = pl.read_parquet(folder / "markets" / task.market.name / "source" / "truth.parquet")
    score, target = pl.col("score_1d"), pl.col("target_1d")
    rows = scored.filter(pl.col("split").is_in(["validation", "test"]), score.is_finite(), target.is_finite())
    ic = pl.cov(score, pl.col("expected_target_1d")) / (score.std() * target.std())
    return rows.join(expected, on=["Date", "Code"]).group_by("Date").agg(ic=ic).filter(pl.col("ic").is_finite())


def truth_of(folder: Path, task: Task) -> tuple[tuple[str, ...], float | None]:
    """The run's causes that count, and the bite (t) where the plant must cost IC to count."""
    if not task.faults:
        return (), None
    if all(FAULTS[fault].only_report for fault in task.faults):
        return tuple(task.causes), None
    lost = bite(folder, task)
    # Without scores that can be ranked, all of the IC is lost.
    bitten = lost is None or lost > BITES
    causes = [FAULTS[fault].cause for fault in task.faults if FAULTS[fault].only_report or bitten]
    return tuple(causes), lost


def judge(folder: Path, task: Task, counts: Any) -> Judged:
    findings = diagnosed(folder, task)
    truth, lost = truth_of(folder, task)
    ranking = rank(findings, counts)
    classes = {cause.id: cause.probability for cause in ranking.causes}
    classes |= {HEALTHY: ranking.healthy, UNKNOWN: ranking.unknown}
    first = max(classes, key=classes.__getitem__)
    top = tuple(cause.id for cause in ranking.causes[:3])
    return Judged(task, truth, lost, findings, first, classes[first], top, ranking.conclusion)


# Figures ---------------------------------------------------------------------------------------------------------


def wilson(hits: int, of: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927)."""
    if not of:
        return 0.0, 1.0
    z, share = 1.96, hits / of
    centre = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return max(0.0, centre - half), min(1.0, centre + half)


def figures(judged: Sequence[Judged]) -> dict[str, tuple[int, int, str]]:
    """Name -> hits, number of runs, and the demanded share."""
    single = [j for j in judged if len(j.task.faults) == 1 and j.truth and j.task.faults[0] not in UNKNOWN_FAULTS]
    faulty = [j for j in judged if j.truth]
    healthy = [j for j in judged if not j.truth]
    named = [j for j in judged if j.conclusion == "cause"]
    doubles = [j for j in judged if len(j.task.faults) == 2]
    strange = [j for j in judged if any(fault in UNKNOWN_FAULTS for fault in j.task.faults) and j.truth]

    def count(runs: Sequence[Judged], holds: Callable[[Judged], bool], demanded: str) -> tuple[int, int, str]:
        return sum(map(holds, runs)), len(runs), demanded

    def right(j: Judged) -> bool:
        return j.first in j.truth or (j.first == UNKNOWN and any(f in UNKNOWN_FAULTS for f in j.task.faults))

    evaluation = [j for j in single if j.group == "evaluation"]
    wrong = [j for j in judged if j.conclusion in ("cause", "unknown") or (j.conclusion == "healthy" and j.truth)]
    return {
        "faulty recognised": count(faulty, lambda j: j.conclusion != "healthy", "≥ 95 %"),
        "first cause right": count(single, lambda j: j.top[0] in j.truth and j.first != HEALTHY, "≥ 80 %"),
        "first cause right, evaluation": count(evaluation, lambda j: j.top[0] in j.truth, "100 %"),
        "cause among the first three": count(single, lambda j: bool(set(j.top) & set(j.truth)), "≥ 95 %"),
        "named causes that are right": count(named, right, "≥ 80 %"),
        "false alarms": count(healthy, lambda j: j.conclusion in ("cause", "unknown"), "≤ 1 in 30"),
        "confident and wrong": (
            sum(j.confidence >= CONFIDENT and not right(j) and bool(j.truth or j.first != HEALTHY) for j in wrong),
            len(judged),
            "≤ 3 %",
        ),
        "two faults, one of them first": count(doubles, lambda j: j.top[0] in j.truth, ""),
        "faults without a rule, not confidently misnamed": count(
            strange, lambda j: not (j.conclusion == "cause" and j.confidence >= CONFIDENT), ""
        ),
    }


def calibration_error(judged: Sequence[Judged]) -> float:
    """Expected calibration error of the first class's probability, with five bins."""
    bins: defaultdict[int, list[tuple[float, bool]]] = defaultdict(list)
    for j in judged:
        truth = set(j.truth) or {HEALTHY}
        if any(fault in UNKNOWN_FAULTS for fault in j.task.faults):
            truth = {UNKNOWN}
        bins[min(int(j.confidence * 5), 4)].append((j.confidence, j.first in truth))
    return sum(abs(sum(c for c, _ in members) - sum(hit for _, hit in members)) for members in bins.values()) / max(
        len(judged), 1
    )


def table_of(judged: Sequence[Judged]) -> str:
    rows = ["| measure | share | 95 % interval | runs | demanded |", "| --- | --- | --- | --- | --- |"]
    for name, (hits, of, demanded) in figures(judged).items():
        low, high = wilson(hits, of)
        share = f"{hits / of:.1%}" if of else "–"
        rows.append(f"| {name} | {share} | {low:.1%} to {high:.1%} | {hits} of {of} | {demanded} |")
    rows.append(f"| calibration error | {calibration_error(judged):.3f} | | {len(judged)} runs | ≤ 0.10 |")
    return "\n".join(rows)


def learn(judged: Sequence[Judged]) -> dict[str, dict[str, list[int]]]:
    """Rule -> class -> [fired, assessed]; leaves out runs with two faults, with a harmless plant, or without a rule."""
    counts: defaultdict[str, defaultdict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for j in judged:
        harmless = bool(j.task.faults) and not j.truth  # neither a fault nor an untouched run
        if len(j.task.faults) > 1 or harmless or any(fault in UNKNOWN_FAULTS for fault in j.task.faults):
            continue
        name = j.truth[0] if j.truth else HEALTHY
        for finding in j.findings:
            if finding.status != "not_assessable" and finding.rule not in OF_THE_PLANTING:
                counts[finding.rule][name][0] += finding.status == "fired"
                counts[finding.rule][name][1] += 1
    return {rule: {name: list(c) for name, c in sorted(of.items())} for rule, of in sorted(counts.items())}


def write_likelihoods(counts: dict[str, dict[str, list[int]]], runs: int) -> None:
    """Writes one line per rule, so that a diff shows which rules changed."""
    lines = ",\n".join(f"{json.dumps(rule)}: {json.dumps(of)}" for rule, of in counts.items())
    LIKELIHOODS.write_text(f'{{"runs": {runs}, "rules": {{\n{lines}\n}}}}\n', encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--only", nargs="*", default=[], help="runs whose name holds one of these")
    parser.add_argument("--document", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    name = "fit" if options.fit else "quoted"
    wanted = [task for first in SETS[name] for task in tasks(first)]
    if options.only:
        wanted = [task for task in wanted if any(part in task.name for part in options.only)]
    started, home = time.perf_counter(), options.work_dir / code_revision("run")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(
            pool.map(lambda market: prepare(home, market), {task.market.name: task.market for task in wanted}.values())
        )
        judged = list(pool.map(lambda task: judge(home, task, {} if options.fit else learned()), wanted))
    if options.fit:
        content = learn(judged)
        write_likelihoods(content, len(judged))
        judged = [judge(home, task, content) for task in wanted]
    for j in judged:
        print(json.dumps(j.line()))
    print(table_of(judged))
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
    if options.document is not None:
        put_between(options.document, "diagnostics", table_of(judged))


if __name__ == "__main__":
    main()
