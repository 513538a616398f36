"""What decides a run, and the keys that follow from it."""

from __future__ import annotations

from typing import Any

from atft_pipeline.config.overrides import to_dict
from atft_pipeline.config.schema import PipelineConfig
from atft_pipeline.storage.artifact import sha256_of
from atft_pipeline.storage.code_version import code_revision

PLACEMENT: tuple[str, ...] = ("panel", "loader_workers")
"""Fields of `train` that decide where and when, and no figure: a run may go on with others, and is the same run."""


def decisive(config: PipelineConfig) -> dict[str, Any]:
    """The configuration as a dictionary, without what changes no result."""
    values = to_dict(config)
    return values | {"train": {name: value for name, value in values["train"].items() if name not in PLACEMENT}}


def config_key(config: PipelineConfig) -> str:
    """Hash of the configuration apart from the number of epochs: runs that a 20-epoch verdict speaks for share it."""
    values = decisive(config)
    del values["train"]["epochs"]
    return sha256_of(values)[:12]


def run_key(
    config: PipelineConfig, *, dataset_fingerprint: str, graph_fingerprint: str | None, processes: int = 1
) -> str:
    """Hash of configuration, code and data; the suffix of the run's directory.

    Several processes are part of it: they add in another order and draw other dropout, and one key means the same bits.
    """
    parts = {
        "config": decisive(config),
        "code": code_revision("run"),
        "dataset": dataset_fingerprint,
        "graph": graph_fingerprint,
    }
    return sha256_of(parts | ({"processes": processes} if processes > 1 else {}))[:12]
