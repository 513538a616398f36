"""Real quotes of the Tokyo Stock Exchange, 2006 to 2015, through the data layer: a slice of the newest sessions and the
listed source errors around their dates. Skipped where the files are not beside the checkout.
"""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from atft_process import REPO, atft_here

from atft_pipeline.config.schema import DatasetConfig
from atft_pipeline.dataset.layout import TARGETS
from atft_pipeline.features.registry import FEATURE_NAMES
from atft_pipeline.graph.store import load_graph
from atft_pipeline.market.contracts import check_ml_dataset, check_prices, read_checked
from atft_pipeline.market.sources import open_source
from atft_pipeline.market.universe import PricesResult, build_prices
from atft_pipeline.storage.artifact import read_manifest

QUOTES = REPO.parent / "shared" / "data" / "jp-tse-2006-2015"
pytestmark = [
    pytest.mark.skipif(
        not (QUOTES / "prices.parquet").is_file(), reason=f"needs the real quotes in {QUOTES.relative_to(REPO.parent)}"
    ),
    pytest.mark.slow(reason="a slice of real quotes"),
]

SESSIONS = 340
STOCKS = 150
ETF, PREFERRED, UNLISTED = "13060", "25935", ("13270", "32980")
NEW_LISTINGS = ("61860", "39290", "94160")
"""4 to 7 sessions old at the end of 2015."""
AFTER = 300
"""The look-ahead test cuts the source after this session."""
NO_TABLE = ("flow_", "stmt_", "is_flow_valid", "is_stmt_valid")


def sliced(folder: Path, prices: pl.DataFrame) -> Path:
    """A source folder with these prices, the index over their dates and the listed table as it is."""
    folder.mkdir()
    index = pl.read_parquet(QUOTES / "index.parquet")
    first, last = prices["Date"].min(), prices["Date"].max()
    prices.write_parquet(folder / "prices.parquet")
    index.filter(pl.col("Date").is_between(first, last)).write_parquet(folder / "index.parquet")
    (folder / "listed.parquet").write_bytes((QUOTES / "listed.parquet").read_bytes())
    return folder


