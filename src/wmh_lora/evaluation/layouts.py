"""How cohorts lie on disk: which file belongs to which subject, session and site.

A layout reads the identity of a scan from the path of its file. Each is a few lines: a new cohort
is a new entry in `LAYOUTS`. Files are never opened here.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wmh_lora.errors import ConfigError, DataError
from wmh_lora.files import image_suffix, images_below

__all__ = ["LAYOUTS", "Kind", "Layout", "ScanFile", "find_scans", "find_scans_and_rest"]

Kind = Literal["mask", "image"]

#: What `wmh-lora segment` appends to the name of a scan.
_OURS = "_space-orig_label-WMH_mask"


@dataclass(frozen=True)
class ScanFile:
    """A file and whose scan it is; what a layout does not tell is empty.

    Attributes
    ----------
    path : Path
        The file.
    subject, session : str
        Labels, as the layout tells them: those of BIDS come without prefixes, a flat folder's
        subject may have one.
    scan : str
        What tells several scans of one session apart, such as a run or an image number.
    site : str
        Centre or scanner.
    """

    path: Path
    subject: str
    session: str = ""
    scan: str = ""
    site: str = ""

    @property
    def bare_subject(self) -> str:
        """Subject without ``sub-``, whether or not the layout leaves that in front."""
        return self.subject.removeprefix("sub-")

    @property
    def name(self) -> str:
        """Return a name for people: site, subject, session and scan, as far as they are known.

        Examples
        --------
        >>> ScanFile(Path("a.nii"), "01", session="2", site="Utrecht").name
        'Utrecht/01_2'
        """
        label = "_".join(part for part in (self.subject, self.session, self.scan) if part)
        return f"{self.site}/{label}" if self.site else label


class Layout(ABC):
    """A way of naming files, see `LAYOUTS` for all of them.

    Attributes
    ----------
    name : str
        What it is called on the command line.
    summary : str
        Where masks and images lie.
    """

    name: str
    summary: str

    @abstractmethod
    def read(self, place: str, kind: Kind) -> ScanFile | None:
        """Return whose file this is, or None when it is no such file.

        Parameters
        ----------
        place : str
            Path below the cohort's folder, with forward slashes, without the extension.
        kind : str
            ``mask``, of white matter hyperintensities, or ``image``, the FLAIR.
        """

    def knows(self, place: str) -> bool:
        """Whether the layout tells what this file is, be it none of the kind that is looked for."""
        return True

    def select(self, places: Sequence[str], kind: Kind) -> dict[str, ScanFile]:
        """Read every place, and keep those that are files of that kind."""
        read = {place: self.read(place, kind) for place in places}
        return {place: found for place, found in read.items() if found is not None}


class PatternLayout(Layout):
    """A layout told by regular expressions with the groups subject, session, scan and site."""

    def __init__(
        self, name: str, summary: str, *, masks: Iterable[str], images: Iterable[str]
    ) -> None:
        self.name, self.summary = name, summary
        self._patterns = {
            "mask": [re.compile(pattern) for pattern in masks],
            "image": [re.compile(pattern) for pattern in images],
        }

    def read(self, place: str, kind: Kind) -> ScanFile | None:
        """Return the identity by the first pattern that fits the whole path."""
        for pattern in self._patterns[kind]:
            if match := pattern.fullmatch(place):
                return ScanFile(Path(), **{k: v or "" for k, v in match.groupdict().items()})
        return None


class BidsLayout(Layout):
    """Names made of entities, in whatever folders: raw images, and masks of derivatives."""

    name = "bids"
    summary = "sub-<id>[_ses-<id>][_run-<n>]..._mask.nii.gz with label-WMH, label-lesion or none"

    _WMH_LABELS = frozenset({"wmh", "wml", "lesion", "lesions", "l"})
    # They say how a mask was made or stored, not of which scan.
    _NOT_OF_THE_SCAN = frozenset({"sub", "ses", "space", "label", "desc", "res", "den"})

    def read(self, place: str, kind: Kind) -> ScanFile | None:
        """Return the identity that the entities in the file's name tell."""
        *parts, suffix = place.rpartition("/")[2].split("_")
        entities = dict(part.split("-", 1) for part in parts if "-" in part)
        if "sub" not in entities or not self._is_wanted(entities, suffix, kind):
            return None
        rest = [f"{k}-{v}" for k, v in entities.items() if k not in self._NOT_OF_THE_SCAN]
        return ScanFile(Path(), entities["sub"], entities.get("ses", ""), "_".join(rest))

    def knows(self, place: str) -> bool:
        """Whether the name says whose file it is."""
        return place.rpartition("/")[2].startswith("sub-")

    def _is_wanted(self, entities: dict[str, str], suffix: str, kind: Kind) -> bool:
        if entities.get("space") == "halfway":  # of `wmh-lora longitudinal`, between two scans
            return False
        if kind == "image":
            return suffix == "FLAIR" and "label" not in entities
        if "label" in entities:
            return suffix in ("mask", "dseg") and entities["label"].lower() in self._WMH_LABELS
        # without a label, a dseg may be of anything
        return suffix == "mask" and entities.get("desc") != "brain"


