"""Reports and the Dagster UI in a real browser, as a person sees them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import Browser, needs_chromium, started
from dagster_runs import BIN, REPO, environment
from run_directories import frozen_failure, healthy

from assets.definitions import defs
from atft_pipeline.diagnostics.diagnose import diagnose, write_report
from atft_pipeline.diagnostics.report.sections import sections

pytestmark = [needs_chromium, pytest.mark.process(reason="Chromium, and the server of the UI")]

WIDTHS = (1280, 800)
PAGE_S = 120.0
"""For a page of the UI on a busy machine; it takes a few seconds on a free one."""

HIDDEN_HEADINGS = """[...document.querySelectorAll('h1, h2, h3')]
    .filter(e => { const box = e.getBoundingClientRect(); return box.width === 0 || box.height === 0 })
    .map(e => e.innerText)"""
BROKEN_IMAGES = """Promise.all([...document.images].map(
    i => i.decode().then(() => i.naturalWidth > 0 && i.clientWidth > 0 ? '' : i.alt, () => i.alt)
)).then(names => names.filter(name => name))"""
TOO_WIDE = """[...document.body.querySelectorAll('*')]
    .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
    .map(e => e.tagName + ': ' + e.innerText.slice(0, 80))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started() as browser:
        yield browser


# Reports ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["trained", "healthy", "broken"])
def run_dir(request: pytest.FixtureRequest, trained: Callable[..., Path], tmp_path: Path) -> Path:
    """A finished run, one made up of 20 good epochs, and the original failure with constant predictions."""
    if request.param == "trained":
        return Path(shutil.copytree(trained(), tmp_path / "run"))
    return (healthy() if request.param == "healthy" else frozen_failure()).write(tmp_path / "run")


@pytest.mark.parametrize("width", WIDTHS)
def test_a_report_is_seen_whole(browser: Browser, run_dir: Path, width: int) -> None:
    diagnosis = diagnose(run_dir)
    browser.open(write_report(run_dir, diagnosis).html.as_uri(), width=width)
    shown = browser.evaluate("[...document.querySelectorAll('h2')].map(e => e.innerText)")
    assert shown == [title for title, _ in sections(diagnosis)]
    assert browser.evaluate(HIDDEN_HEADINGS) == []
    assert diagnosis.headline in " ".join(browser.text().split())
    assert browser.evaluate("document.images.length") > 0, "the test tests nothing"
    assert browser.evaluate(BROKEN_IMAGES) == []
    assert browser.evaluate(TOO_WIDE) == []
    assert browser.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert browser.errors == []


def test_what_the_checks_look_for_is_found(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        '<!doctype html><h2 style="display: none">Hidden</h2><img alt="Broken" src="data:image/png;base64,AAAA">'
        f"<p>{'x' * 2000}</p><script>nowhere()</script>"
    )
    browser.open(page.as_uri(), width=800)
    assert browser.evaluate("document.querySelectorAll('h2')[0].getBoundingClientRect().height") == 0
    assert browser.evaluate(HIDDEN_HEADINGS) != []
    assert browser.evaluate(BROKEN_IMAGES) == ["Broken"]
    assert not browser.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert any("nowhere is not defined" in error for error in browser.errors)


# The UI ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the UI that `make ui` serves, over a history of its own."""
    home = tmp_path_factory.mktemp("dagster_home")
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\nnux: {enabled: false}\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    log = home / "webserver.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [str(BIN / "dagster-webserver"), "-w", "workspace.yaml", "-h", "127.0.0.1", "-p", str(port)],
            cwd=REPO,
            env=environment(None, DAGSTER_HOME=str(home)),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + PAGE_S
        while not answers(address):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield address
    finally:
        # Its code server is a process of its own in the same group, and ends with it when it is asked to.
        server.send_signal(signal.SIGINT)
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        stop_group(server.pid)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/server_info", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def stop_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return  # all have ended by themselves


def description_of(asset: str) -> str:
    node = next(node for node in defs.resolve_asset_graph().asset_nodes if node.key.to_user_string() == asset)
    return str(node.description)


def test_the_pages_of_assets_and_job_show_name_and_description(browser: Browser, ui: str) -> None:
    job = str(defs.resolve_job_def("experiments").description)
    pages = {
        "assets/diagnostics_20ep?view=overview": ("diagnostics_20ep", description_of("diagnostics_20ep")),
        "assets/model_20ep?view=overview": ("model_20ep", description_of("model_20ep")),
        "locations/assets.definitions/jobs/experiments": ("experiments", job),
    }
    for page, wanted in pages.items():
        browser.open(f"{ui}/{page}")
        for text in wanted:
            browser.wait_for(f"document.body.innerText.replace(/\\s+/g, ' ').includes({text!r})", PAGE_S)
        assert "Something went wrong" not in browser.text()
