"""The README says what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from assets.training.training_run import RUN_LENGTHS
from atft_pipeline.config.overrides import REPORT_VARIABLES
from atft_pipeline.features.registry import markdown_table

README = Path(__file__).parent.parent / "README.md"


def section(name: str) -> str:
    text = README.read_text(encoding="utf-8")
    return text.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0].strip()


def test_feature_table_is_the_registrys() -> None:
    assert section("features") == markdown_table().strip()


def test_every_report_variable_is_named() -> None:
    text = README.read_text(encoding="utf-8")
    assert [variable for variable in REPORT_VARIABLES if f"`{variable}`" not in text] == []


def test_assets_named_in_commands_exist() -> None:
    text = README.read_text(encoding="utf-8")
    named = {int(n) for n in re.findall(r"(?:model|evaluation|diagnostics)_(\d+)ep", text)}
    assert named <= set(RUN_LENGTHS)


def test_make_targets_named_exist() -> None:
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"`?make ([a-z-]+)", README.read_text(encoding="utf-8")))
    assert {name for name in named if f"\n{name}:" not in makefile} == set()
