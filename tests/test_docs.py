"""The documents agree with the code: links, commands, assets, targets, generated tables and paths.

Each check is a function from text to a list of complaints. It must find nothing in any document, and must find the
fault in a text that has one on purpose.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets.definitions import defs
from atft_pipeline.cli.parser import atft_parser
from atft_pipeline.config.overrides import REPORT_VARIABLES
from atft_pipeline.errors import InputError
from atft_pipeline.features.registry import markdown_table
from resources.compute import Compute

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
MAX_README_LINES = 120

GENERATED: dict[str, Callable[[], str]] = {"features": markdown_table}
"""Tables that are made in an instant: what stands between their markers is what their generator writes."""
MEASURED = ("make-run", "results", "robustness", "quality", "diagnostics", "test-times")
"""Tables that a run or a bench writes: their markers stand in one document each."""

OVERRIDE_SECTIONS = ("dataset", "graph", "split", "model", "train", "evaluation")
REPOSITORY_FOLDERS = ("atft_pipeline", "assets", "resources", "tests", "bench", "docs")
REPOSITORY_FILES = ("Makefile", "README.md", "constraints.txt", "dagster.yaml", "pyproject.toml", "workspace.yaml")

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


# Reading Markdown -----------------------------------------------------------------------------------------------------


def prose_and_code(text: str) -> tuple[str, list[str], list[str]]:
    """The text without its fenced blocks, the lines of these (a trailing backslash joins two), and its code spans."""
    prose, fenced, inside = [], [], False
    for line in text.replace("\\\n", " ").splitlines():
        if line.lstrip().startswith("```"):
            inside = not inside
        else:
            (fenced if inside else prose).append(line)
    # In a table a bar within code is escaped.
    spans = [span.replace(r"\|", "|") for span in re.findall(r"`([^`\n]+)`", "\n".join(prose))]
    return "\n".join(prose), fenced, spans


def commands(text: str, program: str) -> Iterator[list[str]]:
    """The arguments of every call of `program` in fenced blocks and code spans, variables before it left out."""
    _, fenced, spans = prose_and_code(text)
    for line in (*fenced, *spans):
        for command in line.split("&&"):
            if program in command:
                with contextlib.suppress(ValueError):  # a quote that does not end: no command
                    words = shlex.split(command, comments=True)
                    if program in words:
                        yield words[words.index(program) + 1 :]


def headings(text: str) -> set[str]:
    """Anchors of the headings, as code hosts make them."""
    anchors: set[str] = set()
    for title in re.findall(r"^#{1,6} +(.+?)\s*$", prose_and_code(text)[0], re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        repeated = (f"{slug}-{n}" for n in range(1, 99))
        anchors.add(slug if slug not in anchors else next(name for name in repeated if name not in anchors))
    return anchors


def section(text: str, name: str) -> str:
    """What stands between the markers of `name`."""
    return text.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0].strip()


# Checks ---------------------------------------------------------------------------------------------------------------


def broken_links(document: Path, text: str) -> list[str]:
    """Relative links to no file of the repository, or to no heading of it."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_and_code(text)[0]):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        if not target.is_relative_to(ROOT) or not target.exists():
            broken.append(link)
            continue
        linked = text if target == document else target.read_text(encoding="utf-8") if anchor else ""
        if anchor and anchor not in headings(linked):
            broken.append(link)
    return broken


def refused_atft_commands(text: str) -> list[str]:
    """Calls of `.venv/bin/atft` that its parser or its configuration refuses, with the reason."""
    refused = []
    for arguments in commands(text, ".venv/bin/atft"):
        reason = io.StringIO()
        try:
            with contextlib.redirect_stderr(reason):
                options = atft_parser().parse_args(arguments)
            assignments = dict(text.partition("=")[::2] for text in getattr(options, "set", []))
            _require_fields(getattr(options, "preset", "quick"), {name: _value(v) for name, v in assignments.items()})
        except SystemExit as stop:
            if stop.code:
                refused.append(f"{shlex.join(arguments)}: {reason.getvalue().strip()}")
        except InputError as error:
            refused.append(f"{shlex.join(arguments)}: {error}")
    return refused