class FlatLayout(Layout):
    """Files told apart by their names alone, or by their folders where all have one name."""

    name = "flat"
    summary = "<subject>_mask.nii.gz, <subject>/mask.nii.gz, or any names when all are masks"

    _MASK = re.compile(
        r"(?:_space-[^_]+|_label-[^_]+|_desc-[^_]+)*"
        r"_(?:mask|seg|wmh|lesions?|labels?|manual|reference|result|prediction)$",
        re.IGNORECASE,
    )
    _FLAIR = re.compile(r"(?:_T2)?_FLAIR$|_0000$", re.IGNORECASE)

    def read(self, place: str, kind: Kind) -> ScanFile | None:
        """Return the identity by the name without what says mask or FLAIR, or by the folder."""
        folder, _, name = place.rpartition("/")
        marked = self._MASK.search(f"_{name}") is not None
        if marked != (kind == "mask"):
            return None
        return ScanFile(Path(), self._subject(folder, name))

    def select(self, places: Sequence[str], kind: Kind) -> dict[str, ScanFile]:
        """Read every place; where no name says mask, or none says FLAIR, every file counts."""
        found = super().select(places, kind)
        if kind == "mask" and not found:
            return {p: ScanFile(Path(), self._subject(*_split(p))) for p in places}
        if kind == "image":
            named = {p: f for p, f in found.items() if self._FLAIR.search(f"_{_split(p)[1]}")}
            return named or found
        return found

    def _subject(self, folder: str, name: str) -> str:
        bare = f"_{name}"
        while (shorter := self._FLAIR.sub("", self._MASK.sub("", bare))) != bare:
            bare = shorter
        return bare[1:] or folder or name


def _split(place: str) -> tuple[str, str]:
    folder, _, name = place.rpartition("/")
    return folder, name


_UKB = r"(?:.*/)?(?P<subject>\d+)_20253_(?P<session>\d)_(?P<scan>\d)/T2_FLAIR"
_ADNI_SUBJECT = r"(?P<subject>(?P<site>\d{3})_S_\d{4,5})"
_ADNI = (
    rf"(?:.*/)?{_ADNI_SUBJECT}/[^/]*FLAIR[^/]*/(?P<session>\d{{4}}-\d\d-\d\d)[^/]*/(?P<scan>I\d+)"
)
_ADNI_NAME = rf"(?:.*/)?ADNI_{_ADNI_SUBJECT}_[^/]*_(?P<scan>I\d+)"
OTHER_OBSERVERS = "additional_annotations"
"""Folder of the published challenge data with masks of further readers, which are no references."""

# The published data set puts its sites below training and test.
_CHALLENGE = (
    rf"(?!(?:.*/)?{OTHER_OBSERVERS}/)(?:(?:.*/)?(?:training|test|public)/)?"
    r"(?:(?P<site>.+)/)?(?P<subject>[^/]+)"
)

