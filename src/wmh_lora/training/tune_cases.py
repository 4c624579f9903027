"""The validation scans that tuning uses: of a training run, of two folders, or of a split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wmh_lora.data.manifest import read_manifest
from wmh_lora.data.split import Part, read_split
from wmh_lora.errors import ConfigError, DataError
from wmh_lora.evaluation.cohort import match_scans, why_none_match
from wmh_lora.evaluation.layouts import find_scans
from wmh_lora.files import image_stem
from wmh_lora.logs import LOGGER
from wmh_lora.training.settings import RunConfig

__all__ = ["TuningCase", "cases_of_folders", "cases_of_manifest", "cases_of_run"]


@dataclass(frozen=True)
class TuningCase:
    """One validation scan.

    Attributes
    ----------
    name, subject : str
        Of the scan, and whose it is: scans of one subject are averaged.
    image : Path
        FLAIR.
    reference : Path or None
        Labels on the grid of the image: 1 lesion, 2 other pathology (not counted); None for a scan
        known to hold no lesion.
    """

    name: str
    subject: str
    image: Path
    reference: Path | None


def cases_of_run(config: RunConfig) -> list[TuningCase]:
    """List the validation scans of a training run; a stride of its own has no effect here.

    Where a scan's subject is not told, a name ending in ``_ses-<label>`` is a visit of the one
    named before.

    Raises
    ------
    ConfigError
        If a file does not exist.
    """
    cases = []
    for case in config.validation:
        image = config.resolve(case.image)
        reference = config.resolve(case.reference) if case.reference else None
        for path in (image, reference):
            if path is not None and not path.is_file():
                raise ConfigError(
                    f"The validation file {path} of the run does not exist; run the command where "
                    "the run was started, or name the data folder with --data-root."
                )
        name = case.name or image_stem(image)
        subject = case.subject or name.partition("_ses-")[0]
        cases.append(TuningCase(name, subject, image, reference))
    return cases


def cases_of_folders(images: Path, references: Path) -> list[TuningCase]:
    """Pair the FLAIR images of one folder with the masks of another, by subject and session.

    Raises
    ------
    DataError
        If a folder holds none, or nothing in one belongs to anything in the other.
    """
    pairs, lonely_images, lonely_masks = match_scans(
        find_scans(images, "image"), find_scans(references, "mask")
    )
    if not pairs:
        raise DataError(
            f"No image in {images} belongs to a reference in {references}: "
            + why_none_match(lonely_images, lonely_masks)
        )
    for file, reason in (*lonely_images, *lonely_masks):
        LOGGER.warning("%s is left out: %s.", file.path, reason)
    return [
        TuningCase(
            mask.name,
            f"{mask.site}/{mask.subject}" if mask.site else mask.subject,
            image.path,
            mask.path,
        )
        for image, mask in pairs
    ]


def cases_of_manifest(
    manifest: Path, split: Path, part: Part = "validation", name: str | None = None
) -> list[TuningCase]:
    """List the usable scans of one part of a split, after checking that they are unchanged.

    Parameters
    ----------
    manifest, split : Path
        Files that ``wmh-lora data`` wrote.
    part : str
        Part of the split.
    name : str, optional
        Of the split, where the file holds several.

    Raises
    ------
    DataError
        If a file is not what it should be, or scans have changed.
    ConfigError
        If the file holds several splits and no name is given.
    """
    listed = read_manifest(manifest)
    subjects = set(read_split(split, listed).split(name).part(part))
    return [
        TuningCase(
            scan.name,
            scan.subject,
            listed.file(scan.image),
            listed.file(scan.mask) if scan.mask else None,
        )
        for scan in listed.usable
        if scan.subject in subjects
    ]
