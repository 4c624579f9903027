"""One training at a time in a run folder.

The operating system holds the lock for a process and lets go of it when the process ends, however
it ends: nothing stale is left behind by ``kill -9`` or a power cut. A file beside the lock says who
holds it, for the message to whoever comes second.
"""

from __future__ import annotations

import functools
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from filelock import FileLock, Timeout

from wmh_lora.errors import ConfigError, DataError
from wmh_lora.files import open_atomic, write_failure

__all__ = ["lock_run", "locks_run_folder"]

_LOCK, _HOLDER = ".lock", ".lock.json"

ConfigT = TypeVar("ConfigT")
ResultT = TypeVar("ResultT")
Options = ParamSpec("Options")


@contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run folder, which is made if needed.

    Of several processes that train together, the first one holds it for all. A folder in which
    nothing else was written is removed again.

    Raises
    ------
    ConfigError
        If another training is going on in the folder; the message names its process.
    DataError
        If the folder cannot be written to.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0":
        yield
        return
    # made here, so that two locks in one process exclude each other as well
    lock = FileLock(run_dir / _LOCK, is_singleton=False)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"Another training is going on in {run_dir}: {_holder(run_dir)}. Let it end, stop it "
            "(SIGTERM makes it write a checkpoint), or choose another folder with -o."
        ) from None
    except OSError as error:
        reason = write_failure(run_dir / _LOCK, error)
        raise DataError(f"Cannot lock the run folder {run_dir}: {reason}.") from error
    try:
        _write_holder(run_dir)
        yield
    finally:
        (run_dir / _HOLDER).unlink(missing_ok=True)
        if all(path.name == _LOCK for path in run_dir.iterdir()):
            (run_dir / _LOCK).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # not empty
            run_dir.rmdir()


def locks_run_folder(
    train: Callable[Concatenate[ConfigT, Path, Options], ResultT],
) -> Callable[Concatenate[ConfigT, Path, Options], ResultT]:
    """Let a function of a configuration and a run folder hold the folder's lock while it runs."""

    @functools.wraps(train)
    def locked(
        config: ConfigT, run_dir: Path, /, *args: Options.args, **kwargs: Options.kwargs
    ) -> ResultT:
        with lock_run(run_dir):
            return train(config, run_dir, *args, **kwargs)

    return locked


def _write_holder(run_dir: Path) -> None:
    holder = {
        "pid": os.getpid(),
        "host": platform.node(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    with open_atomic(run_dir / _HOLDER, overwrite=True) as stream:
        stream.write((json.dumps(holder) + "\n").encode())


def _holder(run_dir: Path) -> str:
    """Say who holds the lock; the file is not there yet in the moment after locking."""
    try:
        holder = json.loads((run_dir / _HOLDER).read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has only just begun"
