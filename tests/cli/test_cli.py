"""`atft` as scripts use it: exit codes, and JSON that is alone on stdout.

Commands run in this process. Trainings, and tests of pipes and exit codes, start processes of their own.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from atft_process import (
    ATFT,
    DATASET_SETTINGS,
    GRAPH_SETTINGS,
    REPO,
    SESSIONS,
    STOCKS,
    TRAIN_SETTINGS,
    atft,
    atft_captured,
    atft_here,
    content,
    environment,
)

from atft_pipeline.cli.progress import ProgressBar

pytestmark = pytest.mark.process(reason="the command as a process, its pipes and exit codes")

REPORT = {
    "SHARPE_WEIGHT": "0.2",
    "CS_IC_WEIGHT": "0.1",
    "RANKIC_WEIGHT": "0.3",
    "VARIANCE_PENALTY_WEIGHT": "0.01",
    "PLATEAU_PATIENCE": "3",
    "PLATEAU_FACTOR": "0.3",
    "PHASE_LOSS_WEIGHTS": '{"1": {"mse": 1.0}, "2-9": {"ic": 0.5}}',
}
EVALUATION_KEYS = {
    "ic_mean", "icir", "rank_ic_mean", "rank_icir", "sharpe_daily", "sharpe_daily_net", "sharpe_annualised",
    "jpx_spread_sharpe", "max_drawdown", "turnover_mean", "sharpe_se", "psr_0", "sessions",
}  # fmt: skip


def the_object(stdout: str) -> dict[str, Any]:
    """The one JSON object that stdout consists of; NaN and Infinity are no JSON."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    assert len(stdout.splitlines()) == 1
    return dict(json.loads(stdout, parse_constant=refuse))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """A folder in which every command ran once with `--json`, and what each printed; `passed` was a process."""
    folder = tmp_path_factory.mktemp("cli")
    source, dataset, graph = folder / "source", folder / "d.parquet", folder / "g.parquet"
    train = ("train", dataset, graph)
    never = ("--set", "evaluation.criterion_sharpe=99")
    always = ("--set", "evaluation.criterion_sharpe=-99", "--set", "train.loss.rank_ic=0.4")
    commands: dict[str, tuple[tuple[Any, ...], int, dict[str, str]]] = {
        "synthesize": (("synthesize", source, "--stocks", STOCKS, "--sessions", SESSIONS, "--seed", 3), 0, {}),
        "dataset": (("dataset", source, dataset, *DATASET_SETTINGS), 0, {}),
        "graph": (("graph", dataset, graph, *GRAPH_SETTINGS), 0, {}),
        "failed": ((*train, folder / "runs" / "failed", *TRAIN_SETTINGS, *never), 1, {}),
        "passed": ((*train, folder / "runs" / "passed", *TRAIN_SETTINGS, *always), 0, REPORT),
        "evaluate": (("evaluate", folder / "runs/passed/predictions/epoch_002.parquet"), 0, {}),
        "diagnose": (("diagnose", folder / "runs" / "failed"), 0, {}),
        "status": (("status", "--runs", folder / "runs"), 0, {}),
    }
    printed = {}
    for name, (arguments, code, variables) in commands.items():
        run = atft if name == "passed" else atft_captured
        done = run(*arguments, "--json", env=variables)
        assert done.returncode == code, f"{name}: {done.stderr}"
        assert "Traceback" not in done.stderr
        if run is atft:
            assert [line.split()[0] for line in done.stderr.splitlines()] == ["epoch", "epoch", "run"]
        printed[name] = the_object(done.stdout)
    return folder, printed


Made = tuple[Path, dict[str, dict[str, Any]]]


def test_synthesize_says_what_it_wrote_and_where(made: Made) -> None:
    folder, printed = made
    said = printed["synthesize"]
    assert (said["path"], said["stocks"], said["sessions"], said["seed"]) == (str(folder / "source"), 40, 330, 3)
    files = {path.stem: pq.read_metadata(path).num_rows for path in (folder / "source").iterdir()}
    assert files == said["rows"] | {"truth": said["truth_rows"]}


def test_dataset_says_how_many_are_live(made: Made) -> None:
    folder, printed = made
    said = printed["dataset"]
    assert said["live"] == "82 of 82"
    assert said["rows"] == pq.read_metadata(folder / "d.parquet").num_rows
    assert said["quarantine"]["not_common_stock"] >= 1


