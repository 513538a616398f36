"""Costs, periods, capacity and exposures compared with slow loops, and with the files of a tiny market's run."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from atft_process import DATASET_SETTINGS, GRAPH_SETTINGS, TRAIN_SETTINGS, atft_here
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

from atft_pipeline.config.schema import EvaluationConfig
from atft_pipeline.dataset.layout import read_membership
from atft_pipeline.diagnostics.diagnose import attributions, diagnose, write_report
from atft_pipeline.diagnostics.report.attribution_plots import ATTRIBUTION_PLOTS, draw_attributions
from atft_pipeline.diagnostics.report.attribution_tables import attribution_tables, money, not_assessable
from atft_pipeline.diagnostics.report.plots import PLOTS, by_epoch, figure
from atft_pipeline.diagnostics.report.sections import to_markdown
from atft_pipeline.errors import InputError
from atft_pipeline.evaluation.portfolio import Book, long_short, long_short_book
from atft_pipeline.evaluation.predictions_table import ScorePanel
from atft_pipeline.inspection.attribution import (
    Attribution,
    Capacity,
    MarketExposure,
    Missing,
    SectorExposure,
    SizeTilt,
    Surroundings,
    attribute,
    capacity,
    market_exposure,
    sector_exposure,
    sharpe_after_costs,
    sharpe_by_period,
    size_tilt,
    trailing_median,
)
from atft_pipeline.inspection.attribution_inputs import _Context, attribute_predictions
from atft_pipeline.inspection.reader import open_record
from atft_pipeline.market.market_facts import market_facts
from atft_pipeline.storage.artifact import manifest_path, read_artifact, read_manifest

NAN = np.nan
T, N, QUANTILE = 60, 23, 0.2
CLOSE = {"rtol": 1e-12, "atol": 1e-15}
"""Both sides are float64 sums of a few dozen terms in another order."""


@pytest.fixture(scope="module")
def panel() -> ScorePanel:
    """Random scores and returns with holes; session 7 has too few stocks for a portfolio."""
    rng = np.random.default_rng(5)
    scores, targets = rng.normal(size=(T, N)), 0.02 * rng.normal(size=(T, N))
    targets[rng.random((T, N)) < 0.1] = NAN
    targets[7, 4:] = NAN
    sessions = np.busday_offset("2023-11-20", np.arange(T), roll="forward").astype("datetime64[D]")
    return ScorePanel(sessions, np.array([f"{1000 + n}" for n in range(N)]), scores, targets)


@pytest.fixture(scope="module")
def book(panel: ScorePanel) -> Book:
    return long_short_book(panel.scores, panel.targets, quantile=QUANTILE)


@pytest.fixture(scope="module")
def turnover() -> np.ndarray:
    """Median turnover values, many of them equal, some unknown."""
    rng = np.random.default_rng(6)
    values = np.round(np.exp(rng.normal(3.0, 1.0, size=(T, N)))) * 1e6
    values[rng.random((T, N)) < 0.1] = NAN
    return values


# --- reference ---------------------------------------------------------------------------------------------------


def test_the_book_is_what_the_portfolio_s_figures_are_of(panel: ScorePanel, book: Book) -> None:
    figures = long_short(panel.scores, panel.targets, quantile=QUANTILE, cost_bps=10.0)
    held = np.isfinite(figures.gross)
    assert not held[7]
    assert not book.weights[7].any()
    assert not book.trades[7].any()
    np.testing.assert_array_equal(np.abs(book.trades[held]).sum(axis=1), figures.turnover[held])
    earned = (book.weights * np.nan_to_num(panel.targets)).sum(axis=1)
    np.testing.assert_allclose(earned[held], figures.gross[held], **CLOSE)


def test_net_sharpe_is_that_of_returns_less_costs(panel: ScorePanel) -> None:
    figures = long_short(panel.scores, panel.targets, quantile=QUANTILE, cost_bps=0.0)
    found = sharpe_after_costs(figures.gross, figures.turnover)
    assert list(found) == [0.0, 5.0, 10.0]
    for bps, estimate in found.items():
        net = [g - bps / 10_000 * t for g, t in zip(figures.gross, figures.turnover, strict=True) if g == g]
        assert estimate.value == pytest.approx(statistics.fmean(net) / statistics.stdev(net), rel=1e-12)
        assert estimate.sessions == len(net) == T - 1
        assert 0.1 < estimate.se < 0.2, "1 / sqrt(59) is 0.13"
    same = long_short(panel.scores, panel.targets, quantile=QUANTILE, cost_bps=5.0).net
    held = same[np.isfinite(same)]
    assert found[5.0].value == pytest.approx(held.mean() / held.std(ddof=1), rel=1e-12)


@pytest.mark.parametrize(("unit", "length"), [("Y", 4), ("M", 7)])
def test_periods_are_calendar_years_and_months_of_the_sessions(unit: Any, length: int, panel: ScorePanel) -> None:
    gross = long_short(panel.scores, panel.targets, quantile=QUANTILE, cost_bps=0.0).gross
    by_label: defaultdict[str, list[float]] = defaultdict(list)
    for session, value in zip(panel.sessions, gross, strict=True):
        if value == value:
            by_label[str(session)[:length]].append(value)
    found = sharpe_by_period(gross, panel.sessions, unit)
    assert list(found) == sorted(by_label)
    assert len(found) == {"Y": 2, "M": 4}[unit]
    for label, values in by_label.items():
        sharpe = statistics.fmean(values) / statistics.stdev(values)
        assert found[label].sessions == len(values)
        assert found[label].value == pytest.approx(sharpe, rel=1e-12)
        centred = [v - statistics.fmean(values) for v in values]
        variance = statistics.fmean(c**2 for c in centred)
        skew, kurtosis = (statistics.fmean(c**k for c in centred) / variance ** (k / 2) for k in (3, 4))
        error = math.sqrt((1 - skew * sharpe + (kurtosis - 1) / 4 * sharpe**2) / (len(values) - 1))
        assert found[label].se == pytest.approx(error, rel=1e-9)


def test_a_period_of_one_session_has_no_sharpe() -> None:
    sessions = np.array(["2024-01-31", "2024-02-01", "2024-02-02"], "datetime64[D]")
    found = sharpe_by_period(np.array([0.01, 0.01, -0.02]), sessions, "M")
    assert (found["2024-01"].sessions, found["2024-02"].sessions) == (1, 2)
    assert math.isnan(found["2024-01"].value)


@pytest.mark.parametrize("window", [1, 4, 20])
def test_the_trailing_median_leaves_untraded_sessions_out(window: int) -> None:
    rng = np.random.default_rng(2)
    values = np.where(rng.random((40, 6)) < 0.3, NAN, rng.integers(1, 9, (40, 6)).astype(float))
    found = trailing_median(values, window)
    for t in range(40):
        for n in range(6):
            seen = [v for v in values[max(0, t - window + 1) : t + 1, n] if v == v]
            if 3 * len(seen) >= 2 * window:
                assert found[t, n] == statistics.median(seen)
            else:
                assert math.isnan(found[t, n])


def test_the_trailing_median_ignores_later_sessions() -> None:
    values = np.random.default_rng(3).random((30, 4))
    later = values.copy()
    later[20:] = 99.0
    np.testing.assert_array_equal(trailing_median(values)[:20], trailing_median(later)[:20])


def test_capacity_is_of_the_names_that_enter_leave_or_reverse(panel: ScorePanel, turnover: np.ndarray) -> None:
    book = long_short_book(panel.scores, panel.targets, quantile=QUANTILE)
    shares: defaultdict[int, list[float]] = defaultdict(list)
    values: defaultdict[int, list[float]] = defaultdict(list)
    unknown, before = 0, np.zeros(N)
    for t in range(T):
        if not book.weights[t].any():
            continue
        names = []
        for n in range(N):
            kept = book.weights[t, n] * before[n] > 0
            if (book.weights[t, n] != 0 or before[n] != 0) and not kept:
                if math.isnan(turnover[t, n]):
                    unknown += 1
                else:
                    names.append((turnover[t, n], n))
        names.sort()
        for place, (value, n) in enumerate(names):
            bucket = place * 3 // len(names)
            shares[bucket].append(abs(book.weights[t, n] - before[n]) / value)
            values[bucket].append(value)
        returns = np.nan_to_num(panel.targets[t])
        before = book.weights[t] * (1 + returns) / (1 + book.weights[t] @ returns)
    found = capacity(book, turnover, buckets=3)
    assert isinstance(found, Capacity)
    assert found.unknown == unknown > 0
    assert [bucket.name for bucket in found.buckets] == ["1 of 3", "2 of 3", "3 of 3", "all"]
    for of in (shares, values):
        of[3] = [value for k in range(3) for value in of[k]]
    for k, bucket in enumerate(found.buckets):
        middle = statistics.median(shares[k])
        assert bucket.trades == len(shares[k])
        assert bucket.median_turnover_value == statistics.median(values[k])
        assert bucket.share_per_million == pytest.approx(1e6 * middle, rel=1e-12)
        assert bucket.capital_at[0.01] * middle == pytest.approx(0.01, rel=1e-12)
        assert bucket.capital_at[0.05] == pytest.approx(5 * bucket.capital_at[0.01], rel=1e-12)


def test_a_name_without_turnover_takes_no_capital(book: Book) -> None:
    found = capacity(book, np.zeros((T, N)))
    assert isinstance(found, Capacity)
    assert {capital for bucket in found.buckets for capital in bucket.capital_at.values()} == {0.0}
    assert isinstance(capacity(book, np.full((T, N), NAN)), Missing)


def test_the_size_tilt_is_the_difference_of_mean_ranks(book: Book, turnover: np.ndarray) -> None:
    tilts = []
    for t in range(T):
        known = [n for n in range(N) if book.ranked[t, n] and turnover[t, n] == turnover[t, n]]
        rank = {}
        for n in known:
            less = sum(turnover[t, m] < turnover[t, n] for m in known)
            equal = sum(turnover[t, m] == turnover[t, n] for m in known)
            rank[n] = (less + (equal - 1) / 2) / (len(known) - 1)
        legs = [[rank[n] for n in known if side * book.weights[t, n] > 0] for side in (1, -1)]
        if all(legs):
            tilts.append(statistics.fmean(legs[0]) - statistics.fmean(legs[1]))
    found = size_tilt(book, turnover)
    assert isinstance(found, SizeTilt)
    assert found.tilt.sessions == len(tilts) < T
    assert found.tilt.value == pytest.approx(statistics.fmean(tilts), rel=1e-12)
    assert found.tilt.se == pytest.approx(statistics.stdev(tilts) / math.sqrt(len(tilts)), rel=1e-12)
    assert isinstance(size_tilt(book, np.full((T, N), NAN)), Missing)


def test_a_portfolio_that_buys_the_most_traded_names_is_tilted_to_them() -> None:
    values = np.tile(np.arange(1.0, 11.0), (5, 1))
    found = size_tilt(long_short_book(values, np.zeros((5, 10)), quantile=0.2), values)
    assert isinstance(found, SizeTilt)
    assert found.tilt.value == pytest.approx(8 / 9), "ranks 8 and 9 of 9 against 0 and 1"


def test_beta_and_its_error_are_the_sandwich_of_least_squares() -> None:
    rng = np.random.default_rng(4)
    market = 0.01 * rng.normal(size=50)
    gross = 0.3 * market + np.abs(market) * rng.normal(size=50)
    market[3], gross[9] = NAN, NAN
    rows = [(m, g) for m, g in zip(market, gross, strict=True) if m == m and g == g]
    X, y = np.array([[1.0, m] for m, _ in rows]), np.array([g for _, g in rows])
    bread = np.linalg.inv(X.T @ X)
    coefficients = bread @ X.T @ y
    meat = sum(e**2 * np.outer(x, x) for x, e in zip(X, y - X @ coefficients, strict=True))
    error = math.sqrt((bread @ meat @ bread)[1, 1] * len(y) / (len(y) - 2))
    found = market_exposure(gross, market)
    assert isinstance(found, MarketExposure)
    assert found.beta.value == pytest.approx(coefficients[1], rel=1e-9)
    assert found.beta.se == pytest.approx(error, rel=1e-9)
    assert found.beta.sessions == 48
    assert found.correlation == pytest.approx(np.corrcoef(X[:, 1], y)[0, 1], rel=1e-9)
    for too_little in (np.where(np.arange(50) < 2, market, NAN), np.zeros(50)):
        assert isinstance(market_exposure(gross, too_little), Missing)


def test_sector_weights_are_long_minus_short(panel: ScorePanel, book: Book) -> None:
    names = ("0050", "1050", "2050", "never held")
    number = np.random.default_rng(8).integers(-1, 3, size=(T, N))
    net: defaultdict[str, dict[int, float]] = defaultdict(dict)
    held = [t for t in range(T) if book.weights[t].any()]
    for t in held:
        for n in range(N):
            name = names[number[t, n]] if number[t, n] >= 0 else "unknown"
            net[name][t] = net[name].get(t, 0.0) + book.weights[t, n]
    found = sector_exposure(book.weights, number, names, panel.sessions)
    assert isinstance(found, SectorExposure)
    assert {sector.name for sector in found.sectors} == {"0050", "1050", "2050", "unknown"}
    for sector in found.sectors:
        of = [net[sector.name].get(t, 0.0) for t in held]
        assert sector.mean_net == pytest.approx(statistics.fmean(of), abs=1e-15)
        assert sector.mean_absolute == pytest.approx(statistics.fmean(map(abs, of)), rel=1e-12)
        assert abs(sector.largest) == pytest.approx(max(map(abs, of)), rel=1e-12)
        at = int(np.flatnonzero(panel.sessions == np.datetime64(sector.largest_on))[0])
        assert net[sector.name][at] == pytest.approx(sector.largest, rel=1e-12)
    order = [sector.mean_absolute for sector in found.sectors]
    assert order == sorted(order, reverse=True)
    assert found.mean_absolute == pytest.approx(statistics.fmean(order), rel=1e-12)
    assert abs(found.largest.largest) == max(abs(sector.largest) for sector in found.sectors)
    assert isinstance(sector_exposure(book.weights, np.full((T, N), -1), names, panel.sessions), Missing)
    assert isinstance(sector_exposure(np.zeros((T, N)), number, names, panel.sessions), Missing)


# --- missing inputs ----------------------------------------------------------------------------------------------


def test_a_missing_input_is_named_and_everything_else_stands(panel: ScorePanel) -> None:
    around = Surroundings(Missing("no market"), Missing("no sectors"), (), Missing("no turnover"))
    found = attribute(panel, around, EvaluationConfig(universe="all"))
    assert (found.market, found.sectors) == (Missing("no market"), Missing("no sectors"))
    assert found.capacity == found.size == Missing("no turnover")
    assert found.costs[0.0].sessions == T - 1
    plain = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert plain["capacity"] == {"not_assessable": "no turnover"}
    both = {"validation": found, "test": Missing("no rows")}
    assert not_assessable(both) == [
        "market (validation): no market",
        "sectors (validation): no sectors",
        "size (validation), capacity (validation): no turnover",
        "test: no rows",
    ]
    tables = attribution_tables(both)
    assert {row["validation"] for row in tables["Exposures"]} == {"not assessable"}
    assert {row["test"] for rows in tables.values() for row in rows} == {"not assessable"}
    assert tables["Capacity by liquidity"] == []
    assert list(draw_attributions(both)) == ["Sharpe after costs", "Sharpe by month and year"]
    assert draw_attributions({"validation": Missing("nothing")}) == {}


def test_scores_that_cannot_be_ranked_have_no_attribution(panel: ScorePanel) -> None:
    flat = ScorePanel(panel.sessions, panel.codes, np.zeros((T, N)), panel.targets)
    with pytest.raises(InputError, match="scores are constant"):
        attribute(flat, Surroundings(Missing(""), Missing(""), (), Missing("")), EvaluationConfig())


def test_money_is_read_at_a_glance() -> None:
    shown = [money(amount) for amount in (0.0, 12.34, 1_234.0, 31_234_567.0, 2.5e9, 7e12)]
    assert shown == ["0", "12.3", "1.23 thousand", "31.2 million", "2.5 billion", "7 trillion"]


# --- a run on disk -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny market's dataset in monthly parts, its prices, and a run of two epochs."""
    folder = tmp_path_factory.mktemp("attributed")
    assert atft_here("market", folder / "source", "--stocks", 40, "--sessions", 330, "--seed", 3) == 0
    assert atft_here("features", folder / "source", folder / "data", *DATASET_SETTINGS) == 0
    assert atft_here("graph", folder / "data", folder / "graph", *GRAPH_SETTINGS) == 0
    settings = (*TRAIN_SETTINGS, "--set", "evaluation.criterion_sharpe=-99")
    assert atft_here("train", folder / "data", folder / "graph", folder / "run", *settings) == 0
    return folder


