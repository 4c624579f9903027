"""File names of BIDS: entities in their order, and the names of what is derived from a scan."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from wmh_lora.errors import ConfigError
from wmh_lora.files import image_suffix

__all__ = [
    "ENTITIES",
    "OF_DERIVATIVES",
    "BidsName",
    "DerivedFiles",
    "derived_files",
    "parse_name",
]

#: Entities that a FLAIR or a mask of one may have, short to long, in the order that BIDS 1.10
#: gives them in a file name.
ENTITIES: Mapping[str, str] = {
    "sub": "subject",
    "ses": "session",
    "task": "task",
    "acq": "acquisition",
    "ce": "ceagent",
    "rec": "reconstruction",
    "run": "run",
    "echo": "echo",
    "part": "part",
    "space": "space",
    "chunk": "chunk",
    "label": "label",
    "desc": "description",
}

OF_DERIVATIVES = frozenset({"space", "label"})
"""Entities that the names of results have beside those of their scan."""

_WORD = re.compile(r"([A-Za-z]+)-([A-Za-z0-9+]+)")


@dataclass(frozen=True)
class BidsName:
    """A file name, read.

    Attributes
    ----------
    entities : mapping of str to str
        Short names to labels, such as ``{"sub": "01", "run": "2"}``.
    suffix : str
        What comes after the entities, such as ``FLAIR``.
    """

    entities: Mapping[str, str]
    suffix: str

    @property
    def folder(self) -> PurePosixPath:
        """Where a data set keeps such a file: ``sub-01/ses-1/anat``."""
        parts = [f"{key}-{self.entities[key]}" for key in ("sub", "ses") if key in self.entities]
        return PurePosixPath(*parts, "anat")

    @property
    def of_derivatives(self) -> tuple[str, ...]:
        """Which entities it has that results need for themselves; no scan of raw data has any."""
        return tuple(sorted(self.entities.keys() & OF_DERIVATIVES))

    @property
    def stem(self) -> str:
        """The entities as they begin a file name."""
        return self.with_entities().rpartition("_")[0]

    def with_entities(self, suffix: str | None = None, **more: str) -> str:
        """Write the name with further entities, all in the order of BIDS, without extension.

        Examples
        --------
        >>> parse_name("sub-01_run-1_chunk-2_FLAIR.nii.gz").with_entities("mask", space="orig")
        'sub-01_run-1_space-orig_chunk-2_mask'
        """
        entities = {**self.entities, **more}
        order = list(ENTITIES)
        words = [f"{key}-{entities[key]}" for key in sorted(entities, key=order.index)]
        return "_".join([*words, self.suffix if suffix is None else suffix])


class DerivedFiles(NamedTuple):
    """Paths of what is made from one scan, in the order in which they appear."""

    mask: Path
    probability: Path
    report: Path
    picture: Path
    page: Path
    probability_sidecar: Path
    mask_sidecar: Path


def parse_name(name: str) -> BidsName:
    """Read a file name.

    Raises
    ------
    ConfigError
        If it does not follow BIDS, or has entities that no FLAIR has.

    Examples
    --------
    >>> parse_name("sub-01_ses-2_FLAIR.nii.gz").entities
    {'sub': '01', 'ses': '2'}
    """
    extension = image_suffix(name)
    *words, suffix = (name[: -len(extension)] if extension else name).split("_")
    matches = [_WORD.fullmatch(word) for word in words]
    entities = {match[1]: match[2] for match in matches if match}
    unknown = sorted(set(entities) - set(ENTITIES))
    repeated = len(entities) < len(words)
    if None in matches or unknown or repeated or "sub" not in entities:
        raise ConfigError(
            f"{name} is no BIDS name of a FLAIR; expected sub-<label>[_ses-<label>] and more of "
            f"{', '.join(ENTITIES)}, each once, before the suffix. Rename it, or leave its "
            "participant out with --participant-label."
        )
    return BidsName(entities, suffix)


def derived_files(out_dir: str | Path, scan: BidsName) -> DerivedFiles:
    """Name what is derived from a scan.

    Masks and probability maps are valid derivatives. BIDS has no name for reports: they keep the
    ending of `wmh_lora.report.outputs.output_files`, and ``.bidsignore`` lists it.

    Examples
    --------
    >>> derived_files("out", parse_name("sub-01_FLAIR.nii.gz")).mask.as_posix()
    'out/sub-01/anat/sub-01_space-orig_label-WMH_mask.nii.gz'
    """
    folder = Path(out_dir, scan.folder)
    mask = scan.with_entities("mask", space="orig", label="WMH")
    probability = scan.with_entities("probseg", space="orig", label="WMH")
    return DerivedFiles(
        mask=folder / f"{mask}.nii.gz",
        probability=folder / f"{probability}.nii.gz",
        report=folder / f"{scan.stem}_wmh.json",
        picture=folder / f"{scan.stem}_wmh.png",
        page=folder / f"{scan.stem}_wmh.html",
        probability_sidecar=folder / f"{probability}.json",
        mask_sidecar=folder / f"{mask}.json",
    )
