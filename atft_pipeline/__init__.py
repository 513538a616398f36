"""The library: pure functions over quotes, features, graphs, models and run records.

It does not depend on what schedules it.
"""

__version__ = "0.1.0"
