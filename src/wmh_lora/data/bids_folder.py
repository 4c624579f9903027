"""Labelled scans in a BIDS folder whose masks lie in ``derivatives/manual``.

`wmh_lora.data.layouts` reads whatever studies look like; this is the one form that training takes
without a manifest.
"""

from __future__ import annotations

from pathlib import Path

from wmh_lora.errors import DataError

__all__ = ["bids_images", "bids_masks", "bids_t1", "labelled_scans"]

_LABELS = {"wmh": "WMH", "ventricles": "ventricles", "brain": "brain"}


def bids_images(root: Path) -> list[Path]:
    """List the FLAIR scans of a BIDS folder of labelled scans.

    Raises
    ------
    DataError
        If there is none, or there are sessions, which this form does not have.
    """
    images = sorted(root.glob("sub-*/anat/*_FLAIR.nii.gz"))
    if session := next(root.glob("sub-*/ses-*/anat/*_FLAIR.nii.gz"), None):
        raise DataError(
            f"{session}: folders of sessions are not read here; give the scans by data.manifest "
            "and data.split (`wmh-lora data prepare`)."
        )
    if not images:
        raise DataError(f"{root}: no sub-*/anat/*_FLAIR.nii.gz there.")
    return images


def bids_masks(root: Path, image: Path) -> list[tuple[str, Path]]:
    """List the structures that are labelled in a scan of a BIDS folder, with their masks.

    A mask has the name of its scan, entities such as ``run-1`` included; where a subject has one
    scan, the subject's name does.
    """
    subject = image.name.split("_")[0]
    folder = root / "derivatives" / "manual" / subject / "anat"
    stems = [image.name.removesuffix("_FLAIR.nii.gz")]
    if len(list(image.parent.glob("*_FLAIR.nii.gz"))) == 1:
        stems.append(subject)
    found = []
    for name, label in _LABELS.items():
        paths = [folder / f"{stem}_space-orig_label-{label}_mask.nii.gz" for stem in stems]
        found += [(name, path) for path in paths if path.exists()][:1]
    return found


def labelled_scans(root: Path) -> list[tuple[Path, list[tuple[str, Path]]]]:
    """List the scans of a BIDS folder with their masks; DataError if none of them has any."""
    scans = [(image, bids_masks(root, image)) for image in bids_images(root)]
    if not any(masks for _, masks in scans):
        raise DataError(
            f"{root}: no scan has a mask to learn from; expected derivatives/manual/sub-*/anat/"
            "sub-*_space-orig_label-WMH_mask.nii.gz, or label-ventricles or label-brain."
        )
    return scans


def bids_t1(image: Path) -> Path | None:
    """Return the T1 of the session of a FLAIR, if there is one."""
    path = image.with_name(image.name.replace("_FLAIR.", "_T1w."))
    return path if path.exists() else None
