"""The architecture: which way imports point, what may be imported where, and what no tracked file may contain."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from atft_process import (
    REPO,
    TRAIN_SETTINGS,
    environment,
)

PACKAGES: tuple[str, ...] = (
    "errors", "config", "storage", "market", "features", "dataset", "graph", "batches", "model", "evaluation", "runs",
    "verdict", "training", "ensemble", "inspection", "diagnostics", "monitoring", "cli",
)  # fmt: skip
"""The library's packages by stage, `errors.py` at the ground: each imports only from those before it."""

MOST_MODULES = 13
"""Of one folder: what a reader still takes in at a glance."""

THIRD_PARTY_OF_TRAINING = {"numpy", "pyarrow", "torch"}
"""What a GPU machine has."""

BLOCKED = (
    "polars", "duckdb", "pandera", "dagster", "sklearn", "lightgbm", "arch", "matplotlib", "exchange_calendars",
    "skfolio", "threadpoolctl", "rich", "torch_geometric",
)  # fmt: skip


def module_name(file: Path) -> str:
    parts = file.relative_to(REPO / "atft_pipeline").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def library() -> dict[str, ast.Module]:
    files = sorted((REPO / "atft_pipeline").rglob("*.py"))
    return {module_name(file): ast.parse(file.read_text(encoding="utf-8")) for file in files}


def imported(tree: ast.Module, *, lazily: bool = True) -> Iterator[str]:
    """Full names of what is imported, inside functions too unless `lazily` is False; type-checking imports included."""
    nodes = ast.walk(tree) if lazily else iter(tree.body)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


TREES = library()


def own(names: Iterator[str]) -> Iterator[str]:
    """Modules of the library among `names`: `atft_pipeline.config.schema.HORIZONS` is `config.schema`."""
    for name in names:
        if name.split(".")[0] == "atft_pipeline":
            path = name.split(".")[1:]
            found = (".".join(path[:length]) for length in range(len(path), 0, -1))
            yield next((module for module in found if module in TREES), "")


def package(module: str) -> str:
    return module.split(".")[0]


def test_every_package_has_its_place() -> None:
    assert {package(module) for module in TREES} - {""} == set(PACKAGES)


@pytest.mark.parametrize("module", sorted(TREES))
def test_imports_between_packages_point_one_way(module: str) -> None:
    for other in own(imported(TREES[module])):
        if module and other and package(module) != package(other):
            assert PACKAGES.index(package(other)) < PACKAGES.index(package(module)), (
                f"{module} imports {other}, whose package comes later"
            )


def arrows(folder: str) -> dict[str, set[str]]:
    """Child of the package `folder` (module or folder) -> the children that it imports."""
    depth = len(folder.split(".")) + 1
    inside: dict[str, set[str]] = {}
    for module, tree in TREES.items():
        if module.startswith(f"{folder}."):
            child = ".".join(module.split(".")[:depth])
            others = (".".join(other.split(".")[:depth]) for other in own(imported(tree)))
            inside.setdefault(child, set()).update(
                other for other in others if other.startswith(f"{folder}.") and other != child
            )
    return inside


FOLDERS = sorted(module for module in TREES if any(other.startswith(f"{module}.") for other in TREES if module))


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_inside_a_package_point_one_way(folder: str) -> None:
    TopologicalSorter(arrows(folder)).prepare()


def test_a_circle_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    backwards = ast.parse("def f():\n    from atft_pipeline.training.train import train\n")
    monkeypatch.setitem(TREES, "training.losses", backwards)
    with pytest.raises(CycleError):
        TopologicalSorter(arrows("training")).prepare()


def test_an_import_the_other_way_is_found() -> None:
    tree = ast.parse("def f():\n    from atft_pipeline.training.train import train\n")
    assert list(own(imported(tree))) == ["training.train"]
    assert list(own(imported(ast.parse("import atft_pipeline.model.gat")))) == ["model.gat"]


@pytest.mark.parametrize("folder", ["assets", "resources", "atft_pipeline"])
def test_no_folder_holds_more_modules_than_a_reader_takes_in(folder: str) -> None:
    for directory in {file.parent for file in (REPO / folder).rglob("*.py")}:
        names = [path.name for path in directory.glob("*.py") if path.name != "__init__.py"]
        assert len(names) <= MOST_MODULES, directory


def test_nothing_but_the_command_imports_the_generator() -> None:
    users = {module for module, tree in TREES.items() if "market.synthetic" in own(imported(tree))}
    assert users == {"cli.data"}


def test_the_library_never_imports_dagster() -> None:
    for module, tree in TREES.items():
        roots = {name.split(".")[0] for name in imported(tree)}
        assert not roots & {"dagster", "assets", "resources"}, module


