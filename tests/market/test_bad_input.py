"""Bad input of every kind: exit code 2, one sentence that names it and what to do, and no output changed.

Cases run in this process; one of each kind also runs as a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from atft_process import (
    DATASET_SETTINGS,
    GRAPH_SETTINGS,
    TRAIN_SETTINGS,
    atft,
    atft_here,
    content,
)

Damage = Callable[[Path], None]


@pytest.fixture
def work(products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """The working directory: a copy of `products`, in which relative paths make short messages."""
    shutil.copytree(products, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    capsys.readouterr()
    return tmp_path / "work"


def assert_one_sentence(code: int, stdout: str, stderr: str, *named: str) -> None:
    assert code == 2, stderr
    assert stdout == ""
    assert len(stderr.splitlines()) == 1, stderr
    assert stderr.startswith("atft ")
    assert "Traceback" not in stderr
    for name in named:
        assert name in stderr


def assert_refused(capsys: pytest.CaptureFixture[str], arguments: list[object], *named: str) -> None:
    """The command fails with one sentence that holds every one of `named`, and no file in the work folder changed."""
    before = content(Path.cwd())
    code = atft_here(*arguments)
    out, err = capsys.readouterr()
    assert_one_sentence(code, out, err, *named)
    assert content(Path.cwd()) == before, "an earlier output changed, or something was left behind"


# --- a source -----------------------------------------------------------------------------------------------


def edit(table: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> Damage:
    def damage(source: Path) -> None:
        file = source / f"{table}.parquet"
        change(pl.read_parquet(file)).write_parquet(file)

    return damage


def cut(table: str, share: float) -> Damage:
    def damage(source: Path) -> None:
        file = source / f"{table}.parquet"
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])

    return damage


def damaged_pages(source: Path) -> None:
    file = source / "prices.parquet"
    whole = bytearray(file.read_bytes())
    whole[100:20000] = bytes(19900)
    file.write_bytes(bytes(whole))


def column_twice(source: Path) -> None:
    table = pq.read_table(source / "prices.parquet")
    pq.write_table(table.append_column("Close", table["Close"]), source / "prices.parquet")


def text_as_parquet(source: Path) -> None:
    (source / "prices.parquet").write_text("Date,Code,Open\n2024-01-04,72030,2500\n")


def blank(table: pl.DataFrame, *kept: str) -> pl.DataFrame:
    return table.with_columns(pl.lit("").alias(name) for name in table.columns if name not in kept)


NO_PRICE = [pl.lit(None, pl.Float64).alias(name) for name in ("Open", "High", "Low", "Close")]
NAN_PRICE = [pl.lit(np.nan).alias(name) for name in ("Open", "High", "Low", "Close")]

BAD_SOURCES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no folder": (shutil.rmtree, ("source is not a folder", "give a folder")),
    "missing table": (lambda s: (s / "listed.parquet").unlink(), ("listed: table not found", "source/listed.parquet")),
    "missing column": (
        edit("prices", lambda t: t.drop("Close")), ("prices: required column Close is missing", "source/prices.parquet")
    ),
    "missing column of an optional table": (
        edit("statements", lambda t: t.drop("Profit")), ("statements: required column Profit", "statements.parquet"),
    ),
    "codes as integers": (
        edit("prices", lambda t: t.with_columns(Code=pl.lit(72030))),
        ("prices: column Code in source/prices.parquet has type Int32, expected text", "convert it"),
    ),
    "numbers as words": (
        edit("prices", lambda t: t.with_columns(Close=pl.lit("high"))),
        ("column Close in source/prices.parquet holds 'high', expected numbers",),
    ),
    "dates of another order": (
        edit("prices", lambda t: t.with_columns(pl.col("Date").dt.strftime("%d/%m/%Y"))),
        ("column Date in source/prices.parquet", "expected a date (YYYY-MM-DD)"),
    ),
    "nested prices": (edit("prices", lambda t: t.with_columns(Close=pl.struct("Open"))), ("Close", "expected numbers")),
    "a date is null": (
        edit("prices", lambda t: t.with_columns(pl.col("Date").replace(t["Date"][0], None))),
        ("prices in source/prices.parquet: column Date holds nulls",),
    ),
    "empty table": (edit("prices", lambda t: t.head(0)), ("prices: no rows in source/prices.parquet",)),
    "empty optional table": (edit("investor_flows", lambda t: t.head(0)), ("investor_flows: no rows in source/inv",)),
    "duplicate keys": (
        edit("prices", lambda t: pl.concat([t, t.tail(3)])),
        ("prices in source/prices.parquet: 3 duplicate keys (Date, Code), e.g.", "keep one row per key"),
    ),
    "duplicate keys in listed": (
        edit("listed", lambda t: pl.concat([t, t]).sort("Date")), ("listed in source/listed.parquet", "duplicate keys"),
    ),
    "column twice": (column_twice, ("prices: source/prices.parquet cannot be read", "'Close' has more than one")),
    "truncated file": (cut("prices", 0.5), ("prices: source/prices.parquet cannot be read as parquet", "write it")),
    "zero bytes": (cut("index", 0.0), ("index: source/index.parquet cannot be read as parquet",)),
    "damaged pages": (damaged_pages, ("prices: source/prices.parquet cannot be read as parquet",)),
    "renamed csv": (text_as_parquet, ("prices: source/prices.parquet cannot be read as parquet",)),
    "dates out of order": (
        edit("prices", lambda t: t.reverse()),
        ("prices in source/prices.parquet: dates out of order in column Date", "sort the table by Date"),
    ),
    "index out of order": (edit("index", lambda t: t.reverse()), ("index in source/index.parquet: dates out of or",)),
    "all prices null": (
        edit("prices", lambda t: t.with_columns(NO_PRICE)),
        ("prices in source/prices.parquet: column Open, High, Low, Close holds no value", "provide prices"),
    ),
    "all prices NaN": (
        edit("prices", lambda t: t.with_columns(NAN_PRICE)), ("column Open, High, Low, Close holds no value",),
    ),
    "no price finite": (
        edit("prices", lambda t: t.with_columns(Close=pl.lit(np.inf))), ("source: prices: no traded row", "price_not_"),
    ),
    "nothing traded": (
        edit("prices", lambda t: t.with_columns(Volume=pl.lit(0.0))), ("source: prices: no traded row", "Volume"),
    ),
    "one stock only": (
        edit("prices", lambda t: t.filter(pl.col("Code") == "20000")),
        ("prices in source/prices.parquet: one stock only", "a cross-section needs several"),
    ),
    "one stock beside a fund": (
        edit("prices", lambda t: t.filter(pl.col("Code").is_in(["20000", "13060"]))),
        ("prices: one stock only (Code 20000)",),
    ),
    "ten sessions": (
        edit("prices", lambda t: t.filter(pl.col("Date") <= t["Date"].unique().sort()[9])),
        ("no stock is investable in any session", "give a longer history"),
    ),
    "codes that listed does not know": (
        edit("listed", lambda t: t.with_columns(Code="X" + pl.col("Code"))), ("not_listed", "check Code against"),
    ),
    "listed without codes": (
        edit("listed", lambda t: t.with_columns(Code=pl.lit(None, pl.String))),
        ("listed in source/listed.parquet: column Code holds nulls",),
    ),
    "two indices and none of them the market's": (
        edit("index", lambda t: pl.concat([t, t.with_columns(Code=pl.lit("9999"))]).with_columns(
            Code="9" + pl.col("Code")).sort("Date")),
        ("index: 2 codes and none is 0000",),
    ),
    "trading on Saturdays": (
        edit("prices", lambda t: t.with_columns(pl.col("Date").dt.offset_by("1d"))),
        ("trading calendar of tokyo", "is no session", "correct the column Date of prices"),
    ),
    "dates before the calendar": (
        edit("prices", lambda t: t.with_columns(pl.col("Date").dt.offset_by("-60y"))), ("known from 1997-01-01",),
    ),
    "dates after the calendar": (
        edit("prices", lambda t: t.with_columns(pl.col("Date").dt.offset_by("300y"))), ("known to 2200-12-31",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_SOURCES)
def test_a_bad_source_is_refused(fault: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, named = BAD_SOURCES[fault]
    damage(work / "source")
    assert_refused(capsys, ["features", "source", "d.parquet", "--json", *DATASET_SETTINGS], *named)


@pytest.mark.parametrize("fault", ["missing column", "truncated file"])
@pytest.mark.process(reason="the command as a process")
def test_a_bad_source_is_refused_in_a_process(fault: str, work: Path) -> None:
    damage, named = BAD_SOURCES[fault]
    damage(work / "source")
    before = content(work)
    done = atft("features", "source", "d.parquet", *DATASET_SETTINGS)
    assert_one_sentence(done.returncode, done.stdout, done.stderr, *named)
    assert content(work) == before


SOUND_SOURCES: dict[str, tuple[Damage, int]] = {
    "as generated": (lambda _: None, 82),
    "timestamps of the exchange's zone": (
        edit("prices", lambda t: t.with_columns(pl.col("Date").cast(pl.Datetime).dt.replace_time_zone("Asia/Tokyo"))),
        82,
    ),
    "index that misses sessions": (edit("index", lambda t: t.filter(pl.int_range(pl.len()) % 50 != 7)), 82),
    "index that ends early": (edit("index", lambda t: t.head(100)), 80),
    "half of the stocks not listed": (
        edit("listed", lambda t: t.filter(pl.col("Code") > t["Code"].unique().sort()[20])), 82,
    ),
    "flows of other sections": (
        edit("investor_flows", lambda t: t.with_columns(Section=pl.lit("Other ") + pl.col("Section"))), 69,
    ),
    "statements that are all blank": (
        edit("statements", lambda t: blank(t, "DisclosedDate", "LocalCode", "DisclosedTime", "TypeOfDocument",
                                           "TypeOfCurrentPeriod")), 70,
    ),
    "NaN for some prices": (
        edit("prices", lambda t: t.with_columns(Close=pl.when(pl.int_range(pl.len()) % 97 == 0).then(np.nan).otherwise(
            pl.col("Close")))), 82,
    ),
}  # fmt: skip


@pytest.mark.parametrize("quirk", SOUND_SOURCES)
def test_a_quirk_of_a_source_is_lived_with(quirk: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The other side of the cases above: what is unusual and usable gives a dataset, and says what it lacks."""
    quirks, live = SOUND_SOURCES[quirk]
    quirks(work / "source")
    assert atft_here("features", "source", "d.parquet", "--json", *DATASET_SETTINGS) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["live"] == f"{live} of 82"
    assert (f"warning: {live} of 82 live: no value in" in err) == (live < 82)
    values = pq.read_table(work / "d.parquet").select(["returns_5d", "volatility_20d", "target_1d"])
    assert all(np.isfinite(column.drop_null().to_numpy()).all() for column in values.columns)


