"""The command itself: quick help, versions, unknown commands, other ways to start it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from wmh_lora import __version__
from wmh_lora.cli.main import cli

SOURCE = Path(__file__).resolve().parents[2] / "src"


def run_program(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "wmh_lora", *arguments],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_help_is_quick_and_complete() -> None:
    """Processor time is measured: other programs on the machine make the clock run on, not this."""
    seconds = []
    for _ in range(5):
        before = os.times()
        finished = run_program("--help")
        after = os.times()
        used = after.children_user + after.children_system
        seconds.append(used - before.children_user - before.children_system)
    assert finished.returncode == 0
    for command in ("segment", "demo", "models", "train"):
        assert command in finished.stdout
    assert min(seconds) < 0.4


@pytest.mark.parametrize("command", ["segment", "demo", "models", "train"])
def test_every_command_has_help(command: str) -> None:
    result = CliRunner().invoke(cli, [command, "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage:" in result.output


def test_segment_help_names_every_option_and_file() -> None:
    result = CliRunner().invoke(cli, ["segment", "--help"], terminal_width=100)
    for text in (
        *("--model", "--tta", "--threshold", "--min-voxels", "--device", "--overwrite", "--json"),
        *("--threads", "_mask.nii.gz", "_probseg.nii.gz", "_wmh.json", "_wmh.png", "wmh.tsv"),
    ):
        assert text in result.output


def test_version() -> None:
    result = CliRunner().invoke(cli, ["--version"])
    assert result.output.strip() == f"wmh-lora, version {__version__}"


@pytest.mark.parametrize("arguments", [["nonsense"], ["segment"], ["segment", "a.nii"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.output


def test_a_missing_file_in_a_real_process(tmp_path: Path) -> None:
    finished = run_program("segment", "absent_FLAIR.nii.gz", "-o", "out", cwd=tmp_path)
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert finished.stderr == ("wmh-lora: absent_FLAIR.nii.gz does not exist; check the path.\n")
    assert list(tmp_path.iterdir()) == []


def test_an_unforeseen_error_becomes_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("odd\nthing")

    monkeypatch.setattr("wmh_lora.cli.plan.plan_scans", fail)
    result = CliRunner().invoke(cli, ["segment", "a.nii", "-o", "out"])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "RuntimeError: odd thing" in line
    assert "--debug" in line
    debugged = CliRunner().invoke(cli, ["--debug", "segment", "a.nii", "-o", "out"])
    assert isinstance(debugged.exception, RuntimeError)


def test_an_interruption_is_not_an_error_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wmh_lora.cli.plan.plan_scans", interrupt)
    result = CliRunner().invoke(cli, ["segment", "a.nii", "-o", "out"])
    assert result.exit_code == 1
    assert result.output.strip() == "Aborted!"


def test_commands_are_found_by_their_names() -> None:
    assert isinstance(cli, click.Group)
    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        assert command.name == name
