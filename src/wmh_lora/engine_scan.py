"""Both ends of inference: the scan as it comes, and the lesions as they are told."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, TypeAlias

import nibabel as nib
import numpy as np
import torch
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import SpatialImage
from numpy.typing import NDArray

from wmh_lora.config import PROBABILITY_STEPS, InferenceConfig
from wmh_lora.engine_looks import Looks
from wmh_lora.engine_views import STRUCTURE_LEVEL, SliceMaps
from wmh_lora.logs import LOGGER
from wmh_lora.postprocess import Lesion, describe_lesions, lesion_mask
from wmh_lora.preprocess import Prepared, restore, restore_mask
from wmh_lora.volume import Volume

__all__ = [
    "Scan",
    "ScanMaps",
    "as_volume",
    "find_lesions",
    "maps_on_scan",
    "nifti_reference",
    "told_settings",
    "warn_about_missing_values",
]

Scan: TypeAlias = str | os.PathLike[str] | Volume | SpatialImage
"""A scan as it may be given: a file, a volume in memory, or an image of nibabel."""

_SMALLEST_REPORTED_SHARE = 1e-4  # of voxels without a finite value


@dataclass(frozen=True)
class ScanMaps:
    """What the network finds in a scan, on the scan's own grid (I, J, K).

    Attributes
    ----------
    probability : float32 array
        Of lesion, in steps of 1/4096.
    uncertainty : float32 array or None
        Standard deviation over views and looks; None for a single one.
    structure_masks : dict of str to uint8 array
        Ventricles and brain, as far as the network has them.
    looks : Looks
        That were averaged.
    dtype : torch.dtype
        In which the network's products were computed.
    """

    probability: NDArray[np.float32]
    uncertainty: NDArray[np.float32] | None
    structure_masks: dict[str, NDArray[np.uint8]]
    looks: Looks
    dtype: torch.dtype


def maps_on_scan(
    maps: SliceMaps,
    prepared: Prepared,
    looks: Looks,
    dtype: torch.dtype,
    *,
    structures: bool = True,
) -> ScanMaps:
    """Bring maps from the network's grid to the scan's; structures only if they are asked for."""
    native = restore(maps.probability, prepared)
    native *= PROBABILITY_STEPS
    np.rint(native, out=native)
    native /= PROBABILITY_STEPS
    np.clip(native, 0.0, 1.0, out=native)
    found = maps.structures if structures else {}
    return ScanMaps(
        probability=native,
        uncertainty=None if maps.deviation is None else restore(maps.deviation, prepared),
        structure_masks={
            name: restore_mask(part, prepared, STRUCTURE_LEVEL) for name, part in found.items()
        },
        looks=looks,
        dtype=dtype,
    )


def find_lesions(
    probability: NDArray[np.float32], volume: Volume, config: InferenceConfig
) -> tuple[NDArray[np.uint8], tuple[Lesion, ...]]:
    """Make the mask and list its lesions."""
    mask = lesion_mask(probability, config.threshold, config.min_voxels, config.min_peak)
    return mask, tuple(describe_lesions(mask, volume.affine))


def told_settings(config: InferenceConfig, maps: ScanMaps, device: torch.device) -> dict[str, Any]:
    """Return what a report says of the settings: as they were asked for, and as they were used."""
    return {
        "threshold": config.threshold_of(maps.looks.planes),
        "thresholds": {
            "one_plane": config.threshold_of(1),
            "three_planes": config.threshold_of(3),
        },
        "min_voxels": config.min_voxels,
        "min_peak": config.min_peak,
        "min_contrast": config.min_contrast,
        "tta": config.tta,
        "planes": config.planes,
        "zoom": config.zoom,
        "adaptive": config.adaptive,
        "precision": config.precision,
        "used": {
            "planes": maps.looks.planes,
            "zoom": maps.looks.zoom,
            "precision": str(maps.dtype).split(".")[-1],
        },
        "device": str(device),
    }


def as_volume(scan: Scan) -> Volume:
    """Read a scan that is not in memory yet."""
    if isinstance(scan, Volume):
        return scan
    if isinstance(scan, SpatialImage):
        return Volume.from_nibabel(scan)
    return Volume.read(scan)


def warn_about_missing_values(volume: Volume) -> None:
    """Say so where a noticeable share of the voxels holds no number."""
    share = 1.0 - float(np.mean(np.isfinite(volume.data)))
    if share > _SMALLEST_REPORTED_SHARE:
        LOGGER.warning(
            "%s: %.2g %% of the voxels hold no finite number and count as background.",
            volume.path or "the scan",
            100.0 * share,
        )


def nifti_reference(volume: Volume) -> nib.nifti1.Nifti1Image:
    """Return the scan as a nibabel image with the geometry of the file that it came from."""
    if isinstance(volume.header, Nifti2Header):
        image: nib.nifti1.Nifti1Image = nib.nifti2.Nifti2Image(
            volume.data, volume.affine, volume.header
        )
    else:
        image = nib.nifti1.Nifti1Image(volume.data, volume.affine, volume.header)
    image.set_data_dtype(np.float32)
    return image
