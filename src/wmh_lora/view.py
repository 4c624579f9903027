"""How a scan is seen as slices: which axes, which way round, which window, which pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
from nibabel.orientations import io_orientation

from wmh_lora.volume import Volume

__all__ = [
    "PLANES",
    "Axis",
    "Plane",
    "View",
    "choose_view",
    "resample_pictures",
    "resampling_matrix",
    "superior_axis",
    "turn_planes",
]

Plane = Literal["axial", "coronal", "sagittal"]
PLANES: tuple[Plane, ...] = ("axial", "coronal", "sagittal")
"""All planes, the usual one first."""

# World axis (right, anterior, superior) along slices, rows and columns. Slices ascend; rows descend
# from anterior or superior, columns from the right or anterior.
_WORLD_AXES: Mapping[Plane, tuple[int, int, int]] = {
    "axial": (2, 1, 0),
    "coronal": (1, 2, 0),
    "sagittal": (0, 2, 1),
}

_Scalar = TypeVar("_Scalar", bound=np.generic)
_THICK_RATIO = 1.5


@dataclass(frozen=True)
class Axis:
    """A row of equal cells: where the first begins, how long each is, how many there are."""

    start_mm: float
    step_mm: float
    count: int

    @property
    def centres_mm(self) -> npt.NDArray[np.float64]:
        """Return the cells' centres, from the edge of the field of view."""
        return self.start_mm + (np.arange(self.count, dtype=np.float64) + 0.5) * self.step_mm


