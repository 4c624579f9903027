"""The lesion table of a report: what is known of each lesion, and where the viewer should look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from wmh_lora.postprocess import label_lesions, lesion_box
from wmh_lora.report.segmented import Segmented

__all__ = ["LesionRow", "lesion_rows"]


@dataclass(frozen=True)
class LesionRow:
    """One line of the lesion table.

    Attributes
    ----------
    index : int
        1 for the largest lesion.
    volume_ml : float
        Volume in millilitres.
    centre_mm : three floats
        Centre of mass in scanner coordinates.
    focus_mm : three floats
        Centre of the lesion's voxel nearest to it: a curved lesion need not hold its own centre.
    region : str or None
        ``periventricular`` or ``deep``; None where it is not known.
    distance_mm : float or None
        Smallest distance to the ventricles.
    mean_probability : float
        Of its voxels, in [0, 1].
    mean_uncertainty : float or None
        Mean standard deviation of the probability over views and looks.
    """

    index: int
    volume_ml: float
    centre_mm: tuple[float, float, float]
    focus_mm: tuple[float, float, float]
    region: str | None
    distance_mm: float | None
    mean_probability: float
    mean_uncertainty: float | None


def lesion_rows(
    segmentation: Segmented, regions: Mapping[str, Any] | None
) -> tuple[LesionRow, ...]:
    """List the lesions of a scan, the largest first.

    Parameters
    ----------
    segmentation : Segmented
        On the scan's grid.
    regions : mapping, optional
        `wmh_lora.regions.Regions.as_dict` of the same mask.
    """
    cut, affine = lesion_box(segmentation.mask, segmentation.volume.affine)
    labels, lesions = label_lesions(segmentation.mask[cut], affine)
    probability = _means(labels, segmentation.probability[cut])
    uncertainty = (
        None if segmentation.uncertainty is None else _means(labels, segmentation.uncertainty[cut])
    )
    located = {entry["index"]: entry for entry in (regions or {}).get("lesions") or ()}
    rows = []
    for lesion, box in zip(lesions, ndimage.find_objects(labels), strict=True):
        place = located.get(lesion.index, {})
        rows.append(
            LesionRow(
                index=lesion.index,
                volume_ml=lesion.volume_ml,
                centre_mm=lesion.centroid_mm,
                focus_mm=_focus(labels, box, lesion.index, affine, lesion.centroid_mm),
                region=place.get("region"),
                distance_mm=place.get("distance_to_ventricles_mm"),
                mean_probability=float(probability[lesion.index]),
                mean_uncertainty=None if uncertainty is None else float(uncertainty[lesion.index]),
            )
        )
    return tuple(rows)


def _means(labels: NDArray[np.int32], values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mean of a map over the voxels of each label; index 0 has no meaning."""
    inside = labels > 0
    owner = labels[inside]
    counts = np.maximum(np.bincount(owner), 1)
    means: NDArray[np.float64] = np.bincount(owner, weights=values[inside]) / counts
    return means


def _focus(
    labels: NDArray[np.int32],
    box: tuple[slice, slice, slice],
    index: int,
    affine: NDArray[np.float64],
    centre_mm: tuple[float, float, float],
) -> tuple[float, float, float]:
    voxels = np.argwhere(labels[box] == index) + [cut.start for cut in box]
    places = voxels @ affine[:3, :3].T + affine[:3, 3]
    nearest = int(np.argmin(np.square(places - centre_mm).sum(axis=1)))
    right, anterior, superior = (float(mm) for mm in places[nearest])
    return right, anterior, superior
