"""Commands that judge scores and runs: evaluate, compare and export."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atft_pipeline.cli.arguments import AddCommand
from atft_pipeline.cli.console import say
from atft_pipeline.cli.progress import ProgressBar
from atft_pipeline.cli.reply import Block, Cell, Reply, Sentences, Table, cell, facts
from atft_pipeline.config.schema import HORIZONS, EvaluationConfig
from atft_pipeline.config.slices import SLICES
from atft_pipeline.errors import InputError
from atft_pipeline.monitoring.number_format import NOT_MEASURED, colour, number

if TYPE_CHECKING:
    from atft_pipeline.ensemble.ensemble_scores import EnsembleScores
    from atft_pipeline.monitoring.comparison import Comparison

BLENDS = ("none", "lightgbm")


def register(add: AddCommand) -> None:
    default = EvaluationConfig()
    evaluate = add("evaluate", _evaluate, "Evaluate any table of Date, Code, score, target.")
    evaluate.add_argument("predictions", type=Path, metavar="PREDICTIONS.parquet")
    evaluate.add_argument("--score", help="score column (default: score, else score_1d)")
    evaluate.add_argument("--target", help="raw forward return column (default: target, else the score's horizon)")
    evaluate.add_argument("--split", help="rows of one split only, where the table has a column `split`")
    evaluate.add_argument("--slice", choices=tuple(SLICES), help="rows of one slice, where the table marks it")
    evaluate.add_argument(
        "--cost-bps", type=float, default=default.cost_bps, help="of the traded value (default: %(default)g)"
    )
    evaluate.add_argument(
        "--quantile", type=float, default=default.quantile, help="share of the stocks in a leg (default: %(default)g)"
    )
    evaluate.add_argument("--days-per-year", type=int, default=245, help="245 for Tokyo, 252 for New York")
    evaluate.add_argument("--trials", type=int, default=1, help="models tried, this one included: deflates the Sharpe")

    compare = add("compare", _compare, "Finished runs side by side; exits 1 when figures are suspiciously equal.")
    compare.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR")
    compare.add_argument("--baselines", type=Path, metavar="FILE", help="JSON file that the asset `baselines` stored")

    export = add(
        "export",
        _export,
        "Ensemble scores of finished runs: seeds averaged, blended, smoothed, all evaluated.",
        aliases=["deliver"],
    )
    export.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="runs that differ in seed alone")
    export.add_argument("out", type=Path, metavar="OUT.parquet")
    export.add_argument("--blend", choices=BLENDS, default="none", help="what to blend the runs with")
    export.add_argument("--smooth", type=int, default=1, metavar="SPAN", help="sessions of the trailing average")
    *shorter, longest = HORIZONS
    horizons = f"{', '.join(map(str, shorter))} or {longest} sessions"
    export.add_argument("--horizon", type=int, default=HORIZONS[0], help=f"{horizons} (default: %(default)s)")


# evaluate ---------------------------------------------------------------------------------------------------------

WHOLE_NUMBERS = ("sessions", "sessions_without_portfolio", "dropped_targets")


def _evaluate(options: argparse.Namespace) -> Reply:
    from atft_pipeline.evaluation.predictions_table import evaluate_file

    with ProgressBar("evaluating"):
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
    problem = ""
    if not result["valid"]:
        problem = result["reason"]
    elif result["sharpe_daily"] is None:
        problem = "no Sharpe can be measured: no session fills both legs, or every return of the portfolio is the same"
    if problem:
        say(f"atft evaluate: {options.predictions}: {problem}")
    return Reply(result, evaluation_blocks(result, options), 1 if problem else 0)


def evaluation_blocks(result: Mapping[str, Any], options: argparse.Namespace) -> list[Block]:
    """A column for all rows and one for each split and slice, a line per figure."""
    columns = {"all rows": result} | result.get("by_split", {}) | _slices(result)
    chosen = [f"{name} {value}" for name, value in (("split", options.split), ("slice", options.slice)) if value]
    nested = ("by_split", "by_slice", "score", "target", "valid", "reason", "notes")
    metrics = [name for name in result if name not in nested]
    rows = [[Cell("valid"), *(_validity(column) for column in columns.values())]]
    rows += [[Cell(name), *(_figure(name, column.get(name)) for column in columns.values())] for name in metrics]
    header = facts(
        ("predictions", options.predictions),
        ("columns", f"{result['score']} against {result['target']}"),
        *([("rows", ", ".join(chosen))] if chosen else []),
        ("portfolio", f"{options.quantile:g} of the stocks in each leg, {options.cost_bps:g} bps of the traded value"),
    )
    notes = {f"{name}: {note}": None for name, column in columns.items() for note in column.get("notes", ())}
    reasons = {f"{name}: {column['reason']}": None for name, column in columns.items() if column.get("reason")}
    return [
        header,
        Table("figures", ["", *columns], rows),
        *([Sentences("reasons", list(reasons), colour="red")] if reasons else []),
        *([Sentences("notes", list(notes), colour="yellow")] if notes else []),
    ]


def _slices(result: Mapping[str, Any]) -> dict[str, Any]:
    return {f"slice {name}": figures for name, figures in result.get("by_slice", {}).items()}


def _validity(column: Mapping[str, Any]) -> Cell:
    return Cell("yes", "green") if column["valid"] else Cell("invalid", "red")


def _figure(name: str, value: float | None) -> Cell:
    if value is not None and name in WHOLE_NUMBERS:
        return Cell(f"{value:.0f}")
    return Cell(number(value))


# compare ----------------------------------------------------------------------------------------------------------


def _compare(options: argparse.Namespace) -> Reply:
    from atft_pipeline.monitoring.comparison import compare, read_baselines

    absent = "none given; name what the asset `baselines` stored with --baselines"
    baselines = read_baselines(options.baselines) if options.baselines else absent
    with ProgressBar("comparing"):
        comparison = compare(_by_name(options.run_dirs), baselines=baselines)
    runs = [row for row in comparison.rows if row.kind == "run"]
    if all(row.state in ("missing", "unreadable") for row in runs):
        raise InputError("; ".join(f"{row.name}: {row.reason}" for row in runs))
    for alarm in comparison.alarms:
        say(f"atft compare: {alarm.sentence}")
    return Reply(comparison.as_dict(), comparison_blocks(comparison), 1 if comparison.alarms else 0)


def comparison_blocks(comparison: Comparison) -> list[Block]:
    """A column per run and baseline, a line per figure; then runs without figures, missed expectations and alarms."""
    rows = comparison.table()
    states = [row.state for row in comparison.rows]
    lines = [
        [Cell(name), *(_compared(name, row[name], state) for row, state in zip(rows, states, strict=True))]
        for name in rows[0]
        if name != "run"
    ]
    reasons = [f"{row.name}: {row.reason}" for row in comparison.rows if row.reason]
    missed = [
        f"{m['run']}: {m['expectation']}: expected {m['expected']}, found {m['found']}" for m in comparison.missed()
    ]
    return [
        facts(("dataset", (comparison.dataset_fingerprint or NOT_MEASURED)[:16])),
        Table("runs", ["run", *(row["run"] for row in rows)], lines),
        *([Sentences("without figures", reasons)] if reasons else []),
        Sentences("missed expectations", missed, colour="yellow"),
        Sentences("alarms", [alarm.sentence for alarm in comparison.alarms], colour="red"),
        Sentences("notes", [note.sentence for note in comparison.notes]),
    ]


def _compared(name: str, text: str, state: str) -> Cell:
    if name == "state":
        return Cell(state, colour(state))
    if name == "verdict":
        return Cell(text, colour(text))
    if name == "as expected":
        return Cell(text, {"yes": "green", "no": "red"}.get(text, ""))
    return Cell(text)


def _by_name(run_dirs: Sequence[Path]) -> dict[str, Path | str]:
    """Each directory once, under its own name, or under its path where two share the name."""
    distinct = {path.resolve(): path for path in run_dirs}.values()
    names = [path.name for path in distinct]
    return {path.name if path.name and names.count(path.name) == 1 else str(path): path for path in distinct}


# export -----------------------------------------------------------------------------------------------------------


def _export(options: argparse.Namespace) -> Reply:
    from atft_pipeline.ensemble.ensemble import combine_runs
    from atft_pipeline.ensemble.export import KIND, write_ensemble_scores
    from atft_pipeline.storage.artifact import require_replaceable

    require_replaceable(options.out, KIND)
    with ProgressBar("exporting"):
        scores = combine_runs(
            options.run_dirs,
            horizon_sessions=options.horizon,
            blend=options.blend,
            smoothing_sessions=options.smooth,
        )
        write_ensemble_scores(scores, options.out)
    for problem in scores.problems:
        say(f"atft {options.name}: {options.out}: {problem}")
    content = {"path": str(options.out), **scores.as_dict()}
    return Reply(content, export_blocks(content, scores), 1 if scores.problems else 0)


def export_blocks(content: Mapping[str, Any], scores: EnsembleScores) -> list[Block]:
    """What was made, the figures of the scores and of every part, and the paired differences of their ICs."""
    weight = content["weight"]
    against = [
        f"{row['split']}: IC {number(row['ic_difference'])} ± {number(row['se'])} against {row['part']},"
        f" its better part; {'within' if row['within_one_se'] else 'not within'} one standard error"
        for row in scores.against_better_part()
    ]
    return [
        facts(
            ("scores", content["path"]),
            ("definition", content["definition"]),
            *([] if weight is None else [("weight of the network", f"{weight['network']:.3f}")]),
            ("rows", f"{content['rows']:,} of {content['sessions']:,} sessions and {content['stocks']:,} stocks"),
            ("evaluated on", content["slice"]),
            ("fingerprint", content["fingerprint"][:16]),
            timed=True,
        ),
        _rows_table("figures", scores.figures(), ("split", "part")),
        _rows_table("IC of the scores less that of a part", scores.differences, ("split", "score", "part")),
        *([Sentences("blend", against)] if against else []),
        *([Sentences("problems", scores.problems, colour="red")] if scores.problems else []),
    ]


def _rows_table(title: str, rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> Table:
    """A line per row, which is named by the values of all its keys."""
    figures = [name for name in rows[0] if name not in keys] if rows else []
    lines = [[Cell(" ".join(str(row[key]) for key in keys)), *(cell(row[name]) for name in figures)] for row in rows]
    return Table(title, [", ".join(keys), *figures], lines)
