"""The metrics of the WMH Segmentation Challenge, as its evaluation script computes them.

Every function takes whole volumes, the reference first, and is pure: no files, no smoothing
terms. A value that is undefined is NaN with the reason in the docstring, never an exception
and never a silent zero.

References
----------
H. J. Kuijf et al., "Standardized assessment of automatic segmentation of white matter
hyperintensities and results of the WMH Segmentation Challenge", IEEE Transactions on Medical
Imaging 38(11), 2019, doi:10.1109/TMI.2019.2905770.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree

from wmh_lora.errors import ConfigError
from wmh_lora.evaluation.masks import BoolArray, as_masks, challenge_masks, cropped

__all__ = [
    "ChallengeMetrics",
    "avd_percent",
    "boundary",
    "challenge_masks",
    "dice",
    "evaluate",
    "hd95",
    "label_lesions",
    "lesion_f1",
    "lesion_precision",
    "lesion_recall",
    "precision",
    "recall",
]

#: Voxels that share a face, an edge or a corner belong to one lesion (26-connected in 3-D).
_FULL_CONNECTIVITY = ndimage.generate_binary_structure(3, 3)


@dataclass(frozen=True)
class ChallengeMetrics:
    """All measures of one scan; NaN where undefined.

    Attributes
    ----------
    dice, lesion_recall, lesion_precision, lesion_f1, precision, recall : float
        Shares in [0, 1]. ``precision`` and ``recall`` count voxels, the others named
        ``lesion_*`` count 26-connected components.
    hd95_mm : float
        Robust Hausdorff distance in millimetres.
    avd_percent : float
        Absolute volume difference in percent of the reference volume.
    reference_ml, prediction_ml : float
        Volumes in millilitres.
    reference_lesions, prediction_lesions : int
        Numbers of 26-connected components.
    """

    dice: float
    hd95_mm: float
    avd_percent: float
    lesion_recall: float
    lesion_f1: float
    lesion_precision: float
    precision: float
    recall: float
    reference_ml: float
    prediction_ml: float
    reference_lesions: int
    prediction_lesions: int

    def to_dict(self) -> dict[str, float]:
        """Return the measures as a plain dictionary, in the order of the attributes."""
        return asdict(self)


def dice(reference: NDArray[Any], prediction: NDArray[Any]) -> float:
    """Dice similarity of two masks: 2 |R and P| / (|R| + |P|), without smoothing.

    Parameters
    ----------
    reference, prediction : arrays (I, J, K)
        Masks; non-zero is foreground.

    Returns
    -------
    float
        In [0, 1]; NaN when both masks are empty.

    Raises
    ------
    GridMismatchError
        If the two shapes differ.

    Examples
    --------
    >>> import numpy as np
    >>> dice(np.array([[[1, 1, 0, 0]]]), np.array([[[0, 1, 1, 0]]]))
    0.5
    """
    reference_mask, prediction_mask = as_masks(reference, prediction)
    total = int(reference_mask.sum()) + int(prediction_mask.sum())
    if total == 0:
        return math.nan
    return 2.0 * int((reference_mask & prediction_mask).sum()) / total


def precision(reference: NDArray[Any], prediction: NDArray[Any]) -> float:
    """Share of predicted voxels that the reference holds; NaN when nothing is predicted."""
    reference_mask, prediction_mask = as_masks(reference, prediction)
    return _share(int((reference_mask & prediction_mask).sum()), int(prediction_mask.sum()))


def recall(reference: NDArray[Any], prediction: NDArray[Any]) -> float:
    """Share of reference voxels that were predicted; NaN when the reference is empty."""
    reference_mask, prediction_mask = as_masks(reference, prediction)
    return _share(int((reference_mask & prediction_mask).sum()), int(reference_mask.sum()))


def avd_percent(reference: NDArray[Any], prediction: NDArray[Any]) -> float:
    """Absolute volume difference in percent of the reference volume.

    Both masks lie on one grid, so the ratio of volumes is the ratio of voxel counts.

    Returns
    -------
    float
        |P - R| / R x 100, from 0 up without bound; NaN when the reference is empty.
    """
    reference_mask, prediction_mask = as_masks(reference, prediction)
    reference_voxels = int(reference_mask.sum())
    return 100.0 * _share(abs(int(prediction_mask.sum()) - reference_voxels), reference_voxels)


def boundary(mask: NDArray[Any], *, slice_axis: int = 2) -> BoolArray:
    """Return the voxels of a mask that its in-plane erosion removes.

    The erosion uses a full 3 x 3 element within each slice and counts everything outside the
    image as foreground, as the challenge's script does: a lesion cut by the image border has
    no boundary there.

    Parameters
    ----------
    mask : array (I, J, K)
        Non-zero is foreground.
    slice_axis : int
        The axis across slices; 2 for an axially stored volume.

    Returns
    -------
    bool array (I, J, K)
    """
    foreground = np.asarray(mask) != 0
    element = np.ones([1 if axis == slice_axis % 3 else 3 for axis in range(3)], dtype=bool)
    eroded = ndimage.binary_erosion(foreground, structure=element, border_value=1)
    return np.asarray(foreground & ~eroded, dtype=np.bool_)


def hd95(
    reference: NDArray[Any],
    prediction: NDArray[Any],
    spacing_mm: Sequence[float],
    *,
    slice_axis: int = 2,
) -> float:
    """Robust Hausdorff distance between the boundaries of two masks.

    The larger of the two directed 95th percentiles (linear interpolation) of the Euclidean
    distance from each boundary voxel of one mask to the nearest of the other. The two
    directions are not pooled.

    Parameters
    ----------
    reference, prediction : arrays (I, J, K)
        Masks; non-zero is foreground.
    spacing_mm : three floats
        Voxel size along the array axes in millimetres.
    slice_axis : int
        The axis across slices, see `boundary`.

    Returns
    -------
    float
        Millimetres, 0 or more; NaN when either mask is empty, or has no boundary because it
        fills its slices.

    Raises
    ------
    GridMismatchError
        If the two shapes differ.
    ConfigError
        If the spacing is not three positive finite numbers.
    """
    reference_mask, prediction_mask = as_masks(reference, prediction)
    spacing = _checked_spacing(spacing_mm)
    reference_mask, prediction_mask = cropped(reference_mask, prediction_mask)
    reference_edge = boundary(reference_mask, slice_axis=slice_axis)
    prediction_edge = boundary(prediction_mask, slice_axis=slice_axis)
    if not reference_edge.any() or not prediction_edge.any():
        return math.nan
    to_reference = _distances_mm(prediction_edge, reference_edge, spacing)
    to_prediction = _distances_mm(reference_edge, prediction_edge, spacing)
    return float(max(np.percentile(to_reference, 95), np.percentile(to_prediction, 95)))


def label_lesions(mask: NDArray[Any]) -> tuple[NDArray[np.int32], int]:
    """Number the 26-connected components of a mask.

    Parameters
    ----------
    mask : array (I, J, K)
        Non-zero is foreground.

    Returns
    -------
    labels : int32 array (I, J, K)
        0 background, 1..n the components in scanning order.
    n : int
        Number of components.
    """
    labels, n = ndimage.label(np.asarray(mask) != 0, structure=_FULL_CONNECTIVITY)
    return np.asarray(labels, dtype=np.int32), int(n)


def lesion_recall(reference: NDArray[Any], prediction: NDArray[Any]) -> float:
    """Share of 26-connected reference lesions touched by at least one predicted voxel.

    Returns
    -------
    float
        In [0, 1]; 1 when the reference holds no lesion (nothing can be missed), as the
        challenge defines it.
    """
    reference_mask, prediction_mask = as_masks(reference, prediction)
    return _share_of_lesions(*_touched(reference_mask, prediction_mask))


def lesion_precision(reference: NDArray[Any], prediction: NDArray[Any]) -> float:
    """Share of 26-connected predicted lesions that touch at least one reference voxel.

    Returns
    -------
    float
        In [0, 1]; 1 when nothing is predicted, as the challenge defines it.
    """
    reference_mask, prediction_mask = as_masks(reference, prediction)
    return _share_of_lesions(*_touched(prediction_mask, reference_mask))


def lesion_f1(reference: NDArray[Any], prediction: NDArray[Any]) -> float:
    """Harmonic mean of `lesion_recall` and `lesion_precision`.

    Returns
    -------
    float
        In [0, 1]; 0 when both are 0, 1 when both masks are empty.
    """
    return _harmonic_mean(
        lesion_recall(reference, prediction), lesion_precision(reference, prediction)
    )


def evaluate(
    reference: NDArray[Any],
    prediction: NDArray[Any],
    spacing_mm: Sequence[float],
    *,
    slice_axis: int = 2,
) -> ChallengeMetrics:
    """Compute every measure of one scan after the challenge's treatment of label 2.

    Parameters
    ----------
    reference, prediction : arrays (I, J, K)
        See `challenge_masks`.
    spacing_mm : three floats
        Voxel size along the array axes in millimetres.
    slice_axis : int
        The axis across slices, see `boundary`.

    Raises
    ------
    GridMismatchError
        If the two shapes differ.
    ConfigError
        If the spacing is not three positive finite numbers.
    """
    voxel_ml = float(np.prod(_checked_spacing(spacing_mm))) / 1000.0
    # Lesions fill a small part of a scan, and nothing outside their box changes any measure.
    reference_mask, prediction_mask = cropped(*challenge_masks(reference, prediction))
    recalled, reference_lesions = _touched(reference_mask, prediction_mask)
    precise, prediction_lesions = _touched(prediction_mask, reference_mask)
    recall_of_lesions = _share_of_lesions(recalled, reference_lesions)
    precision_of_lesions = _share_of_lesions(precise, prediction_lesions)
    return ChallengeMetrics(
        dice=dice(reference_mask, prediction_mask),
        hd95_mm=hd95(reference_mask, prediction_mask, spacing_mm, slice_axis=slice_axis),
        avd_percent=avd_percent(reference_mask, prediction_mask),
        lesion_recall=recall_of_lesions,
        lesion_f1=_harmonic_mean(recall_of_lesions, precision_of_lesions),
        lesion_precision=precision_of_lesions,
        precision=precision(reference_mask, prediction_mask),
        recall=recall(reference_mask, prediction_mask),
        reference_ml=int(reference_mask.sum()) * voxel_ml,
        prediction_ml=int(prediction_mask.sum()) * voxel_ml,
        reference_lesions=reference_lesions,
        prediction_lesions=prediction_lesions,
    )


def _distances_mm(
    start: BoolArray, goal: BoolArray, spacing_mm: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Distance from each voxel of `start` to the nearest one of `goal`, in no order."""
    apart = np.argwhere(start & ~goal) * spacing_mm
    distances = np.zeros(int(start.sum()))  # voxels in both are at no distance
    if len(apart):
        distances[: len(apart)], _ = KDTree(np.argwhere(goal) * spacing_mm).query(apart)
    return distances


def _touched(lesions: BoolArray, other: BoolArray) -> tuple[int, int]:
    """Return how many components of `lesions` hold a voxel of `other`, and how many there are."""
    labels, n = label_lesions(lesions)
    hits = np.bincount(labels[other], minlength=n + 1)
    return int(np.count_nonzero(hits[1:])), n


def _share_of_lesions(touched: int, lesions: int) -> float:
    return touched / lesions if lesions else 1.0


def _harmonic_mean(recalled: float, precise: float) -> float:
    if recalled + precise == 0.0:
        return 0.0
    return 2.0 * recalled * precise / (recalled + precise)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _checked_spacing(spacing_mm: Sequence[float]) -> NDArray[np.float64]:
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    if spacing.shape != (3,) or not np.all(np.isfinite(spacing)) or not np.all(spacing > 0):
        raise ConfigError(
            f"spacing_mm must be three positive numbers of millimetres, found {spacing_mm!r}."
        )
    return spacing
