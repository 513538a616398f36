"""One writer per run directory."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from atft_pipeline.errors import InputError
from atft_pipeline.runs import lock
from atft_pipeline.runs.lock import exclusive, is_held


@pytest.mark.process(reason="a second writer")
def test_a_second_process_is_refused_while_the_first_writes(tmp_path):
    script = (
        "import sys; from pathlib import Path; from atft_pipeline.runs.lock import exclusive\n"
        f"with exclusive(Path({str(tmp_path)!r})): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == "held\n"
        assert is_held(tmp_path)
        with pytest.raises(InputError, match="another process is training this run"), exclusive(tmp_path):
            pass
        first.kill()
    assert not is_held(tmp_path), "a killed process leaves no lock behind"
    with exclusive(tmp_path):
        assert is_held(tmp_path)


def test_asking_whether_a_run_is_held_does_not_cost_its_writer_the_lock(tmp_path):
    tmp_path.joinpath(".lock").touch()
    asking = threading.Event()

    def ask():
        with tmp_path.joinpath(".lock").open() as handle:
            assert lock._locked(handle, lock.fcntl.LOCK_SH)
            asking.set()
            time.sleep(0.06)

    reader = threading.Thread(target=ask)
    reader.start()
    asking.wait()
    with exclusive(tmp_path):
        reader.join()


def test_a_directory_without_a_lock_is_not_held(tmp_path):
    assert not is_held(tmp_path)
