"""From raw tables to the dataset: adjusted prices with universe and quarantine, then features and targets."""

from collections.abc import Callable
from typing import Any

import dagster as dg
import polars as pl

from assets.data.column_lineage import dataset_lineage, dataset_table_schema, prices_lineage, prices_table_schema
from assets.metadata import (
    as_dagster_failure,
    check_result,
    markdown_table,
    numeric_metadata,
)
from atft_pipeline.dataset.store import update_dataset
from atft_pipeline.errors import InputError
from atft_pipeline.features.statistics import DRIFT_WARNING, NULL_SHARE_WARNING
from atft_pipeline.market.contracts import read_checked
from atft_pipeline.market.price_store import read_quarantine, table_digests, update_prices
from atft_pipeline.storage.artifact import read_manifest
from resources.compute import Compute
from resources.output_folders import OutputFolders

MOVES = ("mean_shift", "std_log_ratio", "tail_shift")
"""Figures of `features.statistics.drift` that say that a feature's values have moved."""


class DatasetOverrides(dg.Config):
    overrides: dict[str, Any] = {}  # noqa: RUF012 - Dagster copies it
    """Fields of the dataset section, e.g. {"dataset.execution": "next_close"}; kept by the manifest."""


@dg.asset(
    group_name="features",
    deps=["raw_prices", "raw_listed", "raw_index"],
    kinds={"polars"},
    description="Forward-adjusted quotes on the exchange's sessions, with universe flags. Distrusted quotes are listed"
    " in the quarantine table with rule and decision.",
    check_specs=[
        dg.AssetCheckSpec("contract", asset="prices", blocking=True, description="Schema and unique, sorted keys."),
        dg.AssetCheckSpec(
            "universe_not_empty", asset="prices", blocking=True, description="Some stock is investable on some session."
        ),
        dg.AssetCheckSpec(
            "listed_is_point_in_time",
            asset="prices",
            description="Sector and market come from a snapshot at or before the session; a later one warns.",
        ),
    ],
)
def prices(
    context: dg.AssetExecutionContext, config: DatasetOverrides, store: OutputFolders, compute: Compute
) -> dg.MaterializeResult:
    with as_dagster_failure(context):
        source = store.open_source()
        settings, _ = compute.configuration(
            "prices",
            sections=("dataset",),
            embedded=store.is_embedded(source.folder),
            overrides=config.overrides,
        )
        others = read_checked(source, but=["prices"])
        building, previous = store.building("prices"), store.previous("prices")
        manifest, contract = update_prices(source, others, building, settings.dataset, previous)
        path = store.keep("prices", manifest["fingerprint"])
        quarantine = read_quarantine(path)
    figures = universe_figures(manifest)
    universe = f"{figures['investable_rows']} investable rows, {figures['liquid_rows']} of them liquid"
    empty = [] if figures["investable_rows"] else [f"prices: {universe}; nothing can be trained on"]
    if contract.passed and not empty:
        store.publish("prices", path)
    context.log.info(changes_sentence("prices", manifest["changes"]))
    return dg.MaterializeResult(
        metadata={
            "path": str(path),
            "source": manifest["source"]["path"],
            "changes": changes_sentence("prices", manifest["changes"]),
            **numeric_metadata({"dagster/row_count": figures["rows"], "quarantined": quarantine.height} | figures),
            "dagster/column_schema": prices_table_schema(),
            "dagster/column_lineage": prices_lineage(),
            "quarantine": markdown_table(quarantine_summary(quarantine)),
        },
        data_version=dg.DataVersion(manifest["fingerprint"]),
        check_results=[
            check_result(context, "contract", contract.failures, f"all {contract.rows} rows written now"),
            check_result(context, "universe_not_empty", empty, universe),
            point_in_time_result(figures),
        ],
    )


