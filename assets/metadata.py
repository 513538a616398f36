"""How errors, checks and figures of the library appear in Dagster: one sentence on failure, numbers as numbers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import dagster as dg

from atft_pipeline.errors import InputError, RunFailure


@contextmanager
def as_dagster_failure(
    context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext | dg.OpExecutionContext,
) -> Iterator[None]:
    """Turns the library's errors into a Dagster failure whose description is their sentence; never retried."""
    try:
        yield
    except (InputError, RunFailure) as error:
        context.log.error(str(error))
        raise dg.Failure(description=str(error), allow_retries=False) from None


def check_result(
    context: dg.AssetExecutionContext,
    check_name: str,
    problems: Sequence[str],
    otherwise: str,
    metadata: Mapping[str, dg.MetadataValue] | None = None,
) -> dg.AssetCheckResult:
    """A check that fails with `problems` as its description, or passes with `otherwise`.

    The problems are logged too: Dagster's own error of a failed blocking check names the check and not the reason.
    """
    for problem in problems:
        context.log.error(problem)
    return dg.AssetCheckResult(
        passed=not problems,
        check_name=check_name,
        description="; ".join(problems) or otherwise,
        metadata=metadata,
    )


def numeric_metadata(figures: Mapping[str, float | int | None]) -> dict[str, dg.MetadataValue]:
    """Figures as metadata that the UI plots; a missing one is left out, as zero would be a figure."""
    metadata: dict[str, dg.MetadataValue] = {}
    for name, value in figures.items():
        if isinstance(value, bool) or value is None or not math.isfinite(value):
            continue
        metadata[name] = dg.MetadataValue.int(value) if isinstance(value, int) else dg.MetadataValue.float(float(value))
    return metadata


def markdown_table(rows: list[dict[str, Any]]) -> dg.MarkdownMetadataValue:
    """Rows with equal keys as a markdown table."""
    if not rows:
        return dg.MetadataValue.md("_no rows_")
    header = list(rows[0])
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(_cell(row[name]) for name in header) + " |" for row in rows]
    return dg.MetadataValue.md("\n".join(lines))


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
