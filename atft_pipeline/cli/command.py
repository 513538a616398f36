"""`atft`: the library calls that the assets make, for machines without Dagster and for scripts.

Exit codes: 0 done, 1 the run or its criterion failed, 2 bad usage or input, 130 interrupted by Ctrl-C or SIGTERM (one
line on stderr says which). `--json` prints one JSON object on stdout; everything else a command says goes to stderr.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from atft_pipeline import __version__
from atft_pipeline.config.schema import Probes
from atft_pipeline.errors import InputError, RunFailure, unusable_path
from atft_pipeline.training.distributed.interrupts import handled

Result = tuple[dict[str, Any], int]
"""What a command prints, and its exit code; nothing is printed by a process that follows another."""

_OBJECTS_BEFORE_COLLECTION = 100_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit code."""
    options = _parser().parse_args(arguments)
    # Imports leave some hundred thousand objects that stay: looking through them for garbage is a tenth of a start.
    gc.set_threshold(_OBJECTS_BEFORE_COLLECTION)
    try:
        # SIGTERM, by which schedulers and containers ask to end, would end the process without a record.
        with handled(signal.default_int_handler, signal.SIGTERM):
            content, code = options.command(options)
    except InputError as error:
        return _refuse(options.name, error, 2)
    except RunFailure as error:
        return _refuse(options.name, error, 1)
    except OSError as error:
        return _refuse(options.name, unusable_path(error), 2)
    except ModuleNotFoundError as error:
        # A training machine has only what training needs.
        return _refuse(options.name, f"needs the package {error.name}, which is not installed here; install it", 2)
    except MemoryError as error:
        return _refuse(options.name, f"not enough memory on this machine ({error or 'no size given'})", 1)
    except KeyboardInterrupt as error:
        return _refuse(options.name, str(error) or "interrupted", 130)
    if not content:
        return code
    try:
        print(json.dumps(content, allow_nan=False) if options.json else _text(content), flush=True)
    except BrokenPipeError:
        _discard_output()
    except OSError as error:
        _discard_output()
        return _refuse(options.name, f"its output cannot be written ({error.strerror}); the work itself is done", 2)
    return code


def script() -> None:
    """`main` as a process of its own, which ends without taking every object apart: that lasts half a second."""
    code = main()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    if "multiprocessing.forkserver" in sys.modules:
        sys.exit(code)  # several processes trained: what they met at is taken down on the usual way out
    os._exit(code)


