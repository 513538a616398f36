"""The dataset's files compared with its manifest, and its rows with a dataset that is built again from the source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from atft_pipeline.dataset.layout import read_membership
from atft_pipeline.diagnostics.probes.figures import Figures
from atft_pipeline.diagnostics.run_inputs import RunInputs
from atft_pipeline.storage.artifact import read_artifact

SIGNALS = (
    "parts_unlike_manifest", "features_know_later", "features_know_later_names", "rows_unlike_source",
    "targets_unlike_source",
)  # fmt: skip

RECOMPUTED_SESSIONS = 4
"""Sessions before the end of the validation whose features are computed again without any later data."""
VALUE_TOLERANCE = 1e-5
"""Relative tolerance: a feature is float32, and sums run over fewer sessions."""


def measure(inputs: RunInputs) -> Figures:
    """Compares the dataset's files with its manifest, and its rows with a dataset built again from the source.

    `parts_unlike_manifest`: months with another content than the manifest describes. The rows of the last validation
    sessions are computed without any later quote. `features_know_later`: features that differ then.
    `rows_unlike_source`: share of rows that only one of the two has. `targets_unlike_source`: share of the targets
    known by then that differ.
    """
    figures: Figures = {"parts_unlike_manifest": float(_unlike_manifest(inputs.dataset, inputs.manifest))}
    source = Path(inputs.manifest["source"]["path"])
    if not source.is_dir():
        return figures
    sessions = inputs.sessions[: inputs.split.validation[-1] + 1]
    made = _made_until(source, sessions[-1], inputs.config.dataset)
    return figures | _differences(inputs, made, sessions)


def _unlike_manifest(dataset: Path, manifest: dict[str, Any]) -> int:
    from atft_pipeline.dataset.rows import partition_record

    tables = read_artifact(dataset), read_membership(dataset)
    months = [np.datetime_as_string(table["Date"].to_numpy().astype("datetime64[M]")) for table in tables]

    def differs(name: str, described: dict[str, Any]) -> bool:
        features, members = (t.filter(pa.array(of == name)) for t, of in zip(tables, months, strict=True))
        return any(described.get(key) != value for key, value in partition_record(features, members).items())

    return sum(differs(name, part) for name, part in manifest["parts"].items() if part["rows"])


def _made_until(source: Path, last: np.datetime64, config: Any) -> pa.Table:
    """Features and targets of the source's rows up to the session `last`."""
    from atft_pipeline.dataset.rows import build_dataset
    from atft_pipeline.market.contracts import read_checked
    from atft_pipeline.market.sources import RAW_TABLES, open_source
    from atft_pipeline.market.universe import build_prices

    tables = dict(read_checked(open_source(source)).tables)
    for name, table in tables.items():
        day = RAW_TABLES[name].date
        # The first snapshot of the listing may be years after the first quotes, and describes them too.
        tables[name] = table if name == "listed" else table.filter(table[day] <= last.item())
    prices = build_prices(tables, config)
    return build_dataset(prices.panel, prices.quarantine, tables, config, {"path": str(source)})[0]


def _differences(inputs: RunInputs, made: pa.Table, sessions: NDArray[np.datetime64]) -> Figures:
    import polars as pl

    days = sessions[-RECOMPUTED_SESSIONS:].astype("datetime64[D]").tolist()
    until = sessions[-1].item()
    stored = pl.scan_parquet(inputs.rows)
    stored_rows = stored.filter(pl.col("Date").is_in(days)).collect()
    made_rows = pl.from_arrow(made)
    assert isinstance(made_rows, pl.DataFrame)
    recent = made_rows.filter(pl.col("Date").is_in(days))
    joined = stored_rows.join(recent, on=["Date", "Code"], suffix="_made")
    keys = ["Date", "Code"]
    stored_keys, made_keys = stored.filter(pl.col("Date") <= until).select(keys).collect(), made_rows.select(keys)
    unmatched = (
        stored_keys.join(made_keys, on=keys, how="anti").height
        + made_keys.join(stored_keys, on=keys, how="anti").height
    )
    differing = [name for name in inputs.manifest["features"] if _unlike(joined[name], joined[f"{name}_made"])]
    # A target reads prices after its session, so the newest targets before the cut are missing on one side.
    targets = stored.filter(pl.col("Date") <= until).select([*keys, "target_1d"]).collect()
    both = targets.join(made_rows.select([*keys, "target_1d"]), on=keys, suffix="_made").drop_nulls("target_1d_made")
    wrong = (both["target_1d"].fill_null(float("inf")) - both["target_1d_made"]).abs() > VALUE_TOLERANCE
    return {
        "features_know_later": float(len(differing)),
        "features_know_later_names": ", ".join(differing[:5]) or "none",
        "rows_unlike_source": unmatched / max(stored_keys.height + made_keys.height, 1),
        "targets_unlike_source": float(wrong.mean() or 0.0) if both.height else None,  # type: ignore[arg-type]
    }


def _unlike(stored: Any, made: Any) -> bool:
    a, b = (column.cast(float).fill_null(np.nan).to_numpy() for column in (stored, made))
    spread = float(np.nanstd(a)) if np.isfinite(a).any() else 0.0
    same = np.isclose(a, b, rtol=VALUE_TOLERANCE, atol=VALUE_TOLERANCE * spread, equal_nan=True)
    return not bool(same.all())
