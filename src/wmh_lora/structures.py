"""The brain and the ventricles that the network marks beside the lesions, where they make sense.

The network learns both to know its way about; neither was trained to be measured. What is used of
them is therefore checked first, and what fails is left out with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from nibabel.orientations import aff2axcodes
from numpy.typing import NDArray

from wmh_lora.components import (
    component_sizes,
    fill_holes,
    label_components,
    largest_component,
)
from wmh_lora.errors import GridMismatchError
from wmh_lora.volume import voxel_volume_ml

__all__ = [
    "BRAIN_RANGE_ML",
    "CUT_LIMITS_CM2",
    "VENTRICLES_RANGE_ML",
    "Structure",
    "border_areas_cm2",
    "bounding_box",
    "check_grid",
    "cut_faces",
    "find_brain",
    "find_ventricles",
    "surface",
]

BoolArray = NDArray[np.bool_]

BRAIN_RANGE_ML = (600.0, 2200.0)
"""Volumes outside cannot be an adult's whole brain."""
VENTRICLES_RANGE_ML = (2.0, 300.0)
"""Less is a few stray voxels; more is not ventricles."""
CUT_LIMITS_CM2: Mapping[str, float] = {
    "superior": 80.0,
    "inferior": 80.0,
    "anterior": 40.0,
    "posterior": 40.0,
    "left": 40.0,
    "right": 40.0,
}
"""Brain on a face of the image beyond which the image cuts part of it off. A sphere of 75 mm radius
that is cut with 80 cm² lacks 4 % of its volume. Smaller areas are common: brain stem and cerebellum
pass below, and the network's mask is generous in the outermost slices."""

_VENTRICLE_PART_ML = 0.5
_INSIDE_SHARE = 0.5
_FACES: Mapping[str, tuple[str, str]] = {
    "R": ("left", "right"),
    "L": ("right", "left"),
    "A": ("posterior", "anterior"),
    "P": ("anterior", "posterior"),
    "S": ("inferior", "superior"),
    "I": ("superior", "inferior"),
}


@dataclass(frozen=True, eq=False)
class Structure:
    """A structure of the head, or why there is none.

    Attributes
    ----------
    mask : bool array (I, J, K) or None
        Its plausible part.
    volume_ml : float or None
        Volume of that part in millilitres.
    reason : str or None
        Why it is missing: one sentence.
    """

    mask: BoolArray | None = None
    volume_ml: float | None = None
    reason: str | None = None


def find_brain(structure_masks: Mapping[str, NDArray[Any]], affine: NDArray[Any]) -> Structure:
    """Return the largest component of the brain mask, holes filled.

    Parameters
    ----------
    structure_masks : mapping
        ``"brain"``, (I, J, K), non-zero inside; may be absent.
    affine : array (4, 4)
        Voxel indices to scanner millimetres.

    Returns
    -------
    Structure
        Without a mask where the network has no such output, where it is empty, or where its volume
        lies outside `BRAIN_RANGE_ML`.
    """
    marked = structure_masks.get("brain")
    if marked is None:
        return Structure(reason="the model does not mark the brain")
    box = bounding_box(marked)
    if box is None:
        return Structure(reason="the model found no brain")
    inside = fill_holes(largest_component(np.asarray(marked[box]) != 0))
    volume_ml = int(inside.sum()) * voxel_volume_ml(affine)
    if inside.size == marked.size and inside.all():
        return Structure(volume_ml=volume_ml, reason="the brain found fills the whole image")
    low, high = BRAIN_RANGE_ML
    if not low <= volume_ml <= high:
        return Structure(
            volume_ml=volume_ml,
            reason=f"the brain found measures {volume_ml:.0f} mL, outside {low:g} to {high:g} mL",
        )
    return Structure(_paste(inside, box, marked.shape), volume_ml)