@dataclass(frozen=True)
class View:
    """How native axes become (slice, row, column), and the window of them that is kept.

    Attributes
    ----------
    shape_native
        Shape (I, J, K) of the scan.
    axes
        Native axis shown as slice, row and column.
    flips
        Whether that axis is reversed.
    spacing_mm
        Voxel size along slice, row and column.
    slices
        First and one-past-last slice of the view that is kept.
    rows, columns
        First and one-past-last model pixel kept; may lie outside the field of view, where the
        picture is zero.
    pixel_size_mm
        The model's in-plane pixel size.
    plane
        Of the slices.
    """

    shape_native: tuple[int, int, int]
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    spacing_mm: tuple[float, float, float]
    pixel_size_mm: float
    plane: Plane
    slices: tuple[int, int] = (0, 0)
    rows: tuple[int, int] = (0, 0)
    columns: tuple[int, int] = (0, 0)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (slices, rows, columns) of the whole, uncropped view at native resolution."""
        i, j, k = (self.shape_native[axis] for axis in self.axes)
        return i, j, k

    @property
    def is_isotropic(self) -> bool:
        """Whether other planes show as much as this one to a network of this pixel size."""
        return max(self.spacing_mm) < _THICK_RATIO * self.pixel_size_mm

    def field(self, axis: int) -> Axis:
        """Return the native voxels along rows (1) or columns (2)."""
        return Axis(0.0, self.spacing_mm[axis], self.shape[axis])

    def window(self, axis: int) -> Axis:
        """Return the kept model pixels along rows (1) or columns (2)."""
        first, last = self.rows if axis == 1 else self.columns
        return Axis(first * self.pixel_size_mm, self.pixel_size_mm, last - first)

    def to_view(self, native: npt.NDArray[_Scalar]) -> npt.NDArray[_Scalar]:
        """Show a native array (I, J, K) as (slice, row, column), without a copy."""
        flip = tuple(slice(None, None, -1 if flipped else 1) for flipped in self.flips)
        return np.transpose(native, self.axes)[flip]


def choose_view(volume: Volume, pixel_size_mm: float, plane: Plane | None = None) -> View:
    """Choose the slice plane and the flips that show a scan in radiological convention.

    Parameters
    ----------
    volume
        Any orientation and voxel size.
    pixel_size_mm
        The model's in-plane pixel size.
    plane
        Plane of the slices. By default axial, unless the voxels are at least 1.5 times longer along
        another axis: the network then looks at the plane that was acquired in fine detail.
    """
    orientation = io_orientation(volume.affine)
    native_of = [int(np.flatnonzero(orientation[:, 0] == world)[0]) for world in range(3)]
    spacing = [volume.spacing_mm[axis] for axis in native_of]  # along R, A, S
    plane = plane or _usual_plane(spacing)
    worlds = _WORLD_AXES[plane]
    increasing = [orientation[native_of[w], 1] > 0 for w in worlds]
    return View(
        plane=plane,
        shape_native=volume.shape,
        axes=(native_of[worlds[0]], native_of[worlds[1]], native_of[worlds[2]]),
        flips=(not increasing[0], increasing[1], increasing[2]),
        spacing_mm=(spacing[worlds[0]], spacing[worlds[1]], spacing[worlds[2]]),
        pixel_size_mm=pixel_size_mm,
    )


def _usual_plane(spacing_mm: Sequence[float]) -> Plane:
    """Return the plane of slices, of voxels with these sizes along R, A and S."""
    thickest = int(np.argmax(spacing_mm))
    others = [step for axis, step in enumerate(spacing_mm) if axis != thickest]
    if spacing_mm[thickest] < _THICK_RATIO * max(others):
        return PLANES[0]
    return next(plane for plane in PLANES if _WORLD_AXES[plane][0] == thickest)


def turn_planes(stack: npt.NDArray[_Scalar], shown: Plane, wanted: Plane) -> npt.NDArray[_Scalar]:
    """Show a stack (S, H, W) of one plane as a stack of another, without a copy.

    Examples
    --------
    >>> axial = np.arange(24).reshape(2, 3, 4)
    >>> turn_planes(axial, "axial", "coronal").shape
    (3, 2, 4)
    >>> np.array_equal(
    ...     turn_planes(turn_planes(axial, "axial", "coronal"), "coronal", "axial"), axial
    ... )
    True
    """
    axes = [_WORLD_AXES[shown].index(world) for world in _WORLD_AXES[wanted]]
    # only the first axis ascends: one that becomes first, or was it, is reversed
    turned = np.transpose(stack, axes)
    return turned[
        tuple(slice(None, None, -1 if (i == 0) != (a == 0) else 1) for i, a in enumerate(axes))
    ]


def superior_axis(volume: Volume) -> int:
    """Return the native axis that runs most nearly from foot to head."""
    return int(np.flatnonzero(io_orientation(volume.affine)[:, 0] == 2)[0])


def resampling_matrix(source: Axis, target: Axis) -> npt.NDArray[np.float32]:
    """Return the (target, source) matrix of linear interpolation, low-pass where it shrinks.

    Weights are a triangle as wide as the coarser of the two steps, normalised a row; cells whose
    centre lies outside the source get none. Equal grids give the identity.
    """
    centres = target.centres_mm
    width = max(source.step_mm, target.step_mm)
    distance = np.abs(centres[:, None] - source.centres_mm[None])
    weights = np.maximum(0.0, 1.0 - distance / width)
    end_mm = source.start_mm + source.count * source.step_mm
    outside = (centres < source.start_mm) | (centres > end_mm)
    weights[outside] = 0.0
    total = weights.sum(axis=1, keepdims=True)
    normalised = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return np.asarray(normalised, dtype=np.float32)


def resample_pictures(
    rows: npt.NDArray[np.float32],
    columns: npt.NDArray[np.float32],
    pictures: npt.NDArray[np.generic],
) -> npt.NDArray[np.float32]:
    """Resample each picture of (S, H, W) by matrices of its rows and columns; blank ones stay so.

    Parameters
    ----------
    rows, columns
        From `resampling_matrix`, (H', H) and (W', W).
    pictures
        (S, H, W), of any type.

    Returns
    -------
    array (S, H', W') float32
    """
    out = np.zeros((len(pictures), len(rows), len(columns)), np.float32)
    for picture, resampled in zip(pictures, out, strict=True):
        if picture.any():
            np.matmul(rows @ picture.astype(np.float32, copy=False), columns.T, out=resampled)
    return out
