"""From inputs on the command line to a plan of scans, and through it scan by scan."""

from __future__ import annotations

import json
import os
import traceback
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wmh_lora.cli.errors import describe_error
from wmh_lora.errors import ConfigError, DataError
from wmh_lora.files import find_images, image_stem, open_atomic

if TYPE_CHECKING:
    from wmh_lora.config import TtaMode
    from wmh_lora.engine import OutputFiles, Segmentation, WMHInferenceEngine

__all__ = ["Done", "Failure", "Options", "Outcome", "Plan", "Scan", "plan_scans", "run_plan"]

COHORT_TABLE = "wmh.tsv"


@dataclass(frozen=True)
class Options:
    """What the user chose; None leaves a setting to the model."""

    out_dir: Path
    model: str = "default"
    base_weights: Path | None = None
    tta: TtaMode | None = None
    threshold: float | None = None
    min_voxels: int | None = None
    device: str = "auto"
    overwrite: bool = False
    threads: int | None = None
    debug: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class Scan:
    """One image to segment: its file, and the folder below the output folder it goes to."""

    source: Path
    subfolder: Path = Path()
    reference: Path | None = None  # a reference mask, outlined in the picture

    @property
    def stem(self) -> str:
        """Start of the output names."""
        return image_stem(self.source)

    @property
    def name(self) -> str:
        """Name of the scan in this run, distinct from all others."""
        return (self.subfolder / self.stem).as_posix()


@dataclass(frozen=True)
class Done:
    """A scan that was segmented: its report, as saved, and its files."""

    scan: Scan
    report: dict[str, Any]
    files: OutputFiles


@dataclass(frozen=True)
class Failure:
    """An input that could not be done, and why."""

    name: str
    source: Path
    message: str


@dataclass(frozen=True)
class Plan:
    """What a run will do."""

    scans: list[Scan]
    failures: list[Failure]  # inputs that hold nothing to segment
    with_table: bool


@dataclass
class Outcome:
    """What a run has done."""

    done: list[Done] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    table: Path | None = None


def plan_scans(inputs: Sequence[Path]) -> Plan:
    """Expand folders and give every scan its own place in the output folder.

    Scans of a folder input keep their subfolders only where their names would otherwise collide.

    Raises
    ------
    ConfigError
        If two inputs would be written to the same files.
    """
    failures: list[Failure] = []
    roots: dict[Path, Path | None] = {}  # by file, the folder input that it was found in
    seen: set[str] = set()
    for given in inputs:
        root = given if given.is_dir() else None
        try:
            found = find_images([given])
        except DataError as error:
            failures.append(Failure(given.name, given, describe_error(error)))
            continue
        for path in found:
            identity = os.path.realpath(path)
            if identity not in seen:
                seen.add(identity)
                roots[path] = root
    scans = [Scan(path) for path in roots]
    if _collisions(scans):
        scans = [_with_subfolder(scan, roots[scan.source]) for scan in scans]
    for first, second, *_ in _collisions(scans):
        raise ConfigError(
            f"{first.source} and {second.source} would both be written as {first.name}_*; "
            "give them different names, or segment them into different output folders."
        )
    with_table = len(inputs) > 1 or any(path.is_dir() for path in inputs)
    return Plan(scans, failures, with_table)


def _with_subfolder(scan: Scan, root: Path | None) -> Scan:
    if root is None:
        return scan
    return replace(scan, subfolder=scan.source.parent.relative_to(root))


