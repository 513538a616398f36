"""The type of what a probe measures."""

from __future__ import annotations

from atft_pipeline.diagnostics.signal import Value

Figures = dict[str, Value]
"""Name -> figure. Rules read those that the probe lists in its SIGNALS; the others are for people."""
