"""Which edits change the key of a dataset or of a run, package by package."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from atft_process import REPO

from atft_pipeline.storage.code_version import PACKAGES, Result, code_revision

LIBRARY = REPO / "atft_pipeline"
ALL_PACKAGES = sorted(folder.name for folder in LIBRARY.iterdir() if (folder / "__init__.py").is_file())

DECIDES_NOTHING = {"config", "storage", "inspection", "ensemble", "diagnostics", "monitoring", "cli"}
HOLDS_NO_VALUES = {"config", "storage"}
"""Configuration enters a key by its values, and how a file is written changes nothing in it."""


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(LIBRARY, tmp_path / "library", ignore=shutil.ignore_patterns("__pycache__")))


def revisions(library: Path) -> dict[Result, str]:
    code_revision.cache_clear()
    return {"dataset": code_revision("dataset", library), "run": code_revision("run", library)}


@pytest.mark.parametrize("package", ALL_PACKAGES)
def test_a_word_fixed_in_a_package_changes_the_keys_of_what_it_decides(package: str, copied: Path) -> None:
    before = revisions(copied)
    module = next(file for file in sorted((copied / package).rglob("*.py")) if file.name != "__init__.py")
    module.write_text(module.read_text(encoding="utf-8") + "# a word\n", encoding="utf-8")
    after = revisions(copied)
    changed = {result for result in before if before[result] != after[result]}
    assert changed == {result for result, packages in PACKAGES.items() if package in packages}


def test_a_package_of_reports_changes_no_key() -> None:
    assert set(ALL_PACKAGES) - set(PACKAGES["run"]) - set(PACKAGES["dataset"]) == DECIDES_NOTHING


def test_a_renamed_module_counts(copied: Path) -> None:
    before = revisions(copied)
    (copied / "training" / "losses.py").rename(copied / "training" / "loss.py")
    assert revisions(copied)["run"] != before["run"]


def imported_packages(package: str) -> Iterator[str]:
    for file in (LIBRARY / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("atft_pipeline."):
                yield str(node.module).split(".")[1]


def closure(package: str) -> set[str]:
    reached, ahead = set[str](), [package]
    while ahead:
        name = ahead.pop()
        if name not in reached and (LIBRARY / name).is_dir():
            reached.add(name)
            ahead += imported_packages(name)
    return reached


def test_all_that_training_imports_is_in_the_key_of_a_run_or_of_its_dataset() -> None:
    assert closure("training") <= {*PACKAGES["run"], *PACKAGES["dataset"], *HOLDS_NO_VALUES}


def test_all_that_the_dataset_imports_is_in_its_key() -> None:
    assert closure("dataset") <= {*PACKAGES["dataset"], *HOLDS_NO_VALUES}
