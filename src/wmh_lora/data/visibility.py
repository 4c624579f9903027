"""What of a painted lesion a reader can see in the scan that came of it.

Thin rims fill up with dark fluid in a voxel, faint patches drown in noise and coil shading. Labels
that nothing in the picture supports teach a network to doubt what it sees.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wmh_lora.data.fields import FloatArray
from wmh_lora.postprocess import remove_small_components

__all__ = ["CERTAIN_CONTRAST", "LEAST_CONTRAST", "judge_visibility"]

BoolArray = npt.NDArray[np.bool_]

LEAST_CONTRAST = 1.03
"""Brightness over the normal tissue around it below which a voxel is no lesion to a reader."""

CERTAIN_CONTRAST = 1.08
"""Brightness from which it is one; in between, readers differ."""

_AROUND_MM = 30.0
_SMOOTH_MM = 0.8
_LEAST_VOXELS = 3
_LEAST_TISSUE = 0.01  # of the surroundings; with less there is nothing to compare with


def judge_visibility(
    image: FloatArray,
    lesion: BoolArray,
    normal: BoolArray,
    spacing_mm: tuple[float, float, float],
) -> tuple[BoolArray, BoolArray]:
    """Divide painted lesions by how bright they have become.

    A voxel is compared, after smoothing within the slice, with the mean of the normal tissue in
    the square of `_AROUND_MM` around it.

    Parameters
    ----------
    image
        (I, J, K) the scan.
    lesion
        (I, J, K) where lesions were painted.
    normal
        (I, J, K) tissue that may hold lesions; what ``lesion`` marks is left out.
    spacing_mm
        Voxel size; slices lie along the longest side.

    Returns
    -------
    visible : array (I, J, K) bool
        At least `CERTAIN_CONTRAST` times as bright as around, or nothing to compare with.
    doubtful : array (I, J, K) bool
        Between `LEAST_CONTRAST` and that, darker beside what is visible, or visible in a voxel or
        two alone.
    """
    if not lesion.any():
        return lesion.copy(), np.zeros_like(lesion)
    through = int(np.argmax(spacing_mm))
    size = [1 if a == through else max(1, round(_AROUND_MM / s)) for a, s in enumerate(spacing_mm)]
    sigma = [0.0 if a == through else _SMOOTH_MM / s for a, s in enumerate(spacing_mm)]
    healthy = (normal & ~lesion).astype(np.float32)
    share = ndimage.uniform_filter(healthy, size, mode="constant")
    around = ndimage.uniform_filter(image * healthy, size, mode="constant")
    comparable = share > _LEAST_TISSUE
    contrast = ndimage.gaussian_filter(image, sigma) * share
    visible = lesion & (~comparable | (contrast >= CERTAIN_CONTRAST * around))
    visible = remove_small_components(visible, _LEAST_VOXELS) > 0
    beside = ndimage.binary_dilation(visible, np.ones([1 if n == 1 else 3 for n in size]))
    doubtful = lesion & ~visible & (beside | (contrast >= LEAST_CONTRAST * around))
    return visible, doubtful