def find_ventricles(
    structure_masks: Mapping[str, NDArray[Any]], affine: NDArray[Any], brain: BoolArray | None
) -> Structure:
    """Return the components of the ventricle mask that are large enough and inside the brain.

    Parameters
    ----------
    structure_masks : mapping
        ``"ventricles"``, (I, J, K), non-zero inside; may be absent.
    affine : array (4, 4)
        Voxel indices to scanner millimetres.
    brain : bool array (I, J, K), optional
        From `find_brain`. Components that lie with less than half of their voxels in it are left
        out.

    Returns
    -------
    Structure
        Without a mask where the network has no such output, or where the volume that remains lies
        outside `VENTRICLES_RANGE_ML`.
    """
    marked = structure_masks.get("ventricles")
    if marked is None:
        return Structure(reason="the model does not mark the ventricles")
    box = bounding_box(marked)
    if box is None:
        return Structure(reason="the model found no ventricles")
    voxel_ml = voxel_volume_ml(affine)
    labels, count = label_components(np.asarray(marked[box]) != 0, np.ones((3, 3, 3)))
    sizes = component_sizes(labels, count)
    keep = sizes * voxel_ml >= _VENTRICLE_PART_ML
    if brain is not None:
        inside = component_sizes(labels * brain[box], count)
        keep &= inside >= _INSIDE_SHARE * sizes
    keep[0] = False
    kept = np.asarray(keep[labels], dtype=np.bool_)
    volume_ml = int(kept.sum()) * voxel_ml
    low, high = VENTRICLES_RANGE_ML
    if not low <= volume_ml <= high:
        return Structure(
            volume_ml=volume_ml,
            reason=(
                f"the ventricles found measure {volume_ml:.1f} mL, outside {low:g} to {high:g} mL"
            ),
        )
    return Structure(_paste(kept, box, marked.shape), volume_ml)


def border_areas_cm2(mask: NDArray[Any], affine: NDArray[Any]) -> dict[str, float]:
    """Return the area of a mask on each of the six faces of its image.

    Parameters
    ----------
    mask : array (I, J, K)
        Non-zero inside.
    affine : array (4, 4)
        Voxel indices to scanner millimetres.

    Returns
    -------
    dict
        ``left``, ``right``, ``posterior``, ``anterior``, ``inferior``, ``superior``: cm².

    Examples
    --------
    >>> mask = np.zeros((20, 20, 20))
    >>> mask[5:15, 5:15, 10:] = 1
    >>> {face: area for face, area in border_areas_cm2(mask, np.eye(4)).items() if area}
    {'superior': 1.0}
    """
    affine = np.asarray(affine, dtype=np.float64)
    areas = {}
    for axis, code in enumerate(aff2axcodes(affine)):
        first, second = (affine[:3, other] for other in range(3) if other != axis)
        pixel_cm2 = float(np.linalg.norm(np.cross(first, second))) / 100.0
        for face, index in zip(_FACES[code], (0, -1)):
            areas[face] = int(np.count_nonzero(np.moveaxis(mask, axis, 0)[index])) * pixel_cm2
    return areas


def cut_faces(brain: NDArray[Any], affine: NDArray[Any]) -> dict[str, float]:
    """Return the faces of the image, with areas in cm², that cut off part of the brain.

    A complete scan shows no more brain on a face than `CUT_LIMITS_CM2`.
    """
    return {
        face: area
        for face, area in border_areas_cm2(brain, affine).items()
        if area > CUT_LIMITS_CM2[face]
    }


def bounding_box(mask: NDArray[Any]) -> tuple[slice, slice, slice] | None:
    """Return the smallest box that holds all non-zero voxels; None where there are none."""
    sides = []
    for axis in range(3):
        present = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        if present.size == 0:
            return None
        sides.append(slice(int(present[0]), int(present[-1]) + 1))
    return sides[0], sides[1], sides[2]


def check_grid(shape: tuple[int, ...], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Refuse arrays of another grid than the lesion mask's.

    Raises
    ------
    GridMismatchError
        Naming the array.
    """
    for name, array in arrays.items():
        if array.shape != shape:
            raise GridMismatchError(
                f"The {name} map has shape {array.shape} but the scan has {shape}; "
                "bring it to the scan's grid first."
            )


def surface(mask: BoolArray) -> BoolArray:
    """Return the voxels of a mask that share a face with a voxel outside it.

    The edge of the image is no outside: what it cuts has no surface there.
    """
    inner = mask.copy()
    for axis in range(3):
        ahead, behind = [slice(None)] * 3, [slice(None)] * 3
        ahead[axis], behind[axis] = slice(1, None), slice(None, -1)
        inner[tuple(behind)] &= mask[tuple(ahead)]
        inner[tuple(ahead)] &= mask[tuple(behind)]
    return np.asarray(mask & ~inner, dtype=np.bool_)


def _paste(part: BoolArray, box: tuple[slice, slice, slice], shape: tuple[int, ...]) -> BoolArray:
    whole = np.zeros(shape, dtype=np.bool_)
    whole[box] = part
    return whole
