"""Find the rigid movement of a head between two scans.

Needs SimpleITK, which ``pip install 'wmh-lora[registration]'`` brings.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wmh_lora.errors import ConfigError, DataError
from wmh_lora.preprocess_head import find_background, find_head
from wmh_lora.t1 import SMALLEST_OVERLAP, sample_on_grid, shared_head, to_grid
from wmh_lora.volume import Volume

__all__ = ["rigid_movement", "turn_and_shift"]

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

_GRID_MM = 2.0
_AROUND_FOCUS_MM = 6.0  # the edge of the brain is what fixes its place best
_SAMPLED = (0.5, 0.2, 0.2)  # of the voxels, from coarse to fine
_RADIUS_MM = 60.0  # a turn by one radian counts as a shift by this much
_FIRST_STEP_MM, _LAST_STEP_MM = 2.0, 2e-3


def rigid_movement(
    fixed: Volume, moving: Volume, *, focus: npt.NDArray[Any] | None = None
) -> DoubleArray:
    """Find the rigid movement that leads from one scan of a head to another.

    Mattes' mutual information (IEEE TMI 22:120, 2003), from coarse to fine, from where the headers
    place the scans; where the heads overlap little, from their centres. The same input gives the
    same result.

    Parameters
    ----------
    fixed, moving
        The scans, on grids and of contrasts of their own.
    focus : array (I, J, K), optional
        Non-zero on the part of ``fixed``, such as the brain, that the movement is to fit: jaw, neck
        and scalp do not move with the brain as one body.

    Returns
    -------
    (4, 4) array of float64
        World coordinates (RAS millimetres) of ``fixed`` to those of the same point in ``moving``.

    Raises
    ------
    ConfigError
        If SimpleITK is not installed.
    DataError
        If no head can be told from background, or the registration fails.
    """
    sitk = _simple_itk()
    still, moved = _isotropic(fixed), _isotropic(moving)
    start = sitk.Euler3DTransform()
    centres = [to_grid(scan.affine, _centre(scan.head)[:, None])[:, 0] for scan in (still, moved)]
    start.SetCenter(centres[0].tolist())
    if _heads_apart(still, moved):
        start.SetTranslation((centres[1] - centres[0]).tolist())
    method = sitk.ImageRegistrationMethod()
    if focus is not None:
        method.SetMetricFixedMask(_as_image(sitk, _around(focus, still), still))
    method.SetMetricAsMattesMutualInformation(50)
    # a fixed pattern and fixed scales: nothing is drawn at random
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentagePerLevel(list(_SAMPLED), 1)
    method.SetNumberOfThreads(1)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        _FIRST_STEP_MM, _LAST_STEP_MM, 300, relaxationFactor=0.6, gradientMagnitudeTolerance=1e-10
    )
    method.SetOptimizerScales([_RADIUS_MM**2] * 3 + [1.0] * 3)
    method.SetShrinkFactorsPerLevel([4, 2, 1])
    method.SetSmoothingSigmasPerLevel([4.0, 2.0, 1.0])
    method.SetInitialTransform(start, inPlace=True)
    try:
        method.Execute(*(_as_image(sitk, scan.data, scan) for scan in (still, moved)))
    except RuntimeError as error:
        raise DataError(
            f"{moving.path or 'the scan'} could not be registered to "
            f"{fixed.path or 'the other scan'}; check that both show one head."
        ) from error
    # far below the accuracy, and above what the order of sums in other threads can change
    start.SetParameters(np.round(start.GetParameters(), 6).tolist())
    movement = np.eye(4)
    movement[:3, :3] = np.reshape(start.GetMatrix(), (3, 3))
    centre = np.array(start.GetCenter())
    movement[:3, 3] = centre + start.GetTranslation() - movement[:3, :3] @ centre
    return movement


def turn_and_shift(movement: DoubleArray, centre_mm: DoubleArray) -> tuple[float, float]:
    """Return by how many degrees a rigid movement turns, and by how many mm it shifts a point.

    Examples
    --------
    >>> import numpy as np
    >>> turn_and_shift(np.eye(4), np.zeros(3))
    (0.0, 0.0)
    """
    turn = movement[:3, :3]
    # from the sine as well: near no turn the cosine alone has few digits
    sine = np.linalg.norm(turn - turn.T) / np.sqrt(8)
    turn_deg = np.degrees(np.arctan2(sine, (np.trace(turn) - 1) / 2))
    shift = turn @ centre_mm + movement[:3, 3] - centre_mm
    return float(turn_deg), float(np.linalg.norm(shift))


@dataclass(frozen=True)
class _Isotropic:
    """A scan on a grid along the axes of the world, slices from foot to head first."""

    scan: Volume  # the scan itself
    data: FloatArray  # in [0, 1]
    affine: DoubleArray
    head: BoolArray


def _isotropic(volume: Volume) -> _Isotropic:
    """Resample a scan to even voxels: images in SimpleITK can have no sheared axes."""
    ends = [(-0.5, n - 0.5) for n in volume.shape]
    corners = to_grid(volume.affine, np.array(list(itertools.product(*ends))).T)
    low, high = corners.min(axis=1), corners.max(axis=1)
    step = _GRID_MM
    shape = tuple(int(n) for n in np.ceil((high - low) / step)[::-1])
    affine = np.zeros((4, 4))
    affine[[2, 1, 0], [0, 1, 2]] = step
    affine[:3, 3] = low + step / 2
    affine[3, 3] = 1.0
    background = find_background(volume.data)
    dark, bright = np.percentile(volume.data[~background], [0.5, 99.5])
    unit = np.where(background, dark, volume.data)
    unit = np.clip((unit - dark) / max(float(bright - dark), 1e-12), 0.0, 1.0).astype(np.float32)
    data = sample_on_grid(unit, np.linalg.inv(volume.affine) @ affine, shape)
    return _Isotropic(volume, data, affine, find_head(data, (step, step, step)))


def _around(focus: npt.NDArray[Any], still: _Isotropic) -> npt.NDArray[np.uint8]:
    """Bring a mask of the scan to its even voxels, and grow it a little."""
    to_voxels = np.linalg.inv(still.scan.affine) @ still.affine
    inside = sample_on_grid((focus != 0).astype(np.float32), to_voxels, still.data.shape) > 0.5
    steps = round(_AROUND_FOCUS_MM / _GRID_MM)
    return np.asarray(ndimage.binary_dilation(inside, iterations=steps), dtype=np.uint8)


def _centre(head: BoolArray) -> DoubleArray:
    return np.asarray(np.argwhere(head).mean(axis=0))


def _heads_apart(fixed: _Isotropic, moving: _Isotropic) -> bool:
    shared = shared_head(fixed.head, fixed.affine, moving.head, moving.affine, moving.scan)
    return shared < SMALLEST_OVERLAP


def _as_image(sitk: Any, data: npt.NDArray[Any], scan: _Isotropic) -> Any:
    """Hand an array over; world coordinates are the same on both sides."""
    image = sitk.GetImageFromArray(data)
    image.SetSpacing([_GRID_MM] * 3)
    image.SetOrigin(scan.affine[:3, 3].tolist())
    return image


def _simple_itk() -> Any:
    try:
        import SimpleITK
    except ImportError as error:
        raise ConfigError(
            "Registration needs SimpleITK: pip install 'wmh-lora[registration]', or register the "
            "scans with another program."
        ) from error
    return SimpleITK