PACKAGES_WITHOUT_A_WORD_OF_DAGSTER = ("runs", "verdict", "training")
"""They are used by the command line too: what a run is started with comes from the caller."""


def test_what_runs_and_judges_a_training_does_not_name_dagster() -> None:
    for name in PACKAGES_WITHOUT_A_WORD_OF_DAGSTER:
        for file in (REPO / "atft_pipeline" / name).rglob("*.py"):
            assert "dagster" not in file.read_text(encoding="utf-8").lower(), file


def environment_readers(tree: ast.Module) -> set[str]:
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return names & {"environ", "getenv", "environb"}


def test_only_resources_read_the_environment() -> None:
    readers = {module for module, tree in TREES.items() if environment_readers(tree)}
    assert readers == {"cli.arguments"}, "the command passes the environment on to report_overrides, as resources do"
    for file in sorted((REPO / "assets").rglob("*.py")):
        found = environment_readers(ast.parse(file.read_text(encoding="utf-8")))
        # `python -m assets` has no instance yet and looks where Dagster's own would be.
        assert not found or file.name == "__main__.py", file.name


def test_the_training_path_imports_only_what_a_gpu_machine_has() -> None:
    path, found = ["training.train", "monitoring.progress", "errors"], set[str]()
    seen: set[str] = set()
    while path:
        module = path.pop()
        if module in seen:
            continue
        seen.add(module)
        tree = TREES[module]
        found |= {name.split(".")[0] for name in imported(tree)}
        path += [name for name in own(imported(tree)) if name]
    third_party = found - set(sys.stdlib_module_names) - {"atft_pipeline", "__future__"}
    # Bootstrap intervals, sorted folds, building a graph: training does without
    # each where it is absent.
    lazily_used = {"arch", "numba", "threadpoolctl"}
    assert third_party - lazily_used <= THIRD_PARTY_OF_TRAINING


BLOCKER = f"""
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {BLOCKED!r} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""
"""sitecustomize of a machine on which the blocked packages are not installed: looking for one finds nothing."""


@pytest.mark.process(reason="commands in which every other package is absent")
def test_training_runs_where_nothing_else_is_installed(
    products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """train, evaluate and status as processes in which every other package is absent."""
    shutil.copytree(products, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / "sitecustomize.py").write_text(BLOCKER)

    def on_a_bare_machine(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "atft_pipeline.cli", *arguments],
            capture_output=True,
            text=True,
            env=environment({"PYTHONPATH": f"{tmp_path / 'absent'}:{REPO}"}),
        )

    refused = on_a_bare_machine("features", "source", "again.parquet")
    assert refused.returncode == 2
    assert refused.stderr == "atft features: needs the package polars, which is not installed here; install it\n"
    settings = ("--set", "train.epochs=1", "--set", "evaluation.criterion_epoch=20")
    trained = on_a_bare_machine("train", "d.parquet", "g.parquet", "runs/bare", *TRAIN_SETTINGS, *settings)
    assert trained.returncode == 0, trained.stderr
    evaluated = on_a_bare_machine("evaluate", "runs/bare/predictions/epoch_001.parquet", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    status = on_a_bare_machine("status", "--runs", "runs")
    assert status.returncode == 0, status.stderr
    assert "finished" in status.stdout
    monitored = on_a_bare_machine("monitor", "--runs", "runs", "--once")
    assert monitored.returncode == 2
    assert "which is not installed here; install it" in monitored.stderr


# --- tracked files ------------------------------------------------------------------------------------------


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("needs git and a checkout to know which files are tracked")
    return [REPO / name for name in listed.stdout.split("\0") if name and (REPO / name).is_file()]


MARKS = re.compile(
    "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3 + r"\b", "/ho" + r"me/\w", "/Us" + r"ers/\w", "/wo" + "rk/"])
)
"""Unfinished work, and paths of somebody's machine; spelled so that this file does not hold them."""


def test_tracked_files_hold_no_unfinished_work_and_no_path_of_a_machine() -> None:
    for file in tracked():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        hit = MARKS.search(text)
        assert hit is None, f"{file.relative_to(REPO)} holds {hit[0]!r}"


def test_marks_are_found_where_they_are() -> None:
    assert MARKS.search("# TO" + "DO later")
    assert MARKS.search("/ho" + "me/someone/data")
    assert not MARKS.search("to do, at home")


def test_nothing_generated_is_tracked() -> None:
    names = [file.relative_to(REPO).as_posix() for file in tracked()]
    assert not [name for name in names if name.endswith((".parquet", ".pt", ".pyc", ".db"))]
    assert not [name for name in names if name.startswith("output/") and not name.endswith(".gitkeep")]