def _collisions(scans: Iterable[Scan]) -> list[list[Scan]]:
    places: defaultdict[str, list[Scan]] = defaultdict(list)
    for scan in scans:
        # Windows and macOS do not tell upper from lower case in file names
        places[scan.name.casefold()].append(scan)
    return [group for group in places.values() if len(group) > 1]


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

    from wmh_lora.report.outputs import output_folder
    from wmh_lora.volume import Volume

    if not options.overwrite:
        _refuse_existing(plan, options)
    engine: WMHInferenceEngine | None = None
    with output_folder(options.out_dir):
        for number, scan in enumerate(plan.scans, start=1):
            label = f"[{number}/{len(plan.scans)}] {scan.name}"
            volume: Volume | None = None
            with _failures_recorded(scan, options, outcome), _warnings_kept() as warnings:
                volume = Volume.read(scan.source)
            if volume is None:
                continue
            # Only now: a run without a readable scan need not wait for a model. Trouble with the
            # model concerns every scan, so it ends the run.
            engine = engine or _make_engine(options)
            with _failures_recorded(scan, options, outcome):
                result = _segment(engine, volume, options, label)
                result = replace(result, warnings=(*warnings, *result.warnings))
                outcome.done.append(_save(result, scan, options))
        if plan.with_table and outcome.done:
            outcome.table = _write_table(plan, outcome, options)
    return outcome


def _refuse_existing(plan: Plan, options: Options) -> None:
    """Find out before hours of work that its results may not be written."""
    targets = [path for scan in plan.scans for path in _files_of(scan, options)]
    if plan.with_table:
        targets.append(options.out_dir / COHORT_TABLE)
    existing = [path for path in targets if os.path.lexists(path)]
    if existing:
        more = f" (and {len(existing) - 1} more)" if len(existing) > 1 else ""
        raise ConfigError(
            f"{existing[0]}{more} exists already; add --overwrite to replace results, or choose "
            "another folder with -o."
        )


def _files_of(scan: Scan, options: Options) -> OutputFiles:
    from wmh_lora.report.outputs import output_files

    return output_files(options.out_dir / scan.subfolder, scan.stem)


def _make_engine(options: Options) -> WMHInferenceEngine:
    import torch

    from wmh_lora.engine import WMHInferenceEngine, choose_device, load_model

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)  # first: it fails faster than a model loads
    return WMHInferenceEngine(load_model(options.model, base_weights=options.base_weights), device)


def _segment(engine: WMHInferenceEngine, volume: Any, options: Options, label: str) -> Segmentation:
    from wmh_lora.logs import progress_bar

    with progress_bar() as progress:
        return engine.segment(
            volume,
            tta=options.tta,
            threshold=options.threshold,
            min_voxels=options.min_voxels,
            progress=lambda done, total: progress(done, total, label),
        )


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
    )
    # what was saved is what is told; volumes of a whole cohort would not fit into memory
    report = json.loads(files.report.read_text(encoding="utf-8"))
    if not options.quiet:
        count = report["lesion_count"]
        click.echo(
            f"{scan.name}: {report['wmh_volume_ml']:.2f} mL in {count} "
            f"lesion{'' if count == 1 else 's'} -> {files.mask}"
        )
    return Done(scan, report, files)


def _write_table(plan: Plan, outcome: Outcome, options: Options) -> Path:
    from wmh_lora.report.tables import cohort_row, cohort_table, failed_row

    rows = {done.scan.name: cohort_row(done.scan.name, done.report) for done in outcome.done}
    for failure in outcome.failures:
        rows[failure.name] = failed_row(failure.name, failure.source.name, failure.message)
    ordered = [rows.pop(scan.name) for scan in plan.scans]
    path = options.out_dir / COHORT_TABLE
    with open_atomic(path, overwrite=options.overwrite) as stream:
        stream.write(cohort_table([*ordered, *rows.values()]).encode("utf-8"))
    return path


def _record(failure: Failure, outcome: Outcome) -> None:
    outcome.failures.append(failure)
    click.echo(f"wmh-lora: {failure.message}", err=True)


@contextmanager
def _failures_recorded(scan: Scan, options: Options, outcome: Outcome) -> Iterator[None]:
    """Note what stops a scan, foreseen or not, so that the next one can be done."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 -- told to the user, and shown with --debug
        if options.debug:
            click.echo(traceback.format_exc(), err=True)
        message = describe_error(error)
        if str(scan.source) not in message:
            message = f"{scan.source}: {message}"
        _record(Failure(scan.name, scan.source, message), outcome)


@contextmanager
def _warnings_kept() -> Iterator[list[str]]:
    from wmh_lora.logs import collect_warnings

    with collect_warnings() as warnings:
        yield warnings
