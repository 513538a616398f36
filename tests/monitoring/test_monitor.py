"""`atft monitor`: what it shows of running runs, when it warns, and how it ends."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from atft_process import ATFT, atft_here, content, environment
from run_directories import BASE_LR, EPOCHS, Tables, healthy

from atft_pipeline.diagnostics.diagnose import diagnose
from atft_pipeline.inspection.reader import open_record
from atft_pipeline.monitoring import monitor
from atft_pipeline.monitoring import persistent_warnings as warned
from atft_pipeline.monitoring.dashboard import plain, screen, sparkline
from atft_pipeline.monitoring.number_format import duration
from atft_pipeline.monitoring.persistent_warnings import PersistentWarning, complete_epochs, persistent_warnings
from atft_pipeline.monitoring.progress import RunProgress, read_progress
from atft_pipeline.runs.lock import exclusive
from atft_pipeline.training.distributed import interrupts

NOW_S = 2e9
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


def going_on(tables: Tables, run_dir: Path, epochs: int = 2 * EPOCHS) -> Path:
    """A run directory as it lies after 20 epochs of more: still running, and without a verdict."""
    tables.run |= {"status": "running", "ended": None, "epochs_planned": epochs}
    tables.run["config"]["train"]["schedule"]["name"] = "constant"  # a cosine of 20 epochs is none of 40
    tables.set_series("lr", lambda _: BASE_LR)
    tables.write(run_dir)
    (run_dir / "verdict.json").unlink()
    (run_dir / ".lock").touch()
    return run_dir


def resets(first: int) -> Tables:
    """A run whose head was re-drawn at five epochs from `first` on: the rule for it fires from the fifth on."""
    tables = healthy()
    tables.set_series("degeneracy_reset", lambda epoch: float(first <= epoch < first + 5))
    return tables


def unmeasured() -> Tables:
    """A run of which only run.json and the verdict are read, where its state is what matters."""
    tables = healthy()
    return Tables(tables.run, tables.verdict, [], [], [])


@contextmanager
def held(run_dir: Path) -> Iterator[Path]:
    """A process writes the run."""
    with exclusive(run_dir):
        yield run_dir


def frame_of(run_dir: Path) -> monitor.Frame:
    return monitor.look_at_run(run_dir)(NOW_S)


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = atft_here("monitor", *arguments)
    return code, capsys.readouterr().out


# --- the record as it stood -----------------------------------------------------------------------------------


def test_the_record_until_an_epoch_knows_nothing_of_later_ones(tmp_path: Path) -> None:
    run = healthy().write(tmp_path / "run")
    record = open_record(run, until_epoch=7)
    for table in ("series", "evals", "daily"):
        assert record.scalar(f"SELECT max(epoch) FROM {table}") == 7
    assert sorted(record.predictions) == [1, 5]
    assert record.verdict == {}
    assert (record.run["status"], record.epochs_done, record.is_locked) == ("running", 7, True)


def test_the_record_until_the_last_epoch_is_the_record(tmp_path: Path) -> None:
    run = healthy().write(tmp_path / "run")
    past, whole = open_record(run, until_epoch=EPOCHS), open_record(run)
    assert (past.run, past.verdict, past.predictions) == (whole.run, whole.verdict, whole.predictions)
    assert past.rows("FROM series ORDER BY ALL") == whole.rows("FROM series ORDER BY ALL")


def test_the_record_until_an_epoch_reads_no_later_row_of_an_earlier_part(tmp_path: Path) -> None:
    run = healthy().write(tmp_path / "run")
    (run / "evals" / "epoch_020.parquet").rename(run / "evals" / "epoch_000.parquet")
    assert open_record(run, until_epoch=7).scalar("SELECT max(epoch) FROM evals") == 7


# --- warnings -------------------------------------------------------------------------------------------------


def test_a_rule_fired_at_three_epochs_warns_and_says_since_when(tmp_path: Path) -> None:
    (warning,) = persistent_warnings(going_on(resets(first=14), tmp_path / "run"))
    assert (warning.rule, warning.since_epoch, warning.or_earlier) == ("degeneracy_resets_many", 18, True)
    assert warning.evidence.startswith("5 resets")


def test_a_rule_fired_at_two_epochs_does_not_warn(tmp_path: Path) -> None:
    run = going_on(resets(first=15), tmp_path / "run")
    assert persistent_warnings(run) == ()
    assert [run_fired(run, epoch) for epoch in (18, 19, 20)] == [False, True, True]


def run_fired(run: Path, epoch: int) -> bool:
    return "degeneracy_resets_many" in warned._assess(run, epoch)


def test_a_rule_that_fires_no_more_does_not_warn(tmp_path: Path) -> None:
    """Without a gradient at every epoch, until the newest one brings it."""
    for newest, warns in ((0.0, True), (0.2, False)):
        tables = healthy()
        tables.set_series("grad_l2", lambda epoch, newest=newest: newest if epoch == EPOCHS else 0.0, component="gat")
        run = going_on(tables, tmp_path / str(newest))
        assert ("component_without_gradient" in {warning.rule for warning in persistent_warnings(run)}) == warns
    assert "component_without_gradient" in warned._assess(run, EPOCHS - 1)


@pytest.mark.parametrize(("demanded", "warns"), [(99.0, True), (-99.0, False)])
def test_an_observation_is_no_warning(demanded: float, warns: bool, tmp_path: Path) -> None:
    """What would explain a low Sharpe is an observation where the Sharpe is not low."""
    tables = healthy(overrides={"evaluation.criterion_sharpe": demanded})
    tables.set_series("gradient_warning", lambda _: 1.0, component="gat")
    rules = {warning.rule for warning in persistent_warnings(going_on(tables, tmp_path / "run"))}
    assert ("gradient_warnings" in rules) == warns


@pytest.mark.parametrize("rule", ["sampling_noise", "sharpe_below_demanded"])
def test_a_sharpe_within_chance_of_what_is_demanded_is_no_warning(rule: str, tmp_path: Path) -> None:
    """One that is below beyond chance is."""
    tables = healthy()
    tables.set_evals("sharpe_daily", lambda _: 0.05 if rule == "sampling_noise" else -0.4)
    run = going_on(tables, tmp_path / "run")
    assert next(f for f in diagnose(run).findings if f.rule == rule).status == "fired"
    assert (rule in {warning.rule for warning in persistent_warnings(run)}) == (rule == "sharpe_below_demanded")


def test_a_run_of_two_epochs_has_no_warning_yet(tmp_path: Path) -> None:
    tables = resets(first=-3)  # more than allowed from the first epoch on
    tables.set_series("degeneracy_reset", lambda _: 5.0)
    for done, warns in ((2, False), (3, True)):
        tables.run["epochs_done"] = done
        assert bool(persistent_warnings(going_on(tables, tmp_path / str(done)))) == warns


def test_an_epoch_that_is_being_written_is_not_judged(tmp_path: Path) -> None:
    tables = healthy()
    tables.run["epochs_done"] = EPOCHS - 1
    assert complete_epochs(going_on(tables, tmp_path / "run")) == list(range(1, EPOCHS))


def test_an_epoch_is_assessed_once_and_again_when_its_files_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = going_on(resets(first=10), tmp_path / "run")
    assessed: list[int] = []
    assess: Callable[[Path, int], Any] = warned._assess
    monkeypatch.setattr(warned, "_assess", lambda run_dir, epoch: assessed.append(epoch) or assess(run_dir, epoch))
    persistent_warnings(run)
    persistent_warnings(run)
    assert assessed == [20, 19, 18]
    os.utime(run / "evals" / "epoch_019.parquet", (1, 1))
    persistent_warnings(run)
    assert assessed == [20, 19, 18, 20, 19]


@pytest.mark.slow(reason="a run diagnosed at many epochs")
def test_a_warning_remembers_the_epochs_that_were_looked_at_before(tmp_path: Path) -> None:
    tables = resets(first=10)
    run = going_on(tables, tmp_path / "run")
    for done in range(15, EPOCHS + 1):
        (run / "run.json").write_text(json.dumps(tables.run | {"epochs_done": done}))
        warnings = persistent_warnings(run)
    (warning,) = warnings
    assert (warning.since_epoch, warning.or_earlier) == (14, False), "five resets are reached at epoch 14"


# --- what is shown --------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_shows_every_figure_and_its_warning(tmp_path: Path) -> None:
    run = going_on(resets(first=14), tmp_path / "run")
    with held(run):
        text = plain(frame_of(run))
    for figure in ("running", "20/40", "ETA", "train", "validation", "epoch 20: Sharpe +", "IC +", "learning rate"):
        assert figure in text
    for component in ("variable_selection", "temporal_encoder", "gat"):
        assert re.search(rf"{component} +0\.25 +[▁-█]{{16}}", text), "l2 at epoch 20 and its sparkline"
    assert "degeneracy events 0, resets 5" in text
    assert "WARNING run, since epoch 18 or earlier: the head was reset many times" in text
    assert not CONTROL.search(text)


def test_what_is_not_measured_is_said_and_never_zero(tmp_path: Path) -> None:
    run = going_on(healthy(), tmp_path / "run")
    with held(run):
        frame = frame_of(run)
    words = " ".join(plain(frame).replace("│", " ").split())
    assert "GPU not measured, its memory not measured peak RSS not measured" in words
    assert frame.runs[0].as_dict()["gpu_memory_bytes"] is None
    tables = healthy()
    for metric, value in (("gpu_utilisation", 0.0), ("gpu_memory_bytes", 2.0**30)):
        row = {"step": None, "epoch": EPOCHS, "split": "train", "component": "", "term": ""}
        tables.series.append(row | {"metric": metric, "value": value})
    run = going_on(tables, tmp_path / "with a GPU")
    with held(run):
        assert "GPU 0%, its memory 1.00 GiB" in plain(frame_of(run))


def test_a_run_without_a_warning_says_so(tmp_path: Path) -> None:
    run = going_on(healthy(), tmp_path / "run")
    with held(run):
        text = plain(frame_of(run))
    assert "no warning: no rule has fired for three epochs in a row" in text
    assert "WARNING" not in text


def test_the_time_left_counts_down_within_an_epoch(tmp_path: Path) -> None:
    run = going_on(healthy(), tmp_path / "run", epochs=EPOCHS + 2)
    for part in (run / "series").iterdir():
        os.utime(part, (NOW_S, NOW_S))
    with held(run):
        assert [read_progress(run, NOW_S + s).eta_s for s in (0, 4, 9999)] == [20.0, 16.0, 10.0], "epochs of 10 s"
    assert read_progress(run, NOW_S).eta_s is None, "a killed run has none left"


def test_an_invalid_evaluation_is_shown_as_such(tmp_path: Path) -> None:
    tables = healthy()
    tables.set_evals("valid", lambda epoch: float(epoch < EPOCHS))
    tables.set_evals("sharpe_daily", lambda epoch: 0.3 if epoch < EPOCHS else None)
    run = going_on(tables, tmp_path / "run")
    with held(run):
        frame = frame_of(run)
    assert frame.runs[0].progress.sharpe_daily is None, "not that of the epoch before"
    assert "epoch 20: invalid" in plain(frame)


def test_a_torn_part_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = going_on(healthy(), tmp_path / "run")
    part = run / "series" / "epoch_020.parquet"
    part.write_bytes(part.read_bytes()[:200])
    with held(run):
        frame = frame_of(run)
    assert "run: series/epoch_020.parquet is left out" in plain(frame)
    assert max(frame.runs[0].progress.train_loss) == EPOCHS - 1
    json.dumps(frame.as_dict(), allow_nan=False)


def test_an_unreadable_run_a_killed_one_and_one_of_another_version_say_so(tmp_path: Path) -> None:
    for name, header in (("broken", '{"key": '), ("other", '{"key": "k", "status": "running", "epochs_done": "two"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(header)
    going_on(healthy(), tmp_path / "killed")
    (tmp_path / "no run").mkdir()
    frame = monitor.look_at_folder(tmp_path)(NOW_S)
    states = {run.progress.run: run.progress.state for run in frame.runs}
    assert states == {"broken": "unreadable", "other": "killed", "killed": "killed"}
    text = " ".join(plain(frame).split())
    assert "broken: run directory" in text
    assert "run.json is not JSON" in text
    assert "other: run.json does not say how many epochs" in text


def test_the_newest_ended_runs_are_shown_and_the_others_counted(tmp_path: Path) -> None:
    for day in range(1, 9):
        tables = unmeasured()
        tables.run["started"] = f"2025-01-{day:02d}"
        tables.write(tmp_path / f"run{day}")
    frame = monitor.look_at_folder(tmp_path)(NOW_S)
    assert [run.progress.run for run in frame.runs] == ["run8", "run7", "run6", "run5", "run4"]
    assert "3 older runs ended" in plain(frame)


def test_what_a_record_holds_reaches_no_terminal_as_a_command(tmp_path: Path) -> None:
    tables = healthy()
    tables.run |= {"status": "failed", "reason": "loss \x1b[2J is [red]nan[/red]"}
    assert "run: loss ?[2J is [red]nan[/red]" in plain(frame_of(tables.write(tmp_path / "run")))


def test_a_sparkline_is_flat_within_a_factor_of_two_and_tall_beyond() -> None:
    assert sparkline({1: 1.0, 2: 1.0}) == "▅▅"
    assert sparkline({1: 1e-7, 2: 1e-3, 3: 1e1}) == "▁▅█"
    assert sparkline({1: 1.0, 2: float("nan"), 3: 0.0}) == "▅__"
    assert len(sparkline(dict.fromkeys(range(100), 1.0))) == 16
    assert sparkline({}) == ""


def test_durations_read_like_a_clock() -> None:
    assert [duration(s) for s in (0.4, 59.4, 59.6, 3599.9, 7380)] == [
        "0 s", "59 s", "1 min 00 s", "1 h 00 min", "2 h 03 min",
    ]  # fmt: skip


def test_a_run_that_cannot_be_judged_is_not_called_free_of_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(_: object) -> dict[str, object]:
        raise pa.ArrowInvalid("a column of another version")

    run = going_on(healthy(), tmp_path / "run")
    monkeypatch.setattr(warned, "recorded", unreadable)
    with held(run):
        text = plain(frame_of(run))
    assert "its rules could not be assessed" in text
    assert "no warning" not in text


# --- the command ----------------------------------------------------------------------------------------------


def test_once_prints_one_frame_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = going_on(healthy(), tmp_path / "run")
    before = content(tmp_path)
    with held(run):
        code, out = printed(capsys, "--runs", tmp_path, "--once")
    assert (code, out.count("20/40")) == (0, 1)
    assert content(tmp_path) == before


def test_json_is_one_object_per_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = going_on(resets(first=14), tmp_path / "run")
    with held(run):
        code, out = printed(capsys, "--run", run, "--once", "--json")
    assert code == 0
    (line,) = out.splitlines()
    (shown,) = json.loads(line)["runs"]
    assert (shown["state"], shown["epoch"], shown["epochs"]) == ("running", 20, 40)
    assert shown["gradient_l2"]["gat"] == pytest.approx(0.25)
    assert shown["gpu_utilisation"] is None
    assert [(w["rule"], w["since_epoch"]) for w in shown["warnings"]] == [("degeneracy_resets_many", 18)]


@pytest.mark.parametrize(
    ("status", "verdict", "code"),
    [
        ("finished", "passed", 0),
        ("finished", "not_applicable", 0),
        ("finished", "failed", 1),
        ("finished", "invalid", 1),
        ("finished", None, 1),
        ("failed", None, 1),
        ("interrupted", None, 1),
        ("running", None, 1),
    ],
)
def test_an_ended_run_ends_the_monitor_by_its_result(
    status: str, verdict: str | None, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = unmeasured()
    tables.run["status"] = status
    run = tables.write(tmp_path / "run")
    (run / "verdict.json").unlink()
    if verdict:
        (run / "verdict.json").write_text(json.dumps({"status": verdict}))
    assert printed(capsys, "--run", run)[0] == code


def test_the_monitor_of_a_run_shows_it_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends while the monitor sleeps for the second time."""
    tables = healthy()
    run = going_on(tables, tmp_path / "run")
    shown: list[monitor.Frame] = []
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            tables.run["status"] = "finished"
            tables.write(run)

    monkeypatch.setattr(monitor, "pause", sleep)
    with held(run):
        code = monitor.watch_run(run, shown.append, every_s=7.0, once=False)
    assert code == 0
    assert pauses == [7.0, 7.0]
    assert [frame.runs[0].progress.state for frame in shown] == ["running", "running", "finished"]