def _discard_output() -> None:
    """After the reader of a pipe went away: Python would complain again when it closes stdout."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(name: str, reason: object, code: int) -> int:
    """Says in one line why the command did not succeed; returns `code`."""
    _say(f"atft {name}: {' '.join(str(reason).split())}")
    return code


def _say(sentence: str) -> None:
    if sys.stderr is not None:  # a caller may have closed it
        print(sentence, file=sys.stderr, flush=True)


def _text(content: dict[str, Any], indent: str = "") -> str:
    """`content` as indented lines: one per scalar, list item and row of a table."""
    lines = []
    for name, value in content.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", _text(value, indent + "  ")]
        elif isinstance(value, list):
            lines += [f"{indent}{name}:" if value else f"{indent}{name}: none"]
            lines += [f"{indent}  " + (_row(item) if isinstance(item, dict) else _cell(item)) for item in value]
        else:
            lines.append(f"{indent}{name}: {_cell(value)}")
    return "\n".join(line for line in lines if line)


def _row(row: dict[str, Any]) -> str:
    return "  ".join(f"{name} {_cell(value)}" for name, value in row.items())


def _cell(value: Any) -> str:
    if value is None:
        return "not measured"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# Commands ------------------------------------------------------------------------------------------------------


def _market(options: argparse.Namespace) -> Result:
    from atft_pipeline.market.synthetic import generate_market, write_tables
    from atft_pipeline.storage.atomic import replacing

    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise InputError(f"{options.out}: exists and is not an empty folder; choose another name")
    names = ("stocks", "sessions", "seed", "hard", "strength", "tail_freedom")
    arguments = {name: getattr(options, name) for name in names}
    market = generate_market(**arguments)
    with replacing(options.out) as temporary:
        write_tables(market, temporary)
    rows = {name: table.height for name, table in market.tables.items()}
    return {"path": str(options.out), **arguments, "rows": rows, "truth_rows": market.truth.height}, 0


def _features(options: argparse.Namespace) -> Result:
    from atft_pipeline.market.facts import market_facts
    from atft_pipeline.market.sources import open_source
    from atft_pipeline.storage.artifact import require_replaceable
    from atft_pipeline.storage.monthly import beside

    config = _configuration(options, sections=("dataset",))[0].dataset
    market_facts(config.market)  # an unknown market is refused before minutes of reading
    one_file = options.out.suffix == ".parquet"
    if one_file:
        require_replaceable(options.out, "ml_dataset", ["membership.parquet"])
    else:
        from atft_pipeline.dataset import store as dataset_parts
        from atft_pipeline.market import price_store as price_parts

        require_replaceable(options.out, dataset_parts.KIND, dataset_parts.SIDECARS)
        require_replaceable(beside(options.out, "prices"), price_parts.KIND, price_parts.SIDECARS)
    if one_file and options.update:
        raise InputError(f"{options.out}: --update needs a dataset in monthly parts; name a folder, without .parquet")
    try:
        build = _dataset_in_one_file if one_file else _dataset_in_parts
        manifest = build(open_source(options.source), options.out, config, options.update)
    except InputError as refusal:
        raise InputError(f"{options.source}: {refusal}") from refusal
    for warning in manifest["warnings"]:
        _say(f"warning: {warning}")
    shown = ("fingerprint", "rows", "sessions", "stocks", "first_date", "last_date", "quarantine", "warnings")
    live = f"{len(manifest['live_features'])} of {len(manifest['features'])}"
    content = {"path": str(options.out), "live": live, **{name: manifest[name] for name in shown}}
    return content | ({"changes": manifest["changes"]} if "changes" in manifest else {}), 0


def _dataset_in_one_file(source: Any, out: Path, config: Any, update: bool) -> dict[str, Any]:  # noqa: ARG001
    from atft_pipeline.dataset.layout import write_dataset
    from atft_pipeline.dataset.rows import build_dataset
    from atft_pipeline.market.contracts import check_prices, read_checked
    from atft_pipeline.market.universe import build_prices

    checked = read_checked(source)
    adjusted = build_prices(checked.tables, config)
    check_prices(adjusted.prices).require()
    tables = checked.tables
    features, membership, manifest = build_dataset(adjusted.panel, adjusted.quarantine, tables, config, checked.record)
    write_dataset(out, features, membership, manifest)
    return manifest


def _dataset_in_parts(source: Any, out: Path, config: Any, update: bool) -> dict[str, Any]:
    """The dataset as a folder of months, the prices it is made from beside it as `OUT.prices`."""
    from atft_pipeline.dataset.store import update_dataset_parts
    from atft_pipeline.market.contracts import read_checked
    from atft_pipeline.market.price_store import update_price_parts
    from atft_pipeline.storage.monthly import beside, move_product, remove_product

    others, prices = read_checked(source, but=["prices"]), beside(out, "prices")
    # What breaks its contract takes nothing's place: the next --update would continue it.
    building = out.with_name(f".{out.name}.building-{os.getpid()}")
    try:
        made, contract = update_price_parts(
            source, others, beside(building, "prices"), config, prices if update else None
        )
        contract.require()
        manifest, contract = update_dataset_parts(
            beside(building, "prices"), others.tables, building, config, out if update else None
        )
        contract.require()
        move_product(beside(building, "prices"), prices)
        move_product(building, out)
    finally:
        remove_product(building)
    return {**manifest, "changes": {**manifest["changes"], "prices": made["changes"]}}


def _graph(options: argparse.Namespace) -> Result:
    from atft_pipeline.graph.store import build_graph_file
    from atft_pipeline.storage.artifact import manifest_path, require_replaceable

    config = _configuration(options, sections=("graph",))[0].graph
    require_replaceable(options.out, "stock_graph")
    previous = options.out if options.update and manifest_path(options.out).is_file() else None
    manifest = build_graph_file(options.dataset, options.out, config, previous)
    return {"path": str(options.out), **manifest}, 0


def _train(options: argparse.Namespace) -> Result:
    config, overrides = _configuration(options, sections=("split", "model", "train", "evaluation"))
    # Seconds of torch, which a refusal need not wait for.
    from atft_pipeline.training.distributed.process_group import ALONE, joined
    from atft_pipeline.training.launcher import Layout, processes_asked, threads_each, train_in_processes
    from atft_pipeline.training.trainer import train

    where = (config, options.dataset, options.graph, options.run_dir)
    how: dict[str, Any] = {"force": options.force, "overrides": overrides, "device": options.device, "log": _say}
    with joined() as processes:
        if processes is not ALONE:
            if options.processes is not None or options.nodes > 1:
                raise InputError(f"--processes, --nodes: torchrun started {processes.size} already; drop them")
            outcome = train(*where, processes=processes, **how)
        else:
            asked = processes_asked(os.environ) if options.processes is None else options.processes
            layout = Layout(asked, options.nodes, options.node_rank, options.rendezvous)
            if layout.total > 1:
                outcome = train_in_processes(layout, *where, threads=threads_each(os.environ, asked), **how)
            else:
                outcome = train(*where, **how)
    passed = outcome.verdict["status"] in ("passed", "not_applicable")
    content = {"run_dir": str(outcome.run_dir), "reused": outcome.reused, **outcome.verdict}
    return content if processes.leads else {}, 0 if passed else 1


def _evaluate(options: argparse.Namespace) -> Result:
    from atft_pipeline.config.schema import EvaluationConfig
    from atft_pipeline.evaluation.predictions_table import evaluate_file

    result = evaluate_file(
        options.predictions,
        EvaluationConfig(cost_bps=options.cost_bps, quantile=options.quantile),
        score=options.score,
        target=options.target,
        split=options.split,
        universe=options.slice,
        days_per_year=options.days_per_year,
        trials=options.trials,
    )
    if not result["valid"]:
        _say(f"atft evaluate: {options.predictions}: {result['reason']}")
        return result, 1
    if result["sharpe_daily"] is None:
        _say(
            f"atft evaluate: {options.predictions}: no Sharpe can be measured: no session fills both legs, or every"
            " return of the portfolio is the same"
        )
        return result, 1
    return result, 0


def _deliver(options: argparse.Namespace) -> Result:
    from atft_pipeline.ensemble.ensemble import combine_runs
    from atft_pipeline.ensemble.export import KIND, write_ensemble_scores
    from atft_pipeline.storage.artifact import require_replaceable

    require_replaceable(options.out, KIND)
    scores = combine_runs(
        options.run_dirs,
        horizon_sessions=options.horizon,
        blend=options.blend,
        smoothing_sessions=options.smooth,
    )
    write_ensemble_scores(scores, options.out)
    for problem in scores.problems:
        _say(f"atft deliver: {options.out}: {problem}")
    content = {"path": str(options.out), **scores.as_dict()}
    if not options.json:  # a row of the main figures for each part; the rest is in the JSON
        content = {name: content[name] for name in ("path", "definition", "weight", "differences")}
        content |= {"against_better_part": scores.against_better_part(), "figures": scores.figures()}
    return content, 1 if scores.problems else 0


def _diagnose(options: argparse.Namespace) -> Result:
    from importlib import import_module
    from threading import Thread

    from atft_pipeline.diagnostics.diagnose import diagnose, write_report

    # What draws takes half a second to import; the diagnosis waits for files meanwhile.
    Thread(target=import_module, args=("atft_pipeline.diagnostics.report.attribution_plots",)).start()
    diagnosis = diagnose(options.run_dir, options.probes)
    paths = write_report(options.run_dir, diagnosis)
    content = diagnosis.to_dict() | {"report_html": str(paths.html), "report_markdown": str(paths.markdown)}
    if not options.json:  # what did not fire, and the numbers behind it, are in the report
        content["findings"] = [finding for finding in content["findings"] if finding["status"] == "fired"]
        del content["signals"], content["attribution"]
    return content, 0


def _experiment(options: argparse.Namespace) -> Result:
    from dataclasses import asdict

    from atft_pipeline.diagnostics.conclude import conclude, plan_experiment
    from atft_pipeline.runs.paired import experiment_rows
    from atft_pipeline.training.launcher import Layout, threads_each, train_in_processes
    from atft_pipeline.training.trainer import train

    planned = plan_experiment(options.run_dir, options.experiment, options.epochs)
    plan, out = planned.plan, options.run_dir.resolve().parent / planned.name
    where = (plan.config, plan.dataset, plan.graph, out)
    how: dict[str, Any] = {"overrides": planned.overrides, "device": options.device, "log": _say}
    if plan.processes > 1:
        threads = threads_each(os.environ, plan.processes)
        outcome = train_in_processes(Layout(plan.processes), *where, threads=threads, **how)
    else:
        outcome = train(*where, **how)
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
    if not options.json:
        rows = experiment_rows(options.run_dir)
        content["result"] = next(row for row in rows if row["experiment"] == options.experiment)
    return content, 0


def _compare(options: argparse.Namespace) -> Result:
    from atft_pipeline.monitoring.comparison import compare, read_baselines

    baselines = "none given; name what the asset `baselines` stored with --baselines"
    stored = read_baselines(options.baselines) if options.baselines else baselines
    comparison = compare(_by_name(options.run_dirs), baselines=stored)
    if all(row.state in ("missing", "unreadable") for row in comparison.rows if row.kind == "run"):
        raise InputError("; ".join(f"{row.name}: {row.reason}" for row in comparison.rows if row.kind == "run"))
    for alarm in comparison.alarms:
        _say(f"atft compare: {alarm.sentence}")
    content = comparison.as_dict()
    if not options.json:
        content |= {
            "runs": comparison.lines(),
            "missed expectations": comparison.missed(),
            "alarms": [alarm.sentence for alarm in comparison.alarms],
        }
    return content, 1 if comparison.alarms else 0


def _by_name(run_dirs: Sequence[Path]) -> dict[str, Path | str]:
    """Each directory once, under its own name, or under its path where two share the name."""
    distinct = {path.resolve(): path for path in run_dirs}.values()
    names = [path.name for path in distinct]
    return {path.name if path.name and names.count(path.name) == 1 else str(path): path for path in distinct}


def _status(options: argparse.Namespace) -> Result:
    from atft_pipeline.monitoring.progress import run_snapshots

    return {"runs": run_snapshots(options.runs)}, 0


def _monitor(options: argparse.Namespace) -> Result:
    """Prints by itself, a frame after every look, and leaves nothing to print."""
    from atft_pipeline.monitoring.monitor import watch_folder, watch_run

    def watch(show: Callable[[Any], None]) -> int:
        how: dict[str, Any] = {"every_s": options.every, "once": options.once}
        return watch_run(options.run, show, **how) if options.run else watch_folder(options.runs, show, **how)

    try:
        if options.json:
            return {}, watch(lambda frame: print(json.dumps(frame.as_dict(), allow_nan=False), flush=True))
        from atft_pipeline.monitoring.dashboard import screen

        with screen() as show:
            return {}, watch(show)
    except BrokenPipeError:
        _discard_output()
        return {}, 0


def _configuration(options: argparse.Namespace, *, sections: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    """Preset, the report's variables and `--set`, in this order; a field outside `sections` is refused."""
    from atft_pipeline.config.overrides import parse_assignments, report_overrides, with_overrides
    from atft_pipeline.config.presets import preset

    assigned = parse_assignments(options.set)
    for dotted in assigned:
        if dotted.split(".")[0] not in sections:
            raise InputError(
                f"--set {dotted}: `atft {options.name}` reads only {', '.join(f'{s}.*' for s in sections)}"
            )
    from_report = report_overrides(os.environ) if "train" in sections else {}
    overrides = from_report | assigned
    return with_overrides(preset(options.preset), overrides), {"preset": options.preset, **overrides}


