"""The participant level of ``wmh-lora bids``: which scans are to be done, and doing them."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wmh_lora._version import __version__
from wmh_lora.cli.errors import describe_error
from wmh_lora.errors import ConfigError

if TYPE_CHECKING:
    from wmh_lora.bids.discovery import RawScan
    from wmh_lora.cli.options import Options
    from wmh_lora.config import InferenceConfig
    from wmh_lora.engine import WMHInferenceEngine

__all__ = ["Participants", "RunOptions", "describe_model", "run_participants"]


_WORKER_LOST = (
    "A process ended unexpectedly, perhaps for want of memory; run it again with a smaller "
    "--n-procs, which keeps what is finished."
)


@dataclass(frozen=True)
class RunOptions:
    """What the user chose for a run."""

    inference: Options  # as for `wmh-lora segment`
    processes: int = 1
    work_dir: Path | None = None
    verbose: bool = False

    @property
    def out_dir(self) -> Path:
        """The derivatives."""
        return self.inference.out_dir


@dataclass
class Participants:
    """What a run has done: names of scans."""

    done: list[str] = field(default_factory=list)
    finished_before: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Task:
    scan: RawScan
    record: Mapping[str, Any]
    replaces: bool  # leftovers, or results that the user wants replaced


@dataclass(frozen=True)
class _Result:
    """One line for the user, and the traceback where a scan failed."""

    line: str
    trace: str = ""


def run_participants(scans: Sequence[RawScan], options: RunOptions) -> Participants:
    """Segment the scans that are not finished; one that fails does not stop the others.

    A line for each scan goes to stdout, and one for each failure to stderr.

    Raises
    ------
    ConfigError
        If there are results with other settings, or a setting cannot be used.
    WeightsError, DeviceError
        If the model cannot be run.
    """
    outcome = Participants()
    model, inference = describe_model(options)
    tasks = _plan(scans, options, outcome, model, inference)
    if outcome.finished_before:
        click.echo(f"{len(outcome.finished_before)} scans were finished before and are kept.")
    if not tasks:
        return outcome
    run = _in_processes if options.processes > 1 and len(tasks) > 1 else _one_by_one
    for number, (task, result) in enumerate(run(tasks, options), start=1):
        name = task.scan.name.stem
        failed = bool(result.trace)
        _note_crash(options, name, result)
        (outcome.failed if failed else outcome.done).append(name)
        prefix = "wmh-lora: " if failed else ""
        click.echo(f"{prefix}[{number}/{len(tasks)}] {result.line}", err=failed)
        if failed and options.inference.debug:
            click.echo(result.trace, err=True)
    return outcome


def describe_model(options: RunOptions) -> tuple[dict[str, str], InferenceConfig]:
    """Return what identifies the model, and the settings as they will be, without loading it."""
    from wmh_lora.files import file_sha256
    from wmh_lora.models.model_file import read_model_card
    from wmh_lora.models.registry import describe_model as describe
    from wmh_lora.models.registry import model_path
    from wmh_lora.models.site_adapter import load_adapter

    path = model_path(options.inference.model)
    card, sha256 = read_model_card(path), file_sha256(path)
    adapter = None
    if options.inference.adapter is not None:
        adapter = load_adapter(options.inference.adapter)
        adapter.require_base(path, sha256)
        card = adapter.adapt_card(card)
    model = describe(card, sha256, adapter)
    return model, card.inference.changed(**options.inference.inference)


def _plan(
    scans: Sequence[RawScan],
    options: RunOptions,
    outcome: Participants,
    model: Mapping[str, str],
    inference: InferenceConfig,
) -> list[_Task]:
    """Leave out what is finished, and refuse what would replace other results unasked."""
    from wmh_lora.bids.derivatives import results_state, settings_record

    record = settings_record(model, inference, t1_registered=options.inference.register_t1)
    tasks, different = [], []
    for scan in scans:
        state = results_state(options.out_dir, scan, record)
        if state == "finished" and not options.inference.overwrite:
            outcome.finished_before.append(scan.name.stem)
            continue
        if state == "different":
            different.append(scan.name.stem)
        tasks.append(_Task(scan, record, replaces=state != "absent"))
    if different and not options.inference.overwrite:
        more = f" and {len(different) - 1} more" if len(different) > 1 else ""
        raise ConfigError(
            f"{options.out_dir} holds results of {different[0]}{more} that were made with other "
            "settings, another model or another version of the scan; add --overwrite to replace "
            "them, or choose another output folder."
        )
    return tasks


def _one_by_one(tasks: Sequence[_Task], options: RunOptions) -> Iterator[tuple[_Task, _Result]]:
    from wmh_lora.cli.options import make_engine

    engine = make_engine(options.inference)
    for task in tasks:
        yield task, _segment(task, engine, options)


def _in_processes(tasks: Sequence[_Task], options: RunOptions) -> Iterator[tuple[_Task, _Result]]:
    """Share the scans among processes, and threads and memory among these."""
    count = min(options.processes, len(tasks))
    share = replace(options, inference=_share(options.inference, count))
    # A forked process would inherit threads and devices in a state nobody knows.
    with ProcessPoolExecutor(
        count, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(share,)
    ) as pool:
        waiting = [(task, pool.submit(_in_worker, task)) for task in tasks]
        try:
            for task, coming in waiting:
                try:
                    result = coming.result()
                except BrokenProcessPool as error:
                    result = _failure(task, ConfigError(_WORKER_LOST), error)
                yield task, result
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _processors() -> int:
    """Count the processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