def point_in_time_result(figures: dict[str, int]) -> dg.AssetCheckResult:
    """Warns where sector and market of a row come from a later snapshot, as no earlier one exists."""
    backfilled = figures["listed_backfilled_rows"]
    return dg.AssetCheckResult(
        passed=backfilled == 0,
        severity=dg.AssetCheckSeverity.WARN,
        check_name="listed_is_point_in_time",
        description=f"{backfilled} of {figures['rows']} rows take sector and market from a later snapshot",
        metadata=numeric_metadata({"rows": backfilled}),
    )


def universe_figures(manifest: dict[str, Any]) -> dict[str, int]:
    """Counts that say how large the universe is and how much of it is back-filled."""
    months = manifest["parts"].values()
    counted = ("rows", "investable_rows", "liquid_rows", "listed_backfilled_rows")
    return {"sessions": len(manifest["session_dates"]), "stocks": manifest["stocks"]} | {
        name: sum(month[name] for month in months) for name in counted
    }


def changes_sentence(product: str, changes: dict[str, Any]) -> str:
    """Which months were computed now, and the change that made it necessary."""
    computed, reused = changes["months_computed"], changes["months_reused"]
    why = ", ".join(f"{name} from {month}" for name, month in changes["first_changed_month"].items())
    what = f"{len(computed)} months computed ({computed[0]} to {computed[-1]})" if computed else "nothing computed"
    return f"{product}: {what}, {len(reused)} taken over" + (f"; changed: {why}" if why else "")


def quarantine_summary(quarantine: pl.DataFrame) -> list[dict[str, Any]]:
    """Hits per rule and decision, most first."""
    return (
        quarantine.group_by("rule", "decision")
        .agg(pl.len().alias("rows"), pl.col("Code").n_unique().alias("codes"))
        .sort("rows", "rule", descending=[True, False])
        .to_dicts()
    )


@dg.asset(
    group_name="features",
    deps=["prices", "raw_index", "raw_investor_flows", "raw_statements", "raw_listed"],
    kinds={"polars", "numba"},
    description="The registry's 82 features in its order, with forward-return targets, keyed by Date and Code.",
    check_specs=[
        dg.AssetCheckSpec(
            "contract",
            asset="ml_dataset",
            blocking=True,
            description="Exactly the registry's columns in order, float32, finite or null, unique sorted keys.",
        ),
        dg.AssetCheckSpec(
            "live_features",
            asset="ml_dataset",
            description="Every feature has values. A missing table warns with the count of its features.",
        ),
        dg.AssetCheckSpec(
            "null_share",
            asset="ml_dataset",
            description="No feature has over 10 points more nulls than in the previous dataset.",
        ),
        dg.AssetCheckSpec(
            "drift",
            asset="ml_dataset",
            description="No feature's mean, spread or tail has moved since the previous dataset.",
        ),
    ],
)
def ml_dataset(context: dg.AssetExecutionContext, store: OutputFolders) -> dg.MaterializeResult:
    with as_dagster_failure(context):
        adjusted, made_from = store.current("prices", "ml_dataset")
        source = store.open_source(made_from["source"]["path"])
        others = read_checked(source, but=["prices"])
        require_same_source(made_from, table_digests(source, others))
        config = store.dataset_config(made_from)
        building, previous = store.building("ml_dataset"), store.previous("ml_dataset")
        manifest, report = update_dataset(adjusted, others.tables, building, config, previous)
        path = store.keep("ml_dataset", manifest["fingerprint"])
        manifest = read_manifest(path, kind="ml_dataset")
    if report.passed:
        store.publish("ml_dataset", path)
    for warning in manifest["warnings"]:
        context.log.warning(warning)
    context.log.info(changes_sentence("ml_dataset", manifest["changes"]))
    return dg.MaterializeResult(
        metadata={
            "path": str(path),
            **dataset_metadata(manifest),
            "dagster/column_schema": dataset_table_schema(),
            "dagster/column_lineage": dataset_lineage(),
        },
        data_version=dg.DataVersion(manifest["fingerprint"]),
        check_results=[
            check_result(context, "contract", report.failures, f"all {report.rows} rows written now"),
            live_features_result(manifest),
            null_share_result(manifest),
            drift_result(manifest),
        ],
    )