def test_a_table_may_be_a_folder_of_parts_under_the_file_s_own_name(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = pl.read_parquet("source/prices.parquet")
    Path("source/prices.parquet").unlink()
    Path("source/prices.parquet").mkdir()
    prices[:5000].write_parquet("source/prices.parquet/part-0.parquet")
    prices[5000:].write_parquet("source/prices.parquet/part-1.parquet")
    assert atft_here("features", "source", "again.parquet", "--json", *DATASET_SETTINGS) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == pq.read_metadata(work / "d.parquet").num_rows


# --- outputs ------------------------------------------------------------------------------------------------

FEATURES = ["features", "source"]
GRAPH = ["graph", "d.parquet"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["market", "source"], ("source: exists and is not an empty folder",)),
        (["market", "d.parquet"], ("d.parquet: exists and is not an empty folder",)),
        ([*FEATURES, "source"], ("source: exists and is a folder that is no ml_dataset", "choose another name")),
        ([*FEATURES, "source/prices.parquet"], ("source/prices.parquet: exists and is a file that is no ml_dataset",)),
        ([*FEATURES, "g.parquet"], ("g.parquet: exists and is a file that is no ml_dataset",)),
        ([*GRAPH, "d.parquet"], ("d.parquet: exists and is a file that is no stock_graph",)),
        ([*GRAPH, "source"], ("source: exists and is a folder that is no stock_graph",)),
        ([*GRAPH, "d.parquet/g.parquet", *GRAPH_SETTINGS], ("d.parquet", "check the path")),
        (["train", "d.parquet", "g.parquet", "source", *TRAIN_SETTINGS], ("run directory source", "choose another")),
        (["train", "d.parquet", "g.parquet", "d.parquet", *TRAIN_SETTINGS], ("d.parquet",)),
    ],
)
@pytest.mark.usefixtures("work")
def test_an_output_never_replaces_something_else(
    arguments: list[object], named: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(capsys, arguments, *named)


@pytest.mark.usefixtures("work")
def test_a_missing_folder_of_an_output_is_made() -> None:
    assert atft_here("graph", "d.parquet", "new/folder/g.parquet", *GRAPH_SETTINGS) == 0
    assert {path.name for path in Path("new/folder").iterdir()} == {"g.parquet", "g.parquet.manifest.json"}


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user whom permissions bind; root may write anywhere")
@pytest.mark.usefixtures("work")
def test_a_folder_that_may_not_be_written_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("locked").mkdir(mode=0o500)
    assert_refused(capsys, [*GRAPH, "locked/g.parquet", *GRAPH_SETTINGS], "locked", "Permission denied")


@pytest.mark.usefixtures("work")
def test_a_write_that_fails_leaves_the_earlier_output(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "g.parquet")

    monkeypatch.setattr(pq, "write_table", full)
    assert_refused(capsys, [*GRAPH, "g.parquet"], "g.parquet: No space left on device", "check the path")
    assert_refused(capsys, [*FEATURES, "d.parquet"], "No space left on device")


# --- a dataset and its graph --------------------------------------------------------------------------------


def corrupt(name: str, start: float = 0.1, stop: float = 0.6) -> Damage:
    """Zeroes a part of the file and leaves its footer whole: the damage shows only when the pages are read."""

    def damage(folder: Path) -> None:
        file = folder / name
        whole = bytearray(file.read_bytes())
        a, b = int(len(whole) * start), int(len(whole) * stop)
        whole[a:b] = bytes(b - a)
        file.write_bytes(bytes(whole))

    return damage


def halve(name: str) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:5000]) and None