def unknown_atft_mentions(text: str) -> list[str]:
    """Code spans such as `atft train --force` whose command, or one of whose options, `atft` does not have."""
    known = subcommands()
    unknown = []
    for span in prose_and_code(text)[2]:
        for name, rest in re.findall(r"^atft ([a-z-]+)(.*)", span):
            options = re.findall(r"(?<!\S)--[a-z-]+", rest)
            if name not in known or any(option not in known[name]._option_string_actions for option in options):
                unknown.append(span)
    return unknown


def unknown_targets(text: str) -> list[str]:
    """Targets of `make` in fenced blocks and code spans that the Makefile does not have."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    _, fenced, spans = prose_and_code(text)
    named = [name for line in (*fenced, *spans) for name in re.findall(r"(?:^|&& *)make ([a-z][a-z-]*)", line.strip())]
    return [name for name in named if not re.search(rf"^{name}:", makefile, re.MULTILINE)]


def refused_dagster_commands(text: str) -> list[str]:
    """Calls of `dagster asset materialize` and `dg launch` whose assets, job, partition or config do not exist."""
    refused = []
    for program in (".venv/bin/dagster", ".venv/bin/dg", "..."):  # "...": the first words are left out of a cell
        for arguments in commands(text, program):
            options = dict(itertools.pairwise(arguments))
            try:
                _require_launchable(options)
            except (dg.DagsterError, InputError, LookupError, ValueError) as error:
                refused.append(f"{shlex.join(arguments)}: {error}")
    return refused


def unknown_assets(text: str) -> list[str]:
    """Names of the form `model_20ep` that are no asset and no op."""
    named = set(re.findall(r"`([a-z_]+_\d+ep)`", text))
    return sorted(named - asset_names() - {f"train_{epochs}ep" for epochs in run_lengths()})


def missing_paths(text: str) -> list[str]:
    """Files and folders of the repository that code spans and fenced blocks name and that are not there."""
    _, fenced, spans = prose_and_code(text)
    folders = "|".join(REPOSITORY_FOLDERS)
    named: list[str] = []
    for code in (*fenced, *spans):
        named += re.findall(rf"(?<![\w./-])(?:{folders})/[\w./*-]*", code)
        named += [word for word in code.split() if word in REPOSITORY_FILES]
    return sorted({path for path in named if not any(ROOT.glob(path.rstrip("/.")))})


def foreign_paths(text: str) -> list[str]:
    """Absolute paths in code that a reader's machine does not have, and paths above the repository."""
    _, fenced, spans = prose_and_code(text)
    words = [word for code in (*fenced, *spans) for word in re.findall(r"(?<![\w./:*-])(?:/|\.\./)[\w./-]*", code)]
    return [word for word in words if not word.startswith(("/tmp/", "/path/to/")) and word not in ("/", "/tmp")]


def differing_tables(text: str) -> list[str]:
    """Generated tables in the text that are not what their generators write."""
    present = [name for name in GENERATED if f"<!-- {name} -->" in text]
    return [name for name in present if section(text, name) != GENERATED[name]().strip()]


def misplaced_markers(texts: list[str]) -> list[str]:
    """Markers of tables that do not stand in exactly one of the texts."""
    markers = [marker for name in (*GENERATED, *MEASURED) for marker in (f"<!-- {name} -->", f"<!-- /{name} -->")]
    return [marker for marker in markers if sum(text.count(marker) for text in texts) != 1]


def benches_elsewhere(makefile: str) -> list[str]:
    """Documents into which the Makefile lets a bench write, and that do not hold its table."""
    written = re.findall(r"-m bench\.(?:\w+\.)*(\w+) .*?([\w/-]+\.md)", makefile)
    return [file for name, file in written if f"<!-- {name} -->" not in (ROOT / file).read_text("utf-8")]


def excess_lines(readme: str) -> int:
    return max(0, len(readme.splitlines()) - MAX_README_LINES)


