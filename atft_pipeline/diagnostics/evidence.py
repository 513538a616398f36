"""Everything that can be known of a run, as named signals: its record, its inside, its files, and the probes made."""

from __future__ import annotations

from contextlib import suppress

from atft_pipeline.config.schema import EXPERIMENT_IDS
from atft_pipeline.diagnostics.probes.probes import PROBE_SIGNALS, probe_figures
from atft_pipeline.diagnostics.signals import dataset_audit as audit
from atft_pipeline.diagnostics.signals import internals as inside
from atft_pipeline.diagnostics.signals import recorded as signals
from atft_pipeline.diagnostics.signals.recorded import Value
from atft_pipeline.errors import InputError
from atft_pipeline.runs.paired import read_experiment_results
from atft_pipeline.runs.reader import Record

EXPERIMENT_SIGNALS: dict[str, str] = {id: f"experiment_{id.lower()}_gain_t" for id in EXPERIMENT_IDS}
"""Standard errors of the daily IC that an experiment gained over the run, paired by session."""
LATER_SIGNALS: tuple[str, ...] = (*(n for names in PROBE_SIGNALS.values() for n in names), *EXPERIMENT_SIGNALS.values())
"""Measured by probes and experiments, where they were made."""

SIGNAL_NAMES: frozenset[str] = frozenset({*signals.SIGNALS, *inside.SIGNALS, *audit.SIGNALS, *LATER_SIGNALS})
"""What a rule may ask for."""


def recorded(record: Record) -> dict[str, Value]:
    """The signals of the run's own tables, which need neither dataset nor model."""
    return signals.measure(record) | inside.measure(record)


def gather(record: Record) -> dict[str, Value]:
    """Every signal; None where it was not measured. Probes and experiments are read where they lie, not made."""
    later = dict.fromkeys(LATER_SIGNALS) | probe_figures(record) | _experiments(record)
    return recorded(record) | audit.audit(record) | later


def _experiments(record: Record) -> dict[str, Value]:
    with suppress(InputError):  # a file that is no result says so in its row of the report
        return {
            EXPERIMENT_SIGNALS[id]: result.ic.difference / result.ic.se
            for id, result in read_experiment_results(record.run_dir).items()
            if result.ic.difference is not None and result.ic.se
        }
    return {}
