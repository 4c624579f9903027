"""The baseline that needs no training: lesion is what is much brighter than white matter.

A voxel of the brain is lesion if its FLAIR intensity exceeds the mode of white matter by ``k``
times the spread of the brain's intensities. This family of methods is older than learning, see
Jack et al., "FLAIR histogram segmentation for measurement of leukoaraiosis volume", Journal of
Magnetic Resonance Imaging 14:668-676, 2001, doi:10.1002/jmri.10011. Only ``k`` is chosen, on the
training scans.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wmh_lora.components import largest_component
from wmh_lora.config import PreprocessConfig
from wmh_lora.evaluation.sweep import sweep
from wmh_lora.preprocess import WHITE_MATTER_LEVEL, Prepared, preprocess, restore
from wmh_lora.volume import Volume

__all__ = ["brain_of", "brightness_map", "choose_k", "scale_of"]

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

# Fluid, bone and air are darker than half of white matter, fat is brighter than twice of it.
_TISSUE_LEVELS = (0.5 * WHITE_MATTER_LEVEL, 2.0 * WHITE_MATTER_LEVEL)
# Half the width of the bridges between brain and scalp that are cut; of what that takes off the
# brain, the outermost part stays off, where meninges make it bright.
_BRIDGE_MM = 7.0
_RIM_MM = 2.0
_NORMAL_MAD = 1.4826  # standard deviations in the median absolute deviation of a normal law


def brain_of(prepared: Prepared) -> BoolArray:
    """Find the brain by its brightness and shape: an opening, then the largest component.

    What is as bright as brain is eroded by 7 mm in each slice, so that the scalp comes off along
    the dark bone; the largest component is grown back by 5 mm, and holes (fluid, very bright
    lesions) are filled.

    Returns
    -------
    bool array (S, H, W)
        On the network's grid; empty where nothing is as thick as a brain.
    """
    low, high = _TISSUE_LEVELS
    pixel = prepared.config.pixel_size_mm
    tissue = (prepared.slices > low) & (prepared.slices < high)
    depth = np.stack([_depth(plane) for plane in tissue]) * pixel
    core = largest_component(depth > _BRIDGE_MM)
    brain = np.zeros_like(tissue)
    for plane, centre, bright in zip(brain, core, prepared.slices > low):
        if centre.any():
            near = ndimage.distance_transform_edt(~centre) * pixel <= _BRIDGE_MM - _RIM_MM
            plane[:] = ndimage.binary_fill_holes(bright & near)
    return brain


def brightness_map(prepared: Prepared, largest_k: float) -> FloatArray:
    """Say how much brighter than white matter each voxel of the brain is.

    The spread is 1.4826 times the median absolute deviation from the mode of white matter, over the
    brain's tissue: the standard deviation of a normal law, which lesions hardly move.

    Returns
    -------
    array (I, J, K) float32 in [0, 1]
        ``k / largest_k`` on the scan's own grid, 0 outside the brain; 1 from ``largest_k`` on.
    """
    brain = brain_of(prepared)
    values = prepared.slices[brain & (prepared.slices > _TISSUE_LEVELS[0])]
    spread = 0.0
    if values.size:
        spread = _NORMAL_MAD * float(np.median(np.abs(values - WHITE_MATTER_LEVEL)))
    scaled = (prepared.slices - WHITE_MATTER_LEVEL) / (max(spread, 1e-6) * largest_k)
    return restore(np.where(brain, np.clip(scaled, 0.0, 1.0), 0.0).astype(np.float32), prepared)


def choose_k(
    scans: Iterable[tuple[str, Volume, npt.NDArray[np.generic]]],
    config: PreprocessConfig,
    k: Sequence[float],
) -> float:
    """Choose the multiple with the best mean Dice over people.

    Parameters
    ----------
    scans : iterable of (subject, FLAIR, labels)
        Training scans; those whose labels hold no lesion have no Dice, and do not count.
    config : PreprocessConfig
        Of the scans.
    k : sequence of float
        Multiples to try; of equal ones the smallest is taken.
    """
    levels = sorted(k)
    scale = scale_of(levels)
    rows: dict[str, list[npt.NDArray[np.float64]]] = {}
    for subject, volume, labels in scans:
        found = brightness_map(preprocess(volume, config), scale)
        dice = sweep(found, labels, [level / scale for level in levels], [1])["dice"][:, 0]
        if (labels == 1).any():
            rows.setdefault(subject, []).append(dice)
    if not rows:
        return levels[len(levels) // 2]
    means = np.mean([np.mean(own, axis=0) for own in rows.values()], axis=0)
    return levels[int(np.argmax(means))]


def scale_of(k: Sequence[float]) -> float:
    """Return the multiple at which a map ends: a little above the largest that is tried."""
    return 1.25 * max(k)


def _depth(plane: BoolArray) -> npt.NDArray[np.float64]:
    """Distance of each pixel to the nearest one outside; beyond the border all is outside."""
    return np.asarray(ndimage.distance_transform_edt(np.pad(plane, 1))[1:-1, 1:-1])
