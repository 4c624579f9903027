"""How much a volume may differ between two scans of an unchanged person.

The limit of repeatability is 1.96 sqrt(2) within-subject standard deviations (Bland and Altman,
BMJ 313:744, 1996). Without scans and rescans that deviation is not known. It is then estimated
from the masks: a boundary on a voxel grid is known to a uniform error of one voxel, which has a
standard deviation of 1 / sqrt(12) = 0.29 voxels, and the whole boundary of a lesion is taken to
move with it. Lesions are taken to err independently.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from wmh_lora.volume import Volume

__all__ = ["boundary_sd_ml", "limit_ml"]

# Voxel faces overstate the area of a smooth surface by 3/2, averaged over its directions.
_AREA_OF_FACES = 2.0 / 3.0


def boundary_sd_ml(
    labels: npt.NDArray[np.int32], count: int, volume: Volume, boundary_sd_voxels: float
) -> npt.NDArray[np.float64]:
    """Estimate the standard deviation of each lesion's volume from its surface.

    Parameters
    ----------
    labels : int array (I, J, K)
        Lesions numbered from 1 to ``count``.
    count : int
        Number of lesions.
    volume : Volume
        The scan, for its voxel size.
    boundary_sd_voxels : float
        Standard deviation of the place of a boundary, in voxel edges across it.

    Returns
    -------
    array (count,)
        In mL: the area times the deviation across it, so that each face of a voxel on the surface
        gives 2/3 ``boundary_sd_voxels`` voxel volumes.
    """
    padded = np.pad(labels, 1)
    faces = np.zeros(count + 1)
    for axis in range(3):
        one = np.moveaxis(padded, axis, 0)
        border = one[1:] != one[:-1]
        for side in (one[1:][border], one[:-1][border]):
            faces += np.bincount(side, minlength=count + 1)
    per_face_ml = _AREA_OF_FACES * boundary_sd_voxels * volume.voxel_volume_ml
    return np.asarray(faces[1:] * per_face_ml)


def limit_ml(first_sd_ml: float, second_sd_ml: float) -> float:
    """Return what the difference of two volumes exceeds in 5 % of unchanged pairs.

    Examples
    --------
    >>> round(limit_ml(1.0, 1.0), 2)
    2.77
    """
    return 1.96 * math.hypot(first_sd_ml, second_sd_ml)
