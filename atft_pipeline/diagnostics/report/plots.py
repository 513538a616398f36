"""The plots of a report, as PNG bytes. They are drawn off-screen, without pyplot's global state."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import partial

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from atft_pipeline.diagnostics.topics.curves import loss_curve
from atft_pipeline.diagnostics.topics.learning_rate import planned_lr
from atft_pipeline.inspection.reader import Record

INTERVAL_SE = 1.96
SIZE_INCHES = (7.2, 3.2)
DPI = 110
LEFT_INCHES, LEGEND_INCHES, TITLE_INCHES, BELOW_INCHES = 1.3, 1.95, 0.45, 0.52


def draw(record: Record) -> dict[str, bytes]:
    """Title -> PNG of each plot for which the record has figures, in the order of the report."""
    return pictures({title: partial(by_epoch, plot, record) for title, plot in PLOTS.items()})


def by_epoch(plot: Callable[[Record, Axes], bool], record: Record, axes: Axes) -> bool:
    """`plot` of a run, its epochs along the x axis."""
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return plot(record, axes)


def pictures(plots: Mapping[str, Callable[[Axes], bool]]) -> dict[str, bytes]:
    """Title -> PNG of each plot that has something to draw."""
    drawn_plots = {}
    for title, plot in plots.items():
        drawn = figure(title, plot)
        if drawn is not None:
            buffer = io.BytesIO()
            FigureCanvasAgg(drawn).print_png(buffer)
            drawn_plots[title] = buffer.getvalue()
    return drawn_plots


def figure(title: str, plot: Callable[[Axes], bool]) -> Figure | None:
    """What `plot` draws, with the legend beside it; None where there is nothing to draw.

    Margins and title have fixed positions. To compute them, matplotlib would measure every label, which takes longer
    than drawing.
    """
    drawn = Figure(figsize=SIZE_INCHES, dpi=DPI)
    axes = drawn.add_subplot()
    if not plot(axes):
        return None
    axes.set_title(title, loc="left", fontsize=11, y=1.0, pad=16)  # above the factor that an axis writes over its ticks
    axes.grid(alpha=0.3)
    right = 0.2
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        right = LEGEND_INCHES
    width, height = drawn.get_size_inches()
    drawn.subplots_adjust(LEFT_INCHES / width, BELOW_INCHES / height, 1 - right / width, 1 - TITLE_INCHES / height)
    return drawn


def _losses(record: Record, axes: Axes) -> bool:
    curves = {split: loss_curve(record, split) for split in ("train", "validation")}
    for split, curve in curves.items():
        if curve:
            axes.plot(list(curve), list(curve.values()), marker=".", label=split)
    axes.set_ylabel("weighted loss")
    return any(curves.values())


def _learning_rate(record: Record, axes: Axes) -> bool:
    curve, plan = record.curve("lr"), planned_lr(record)
    if plan:
        axes.plot(list(plan), list(plan.values()), color="grey", linewidth=4, alpha=0.4, label="planned")
    axes.plot(list(curve), list(curve.values()), marker=".", label="recorded")
    if curve and min(curve.values()) > 0:
        axes.set_yscale("log")
    axes.axhline(1e-5, color="tab:red", linewidth=0.8, linestyle=":", label="1e-5")
    axes.set_ylabel("learning rate")
    return bool(curve)


def _gradients(record: Record, axes: Axes) -> bool:
    components = record.components("grad_l2")
    positive = False
    for name in components:
        curve = {epoch: value for epoch, value in record.curve("grad_l2", component=name).items() if value > 0}
        axes.plot(list(curve), list(curve.values()), marker=".", label=name if curve else f"{name} (0)")
        positive |= bool(curve)
    if positive:
        axes.set_yscale("log")
    axes.set_ylabel("gradient l2")
    return bool(components)


def _sharpe(record: Record, axes: Axes) -> bool:
    values = record.evaluation("sharpe_daily")
    if not values:
        return False
    recorded_errors = record.evaluation("sharpe_se")
    errors = [se if se is not None else recorded_errors.get(e, (0.0, None))[0] for e, (_, se) in values.items()]
    sharpes = [value for value, _ in values.values()]
    axes.errorbar(
        list(values), sharpes, yerr=[INTERVAL_SE * se for se in errors], marker="o", markersize=3, capsize=2,
        linewidth=1, label=f"validation, {record.slice}\n± {INTERVAL_SE} se",
    )  # fmt: skip
    axes.axhline(
        record.criterion_sharpe,
        color="tab:red",
        linestyle="--",
        linewidth=1,
        label=f"criterion {record.criterion_sharpe:g}",
    )
    axes.set_ylabel("daily Sharpe, gross")
    return True


def _information_coefficient(record: Record, axes: Axes) -> bool:
    curves = {"IC": record.evaluation("ic_mean"), "RankIC": record.evaluation("rank_ic_mean")}
    for name, values in curves.items():
        if values:
            axes.plot(list(values), [value for value, _ in values.values()], marker=".", label=name)
    axes.axhline(0.0, color="grey", linewidth=0.8)
    axes.set_ylabel(f"mean, validation, {record.slice}")
    return any(curves.values())


PLOTS: dict[str, Callable[[Record, Axes], bool]] = {
    "Losses": _losses,
    "Sharpe by epoch": _sharpe,
    "IC and RankIC": _information_coefficient,
    "Learning rate": _learning_rate,
    "Gradient l2 by component": _gradients,
}