def without(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def manifest(name: str, **entries: object) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / f"{name}.manifest.json"
        values = {key: v for key, v in (json.loads(file.read_text()) | entries).items() if v is not None}
        file.write_text(json.dumps(values))

    return damage


MEMBERSHIP = "d.parquet.membership.parquet"
BAD_DATASETS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no manifest": (without("d.parquet.manifest.json"), ("d.parquet: no manifest", "build it again")),
    "manifest of something else": (manifest("d.parquet", kind="prices"), ("expected kind 'ml_dataset'", "'prices'")),
    "manifest that is no JSON": (
        lambda folder: (folder / "d.parquet.manifest.json").write_text("{") and None, ("not a readable JSON manifest",),
    ),
    "no membership": (without(MEMBERSHIP), (MEMBERSHIP, "no such parquet file")),
    "truncated membership": (halve(MEMBERSHIP), (MEMBERSHIP, "not a readable parquet file")),
    "damaged membership": (corrupt(MEMBERSHIP), (MEMBERSHIP, "not a readable parquet file")),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_DATASETS)
def test_a_bad_dataset_gives_no_graph(fault: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, named = BAD_DATASETS[fault]
    damage(work)
    assert_refused(capsys, ["graph", "d.parquet", "new.parquet", *GRAPH_SETTINGS], *named)


def test_fewer_sessions_than_a_graph_needs(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("prices", "index"):
        edit(name, lambda t: t.filter(pl.col("Date") <= t["Date"].unique().sort()[39]))(work / "source")
    assert atft_here("features", "source", "short.parquet", *DATASET_SETTINGS) == 0
    capsys.readouterr()
    assert_refused(capsys, ["graph", "short.parquet", "new.parquet"], "short.parquet: 40 sessions are fewer than")


BAD_TRAININGS: dict[str, tuple[Damage, list[str], tuple[str, ...]]] = {
    "no dataset": (without("d.parquet.manifest.json"), [], ("d.parquet: no manifest",)),
    "manifest without an entry": (
        manifest("d.parquet", fingerprint=None), [], ("d.parquet.manifest.json: entry 'fingerprint' is missing",),
    ),
    "truncated dataset": (halve("d.parquet"), [], ("d.parquet", "not a readable parquet file")),
    "damaged dataset": (corrupt("d.parquet"), [], ()),
    "truncated graph": (halve("g.parquet"), [], ("g.parquet", "not a readable parquet file")),
    "graph of another dataset": (
        manifest("g.parquet", dataset_fingerprint="0" * 64), [], ("graph g.parquet: built on dataset 000000000000",),
    ),
    "window longer than the history": (
        lambda _: None, ["--set", "model.window_sessions=400"], ("d.parquet: 330 sessions are fewer than the window",),
    ),
    "split longer than the history": (
        lambda _: None, ["--set", "split.scheme=sessions"], ("330 sessions are fewer than", "give a longer price hist"),
    ),
    "device that is not there": (lambda _: None, ["--device", "tpu"], ("device: expected auto, cpu or cuda, found",)),
    "unknown field": (lambda _: None, ["--set", "model.hiden_size=8"], ("unknown field 'model.hiden_size'",)),
    "unknown section": (lambda _: None, ["--set", "net.size=8"], ("`atft train` reads only split.*, model.*",)),
    "section of another command": (lambda _: None, ["--set", "graph.neighbours=3"], ("`atft train` reads only",)),
    "wrong type": (lambda _: None, ["--set", "train.epochs=many"], ("train.epochs: expected int, found 'many'",)),
    "no assignment": (lambda _: None, ["--set", "train.epochs"], ("--set: expected FIELD=VALUE",)),
    "unknown preset": (lambda _: None, ["--preset", "huge"], ("expected one of cpu, production, quick",)),
    "phases of no term": (
        lambda _: None, ["--set", 'train.loss.phases=[{"first_epoch":1,"last_epoch":2,"weights":{"mae":1}}]'],
        ("unknown loss terms ['mae']",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_TRAININGS)
def test_training_that_cannot_start_is_refused(fault: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, settings, named = BAD_TRAININGS[fault]
    damage(work)
    before = content(work)
    code = atft_here("train", "d.parquet", "g.parquet", "run", "--json", *TRAIN_SETTINGS, *settings)
    out, err = capsys.readouterr()
    assert_one_sentence(code, out, err, *named)
    after = {name: data for name, data in content(work).items() if not name.startswith("run/")}
    assert after == before


# --- predictions --------------------------------------------------------------------------------------------


def predictions(**columns: object) -> pa.Table:
    rng = np.random.default_rng(0)
    days = np.repeat(np.datetime64("2024-01-04") + np.arange(30), 10)
    values: dict[str, object] = {
        "Date": days,
        "Code": [f"{n:04}" for n in range(10)] * 30,
        "score": rng.normal(size=300),
        "target": rng.normal(size=300) * 0.01,
    }
    return pa.table({name: value for name, value in (values | columns).items() if value is not None})


BAD_PREDICTIONS: dict[str, tuple[Callable[[Path], object], list[str], tuple[str, ...]]] = {
    "no file": (lambda _: None, [], ("p.parquet: no such parquet file",)),
    "no parquet": (lambda p: p.write_text("Date,Code\n"), [], ("p.parquet: not a readable parquet file",)),
    "empty folder": (lambda p: p.mkdir(), [], ("p.parquet: no such parquet file or folder of parquet partitions",)),
    "missing column": (lambda p: pq.write_table(predictions(score=None), p), [], ("column score is missing",)),
    "column twice": (
        lambda p: pq.write_table(predictions().append_column("score", pa.array(np.ones(300))), p), [],
        ("column score appears more than once",),
    ),
    "wrong type": (lambda p: pq.write_table(predictions(target=["up"] * 300), p), [], ("target has type string",)),
    "no rows": (lambda p: pq.write_table(predictions().slice(0, 0), p), [], ("the table has no rows",)),
    "keys twice": (
        lambda p: pq.write_table(pa.concat_tables([predictions()] * 2), p), [], ("300 rows repeat a key (Date, Code)",),
    ),
    "no target known": (lambda p: pq.write_table(predictions(target=[None] * 300), p), [], ("no row has a target",)),
    "one session": (lambda p: pq.write_table(predictions().slice(0, 10), p), [], ("only one session (2024-01-04)",)),
    "no such split": (lambda p: pq.write_table(predictions(), p), ["--split", "test"], ("column split is missing",)),
    "no such slice": (lambda p: pq.write_table(predictions(), p), ["--slice", "liquid"], ("is_liquid is missing",)),
    "negative cost": (lambda p: pq.write_table(predictions(), p), ["--cost-bps", "-1"], ("evaluation.cost_bps",)),
    "legs that overlap": (lambda p: pq.write_table(predictions(), p), ["--quantile", "0.7"], ("evaluation.quantile",)),
    "year without days": (lambda p: pq.write_table(predictions(), p), ["--days-per-year", "-5"], ("days_per_year",)),
    "cost in words": (lambda p: pq.write_table(predictions(), p), ["--cost-bps", "low"], ("invalid float value",)),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_PREDICTIONS)
def test_predictions_that_cannot_be_evaluated_are_refused(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write, settings, named = BAD_PREDICTIONS[fault]
    write(tmp_path / "p.parquet")
    assert_refused(capsys, ["evaluate", "p.parquet", "--json", *settings], *named)


def test_damaged_pages_and_parts_that_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pq.write_table(predictions(), "p.parquet")
    corrupt("p.parquet", 0.05, 0.5)(tmp_path)
    assert_refused(capsys, ["evaluate", "p.parquet"], "p.parquet: not a readable parquet file")
    Path("parts").mkdir()
    pq.write_table(predictions(), "parts/a.parquet")
    pq.write_table(predictions(score=None), "parts/b.parquet")
    assert_refused(capsys, ["evaluate", "parts"], "parts: b.parquet has other columns or types than a.parquet")


# --- usage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "required: COMMAND"),
        (["forecast"], "invalid choice: 'forecast'"),
        (["market"], "required: OUT_DIR"),
        (["market", "new", "--stocks", "many"], "invalid int value: 'many'"),
        (["market", "new/er", "--stocks", "3"], "expected 4 to 7000 stocks"),
        (["market", "new/er", "--sessions", "1"], "at least 2 sessions"),
        (["market", "new/er", "--sessions", "1000000"], "at most 10000"),
        (["market", "new/er", "--seed", "-1"], "a seed of at least 0"),
        (["features", "source", "new.parquet", "--set", "dataset.market=mars"], "expected one of tokyo, us"),
        (["features", "source", "new.parquet", "--set", "dataset.colour=1"], "unknown field 'dataset.colour'"),
        (["features", "source", "new.parquet", "--preset", "huge"], "expected one of cpu, production, quick"),
        (["diagnose", "nowhere"], "nowhere: no such run directory"),
        (["diagnose", "."], "nothing readable of a run"),
        (["status", "--runs", "nowhere"], "nowhere: no such folder of runs"),
    ],
)
def test_wrong_usage_is_refused(
    arguments: list[object],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code = atft_here(*arguments)
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("atft")
    assert named in err
    assert list(tmp_path.iterdir()) == []
