"""A folder of labelled scans with its manifest and split, and T1 scans on grids of their own."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

import numpy as np

from tests.phantoms import SHAPE, head
from wmh_lora.data.catalog import make_manifest
from wmh_lora.data.manifest import write_manifest
from wmh_lora.data.split import split_fractions, write_split
from wmh_lora.volume import Volume, write_nifti

T1_SHAPE = (40, 46, 44)


def t1_of(flair: Volume) -> Volume:
    """T1 of `tests.phantoms.head`: other voxels, axes and field of view, lesions dark.

    White matter is 900, fluid 100, lesions 550.
    """
    affine = np.diag([-5.0, 5.0, 3.0, 1.0])  # stored from right to left
    affine[:3, 3] = flair.affine[:3, 3] + [198.0, -8.0, -20.0]
    levels = np.array([0.0, 100.0, 900.0, 550.0])
    values = levels[np.digitize(flair.data, [30.0, 150.0, 450.0])]
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in T1_SHAPE), indexing="ij"))
    world = np.tensordot(affine[:3, :3], grid, 1) + affine[:3, 3, None, None, None]
    start = flair.affine[:3, 3, None, None, None]
    nearest = np.rint((world - start) / np.array(flair.spacing_mm)[:, None, None, None]).astype(int)
    seen = (nearest >= 0).all(axis=0) & (nearest < np.array(SHAPE)[:, None, None, None]).all(axis=0)
    data = np.where(seen, values[tuple(np.clip(n, 0, s - 1) for n, s in zip(nearest, SHAPE))], 0.0)
    noise = np.random.default_rng(7).normal(0.0, 6.0, T1_SHAPE)
    return Volume((data + noise).astype(np.float32), affine)


def write_labelled_scans(
    folder: Path, count: int = 4, *, with_t1: Container[int] = ()
) -> dict[str, str]:
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
        if number in with_t1:
            t1 = t1_of(volume)
            write_nifti(scans / f"p{number}_T1.nii.gz", t1.data, t1)
    manifest = write_manifest(make_manifest(scans, "flat"), folder / "manifest.json")
    write_split(split_fractions(manifest, (0.5, 0.25, 0.25)), folder / "split.json")
    return {"root": str(folder), "manifest": "manifest.json", "split": "split.json"}