def found_in(folder: Path, dataset: str = "data", fingerprint: str | None = None) -> dict[str, Attribution | Missing]:
    manifest = read_manifest(folder / "data")
    return attribute_predictions(
        folder / "run" / "predictions" / "epoch_002.parquet",
        EvaluationConfig(universe="all"),
        dataset=folder / dataset,
        dataset_fingerprint=fingerprint or manifest["fingerprint"],
    )


def test_a_run_s_figures_are_those_it_recorded(run: Path) -> None:
    found = found_in(run)
    evals = pq.read_table(run / "run" / "evals" / "epoch_002.parquet").to_pylist()
    for split, attribution in found.items():
        assert isinstance(attribution, Attribution)
        recorded = {row["metric"]: row for row in evals if (row["split"], row["slice"]) == (split, "all")}
        assert attribution.costs[0.0].value == pytest.approx(recorded["sharpe_daily"]["value"], rel=1e-6)
        assert attribution.costs[10.0].value == pytest.approx(recorded["sharpe_daily_net"]["value"], rel=1e-6)
        assert attribution.turnover.value == pytest.approx(recorded["turnover_mean"]["value"], rel=1e-6)
        assert attribution.costs[0.0].sessions == recorded["sessions"]["value"]
        assert sum(month.sessions for month in attribution.by_month.values()) == recorded["sessions"]["value"]
        for part in ("market", "sectors", "size", "capacity"):
            assert not isinstance(getattr(attribution, part), Missing), part


