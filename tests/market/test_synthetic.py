"""The generated market has the signal that its truth states, and a longer market begins with the shorter one."""

from __future__ import annotations

import datetime as dt

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from atft_pipeline.errors import InputError
from atft_pipeline.market.synthetic import SyntheticMarket, generate_market, write_market


@pytest.fixture(scope="module", params=[False, True], ids=["simple", "hard"])
def market(request: pytest.FixtureRequest) -> SyntheticMarket:
    return generate_market(stocks=200, sessions=400, seed=3, hard=request.param)


def expected_and_realised(market: SyntheticMarket) -> tuple[np.ndarray, np.ndarray]:
    """[T, N] truth and target O_{t+2}/O_{t+1} - 1, by looping over the raw rows of each stock."""
    sessions = {day: t for t, day in enumerate(market.tables["index"]["Date"])}
    codes = sorted(market.truth["Code"].unique())
    opens = np.full((len(sessions), len(codes)), np.nan)
    truth = opens.copy()
    for j, code in enumerate(codes):
        factor = 1.0
        rows = market.tables["prices"].filter(pl.col("Code") == code).sort("Date")
        for day, price, step in rows.select("Date", "Open", "AdjustmentFactor").iter_rows():
            factor *= step
            opens[sessions[day], j] = price / factor
    column = {code: j for j, code in enumerate(codes)}
    for day, code, value in market.truth.iter_rows():
        truth[sessions[day], column[code]] = value
    return truth[:-2], opens[2:] / opens[1:-1] - 1


def test_truth_has_the_stated_strength_against_target_1d(market: SyntheticMarket) -> None:
    truth, target = expected_and_realised(market)
    ics, spreads = [], []
    for t in range(25, len(truth)):  # the signals need 20 sessions to fill
        known = np.isfinite(truth[t] + target[t])
        ics.append(np.corrcoef(truth[t, known], target[t, known])[0, 1])
        order = np.argsort(-truth[t, known])
        fifth = len(order) // 5
        spreads.append(target[t, known][order[:fifth]].mean() - target[t, known][order[-fifth:]].mean())
    # The band is four standard errors (0.12 / sqrt(373)) around the designed 0.11.
    assert 0.085 < np.mean(ics) < 0.135
    assert 0.5 < np.mean(spreads) / np.std(spreads, ddof=1) < 1.0


def test_truth_is_the_expected_return_itself(market: SyntheticMarket) -> None:
    truth, target = expected_and_realised(market)
    centred = target - np.nanmean(target, axis=1, keepdims=True)
    known = np.isfinite(truth + centred)
    slope = np.polyfit(truth[known], centred[known], 1)[0]
    assert slope == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("hard", [False, True])
def test_longer_market_begins_with_the_shorter_one(hard: bool) -> None:
    short = generate_market(stocks=40, sessions=90, seed=5, hard=hard)
    long = generate_market(stocks=40, sessions=140, seed=5, hard=hard)
    last = short.tables["index"]["Date"].max()
    for name, day in {"prices": "Date", "index": "Date", "listed": "Date", "investor_flows": "PublishedDate"}.items():
        assert_frame_equal(long.tables[name].filter(pl.col(day) <= last), short.tables[name])
    assert_frame_equal(
        long.tables["statements"].filter(pl.col("DisclosedDate") <= str(last)), short.tables["statements"]
    )
    assert_frame_equal(long.truth.filter(pl.col("Date") <= last), short.truth)


def test_seed_decides_the_market() -> None:
    one, again, other = (generate_market(stocks=20, sessions=30, seed=s) for s in (1, 1, 2))
    assert_frame_equal(one.tables["prices"], again.tables["prices"])
    assert not one.tables["prices"].equals(other.tables["prices"])


def test_prices_are_those_an_exchange_could_print(market: SyntheticMarket) -> None:
    prices = market.tables["prices"]
    assert prices.filter(
        (pl.col("High") < pl.max_horizontal("Open", "Close")) | (pl.col("Low") > pl.min_horizontal("Open", "Close"))
    ).is_empty()
    assert prices.select("Date", "Code").is_duplicated().sum() == 0
    stocks = prices.join(market.truth.select("Date", "Code"), on=["Date", "Code"])
    median = stocks.group_by("Code").agg(pl.col("TurnoverValue").median())
    assert 0.75 < (median["TurnoverValue"] > 100e6).mean() < 0.95  # type: ignore[operator]