def test_a_run_that_starts_is_waited_for_and_an_abandoned_folder_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(monitor, "pause", lambda _: healthy().write(run))
    with held(run):
        assert monitor.watch_run(run, lambda _: None, every_s=1.0, once=False) == 0
    (tmp_path / "abandoned").mkdir()
    assert monitor.watch_run(tmp_path / "abandoned", lambda _: None, every_s=1.0, once=False) == 1


def test_an_empty_folder_says_that_no_run_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = printed(capsys, "--runs", tmp_path, "--once")
    assert code == 0
    assert "no run here yet" in out


@pytest.mark.parametrize(
    "arguments",
    [("--runs", "nowhere"), ("--run", "nowhere"), ("--every", "0"), ("--every", "nan"), ("--run", "a", "--runs", "b")],
)
def test_what_cannot_be_watched_is_bad_usage(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "output" / "runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert atft_here("monitor", *arguments, "--once") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.process(reason="the command on a terminal and a pipe")
def test_ctrl_c_ends_the_watching_as_it_ends_every_command(tmp_path: Path) -> None:
    command = [str(ATFT), "monitor", "--runs", str(tmp_path), "--every", "60"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline()
        watching.send_signal(signal.SIGINT)
        _, said = watching.communicate(timeout=60)
    assert (watching.returncode, said) == (130, "atft monitor: interrupted\n")


@pytest.mark.parametrize("when", ["just before", "while it lasts"])
def test_a_signal_ends_the_pause_whenever_it_comes(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def select_later(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return select(*arguments)

    select = interrupts.select.select
    sender = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
    if when == "just before":
        monkeypatch.setattr(interrupts.select, "select", select_later)
    else:
        sender.start()
    started = time.monotonic()
    with interrupts.handled(lambda *_: None, signal.SIGUSR1):
        interrupts.pause(60.0)
        assert time.monotonic() - started < 30.0
        if when == "while it lasts":
            sender.join()
        monkeypatch.undo()
        started = time.monotonic()
        interrupts.pause(0.05)
    assert time.monotonic() - started >= 0.05


@pytest.mark.process(reason="the command on a terminal and a pipe")
def test_a_reader_that_leaves_ends_the_watching_without_complaint(tmp_path: Path) -> None:
    command = [str(ATFT), "monitor", "--runs", str(tmp_path), "--every", "0.05", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as watching:
        assert watching.stdout is not None
        assert watching.stderr is not None
        watching.stdout.readline()
        watching.stdout.close()
        assert watching.stderr.read() == b""
    assert watching.returncode == 0


@pytest.mark.process(reason="the command on a terminal and a pipe")
def test_on_a_terminal_a_frame_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    run = healthy().write(tmp_path / "run")
    ours, theirs = pty.openpty()
    command = [str(ATFT), "monitor", "--run", str(run)]
    shown: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(ours, 4096):
                shown.append(part)
        except OSError:  # Linux says so when the other side has closed
            return

    reader = threading.Thread(target=read)
    with subprocess.Popen(command, stdout=theirs, env=environment({"TERM": "xterm"})) as watching:
        os.close(theirs)
        reader.start()
        assert watching.wait(timeout=60) == 0
    reader.join(timeout=10)
    os.close(ours)
    text = b"".join(shown).decode()
    assert "passed" in text
    assert text.index("\x1b[?25l") < text.index("\x1b[?25h"), "the cursor is hidden and comes back"


def test_a_dumb_terminal_gets_plain_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    with screen(terminal) as show:
        show(monitor.Frame(Path("runs"), "now", ()))
        assert terminal.getvalue() == plain(monitor.Frame(Path("runs"), "now", ())) + "\n"


def test_a_frame_too_tall_for_the_terminal_keeps_its_warnings() -> None:
    from rich.console import Console

    from atft_pipeline.monitoring.dashboard import fitted

    running = RunProgress("run", Path("run"), "running", epoch=3, epochs=9)
    warned = monitor.Watched(running, (PersistentWarning("rule", "cause", "evidence", 1, False),))
    frame = monitor.Frame(Path("runs"), "now", tuple([warned] * 4))
    heights = {}
    for height in (24, 200):
        console = Console(width=100, height=height, force_terminal=False)
        with console.capture() as captured:
            console.print(fitted(frame, console))
        heights[height] = len(captured.get().splitlines())
        assert captured.get().count("WARNING run, since epoch 1: cause [rule]; evidence") == 4
    assert heights[24] < 24 < heights[200]


def test_a_look_without_a_new_epoch_opens_no_part_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = going_on(healthy(), tmp_path / "run")
    with held(run):
        first = frame_of(run)
        opened: list[Path] = []

        def unreadable(path: Path) -> None:
            opened.append(path)
            raise OSError("not now")

        monkeypatch.setattr(pq, "ParquetFile", unreadable)
        assert frame_of(run) == first
        assert opened == []
        os.utime(run / "series" / "epoch_020.parquet", (1, 1))
        assert frame_of(run).runs[0].progress.problems
        assert run / "series" / "epoch_020.parquet" in opened
