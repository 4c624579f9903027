"""The two binary masks that measures compare, made from label images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmh_lora.errors import DataError, GridMismatchError

__all__ = [
    "BoolArray",
    "as_masks",
    "challenge_masks",
    "check_labels",
    "cropped",
    "lesion_of_labels",
]

BoolArray = NDArray[np.bool_]

#: Labels of the challenge's reference masks.
WMH_LABEL = 1
OTHER_PATHOLOGY_LABEL = 2

#: Fractions up to this are rounding of stored labels, not other values.
_LABEL_TOLERANCE = 1e-3


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
    reference_mask = lesion_of_labels(reference)
    other = (reference >= OTHER_PATHOLOGY_LABEL - 0.5) & (reference <= OTHER_PATHOLOGY_LABEL + 0.5)
    prediction_mask = (prediction >= 0.5) & ~other
    return reference_mask, prediction_mask


def lesion_of_labels(labels: NDArray[Any]) -> BoolArray:
    """Return the white matter hyperintensities of a label image (I, J, K)."""
    return np.asarray((labels >= WMH_LABEL - 0.5) & (labels <= WMH_LABEL + 0.5))


def check_labels(path: Path, data: NDArray[Any]) -> None:
    """Refuse a label image that holds something else than background, WMH and other pathology.

    Raises
    ------
    DataError
        If there are values other than 0, 1 and 2.
    """
    values = np.unique(data[data != 0])
    near = np.abs(values[:, None] - np.array([0.0, 1.0, 2.0])) <= _LABEL_TOLERANCE
    strange = values[~near.any(axis=1)]
    if len(strange):
        listed = ", ".join(f"{value:g}" for value in strange[:5])
        more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
        raise DataError(
            f"The mask {path} holds the values {listed}{more}; expected only 0 (background), "
            "1 (white matter hyperintensity) and 2 (other pathology); recode it, or check that it "
            "is the mask that was meant."
        )


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
