"""Output for people: colours and bars on a terminal, the same lines in plain text everywhere else."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from atft_process import atft_here, environment
from run_directories import Tables, healthy

from atft_pipeline.cli import progress
from atft_pipeline.cli.console import fitting, plain, show
from atft_pipeline.cli.data import dataset_blocks, graph_facts
from atft_pipeline.cli.progress import ProgressBar
from atft_pipeline.cli.reply import Block, Cell, Facts, Sentences, Table, facts
from atft_pipeline.cli.training import verdict_blocks
from atft_pipeline.monitoring.number_format import COLOURS, verdict_colour

COLOUR = re.compile(r"\x1b\[[0-9;]*(?:3[0-7]|38|9[0-7])[0-9;]*m")
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")
GREEN, RED, YELLOW = "\x1b[32m", "\x1b[31m", "\x1b[33m"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _a_colour_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)


def shown(*blocks: Block, columns: int = 80, monkeypatch: pytest.MonkeyPatch | None = None) -> str:
    """The blocks on a terminal of that many columns."""
    if monkeypatch is not None:
        monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal()
    show(blocks, 0.0, terminal)
    return terminal.getvalue()


def in_a_terminal(command: list[str], columns: int = 80, **variables: str) -> str:
    """What a command writes to a pseudo terminal, which is its stdin, stdout and stderr."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    written: list[bytes] = []

    def read() -> None:
        try:
            while chunk := os.read(ours, 4096):
                written.append(chunk)
        except OSError:  # Linux says so when the other side has closed
            return

    variables = {"TERM": "xterm-256color", **variables}
    env = {name: value for name, value in environment(variables).items() if name != "COLUMNS"}
    reader = threading.Thread(target=read)
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        reader.start()
        assert process.wait(timeout=120) == 0
    reader.join(timeout=10)
    os.close(ours)
    return b"".join(written).decode().replace("\r\n", "\n")


# --- a real terminal ------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    tables = healthy()
    Tables(tables.run, tables.verdict, [], [], []).write(tmp_path / "sound")
    Tables(tables.run | {"status": "running"}, tables.verdict, [], [], []).write(tmp_path / "stopped")
    return tmp_path


def status(runs: Path, **variables: str) -> str:
    return in_a_terminal([sys.executable, "-m", "atft_pipeline.cli", "status", "--runs", str(runs)], **variables)


@pytest.mark.process(reason="the command in a pseudo terminal")
def test_a_terminal_shows_states_in_colour(runs: Path) -> None:
    assert "\x1b[36mfinished" in status(runs)
    assert f"{RED}killed" in status(runs)


@pytest.mark.process(reason="the command in a pseudo terminal")
@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_who_wants_no_colour_sees_none(variables: dict[str, str], runs: Path) -> None:
    text = status(runs, **variables)
    assert "finished" in text
    assert COLOUR.search(text) is None


