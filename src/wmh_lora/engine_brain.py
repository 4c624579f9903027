"""What the network takes for brain and for lesion beyond the brain, in scalp and neck.

In the outermost slices scalp and marrow can look like brain with a lesion in it. No slice tells
alone, but the slices next to it do: brain goes on from one to the next, scalp there has no brain
beside it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from wmh_lora.engine_views import EVIDENCE, STRUCTURE_LEVEL, SliceMaps

__all__ = ["main_brain", "within_brain"]

BoolArray = NDArray[np.bool_]

_PLAUSIBLE_CM2 = 40.0
"""A slice through the middle of an adult's brain shows more; where none does, nothing is judged."""

_SHARE_BESIDE = 0.5
"""Share of a part that must lie beside the brain of the slice before it: thick slices shift."""

_IN_SLICE = np.zeros((3, 3, 3), dtype=np.bool_)
_IN_SLICE[1] = True


def within_brain(maps: SliceMaps, pixel_size_mm: float) -> SliceMaps:
    """Remove islands of lesion that touch no brain, and brain that does not belong to the rest.

    Parameters
    ----------
    maps : SliceMaps
        On the network's grid (S, H, W). Maps without a brain come back as they are.
    pixel_size_mm : float
        Side of a pixel.

    Returns
    -------
    SliceMaps
        Where an island of evidence (`wmh_lora.engine_views.EVIDENCE` and more, within its slice)
        lies wholly outside the `main_brain`, probability and deviation are zero. An island that
        reaches into the brain stays whole.
    """
    marked = maps.structures.get("brain")
    if marked is None:
        return maps
    brain = main_brain(marked > STRUCTURE_LEVEL, pixel_size_mm)
    if brain is None:
        return maps
    probability, deviation = maps.probability.copy(), maps.deviation
    deviation = None if deviation is None else deviation.copy()
    evidence = probability >= EVIDENCE
    for index in np.flatnonzero((evidence & ~brain).any(axis=(1, 2))):
        islands, count = ndimage.label(evidence[index])
        outside = np.ones(count + 1, dtype=np.bool_)
        # one pixel wider: a lesion may lie in a hole of the brain
        outside[islands[ndimage.binary_dilation(brain[index])]] = False
        outside[0] = False
        beyond = outside[islands]
        probability[index][beyond] = 0.0
        if deviation is not None:
            deviation[index][beyond] = 0.0
    kept = np.where(brain | (marked <= STRUCTURE_LEVEL), marked, np.uint8(0))
    return SliceMaps(probability, deviation, {**maps.structures, "brain": kept})


def main_brain(marked: BoolArray, pixel_size_mm: float) -> BoolArray | None:
    """Follow the brain from its largest cross-section outwards, slice by slice.

    Parameters
    ----------
    marked : bool array (S, H, W)
        What the network takes for brain.
    pixel_size_mm : float
        Side of a pixel.

    Returns
    -------
    bool array (S, H, W) or None
        The parts of each slice that lie for at least half beside what was kept of the slice before
        it; a slice without any is passed over. None where no part is as large as a brain.
    """
    parts, count = ndimage.label(marked, _IN_SLICE)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    sizes[0] = 0
    largest = int(sizes.argmax())
    if sizes[largest] * pixel_size_mm**2 < 100.0 * _PLAUSIBLE_CM2:
        return None
    keep = np.zeros(count + 1, dtype=np.bool_)
    keep[largest] = True
    middle = int(np.flatnonzero((parts == largest).any(axis=(1, 2)))[0])
    for order in (range(middle + 1, len(parts)), range(middle - 1, -1, -1)):
        beside = parts[middle] == largest
        for index in order:
            inside = np.bincount(parts[index][beside], minlength=count + 1)
            inside[0] = 0
            keep |= (inside > 0) & (inside >= _SHARE_BESIDE * sizes)
            here = keep[parts[index]]
            beside = here if here.any() else beside
    return np.asarray(keep[parts], dtype=np.bool_)
