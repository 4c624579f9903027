"""A folder of labelled scans with its manifest and split."""

from __future__ import annotations

from pathlib import Path

from tests.phantoms import head
from wmh_lora.data.catalog import make_manifest
from wmh_lora.data.manifest import write_manifest
from wmh_lora.data.split import split_fractions, write_split
from wmh_lora.volume import write_nifti


def write_labelled_scans(folder: Path, count: int = 4) -> dict[str, str]:
    """Scans with two lesions and a patch of other pathology (label 2); half are to train on.

    Returns the ``[data]`` table that names them.
    """
    scans = folder / "scans"
    scans.mkdir(parents=True)
    for number in range(count):
        volume, mask = head(seed=number)
        mask[24:28, 40:46, 3] = 2
        write_nifti(scans / f"p{number}_FLAIR.nii.gz", volume.data, volume)
        write_nifti(scans / f"p{number}_mask.nii.gz", mask, volume)
    manifest = write_manifest(make_manifest(scans, "flat"), folder / "manifest.json")
    write_split(split_fractions(manifest, (0.5, 0.25, 0.25)), folder / "split.json")
    return {"root": str(folder), "manifest": "manifest.json", "split": "split.json"}