# Usage ---------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Usage errors in one line."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="atft", description="Raw daily quotes to a gated ATFT-GAT-FAN model, without Dagster.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Callable[[argparse.Namespace], Result], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=run)
        sub.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        return sub

    def configured(sub: argparse.ArgumentParser, default: str) -> None:
        sub.add_argument("--preset", default=default, help="quick, cpu or production (default: %(default)s)")
        sub.add_argument(
            "--set", action="append", default=[], metavar="FIELD=VALUE", help="e.g. train.optimizer.lr=1e-3"
        )

    market = command("market", _market, "Write a synthetic source folder and its truth.")
    market.add_argument("out", type=Path, metavar="OUT_DIR")
    market.add_argument("--stocks", type=int, default=200)
    market.add_argument("--sessions", type=int, default=750)
    market.add_argument("--seed", type=int, default=0)
    market.add_argument("--hard", action="store_true", help="add neighbour, interaction and regime terms")
    market.add_argument("--strength", type=float, default=1.0, help="of the expected returns; 0: nothing to learn")
    market.add_argument("--tail-freedom", type=float, default=5.0, help="degrees of freedom of the returns' Student t")

    features = command("features", _features, "Source folder to the dataset of 82 features and targets.")
    features.add_argument("source", type=Path, metavar="SOURCE")
    features.add_argument("out", type=Path, metavar="OUT", help="OUT.parquet is one file, OUT a folder of months")
    features.add_argument("--update", action="store_true", help="compute only what has changed since OUT was written")
    configured(features, "cpu")

    graph = command("graph", _graph, "Dataset to the cross-sectional stock graph.")
    graph.add_argument("dataset", type=Path, metavar="DATASET")
    graph.add_argument("out", type=Path, metavar="OUT", help="OUT.parquet is one file, OUT a folder of months")
    graph.add_argument("--update", action="store_true", help="compute only what has changed since OUT was written")
    configured(graph, "cpu")

    train = command("train", _train, "Train one run and judge it; exits 1 when the criterion fails.")
    train.add_argument("dataset", type=Path, metavar="DATASET")
    train.add_argument("graph", type=Path, metavar="GRAPH")
    train.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    train.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    train.add_argument("--force", action="store_true", help="new attempt beside a finished run of the same key")
    train.add_argument("--processes", type=int, metavar="N", help="on this machine (default: ATFT_PROCESSES, else 1)")
    train.add_argument("--nodes", type=int, default=1, metavar="N", help="machines, each given the same command")
    train.add_argument("--node-rank", type=int, default=0, metavar="K", help="0 on the one that keeps RUN_DIR")
    train.add_argument("--rendezvous", metavar="HOST:PORT", help="a free port of the first machine")
    configured(train, "cpu")

    evaluate = command("evaluate", _evaluate, "Evaluate any table of Date, Code, score, target.")
    evaluate.add_argument("predictions", type=Path, metavar="PREDICTIONS.parquet")
    evaluate.add_argument("--score", help="score column (default: score, else score_1d)")
    evaluate.add_argument("--target", help="raw forward return column (default: target, else the score's horizon)")
    evaluate.add_argument("--split", help="rows of one split only, where the table has a column `split`")
    evaluate.add_argument("--slice", choices=("all", "liquid"), help="rows of one slice, where the table marks it")
    evaluate.add_argument("--cost-bps", type=float, default=10.0)
    evaluate.add_argument("--quantile", type=float, default=0.2)
    evaluate.add_argument("--days-per-year", type=int, default=245, help="245 for Tokyo, 252 for New York")
    evaluate.add_argument("--trials", type=int, default=1, help="models tried, this one included: deflates the Sharpe")

    deliver = command("deliver", _deliver, "Score of finished runs: seeds averaged, blended, smoothed, all evaluated.")
    deliver.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="runs that differ in seed alone")
    deliver.add_argument("out", type=Path, metavar="OUT.parquet")
    deliver.add_argument("--blend", choices=("none", "lightgbm"), default="none", help="what to blend the runs with")
    deliver.add_argument("--smooth", type=int, default=1, metavar="SPAN", help="sessions of the trailing average")
    deliver.add_argument("--horizon", type=int, default=1, help="1, 5, 10 or 20 sessions (default: %(default)s)")

    diagnose = command("diagnose", _diagnose, "Explain a run from its record and write its report.")
    diagnose.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    diagnose.add_argument(
        "--probes",
        choices=get_args(Probes),
        default="none",
        help="short experiments on the run's own inputs: of the three most probable causes, or all (default: none)",
    )

    experiment = command(
        "experiment", _experiment, "Train experiment A, B, C or D of a run's report and compare it with that run."
    )
    experiment.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run to explain")
    experiment.add_argument("experiment", choices=("A", "B", "C", "D"))
    experiment.add_argument("--epochs", type=int, metavar="N", help="default: those of the run")
    experiment.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")

    compare = command("compare", _compare, "Finished runs side by side; exits 1 when figures are suspiciously equal.")
    compare.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR")
    compare.add_argument("--baselines", type=Path, metavar="FILE", help="JSON file that the asset `baselines` stored")

    status = command("status", _status, "One snapshot of the runs: state, epoch, ETA, losses, gradients, GPU.")
    status.add_argument("--runs", type=Path, default=Path("output/runs"), help="folder of runs (default: %(default)s)")

    monitor = command(
        "monitor",
        _monitor,
        "The runs, live: progress, losses, gradients, degeneracy, GPU, and the rules that have fired for three epochs."
        " Ctrl-C ends the watching, not the runs (exit 130).",
    )
    watched = monitor.add_mutually_exclusive_group()
    watched.add_argument("--runs", type=Path, default=Path("output/runs"), help="folder of runs (default: %(default)s)")
    watched.add_argument(
        "--run", type=Path, metavar="RUN_DIR", help="this run only, until it has ended; exits 1 when it did not succeed"
    )
    monitor.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="pause (default: %(default)s)")
    monitor.add_argument("--once", action="store_true", help="one frame, then exit")
    return parser
