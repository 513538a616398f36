"""Costs, periods, capacity and exposures as plots: PNG bytes, as in plots.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from atft_pipeline.diagnostics.report.attribution_tables import money
from atft_pipeline.diagnostics.report.plots import INTERVAL_SE, SIZE_INCHES, pictures
from atft_pipeline.inspection.attribution import (
    PARTICIPATIONS,
    Attribution,
    Capacity,
    Days,
    Estimate,
    MarketExposure,
    Missing,
    SectorExposure,
    SizeTilt,
)

Attributions = Mapping[str, Attribution]

COLOURS = ("tab:blue", "tab:orange")
SECTOR_INCHES = 0.24
"""Height of a sector's pair of bars."""


def draw_attributions(attributions: Mapping[str, Attribution | Missing]) -> dict[str, bytes]:
    """Title -> PNG of each plot for which at least one split has inputs."""
    assessed = {split: a for split, a in attributions.items() if isinstance(a, Attribution)}
    if not assessed:
        return {}
    return pictures({title: partial(plot, assessed) for title, plot in ATTRIBUTION_PLOTS.items()})


def _costs(attributions: Attributions, axes: Axes) -> bool:
    for number, (split, a) in enumerate(attributions.items()):
        costs = {bps: sharpe for bps, sharpe in a.costs.items() if math.isfinite(sharpe.value)}
        axes.errorbar(
            [bps + 0.15 * number for bps in costs], [sharpe.value for sharpe in costs.values()],
            yerr=[INTERVAL_SE * sharpe.se for sharpe in costs.values()], color=COLOURS[number % 2], marker="o",
            markersize=4, capsize=3, linewidth=1, label=f"{split} ± {INTERVAL_SE} se\nturnover {a.turnover.value:.2f}",
        )  # fmt: skip
    axes.axhline(0.0, color="grey", linewidth=0.8)
    axes.set_xticks(sorted({bps for a in attributions.values() for bps in a.costs}))
    axes.set_xlabel("cost of a unit of turnover, bps (0: gross)")
    axes.set_ylabel("daily Sharpe")
    return any(math.isfinite(sharpe.value) for a in attributions.values() for sharpe in a.costs.values())


def _periods(attributions: Attributions, axes: Axes) -> bool:
    """Months as points with one standard error, each year as a line over its sessions with a 95 % band."""
    drawn = False
    for number, (split, a) in enumerate(attributions.items()):
        colour = COLOURS[number % 2]
        months = {name: sharpe for name, sharpe in a.by_month.items() if math.isfinite(sharpe.value)}
        middles = [_middle(a.sessions, np.datetime64(name)) for name in months]
        axes.errorbar(
            middles, [sharpe.value for sharpe in months.values()], yerr=[sharpe.se for sharpe in months.values()],
            color=colour, marker="o", markersize=3, linestyle="none", elinewidth=0.8, alpha=0.7,
            label=f"{split}, month ± se",
        )  # fmt: skip
        shown = False
        for year, sharpe in a.by_year.items():
            of_period = a.sessions[a.sessions.astype("datetime64[Y]") == np.datetime64(year)]
            if not math.isfinite(sharpe.value):
                continue
            ends, reach = [of_period[0], of_period[-1]], INTERVAL_SE * sharpe.se
            label = None if shown else f"{split}, year ± {INTERVAL_SE} se"
            axes.plot(ends, [sharpe.value] * 2, color=colour, linewidth=2, label=label)
            axes.fill_between(ends, sharpe.value - reach, sharpe.value + reach, color=colour, alpha=0.15, linewidth=0)
            shown = True
        drawn |= shown or bool(months)
    axes.axhline(0.0, color="grey", linewidth=0.8)
    _dates(axes)
    axes.set_ylabel("daily Sharpe, gross")
    return drawn


def _capacity(attributions: Attributions, axes: Axes) -> bool:
    names: list[str] = []
    for number, (split, a) in enumerate(attributions.items()):
        if not isinstance(a.capacity, Capacity):
            continue
        names = names or [bucket.name for bucket in a.capacity.buckets]
        for participation, marker in zip(PARTICIPATIONS, ("o", "^"), strict=True):
            capital = {
                b.name: b.capital_at[participation] for b in a.capacity.buckets if b.capital_at[participation] > 0
            }
            axes.plot(
                [names.index(name) + 0.12 * (number - 0.5) for name in capital if name in names],
                [amount for name, amount in capital.items() if name in names],
                marker, color=COLOURS[number % 2], markersize=5, label=f"{split}, {100 * participation:g} %",
            )  # fmt: skip
    if not names:
        return False
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda amount, _: money(amount)))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("traded names by turnover value, least liquid fifth first")
    axes.set_ylabel("capital of one leg at which the median\ntrade is this share of daily turnover", fontsize=8)
    return True


