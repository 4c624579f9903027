"""Logging and progress: both go to stderr, and progress only to a terminal."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["LOGGER", "Progress", "collect_warnings", "configure_logging", "progress_bar"]

#: The package's logger. The library adds no handler that prints: that is the application's choice.
LOGGER = logging.getLogger("wmh_lora")
LOGGER.addHandler(logging.NullHandler())

# The time left follows from the steps within this window; rich's own 30 s hold no two steps of a
# large network.
_SPEED_WINDOW_S = 3600.0

#: Called with (steps done, steps in all, what is being done).
Progress = Callable[[int, int, str], None]


def configure_logging(*, verbose: bool = False) -> None:
    """Send the package's log messages to stderr; for the command line, not for library use.

    Parameters
    ----------
    verbose : bool
        Show information as well as warnings.
    """
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
    LOGGER.addHandler(_StderrHandler())
    LOGGER.setLevel(logging.INFO if verbose else logging.WARNING)


class _StderrHandler(logging.Handler):
    """Writes to whatever stderr is at that moment, which tests and embedders redirect."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)  # noqa: T201
        except OSError:  # nobody reads stderr any more
            return


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Gather this thread's warnings of a block, so that a report can repeat them.

    Yields
    ------
    list of str
        Filled while the block runs.
    """
    messages: list[str] = []
    handler = _Collector(messages)
    LOGGER.addHandler(handler)
    try:
        yield messages
    finally:
        LOGGER.removeHandler(handler)


class _Collector(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(level=logging.WARNING)
        self._messages = messages
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread:  # others work on other scans
            self._messages.append(record.getMessage())


@contextmanager
def progress_bar(*, enabled: bool | None = None) -> Iterator[Progress]:
    """Show a progress bar on stderr while the block runs, and remove it afterwards.

    Parameters
    ----------
    enabled : bool, optional
        Defaults to whether stderr is a terminal.

    Yields
    ------
    Progress
        Call it with (done, total, description); it does nothing when progress is not shown.
    """
    if not (sys.stderr.isatty() if enabled is None else enabled):
        yield _ignore
        return

    # rich takes a tenth of a second to import
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        speed_estimate_period=_SPEED_WINDOW_S,
        # Results belong to stdout, even while a bar is shown; on a terminal, above the bar.
        redirect_stdout=sys.stdout.isatty(),
    ) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int, description: str) -> None:
            bar.update(task, completed=done, total=total, description=description)

        yield show


def _ignore(done: int, total: int, description: str) -> None:
    """Stand in for a bar that nobody would see."""