def unnamed_packages(readme: str) -> list[str]:
    """Packages of the library that the text does not name."""
    packages = [path.parent.name for path in sorted((ROOT / "atft_pipeline").glob("*/__init__.py"))]
    return [name for name in packages if f"`{name}/`" not in readme]


def undocumented_commands(text: str) -> list[list[str]]:
    """`atft` commands, each with its aliases, of which the text calls none."""
    aliases: dict[int, list[str]] = {}
    for name, sub in subcommands().items():
        aliases.setdefault(id(sub), []).append(name)
    return [names for names in aliases.values() if not any(f".venv/bin/atft {name} " in text for name in names)]


def unnamed_variables(text: str) -> list[str]:
    """Variables of the validation report that the text does not name."""
    return [variable for variable in REPORT_VARIABLES if f"`{variable}`" not in text]


def unlinked_documents(readme: str) -> list[Path]:
    """Documents that the text does not link."""
    links = {ROOT / link for link in re.findall(r"\]\((docs/[\w-]+\.md)", readme)}
    return [path for path in DOCUMENTS if path != README and path not in links]


def unordered_terms(text: str) -> list[str]:
    """Terms of the glossary that stand before one that the alphabet puts first."""
    terms = [term.lower() for term in re.findall(r"^\*\*(.+?)\.?\*\*", text, re.MULTILINE)]
    return [later for earlier, later in itertools.pairwise(terms) if earlier > later]


# What exists ----------------------------------------------------------------------------------------------------------


@cache
def subcommands() -> dict[str, argparse.ArgumentParser]:
    """Parser of every `atft` command, aliases included."""
    actions = atft_parser()._actions
    return dict(next(a for a in actions if isinstance(a, argparse._SubParsersAction)).choices)


@cache
def asset_names() -> set[str]:
    return {key.to_user_string() for key in defs.resolve_asset_graph().get_all_asset_keys()}


def run_lengths() -> set[int]:
    return {int(found[1]) for name in asset_names() if (found := re.fullmatch(r"model_(\d+)ep", name))}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _require_fields(preset: str, overrides: dict[str, Any]) -> None:
    """Raises InputError for a preset or a field that does not exist, and for a value of another type."""
    compute = Compute(preset=preset)
    compute.configuration("document", sections=OVERRIDE_SECTIONS, embedded=True, overrides=overrides)


def _require_launchable(options: dict[str, str]) -> None:
    repository = defs.get_repository_def()
    config = json.loads(options.get("--config-json", "{}"))
    if "--job" in options:
        job = repository.get_job(options["--job"])
        if "--partition" in options:
            assert job.partitions_def is not None
            if options["--partition"] not in job.partitions_def.get_partition_keys():
                raise LookupError(f"no partition {options['--partition']}")
    elif "--select" in options:
        selection = dg.AssetSelection.from_coercible(options["--select"].split(","))
        keys = selection.resolve(repository.asset_graph)
        whole = repository.get_implicit_job_def_for_assets(keys)
        assert whole is not None
        job = whole.get_subset(asset_selection=keys)
    elif config:  # a cell that shows the config alone
        job = repository.get_implicit_global_asset_job_def()
    else:
        return
    # Dagster ignores the config of an op that is not selected.
    unread = set(config.get("ops", {})) - {node.name for node in job.nodes}
    if unread:
        raise LookupError(f"no op {', '.join(sorted(unread))} among what is selected")
    if config:
        dg.validate_run_config(job, config)
    for op in config.get("ops", {}).values():
        _require_fields("quick", op.get("config", {}).get("overrides", {}))


# The documents --------------------------------------------------------------------------------------------------------


@documents
def test_links_lead_somewhere(document: Path) -> None:
    assert broken_links(document, document.read_text(encoding="utf-8")) == []


@documents
def test_atft_commands_parse(document: Path) -> None:
    assert refused_atft_commands(document.read_text(encoding="utf-8")) == []
    assert unknown_atft_mentions(document.read_text(encoding="utf-8")) == []


@documents
def test_make_targets_exist(document: Path) -> None:
    assert unknown_targets(document.read_text(encoding="utf-8")) == []


