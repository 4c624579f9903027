"""How a scan is seen as slices: which axes, which way round, which window, which pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from nibabel.orientations import io_orientation

from wmh_lora.volume import Volume

__all__ = ["Axis", "View", "choose_view", "resampling_matrix", "superior_axis"]

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
    """

    shape_native: tuple[int, int, int]
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    spacing_mm: tuple[float, float, float]
    pixel_size_mm: float
    slices: tuple[int, int] = (0, 0)
    rows: tuple[int, int] = (0, 0)
    columns: tuple[int, int] = (0, 0)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (slices, rows, columns) of the whole, uncropped view at native resolution."""
        i, j, k = (self.shape_native[axis] for axis in self.axes)
        return i, j, k

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


def choose_view(volume: Volume, pixel_size_mm: float) -> View:
    """Choose the slice plane and the flips that show a scan in radiological convention.

    Slices are axial unless the voxels are at least 1.5 times longer along another axis: the
    network then looks at the plane that was acquired in fine detail.
    """
    orientation = io_orientation(volume.affine)
    native_of = [int(np.flatnonzero(orientation[:, 0] == world)[0]) for world in range(3)]
    spacing = [volume.spacing_mm[axis] for axis in native_of]  # along R, A, S
    slice_world = 2
    thickest = int(np.argmax(spacing))
    others = [s for i, s in enumerate(spacing) if i != thickest]
    if spacing[thickest] >= _THICK_RATIO * max(others):
        slice_world = thickest
    # rows and columns: axial shows (A, R), coronal (S, R), sagittal (S, A)
    row_world, column_world = {2: (1, 0), 1: (2, 0), 0: (2, 1)}[slice_world]
    worlds = (slice_world, row_world, column_world)
    increasing = [orientation[native_of[w], 1] > 0 for w in worlds]
    return View(
        shape_native=volume.shape,
        axes=(native_of[worlds[0]], native_of[worlds[1]], native_of[worlds[2]]),
        # slices ascend; rows descend from anterior or superior, columns from the right or anterior
        flips=(not increasing[0], increasing[1], increasing[2]),
        spacing_mm=(spacing[worlds[0]], spacing[worlds[1]], spacing[worlds[2]]),
        pixel_size_mm=pixel_size_mm,
    )


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
