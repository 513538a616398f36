"""Pictures of an evaluation as markdown with the PNG inside, which the Dagster UI shows in place."""

import base64
import io
from typing import Any

import dagster as dg
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def embedded(title: str, png: bytes) -> dg.MarkdownMetadataValue:
    """A PNG as metadata of an asset."""
    return dg.MetadataValue.md(f"![{title}](data:image/png;base64,{base64.b64encode(png).decode()})")


def cumulative_return(daily: dict[str, list[dict[str, Any]]]) -> bytes:
    """Summed daily long-short returns, gross and net of costs, of each split; days without a portfolio earn 0."""
    figure = Figure(figsize=(8, 3.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for (split, rows), colour in zip(daily.items(), ("tab:blue", "tab:orange"), strict=False):
        dates = [row["date"] for row in rows]
        for kind, style in (("gross", "-"), ("net", "--")):
            earned = np.nan_to_num(np.array([row[kind] for row in rows], dtype=float)).cumsum()
            axes.plot(dates, 100 * earned, style, color=colour, linewidth=1.2, label=f"{split}, {kind}")
    axes.axhline(0.0, color="grey", linewidth=0.8)
    axes.set_ylabel("% of one side's capital, summed")
    axes.set_title("Long-short return of the last epoch", loc="left", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.autofmt_xdate()
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