@documents
def test_dagster_commands_can_be_launched(document: Path) -> None:
    assert refused_dagster_commands(document.read_text(encoding="utf-8")) == []
    assert unknown_assets(document.read_text(encoding="utf-8")) == []


@documents
def test_paths_are_in_the_repository(document: Path) -> None:
    assert missing_paths(document.read_text(encoding="utf-8")) == []


@documents
def test_no_path_of_one_machine_is_cited(document: Path) -> None:
    assert foreign_paths(document.read_text(encoding="utf-8")) == []


def test_every_document_is_reached_from_the_readme() -> None:
    assert unlinked_documents(README.read_text(encoding="utf-8")) == []


def test_readme_is_short() -> None:
    assert excess_lines(README.read_text(encoding="utf-8")) == 0


def test_readme_names_every_package_of_the_library() -> None:
    assert unnamed_packages(README.read_text(encoding="utf-8")) == []


def test_every_command_is_documented() -> None:
    assert undocumented_commands((ROOT / "docs" / "commands.md").read_text(encoding="utf-8")) == []


def test_every_report_variable_is_named() -> None:
    assert unnamed_variables("".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)) == []


def test_every_table_stands_in_one_document() -> None:
    assert misplaced_markers([path.read_text(encoding="utf-8") for path in DOCUMENTS]) == []


@documents
def test_generated_tables_are_what_their_generators_write(document: Path) -> None:
    assert differing_tables(document.read_text(encoding="utf-8")) == []


def test_benches_of_the_makefile_write_where_their_tables_are() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "-m bench." in makefile
    assert benches_elsewhere(makefile) == []


def test_glossary_is_alphabetical() -> None:
    assert unordered_terms((ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")) == []


# The checks find what is planted --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "See [there](no-such-file.md).",
        "See [below](#no-such-heading).\n\n## Another heading",
        "See [the targets](Makefile#no-heading-here).",
        "See [outside](../elsewhere.md).",
    ],
)
def test_a_broken_link_is_found(text: str) -> None:
    assert len(broken_links(README, text)) == 1


def test_a_sound_link_is_not() -> None:
    text = "[a](#a-heading-of-82) [b](Makefile) [c](#a-heading-of-82-1) [d](https://a.org)\n# A heading: of `82`\n"
    assert broken_links(README, text + "## A heading of 82\n```\n[no](link)\n```") == []


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train DATASET GRAPH", "RUN_DIR"),
        ("train DATASET GRAPH RUN --no-such-option", "--no-such-option"),
        ("no-such-command RUN", "no-such-command"),
        ("train DATASET GRAPH RUN --set train.optimizer.learning_rate=1", "learning_rate"),
        ("train DATASET GRAPH RUN --preset huge", "huge"),
    ],
)
def test_a_command_that_atft_refuses_is_found(command: str, said: str) -> None:
    for text in (f"```\n.venv/bin/atft {command}\n```", f"| it | `X=1 .venv/bin/atft {command}` |"):
        (refusal,) = refused_atft_commands(text)
        assert said in refusal
    assert refused_atft_commands("```\n.venv/bin/atft train DATASET \\\n    GRAPH RUN --set train.epochs=3\n```") == []


def test_a_mention_of_an_unknown_command_or_option_is_found() -> None:
    text = "`atft train --force`, `atft tame`, `atft status --loudly`"
    assert unknown_atft_mentions(text) == ["atft tame", "atft status --loudly"]


def test_an_unknown_target_is_found() -> None:
    assert unknown_targets("`make run`, `make haste`\n```\nmake lint && make hay  # while\n```\nand make merry") == [
        "hay",
        "haste",
    ]