def test_graph_is_of_the_dataset_s_fingerprint(made: Made) -> None:
    _, printed = made
    assert printed["graph"]["dataset_fingerprint"] == printed["dataset"]["fingerprint"]
    assert printed["graph"]["edges"] > 0


def test_work_by_month_says_how_many_months_are_done(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = made
    heard: list[tuple[str, int, int]] = []
    monkeypatch.setattr(ProgressBar, "advance", lambda _, *step: heard.append(step))
    assert atft_here("dataset", folder / "source", tmp_path / "d", *DATASET_SETTINGS) == 0
    months = len(list((tmp_path / "d").iterdir()))
    assert [step for step in heard if step[1] == step[2]] == [(name, months, months) for name in ("prices", "features")]
    heard.clear()
    assert atft_here("graph", tmp_path / "d", tmp_path / "g", *GRAPH_SETTINGS) == 0
    months = len(list((tmp_path / "g").iterdir()))
    assert heard == [("graph", month, months) for month in range(1, months + 1)]


def test_only_the_artifacts_lie_beside_each_other(made: Made) -> None:
    folder, _ = made
    assert {path.name for path in folder.iterdir()} == {
        "source", "d.parquet", "d.parquet.manifest.json", "d.parquet.membership.parquet", "g.parquet",
        "g.parquet.manifest.json", "runs",
    }  # fmt: skip


def test_train_exits_by_its_criterion(made: Made) -> None:
    _, printed = made
    for name, threshold in (("failed", 99.0), ("passed", -99.0)):
        verdict = printed[name]
        assert verdict["status"] == name
        assert verdict["summary"].startswith(name)
        assert verdict["criterion"]["threshold"] == threshold
        assert verdict["criterion"]["epoch"] == 1
        assert json.loads((Path(verdict["run_dir"]) / "verdict.json").read_text())["status"] == name


def test_a_run_below_the_criterion_s_epoch_is_not_applicable_and_exits_0(made: Made) -> None:
    folder, _ = made
    settings = (*TRAIN_SETTINGS, "--set", "train.epochs=1", "--set", "evaluation.criterion_epoch=20")
    done = atft_captured("train", folder / "d.parquet", folder / "g.parquet", folder / "runs" / "short", *settings)
    assert done.returncode == 0
    assert "status: not_applicable" in done.stdout.splitlines()
    assert [line.split()[:2] for line in done.stderr.splitlines()] == [["epoch", "1/1"], ["run", "short:"]]


def test_the_report_s_variables_are_honoured_and_recorded(made: Made) -> None:
    folder, _ = made
    header = json.loads((folder / "runs/passed/run.json").read_text())
    loss, schedule = header["config"]["train"]["loss"], header["config"]["train"]["schedule"]
    assert (loss["sharpe"], loss["ic"], loss["variance_penalty"]) == (0.2, 0.1, 0.01)
    assert loss["rank_ic"] == 0.4, "--set is nearer than a variable"
    assert [(p["first_epoch"], p["last_epoch"], p["weights"]) for p in loss["phases"]] == [
        (1, 1, {"mse": 1.0}),
        (2, 9, {"ic": 0.5}),
    ]
    assert (schedule["name"], schedule["patience"], schedule["factor"]) == ("plateau", 3, 0.3)
    recorded = header["overrides"]
    assert recorded["preset"] == "quick"
    assert recorded["train.loss.sharpe"] == 0.2
    assert recorded["train.loss.rank_ic"] == 0.4
    assert recorded["train.schedule.name"] == "plateau"
    assert recorded["model.hidden_size"] == 8
    series = pa.concat_tables(pq.read_table(p) for p in sorted((folder / "runs/passed/series").glob("*.parquet")))
    weights = {
        (row["epoch"], row["term"]): row["value"] for row in series.to_pylist() if row["metric"] == "loss_weight"
    }
    assert (weights[1, "ic"], weights[2, "ic"], weights[2, "sharpe"]) == (0.1, 0.5, 0.2)
    quiet = json.loads((folder / "runs/failed/run.json").read_text())
    assert not any(name.startswith("train.loss") for name in quiet["overrides"])


def test_a_finished_run_is_reused_and_said_so(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    folder, printed = made
    before = content(folder / "runs" / "failed")
    again = ("train", folder / "d.parquet", folder / "g.parquet", folder / "runs" / "failed", *TRAIN_SETTINGS)
    capsys.readouterr()
    assert atft_here(*again, "--set", "evaluation.criterion_sharpe=99", "--json") == 1
    out, err = capsys.readouterr()
    said = the_object(out)
    assert said.pop("reused") is True
    assert said == {name: value for name, value in printed["failed"].items() if name != "reused"}
    assert "reused" in err
    assert content(folder / "runs" / "failed") == before


@pytest.mark.parametrize(("options", "target"), [(("--quantile", 0.001), None), ((), -0.5)])
def test_a_sharpe_that_cannot_be_measured_is_no_success(
    options: tuple[Any, ...], target: float | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {} if target is None else {"target": np.full(200, target)}
    scores = np.random.default_rng(0).normal(size=200)
    assert atft_here("evaluate", table(tmp_path / "p.parquet", score=scores, **columns), "--json", *options) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["sharpe_daily"] is None
    assert "no Sharpe can be measured" in said.err


def test_evaluate_prints_the_keys_of_the_definition(made: Made) -> None:
    _, printed = made
    said = printed["evaluate"]
    assert set(said) >= EVALUATION_KEYS
    assert said["valid"] is True
    assert (said["score"], said["target"]) == ("score_1d", "target_1d")
    assert set(said["by_split"]) == {"validation", "test"}
    assert said["jpx_spread_sharpe"] is None, "fewer than 400 names"


def test_evaluate_of_a_split_is_what_the_run_recorded(made: Made) -> None:
    folder, printed = made
    final = printed["passed"]["final"]["validation"]
    said = printed["evaluate"]["by_split"]["validation"]
    for name in ("sharpe_daily", "ic_mean", "rank_ic_mean", "turnover_mean"):
        assert said[name] == pytest.approx(final[name], rel=1e-6)
    done = atft_captured("evaluate", folder / "runs/passed/predictions/epoch_002.parquet", "--split", "validation")
    assert ["sharpe_daily", f"{said['sharpe_daily']:.4g}"] in [line.split()[:2] for line in done.stdout.splitlines()]


def test_diagnose_and_status_read_the_run(made: Made) -> None:
    folder, printed = made
    assert Path(printed["diagnose"]["report_html"]).is_file()
    assert printed["diagnose"]["findings"]
    runs = {row["run"]: (row["state"], row["epoch"], row["epochs"]) for row in printed["status"]["runs"]}
    assert runs["failed"] == runs["passed"] == ("finished", 2, 2), "a run that misses the criterion still finished"
    human = atft_captured("status", "--runs", folder / "runs").stdout
    assert re.search(r"failed +finished +2/2", human)
    with pytest.raises(json.JSONDecodeError):
        json.loads(human)


def test_a_variable_that_means_nothing_is_refused_by_its_name(made: Made, tmp_path: Path) -> None:
    folder, _ = made
    train = ("train", folder / "d.parquet", folder / "g.parquet", tmp_path / "run")
    done = atft_captured(*train, env={"SHARPE_WEIGHT": "high"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "atft train: SHARPE_WEIGHT: expected a number for train.loss.sharpe, found 'high'\n"
    assert list(tmp_path.iterdir()) == []


# --- scores that cannot be ranked ---------------------------------------------------------------------------


def table(path: Path, **columns: Any) -> Path:
    rng = np.random.default_rng(0)
    days = np.repeat(np.datetime64("2024-01-04") + np.arange(20), 10)
    values = {"Date": days, "Code": [f"{n:04}" for n in range(10)] * 20, "score": rng.normal(size=200)}
    pq.write_table(pa.table(values | {"target": rng.normal(size=200) * 0.01} | columns), path)
    return path


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        (np.full(200, 0.3), "scores are constant"),
        (np.repeat(np.arange(20.0), 10), "scores are constant"),
        (np.full(200, np.nan), "scores are not finite"),
        (np.where(np.arange(200) == 7, np.inf, np.arange(200.0)), "scores are not finite"),
    ],
    ids=["constant", "constant within each session", "NaN", "one infinite"],
)
def test_scores_that_cannot_be_ranked_exit_1(
    scores: Any, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert atft_here("evaluate", table(tmp_path / "p.parquet", score=scores), "--json") == 1
    out, err = capsys.readouterr()
    said = the_object(out)
    assert said["valid"] is False
    assert reason in said["reason"]
    assert said["sharpe_daily"] is None
    assert len(err.splitlines()) == 1
    assert reason in err


def test_constant_scores_exit_1_in_a_process(tmp_path: Path) -> None:
    done = atft("evaluate", table(tmp_path / "p.parquet", score=np.zeros(200)), "--json")
    assert done.returncode == 1
    assert the_object(done.stdout)["valid"] is False


def test_columns_are_named_by_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forward = np.arange(200.0) % 10 * np.repeat(np.linspace(1.0, 2.0, 20), 10)
    path = table(tmp_path / "p.parquet", alpha=np.arange(200.0), forward=forward)
    assert atft_here("evaluate", path, "--score", "alpha", "--target", "forward", "--json") == 0
    assert the_object(capsys.readouterr().out)["rank_ic_mean"] == pytest.approx(1.0)


def test_models_tried_deflate_the_sharpe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, said = table(tmp_path / "p.parquet"), {}
    for trials in (1, 20):
        assert atft_here("evaluate", path, "--trials", trials, "--json") == 0
        said[trials] = the_object(capsys.readouterr().out)
    assert said[1]["deflated_sharpe"] == said[1]["psr_0"]
    assert said[20]["deflated_sharpe"] < said[20]["psr_0"] == said[1]["psr_0"]
    assert atft_here("evaluate", path, "--trials", 0, "--json") == 2


# --- the process itself -------------------------------------------------------------------------------------


def test_the_module_is_the_command() -> None:
    module = [sys.executable, "-m", "atft_pipeline.cli"]
    version = subprocess.run([*module, "--version"], capture_output=True, text=True, check=True, cwd=REPO)
    assert version.stdout == atft("--version").stdout
    done = subprocess.run([*module, "status", "--runs", "nowhere"], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 2
    assert done.stderr.startswith("atft status: nowhere: no such folder of runs")


def test_help_names_every_command() -> None:
    done = atft_captured("--help")
    assert done.returncode == 0
    commands = {
        "synthesize", "dataset", "graph", "train", "experiment", "evaluate", "export", "diagnose", "compare", "status",
        "monitor",
    }  # fmt: skip
    assert commands <= set(done.stdout.split())


def test_a_reader_that_leaves_early_hears_no_complaint(tmp_path: Path) -> None:
    """`atft evaluate ... | head -1`: the pipe closes while the command still writes."""
    path = table(tmp_path / "p.parquet", split=np.array([f"part {n:03}" for n in range(200)]))
    command = [str(ATFT), "evaluate", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        writer.stdout.close()
        assert writer.stderr.read() == b""
    assert writer.returncode == 0


SMALLEST_MARKET = ("synthesize", "m", "--stocks", "4", "--sessions", "2")


@pytest.mark.parametrize(("arguments", "code"), [(SMALLEST_MARKET, 0), (("train", "no", "such", "run"), 2)])
def test_a_closed_stderr_changes_no_exit_code(arguments: tuple[str, ...], code: int, tmp_path: Path) -> None:
    line = shlex.join([str(ATFT), *arguments]) + " 2>&-"
    done = subprocess.run(line, shell=True, capture_output=True, env=environment(), cwd=tmp_path, check=False)
    assert done.returncode == code
    assert (done.stdout != b"") == (code == 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_an_output_that_is_full_is_one_sentence(tmp_path: Path) -> None:
    line = shlex.join([str(ATFT), *SMALLEST_MARKET]) + " >/dev/full"
    done = subprocess.run(line, shell=True, capture_output=True, env=environment(), cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(b"atft synthesize: its output cannot be written")
    assert done.stderr.count(b"\n") == 1


def test_interrupt_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("atft_pipeline.evaluation.predictions_table.evaluate_file", interrupted)
    assert atft_here("evaluate", tmp_path / "p.parquet") == 130
    assert capsys.readouterr().err == "atft evaluate: interrupted\n"