@pytest.fixture(scope="module")
def newest() -> pl.DataFrame:
    """The last sessions of every ninth stock or so, with funds, a preferred share, thin stocks and new listings."""
    prices = pl.scan_parquet(QUOTES / "prices.parquet")
    days = pl.read_parquet(QUOTES / "index.parquet")["Date"].sort().tail(SESSIONS)
    codes = prices.select(pl.col("Code").unique().sort()).collect()["Code"]
    chosen = [*codes.gather_every(len(codes) // STOCKS), ETF, PREFERRED, *UNLISTED, *NEW_LISTINGS]
    return prices.filter(pl.col("Date") >= days[0], pl.col("Code").is_in(chosen)).collect()


@pytest.fixture(scope="module")
def built(newest: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """source -> d.parquet -> g.parquet by the command."""
    return _built(tmp_path_factory.mktemp("quotes"), newest)


def _built(folder: Path, prices: pl.DataFrame) -> Path:
    sliced(folder / "source", prices)
    assert atft_here("features", folder / "source", folder / "d.parquet") == 0
    assert atft_here("graph", folder / "d.parquet", folder / "g.parquet", "--set", "graph.lookback_sessions=120") == 0
    return folder


@pytest.fixture(scope="module")
def universe(built: Path) -> PricesResult:
    return build_prices(read_checked(open_source(built / "source")).tables, DatasetConfig())


def test_55_of_82_are_live_and_it_is_said_why(built: Path) -> None:
    manifest = read_manifest(built / "d.parquet", "ml_dataset")
    live = set(manifest["live_features"])
    assert len(live) == 55
    assert "55 of 82 live: tables investor_flows, statements are missing" in manifest["warnings"]
    assert {name for name in FEATURE_NAMES if name not in live} == {
        name for name in FEATURE_NAMES if name.startswith(NO_TABLE)
    }


def test_sectors_are_flagged_as_back_filled(built: Path, universe: PricesResult) -> None:
    """Both snapshots of listed lie after the quotes: no sector here is point in time."""
    assert universe.prices["is_listed_backfilled"].all()
    assert universe.summary["listed_backfilled_rows"] == universe.prices.height
    manifest = read_manifest(built / "d.parquet")
    assert manifest["listed_backfilled_rows"] == universe.prices.height
    assert any("back-filled" in warning for warning in manifest["warnings"])
    assert universe.prices["Sector33Code"].null_count() < 0.2 * universe.prices.height
    assert "9999" not in set(universe.prices["Sector33Code"])


def test_funds_reits_and_preferred_shares_are_filtered_and_counted(
    built: Path, newest: pl.DataFrame, universe: PricesResult
) -> None:
    listed = pl.read_parquet(QUOTES / "listed.parquet")
    traded = set(newest["Code"])
    funds = set(listed.filter(pl.col("MarketCode") == "0109")["Code"]) & traded
    unknown = traded - set(listed["Code"])
    assert ETF in funds
    assert len(funds) > 5
    kept = set(universe.prices["Code"])
    assert not kept & (funds | unknown | {PREFERRED})
    assert kept >= traded - funds - unknown - {PREFERRED}
    counts = read_manifest(built / "d.parquet")["quarantine"]
    assert counts["not_common_stock"] == len(funds | ({PREFERRED} & traded))
    assert counts.get("not_listed", 0) == len(unknown)


def test_stocks_delisted_since_are_kept_without_a_sector(newest: pl.DataFrame, universe: PricesResult) -> None:
    listed = pl.read_parquet(QUOTES / "listed.parquet").sort("Date")
    first = listed.group_by("Code", maintain_order=True).first()
    delisted = set(first.filter(pl.col("Sector33Code") == "9999", pl.col("MarketCode") != "0109")["Code"])
    delisted &= set(newest["Code"])
    assert delisted
    rows = universe.prices.filter(pl.col("Code").is_in(delisted))
    assert set(rows["Code"]) == delisted
    assert rows["Sector33Code"].null_count() == rows.height


def test_tables_hold_their_contracts(built: Path, universe: PricesResult) -> None:
    check_prices(universe.prices).require()
    dataset = pl.read_parquet(built / "d.parquet")
    check_ml_dataset(dataset, FEATURE_NAMES, TARGETS).require()
    assert dataset["Date"].n_unique() == SESSIONS


def test_no_value_is_infinite_or_absurd(built: Path) -> None:
    table = pq.read_table(built / "d.parquet")
    for name in (*FEATURE_NAMES, *TARGETS):
        values = table[name].drop_null().to_numpy()
        assert np.isfinite(values).all(), name
        assert np.abs(values).max(initial=0.0) < 1e4, name
    assert np.abs(table["target_1d"].drop_null().to_numpy()).max() < 2.0


def test_a_day_without_a_trade_is_no_return(newest: pl.DataFrame, universe: PricesResult) -> None:
    """Untraded days have no row in the source; in the panel they have one without prices."""
    prices = universe.prices
    untraded = prices.filter(~pl.col("is_traded"))
    assert untraded.height > 100
    assert untraded.select(pl.col("Open", "Close", "Volume").null_count()).row(0) == (untraded.height,) * 3
    keys = prices.filter("is_traded").select("Date", "Code")
    assert keys.join(newest.select("Date", "Code"), on=["Date", "Code"], how="anti").is_empty()


def test_new_listings_wait_for_their_history(universe: PricesResult) -> None:
    rows = universe.prices.filter(pl.col("Code").is_in(NEW_LISTINGS))
    assert set(rows["Code"]) == set(NEW_LISTINGS)
    assert not rows["is_investable"].any()


def test_liquid_stocks_turn_over_the_floor(universe: PricesResult) -> None:
    last = universe.prices["Date"].max()
    window = universe.prices.filter(pl.col("Date") > universe.prices["Date"].unique().sort()[-21])
    median = window.group_by("Code").agg(pl.col("TurnoverValue").median())
    liquid = set(universe.prices.filter(pl.col("Date") == last, pl.col("is_liquid"))["Code"])
    above = set(median.filter(pl.col("TurnoverValue") > 100e6)["Code"])
    assert 10 < len(liquid) < 0.6 * universe.prices["Code"].n_unique()
    assert liquid <= above


def test_nothing_known_later_changes_what_was_known(
    built: Path, newest: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The source cut after a session gives the same features, universe, returns and graph up to that session."""
    cut = newest["Date"].unique().sort()[AFTER]
    past = _built(tmp_path_factory.mktemp("past"), newest.filter(pl.col("Date") <= cut))
    known = pl.col("Date") <= cut
    for name in ("d.parquet", "d.parquet.membership.parquet"):
        whole = pl.read_parquet(built / name).filter(known)
        part = pl.read_parquet(past / name)
        columns = [column for column in whole.columns if column not in TARGETS]
        assert whole.height > 30_000
        assert part.select(columns).equals(whole.select(columns)), name
    whole_edges, part_edges = (pl.read_parquet(folder / "g.parquet") for folder in (built, past))
    assert part_edges.height > 10_000
    assert part_edges.equals(whole_edges.filter(known))


def test_targets_are_the_opens_after_the_score(built: Path, newest: pl.DataFrame) -> None:
    """target_5d of t is the open after t to the open five sessions on; the last six sessions have none."""
    table = pl.read_parquet(built / "d.parquet", columns=["Date", "Code", "target_5d"])
    days = newest["Date"].unique().sort()
    full = newest.group_by("Code").len().filter(pl.col("len") == SESSIONS)["Code"].sort()
    code = next(code for code in full if code in set(table["Code"]))
    own = newest.filter(pl.col("Code") == code).sort("Date")
    opened = (own["Open"] / own["AdjustmentFactor"].cum_prod()).to_numpy()
    expected = np.full(SESSIONS, np.nan)
    expected[:-6] = opened[6:] / opened[1:-5] - 1
    found = table.filter(pl.col("Code") == code).sort("Date")
    np.testing.assert_allclose(found["target_5d"].fill_null(np.nan), expected, atol=1e-6)
    assert table.filter(pl.col("Date") > days[-7])["target_5d"].is_null().all()


def test_the_graph_is_of_liquid_stocks_and_their_peers(built: Path) -> None:
    graph = load_graph(built / "g.parquet")
    assert len(graph.refreshes) > 40
    assert np.isfinite(graph.edge_attr).all()
    assert (graph.edge_attr[:, 0] > 0).all()
    membership = pq.read_table(built / "d.parquet.membership.parquet", columns=["Date", "Code", "is_liquid"])
    liquid = set(membership.filter(membership["is_liquid"])["Code"].to_pylist())
    assert set(graph.codes.tolist()) <= liquid


# --- the listed source errors -------------------------------------------------------------------------------

ERRORS = {
    ("28040", dt.date(2007, 7, 5)): ("factor_without_jump", "ignore_factor"),
    ("57070", dt.date(2012, 7, 11)): ("factor_without_jump", "ignore_factor"),
    ("57070", dt.date(2012, 8, 9)): ("factor_without_jump", "ignore_factor"),
    ("48750", dt.date(2006, 11, 2)): ("level_break", "rebase"),
    ("17730", dt.date(2011, 4, 27)): ("split_without_factor", "rebase"),
}
CRASH = ("86850", dt.date(2008, 9, 18))
"""577 to 292 on heavy turnover: a crash of half its price, not a split without a factor."""


@pytest.fixture(scope="module")
def around_errors(tmp_path_factory: pytest.TempPathFactory) -> PricesResult:
    """A year and a half around each listed error, of its stock and of one ordinary one."""
    prices = pl.scan_parquet(QUOTES / "prices.parquet")
    spans = [
        pl.col("Code").eq(code) & pl.col("Date").is_between(day - dt.timedelta(270), day + dt.timedelta(270))
        for code, day in (*ERRORS, CRASH)
    ]
    rows = prices.filter(pl.any_horizontal(*spans) | pl.col("Code").eq("72030")).collect()
    folder = sliced(tmp_path_factory.mktemp("errors") / "source", rows)
    return build_prices(read_checked(open_source(folder)).tables, DatasetConfig())


@pytest.mark.parametrize(("code", "day"), ERRORS)
def test_a_listed_error_is_quarantined(code: str, day: dt.date, around_errors: PricesResult) -> None:
    hits = around_errors.quarantine.filter(pl.col("Code") == code, pl.col("Date") == day)
    assert [(row["rule"], row["decision"]) for row in hits.iter_rows(named=True)] == [ERRORS[code, day]]


@pytest.mark.parametrize(("code", "day"), ERRORS)
def test_no_return_is_left_of_a_listed_error(code: str, day: dt.date, around_errors: PricesResult) -> None:
    """A wrong factor or scale would be a move of over 0.9 in log; what is left is an ordinary day's."""
    own = around_errors.prices.filter(pl.col("Code") == code, pl.col("is_traded")).sort("Date")
    moves = own.with_columns(move=pl.col("Close").log().diff())
    assert abs(moves.filter(pl.col("Date") == day)["move"].item()) < 0.35


def test_a_real_crash_is_kept(around_errors: PricesResult) -> None:
    code, day = CRASH
    own = around_errors.prices.filter(pl.col("Code") == code, pl.col("is_traded")).sort("Date")
    move = own.with_columns(move=pl.col("Close").log().diff()).filter(pl.col("Date") == day)["move"].item()
    assert move == pytest.approx(np.log(292 / 577), abs=1e-9)
    hit = around_errors.quarantine.filter(pl.col("Code") == code, pl.col("Date") == day)
    assert hit["decision"].to_list() == ["flag"]


def test_an_ordinary_stock_is_not_quarantined(around_errors: PricesResult) -> None:
    assert around_errors.quarantine.filter(pl.col("Code") == "72030").is_empty()


def test_the_source_s_own_adjusted_level_is_never_read(newest: pl.DataFrame, universe: PricesResult) -> None:
    """AdjustmentClose contains the splits of 2016 to 2018: a look-ahead if it were used."""
    tables = {
        "prices": newest.drop("AdjustmentClose"),
        "listed": pl.read_parquet(QUOTES / "listed.parquet"),
        "index": pl.read_parquet(QUOTES / "index.parquet").filter(pl.col("Date") >= newest["Date"].min()),
    }
    assert build_prices(tables, DatasetConfig()).prices.equals(universe.prices)
