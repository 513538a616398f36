"""Run keys: what decides a run is part of its key, and nothing else."""

from __future__ import annotations

import pytest
from training_runs import settings

from atft_pipeline.config.overrides import to_dict
from atft_pipeline.config.schema import PipelineConfig
from atft_pipeline.runs import keys
from atft_pipeline.runs.keys import config_key, run_key


def key(config, dataset="d", graph="g"):
    return run_key(config, dataset_fingerprint=dataset, graph_fingerprint=graph)


def test_a_run_key_names_configuration_code_and_data(monkeypatch):
    base = key(settings())
    assert base == key(settings())
    others = [key(settings({"train.seed": 2})), key(settings(), dataset="e"), key(settings(), graph="h")]
    monkeypatch.setattr(keys, "code_revision", lambda _: "other code")
    others.append(key(settings()))
    assert len({base, *others}) == 5


def leaves(values, prefix=""):
    for name, value in values.items():
        dotted = f"{prefix}{name}"
        yield from leaves(value, f"{dotted}.") if isinstance(value, dict) else [(dotted, value)]


def changed(value):
    """Another value of the same JSON type; hashing needs no valid configuration."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return [*value, 0.5] if isinstance(value, list) else f"{value}-other"


@pytest.mark.parametrize("dotted", [name for name, _ in leaves(to_dict(PipelineConfig()))])
def test_every_field_of_the_configuration_is_in_the_run_key(dotted, monkeypatch):
    """A field left out would hand one run's result to another: the failure that this project started from.

    Where the panel lies and who makes blocks change no bit (test_panel_storage.py), and are not.
    """
    values = to_dict(PipelineConfig())
    base = key(PipelineConfig())
    *stages, leaf = dotted.split(".")
    section = values
    for stage in stages:
        section = section[stage]
    section[leaf] = changed(section[leaf])
    monkeypatch.setattr(keys, "to_dict", lambda _: values)
    assert (key(PipelineConfig()) == base) is (dotted in ("train.panel", "train.loader_workers"))


def test_a_config_key_leaves_out_the_epochs_and_nothing_else():
    assert config_key(settings({"train.epochs": 120})) == config_key(settings({"train.epochs": 20}))
    assert config_key(settings({"train.seed": 2})) != config_key(settings())
    assert config_key(settings({"evaluation.criterion_epoch": 9})) != config_key(settings())
    assert key(settings({"train.epochs": 120})) != key(settings({"train.epochs": 20}))
