"""The fields that decide a run's result, and the keys that follow from them."""

from __future__ import annotations

from typing import Any

from atft_pipeline.config.overrides import to_dict
from atft_pipeline.config.schema import PipelineConfig
from atft_pipeline.storage.artifact import sha256_of
from atft_pipeline.storage.code_version import code_revision

NON_DECIDING_FIELDS: tuple[str, ...] = ("panel", "loader_workers")
"""Fields of `train` that do not decide the result: they say where and when, and a run may go on with others."""


def deciding_values(config: PipelineConfig) -> dict[str, Any]:
    """The fields of the configuration that decide the result."""
    values = to_dict(config)
    train = {name: value for name, value in values["train"].items() if name not in NON_DECIDING_FIELDS}
    return values | {"train": train}


def config_key(config: PipelineConfig) -> str:
    """Hash of the configuration without the number of epochs: a 20-epoch verdict speaks for the runs that share it."""
    values = deciding_values(config)
    del values["train"]["epochs"]
    return sha256_of(values)[:12]


def run_key(
    config: PipelineConfig, *, dataset_fingerprint: str, graph_fingerprint: str | None, processes: int = 1
) -> str:
    """Hash of configuration, code and data; the suffix of the run's directory.

    One key means the same bits. Several processes sum in another order and draw other dropout, so their number is part
    of the key.
    """
    parts = {
        "config": deciding_values(config),
        "code": code_revision("run"),
        "dataset": dataset_fingerprint,
        "graph": graph_fingerprint,
    }
    return sha256_of(parts | ({"processes": processes} if processes > 1 else {}))[:12]
