"""How bright tissue is beside the normal tissue around it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["local_contrast"]

_AROUND_MM = 30.0
_LEAST_TISSUE = 0.01  # of the surroundings; with less there is nothing to compare with


def local_contrast(
    image: NDArray[np.float32],
    normal: NDArray[np.bool_],
    spacing_mm: tuple[float, float, float],
    *,
    through: int,
    smooth_mm: float,
) -> NDArray[np.float32]:
    """Compare every voxel with the normal tissue of its slice within 15 mm.

    Coil shading and the drift of intensities from slice to slice change both alike.

    Parameters
    ----------
    image
        (I, J, K) intensities, dark fluid near zero.
    normal
        (I, J, K) the tissue to compare with, lesions left out.
    spacing_mm
        Voxel size.
    through
        The axis across the slices.
    smooth_mm
        Standard deviation of the smoothing within slices that takes the edge off noise.

    Returns
    -------
    float32 array (I, J, K)
        Intensity over the mean of the normal tissue in the square of 30 mm around; infinite where
        there is next to none.
    """
    across = [a == through for a in range(3)]
    size = [1 if a else max(1, round(_AROUND_MM / s)) for a, s in zip(across, spacing_mm)]
    sigma = [0.0 if a else smooth_mm / s for a, s in zip(across, spacing_mm)]
    tissue = normal.astype(np.float32)
    share = ndimage.uniform_filter(tissue, size, mode="constant")
    around = ndimage.uniform_filter(image * tissue, size, mode="constant")
    contrast = np.full(image.shape, np.inf, dtype=np.float32)
    brightness = ndimage.gaussian_filter(image, sigma) * share
    np.divide(brightness, np.maximum(around, 1e-6), out=contrast, where=share > _LEAST_TISSUE)
    return contrast