@pytest.mark.parametrize(
    "command",
    [
        ".venv/bin/dagster asset materialize --select model_21ep",
        ".venv/bin/dagster asset materialize --select 'model_20ep,no_such_asset'",
        """.venv/bin/dagster asset materialize --select model_20ep --config-json '{"ops": {"train_50ep": {}}}'""",
        """... --config-json '{"ops": {"train_50ep": {"config": {"overrides": {"model.width": 64}}}}}'""",
        """... --config-json '{"ops": {"train_50ep": {"config": {"no_such_field": 1}}}}'""",
        """... --config-json '{"ops": {"train_51ep": {}}}'""",
        ".venv/bin/dg launch --job no_such_job",
        ".venv/bin/dg launch --job experiments --partition Z",
    ],
)
def test_a_dagster_command_that_cannot_be_launched_is_found(command: str) -> None:
    assert len(refused_dagster_commands(f"| it | `{command}` |")) == 1


def test_one_that_can_is_not() -> None:
    text = (
        "`.venv/bin/dagster asset materialize --select '+key:model_20ep'`, `.venv/bin/dg launch --job nightly_retrain`"
    )
    assert refused_dagster_commands(text) == []


def test_an_unknown_asset_is_found() -> None:
    assert unknown_assets("`model_20ep`, `train_5ep`, `model_21ep`, `picture_20ep`") == ["model_21ep", "picture_20ep"]


def test_a_path_that_is_not_there_is_found() -> None:
    text = "`atft_pipeline/`, `atft_pipeline/nowhere.py`, `Makefile`, `output/runs/any`\n```\nbench/none.py A\n```"
    assert missing_paths(text) == ["atft_pipeline/nowhere.py", "bench/none.py"]


def test_a_path_of_one_machine_is_found() -> None:
    text = "`/tmp/run`, `/srv/run`\n```\ncat ../notes.md /path/to/source https://example.org/a\n```"
    assert foreign_paths(text) == ["../notes.md", "/srv/run"]


def test_a_term_out_of_order_is_found() -> None:
    assert unordered_terms("**Alpha**. A.\n\n**gamma**. C.\n\n**Beta**. B.\n") == ["beta"]


def test_a_table_of_another_registry_is_found() -> None:
    sound = f"<!-- features -->\n{markdown_table()}<!-- /features -->"
    assert differing_tables(sound) == []
    assert differing_tables(sound.replace("`returns_5d`", "`returns_6d`")) == ["features"]


def test_a_marker_that_is_lost_or_doubled_is_found() -> None:
    whole = "".join(f"<!-- {name} --><!-- /{name} -->" for name in (*GENERATED, *MEASURED))
    assert misplaced_markers([whole, "no table"]) == []
    assert misplaced_markers([whole, "<!-- quality -->"]) == ["<!-- quality -->"]
    assert misplaced_markers([whole.replace("<!-- /results -->", "")]) == ["<!-- /results -->"]


def test_a_bench_that_writes_into_another_document_is_found() -> None:
    assert benches_elsewhere("python -m bench.evaluation.quality output --document docs/synthetic-market.md") == []
    assert benches_elsewhere("python -m bench.evaluation.quality output --document docs/glossary.md") == [
        "docs/glossary.md"
    ]


def test_a_long_readme_is_found() -> None:
    assert (excess_lines("line\n" * MAX_README_LINES), excess_lines("line\n" * (MAX_README_LINES + 2))) == (0, 2)


def test_what_is_left_out_is_found() -> None:
    readme = README.read_text(encoding="utf-8")
    assert unnamed_packages(readme.replace("`features/`", "")) == ["features"]
    assert unlinked_documents(readme.replace("docs/glossary.md", "")) == [ROOT / "docs" / "glossary.md"]
    everything = "".join(f".venv/bin/atft {name} " for name in subcommands())
    assert undocumented_commands(everything) == []
    assert undocumented_commands(everything.replace("atft train ", "")) == [["train"]]
    assert unnamed_variables("".join(f"`{variable}`" for variable in list(REPORT_VARIABLES)[1:])) == ["SHARPE_WEIGHT"]


def test_planted_files_do_not_count(tmp_path: Path) -> None:
    """A check reads the repository, whatever the working directory."""
    here = Path.cwd()
    try:
        os.chdir(tmp_path)
        (tmp_path / "bench").mkdir()
        (tmp_path / "bench" / "none.py").touch()
        assert missing_paths("`bench/none.py`") == ["bench/none.py"]
    finally:
        os.chdir(here)
