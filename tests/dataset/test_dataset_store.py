"""Prices and dataset by month: built span by span and continued, they equal one pass over all sessions."""

from __future__ import annotations

import datetime as dt
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from markets.eventful_market import eventful_tables
from shared_folders import built_once

from atft_pipeline.cli import main
from atft_pipeline.config.schema import DatasetConfig
from atft_pipeline.dataset import store
from atft_pipeline.dataset.layout import read_membership
from atft_pipeline.dataset.rows import build_dataset
from atft_pipeline.dataset.store import update_dataset
from atft_pipeline.errors import InputError
from atft_pipeline.features.statistics import Statistics
from atft_pipeline.market import price_store
from atft_pipeline.market.contracts import read_checked
from atft_pipeline.market.price_store import read_quarantine, update_prices
from atft_pipeline.market.sources import RAW_TABLES, open_source
from atft_pipeline.market.synthetic import generate_market
from atft_pipeline.market.universe import build_prices
from atft_pipeline.storage.artifact import read_artifact, read_manifest
from atft_pipeline.storage.monthly import move_artifact, remove_artifact

pytestmark = pytest.mark.slow(reason="markets built again and again, month by month")

CONFIG = DatasetConfig()
Tables = dict[str, pl.DataFrame]
VOLATILE = ("changes", "drift", "drift_against")
"""Entries of a manifest that tell how it was made, not what of."""


@pytest.fixture(autouse=True)
def _short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    short_spans(monkeypatch)


def short_spans(patch: pytest.MonkeyPatch) -> None:
    """A few months at a time, so that a small market is passed in many spans."""
    patch.setattr(price_store, "CELLS_AT_A_TIME", 4_000)
    patch.setattr(store, "CELLS_AT_A_TIME", 4_000)


def quiet() -> Tables:
    return generate_market(stocks=40, sessions=420, seed=4).tables


MARKETS: dict[str, Callable[[], Tables]] = {"quiet": quiet, "eventful": lambda: eventful_tables("segments")}


