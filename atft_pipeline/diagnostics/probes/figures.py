"""What a probe measures."""

from __future__ import annotations

from atft_pipeline.diagnostics.signal import Value

Figures = dict[str, Value]
"""Name -> figure; those that a probe lists in its SIGNALS are read by rules, the others by people."""