def _market(attributions: Attributions, axes: Axes) -> bool:
    drawn = False
    for number, (split, a) in enumerate(attributions.items()):
        if not isinstance(a.market, MarketExposure):
            continue
        market, colour, beta = 100 * a.market.market, COLOURS[number % 2], a.market.beta
        axes.plot(market, 100 * a.gross, ".", color=colour, markersize=3, alpha=0.5)
        both = np.isfinite(a.gross) & np.isfinite(market)
        ends = np.array([market[both].min(), market[both].max()])
        middle = 100 * a.gross[both].mean() - beta.value * market[both].mean()
        label = f"{split}: beta {beta.value:+.3f}\n± {beta.se:.3f}, {beta.sessions} sessions"
        axes.plot(ends, middle + beta.value * ends, color=colour, linewidth=1.5, label=label)
        drawn = True
    axes.axhline(0.0, color="grey", linewidth=0.8)
    axes.set_xlabel("equal-weight market return, %")
    axes.set_ylabel("long-short return, %")
    return drawn


def _sectors(attributions: Attributions, axes: Axes) -> bool:
    """Mean absolute net weight as bars, mean net weight as dots, near 0 where long and short sessions cancel."""
    exposures = {split: a.sectors for split, a in attributions.items() if isinstance(a.sectors, SectorExposure)}
    names = list(dict.fromkeys(sector.name for exposure in exposures.values() for sector in exposure.sectors))
    if not names:
        return False
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    figure.set_size_inches(SIZE_INCHES[0], max(SIZE_INCHES[1], 1.2 + SECTOR_INCHES * len(names)))
    for number, (split, exposure) in enumerate(exposures.items()):
        rows = [names.index(sector.name) + 0.2 * (2 * number - len(exposures) + 1) for sector in exposure.sectors]
        colour = COLOURS[number % 2]
        absolute = [100 * sector.mean_absolute for sector in exposure.sectors]
        axes.barh(rows, absolute, 0.38, color=colour, alpha=0.4, label=f"{split}, mean absolute")
        net = [100 * sector.mean_net for sector in exposure.sectors]
        axes.plot(net, rows, "o", color=colour, markersize=3, label=f"{split}, mean net")
    axes.axvline(0.0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("net weight, % of one leg")
    axes.set_ylabel("sector")
    return True


def _size(attributions: Attributions, axes: Axes) -> bool:
    drawn = False
    for number, (split, a) in enumerate(attributions.items()):
        if not isinstance(a.size, SizeTilt):
            continue
        month = a.sessions.astype("datetime64[M]")
        measured = np.isfinite(a.size.by_session)
        months = np.unique(month[measured])
        means = [float(a.size.by_session[measured & (month == one)].mean()) for one in months]
        middles = [_middle(a.sessions, one) for one in months]
        label = f"{split}, month\nmean {_shown(a.size.tilt)}"
        axes.plot(middles, means, marker="o", markersize=3, linewidth=1, color=COLOURS[number % 2], label=label)
        drawn = True
    axes.axhline(0.0, color="grey", linewidth=0.8)
    _dates(axes)
    axes.set_ylabel("rank by turnover value (0 to 1),\nlong minus short", fontsize=8)
    return drawn


def _shown(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f} ± {estimate.se:.3f}" if math.isfinite(estimate.se) else f"{estimate.value:+.3f}"


def _middle(sessions: Days, month: np.datetime64) -> np.datetime64:
    """The middle of the split's sessions in the month: a split may begin or end within a month."""
    of_period = sessions[sessions.astype("datetime64[M]") == month]
    return np.datetime64(of_period[len(of_period) // 2])


def _dates(axes: Axes) -> None:
    locator = AutoDateLocator(maxticks=8)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))


ATTRIBUTION_PLOTS: dict[str, Callable[[Attributions, Axes], bool]] = {
    "Sharpe after costs": _costs,
    "Sharpe by month and year": _periods,
    "Capacity by liquidity": _capacity,
    "Market exposure": _market,
    "Size tilt": _size,
    "Net sector weights": _sectors,
}
