"""Every threshold and component size on one scan at once, as the challenge would score each.

Components are labelled once for each threshold: which of them a smallest size keeps follows from
their sizes, and so do all measures but distances.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmh_lora.evaluation.metrics import challenge_masks, label_lesions

__all__ = ["SWEPT_MEASURES", "THRESHOLDS", "sweep"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

#: Measures of a sweep, named as in `wmh_lora.evaluation.metrics.ChallengeMetrics`.
SWEPT_MEASURES: tuple[str, ...] = (
    "dice",
    "avd_percent",
    "lesion_recall",
    "lesion_f1",
    "lesion_precision",
    "precision",
    "recall",
)

#: Thresholds that are tried for the best one.
THRESHOLDS: tuple[float, ...] = tuple(round(0.05 * step, 2) for step in range(1, 20))


def sweep(
    probability: NDArray[np.float32],
    reference: NDArray[Any],
    thresholds: Sequence[float],
    min_voxels: Sequence[int],
    *,
    min_peak: float = 0.0,
) -> dict[str, FloatArray]:
    """Score the masks of one probability map for all thresholds and smallest component sizes.

    A mask holds the voxels of at least the threshold whose 26-connected component has at least so
    many voxels and reaches ``min_peak``; it is then scored as by
    `wmh_lora.evaluation.metrics.evaluate`.

    Parameters
    ----------
    probability : float32 array (I, J, K)
        In [0, 1].
    reference : array (I, J, K)
        Labels: 1 white matter hyperintensity, 2 other pathology (not counted), else background.
    thresholds : sequence of T floats
        In (0, 1).
    min_voxels : sequence of S ints
        0 and 1 keep all.
    min_peak : float
        Components whose highest probability stays below it are left out of every mask.

    Returns
    -------
    dict of arrays (T, S)
        By the names of `SWEPT_MEASURES`, NaN where undefined, and ``prediction_voxels``.

    Raises
    ------
    GridMismatchError
        If the two shapes differ.

    Examples
    --------
    >>> probability = np.array([[[0.9, 0.8, 0.0, 0.6]]], np.float32)
    >>> swept = sweep(probability, np.array([[[1, 1, 0, 0]]]), [0.5, 0.7], [1, 2])
    >>> swept["dice"]
    array([[0.8, 1. ],
           [1. , 1. ]])
    """
    # compared in the map's own precision, as a mask is made
    levels = np.asarray(thresholds, dtype=probability.dtype)
    within = probability >= levels.min()
    lesions, counted = challenge_masks(reference, within)
    box = _box(within | lesions)
    scan = _Reference(lesions[box], (within & ~counted)[box])
    sizes = np.maximum(np.asarray(min_voxels, dtype=np.int64), 1)
    shown = probability[box]
    peaks = shown >= np.asarray(min_peak, dtype=probability.dtype)
    rows = [_at_threshold(shown >= level, peaks, scan, sizes) for level in levels]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


class _Reference:
    """What is compared with, cut to the voxels that matter."""

    def __init__(self, lesions: BoolArray, other: BoolArray) -> None:
        self.lesions = lesions
        self.voxels = int(lesions.sum())
        labels, self.count = label_lesions(lesions)
        self.labels = labels[lesions]
        self.other: BoolArray | None = other if other.any() else None


def _at_threshold(
    found: BoolArray, peaks: BoolArray, reference: _Reference, sizes: IntArray
) -> dict[str, FloatArray]:
    """Measures (S,) of the components of ``found`` that hold one of the peaks, for each size."""
    labels, count = label_lesions(found)
    voxels = np.bincount(labels.ravel(), minlength=count + 1)
    voxels[np.bincount(labels[found & peaks], minlength=count + 1) == 0] = 0
    voxels[0] = 0
    touching = labels[reference.lesions]
    hits = np.bincount(touching, minlength=count + 1)
    if reference.other is None:
        scored, owner, touched = voxels[1:], np.arange(count), hits[1:] > 0
    else:
        # Other pathology is cut out after the filter, and may cut a component into pieces.
        scored = np.bincount(labels[~reference.other], minlength=count + 1)[1:]
        owner, touched = _pieces(labels, reference)
    kept = voxels[1:] >= sizes[:, None]
    predicted = kept.astype(np.int64) @ scored
    true = kept.astype(np.int64) @ hits[1:]
    largest = np.zeros(reference.count + 1, dtype=np.int64)
    np.maximum.at(largest, reference.labels, voxels[touching])
    recalled = (largest[1:] >= sizes[:, None]).sum(axis=1)
    recall = _share(recalled, reference.count, 1.0)
    precision = _share(kept[:, owner[touched]].sum(axis=1), kept[:, owner].sum(axis=1), 1.0)
    return {
        "dice": _share(2 * true, predicted + reference.voxels),
        "avd_percent": 100.0 * _share(np.abs(predicted - reference.voxels), reference.voxels),
        "lesion_recall": recall,
        "lesion_f1": _share(2.0 * recall * precision, recall + precision, 0.0),
        "lesion_precision": precision,
        "precision": _share(true, predicted),
        "recall": _share(true, reference.voxels),
        "prediction_voxels": predicted.astype(np.float64),
    }


def _pieces(labels: NDArray[np.int32], reference: _Reference) -> tuple[IntArray, BoolArray]:
    """What is left of the components outside other pathology: whose piece, and lesion touched."""
    assert reference.other is not None
    pieces, count = label_lesions((labels > 0) & ~reference.other)
    inside = pieces > 0
    owner = np.zeros(count + 1, dtype=np.int64)
    owner[pieces[inside]] = labels[inside]
    touched = np.bincount(pieces[reference.lesions], minlength=count + 1) > 0
    return owner[1:] - 1, touched[1:]


def _share(part: Any, whole: Any, empty: float = np.nan) -> FloatArray:
    """Quotient, and ``empty`` where the whole is zero."""
    numerator, denominator = np.broadcast_arrays(
        np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    )
    quotient = np.full(numerator.shape, empty)
    np.divide(numerator, denominator, out=quotient, where=denominator != 0)
    return quotient


def _box(mask: BoolArray) -> tuple[slice, slice, slice]:
    """Smallest box around a mask; one voxel where it is empty."""
    bounds = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        filled = np.flatnonzero(mask.any(axis=others))
        start, stop = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 1)
        bounds.append(slice(start, stop))
    return bounds[0], bounds[1], bounds[2]
