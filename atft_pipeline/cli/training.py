"""Commands that train: train, and experiment, which trains what a report proposes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from atft_pipeline.cli.arguments import DEVICES, AddCommand, add_configuration, configuration, environment
from atft_pipeline.cli.progress import ProgressBar
from atft_pipeline.cli.reply import Block, Cell, Reply, Sentences, facts
from atft_pipeline.config.schema import EXPERIMENT_IDS
from atft_pipeline.errors import InputError
from atft_pipeline.monitoring.number_format import NOT_MEASURED, verdict_colour


def register(add: AddCommand) -> None:
    train = add("train", _train, "Train one run and judge it; exits 1 when the criterion fails.")
    train.add_argument("dataset", type=Path, metavar="DATASET")
    train.add_argument("graph", type=Path, metavar="GRAPH")
    train.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    train.add_argument("--device", default="auto", help=DEVICES)
    train.add_argument("--force", action="store_true", help="new attempt beside a finished run of the same key")
    train.add_argument("--processes", type=int, metavar="N", help="on this machine (default: ATFT_PROCESSES, else 1)")
    train.add_argument("--nodes", type=int, default=1, metavar="N", help="machines, each given the same command")
    train.add_argument("--node-rank", type=int, default=0, metavar="K", help="0 on the one that keeps RUN_DIR")
    train.add_argument("--rendezvous", metavar="HOST:PORT", help="a free port of the first machine")
    add_configuration(train)

    experiment = add(
        "experiment", _experiment, "Train experiment A, B, C or D of a run's report and compare it with that run."
    )
    experiment.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run to explain")
    experiment.add_argument("experiment", choices=EXPERIMENT_IDS)
    experiment.add_argument("--epochs", type=int, metavar="N", help="default: those of the run")
    experiment.add_argument("--device", default="auto", help=DEVICES)


def _train(options: argparse.Namespace) -> Reply:
    config, overrides = configuration(options, "split", "model", "train", "evaluation")
    # torch takes seconds to import, and a refused configuration need not wait for it.
    from atft_pipeline.monitoring.progress import PASSING
    from atft_pipeline.training.distributed.process_group import SINGLE_PROCESS, joined
    from atft_pipeline.training.launcher import Layout, processes_asked, threads_each, train_in_processes
    from atft_pipeline.training.train import train

    with joined() as processes, ProgressBar("training", unit="epochs", hidden=not processes.is_leader) as bar:
        inputs = (config, options.dataset, options.graph, options.run_dir)
        how: dict[str, Any] = {
            "force": options.force, "overrides": overrides, "device": options.device, "log": bar.say,
        }  # fmt: skip
        if processes is not SINGLE_PROCESS:
            if options.processes is not None or options.nodes > 1:
                raise InputError(f"--processes, --nodes: torchrun started {processes.size} already; drop them")
            outcome = train(*inputs, processes=processes, **how)
        else:
            asked = processes_asked(environment()) if options.processes is None else options.processes
            layout = Layout(asked, options.nodes, options.node_rank, options.rendezvous)
            if layout.total > 1:
                threads = threads_each(environment(), asked)
                outcome = train_in_processes(layout, *inputs, threads=threads, **how)
            else:
                outcome = train(*inputs, **how)
        is_leader = processes.is_leader
    code = 0 if outcome.verdict["status"] in PASSING else 1
    content = {"run_dir": str(outcome.run_dir), "reused": outcome.reused, **outcome.verdict}
    return Reply(content, verdict_blocks(content), code) if is_leader else Reply({}, code=code)


def verdict_blocks(content: Mapping[str, Any]) -> list[Block]:
    """The most important lines of a verdict: the decision, the figure that decided it, and the other evidence."""
    status, summary, final = content["status"], content["summary"], content["final"]
    lines = facts(
        ("run", f"{content['run_dir']}{' (reused)' if content['reused'] else ''}"),
        ("status", Cell(status, verdict_colour(status, summary))),
        ("summary", summary),
        *((f"Sharpe, {split}", _sharpe(figures)) for split, figures in final.items()),
        *((f"IC, {split}", _ic(figures)) for split, figures in final.items()),
        ("reversal", f"one factor earns a daily Sharpe of {_figure(content.get('reversal_sharpe'), '.3f')}"),
        *((name, _checks(content[name])) for name in ("validity", "health", "milestones")),
        ("run key", content["run_key"]),
        ("next", f"atft diagnose {quote(content['run_dir'])}"),
        timed=True,
    )
    return [lines, Sentences("warnings", content["warnings"], colour="yellow")]


def _sharpe(figures: Mapping[str, Any]) -> str:
    gross, error, net = (figures.get(name) for name in ("sharpe_daily", "sharpe_se", "sharpe_daily_net"))
    return f"{_figure(gross, '.3f')} ± {_figure(error, '.3f')} daily, {_figure(net, '.3f')} net of costs"


def _ic(figures: Mapping[str, Any]) -> str:
    return f"{_figure(figures.get('ic_mean'), '.4f')}, RankIC {_figure(figures.get('rank_ic_mean'), '.4f')}"


def _figure(value: float | None, form: str) -> str:
    return NOT_MEASURED if value is None else format(value, form)


def _checks(checks: list[Mapping[str, Any]]) -> Cell:
    """How many of them passed, and the names of those that did not."""
    failed = [check["name"] for check in checks if check["passed"] is False]
    if failed:
        return Cell(f"{len(failed)} of {len(checks)} failed: {', '.join(failed)}", "red")
    unmeasured = [check["name"] for check in checks if check["passed"] is None]
    if unmeasured:
        return Cell(f"{NOT_MEASURED}: {', '.join(unmeasured)}; the others passed", "yellow")
    return Cell(f"all {len(checks)} passed", "green")


def _experiment(options: argparse.Namespace) -> Reply:
    from dataclasses import asdict

    from atft_pipeline.diagnostics.conclude import conclude, plan_experiment
    from atft_pipeline.inspection.paired import experiment_rows
    from atft_pipeline.training.launcher import Layout, threads_each, train_in_processes
    from atft_pipeline.training.train import train

    planned = plan_experiment(options.run_dir, options.experiment, options.epochs)
    plan, out = planned.plan, options.run_dir.resolve().parent / planned.name
    inputs = (plan.config, plan.dataset, plan.graph, out)
    with ProgressBar("training", unit="epochs") as bar:
        how: dict[str, Any] = {"overrides": planned.overrides, "device": options.device, "log": bar.say}
        if plan.processes > 1:
            threads = threads_each(environment(), plan.processes)
            outcome = train_in_processes(Layout(plan.processes), *inputs, threads=threads, **how)
        else:
            outcome = train(*inputs, **how)
        bar.stage("comparing")
        concluded = conclude(options.run_dir, options.experiment, outcome.run_dir)
    content = {
        "experiment": options.experiment,
        "explained": str(options.run_dir),
        "run_dir": str(outcome.run_dir),
        "reused": outcome.reused,
        "verdict": outcome.verdict["summary"],
        "result": asdict(concluded.result),
        "result_path": str(concluded.path),
        "report_html": str(concluded.report.html),
    }
    row = next(row for row in experiment_rows(options.run_dir) if row["experiment"] == options.experiment)
    block = facts(
        ("experiment", f"{options.experiment} of {options.run_dir}"),
        *((name, text) for name, text in row.items() if name not in ("experiment", "run")),
        ("verdict", Cell(content["verdict"], verdict_colour(outcome.verdict["status"], content["verdict"]))),
        ("run", outcome.run_dir),
        ("reused", outcome.reused),
        ("report", concluded.report.html),
        timed=True,
    )
    return Reply(content, [block])
