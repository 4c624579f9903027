"""Messages and progress go to stderr, and reports can repeat warnings."""

from __future__ import annotations

import io
import logging
import sys
from datetime import timedelta

import pytest

from wmh_lora.logs import LOGGER, collect_warnings, configure_logging, progress_bar


def test_warnings_go_to_stderr_once(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    configure_logging()
    LOGGER.warning("%s is odd", "sub-01")
    LOGGER.info("detail")
    assert capsys.readouterr() == ("", "warning: sub-01 is odd\n")


def test_verbose_shows_information(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(verbose=True)
    LOGGER.info("detail")
    assert capsys.readouterr().err == "info: detail\n"


def test_collects_warnings_of_a_block() -> None:
    with collect_warnings() as messages:
        logging.getLogger("wmh_lora").warning("first %d", 1)
        LOGGER.info("not this")
    LOGGER.warning("nor this")
    assert messages == ["first 1"]


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as progress:
        progress(1, 2, "scan")
    assert capsys.readouterr() == ("", "")


def test_progress_leaves_stdout_to_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar(enabled=True) as progress:
        progress(1, 2, "scan [1/2]")
        sys.stdout.write("result\n")
    assert capsys.readouterr().out == "result\n"


@pytest.mark.parametrize("seconds_a_step", [0.5, 40.0, 500.0])
def test_the_time_left_is_shown_however_long_a_step_takes(
    monkeypatch: pytest.MonkeyPatch, seconds_a_step: float
) -> None:
    now = [0.0]
    stderr = io.StringIO()
    monkeypatch.setattr("rich.console.monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar(enabled=True) as progress:
        for step in range(1, 5):
            now[0] += seconds_a_step
            progress(step, 12, "loss")
    left = timedelta(seconds=round(8 * seconds_a_step))
    assert str(left) in stderr.getvalue()
