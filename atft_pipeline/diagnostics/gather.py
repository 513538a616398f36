"""Every signal of a run: from its own tables, from its input files, and from its probes and experiments."""

from __future__ import annotations

from contextlib import suppress

import duckdb
import pyarrow as pa

from atft_pipeline.config.schema import EXPERIMENT_IDS
from atft_pipeline.diagnostics.probes.run import PROBE_SIGNALS, probe_figures
from atft_pipeline.diagnostics.rule_table import TABLE, RuleTable
from atft_pipeline.diagnostics.run_inputs import RunInputs
from atft_pipeline.diagnostics.signal import Audit, Value, without_nan
from atft_pipeline.errors import InputError
from atft_pipeline.inspection.paired import read_experiment_results
from atft_pipeline.inspection.reader import Record

EXPERIMENT_SIGNALS: dict[str, str] = {id: f"experiment_{id.lower()}_gain_t" for id in EXPERIMENT_IDS}
"""Experiment -> signal: the daily IC that it gained over the run, paired by session, in standard errors."""
LATER_SIGNALS: tuple[str, ...] = (*(n for names in PROBE_SIGNALS.values() for n in names), *EXPERIMENT_SIGNALS.values())
"""Signals of probes and experiments: not measured until these have run."""


def audited_names(table: RuleTable = TABLE) -> tuple[str, ...]:
    """Names of the signals that need the run's input files, above all its dataset."""
    return tuple(name for audit in table.audits for name in audit.names)


def recorded(record: Record, table: RuleTable = TABLE) -> dict[str, Value]:
    """The signals of the run's own tables, which need neither dataset nor model."""
    return {name: without_nan(measure(record)) for name, measure in table.signals.items()}


def audited(record: Record, table: RuleTable = TABLE) -> dict[str, Value]:
    """The signals that compare the run's files with its dataset and with each other.

    None where a file is torn, has been replaced, or has other columns than it should.
    """
    inputs = RunInputs(record)
    try:
        values = [_values(audit, inputs) for audit in table.audits]
    finally:
        inputs.forget_tables()
    return {name: without_nan(value) for of_audit in values for name, value in of_audit.items()}


def _values(audit: Audit, inputs: RunInputs) -> dict[str, Value]:
    values: dict[str, Value] = dict.fromkeys(audit.names)
    with suppress(InputError, OSError, pa.ArrowException, duckdb.Error):
        values |= audit.measure(inputs)
    return values


def gather(record: Record, table: RuleTable = TABLE) -> dict[str, Value]:
    """Every signal; None where it was not measured. Probes and experiments are read, not run."""
    later = dict.fromkeys(LATER_SIGNALS) | probe_figures(record) | _experiments(record)
    return recorded(record, table) | audited(record, table) | later


def _experiments(record: Record) -> dict[str, Value]:
    with suppress(InputError):  # a file that is no result says so in its row of the report
        return {
            EXPERIMENT_SIGNALS[id]: result.ic.difference / result.ic.se
            for id, result in read_experiment_results(record.run_dir).items()
            if result.ic.difference is not None and result.ic.se
        }
    return {}
