"""From raw tables to the dataset: adjusted prices with universe and quarantine, then 82 features and targets."""

from typing import Any

import dagster as dg
import polars as pl

from assets.outcomes import failing_with_one_sentence, held, markdown_table, numbers
from atft_pipeline.config import to_dict
from atft_pipeline.contracts import check_ml_dataset, check_prices, read_checked
from atft_pipeline.dataset import TARGETS, read_manifest, read_table, write_dataset
from atft_pipeline.dataset_rows import build_dataset
from atft_pipeline.errors import InputError
from atft_pipeline.price_panel import PricePanel
from atft_pipeline.universe import build_prices
from resources.compute import Compute
from resources.dataset_store import DatasetStore


class DatasetOverrides(dg.Config):
    overrides: dict[str, Any] = {}  # noqa: RUF012 - Dagster copies it
    """Fields of the dataset section, e.g. {"dataset.execution": "next_close"}; kept by the manifest."""


@dg.asset(
    group_name="features",
    deps=["raw_prices", "raw_listed", "raw_index"],
    kinds={"polars"},
    description="Forward-adjusted quotes on the exchange's sessions, with universe flags; what is not trusted goes to"
    " the quarantine table with rule and decision.",
    check_specs=[
        dg.AssetCheckSpec("contract", asset="prices", blocking=True, description="Schema and unique, sorted keys."),
        dg.AssetCheckSpec(
            "universe_not_empty", asset="prices", blocking=True, description="Some stock is investable on some session."
        ),
        dg.AssetCheckSpec(
            "listed_is_point_in_time",
            asset="prices",
            description="Sector and market come from a snapshot at or before the session; back-filled rows warn.",
        ),
    ],
)
def prices(
    context: dg.AssetExecutionContext, config: DatasetOverrides, store: DatasetStore, compute: Compute
) -> dg.MaterializeResult:
    with failing_with_one_sentence(context):
        source = store.open_source()
        settings, _ = compute.configuration(
            "prices",
            sections=("dataset",),
            embedded=store.is_embedded(source.folder),
            overrides=config.overrides,
        )
        checked = read_checked(source)
        result = build_prices(checked.tables, settings.dataset)
        contract = check_prices(result.prices)
        path, manifest = store.write_prices(
            result.prices, result.quarantine, source=checked.record, config=to_dict(settings.dataset)
        )
    figures = universe_figures(result.prices)
    universe = f"{figures['investable_rows']} investable rows, {figures['liquid_rows']} of them liquid"
    empty = [] if figures["investable_rows"] else [f"prices: {universe}; nothing can be trained on"]
    if contract.passed and not empty:
        store.publish("prices", path)
    backfilled = figures["listed_backfilled_rows"]
    return dg.MaterializeResult(
        metadata={
            "path": str(path),
            "source": checked.record["path"],
            **numbers(figures | {"dagster/row_count": result.prices.height, "quarantined": result.quarantine.height}),
            "quarantine": markdown_table(quarantine_summary(result.quarantine)),
            "universe": markdown_table([{"item": k, "value": v} for k, v in result.summary.items()]),
        },
        data_version=dg.DataVersion(manifest["fingerprint"]),
        check_results=[
            held(context, "contract", contract.failures, f"all {contract.rows} rows"),
            held(context, "universe_not_empty", empty, universe),
            dg.AssetCheckResult(
                passed=backfilled == 0,
                severity=dg.AssetCheckSeverity.WARN,
                check_name="listed_is_point_in_time",
                description=f"{backfilled} of {result.prices.height} rows take sector and market from a later snapshot",
                metadata=numbers({"rows": backfilled}),
            ),
        ],
    )


def universe_figures(prices: pl.DataFrame) -> dict[str, int]:
    """Counts that say how large the universe is and how much of it is back-filled."""
    flags = {"is_investable": "investable_rows", "is_liquid": "liquid_rows"}
    flags["is_listed_backfilled"] = "listed_backfilled_rows"
    counts = prices.select(pl.col(list(flags)).sum()).row(0, named=True)
    distinct = prices.select(pl.col("Date", "Code").n_unique()).row(0, named=True)
    return {"sessions": distinct["Date"], "stocks": distinct["Code"]} | {flags[k]: int(counts[k]) for k in flags}


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
    description="The 82 features of FEATURES in registry order, with forward-return targets, keyed by Date and Code.",
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
            description="Every feature has values; missing tables warn with a count.",
        ),
    ],
)
def ml_dataset(context: dg.AssetExecutionContext, store: DatasetStore) -> dg.MaterializeResult:
    with failing_with_one_sentence(context):
        adjusted, quarantine, made_from = store.read_prices("ml_dataset")
        checked = read_checked(store.open_source(made_from["source"]["path"]))
        if checked.record != made_from["source"]:
            raise InputError(
                f"ml_dataset: {made_from['source']['path']} changed since prices were made from it; run"
                " `dagster asset materialize --select '+key:ml_dataset'`"
            )
        config = store.dataset_config(made_from)
        features, membership, manifest = build_dataset(
            PricePanel.from_frame(adjusted), quarantine, checked.tables, config, checked.record
        )
        path = store.product("ml_dataset", manifest["fingerprint"])
        write_dataset(path, features, membership, manifest, by_month=True)
        del features, membership
        report = check_ml_dataset(pl.from_arrow(read_table(path)), manifest["features"], TARGETS)  # type: ignore[arg-type]
        manifest = read_manifest(path, kind="ml_dataset")
    if report.passed:
        store.publish("ml_dataset", path)
    live, count = len(manifest["live_features"]), len(manifest["features"])
    for warning in manifest["warnings"]:
        context.log.warning(warning)
    return dg.MaterializeResult(
        metadata={
            "path": str(path),
            "source": manifest["source"]["path"],
            "first_date": manifest["first_date"],
            "last_date": manifest["last_date"],
            **numbers(
                {
                    "dagster/row_count": manifest["rows"],
                    "sessions": manifest["sessions"],
                    "stocks": manifest["stocks"],
                    "live_features": live,
                }
            ),
            "features": markdown_table([{"feature": k, **v} for k, v in manifest["feature_stats"].items()]),
            "warnings": markdown_table([{"warning": w} for w in manifest["warnings"]]),
        },
        data_version=dg.DataVersion(manifest["fingerprint"]),
        check_results=[
            held(context, "contract", report.failures, f"all {report.rows} rows"),
            live_features_result(manifest, count, live),
        ],
    )


def live_features_result(manifest: dict[str, Any], count: int, live: int) -> dg.AssetCheckResult:
    """Warns with the count and the names when a feature has no value at all."""
    dead = [name for name in manifest["features"] if name not in set(manifest["live_features"])]
    return dg.AssetCheckResult(
        passed=not dead,
        severity=dg.AssetCheckSeverity.WARN,
        check_name="live_features",
        description=f"{live} of {count} live" + (f"; without values: {', '.join(dead)}" if dead else ""),
        metadata=numbers({"live": live, "expected": count}),
    )
