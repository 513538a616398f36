"""Other handlers for signals, for a while. Only the main thread may install them, so elsewhere nothing changes."""

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
    """Restores the handlers of these signals on exit, whatever was installed inside."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # a handler that was not installed from Python cannot be restored
                signal.signal(number, handler)


@contextmanager
def handled(handler: Handler, *numbers: signal.Signals) -> Iterator[None]:
    """Installs `handler` for these signals, restores the old handlers on exit."""
    with kept(*numbers):
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                signal.signal(number, handler)
        yield


def pause(seconds: float) -> None:
    """Sleeps; in the main thread a signal ends the sleep, also one that comes just before it.

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
