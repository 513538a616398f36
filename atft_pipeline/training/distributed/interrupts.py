"""Signals of whoever runs this process, handled otherwise for a while. Python lets the main thread alone do so."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Handler = Callable[[int, Any], Any] | signal.Handlers


@contextmanager
def kept(*numbers: signal.Signals) -> Iterator[None]:
    """Puts back the handlers of `numbers`, whatever is installed inside; nothing in another thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # one that was not installed from Python cannot be put back
                signal.signal(number, handler)


@contextmanager
def handled(handler: Handler, *numbers: signal.Signals) -> Iterator[None]:
    """Lets `handler` have `numbers`, and puts back who had them; nothing in another thread."""
    with kept(*numbers):
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                signal.signal(number, handler)
        yield


def pause(seconds: float) -> None:
    """Sleeps, in the main thread until the next signal at most, also one that comes just before.

    `time.sleep` sleeps to its end when a signal comes between Python's last look for signals and the system call.
    """
    if threading.current_thread() is not threading.main_thread():
        time.sleep(seconds)
        return
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    before = signal.set_wakeup_fd(wake)
    try:
        select.select([woken], [], [], seconds)
    finally:
        signal.set_wakeup_fd(before)
        os.close(woken)
        os.close(wake)