def test_the_turnover_value_is_the_one_that_decides_who_is_liquid(run: Path) -> None:
    manifest = read_manifest(run / "data")
    member = read_membership(run / "data")
    sessions = np.unique(member["Date"].to_numpy().astype("datetime64[D]"))
    codes = np.unique(np.array(member["Code"].to_pylist()))
    around = _Context(run / "data", manifest["fingerprint"]).around(sessions, codes)
    assert not isinstance(around.median_turnover, Missing)
    rows = member.to_pylist()
    t = np.searchsorted(sessions, np.array([row["Date"] for row in rows], "datetime64[D]"))
    n = np.searchsorted(codes, np.array([row["Code"] for row in rows]))
    reaches = around.median_turnover[t, n] >= market_facts(manifest["market"]).turnover_floor
    investable, liquid = (np.array([row[name] for row in rows]) for name in ("is_investable", "is_liquid"))
    assert liquid.any()
    assert (investable & ~liquid).any()
    np.testing.assert_array_equal(reaches & investable, liquid)


def test_the_market_is_the_mean_target_of_the_investable(run: Path) -> None:
    manifest, member = read_manifest(run / "data"), read_membership(run / "data").to_pylist()
    targets = read_artifact(run / "data", ["target_1d"]).column("target_1d").to_pylist()
    sessions = np.unique(np.array([row["Date"] for row in member], "datetime64[D]"))[100:200]
    codes = np.unique([row["Code"] for row in member])[:5]
    around = _Context(run / "data", manifest["fingerprint"]).around(sessions, codes)
    assert not isinstance(around.market, Missing)
    assert not isinstance(around.sector, Missing)
    returns: defaultdict[np.datetime64, list[float]] = defaultdict(list)
    for row, target in zip(member, targets, strict=True):
        day = np.datetime64(row["Date"])
        if row["is_investable"] and target is not None:
            returns[day].append(target)
        if row["Code"] in codes and day in sessions:
            number = around.sector[np.searchsorted(sessions, day), np.searchsorted(codes, row["Code"])]
            assert around.sector_names[number] == row["Sector33Code"]
    expected = [statistics.fmean(returns[day]) for day in sessions]
    assert max(len(returns[day]) for day in sessions) > 5, "stocks that were not scored count too"
    np.testing.assert_allclose(around.market, expected, rtol=1e-6)  # float32 targets


