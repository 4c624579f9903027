"""Take over an image that nibabel has loaded or made, as if its file had been read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from nibabel.arrayproxy import ArrayProxy
from nibabel.nifti1 import Nifti1Header
from nibabel.spatialimages import SpatialImage

from wmh_lora.errors import UnreadableImageError
from wmh_lora.volume_checks import check_affine, check_shape
from wmh_lora.volume_readers import RawImage, nifti_affine, warn_nifti_oddities

__all__ = ["image_file", "image_name", "take_image"]

_UNNAMED = Path("the nibabel image")


def image_file(image: SpatialImage) -> Path | None:
    """Return the file whose content an image stands for.

    None for an image whose voxels are in memory: they may have been changed since.
    """
    name = image.get_filename()
    if name is None or not isinstance(image.dataobj, ArrayProxy):
        return None
    return Path(name)


def image_name(image: SpatialImage) -> Path:
    """Return what messages call an image."""
    return image_file(image) or _UNNAMED


def take_image(image: SpatialImage) -> RawImage:
    """Convert an image to float32 with its affine and, for NIfTI, its header.

    Parameters
    ----------
    image : SpatialImage
        3-D, or with further dimensions of size 1. It is not changed, and keeps no copy of its data.

    Raises
    ------
    UnreadableImageError
        If it is no 3-D scalar image, or has no plausible geometry.
    """
    name = image_name(image)
    # voxels in memory may be of another type than the header says
    dtype = getattr(image.dataobj, "dtype", image.get_data_dtype())
    if dtype.kind not in "biuf":
        kind = "complex" if dtype.kind == "c" else "colour or other structured"
        raise UnreadableImageError(
            f"{name} holds {kind} values, but one number a voxel is needed; give the magnitude or "
            "intensity image."
        )
    shape = check_shape(name, image.shape)
    if image.affine is None:
        raise UnreadableImageError(
            f"{name} has no affine, so its voxels have no place; make it with one."
        )
    header = image.header.copy() if isinstance(image.header, Nifti1Header) else None
    affine = np.array(image.affine, dtype=np.float64)
    # nibabel's own rule: a header that tells nearly the same place is kept when it is saved.
    if header is not None and np.allclose(affine, stored := nifti_affine(header)):
        affine = stored
    else:
        header = None
    check_affine(name, affine)
    if header is not None:
        warn_nifti_oddities(name, header, affine)
    return RawImage(_voxels(image, shape), affine, header)


def _voxels(image: SpatialImage, shape: tuple[int, int, int]) -> npt.NDArray[np.float32]:
    """Scale in double precision, as the reader of files does."""
    in_file = isinstance(image.dataobj, ArrayProxy)
    values = np.asarray(image.dataobj, dtype=np.float64 if in_file else None)
    data = np.empty(shape, dtype=np.float32, order="F")
    with np.errstate(over="ignore", invalid="ignore"):  # as beyond float32 in a file
        data[...] = values.reshape(shape)
    return data