def test_a_pipe_gets_the_same_table_without_control_characters(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert atft_here("status", "--runs", runs) == 0
    text = capsys.readouterr().out
    assert CONTROL.search(text) is None
    assert re.search(r"^ +sound +finished +20/20 ", text, re.MULTILINE)
    assert re.search(r"^ +stopped +killed +20/20 ", text, re.MULTILINE)


# --- blocks ---------------------------------------------------------------------------------------------------

VERDICT: dict[str, Any] = {
    "run_dir": "runs/a", "reused": False, "status": "passed", "summary": "passed: Sharpe 0.142 > 0.10",
    "final": {"validation": {"sharpe_daily": 0.142, "sharpe_se": 0.05, "sharpe_daily_net": None, "ic_mean": 0.03}},
    "validity": [{"name": "targets_match_prices", "passed": True}], "health": [{"name": "finite", "passed": False}],
    "milestones": [{"name": "sharpe_by_epoch_20", "passed": None}], "run_key": "k", "warnings": [],
    "reversal_sharpe": 0.61,
}  # fmt: skip
MANIFEST: dict[str, Any] = {
    "path": "d", "rows": 23213, "sessions": 400, "stocks": 59, "first_date": "2022-04-04", "last_date": "2023-11-16",
    "live": "55 of 82", "quarantine": {"not_listed": 3, "not_common_stock": 4}, "fingerprint": "9df3bbfb" * 8,
    "warnings": ["tables are missing"],
    "changes": {"months_computed": [f"2022-{m:02}" for m in range(1, 13)], "months_reused": ["2021-12"]},
}  # fmt: skip
GRAPH: dict[str, Any] = {
    "path": "g", "dataset_fingerprint": "9df3bbfb" * 8, "fingerprint": "243d7071" * 8, "refresh_dates": 68,
    "edges": 33040, "mean_degree": 9.96, "months_computed": ["2022-04"] * 300, "months_reused": [],
    "config": {
        "universe": "liquid", "lookback_sessions": 250, "sector_demeaned": True, "refresh_sessions": 5,
        "neighbours": 10,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("status", "summary", "code"),
    [
        ("passed", "passed: Sharpe 0.142", GREEN),
        ("passed", "passed, insufficient evidence: Sharpe 0.142", YELLOW),
        ("failed", "failed: Sharpe 0.05", RED),
        ("invalid", "invalid: scores are constant", RED),
        ("not_applicable", "not_applicable: 1 epoch", YELLOW),
    ],
)
def test_a_verdict_has_the_colour_of_its_news(status: str, summary: str, code: str) -> None:
    text = shown(*verdict_blocks(VERDICT | {"status": status, "summary": summary}))
    assert f"{code}{status}" in text


def test_checks_that_failed_are_named_in_red_and_unmeasured_ones_in_yellow() -> None:
    text = shown(*verdict_blocks(VERDICT))
    assert f"{GREEN}all 1 passed" in text
    assert f"{RED}1 of 1 failed: finite" in text
    assert f"{YELLOW}not measured: sharpe_by_epoch_20" in text


def test_every_coloured_word_has_a_colour_that_a_terminal_has() -> None:
    from rich.style import Style

    assert all(Style.parse(colour).color for colour in COLOURS.values())
    assert verdict_colour("passed", "passed") == "green" != verdict_colour("failed", "insufficient evidence")


def lines_of(*blocks: Block) -> list[str]:
    return [line for block in blocks for line in plain(block)]


def test_a_dataset_is_ten_lines_however_many_months_it_has() -> None:
    many = MANIFEST | {"changes": {"months_computed": ["2022-01"] * 300, "months_reused": []}}
    blocks = dataset_blocks(many, {"investable": 19743, "liquid": 16571})
    assert [line.split(":")[0] for line in lines_of(*blocks)] == [
        "dataset", "rows", "sessions", "stocks", "features", "universe", "quarantine", "months", "fingerprint",
        "warnings", "  tables are missing",
    ]  # fmt: skip
    text = "\n".join(lines_of(*blocks))
    assert "universe: investable 19,743 (85%), liquid 16,571 (71%)" in text
    assert "quarantine: not_listed 3, not_common_stock 4" in text
    assert "months: 300 computed, 0 reused" in text
    assert "400 from 2022-04-04 to 2023-11-16" in text


def test_a_graph_is_ten_lines_however_many_months_it_has() -> None:
    assert len(lines_of(graph_facts(GRAPH))) == 9
    assert "mean degree: 9.96, at most 10" in lines_of(graph_facts(GRAPH))


def test_the_seconds_of_a_command_are_its_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    show([facts(("rows", 3), timed=True), facts(("of", 4))], 75.2)
    assert capsys.readouterr().out == "rows: 3\ntook: 1 min 15 s\nof: 4\n"


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_terminal_shows_the_words_of_the_plain_text(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [*verdict_blocks(VERDICT), *dataset_blocks(MANIFEST, {"liquid": 16571}), graph_facts(GRAPH), WIDE]
    text = ESCAPE.sub("", shown(*blocks, columns=columns, monkeypatch=monkeypatch))
    words = {word.rstrip(":") for line in lines_of(*blocks) for word in line.split()}
    assert words <= {word.rstrip(":") for word in text.split()}, "no word and no figure is broken or lost"
    assert max(map(len, text.splitlines())) <= columns


FIGURES = tuple(f"{number}.{number}{number}e-06" for number in range(1, 9))
WIDE = Table("wide", ["run", *(f"figure_{n}" for n in range(8))], [[Cell("a"), *map(Cell, FIGURES)]])


def test_a_table_too_wide_stands_in_parts_each_with_its_first_column() -> None:
    parts = fitting(WIDE, 60)
    assert len(parts) > 1
    assert all(part.header[0] == "run" for part in parts)
    assert [name for part in parts for name in part.header[1:]] == list(WIDE.header[1:])
    assert len(fitting(WIDE, 200)) == 1
    assert [part.header for part in fitting(WIDE, 5)] == [["run", name] for name in WIDE.header[1:]]


def test_what_a_record_holds_reaches_no_terminal_as_a_command() -> None:
    blocks = (
        Facts([("name", Cell("\x1b[2Jgone [red]x[/red]"))]),
        Sentences("said", ["\x1b[2Jgone [red]x[/red]"]),
        Table("table", ["a", "b"], [[Cell("\x1b[2J"), Cell("[red]x[/red]")]]),
    )
    assert "\x1b[2J" not in shown(*blocks)
    assert shown(*blocks).count("[red]x[/red]") == 3
    assert not any(CONTROL.search(line) for line in lines_of(*blocks))


def test_an_empty_list_is_said() -> None:
    assert plain(Sentences("alarms", [])) == ["alarms: none"]


def test_without_rich_a_terminal_gets_the_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert shown(facts(("rows", 3))) == "rows: 3\n"


# --- the bar --------------------------------------------------------------------------------------------------


def bar_on(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, *, hidden: bool = False) -> str:
    """A training of three epochs, of which two end while the bar is shown."""
    monkeypatch.setattr(progress, "WAIT_S", 0.0)
    monkeypatch.setattr(sys, "stderr", stream)
    with ProgressBar("training", unit="epochs", hidden=hidden) as bar:
        while not hidden and stream.isatty() and bar._bar is None:
            time.sleep(0.01)
        for epoch in (1, 2):
            bar.say(f"epoch {epoch}/3  loss 1.0")
            time.sleep(0.3)
        bar.say("run a: passed")
    return stream.getvalue()


def test_the_epochs_of_a_training_advance_a_bar_below_their_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    text = ESCAPE.sub("", bar_on(Terminal(), monkeypatch))
    assert "1/3 epochs" in text
    assert "2/3 epochs" in text
    for line in ("epoch 1/3  loss 1.0", "epoch 2/3  loss 1.0", "run a: passed"):
        assert re.search(rf"(^|[\r\n]){line}\s*\n", text)


def test_the_cursor_comes_back_whatever_ends_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(progress, "WAIT_S", 0.0)
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(KeyboardInterrupt), ProgressBar("work") as bar:  # noqa: PT012
        while bar._bar is None or not terminal.getvalue():
            time.sleep(0.01)
        raise KeyboardInterrupt
    text = terminal.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert sys.stderr is terminal


def test_without_a_terminal_there_are_the_lines_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "epoch 1/3  loss 1.0\nepoch 2/3  loss 1.0\nrun a: passed\n"
    assert bar_on(io.StringIO(), monkeypatch) == lines
    assert bar_on(Terminal(), monkeypatch, hidden=True) == lines


def test_a_dumb_terminal_shows_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(progress, "WAIT_S", 0.0)
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressBar("work") as bar:
        bar._timer.join(timeout=60)
        bar.advance("work", 1, 2)
    assert terminal.getvalue() == ""


def test_what_ends_at_once_shows_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressBar("work"):
        pass
    assert terminal.getvalue() == ""