def test_without_its_prices_a_dataset_says_nothing_of_turnover(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    manifest_path(folder / "data.prices").unlink()
    for attribution in found_in(folder).values():
        assert isinstance(attribution, Attribution)
        assert isinstance(attribution.capacity, Missing)
        assert "no readable prices" in attribution.capacity.reason
        assert attribution.size == attribution.capacity
        assert isinstance(attribution.market, MarketExposure)
        assert isinstance(attribution.sectors, SectorExposure)


def test_prices_of_another_dataset_are_not_used(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    file = manifest_path(folder / "data.prices")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fingerprint": "another"}))
    attribution = found_in(folder)["test"]
    assert isinstance(attribution, Attribution)
    assert isinstance(attribution.capacity, Missing)


def test_a_dataset_in_one_file_says_that_it_keeps_no_prices(run: Path) -> None:
    assert atft_here("features", run / "source", run / "one.parquet", *DATASET_SETTINGS) == 0
    fingerprint = read_manifest(run / "one.parquet")["fingerprint"]
    attribution = found_in(run, "one.parquet", fingerprint)["test"]
    assert isinstance(attribution, Attribution)
    assert isinstance(attribution.capacity, Missing)
    assert "one file and keeps no prices" in attribution.capacity.reason
    assert isinstance(attribution.market, MarketExposure)


@pytest.mark.parametrize(
    ("dataset", "fingerprint", "reason"),
    [("gone", None, "no manifest"), ("data", "f" * 16, "the run was made on ffffffffffff")],
)
def test_exposures_need_the_dataset_the_run_was_made_on(
    dataset: str, fingerprint: str | None, reason: str, run: Path
) -> None:
    for attribution in found_in(run, dataset, fingerprint).values():
        assert isinstance(attribution, Attribution)
        for part in (attribution.market, attribution.sectors, attribution.size, attribution.capacity):
            assert isinstance(part, Missing)
            assert reason in part.reason
        assert attribution.costs[0.0].sessions > 0


def test_predictions_of_one_split_say_what_the_other_lacks(run: Path, tmp_path: Path) -> None:
    table = pq.read_table(run / "run" / "predictions" / "epoch_002.parquet")
    kept = table.filter(pc.equal(table["split"], "validation"))
    pq.write_table(kept, tmp_path / "p.parquet")
    found = attribute_predictions(
        tmp_path / "p.parquet", EvaluationConfig(universe="all"), dataset=run / "data", dataset_fingerprint=None
    )
    assert isinstance(found["validation"], Attribution)
    assert isinstance(found["test"], Missing)
    assert "no row of split 'test'" in found["test"].reason


def test_the_report_shows_tables_and_plots(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    diagnosis = diagnose(Path("run"))
    paths = write_report(Path("run"), diagnosis)
    text, page = paths.markdown.read_text(), paths.html.read_text()
    for title in attribution_tables(diagnosis.attributions):
        assert f"### {title}" in text
        assert f"<h3>{title}</h3>" in page
    for title in ATTRIBUTION_PLOTS:
        assert f'<img alt="{title}" src="data:image/png;base64,' in page
    assert "daily Sharpe, net of 5 bps" in text
    content = json.loads(json.dumps(diagnosis.to_dict(), allow_nan=False))
    assert content["attribution"]["test"]["costs"]["10.0"]["sessions"] > 0
    assert "by_session" not in content["attribution"]["test"]["size"]


def axes_of_every_plot(run_dir: Path) -> Iterator[Callable[[Axes], bool]]:
    record = open_record(run_dir)
    known = {split: found for split, found in attributions(record).items() if isinstance(found, Attribution)}
    yield from (partial(by_epoch, plot, record) for plot in PLOTS.values())
    yield from (partial(plot, known) for plot in ATTRIBUTION_PLOTS.values())


def test_no_label_of_a_plot_is_cut_off_or_over_another(run: Path) -> None:
    figures = [drawn for plot in axes_of_every_plot(run / "run") if (drawn := figure("A title", plot)) is not None]
    assert len(figures) == len(PLOTS) + len(ATTRIBUTION_PLOTS)
    for drawn in figures:
        canvas = FigureCanvasAgg(drawn)
        canvas.draw()
        (axes,) = drawn.axes
        texts = [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, axes.yaxis.get_offset_text()]
        texts += [tick.label1 for axis in (axes.xaxis, axes.yaxis) for tick in axis._update_ticks()]
        legend = axes.get_legend()
        boxes = [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]
        boxes += [] if legend is None else [legend.get_window_extent()]
        for box in boxes:
            assert drawn.bbox.containsx(box.x0)
            assert drawn.bbox.containsx(box.x1)
            assert drawn.bbox.containsy(box.y0)
            assert drawn.bbox.containsy(box.y1)
        unit = axes.yaxis.get_offset_text()
        assert not unit.get_text() or axes._left_title.get_window_extent().y0 >= unit.get_window_extent().y1


def test_a_run_without_predictions_is_not_assessable(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "run", tmp_path / "bare", ignore=shutil.ignore_patterns("predictions"))
    text = to_markdown(diagnose(tmp_path / "bare"))
    assert "- validation, test: the run has no readable predictions" in text


def test_the_window_reaches_back_before_the_scored_sessions(run: Path) -> None:
    context = _Context(run / "data", read_manifest(run / "data")["fingerprint"])
    sessions = np.unique(context.members["Date"].to_numpy().astype("datetime64[D]"))
    codes = np.unique(np.array(context.members["Code"].to_pylist()))
    whole, late = (context.around(days, codes).median_turnover for days in (sessions, sessions[100:]))
    assert not isinstance(whole, Missing)
    assert not isinstance(late, Missing)
    assert np.isfinite(late[0]).any()
    np.testing.assert_array_equal(late, whole[100:])


def test_stocks_that_are_not_investable_are_not_the_market(run: Path) -> None:
    context = _Context(run / "data", read_manifest(run / "data")["fingerprint"])
    target = np.array([math.nan if v is None else v for v in context.members["target_1d"].to_pylist()])
    chosen = np.arange(len(target)) % 3 == 0
    place = context.members.column_names.index("is_investable")
    context.members = context.members.set_column(place, "is_investable", [chosen])
    day = context.members["Date"].to_numpy().astype("datetime64[D]")
    sessions = np.unique(day)[150:160]
    expected = [target[(day == one) & chosen & np.isfinite(target)].mean() for one in sessions]
    market = context.around(sessions, np.array(["1000"])).market
    assert not isinstance(market, Missing)
    np.testing.assert_allclose(market, expected, rtol=1e-6)  # float32 targets
