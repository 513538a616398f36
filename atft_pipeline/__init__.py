"""The library: pure functions over quotes, features, graphs, models and run records. Never imports Dagster."""

__version__ = "0.1.0"
