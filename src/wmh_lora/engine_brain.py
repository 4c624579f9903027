"""What the network takes for brain and for lesion beyond the brain, in scalp and neck.

In the outermost slices scalp and marrow can look like brain with a lesion in it. No slice tells
alone, but the slices next to it do: brain goes on from one to the next, scalp there has no brain
beside it, and lies just below the air.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from wmh_lora.engine_views import EVIDENCE, STRUCTURE_LEVEL, SliceMaps
from wmh_lora.preprocess import WHITE_MATTER_LEVEL, Prepared
from wmh_lora.preprocess_head import fill_head

__all__ = ["below_skull", "main_brain", "within_brain"]

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float32]

_PLAUSIBLE_CM2 = 40.0
"""A slice through the middle of an adult's brain shows more; where none does, nothing is judged."""

_SHARE_BESIDE = 0.5
"""Share of a part that must lie beside the brain of the slice before it: thick slices shift."""

_IN_SLICE = np.zeros((3, 3, 3), dtype=np.bool_)
_IN_SLICE[1] = True
_DISC = ndimage.generate_binary_structure(2, 1)[None]

_SKULL_MM = 10.0
"""Skin and skull over the brain. Of the lesions that readers drew in ten whole heads (`tabriz`),
99 in 100 voxels lie 13.8 mm and deeper in each."""

_SHOWN_MM = 8.0
"""Depth of the brain's outline, its median, from which a scan shows skin and skull: 8.9 to 15 mm in
whole heads, 2 to 5 where fat is dark, none where the brain was extracted."""

_GRID_MM = 2.0
_MIDDLE = 0.8  # of the largest cross-section, for a slice's outline to count
_DARKEST_HEAD = 0.375 * WHITE_MATTER_LEVEL
_GAP_MM = 6.0  # of dark bone and muscle between skin and brain, closed
_SEVERED = 0.5  # of the largest cross-section: where a head ends with more, it was cut, not rounded


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
    # one pixel wider: a lesion may lie in a hole of the brain
    outside = ~ndimage.binary_dilation(brain, _DISC)
    maps = _without_islands(maps, outside, lambda there, pixels: there == pixels)
    kept = np.where(brain | (marked <= STRUCTURE_LEVEL), marked, np.uint8(0))
    return SliceMaps(maps.probability, maps.deviation, {**maps.structures, "brain": kept})


def below_skull(maps: SliceMaps, prepared: Prepared) -> SliceMaps:
    """Remove islands of lesion that lie where skin and skull are, in scans that show both.

    Parameters
    ----------
    maps : SliceMaps
        On the network's grid (S, H, W). Maps without a brain come back as they are.
    prepared : Prepared
        The scan that they are of.

    Returns
    -------
    SliceMaps
        Where an island of evidence (`wmh_lora.engine_views.EVIDENCE` and more, within its slice)
        has more than half of its pixels less than 10 mm below the skin, through the slices as well,
        probability and deviation are zero. Scans whose brain comes closer to the surface, because
        it was extracted or fat is dark, are not judged.
    """
    marked = maps.structures.get("brain")
    if marked is None:
        return maps
    slice_mm, pixel_mm = prepared.view.spacing_mm[0], prepared.config.pixel_size_mm
    through, across = (max(1, round(_GRID_MM / s)) for s in (slice_mm, pixel_mm))
    coarse = (slice(None, None, through), *(slice(None, None, across),) * 2)
    spacing_mm = (slice_mm * through, pixel_mm * across, pixel_mm * across)
    brain = marked[coarse] > STRUCTURE_LEVEL
    areas = brain.sum(axis=(1, 2))
    if not areas.any():
        return maps
    depth_mm = _depth_mm(prepared.slices[coarse], spacing_mm)
    outline = brain & ~ndimage.binary_erosion(brain, _DISC)
    outline[areas < _MIDDLE * areas.max()] = False
    if np.median(depth_mm[outline]) < _SHOWN_MM:
        return maps
    shallow = depth_mm < _SKULL_MM
    for axis, step in enumerate((through, across, across)):
        shallow = np.repeat(shallow, step, axis)
    fitting = tuple(slice(size) for size in marked.shape)
    return _without_islands(maps, shallow[fitting], lambda there, pixels: there > 0.5 * pixels)


def _depth_mm(slices: FloatArray, spacing_mm: tuple[float, float, float]) -> FloatArray:
    """Distance of every pixel from what is not head, through the slices as well."""
    # slices are not smoothed together, or the head would grow by one
    head = fill_head(slices > _DARKEST_HEAD, max(1, round(_GAP_MM / spacing_mm[1])))
    areas = head.sum(axis=(1, 2))
    present = np.flatnonzero(areas)
    if present.size:
        first, last = present[0], present[-1]
        for end, beyond in ((first, slice(0, first)), (last, slice(last + 1, None))):
            if areas[end] > _SEVERED * areas.max():
                head[beyond] = head[end]
    aired = np.pad(head, ((0, 0), (1, 1), (1, 1)))
    depth = ndimage.distance_transform_edt(aired, spacing_mm)[:, 1:-1, 1:-1]
    return np.asarray(depth, dtype=np.float32)


def _without_islands(
    maps: SliceMaps,
    where: BoolArray,
    unwanted: Callable[[NDArray[np.int64], NDArray[np.int64]], BoolArray],
) -> SliceMaps:
    """Clear islands of evidence, within their slices, by how many of their pixels lie somewhere.

    ``unwanted`` is given, for all islands of a slice, the pixels ``where`` marks and all pixels.
    """
    probability, deviation = maps.probability.copy(), maps.deviation
    deviation = None if deviation is None else deviation.copy()
    evidence = probability >= EVIDENCE
    for index in np.flatnonzero((evidence & where).any(axis=(1, 2))):
        islands, count = ndimage.label(evidence[index])
        there = np.bincount(islands[where[index]], minlength=count + 1)
        gone = unwanted(there, np.bincount(islands.ravel(), minlength=count + 1))
        gone[0] = False  # what is no island
        cleared = gone[islands]
        probability[index][cleared] = 0.0
        if deviation is not None:
            deviation[index][cleared] = 0.0
    return SliceMaps(probability, deviation, maps.structures)


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