def _share(options: Options, count: int) -> Options:
    """Divide threads and memory by the number of processes."""
    from wmh_lora.sizes import parse_size

    threads = max(1, (options.threads or _processors()) // count)
    limit = options.max_memory
    if limit is not None:
        limit = str(parse_size(limit) // count)
    return replace(options, threads=threads, max_memory=limit)


_worker: dict[str, Any] = {}  # of a process of its own: its options, and the engine once needed


def _start_worker(options: RunOptions) -> None:
    from wmh_lora.logs import configure_logging

    configure_logging(verbose=options.verbose)
    _worker["options"] = options


def _in_worker(task: _Task) -> _Result:
    from wmh_lora.cli.options import make_engine

    options: RunOptions = _worker["options"]
    if "engine" not in _worker:
        _worker["engine"] = make_engine(options.inference)  # trouble with the model ends the run
    return _segment(task, _worker["engine"], options)


def _segment(task: _Task, engine: WMHInferenceEngine, options: RunOptions) -> _Result:
    from wmh_lora.bids.derivatives import save_scan

    name = task.scan.name.stem
    try:
        with _progress(options, name) as progress:
            found = engine.segment(
                task.scan.source,
                t1=task.scan.t1,
                register_t1=options.inference.register_t1,
                progress=progress,
                **options.inference.inference,
            )
        report = save_scan(found, task.scan, options.out_dir, task.record, overwrite=task.replaces)
    except Exception as error:  # noqa: BLE001 -- told to the user; the other scans go on
        return _failure(task, error, error)
    count = report["lesion_count"]
    plural = "" if count == 1 else "s"
    return _Result(f"{name}: {report['wmh_volume_ml']:.2f} mL in {count} lesion{plural}")


def _failure(task: _Task, told: Exception, error: BaseException) -> _Result:
    message = describe_error(told)
    if str(task.scan.source) not in message:
        message = f"{task.scan.source}: {message}"
    return _Result(message, "".join(traceback.format_exception(error)))


@contextmanager
def _progress(options: RunOptions, name: str) -> Iterator[Callable[[int, int], None] | None]:
    if options.processes > 1:  # bars of several processes would overwrite each other
        yield None
        return
    from wmh_lora.logs import progress_bar

    with progress_bar() as show:
        yield lambda done, total: show(done, total, name)


def _note_crash(options: RunOptions, name: str, result: _Result) -> None:
    """Keep the traceback of a failed scan in the work folder; remove that of an earlier run."""
    if options.work_dir is None:
        return
    path = options.work_dir / f"crash-{name}.txt"
    text = f"wmh-lora {__version__}\n{result.line}\n\n{result.trace}"
    try:
        path.unlink(missing_ok=True)
        if result.trace:
            path.write_bytes(text.encode("utf-8", "backslashreplace"))
    except OSError as error:  # the other scans go on
        click.echo(f"wmh-lora: {path} cannot be written: {error.strerror}.", err=True)
