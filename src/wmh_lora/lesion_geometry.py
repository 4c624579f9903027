"""Lesion voxels in millimetres: how far they are from a structure, and how wide a lesion is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nibabel.orientations import io_orientation
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from wmh_lora.postprocess import Lesion, label_lesions, lesion_box
from wmh_lora.structures import BoolArray, bounding_box, surface
from wmh_lora.volume import voxel_volume_ml

__all__ = [
    "LesionVoxels",
    "axial_diameters_mm",
    "distances_mm",
    "gaps_mm",
    "lesion_voxels",
    "surface_distances_mm",
]

FloatArray = NDArray[np.float64]

_DECIMALS = 4  # of lengths in mm: what headers round must not decide what is at most 10 mm away
_DIRECTIONS = 12  # of diameters: with 15 degrees between them the longest is missed by under 1 %


@dataclass(frozen=True, eq=False)
class LesionVoxels:
    """All lesion voxels of a scan, those of one lesion together.

    Attributes
    ----------
    indices : int array (3, n)
        Where they are on the scan's grid.
    owner : int array (n,)
        Which of ``lesions`` each belongs to, ascending from 0.
    lesions : sequence of Lesion
        The largest first.
    affine : array (4, 4)
        Voxel indices to scanner millimetres.
    """

    indices: NDArray[np.int64]
    owner: NDArray[np.int64]
    lesions: Sequence[Lesion]
    affine: FloatArray

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in millilitres."""
        return voxel_volume_ml(self.affine)

    def reduce(self, operation: np.ufunc, values: NDArray[Any]) -> NDArray[Any]:
        """Combine the values (n,) of each lesion's voxels, one result a lesion."""
        if not self.lesions:
            return np.empty(0)
        starts = np.searchsorted(self.owner, np.arange(len(self.lesions)))
        return np.asarray(operation.reduceat(values, starts))


def lesion_voxels(mask: NDArray[Any], affine: NDArray[np.float64]) -> LesionVoxels:
    """Collect the voxels of a lesion mask (I, J, K), lesion by lesion.

    Raises
    ------
    DataError
        If the mask is not 3-D.
    """
    box, within = lesion_box(mask, affine)
    labels, lesions = label_lesions(mask[box], within)
    found = np.nonzero(labels)
    owner = labels[found].astype(np.int64) - 1
    order = np.argsort(owner, kind="stable")
    indices = np.stack(found)[:, order] + [[side.start] for side in box]
    return LesionVoxels(indices, owner[order], lesions, np.asarray(affine))


def distances_mm(voxels: LesionVoxels, target: BoolArray) -> FloatArray:
    """Return how far each lesion voxel (n,) is from a mask (I, J, K), between centres.

    Zero inside the mask. The mask must not be empty.
    """
    if not voxels.lesions:
        return np.empty(0)
    distance = _nearest_mm(voxels, _surface_indices(target))
    distance[target[tuple(voxels.indices)]] = 0.0
    return distance


def gaps_mm(voxels: LesionVoxels, target: BoolArray) -> FloatArray:
    """Return the gap (n,) between each lesion voxel and the nearest voxel of a mask, as boxes.

    It is zero for the 26 neighbours of a voxel, whatever the slice thickness; it equals the
    distance between centres to the mask grown by one voxel to all sides.
    """
    box = _box_around(target, 2)  # one to grow by, one to be outside of
    if box is None or not voxels.lesions:
        return np.full(len(voxels.owner), np.inf)
    first = np.array([side.start for side in box])
    grown = ndimage.binary_dilation(target[box], np.ones((3, 3, 3)))
    distance = _nearest_mm(voxels, np.argwhere(surface(grown)) + first)
    within = voxels.indices - first[:, None]
    near = np.all((within >= 0) & (within < np.array(grown.shape)[:, None]), axis=0)
    distance[np.flatnonzero(near)[grown[tuple(within[:, near])]]] = 0.0
    return distance


def surface_distances_mm(voxels: LesionVoxels, target: BoolArray, within_mm: float) -> FloatArray:
    """Return how far each lesion voxel (n,) is from the surface of a mask; zero outside it.

    Infinite beyond ``within_mm``: the search would take most of the time where nobody looks.
    """
    if not voxels.lesions:
        return np.empty(0)
    distance = _nearest_mm(voxels, _surface_indices(target), within_mm)
    distance[~target[tuple(voxels.indices)]] = 0.0
    return distance


def axial_diameters_mm(voxels: LesionVoxels) -> FloatArray:
    """Return the largest diameter (n lesions,) of each lesion within any one axial slice.

    Lesions are projected onto `_DIRECTIONS` directions within the plane; a voxel counts with its
    own width.
    """
    if not voxels.lesions:
        return np.empty(0)
    through = int(np.flatnonzero(io_orientation(voxels.affine)[:, 0] == 2)[0])
    first, second = (axis for axis in range(3) if axis != through)
    spacing = np.linalg.norm(voxels.affine[:3, :3], axis=0)
    u, v = voxels.indices[first] * spacing[first], voxels.indices[second] * spacing[second]
    level = voxels.indices[through]
    by_slice = np.lexsort((level, voxels.owner))
    key = (voxels.owner * (int(level.max()) + 1) + level)[by_slice]
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    longest = np.zeros(len(starts))
    for angle in np.arange(_DIRECTIONS) * np.pi / _DIRECTIONS:
        cos, sin = abs(float(np.cos(angle))), abs(float(np.sin(angle)))
        along = (np.cos(angle) * u + np.sin(angle) * v)[by_slice]
        # length of the line of this direction through one voxel
        width = min(spacing[first] / max(cos, 1e-9), spacing[second] / max(sin, 1e-9))
        extent = np.maximum.reduceat(along, starts) - np.minimum.reduceat(along, starts) + width
        np.maximum(longest, extent, out=longest)
    lesion_starts = np.searchsorted(voxels.owner[by_slice][starts], np.arange(len(voxels.lesions)))
    return np.asarray(np.maximum.reduceat(longest, lesion_starts).round(_DECIMALS))


def _surface_indices(mask: BoolArray) -> NDArray[np.int64]:
    """Where the surface of a mask is, (n, 3); copies of a mask may be too much for memory."""
    box = _box_around(mask, 1)
    if box is None:
        return np.empty((0, 3), dtype=np.int64)
    return np.asarray(np.argwhere(surface(mask[box])) + [side.start for side in box])


def _box_around(mask: BoolArray, margin: int) -> tuple[slice, slice, slice] | None:
    """Box that holds a mask, with a margin as far as the image has one."""
    box = bounding_box(mask)
    if box is None:
        return None
    first, second, third = (slice(max(0, x.start - margin), x.stop + margin) for x in box)
    return first, second, third


def _nearest_mm(
    voxels: LesionVoxels, target: NDArray[np.int64], within_mm: float = np.inf
) -> FloatArray:
    """Distance of each lesion voxel to the nearest of some indices (m, 3); the origin drops out."""
    linear = voxels.affine[:3, :3].T
    # Tight cells around the points of a grid's surface make this search 6 to 20 times longer.
    tree = cKDTree(target @ linear, balanced_tree=False, compact_nodes=False)
    found = tree.query(voxels.indices.T @ linear, distance_upper_bound=within_mm)[0]
    return np.asarray(np.round(found, _DECIMALS))
