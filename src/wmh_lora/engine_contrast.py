"""What the network takes for lesion and is haze beside the scan's lesions.

Readers outline what stands out among the lesions of a scan. Normal white matter is up to a fifth
brighter in places, behind the ventricles' horns and along the pyramidal tracts above all, and in
slices of several millimetres so is what neighbours cortex or lesion; a network that looks at one
slice takes much of it for faint lesions. How bright the lesions of a scan are it tells well itself.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from wmh_lora.contrast import local_contrast
from wmh_lora.engine_views import EVIDENCE, STRUCTURE_LEVEL, SliceMaps

__all__ = ["without_haze"]

_NORMAL = 0.2
"""Probability of lesion below which brain is what the rest is compared with."""

_SURE = 0.8
"""Probability from which a pixel tells how bright the lesions of its scan are."""

_ENOUGH_CM2 = 0.2
"""Over all slices; fewer sure pixels tell nothing, and `_USUAL_EXCESS` stands for them."""

_USUAL_EXCESS = 0.3

_SMOOTH_MM = 0.6

_AT_ONCE = 8
"""Slices; what is computed on the way takes several times their memory."""

_IN_SLICE = np.ones((1, 3, 3), dtype=np.bool_)


def without_haze(
    maps: SliceMaps, slices: NDArray[np.float32], pixel_size_mm: float, min_contrast: float
) -> SliceMaps:
    """Set the probability of lesion to zero where the picture is hardly brighter than around.

    Parameters
    ----------
    maps : SliceMaps
        On the network's grid (S, H, W). Maps without a brain come back as they are.
    slices : float32 array (S, H, W)
        What the network has seen, see `wmh_lora.preprocess.Prepared`.
    pixel_size_mm : float
        Side of a pixel.
    min_contrast : float
        Excess brightness over the normal tissue within 15 mm that a lesion has at least, as a share
        of the median excess of the scan's certain lesions; 0 changes nothing.

    Returns
    -------
    SliceMaps
        Probability and deviation are zero where the picture is fainter than that; the rest is as
        it was. Where there is no normal tissue around, nothing is judged.
    """
    if "brain" not in maps.structures or min_contrast == 0:
        return maps
    shown = np.flatnonzero((maps.probability >= EVIDENCE).any(axis=(1, 2)))
    if not len(shown):
        return maps
    probability = maps.probability[shown]
    excess = np.empty_like(probability)
    for start in range(0, len(shown), _AT_ONCE):
        part = shown[start : start + _AT_ONCE]
        contrast = local_contrast(
            slices[part],
            _normal(maps, part),
            (pixel_size_mm,) * 3,  # slices are not mixed
            through=0,
            smooth_mm=_SMOOTH_MM,
        )
        excess[start : start + _AT_ONCE] = contrast - 1.0
    sure = excess[(probability >= _SURE) & np.isfinite(excess)]
    enough = sure.size * pixel_size_mm**2 >= 100.0 * _ENOUGH_CM2
    typical = float(np.median(sure)) if enough else _USUAL_EXCESS
    haze = excess < min_contrast * typical
    cleared = maps.probability.copy()
    cleared[shown] = np.where(haze, 0.0, probability)
    deviation = maps.deviation
    if deviation is not None:
        deviation = deviation.copy()
        deviation[shown] = np.where(haze, 0.0, deviation[shown])
    return SliceMaps(cleared, deviation, maps.structures)


def _normal(maps: SliceMaps, indices: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Mark brain that is neither lesion nor ventricle, nor next to a ventricle."""
    normal = (maps.structures["brain"][indices] > STRUCTURE_LEVEL) & (
        maps.probability[indices] < _NORMAL
    )
    if "ventricles" in maps.structures:
        fluid = maps.structures["ventricles"][indices] > STRUCTURE_LEVEL
        normal &= ~ndimage.binary_dilation(fluid, _IN_SLICE)
    return np.asarray(normal, dtype=np.bool_)
