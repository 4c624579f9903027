"""Make ``src/wmh_lora/assets/mni_tissues.nii.gz`` from the MNI152 tissue maps that nilearn ships.

Run once: ``python tools/build_mni_tissues.py``. Needs nilearn (extra ``dev``).
"""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import nilearn
import numpy as np
from scipy import ndimage

from wmh_lora.data.anatomy import Tissue

SOURCE = Path(nilearn.__file__).parent / "datasets" / "data"
TARGET = Path(__file__).parents[1] / "src" / "wmh_lora" / "assets" / "mni_tissues.nii.gz"


def read(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a probability map in [0, 1] and its affine."""
    path = SOURCE / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz"
    image = nib.Nifti1Image.from_filename(path)
    return image.get_fdata(dtype=np.float32) / 255.0, image.affine


def main() -> None:
    """Classify, crop to the brain and write."""
    (grey, affine), (white, _) = read("gm"), read("wm")
    x, y, z = (
        affine[i, i] * np.arange(n).reshape([-1 if j == i else 1 for j in range(3)]) + affine[i, 3]
        for i, n in enumerate(grey.shape)
    )
    tissue = np.zeros(grey.shape, dtype=np.uint8)
    solid = grey + white > 0.45
    padded = np.pad(solid, 12)
    distance = ndimage.distance_transform_edt(~padded)
    hull = ndimage.distance_transform_edt(distance <= 9) > 9
    hull = np.stack([ndimage.binary_fill_holes(p) for p in np.moveaxis(hull, 2, 0)], axis=2)
    hull = hull[12:-12, 12:-12, 12:-12] | solid
    depth = ndimage.distance_transform_edt(hull)

    tissue[hull] = Tissue.CSF
    tissue[solid & (grey >= white)] = Tissue.CORTEX
    tissue[solid & (white > grey)] = Tissue.WHITE_MATTER
    central = (np.abs(x) < 34) & (y > -34) & (y < 24) & (z > -14) & (z < 20) & (depth > 18)
    tissue[central & (tissue == Tissue.CORTEX)] = Tissue.DEEP_GREY
    near = (np.abs(x) < 34) & (y > -62) & (y < 34) & (z > -30) & (z < 30) & (depth > 28)
    ventricle = ndimage.binary_opening((tissue == Tissue.CSF) & near)
    # the interhemispheric fissure and the cisterns reach the midline from outside
    ventricle &= ~((np.abs(x) < 4) & ((z > 20) | (y > 12) | (y < -30)) & (z > -10))
    tissue[ventricle] = Tissue.VENTRICLE
    below_tentorium = (y < -36) & (z < -2 - 0.35 * (-40 - y) - 0.3 * np.abs(x))
    tissue[below_tentorium & (tissue == Tissue.CORTEX)] = Tissue.CEREBELLAR_CORTEX
    tissue[below_tentorium & (tissue == Tissue.WHITE_MATTER)] = Tissue.CEREBELLAR_WHITE
    stem = (np.abs(x) < 17) & (y > -46) & (y < -8) & (z < -8) & (tissue == Tissue.WHITE_MATTER)
    tissue[stem] = Tissue.BRAINSTEM

    box = ndimage.find_objects((tissue > 0).astype(np.uint8))[0]
    box = tuple(slice(max(0, s.start - 4), s.stop + 4) for s in box)
    affine = affine.copy()
    affine[:3, 3] += [affine[i, i] * s.start for i, s in enumerate(box)]
    image = nib.Nifti1Image(tissue[box], affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, TARGET)


if __name__ == "__main__":
    main()
