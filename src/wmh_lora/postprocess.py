"""From a probability map to a lesion mask and a table of lesions.

Components are 26-connected everywhere in this package: voxels that share a face, an edge or a
corner belong to one lesion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from nibabel.orientations import io_orientation
from numpy.typing import NDArray
from scipy import ndimage

from wmh_lora.errors import ConfigError, DataError
from wmh_lora.structures import bounding_box
from wmh_lora.volume import voxel_volume_ml

__all__ = [
    "Lesion",
    "apply_threshold",
    "describe_lesions",
    "label_lesions",
    "lesion_box",
    "lesion_mask",
    "remove_faint_components",
    "remove_small_components",
]

_FULL_CONNECTIVITY = ndimage.generate_binary_structure(3, 3)
# The order of lesions must not depend on how the scan is stored, so ties are broken by position
# rounded to well under a voxel and well over rounding error.
_TIE_MM = 0.01


@dataclass(frozen=True)
class Lesion:
    """One 26-connected component of a lesion mask.

    Attributes
    ----------
    index : int
        1 for the largest lesion of the scan.
    voxels : int
        Number of voxels of the scan's own grid.
    volume_ml : float
        Volume in millilitres.
    centroid_mm : tuple of three floats
        Centre of mass in scanner coordinates (right, anterior, superior), millimetres.
    extent_mm : tuple of three floats
        Size of the bounding box along the voxel axes nearest to left-right,
        posterior-anterior and inferior-superior, millimetres.
    """

    index: int
    voxels: int
    volume_ml: float
    centroid_mm: tuple[float, float, float]
    extent_mm: tuple[float, float, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the lesion as JSON-ready values, rounded well below measurement error."""
        return {
            "index": self.index,
            "voxels": self.voxels,
            "volume_ml": round(self.volume_ml, 6),
            "centroid_mm": [round(c, 2) for c in self.centroid_mm],
            "extent_mm": [round(e, 2) for e in self.extent_mm],
        }


def apply_threshold(probability: NDArray[Any], threshold: float) -> NDArray[np.uint8]:
    """Mark the voxels whose probability is at least the threshold.

    Parameters
    ----------
    probability : array (I, J, K)
        Values in [0, 1]; NaN counts as background.
    threshold : float
        Between 0 and 1, both excluded.

    Returns
    -------
    uint8 array (I, J, K)
        1 lesion, 0 background.

    Raises
    ------
    ConfigError
        If the threshold lies outside this range.
    """
    if not 0.0 < threshold < 1.0:
        raise ConfigError(
            f"The threshold must lie between 0 and 1, found {threshold}; "
            "lower values find more and paler lesions."
        )
    marked: NDArray[np.bool_] = np.asarray(probability >= _level(threshold, probability))
    return marked.view(np.uint8)  # the same bytes: a copy of a large scan's mask counts


def _level(value: float, probability: NDArray[Any]) -> NDArray[Any]:
    """Round a limit as the map is rounded, so that 0.6 in float32 counts as 0.6."""
    floating = np.issubdtype(probability.dtype, np.floating)
    return np.asarray(value, dtype=probability.dtype if floating else np.float64)


def lesion_mask(
    probability: NDArray[Any], threshold: float, min_voxels: int = 0, min_peak: float = 0.0
) -> NDArray[np.uint8]:
    """Make the mask of a probability map: threshold, then what is too faint or too small.

    Parameters
    ----------
    probability : array (I, J, K)
        Values in [0, 1]; NaN counts as background.
    threshold, min_voxels, min_peak
        See `apply_threshold`, `remove_small_components` and `remove_faint_components`.

    Returns
    -------
    uint8 array (I, J, K)
        1 lesion, 0 background.

    Raises
    ------
    ConfigError
        If a setting is out of range.
    """
    mask = apply_threshold(probability, threshold)
    box = bounding_box(mask)  # most of a scan is empty
    if box is None:
        return mask
    mask[box] = _keep_components(mask[box], min_voxels, probability[box], min_peak)
    return mask


def remove_small_components(mask: NDArray[Any], min_voxels: int) -> NDArray[np.uint8]:
    """Remove the 26-connected components that have fewer than ``min_voxels`` voxels.

    Parameters
    ----------
    mask : array (I, J, K)
        Non-zero is foreground.
    min_voxels : int
        The smallest component that is kept; 0 and 1 keep all.

    Returns
    -------
    uint8 array (I, J, K)

    Raises
    ------
    ConfigError
        If ``min_voxels`` is negative.
    """
    return _keep_components(mask, min_voxels)


def remove_faint_components(
    mask: NDArray[Any], probability: NDArray[Any], min_peak: float
) -> NDArray[np.uint8]:
    """Remove the 26-connected components in which no voxel reaches a probability.

    Parameters
    ----------
    mask : array (I, J, K)
        Non-zero is foreground.
    probability : array (I, J, K)
        Values in [0, 1].
    min_peak : float
        Highest probability from which a component is kept; 0 keeps all.

    Returns
    -------
    uint8 array (I, J, K)

    Raises
    ------
    ConfigError
        If ``min_peak`` lies outside [0, 1].

    Examples
    --------
    >>> remove_faint_components([[[1, 1, 0, 1]]], np.array([[[0.6, 0.9, 0.1, 0.7]]]), 0.8)
    array([[[1, 1, 0, 0]]], dtype=uint8)
    """
    return _keep_components(mask, 0, probability, min_peak)