#: Every layout, the most particular first: the order in which they are tried.
LAYOUTS: tuple[Layout, ...] = (
    PatternLayout(
        "ukb",
        "<eid>_20253_<instance>_<n>/T2_FLAIR/lesions/final_mask.nii.gz, .../T2_FLAIR/T2_FLAIR",
        masks=(rf"{_UKB}/lesions/final_mask", rf"{_UKB}/T2(?:_FLAIR)?{_OURS}"),
        images=(rf"{_UKB}/T2_FLAIR",),
    ),
    PatternLayout(
        "adni",
        "ADNI/<ptid>/<series with FLAIR>/<date>/<image id>/*.nii, masks named *_mask",
        masks=(rf"{_ADNI}/[^/]*_mask", rf"{_ADNI_NAME}_[^/]*mask"),
        images=(rf"{_ADNI}/(?![^/]*(?:_mask|_probseg)$)[^/]+",),
    ),
    PatternLayout(
        "challenge",
        "[<site>/]<subject>/wmh.nii.gz or result.nii.gz, .../pre/FLAIR.nii.gz",
        masks=(rf"{_CHALLENGE}/(?:wmh|result)", rf"{_CHALLENGE}/(?:pre|orig)/FLAIR{_OURS}"),
        images=(rf"{_CHALLENGE}/pre/FLAIR",),
    ),
    BidsLayout(),
    FlatLayout(),
)


def find_scans(root: Path, kind: Kind, layout: str = "auto") -> list[ScanFile]:
    """Find the masks or the images of a cohort, with all subfolders.

    Parameters
    ----------
    root : Path
        The cohort's folder. Hidden entries and probability maps (``_probseg``) are left out.
    kind : str
        ``mask`` or ``image``.
    layout : str
        A name in `LAYOUTS`, or ``auto`` for the first that recognises any file.

    Returns
    -------
    list of ScanFile
        Sorted by path, at least one.

    Raises
    ------
    DataError
        The folder cannot be listed, holds no such file, or two for one scan that differ in nothing
        but their extensions.
    ConfigError
        There is no layout of that name.

    Examples
    --------
    >>> LAYOUTS[2].read("Utrecht/0/wmh", "mask").name
    'Utrecht/0'
    """
    return find_scans_and_rest(root, kind, layout)[0]


def find_scans_and_rest(
    root: Path, kind: Kind, layout: str = "auto"
) -> tuple[list[ScanFile], list[Path]]:
    """Find the masks or the images of a cohort, and files that may be some as well.

    Parameters and errors are those of `find_scans`.

    Returns
    -------
    scans : list of ScanFile
        What `find_scans` returns.
    rest : list of Path
        Files whose names the layout does not know, but another one takes for files of this kind.
    """
    chosen = [entry for entry in LAYOUTS if layout in ("auto", entry.name)]
    if not chosen:
        known = ", ".join(entry.name for entry in LAYOUTS)
        raise ConfigError(f"There is no layout {layout!r}; choose auto or one of {known}.")
    places = _places_below(root)
    for entry in chosen:
        found = entry.select(list(places), kind)
        if found:
            scans = [
                ScanFile(_only(places[place]), scan.subject, scan.session, scan.scan, scan.site)
                for place, scan in found.items()
            ]
            unknown = [place for place in places if place not in found and not entry.knows(place)]
            rest = [p for p in unknown if any(other.read(p, kind) for other in LAYOUTS)]
            return scans, [path for place in rest for path in places[place]]
    expected = "; ".join(f"{entry.name}: {entry.summary}" for entry in chosen)
    what = "WMH mask" if kind == "mask" else "FLAIR image"
    raise DataError(f"No {what} found in the folder {root}; expected {expected}.")


def _only(paths: Sequence[Path]) -> Path:
    if len(paths) > 1:
        raise DataError(f"{paths[0]} and {paths[1]} are files of one scan; remove one of them.")
    return paths[0]


def _places_below(root: Path) -> dict[str, list[Path]]:
    """Return image files by their path below the root, without extension, sorted."""
    places: dict[str, list[Path]] = {}
    for path in images_below(root):
        if "_probseg" not in path.name:
            extension = image_suffix(path) or ""
            place = path.relative_to(root).as_posix()[: -len(extension)]
            places.setdefault(place, []).append(path)
    return dict(sorted(places.items()))