def require_same_source(prices_manifest: dict[str, Any], digests: dict[str, str]) -> None:
    """Raises InputError where a table of the source is no longer the one that prices were made from."""
    tables = prices_manifest["source"]["tables"]
    if digests != {name: entry["sha256"] for name, entry in tables.items()}:
        raise InputError(
            f"ml_dataset: {prices_manifest['source']['path']} changed since prices were made from it; run"
            " `dagster asset materialize --select '+key:ml_dataset'`"
        )


def dataset_metadata(manifest: dict[str, Any]) -> dict[str, Any]:
    """What the dataset covers, what of it is new, and its features with their drift."""
    sizes = {name: manifest[name] for name in ("sessions", "stocks")}
    return {
        "source": manifest["source"]["path"],
        "first_date": manifest["first_date"],
        "last_date": manifest["last_date"],
        "changes": changes_sentence("ml_dataset", manifest["changes"]),
        **numeric_metadata(
            {"dagster/row_count": manifest["rows"], **sizes, "live_features": len(manifest["live_features"])}
        ),
        "features": markdown_table([{"feature": k, **v} for k, v in manifest["feature_stats"].items()]),
        "drift": markdown_table([{"feature": k, **v} for k, v in manifest["drift"].items()]),
        "warnings": markdown_table([{"warning": w} for w in manifest["warnings"]]),
    }


def live_features_result(manifest: dict[str, Any]) -> dg.AssetCheckResult:
    """Warns with the count and the names where a feature has no value at all."""
    count, live = len(manifest["features"]), len(manifest["live_features"])
    dead = [name for name in manifest["features"] if name not in set(manifest["live_features"])]
    return dg.AssetCheckResult(
        passed=not dead,
        severity=dg.AssetCheckSeverity.WARN,
        check_name="live_features",
        description=f"{live} of {count} live" + (f"; without values: {', '.join(dead)}" if dead else ""),
        metadata=numeric_metadata({"live": live, "expected": count}),
    )


def null_share_result(manifest: dict[str, Any]) -> dg.AssetCheckResult:
    """Warns where a feature lost more than `NULL_SHARE_WARNING` of all rows since the previous dataset."""
    return _moved(
        manifest,
        "null_share",
        f"more than {100 * NULL_SHARE_WARNING:.0f} points more nulls",
        lambda moved: (moved["null_share_change"] or 0.0) > NULL_SHARE_WARNING,
    )


def drift_result(manifest: dict[str, Any]) -> dg.AssetCheckResult:
    """Warns where a feature's mean, spread or tail moved by more than `DRIFT_WARNING` since the previous dataset."""
    return _moved(
        manifest,
        "drift",
        f"mean or tail moved by over {DRIFT_WARNING:g} standard deviations, or spread by a factor over"
        f" e^{DRIFT_WARNING:g},",
        lambda moved: any(abs(moved[name] or 0.0) > DRIFT_WARNING for name in MOVES),
    )


def _moved(
    manifest: dict[str, Any], check: str, what: str, is_moved: Callable[[dict[str, Any]], bool]
) -> dg.AssetCheckResult:
    moved = {name: drift for name, drift in manifest["drift"].items() if is_moved(drift)}
    against = manifest["drift_against"]
    if against is None:
        description = "no earlier dataset of the same registry: nothing to compare with, and nothing known of drift"
    else:
        names = f": {', '.join(moved)}" if moved else ""
        description = (
            f"{len(moved)} of {len(manifest['drift'])} features with {what} than dataset {against[:16]}{names}"
        )
    return dg.AssetCheckResult(
        passed=not moved,
        severity=dg.AssetCheckSeverity.WARN,
        check_name=check,
        description=description,
        metadata={
            "compared_with": against or "nothing",
            **numeric_metadata({"features": len(moved)}),
            "moved": markdown_table([{"feature": name, **drift} for name, drift in moved.items()]),
        },
    )