def written(tables: Tables, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.write_parquet(folder / f"{name}.parquet")
    return folder


def made(source: Path, out: Path, previous: Path | None = None) -> dict[str, Any]:
    """The dataset's manifest, its prices beside it."""
    opened = open_source(source)
    others = read_checked(opened, but=["prices"])
    prices, before = prices_of(out), previous and prices_of(previous)
    update_prices(opened, others, prices, CONFIG, before)[1].require()
    manifest, report = update_dataset(prices, others.tables, out, CONFIG, previous)
    report.require()
    assert manifest == read_manifest(out, "ml_dataset")
    return manifest


Full = Callable[[str], Path]


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> Full:
    """`full(market)` is a folder with the market's `source` and its dataset `full`, computed at once: read it only."""

    def build(market: str, folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            short_spans(patch)
            made(written(MARKETS[market](), folder / "source"), folder / "full")

    return lambda market: built_once(tmp_path_factory, f"parts-{market}", lambda folder: build(market, folder))


@pytest.fixture
def quiet_made(full: Full, tmp_path: Path) -> Path:
    """`source` of the quiet market, its dataset `d` to change, and `full` as it was."""
    shutil.copytree(full("quiet"), tmp_path, dirs_exist_ok=True)
    for part in list(tmp_path.glob("full*")):
        copy = part.with_name(part.name.replace("full", "d", 1))
        shutil.copytree(part, copy) if part.is_dir() else shutil.copy(part, copy)
    return tmp_path


def until(tables: Tables, day: dt.date) -> Tables:
    """What a source held at the end of `day`."""
    return {
        name: table.filter(pl.col(RAW_TABLES[name].date).cast(pl.String) <= str(day)) for name, table in tables.items()
    }


def assert_same(one: Path, two: Path) -> None:
    """Every value, every quarantine row and every entry of the manifests that says what there is."""
    for read in (read_artifact, read_membership):
        assert read(one).equals(read(two))
    prices = [prices_of(path) for path in (one, two)]
    assert read_quarantine(prices[0]).equals(read_quarantine(prices[1]))
    for pair in ((one, two), prices):
        manifests = [
            {name: value for name, value in read_manifest(path).items() if name not in (*VOLATILE, "source")}
            for path in pair
        ]
        assert manifests[0] == manifests[1]


def prices_of(dataset: Path) -> Path:
    return dataset.with_name(f"{dataset.name}.prices")


def reused(product: Path) -> list[str]:
    """Months that were taken over from the earlier version."""
    return list(read_manifest(product)["changes"]["months_reused"])


@pytest.mark.parametrize("market", MARKETS)
def test_parts_are_the_dataset_made_in_one_piece(market: str, full: Full) -> None:
    parts = full(market) / "full"
    checked = read_checked(open_source(full(market) / "source"))
    result = build_prices(checked.tables, CONFIG)
    features, membership, whole = build_dataset(result.panel, result.quarantine, checked.tables, CONFIG, checked.record)
    assert read_artifact(parts).equals(features)
    assert read_membership(parts).equals(membership)
    assert read_quarantine(prices_of(parts)).equals(result.quarantine)
    manifest = read_manifest(parts)
    assert manifest["fingerprint"] == whole["fingerprint"]
    assert manifest["feature_stats"] == whole["feature_stats"]
    assert len(list(parts.with_name("full.memory").iterdir())) >= 4, "the market must have been passed in several spans"


@pytest.mark.parametrize("market", MARKETS)
@pytest.mark.parametrize("back", [1, 7, 30])
def test_appended_sessions_give_the_full_computation_bit_for_bit(
    market: str, back: int, full: Full, tmp_path: Path
) -> None:
    tables = MARKETS[market]()
    days = tables["prices"]["Date"].unique().sort()
    made(written(until(tables, days[-1 - back]), tmp_path / "before"), tmp_path / "old")
    made(full(market) / "source", tmp_path / "new", tmp_path / "old")
    assert_same(tmp_path / "new", full(market) / "full")
    for product in (tmp_path / "new", prices_of(tmp_path / "new")):
        assert reused(product), "everything was computed again"
        assert days[-back].isoformat()[:7] in read_manifest(product)["changes"]["months_computed"]


def test_one_session_after_the_other_in_place(tmp_path: Path) -> None:
    """Five sessions of one month and the first five of the next."""
    tables = MARKETS["eventful"]()
    sessions = tables["prices"]["Date"].unique().sort()
    opening = max(n for n in range(1, len(sessions) - 4) if sessions[n].month != sessions[n - 1].month)
    days = sessions[opening - 5 : opening + 5].to_list()
    for day in days:
        previous = tmp_path / "d" if day != days[0] else None
        made(written(until(tables, day), tmp_path / "source"), tmp_path / "d", previous)
    made(tmp_path / "source", tmp_path / "full")
    assert_same(tmp_path / "d", tmp_path / "full")


def revised_price(tables: Tables, day: dt.date) -> Tables:
    hit = (pl.col("Date") == day) & (pl.col("Code") == tables["prices"]["Code"][50])
    prices = tables["prices"].with_columns(
        pl.when(hit).then(pl.col("Volume") + 700).otherwise("Volume").alias("Volume")
    )
    return {**tables, "prices": prices}


def revised_index(tables: Tables, day: dt.date) -> Tables:
    hit = pl.col("Date") == day
    index = tables["index"].with_columns(pl.when(hit).then(pl.col("Close") * 1.01).otherwise("Close").alias("Close"))
    return {**tables, "index": index}


def late_document(tables: Tables, day: dt.date) -> Tables:
    extra = tables["statements"].tail(1).with_columns(DisclosedDate=pl.lit(str(day)))
    return {**tables, "statements": pl.concat([tables["statements"], extra]).sort("DisclosedDate")}


def moved_sector(tables: Tables, day: dt.date) -> Tables:
    listed = tables["listed"]
    later = listed.filter(pl.col("Date") >= day, pl.col("MarketCode") == "0111", pl.col("Sector33Code") != "0050")
    hit = (pl.col("Date") == later["Date"][0]) & (pl.col("Code") == later["Code"][0])
    return {**tables, "listed": listed.with_columns(pl.when(hit).then(pl.lit("0050")).otherwise("Sector33Code").alias(
        "Sector33Code"))}  # fmt: skip


@pytest.mark.parametrize(
    ("revise", "named"),
    [(revised_price, "prices"), (revised_index, "index"), (late_document, "statements"), (moved_sector, "prices")],
)
def test_a_revised_past_is_recomputed_from_there_on_and_says_what(
    revise: Callable[[Tables, dt.date], Tables], named: str, quiet_made: Path
) -> None:
    tables = MARKETS["quiet"]()
    day = tables["prices"]["Date"].unique().sort()[300]
    source = written(revise(tables, day), quiet_made / "revised")
    manifest = made(source, quiet_made / "new", quiet_made / "d")
    made(source, quiet_made / "anew")
    assert_same(quiet_made / "new", quiet_made / "anew")
    changes = manifest["changes"]
    assert changes["first_changed_month"][named] >= day.isoformat()[:7]
    assert changes["months_reused"]
    assert reused(prices_of(quiet_made / "new"))
    assert max(changes["months_reused"]) < min(changes["first_changed_month"].values())


def with_closed_day(tables: Tables, like: dt.date, day: dt.date) -> Tables:
    """Rows of a day on which the exchange was closed, as some vendors have them."""
    prices = tables["prices"]
    rows = prices.filter(pl.col("Date") == like).with_columns(Date=pl.lit(day), Volume=pl.lit(0.0))
    return {**tables, "prices": pl.concat([prices, rows]).sort("Date", "Code")}


def holiday_opens_a_month(tables: Tables) -> tuple[Tables, Tables]:
    now = until(tables, dt.date(2023, 9, 29))
    return now, with_closed_day(now, dt.date(2023, 9, 29), dt.date(2023, 10, 1))


def holiday_ends_a_month(tables: Tables) -> tuple[Tables, Tables]:
    later = with_closed_day(tables, dt.date(2023, 9, 29), dt.date(2023, 9, 30))
    return until(later, dt.date(2023, 10, 19)), until(later, dt.date(2023, 10, 20))


def fund_that_was_a_stock(tables: Tables) -> tuple[Tables, Tables]:
    code, listed = tables["prices"]["Code"][7], tables["listed"]
    only = listed.filter((pl.col("Code") != code) | (pl.col("Date") >= dt.date(2023, 10, 1)))
    wrong = only.with_columns(pl.when(pl.col("Code") == code).then(pl.lit("0109")).otherwise("MarketCode").alias(
        "MarketCode"))  # fmt: skip
    return {**tables, "listed": wrong}, {**tables, "listed": only}


def flow_columns_mislabelled(tables: Tables) -> tuple[Tables, Tables]:
    swap = {"TrustBanksBalance": "TrustBanksPurchases", "TrustBanksPurchases": "TrustBanksBalance"}
    flows = tables["investor_flows"]
    return tables, {**tables, "investor_flows": flows.rename(swap).select(flows.columns)}


def newest_month_of_prices_lost(tables: Tables) -> tuple[Tables, Tables]:
    return tables, {**tables, "prices": tables["prices"].filter(pl.col("Date") < dt.date(2023, 12, 1))}


def index_goes_on_for_weeks(tables: Tables) -> tuple[Tables, Tables]:
    shorter = {**tables, "prices": tables["prices"].filter(pl.col("Date") < dt.date(2023, 11, 1))}
    return until(shorter, dt.date(2023, 10, 20)), shorter


@pytest.mark.parametrize(
    "change",
    [
        holiday_opens_a_month,
        holiday_ends_a_month,
        fund_that_was_a_stock,
        flow_columns_mislabelled,
        newest_month_of_prices_lost,
        index_goes_on_for_weeks,
    ],
)
def test_an_odd_source_brought_up_to_date_is_the_source_built_anew_in_parts_and_in_one_file(
    change: Callable[[Tables], tuple[Tables, Tables]], tmp_path: Path
) -> None:
    before, after = change(MARKETS["quiet"]())
    made(written(before, tmp_path / "before"), tmp_path / "old")
    source = written(after, tmp_path / "source")
    made(source, tmp_path / "new", tmp_path / "old")
    made(source, tmp_path / "full")
    assert_same(tmp_path / "new", tmp_path / "full")
    assert run_features(source, tmp_path / "one.parquet") == 0
    assert read_artifact(tmp_path / "one.parquet").equals(read_artifact(tmp_path / "full"))


def test_nothing_new_computes_nothing(quiet_made: Path) -> None:
    first = read_manifest(quiet_made / "d")
    again = made(quiet_made / "source", quiet_made / "e", quiet_made / "d")
    assert again["changes"]["months_computed"] == again["changes"]["months_retargeted"] == []
    assert again["fingerprint"] == first["fingerprint"]
    assert_same(quiet_made / "d", quiet_made / "e")


def test_parts_of_other_code_or_configuration_are_not_continued(
    quiet_made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(price_store, "code_revision", lambda _: "other")
    monkeypatch.setattr(store, "code_revision", lambda _: "other")
    again = made(quiet_made / "source", quiet_made / "e", quiet_made / "d")
    assert again["changes"]["months_reused"] == []


def test_order_and_names_of_source_files_change_nothing(full: Full, tmp_path: Path) -> None:
    tables = MARKETS["quiet"]()
    parts = written({name: table for name, table in tables.items() if name != "prices"}, tmp_path / "many") / "prices"
    parts.mkdir()
    half = tables["prices"]["Date"].unique().sort()[200]
    tables["prices"].filter(pl.col("Date") <= half).write_parquet(parts / "z.parquet")
    tables["prices"].filter(pl.col("Date") > half).write_parquet(parts / "a.parquet")
    manifest = made(tmp_path / "many", tmp_path / "e")
    assert manifest["fingerprint"] == read_manifest(full("quiet") / "full")["fingerprint"]


def test_a_missing_month_of_prices_is_one_sentence(quiet_made: Path) -> None:
    next(iter(sorted((quiet_made / "d.prices").glob("*.parquet")))).unlink()
    others = read_checked(open_source(quiet_made / "source"), but=["prices"])
    with pytest.raises(InputError, match=r"partition 2022-04\.parquet is missing"):
        update_dataset(quiet_made / "d.prices", others.tables, quiet_made / "e", CONFIG)


def test_a_failing_update_leaves_the_earlier_dataset_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = MARKETS["quiet"]()
    days = tables["prices"]["Date"].unique().sort()
    before = made(written(until(tables, days[-2]), tmp_path / "source"), tmp_path / "d")
    written(tables, tmp_path / "source")

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(pq, "write_table", full_disk)
    with pytest.raises(OSError, match="No space"):
        made(tmp_path / "source", tmp_path / "d", tmp_path / "d")
    monkeypatch.undo()
    assert read_manifest(tmp_path / "d", "ml_dataset") == before
    assert read_artifact(tmp_path / "d").num_rows == before["rows"]
    assert not list(tmp_path.glob(".d*")), "nothing half-written stays"


# --- statistics that add up ---


def test_statistics_of_parts_are_those_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3, 5000)).astype(np.float32)
    values[0, ::3] = np.nan
    values[1] = 0.0
    values[2] *= 1e6
    whole = Statistics.of(values)
    total = Statistics.total([Statistics.of(values[:, :1200]), Statistics.of(values[:, 1200:])], 3)
    np.testing.assert_array_equal(total.bins, whole.bins)
    np.testing.assert_array_equal(total.counts, whole.counts)
    for number, column in enumerate(values):
        live = column[np.isfinite(column)].astype(np.float64)
        found = total.describe(number)
        assert found["null_share"] == pytest.approx(1 - len(live) / 5000)
        assert found["mean"] == pytest.approx(live.mean(), rel=1e-6, abs=1e-9)
        assert found["std"] == pytest.approx(live.std(), rel=1e-6, abs=1e-9)
        for name, level in (("p01", 0.01), ("p99", 0.99)):
            exact = np.quantile(live, level, method="higher")
            # One bin of the histogram is one part in 128 wide; its middle is at most one in 256 away.
            assert found[name] == pytest.approx(exact, rel=0.012, abs=1e-6)


def run_features(source: Path, out: Path, *more: str) -> int:
    return main(["features", str(source), str(out), "--json", *more])


def test_a_refused_build_takes_nothings_place_and_is_refused_again(
    quiet_made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables, source = MARKETS["quiet"](), quiet_made / "source"
    before = read_manifest(quiet_made / "d")
    below_the_floor = tables["prices"].with_columns(pl.col("Open", "High", "Low", "Close") * 1e-3)
    written({**tables, "prices": below_the_floor}, source)
    for _ in range(2):
        capsys.readouterr()
        assert run_features(source, quiet_made / "d", "--update") == 2
        assert "no stock is investable in any session" in capsys.readouterr().err
    assert read_manifest(quiet_made / "d") == before
    assert not list(quiet_made.glob(".*")), "something was left behind"


def test_product_of_any_name_in_a_new_folder_leaves_its_neighbours_alone(tmp_path: Path) -> None:
    source = written(MARKETS["quiet"](), tmp_path / "source")
    neighbour, product = tmp_path / "new" / "d[1]2", tmp_path / "new" / "d[1]"
    assert run_features(source, neighbour) == 0
    assert run_features(source, product) == 0
    before = read_artifact(product)
    move_artifact(product, tmp_path / "new" / "moved")
    assert read_artifact(tmp_path / "new" / "moved").equals(before)
    assert not product.exists()
    remove_artifact(product)
    assert read_artifact(neighbour).equals(before)
    assert read_quarantine(prices_of(neighbour)).equals(read_quarantine(prices_of(tmp_path / "new" / "moved")))


def test_month_without_a_quote_is_a_month_like_any(tmp_path: Path) -> None:
    # In Tokyo the first session of October 2020 was one in which nothing could trade.
    market = generate_market(stocks=40, sessions=120, seed=3, first_session=dt.date(2020, 4, 6)).tables
    tables = until({name: market[name] for name in ("prices", "listed", "index")}, dt.date(2020, 9, 30))
    last = tables["prices"].filter(pl.col("Date") == dt.date(2020, 9, 30))
    empty = last.with_columns(
        pl.lit(dt.date(2020, 10, 1)).alias("Date"),
        pl.lit(0.0).alias("Volume"),
        *(pl.lit(None, pl.Float64).alias(name) for name in ("Open", "High", "Low", "Close", "TurnoverValue")),
    )
    made(written(tables, tmp_path / "source"), tmp_path / "d")
    source = written({**tables, "prices": pl.concat([tables["prices"], empty])}, tmp_path / "source")
    made(source, tmp_path / "d", tmp_path / "d")
    made(source, tmp_path / "full")
    assert_same(tmp_path / "d", tmp_path / "full")
    assert read_manifest(tmp_path / "d")["last_date"] == "2020-10-01"


def test_rows_without_a_date_are_refused_as_in_one_file(tmp_path: Path) -> None:
    tables = MARKETS["quiet"]()
    undated = pl.when(pl.int_range(pl.len()) == 500).then(None).otherwise("Date").alias("Date")
    source = written({**tables, "prices": tables["prices"].with_columns(undated)}, tmp_path / "source")
    with pytest.raises(InputError, match="column Date holds nulls"):
        made(source, tmp_path / "d")


@pytest.mark.parametrize("damage", ["gone", "torn", "short", "no statistics", "torn memory"])
def test_damaged_months_are_computed_again(damage: str, quiet_made: Path) -> None:
    months = sorted(read_manifest(quiet_made / "d")["parts"])
    place, month = {
        "gone": ("d", months[-3]),
        "torn": ("d.prices", months[-3]),
        "short": ("d.prices", months[-3]),
        "no statistics": ("d.statistics", months[-3]),
        "torn memory": ("d.memory", months[-1]),
    }[damage]
    file = next((quiet_made / place).glob(f"{month}.*"))
    if damage.startswith("torn"):
        file.write_bytes(file.read_bytes()[:50])
    elif damage == "short":
        pl.read_parquet(file).head(1).write_parquet(file)
    else:
        file.unlink()
    made(quiet_made / "source", quiet_made / "d", quiet_made / "d")
    assert_same(quiet_made / "d", quiet_made / "full")
    assert month not in reused(quiet_made / place.replace(".memory", "").replace(".statistics", ""))


@pytest.mark.parametrize("name", ["prices", "membership", "statistics", "memory", "prices.memory"])
def test_a_stranger_beside_a_new_product_is_refused_and_stays(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written(MARKETS["quiet"](), tmp_path / "source")
    stranger = tmp_path / f"d.{name}"
    stranger.mkdir()
    (stranger / "notes.txt").write_text("precious")
    assert run_features(source, tmp_path / "d") == 2
    assert str(stranger) in capsys.readouterr().err
    assert (stranger / "notes.txt").read_text() == "precious"


def test_a_source_named_like_the_prices_of_its_product_is_refused_and_stays(tmp_path: Path) -> None:
    source = written(MARKETS["quiet"](), tmp_path / "d.prices")
    assert run_features(source, tmp_path / "d") == 2
    assert len(list(source.glob("*.parquet"))) == 5


@pytest.mark.parametrize("damaged", ["d.membership/2022-09.parquet", "d.statistics/2022-09.npz"])
def test_damage_of_any_table_of_a_month_is_mended(damaged: str, quiet_made: Path) -> None:
    with (quiet_made / damaged).open("r+b") as file:
        file.truncate(300)
    assert run_features(quiet_made / "source", quiet_made / "d", "--update") == 0
    assert read_manifest(quiet_made / "d")["changes"]["first_changed_month"] == {"damaged parts": "2022-09"}
    assert_same(quiet_made / "d", quiet_made / "full")


def test_lost_quarantine_is_mended(quiet_made: Path) -> None:
    before = read_quarantine(quiet_made / "d.prices")
    (quiet_made / "d.prices.quarantine.parquet").unlink()
    assert run_features(quiet_made / "source", quiet_made / "d", "--update") == 0
    assert read_quarantine(quiet_made / "d.prices").equals(before)
