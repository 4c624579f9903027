"""From inputs on the command line to scans, each with a place of its own in the output folder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wmh_lora.cli.errors import describe_error
from wmh_lora.errors import ConfigError, DataError
from wmh_lora.files import find_images, image_stem, is_folder

__all__ = ["Failure", "Plan", "Scan", "plan_scans"]


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
    seen: set[Path] = set()
    for given in inputs:
        root = given if is_folder(given) else None
        try:
            found = find_images([given])
        except DataError as error:
            failures.append(Failure(given.name, given, describe_error(error)))
            continue
        for path in found:
            # a link to a file keeps its name: scans of equal content may share one file
            identity = path.parent.resolve() / path.name
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
    with_table = len(inputs) > 1 or any(is_folder(path) for path in inputs)
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
