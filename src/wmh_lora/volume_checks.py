"""What an image must satisfy to be segmented, checked before its voxels are read where possible."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wmh_lora.errors import UnreadableImageError

__all__ = [
    "MAX_VOXELS",
    "MIN_IN_PLANE_VOXELS",
    "MIN_SLICES",
    "SPACING_RANGE_MM",
    "check_affine",
    "check_content",
    "check_shape",
    "check_spacing",
    "warn",
]

#: Larger grids are refused before memory is asked for: 2 GiB as float32, 15 times a 0.5 mm head.
MAX_VOXELS = 512 * 1024**2
#: Longest side that NIfTI-1, the output format, can store.
MAX_SIDE_VOXELS = 32767
#: Fewer slices than this are a localiser or a cut-out, not a scan of a brain.
MIN_SLICES = 3
#: The two longer sides must have at least this many voxels.
MIN_IN_PLANE_VOXELS = 16
#: Plausible voxel edge lengths of head MRI; anything else is a damaged header or a wrong unit.
SPACING_RANGE_MM = (0.05, 20.0)
# |det| of the unit-length columns: 1 for a rotation, 0 when an axis vanishes. Real shears (gantry
# tilt of 30 degrees: 0.87) stay far above this.
_MIN_AXES_DETERMINANT = 0.1

_LOG = logging.getLogger("wmh_lora")


def warn(path: Path, message: str) -> None:
    """Log an oddity of `path` that does not prevent its use."""
    _LOG.warning("%s: %s", path, message)


def check_shape(path: Path, shape: Sequence[int]) -> tuple[int, int, int]:
    """Reduce the shape stored in a header to the three sides of one volume, in voxels.

    Parameters
    ----------
    path : Path
        Named in messages.
    shape : sequence of int
        All stored dimensions; those after the third must be 1.

    Returns
    -------
    tuple of int
        ``(I, J, K)``.

    Raises
    ------
    UnreadableImageError
        Empty, 2-D, several frames, too large to read, or too small to be a scan.
    """
    sides = tuple(int(n) for n in shape)
    text = " x ".join(str(n) for n in sides) or "no dimensions"
    if any(n < 0 for n in sides):
        raise UnreadableImageError(
            f"{path} has a damaged header (dimensions {text}); export the image again."
        )
    if any(n == 0 for n in sides):
        raise UnreadableImageError(
            f"{path} is an empty image without voxels ({text}); export the image again."
        )
    if len(sides) < 3 or 1 in sides[:3]:
        raise UnreadableImageError(
            f"{path} is a 2-D image ({text}), but a 3-D volume is needed; give the whole scan in "
            "one file, for example as dcm2niix writes it."
        )
    frames = math.prod(sides[3:])
    if frames > 1:
        raise UnreadableImageError(
            f"{path} is a {len(sides)}-D series of {frames} frames ({text}), but one 3-D image is "
            "needed; choose a frame, for example with `fslroi IN OUT 0 1`."
        )
    if max(sides) > MAX_SIDE_VOXELS or math.prod(sides) > MAX_VOXELS:
        most = f"{MAX_VOXELS:,}" if max(sides) <= MAX_SIDE_VOXELS else f"{MAX_SIDE_VOXELS:,} a side"
        raise UnreadableImageError(
            f"{path} announces {text} voxels, more than the {most} that can be read; the header is "
            "probably damaged: export the image again, or resample it."
        )
    smallest, middle, _ = sorted(sides[:3])
    if smallest < MIN_SLICES or middle < MIN_IN_PLANE_VOXELS:
        raise UnreadableImageError(
            f"{path} is too small for a brain scan ({text}): at least {MIN_SLICES} slices of "
            f"{MIN_IN_PLANE_VOXELS} x {MIN_IN_PLANE_VOXELS} voxels are needed; give the whole scan."
        )
    return sides[0], sides[1], sides[2]


def check_affine(path: Path, affine: npt.NDArray[np.float64], hint: str = "") -> None:
    """Refuse a voxel-to-millimetre matrix that no head scan can have.

    Parameters
    ----------
    path : Path
        Named in messages.
    affine : (4, 4) array of float64
        Voxel index to RAS mm.
    hint : str
        What the file says about its unit of length, added to the message on voxel sizes.

    Raises
    ------
    UnreadableImageError
        NaN or infinity, voxel edges outside `SPACING_RANGE_MM`, or axes that do not span space.
    """
    if not np.isfinite(affine).all():
        raise UnreadableImageError(
            f"{path} has NaN or infinity in its orientation matrix; export the image again."
        )
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    check_spacing(path, spacing_mm, hint)
    if abs(np.linalg.det(affine[:3, :3] / spacing_mm)) < _MIN_AXES_DETERMINANT:
        raise UnreadableImageError(
            f"{path} has a singular orientation matrix (its three axes do not span space); "
            "export the image again."
        )


def check_spacing(path: Path, spacing_mm: npt.NDArray[np.floating], hint: str = "") -> None:
    """Refuse voxel edges (3 lengths, mm) outside `SPACING_RANGE_MM`; see `check_affine`."""
    low, high = SPACING_RANGE_MM
    # Float32 headers and rotated axes miss the limits by rounding. NaN compares false: refused.
    inside = (spacing_mm > low * 0.999) & (spacing_mm < high * 1.001)
    if not inside.all():
        text = " x ".join(f"{length:.4g}" for length in spacing_mm)
        raise UnreadableImageError(
            f"{path} has an impossible voxel size of {text} mm, where {low:g} to {high:g} mm is "
            f"expected{hint}; correct the header, or export the image again."
        )


def check_content(path: Path, data: npt.NDArray[np.float32], *, allow_constant: bool) -> None:
    """Refuse a volume (I, J, K) without a finite value or, unless allowed, without contrast.

    Raises
    ------
    UnreadableImageError
        All values are NaN or infinite, or all finite values are equal.
    """
    lowest, highest = math.inf, -math.inf
    # Slice by slice: a mask of the finite values of the whole volume would cost memory.
    for k in range(data.shape[2]):
        values = data[:, :, k]
        finite = values[np.isfinite(values)]
        if finite.size:
            lowest = min(lowest, float(finite.min()))
            highest = max(highest, float(finite.max()))
    if lowest > highest:
        raise UnreadableImageError(
            f"{path} holds no number at all (every voxel is NaN or infinite); "
            "export the image again."
        )
    if lowest == highest and not allow_constant:
        raise UnreadableImageError(
            f"{path} is constant (every voxel is {lowest:g}), so there is nothing to segment; "
            "check that it is the scan that was meant."
        )
