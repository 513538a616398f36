"""Commands that make data: synthesize, dataset and graph."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from atft_pipeline.cli.arguments import AddCommand, add_configuration, configuration
from atft_pipeline.cli.console import say
from atft_pipeline.cli.progress import ProgressBar
from atft_pipeline.cli.reply import Block, Cell, Reply, Sentences, facts
from atft_pipeline.errors import InputError

if TYPE_CHECKING:
    from atft_pipeline.config.schema import DatasetConfig
    from atft_pipeline.market.sources import Source

UPDATE = "compute only what has changed since OUT was written"
OUT = "OUT.parquet is one file, OUT a folder of months"
FINGERPRINT_DIGITS = 16


def register(add: AddCommand) -> None:
    synthesize = add("synthesize", _synthesize, "Write a synthetic source folder and its truth.", aliases=["market"])
    synthesize.add_argument("out", type=Path, metavar="OUT_DIR")
    synthesize.add_argument("--stocks", type=int, default=200)
    synthesize.add_argument("--sessions", type=int, default=750)
    synthesize.add_argument("--seed", type=int, default=0)
    synthesize.add_argument("--hard", action="store_true", help="add neighbour, interaction and regime terms")
    synthesize.add_argument("--strength", type=float, default=1.0, help="of the expected returns; 0: nothing to learn")
    synthesize.add_argument(
        "--tail-freedom", type=float, default=5.0, help="degrees of freedom of the returns' Student t"
    )

    dataset = add("dataset", _dataset, "Source folder to the dataset of 82 features and targets.", aliases=["features"])
    dataset.add_argument("source", type=Path, metavar="SOURCE")
    dataset.add_argument("out", type=Path, metavar="OUT", help=OUT)
    dataset.add_argument("--update", action="store_true", help=UPDATE)
    add_configuration(dataset)

    graph = add("graph", _graph, "Dataset to the cross-sectional stock graph.")
    graph.add_argument("dataset", type=Path, metavar="DATASET")
    graph.add_argument("out", type=Path, metavar="OUT", help=OUT)
    graph.add_argument("--update", action="store_true", help=UPDATE)
    add_configuration(graph)


# synthesize -------------------------------------------------------------------------------------------------------


def _synthesize(options: argparse.Namespace) -> Reply:
    from atft_pipeline.market.synthetic import generate_market, write_tables
    from atft_pipeline.storage.atomic import replacing

    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise InputError(f"{options.out}: exists and is not an empty folder; choose another name")
    names = ("stocks", "sessions", "seed", "hard", "strength", "tail_freedom")
    arguments = {name: getattr(options, name) for name in names}
    with ProgressBar("making a market"):
        market = generate_market(**arguments)
        with replacing(options.out) as temporary:
            write_tables(market, temporary)
    rows = {name: table.height for name, table in market.tables.items()}
    content = {"path": str(options.out), **arguments, "rows": rows, "truth_rows": market.truth.height}
    block = facts(
        ("source", options.out),
        *((name.replace("_", " "), value) for name, value in arguments.items()),
        ("rows", _counts(rows)),
        ("truth", f"{market.truth.height:,} rows"),
        ("next", f"atft dataset {quote(str(options.out))} OUT"),
        timed=True,
    )
    return Reply(content, [block])


# dataset ----------------------------------------------------------------------------------------------------------


def _dataset(options: argparse.Namespace) -> Reply:
    from atft_pipeline.market.market_facts import market_facts
    from atft_pipeline.market.sources import open_source
    from atft_pipeline.storage.artifact import require_replaceable
    from atft_pipeline.storage.monthly import beside

    config = configuration(options, "dataset")[0].dataset
    market_facts(config.market)  # an unknown market is refused before minutes of reading
    one_file = options.out.suffix == ".parquet"
    if one_file:
        require_replaceable(options.out, "ml_dataset", ["membership.parquet"])
    else:
        from atft_pipeline.dataset import store as dataset_store
        from atft_pipeline.market import price_store

        require_replaceable(options.out, dataset_store.KIND, dataset_store.SIDECARS)
        require_replaceable(beside(options.out, "prices"), price_store.KIND, price_store.SIDECARS)
    if one_file and options.update:
        raise InputError(f"{options.out}: --update needs a dataset in monthly parts; name a folder, without .parquet")
    try:
        with ProgressBar("reading", unit="months") as bar:
            build = _dataset_in_one_file if one_file else _dataset_by_month
            manifest = build(open_source(options.source), options.out, config, options.update, bar)
    except InputError as refusal:
        raise InputError(f"{options.source}: {refusal}") from refusal
    for warning in manifest["warnings"]:
        say(f"warning: {warning}")
    names = ("fingerprint", "rows", "sessions", "stocks", "first_date", "last_date", "quarantine", "warnings")
    live = f"{len(manifest['live_features'])} of {len(manifest['features'])}"
    content = {"path": str(options.out), "live": live, **{name: manifest[name] for name in names}}
    content |= {"changes": manifest["changes"]} if "changes" in manifest else {}
    return Reply(content, [] if options.json else dataset_blocks(content, _members(options.out)))


def _dataset_in_one_file(
    source: Source,
    out: Path,
    config: DatasetConfig,
    update: bool,  # noqa: ARG001
    bar: ProgressBar,
) -> dict[str, Any]:
    from atft_pipeline.dataset.layout import write_dataset
    from atft_pipeline.dataset.rows import build_dataset
    from atft_pipeline.market.contracts import check_prices, read_checked
    from atft_pipeline.market.universe import build_prices

    checked = read_checked(source)
    bar.stage("prices")
    adjusted = build_prices(checked.tables, config)
    check_prices(adjusted.prices).require()
    bar.stage("features")
    features, membership, manifest = build_dataset(
        adjusted.panel, adjusted.quarantine, checked.tables, config, checked.record
    )
    bar.stage("writing")
    write_dataset(out, features, membership, manifest)
    return manifest


def _dataset_by_month(
    source: Source, out: Path, config: DatasetConfig, update: bool, bar: ProgressBar
) -> dict[str, Any]:
    """Builds the dataset as a folder of months, and beside it `OUT.prices`, the prices that it is built from."""
    from atft_pipeline.dataset.store import update_dataset
    from atft_pipeline.market.contracts import read_checked
    from atft_pipeline.market.price_store import update_prices
    from atft_pipeline.storage.monthly import beside, move_artifact, remove_artifact

    others, prices = read_checked(source, but=["prices"]), beside(out, "prices")
    # An artifact that breaks its contract must not replace the old one: the next --update would continue it.
    building = out.with_name(f".{out.name}.building-{os.getpid()}")
    try:
        prices_manifest, contract = update_prices(
            source, others, beside(building, "prices"), config, prices if update else None, advance=bar.advance
        )
        contract.require()
        manifest, contract = update_dataset(
            beside(building, "prices"),
            others.tables,
            building,
            config,
            out if update else None,
            advance=bar.advance,
        )
        contract.require()
        move_artifact(beside(building, "prices"), prices)
        move_artifact(building, out)
    finally:
        remove_artifact(building)
    return {**manifest, "changes": {**manifest["changes"], "prices": prices_manifest["changes"]}}


def _members(out: Path) -> dict[str, int]:
    """Rows that are investable, and those that are liquid, counted in the dataset's membership."""
    import pyarrow.compute as pc

    from atft_pipeline.config.slices import SLICES
    from atft_pipeline.dataset.layout import read_membership

    columns = read_membership(out, list(SLICES.values()))
    return {column.removeprefix("is_"): pc.sum(columns[column]).as_py() or 0 for column in SLICES.values()}


