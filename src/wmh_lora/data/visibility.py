"""What of a painted lesion a reader can see in the scan that came of it.

Thin rims fill up with dark fluid in a voxel, faint patches drown in noise and coil shading. Labels
that nothing in the picture supports teach a network to doubt what it sees. And readers call a
lesion what stands out among the lesions of the same scan: what has less than half of their
brightness over white matter, the haze around them or a dirty patch, they leave out.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wmh_lora.contrast import local_contrast
from wmh_lora.data.fields import FloatArray
from wmh_lora.postprocess import remove_small_components

__all__ = ["judge_visibility"]

BoolArray = npt.NDArray[np.bool_]

LEAST_SHARE = 0.5
"""Excess brightness over the normal tissue around it, as a share of what the scan's lesions have
(their median), below which a voxel is no lesion to a reader."""

CERTAIN_SHARE = 0.7
"""Share from which it is one; in between, readers differ."""

LEAST_EXCESS = (0.03, 0.2)
"""Whatever the scan's lesions look like, less than the first is none, the second may be one."""

CERTAIN_EXCESS = (0.08, 0.3)
"""Less than the first is never certain, more than the second always."""

_SMOOTH_MM = 0.8
_LEAST_VOXELS = 3


def judge_visibility(
    image: FloatArray,
    lesion: BoolArray,
    normal: BoolArray,
    spacing_mm: tuple[float, float, float],
) -> tuple[BoolArray, BoolArray]:
    """Divide painted lesions by how bright they have become.

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
        Brighter than what is around by `CERTAIN_SHARE` of what the scan's lesions are, within
        `CERTAIN_EXCESS`; or nothing to compare with.
    doubtful : array (I, J, K) bool
        Brighter by `LEAST_SHARE`, within `LEAST_EXCESS`, but not visible; darker beside what is
        visible; or visible in a voxel or two alone.
    """
    if not lesion.any():
        return lesion.copy(), np.zeros_like(lesion)
    through = int(np.argmax(spacing_mm))
    excess = local_contrast(
        image, normal & ~lesion, spacing_mm, through=through, smooth_mm=_SMOOTH_MM
    )
    excess -= 1.0
    clear = excess[lesion & np.isfinite(excess) & (excess >= CERTAIN_EXCESS[0])]
    typical = float(np.median(clear)) if clear.size else 0.0
    certain = float(np.clip(CERTAIN_SHARE * typical, *CERTAIN_EXCESS))
    least = float(np.clip(LEAST_SHARE * typical, *LEAST_EXCESS))
    visible = remove_small_components(lesion & (excess >= certain), _LEAST_VOXELS) > 0
    beside = ndimage.binary_dilation(visible, np.ones([1 if a == through else 3 for a in range(3)]))
    doubtful = lesion & ~visible & (beside | (excess >= least))
    return visible, doubtful
