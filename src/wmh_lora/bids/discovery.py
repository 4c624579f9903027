"""Find the FLAIR scans of a BIDS data set."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wmh_lora.bids.names import ENTITIES, BidsName, parse_name
from wmh_lora.errors import ConfigError, DataError

__all__ = ["FoundScans", "RawScan", "find_flairs", "read_dataset_description", "read_filters"]

_log = logging.getLogger("wmh_lora")

_ENDINGS = ("_FLAIR.nii.gz", "_FLAIR.nii")
_T1_ENDINGS = ("_T1w.nii.gz", "_T1w.nii")
_NOT_OF_A_T1 = frozenset({"part", "space", "label", "desc", "chunk"})  # parts, or derived
_NOT_MAGNITUDE = frozenset({"phase", "real", "imag"})
_FILTER_KEYS = {**{long: short for short, long in ENTITIES.items()}, **{s: s for s in ENTITIES}}
# pybids lets a filter name these as well; a FLAIR has but one value of each
_FIXED = {"datatype": "anat", "suffix": "FLAIR"}


@dataclass(frozen=True)
class RawScan:
    """A FLAIR of the data set, and its path within it; with its T1 where that is to be used."""

    root: Path
    path: Path  # below root
    name: BidsName
    t1_path: Path | None = None  # below root

    @property
    def source(self) -> Path:
        """The file."""
        return self.root / self.path

    @property
    def t1(self) -> Path | None:
        """The T1's file."""
        return None if self.t1_path is None else self.root / self.t1_path

    @property
    def uris(self) -> list[str]:
        """BIDS URIs of the FLAIR and of its T1, with the data set linked as ``raw``."""
        paths = [self.path, *([] if self.t1_path is None else [self.t1_path])]
        return [f"bids:raw:{path.as_posix()}" for path in paths]


@dataclass(frozen=True)
class FoundScans:
    """Scans in the order of their paths, and participants of whom there is none."""

    scans: tuple[RawScan, ...]
    without: tuple[str, ...]


def read_dataset_description(root: Path) -> dict[str, Any]:
    """Read ``dataset_description.json`` of a data set.

    Raises
    ------
    DataError
        If it is absent, is not JSON, or lacks ``Name`` or ``BIDSVersion``.
    """
    path = root / "dataset_description.json"
    description = _read_json(path, "BIDS requires it, with at least Name and BIDSVersion")
    missing = [key for key in ("Name", "BIDSVersion") if not isinstance(description.get(key), str)]
    if missing:
        raise DataError(
            f"{path} lacks {' and '.join(missing)}, which BIDS requires; add it, or pass "
            "--skip-bids-validation."
        )
    return description


def read_filters(path: Path) -> dict[str, Any]:
    """Read the entry ``flair`` of a filter file, by short names of entities.

    The file is that of fMRIPrep: by kind of scan a table of entities. A value is text, a number, a
    list of them, null where the entity must be absent, or ``"*"`` where any value will do. Other
    kinds of scan are left alone, so that one file may serve several programs.

    Raises
    ------
    ConfigError
        If the file cannot be read, has no entry ``flair``, or filters by what no FLAIR has.
    """
    try:
        tables = _read_json(path, "name another filter file")
    except DataError as error:
        raise ConfigError(str(error)) from error
    filters = tables.get("flair")
    if not isinstance(filters, dict):
        raise ConfigError(
            f'The filter file {path} has no entry "flair" with a table of entities; found '
            f"{', '.join(map(repr, tables)) or 'nothing'}. Example: "
            '{"flair": {"acquisition": "3d"}}.'
        )
    known = _FILTER_KEYS.keys() | _FIXED.keys()
    if unknown := sorted(set(filters) - known):
        raise ConfigError(
            f"The filter file {path} filters by {', '.join(unknown)}; known are "
            f"{', '.join(sorted(known))}."
        )
    for key, fixed in _FIXED.items():
        if filters.get(key, fixed) != fixed:
            raise ConfigError(
                f"The filter file {path} asks for the {key} {filters[key]!r}; a FLAIR has {fixed}."
            )
    return {_FILTER_KEYS[key]: value for key, value in filters.items() if key not in _FIXED}


