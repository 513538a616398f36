"""Raw tables of the source folder, each checked against its contract before anything reads it."""

import dagster as dg

from assets.metadata import as_dagster_failure, check_result, numeric_metadata
from atft_pipeline.market.contracts import check_table
from atft_pipeline.market.sources import RAW_TABLES
from resources.output_folders import OutputFolders

DESCRIPTIONS = {
    "prices": "Daily quotes as traded: OHLC, volume, turnover, adjustment factor.",
    "listed": "Snapshots of the listed issues: sector and market segment.",
    "index": "Market index (TOPIX for Tokyo), daily OHLC.",
    "investor_flows": "Weekly trading by investor type and market section, with publication dates. Optional.",
    "statements": "Financial statements and forecasts as disclosed. Optional.",
}


def raw_asset(table: str) -> dg.AssetsDefinition:
    """The asset `raw_<table>`: reads the table, checks its contract (blocking), versions it by content."""
    key = f"raw_{table}"

    @dg.asset(
        name=key,
        group_name="raw",
        description=DESCRIPTIONS[table],
        check_specs=[
            dg.AssetCheckSpec(
                "contract",
                asset=key,
                blocking=True,
                description="Columns, types, unique keys, dates in order, at least two stocks, prices that exist.",
            )
        ],
        kinds={"parquet"},
    )
    def raw(context: dg.AssetExecutionContext, store: OutputFolders) -> dg.MaterializeResult:
        with as_dagster_failure(context):
            source = store.open_source()
            if not RAW_TABLES[table].required and table not in source.tables:
                return _absent(table, str(source.folder))
            frame = source.read(table)
            report = check_table(table, frame, where=str(source.where(table)))
        return dg.MaterializeResult(
            metadata={
                "source": str(source.folder),
                "first_date": str(report.first_date),
                "last_date": str(report.last_date),
                **numeric_metadata({"dagster/row_count": report.rows}),
                "preview": dg.MetadataValue.md(f"```\n{frame.head(5)}\n```"),
            },
            data_version=dg.DataVersion(source.fingerprint(table)),
            check_results=[
                check_result(
                    context,
                    "contract",
                    report.failures,
                    f"all {report.rows} rows",
                    numeric_metadata({"rows": report.rows}),
                )
            ],
        )

    return raw


def _absent(table: str, folder: str) -> dg.MaterializeResult:
    """The result for an optional table that the source lacks: a warning, which the dataset's live features repeat."""
    sentence = f"{table}: the source {folder} has no such table; its features stay null and are counted as not live"
    return dg.MaterializeResult(
        metadata={"source": folder, "present": False},
        data_version=dg.DataVersion("absent"),
        check_results=[
            dg.AssetCheckResult(
                passed=False, severity=dg.AssetCheckSeverity.WARN, check_name="contract", description=sentence
            )
        ],
    )


raw_assets = [raw_asset(table) for table in RAW_TABLES]