def dataset_blocks(content: Mapping[str, Any], members: Mapping[str, int]) -> list[Block]:
    """The most important lines of a dataset's manifest, and its warnings."""
    rows = content["rows"]
    shares = ", ".join(f"{name} {count:,} ({count / max(rows, 1):.0%})" for name, count in members.items())
    lines = facts(
        ("dataset", content["path"]),
        ("rows", f"{rows:,}"),
        ("sessions", f"{content['sessions']:,} from {content['first_date']} to {content['last_date']}"),
        ("stocks", f"{content['stocks']:,}"),
        ("features", f"{content['live']} live"),
        ("universe", shares),
        ("quarantine", _counts(content["quarantine"])),
        ("months", _months(content.get("changes"))),
        ("fingerprint", content["fingerprint"][:FINGERPRINT_DIGITS]),
        timed=True,
    )
    return [lines, Sentences("warnings", content["warnings"], colour="yellow")]


# graph ------------------------------------------------------------------------------------------------------------


def _graph(options: argparse.Namespace) -> Reply:
    from atft_pipeline.graph.store import build_graph_file
    from atft_pipeline.storage.artifact import manifest_path, require_replaceable

    config = configuration(options, "graph")[0].graph
    require_replaceable(options.out, "stock_graph")
    previous = options.out if options.update and manifest_path(options.out).is_file() else None
    with ProgressBar("graph", unit="months") as bar:
        manifest = build_graph_file(options.dataset, options.out, config, previous, advance=bar.advance)
    content = {"path": str(options.out), **manifest}
    return Reply(content, [graph_facts(content)])


def graph_facts(content: Mapping[str, Any]) -> Block:
    """The most important lines of a graph's manifest."""
    config = content["config"]
    demeaned = ", returns less their sector's mean" if config["sector_demeaned"] else ""
    return facts(
        ("graph", content["path"]),
        ("of dataset", content["dataset_fingerprint"][:FINGERPRINT_DIGITS]),
        ("universe", config["universe"]),
        ("correlations", f"trailing {config['lookback_sessions']} sessions{demeaned}"),
        ("refreshes", f"{content['refresh_dates']:,}, every {config['refresh_sessions']} sessions"),
        ("edges", f"{content['edges']:,}"),
        ("mean degree", f"{content['mean_degree']:.2f}, at most {config['neighbours']}"),
        ("months", _months(content)),
        ("fingerprint", content["fingerprint"][:FINGERPRINT_DIGITS]),
        timed=True,
    )


def _months(changes: Mapping[str, Any] | None) -> Cell:
    if changes is None:
        return Cell("all in one file")
    retargeted = len(changes.get("months_retargeted", ()))
    more = f", targets of {retargeted} computed again" if retargeted else ""
    return Cell(f"{len(changes['months_computed'])} computed, {len(changes['months_reused'])} reused{more}")


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"
