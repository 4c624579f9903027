"""A request to stop, by SIGTERM or SIGINT, that waits for a good moment."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["catch_stop_signals"]

_log = logging.getLogger("wmh_lora")


@contextmanager
def catch_stop_signals(request: Callable[[], None]) -> Iterator[None]:
    """Call ``request`` on SIGTERM or SIGINT; a second signal acts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, frame: FrameType | None) -> None:
        _log.warning("%s: stopping after this step", signal.Signals(number).name)
        request()
        signal.signal(number, previous[signal.Signals(number)])

    try:
        for number in numbers:
            signal.signal(number, note)
        yield
    finally:
        for number in numbers:
            signal.signal(number, previous[number])
