"""Schema and column lineage of prices and dataset, as the UI shows them; derived from what each expression reads."""

import dagster as dg

from atft_pipeline.dataset.layout import ROW_KEYS, TARGETS
from atft_pipeline.features.registry import REGISTRY
from atft_pipeline.market.price_panel import FLAGS, PRICES_COLUMNS, QUOTES

ADJUSTED = ("Open", "High", "Low", "Close", "Volume")
"""Columns of prices that hold a factor."""


def _raw(table: str, *columns: str) -> list[dg.TableColumnDep]:
    return [dg.TableColumnDep(dg.AssetKey(f"raw_{table}"), column) for column in dict.fromkeys(columns)]


def prices_lineage() -> dg.TableColumnLineage:
    """Each column of prices from the raw columns that decide it."""
    quotes = {
        name: _raw("prices", name, *(("AdjustmentFactor", "Close") if name in ADJUSTED else ("Close", "Volume")))
        for name in QUOTES
    }
    membership = [*_raw("prices", "Close", "Volume"), *_raw("listed", "MarketCode", "Sector33Code")]
    flags = dict.fromkeys(FLAGS, membership) | {"is_traded": _raw("prices", "Open", "High", "Low", "Close", "Volume")}
    return dg.TableColumnLineage(
        {
            **{name: _raw("prices", name) for name in ROW_KEYS},
            **quotes,
            "cumulative_factor": _raw("prices", "AdjustmentFactor", "Open", "Close"),
            **flags,
            "is_liquid": [*membership, *_raw("prices", "TurnoverValue")],
            "is_listed_backfilled": _raw("listed", "Date"),
            **{name: _raw("listed", name) for name in ("Sector33Code", "MarketCode")},
        }
    )


def dataset_lineage() -> dg.TableColumnLineage:
    """Each feature from what its expression reads: quotes and attributes through prices, other tables as they are."""
    through = {"prices": dg.AssetKey("prices"), "listed": dg.AssetKey("prices")}

    def dependency(column: str) -> dg.TableColumnDep:
        table, _, name = column.partition(".")
        return dg.TableColumnDep(through.get(table, dg.AssetKey(f"raw_{table}")), name)

    prices = dg.AssetKey("prices")
    return dg.TableColumnLineage(
        {
            **{name: [dg.TableColumnDep(prices, name)] for name in ROW_KEYS},
            **{feature.name: [dependency(column) for column in feature.reads] for feature in REGISTRY},
            **{name: [dg.TableColumnDep(prices, quote) for quote in ("Open", "Close")] for name in TARGETS},
        }
    )


def prices_table_schema() -> dg.TableSchema:
    """Columns of prices with their types."""
    texts = {"Code", "Sector33Code", "MarketCode"}
    kinds = {name: "string" if name in texts else "bool" if name in FLAGS else "float64" for name in PRICES_COLUMNS}
    return _schema({**kinds, "Date": "date"}, {})


def dataset_table_schema() -> dg.TableSchema:
    """Columns of the dataset; each feature with its formula, window and publication rule."""
    described = {
        feature.name: f"{feature.formula}. Window {feature.window_sessions} sessions, norm {feature.norm}; known:"
        f" {feature.publication}"
        for feature in REGISTRY
    }
    kinds = {"Date": "date", "Code": "string"} | dict.fromkeys((*described, *TARGETS), "float32")
    return _schema(kinds, described)


def _schema(kinds: dict[str, str], described: dict[str, str]) -> dg.TableSchema:
    return dg.TableSchema(
        columns=[dg.TableColumn(name, kind, description=described.get(name)) for name, kind in kinds.items()]
    )
