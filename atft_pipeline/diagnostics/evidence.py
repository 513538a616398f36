"""Everything that can be known of a run, as named signals: its record, its inside, its files, and the probes made."""

from __future__ import annotations

from atft_pipeline.diagnostics import audit, inside, signals
from atft_pipeline.diagnostics.probes import PROBE_SIGNALS, probe_figures
from atft_pipeline.diagnostics.record import Record
from atft_pipeline.diagnostics.signals import Value, measure

SIGNAL_NAMES: frozenset[str] = frozenset(
    {*signals.SIGNALS, *inside.SIGNALS, *audit.SIGNALS, *(name for names in PROBE_SIGNALS.values() for name in names)}
)
"""What a rule may ask for."""


def gather(record: Record) -> dict[str, Value]:
    """Every signal; None where it was not measured. Probes are read from where they were stored, and not made."""
    unmade = dict.fromkeys(name for names in PROBE_SIGNALS.values() for name in names)
    return measure(record) | inside.measure(record) | audit.audit(record) | unmade | probe_figures(record)
