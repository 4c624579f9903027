"""Through a plan, scan by scan: while the network works, the next is read and the last written."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from wmh_lora.cli.errors import describe_error
from wmh_lora.cli.imports import without_collection
from wmh_lora.cli.options import Options, make_engine, require_t1_backend
from wmh_lora.cli.plan import Failure, Plan, Scan
from wmh_lora.errors import ConfigError
from wmh_lora.files import open_atomic

if TYPE_CHECKING:
    from wmh_lora.engine import OutputFiles, Segmentation, WMHInferenceEngine
    from wmh_lora.preprocess import Prepared
    from wmh_lora.quality_measures import ScanMeasures
    from wmh_lora.volume import Volume

__all__ = ["Done", "Outcome", "run_plan"]

COHORT_TABLE = "wmh.tsv"
COHORT_PAGE = "wmh.html"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Done:
    """A scan that was segmented: its report, as saved, and its files."""

    scan: Scan
    report: dict[str, Any]
    files: OutputFiles

    @property
    def quality(self) -> str:
        """Verdict of the quality checks: ``pass``, ``warn`` or ``fail``."""
        return str(self.report["quality"]["verdict"])


@dataclass(frozen=True)
class _Read:
    """A scan in memory, or why it is not."""

    volume: Volume | None = None
    prepared: Prepared | None = None  # as soon as there is an engine that knows how
    warnings: tuple[str, ...] = ()
    error: Exception | None = None


@dataclass
class Outcome:
    """What a run has done."""

    done: list[Done] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    table: Path | None = None
    page: Path | None = None


def run_plan(plan: Plan, options: Options) -> Outcome:
    """Segment every scan of a plan; a scan that fails does not stop the others.

    A line for each scan goes to stdout, unless ``options.quiet``, and one for each failure to
    stderr.

    Raises
    ------
    ConfigError
        If results exist already, or the output folder or a setting cannot be used.
    WeightsError, DeviceError
        If the model cannot be run.
    """
    outcome = Outcome()
    for failure in plan.failures:
        _record(failure, outcome)
    if not plan.scans:
        return outcome

    with without_collection():
        from wmh_lora.report.outputs import output_folder

    if options.t1 is not None:
        _check_t1(plan, options)
    if options.page == "pdf":
        from wmh_lora.report.pdf import require_matplotlib

        require_matplotlib()
    if not options.overwrite:
        _refuse_existing(plan, options)
    with output_folder(options.out_dir):
        try:
            _segment_all(plan.scans, options, outcome)
        finally:  # an interrupted run has a table of what is done
            if plan.with_table and outcome.done:
                outcome.table = _write_table(plan, outcome, options)
                if options.page == "html":
                    outcome.page = _write_page(outcome, options)
    return outcome


def _check_t1(plan: Plan, options: Options) -> None:
    """Refuse a T1 that cannot be shown, before a model is loaded."""
    if len(plan.scans) > 1:
        raise ConfigError(
            f"{options.t1} is the T1 of one scan, but {len(plan.scans)} are to be segmented; give "
            "one at a time with --t1."
        )
    require_t1_backend(options.backend)


def _segment_all(scans: Sequence[Scan], options: Options, outcome: Outcome) -> None:
    """Segment scan by scan, while the next one is read and the one before is written.

    Results and failures are told in the order of the scans. One scan waits on either side, and
    none where memory is limited: each then has it to itself.
    """
    engine: WMHInferenceEngine | None = None
    with ThreadPoolExecutor(3) as threads:

        def aside(function: Callable[[], _T]) -> Callable[[], _T]:
            return function if options.max_memory else threads.submit(function).result

        coming = aside(partial(_read, scans[0], engine))
        finish: Callable[[], None] | None = None
        for number, scan in enumerate(scans, start=1):
            read = coming()
            measured = aside(partial(_measure, read.volume))
            if read.volume is not None and engine is None:
                # Only now: a run without a readable scan need not wait for a model. Trouble with
                # the model concerns every scan, so it ends the run.
                engine = make_engine(options)
            if number < len(scans):
                coming = aside(partial(_read, scans[number], engine))
            label = f"[{number}/{len(scans)}] {scan.name}"
            result = _segment(engine, read, measured, options, label)
            if finish is not None:
                finish()
            finish = aside(partial(_conclude, scan, result, options, outcome))
            del read, measured, result  # what is written need not stay
            if options.max_memory:
                finish()
                finish = None
        if finish is not None:
            finish()


def _read(scan: Scan, engine: WMHInferenceEngine | None) -> _Read:
    """Read and prepare a scan; errors are kept until it is its turn."""
    from wmh_lora.volume import Volume

    try:
        with _warnings_kept() as warnings:
            volume = Volume.read(scan.source)
            prepared = None if engine is None else engine.prepare(volume)
        return _Read(volume, prepared, tuple(warnings))
    except Exception as error:  # noqa: BLE001 -- told to the user in its turn
        return _Read(error=error)


def _measure(volume: Volume | None) -> ScanMeasures | None:
    """Measure a scan for its quality checks, if there is one.

    Of the first scan this goes on while the network's packages are imported, on one core.
    """
    from wmh_lora.quality_measures import measure_scan

    return None if volume is None else measure_scan(volume)


def _conclude(
    scan: Scan, result: Segmentation | Exception, options: Options, outcome: Outcome
) -> None:
    """Save a result, and tell it; or note what stopped a scan, foreseen or not."""
    if not isinstance(result, Exception):
        try:
            done = _save(result, scan, options)
        except Exception as error:  # noqa: BLE001 -- told to the user, and shown with --debug
            result = error
        else:
            outcome.done.append(done)
            _tell(done, options)
    if isinstance(result, Exception):
        if options.debug:
            click.echo("".join(traceback.format_exception(result)), err=True)
        message = describe_error(result)
        if str(scan.source) not in message:
            message = f"{scan.source}: {message}"
        _record(Failure(scan.name, scan.source, message), outcome)


def _refuse_existing(plan: Plan, options: Options) -> None:
    """Find out before hours of work that its results may not be written."""
    targets = [path for scan in plan.scans for path in _files_of(scan, options).present]
    if plan.with_table:
        targets.append(options.out_dir / COHORT_TABLE)
        if options.page == "html":
            targets.append(options.out_dir / COHORT_PAGE)
    existing = [path for path in targets if os.path.lexists(path)]
    if existing:
        more = f" (and {len(existing) - 1} more)" if len(existing) > 1 else ""
        raise ConfigError(
            f"{existing[0]}{more} exists already; add --overwrite to replace results, or choose "
            "another folder with -o."
        )


def _files_of(scan: Scan, options: Options) -> OutputFiles:
    from wmh_lora.report.outputs import output_files

    return output_files(options.out_dir / scan.subfolder, scan.stem, options.page)


def _segment(
    engine: WMHInferenceEngine | None,
    read: _Read,
    measured: Callable[[], ScanMeasures | None],
    options: Options,
    label: str,
) -> Segmentation | Exception:
    """Segment a scan, or return what stopped it."""
    from wmh_lora.logs import progress_bar

    if engine is None or read.volume is None:
        return read.error or ValueError("The scan is not in memory.")
    try:
        with progress_bar() as progress:
            result = engine.segment(
                read.volume,
                prepared=read.prepared,
                t1=options.t1,
                register_t1=options.register_t1,
                progress=lambda done, total: progress(done, total, label),
                **options.inference,
            )
        warnings = (*read.warnings, *result.warnings)
        return replace(result, warnings=warnings, measures=measured())
    except Exception as error:  # noqa: BLE001 -- told to the user in its turn
        return error


def _save(result: Segmentation, scan: Scan, options: Options) -> Done:
    from wmh_lora.volume import Volume

    reference = None
    if scan.reference is not None:
        reference = Volume.read(scan.reference, allow_constant=True).data
    files = result.save(
        options.out_dir / scan.subfolder,
        stem=scan.stem,
        overwrite=options.overwrite,
        reference=reference,
        page=options.page,
    )
    # what was saved is what is told; volumes of a whole cohort would not fit into memory
    return Done(scan, json.loads(files.report.read_text(encoding="utf-8")), files)


def _tell(done: Done, options: Options) -> None:
    """Say what was found; where nobody listens any more, the files say it."""
    if options.quiet:
        return
    name, report = done.scan.name, done.report
    count = report["lesion_count"]
    with suppress(OSError, UnicodeEncodeError):
        click.echo(
            f"{name}: {report['wmh_volume_ml']:.2f} mL in {count} "
            f"lesion{'' if count == 1 else 's'} -> {done.files.mask}"
        )
        for check in report["quality"]["checks"]:
            if check["verdict"] != "pass":
                text = f"{name}: quality {check['verdict']}: {check['sentence']}"
                click.echo(f"wmh-lora: {text}", err=True)


def _write_table(plan: Plan, outcome: Outcome, options: Options) -> Path:
    from wmh_lora.report.tables import cohort_row, cohort_table, failed_row

    rows = {done.scan.name: cohort_row(done.scan.name, done.report) for done in outcome.done}
    inputs = []
    for failure in outcome.failures:
        row = failed_row(failure.name, failure.source.name, failure.message)
        if failure in plan.failures:  # it holds no scan, but may be called like one
            inputs.append(row)
        else:
            rows[failure.name] = row
    ordered = [rows[scan.name] for scan in plan.scans if scan.name in rows]
    path = options.out_dir / COHORT_TABLE
    with open_atomic(path, overwrite=options.overwrite) as stream:
        stream.write(cohort_table([*ordered, *inputs]).encode("utf-8", "backslashreplace"))
    return path


def _write_page(outcome: Outcome, options: Options) -> Path:
    from wmh_lora.report.html import CohortFailure, CohortScan, cohort_html

    order = sorted(outcome.done, key=lambda done: done.scan.name)
    scans = [
        CohortScan(
            done.scan.name,
            done.report,
            None
            if done.files.page is None
            else done.files.page.relative_to(options.out_dir).as_posix(),
        )
        for done in order
    ]
    # a page is passed on; where the scans lay on somebody's disk is not
    failures = [
        CohortFailure(entry.name, entry.message.replace(str(entry.source), entry.source.name))
        for entry in outcome.failures
    ]
    path = options.out_dir / COHORT_PAGE
    title = options.out_dir.resolve().name
    with open_atomic(path, overwrite=options.overwrite) as stream:
        page = cohort_html(scans, failures, title=title)
        stream.write(page.encode("utf-8", "backslashreplace"))
    return path


def _record(failure: Failure, outcome: Outcome) -> None:
    outcome.failures.append(failure)
    click.echo(f"wmh-lora: {failure.message}", err=True)


@contextmanager
def _warnings_kept() -> Iterator[list[str]]:
    from wmh_lora.logs import collect_warnings

    with collect_warnings() as warnings:
        yield warnings
