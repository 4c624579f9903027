"""``wmh-lora train``: presets by name, and one process at a time in a run folder."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.labelled_scans import write_labelled_scans
from wmh_lora.cli.main import cli
from wmh_lora.training.checkpoint import load_newest_checkpoint
from wmh_lora.training.presets import presets

_SOURCE = Path(__file__).resolve().parents[2] / "src"

CONFIG = """
[model]
encoder = "compact"
adaptation = "full"
decoder_channels = [8, 8, 8, 8]
structures = ["wmh"]

[preprocess]
pixel_size_mm = 4.0
margin_mm = 8.0
multiple_px = 8

[training]
steps = 100000  # more than a test takes
checkpoint_steps = 2
batch_size = 1
crop = 64
workers = 1
threads = 1
log_steps = 1
validate_steps = 0

[data]
manifest = "manifest.json"
split = "split.json"
"""


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["train", *map(str, arguments)])


def _arguments(project: Path) -> list[str]:
    root = f"data.root={project}"
    return ["train", str(project / "run.toml"), "--set", root, "-o", str(project / "run")]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write_labelled_scans(tmp_path)
    (tmp_path / "run.toml").write_text(CONFIG)
    return tmp_path


@contextmanager
def _training(project: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A training in a process of its own that has written a checkpoint."""
    command = [sys.executable, "-m", "wmh_lora", *_arguments(project)]
    environment = {**os.environ, "PYTHONPATH": str(_SOURCE)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 120
            while not any(project.glob("run/checkpoints/step_*.pt")):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield process
        finally:
            process.kill()


def test_a_folder_is_for_one_process_until_that_one_is_killed(project: Path) -> None:
    with _training(project) as process:
        second = CliRunner().invoke(cli, [*_arguments(project), "--resume"])
        assert second.exit_code == 2
        assert f"process {process.pid} on " in second.output
        assert "Traceback" not in second.output
        assert process.poll() is None
        process.kill()
        process.wait()
        # at once, although the worker of the killed process may still be there
        reached = load_newest_checkpoint(project / "run" / "checkpoints")
        assert reached is not None
        more = f"training.steps={reached.step + 1}"
        resumed = CliRunner().invoke(cli, [*_arguments(project), "--resume", "--set", more])
    assert resumed.exit_code == 0, resumed.output
    assert resumed.stdout.strip() == str(project / "run" / "best.safetensors")
    assert not (project / "run" / ".lock.json").exists()


@pytest.mark.slow
def test_two_processes_of_one_training_share_the_folder(project: Path) -> None:
    """As `accelerate launch` starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = {**os.environ, **shared, "PYTHONPATH": str(_SOURCE), "ACCELERATE_USE_CPU": "true"}
    settings = ("steps=2", "accumulation=2", "workers=0", "device=cpu")
    command = [sys.executable, "-m", "wmh_lora", *_arguments(project)]
    command += [word for setting in settings for word in ("--set", f"training.{setting}")]
    processes = [
        subprocess.Popen(command, env={**environment, "RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    assert [process.wait(timeout=200) for process in processes] == [0, 0]
    reached = load_newest_checkpoint(project / "run" / "checkpoints")
    assert reached is not None
    assert reached.step == 2
    assert not (project / "run" / ".lock.json").exists()


def test_presets_are_listed_and_shown() -> None:
    result = _run("--list")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines() if line[0] != " "] == [
        *presets()
    ]
    result = _run("compact", "--show")
    assert result.exit_code == 0
    assert result.stdout == presets()["compact"].read_text(encoding="utf-8")


def test_a_shown_preset_is_a_configuration_to_begin_with(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    shown = _run("compact", "--show").stdout.replace('split = "split.json"', 'split = "mine.json"')
    Path("mine.toml").write_text(shown)
    result = _run("mine.toml")
    assert result.exit_code == 1, result.output
    assert "mine.json" in result.output  # it was read, and its data are not there
    assert not Path("runs/mine").exists()


def test_a_preset_needs_no_file(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    small = ("preprocess.pixel_size_mm=4.0", "training.crop=64", "training.batch_size=1")
    short = ("training.epochs=0", "training.steps=1", "training.schedule=cosine")
    settings = [word for setting in (*small, *short) for word in ("--set", setting)]
    settings += ["--set", "training.workers=0"]
    result = _run("compact", "--set", f"data.root={project}", *settings)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(Path("runs/compact/best.safetensors"))
