"""The two binary masks that measures compare, made from label images."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmh_lora.errors import GridMismatchError

__all__ = ["BoolArray", "as_masks", "challenge_masks", "cropped"]

BoolArray = NDArray[np.bool_]

#: Labels of the challenge's reference masks.
WMH_LABEL = 1
OTHER_PATHOLOGY_LABEL = 2


def challenge_masks(
    reference: NDArray[Any], prediction: NDArray[Any]
) -> tuple[BoolArray, BoolArray]:
    """Turn label images into the two binary masks that the challenge compares.

    Parameters
    ----------
    reference : array (I, J, K)
        Labels: 1 white matter hyperintensity, 2 other pathology, anything else background.
    prediction : array (I, J, K)
        Binary mask, labels (>= 1) or probabilities (>= 0.5).

    Returns
    -------
    reference_mask, prediction_mask : bool arrays (I, J, K)
        Voxels of other pathology are background in both, so that they are neither demanded
        nor punished; this is done before components are counted.

    Raises
    ------
    GridMismatchError
        If the two shapes differ.
    """
    reference, prediction = np.asarray(reference), np.asarray(prediction)
    _check_shapes(reference, prediction)
    reference_mask = (reference >= WMH_LABEL - 0.5) & (reference <= WMH_LABEL + 0.5)
    other = (reference >= OTHER_PATHOLOGY_LABEL - 0.5) & (reference <= OTHER_PATHOLOGY_LABEL + 0.5)
    prediction_mask = (prediction >= 0.5) & ~other
    return reference_mask, prediction_mask


def as_masks(reference: NDArray[Any], prediction: NDArray[Any]) -> tuple[BoolArray, BoolArray]:
    """Return both as bool arrays (I, J, K), non-zero being foreground.

    Raises
    ------
    GridMismatchError
        If the two shapes differ.
    """
    reference, prediction = np.asarray(reference), np.asarray(prediction)
    _check_shapes(reference, prediction)
    return reference != 0, prediction != 0


def cropped(first: BoolArray, second: BoolArray) -> tuple[BoolArray, BoolArray]:
    """Cut two masks to the box around both, with one voxel of background where there is any.

    The margin keeps in-plane boundaries exact: a lesion is cut by the edge of the box only where
    it is cut by the edge of the image.
    """
    either = first | second
    box = []
    for axis in range(either.ndim):
        others = tuple(other for other in range(either.ndim) if other != axis)
        filled = np.flatnonzero(either.any(axis=others))
        start, stop = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 0)
        box.append(slice(max(0, start - 1), stop + 1))
    return first[tuple(box)], second[tuple(box)]


def _check_shapes(reference: NDArray[Any], prediction: NDArray[Any]) -> None:
    if reference.shape != prediction.shape or reference.ndim != 3:
        raise GridMismatchError(
            "A reference and a prediction are compared voxel by voxel and must be 3-D arrays of "
            f"one shape; found {reference.shape} and {prediction.shape}. Resample one to the "
            "other's grid first."
        )