def test_split_divides_the_price_and_multiplies_the_volume() -> None:
    prices = generate_market(stocks=200, sessions=300, seed=1).tables["prices"].sort("Code", "Date")
    events = prices.with_columns(
        jump=pl.col("Open") / pl.col("Close").shift(1).over("Code"),
        volume=pl.col("Volume") / pl.col("Volume").rolling_mean(20).shift(1).over("Code"),
    ).filter(pl.col("AdjustmentFactor") < 1)
    assert events.height >= 3
    assert np.allclose(np.log(events["jump"] / events["AdjustmentFactor"]), 0, atol=0.15)
    assert (events["volume"] * events["AdjustmentFactor"]).median() == pytest.approx(1.0, abs=0.6)


def test_market_has_what_filters_and_joins_must_handle() -> None:
    market = generate_market(stocks=200, sessions=400, seed=0)
    prices, listed = market.tables["prices"], market.tables["listed"]
    spans = prices.group_by("Code").agg(first=pl.col("Date").min(), last=pl.col("Date").max(), rows=pl.len())
    first, last = prices["Date"].min(), prices["Date"].max()
    assert spans.filter(pl.col("first") > first).height >= 2, "listings"
    assert spans.filter(pl.col("last") < pl.lit(last) - pl.duration(days=30)).height >= 1, "delistings"
    assert spans["rows"].min() < 400, "sessions without a trade"  # type: ignore[operator]
    assert set(listed.filter(pl.col("MarketCode") == "0109")["Sector33Code"]) == {"9999"}
    assert any(code.endswith("5") for code in listed["Code"]), "a preferred share"
    sizes = listed.filter(pl.col("Date") == first, pl.col("Sector33Code") != "9999")["Sector33Code"].value_counts()
    assert sizes.height == 200 // 15
    assert sizes["count"].min() >= 5  # type: ignore[operator]


def test_peers_move_together_beyond_their_sector(market: SyntheticMarket) -> None:
    """Mean correlation of sector-demeaned returns: within a true group it is far above that of the sector's others."""
    listed = market.tables["listed"].unique("Code", keep="first").select("Code", "Sector33Code")
    returns = (
        market.tables["prices"]
        .join(listed, on="Code")
        .join(market.groups, on="Code")
        .filter(pl.len().over("Code") == 400)
        .sort("Code", "Date")
        .with_columns(r=pl.col("Close").log().diff().over("Code") - pl.col("AdjustmentFactor").log())
        .with_columns(pl.col("r") - pl.col("r").mean().over("Date", "Sector33Code"))
    )
    wide = returns.pivot(on="Code", index="Date", values="r").drop("Date").drop_nulls()
    correlation = np.corrcoef(wide.to_numpy().T)
    keys = pl.DataFrame({"Code": wide.columns}).join(market.groups, on="Code", maintain_order="left")
    sectors = keys.join(listed, on="Code", maintain_order="left")["Sector33Code"].to_numpy()
    peers = np.equal.outer(keys["group"].to_numpy(), keys["group"].to_numpy())
    sector = np.equal.outer(sectors, sectors)
    np.fill_diagonal(sector, False)
    assert correlation[peers & sector].mean() > correlation[~peers & sector].mean() + 0.3


def test_releases_reach_back_before_the_first_session() -> None:
    market = generate_market(stocks=10, sessions=30, seed=0)
    first = market.tables["prices"]["Date"].min()
    assert isinstance(first, dt.date)
    statements, flows = market.tables["statements"], market.tables["investor_flows"]
    before = statements.filter(pl.col("DisclosedDate") < str(first)).group_by("LocalCode").len()
    assert before.height == 10
    assert before["len"].min() >= 5  # type: ignore[operator]
    assert flows.filter(pl.col("PublishedDate") < first)["PublishedDate"].n_unique() >= 60
    assert set(flows["PublishedDate"].dt.weekday()) == {4}
    assert (flows["TotalSales"] - flows["TotalPurchases"]).abs().max() <= 2  # type: ignore[operator]
    assert statements.filter(pl.col("TypeOfCurrentPeriod") == "FY")["ForecastProfit"].unique().to_list() == [""]


def test_write_market_leaves_six_tables(tmp_path) -> None:  # type: ignore[no-untyped-def]
    summary = write_market(tmp_path / "market", stocks=6, sessions=25, seed=1)
    names = {path.stem for path in (tmp_path / "market").iterdir()}
    assert names == {"prices", "listed", "index", "investor_flows", "statements", "truth"}
    assert summary["rows"]["index"] == 25


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="at least 2 sessions"):
        generate_market(stocks=10, sessions=1)