def _keep_components(
    mask: NDArray[Any],
    min_voxels: int,
    probability: NDArray[Any] | None = None,
    min_peak: float = 0.0,
) -> NDArray[np.uint8]:
    """Keep the components that are large enough and, given probabilities, reach a peak."""
    if min_voxels < 0:
        raise ConfigError(f"The smallest lesion size must be 0 voxels or more, found {min_voxels}.")
    if not 0.0 <= min_peak <= 1.0:
        raise ConfigError(f"The peak of a lesion must lie between 0 and 1, found {min_peak}.")
    foreground = np.asarray(mask) != 0
    if min_voxels <= 1 and min_peak == 0:
        return np.asarray(foreground, dtype=np.uint8)
    labels, count = ndimage.label(foreground, structure=_FULL_CONNECTIVITY)
    # of lesion voxels alone: counting casts to 8 bytes each
    keep = np.bincount(labels[foreground], minlength=count + 1) >= min_voxels
    if probability is not None and min_peak > 0:
        reached = np.zeros_like(keep)
        high = probability >= _level(min_peak, probability)
        reached[np.unique(labels[foreground & high])] = True
        keep &= reached
    keep[0] = False
    return np.asarray(keep[labels], dtype=np.uint8)


def describe_lesions(mask: NDArray[Any], affine: NDArray[np.float64]) -> list[Lesion]:
    """List the lesions of a mask, the largest first.

    Parameters
    ----------
    mask : array (I, J, K)
        Non-zero is foreground.
    affine : array (4, 4)
        Voxel indices to scanner millimetres (right, anterior, superior).

    Returns
    -------
    list of Lesion
        Lesions of equal size are ordered from superior to inferior, then anterior to
        posterior, then right to left, so that the list does not depend on the storage order.

    Raises
    ------
    DataError
        If the mask is not 3-D.
    """
    box, affine = lesion_box(mask, affine)
    return label_lesions(mask[box], affine)[1]


def lesion_box(
    mask: NDArray[Any], affine: NDArray[np.float64]
) -> tuple[tuple[slice, slice, slice], NDArray[np.float64]]:
    """Return the box that holds every lesion, and the affine of what it cuts out.

    Labels of a whole scan would take four times the memory of its mask.

    Parameters
    ----------
    mask, affine
        As for `describe_lesions`; without a lesion the box holds one voxel.

    Raises
    ------
    DataError
        If the mask is not 3-D.
    """
    _require_3d(mask)
    box = bounding_box(mask) or (slice(0, 1), slice(0, 1), slice(0, 1))
    moved = np.array(affine, dtype=np.float64)
    moved[:3, 3] += moved[:3, :3] @ [side.start for side in box]
    return box, moved


def label_lesions(
    mask: NDArray[Any], affine: NDArray[np.float64]
) -> tuple[NDArray[np.int32], list[Lesion]]:
    """Number the voxels of each lesion, and list the lesions as `describe_lesions` does.

    Parameters
    ----------
    mask, affine
        As for `describe_lesions`.

    Returns
    -------
    labels : int32 array (I, J, K)
        `Lesion.index` of each lesion voxel, 0 elsewhere.
    lesions : list of Lesion
        The largest first.

    Raises
    ------
    DataError
        If the mask is not 3-D.
    """
    _require_3d(mask)
    labels, count = ndimage.label(np.asarray(mask) != 0, structure=_FULL_CONNECTIVITY)
    labels = np.asarray(labels, dtype=np.int32)
    if count == 0:
        return labels, []
    affine = np.asarray(affine, dtype=np.float64)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    voxel_ml = voxel_volume_ml(affine)
    native_axes = _axes_by_direction(affine)
    indices = np.nonzero(labels)
    owner = labels[indices] - 1
    voxels = np.bincount(owner, minlength=count)
    sums = np.stack([np.bincount(owner, weights=along, minlength=count) for along in indices])
    centroids = (sums / voxels).T @ affine[:3, :3].T + affine[:3, 3]
    boxes = ndimage.find_objects(labels)
    order = sorted(range(count), key=lambda n: (-int(voxels[n]), *_position_key(centroids[n])))
    lesions = []
    rank_of = np.zeros(count + 1, dtype=np.int32)
    for rank, n in enumerate(order, start=1):
        rank_of[n + 1] = rank
        size = [(box.stop - box.start) * spacing[axis] for axis, box in enumerate(boxes[n])]
        lesions.append(
            Lesion(
                index=rank,
                voxels=int(voxels[n]),
                volume_ml=int(voxels[n]) * voxel_ml,
                centroid_mm=_triple(centroids[n]),
                extent_mm=_triple([size[axis] for axis in native_axes]),
            )
        )
    labels[indices] = rank_of[owner + 1]
    return labels, lesions


def _require_3d(mask: NDArray[Any]) -> None:
    if mask.ndim != 3:
        raise DataError(f"A lesion mask must be a 3-D array, found shape {mask.shape}.")


def _axes_by_direction(affine: NDArray[np.float64]) -> list[int]:
    """Voxel axes nearest to left-right, posterior-anterior and inferior-superior, in that order."""
    direction = io_orientation(affine)[:, 0]
    return [int(np.flatnonzero(direction == world)[0]) for world in range(3)]


def _position_key(centroid_mm: NDArray[np.float64]) -> tuple[int, int, int]:
    right, anterior, superior = (round(float(c) / _TIE_MM) for c in centroid_mm)
    return -superior, -anterior, -right


def _triple(values: Any) -> tuple[float, float, float]:
    first, second, third = (float(v) for v in values)
    return first, second, third
