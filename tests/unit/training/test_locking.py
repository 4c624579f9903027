"""Only one process at a time trains in a folder, and a process that is gone holds nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from wmh_lora.errors import ConfigError, DataError
from wmh_lora.training.locking import lock_run, locks_run_folder

_SOURCE = Path(__file__).resolve().parents[3] / "src"

# Holds the lock until it is ended; a forked child, like a loader worker, outlives it.
HOLDER = """
import os, sys, time
from pathlib import Path
from wmh_lora.training.locking import lock_run

with lock_run(Path(sys.argv[1])):
    child = os.fork() if sys.argv[2] == "fork" else None
    if not child:  # a child speaks for itself, once it runs
        print(os.getpid() if child == 0 else "locked", flush=True)
    time.sleep(60)
"""


@contextmanager
def _holder(run_dir: Path, kind: str = "alone") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process that holds the lock, and what it says."""
    command = [sys.executable, "-c", HOLDER, str(run_dir), kind]
    environment = {**os.environ, "PYTHONPATH": str(_SOURCE)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def test_a_second_process_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    with _holder(tmp_path) as (process, said):
        assert said == "locked"
        with pytest.raises(ConfigError, match=rf"process {process.pid} on .+, since \d{{4}}-"):
            lock_run(tmp_path).__enter__()


def test_a_killed_process_leaves_the_folder_free(tmp_path: Path) -> None:
    with _holder(tmp_path) as (process, _):
        process.kill()
        process.wait()
        assert (tmp_path / ".lock.json").exists()  # nobody tidied up
        with lock_run(tmp_path):
            holder = (tmp_path / ".lock.json").read_text()
            assert f'"pid": {os.getpid()}' in holder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_workers_of_a_killed_process_do_not_hold_its_lock(tmp_path: Path) -> None:
    with _holder(tmp_path, "fork") as (process, child):
        try:
            process.kill()
            process.wait()
            os.kill(int(child), 0)  # still there
            with lock_run(tmp_path):
                pass
        finally:
            os.kill(int(child), 9)


def test_the_lock_is_free_after_the_block_and_after_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match="reason"), lock_run(tmp_path):
        raise ValueError("reason")
    with lock_run(tmp_path), pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        lock_run(tmp_path).__enter__()
    assert not (tmp_path / ".lock.json").exists()


def test_a_folder_in_which_nothing_was_written_is_removed(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "mine"
    with lock_run(run_dir):
        assert run_dir.is_dir()
    assert not run_dir.exists()
    with lock_run(run_dir):
        (run_dir / "config.json").touch()
    assert run_dir.is_dir()


def test_of_several_processes_the_first_locks_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with lock_run(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with lock_run(tmp_path):
            pass
        assert (tmp_path / ".lock.json").exists()
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(ConfigError, match="Another training"):
            lock_run(tmp_path).__enter__()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="Cannot lock the run folder"):
        lock_run(tmp_path / "file" / "run").__enter__()


def test_the_decorated_function_holds_the_lock_and_returns_its_result(tmp_path: Path) -> None:
    @locks_run_folder
    def train(config: int, run_dir: Path, *, more: int) -> int:
        with pytest.raises(ConfigError, match="Another training"):
            lock_run(run_dir).__enter__()
        return config + more

    assert train(1, tmp_path, more=2) == 3