def find_flairs(
    root: Path,
    *,
    participants: Sequence[str] = (),
    sessions: Sequence[str] = (),
    filters: Mapping[str, Any] | None = None,
    with_t1: bool = False,
) -> FoundScans:
    """Find the FLAIR scans of all participants, sessions and runs, or of the chosen ones.

    Phase, real and imaginary images are left out.

    Parameters
    ----------
    root : Path
        The data set.
    participants, sessions : sequence of str
        Labels, with or without ``sub-`` and ``ses-``; all if there are none.
    filters : mapping, optional
        From `read_filters`.
    with_t1 : bool
        Give each FLAIR the T1w of its session: of several, the one whose name shares most labels
        with the FLAIR's, then the one with the fewest. A FLAIR without one stays alone.

    Raises
    ------
    ConfigError
        If a participant or session is not there, or two files would have the same results.
    DataError
        If the folder cannot be listed or holds no participant.
    """
    people = {path.name.removeprefix("sub-"): path for path in _folders(root, "sub-")}
    if not people:
        raise DataError(
            f"{root} holds no folder sub-<label>; name the top folder of a BIDS data set."
        )
    chosen = _choose(people, participants, "sub-", root)
    wanted = {label.removeprefix("ses-") for label in sessions}
    seen: set[str] = set()
    scans: list[RawScan] = []
    without: list[str] = []
    for label in chosen:
        found: list[RawScan] = []
        for session, folder in _sessions(people[label]):
            seen.add(session)
            if not wanted or session in wanted:
                found += _flairs(root, folder / "anat")
        found = [scan for scan in found if _fits(scan.name, filters or {})]
        scans += [_with_t1(scan) for scan in found] if with_t1 else found
        if not found:
            without.append(f"sub-{label}")
    if absent := sorted(wanted - seen):
        raise ConfigError(
            f"No chosen participant of {root} has the session {', '.join(absent)}; there are "
            f"{', '.join(sorted(seen - {''})) or 'no sessions'}."
        )
    _refuse_twins(scans)
    return FoundScans(tuple(scans), tuple(without))


def _choose(known: Mapping[str, Path], labels: Sequence[str], prefix: str, root: Path) -> list[str]:
    if not labels:
        return list(known)
    chosen = dict.fromkeys(label.removeprefix(prefix) for label in labels)
    if absent := [label for label in chosen if label not in known]:
        raise ConfigError(
            f"{root} has no participant {', '.join(absent)}; there are {len(known)}: "
            f"{', '.join(list(known)[:10])}{', ...' if len(known) > 10 else ''}."
        )
    return [label for label in known if label in chosen]


def _folders(folder: Path, prefix: str) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(
            f"Cannot list the folder {folder}: {error.strerror}; name a BIDS data set."
        ) from error
    return [entry for entry in entries if entry.name.startswith(prefix) and entry.is_dir()]


def _sessions(person: Path) -> Iterator[tuple[str, Path]]:
    yield "", person
    for folder in _folders(person, "ses-"):
        yield folder.name.removeprefix("ses-"), folder


def _flairs(root: Path, folder: Path) -> list[RawScan]:
    if not folder.is_dir():
        return []
    scans = []
    for path in sorted(folder.iterdir()):
        if path.name.endswith(_ENDINGS) and not path.name.startswith("."):
            name = parse_name(path.name)
            if Path(name.folder) != folder.relative_to(root):
                raise ConfigError(
                    f"{path} lies in the folder of another participant or session than its name "
                    f"says; expected {name.folder}. Move or rename it."
                )
            if name.of_derivatives:
                text = "%s is left out: by %s- in its name it is no scan of a raw data set."
                _log.warning(text, path, name.of_derivatives[0])
            elif name.entities.get("part") not in _NOT_MAGNITUDE:
                scans.append(RawScan(root, path.relative_to(root), name))
    return scans


def _with_t1(scan: RawScan) -> RawScan:
    """Add the T1 that goes with a FLAIR, if there is one."""

    def distance(path: Path) -> tuple[int, int, str]:
        entities = parse_name(path.name).entities
        return -len(entities.items() & scan.name.entities.items()), len(entities), path.name

    found = [
        path
        for path in scan.source.parent.iterdir()
        if path.name.endswith(_T1_ENDINGS)
        and not path.name.startswith(".")
        and not parse_name(path.name).entities.keys() & _NOT_OF_A_T1
    ]
    if not found:
        return scan
    return replace(scan, t1_path=min(found, key=distance).relative_to(scan.root))


def _fits(name: BidsName, filters: Mapping[str, Any]) -> bool:
    return all(_agrees(name.entities.get(key), value) for key, value in filters.items())


def _agrees(label: str | None, wanted: Any) -> bool:
    if isinstance(wanted, list):
        return any(_agrees(label, item) for item in wanted)
    if wanted is None or label is None:
        return wanted is None and label is None
    if wanted == "*":
        return True
    text = str(wanted)
    if isinstance(wanted, int) and label.isdecimal():  # run 1 is run-1 and run-01
        return int(label) == wanted
    return label == text or label == text.partition("-")[2]


def _refuse_twins(scans: Sequence[RawScan]) -> None:
    """Refuse names that differ in their extension or in letter case alone."""
    counts = Counter(scan.name.stem.casefold() for scan in scans)
    for scan in scans:
        if counts[scan.name.stem.casefold()] > 1:
            raise ConfigError(
                f"{scan.source} and another file would have the same results, because their names "
                "differ in extension or letter case alone; remove or rename one of them."
            )


def _read_json(path: Path, advice: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}; {advice}.") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}; {advice}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no JSON object; {advice}.")
    return content
