"""The half-way space of several visits, in which none is interpolated more than the others."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from nibabel.orientations import io_orientation
from scipy import ndimage
from scipy.linalg import expm, logm

from wmh_lora.errors import DataError
from wmh_lora.preprocess_head import find_background
from wmh_lora.registration import rigid_movement
from wmh_lora.volume import Volume, voxel_volume_ml

__all__ = ["Alignment", "align_visits"]

BoolArray = npt.NDArray[np.bool_]
DoubleArray = npt.NDArray[np.float64]
FloatArray = npt.NDArray[np.float32]
LabelArray = npt.NDArray[np.int32]

_FINEST_MM, _COARSEST_MM = 0.5, 1.5  # of the half-way grid
_HEAD_RADIUS_MM = 80.0
_USUAL_INCONSISTENCY_MM = 1.0
_SMALLEST_COMMON_SHARE = 0.3
_log = logging.getLogger("wmh_lora")


@dataclass(frozen=True)
class Alignment:
    """Where the visits lie in the half-way space, and a grid there that holds all of them.

    Attributes
    ----------
    affine : (4, 4) array
        Voxels of the half-way grid to half-way millimetres; axes run to the right, front and top.
    shape : three ints
        Of that grid.
    to_visit : tuple of (4, 4) arrays
        Half-way millimetres to the world coordinates of each visit; rigid.
    inconsistency_mm : tuple of floats or None
        How far the registration of each visit to the first, done both ways, disagrees with itself
        at most within a ball of 80 mm around the middle: 0 for the first visit, None where nothing
        was registered.
    """

    affine: DoubleArray
    shape: tuple[int, int, int]
    to_visit: tuple[DoubleArray, ...]
    inconsistency_mm: tuple[float | None, ...]

    @property
    def voxel_volume_ml(self) -> float:
        """Volume of a voxel of the half-way grid in millilitres."""
        return voxel_volume_ml(self.affine)

    def voxels_of(self, visit: int, volume: Volume) -> DoubleArray:
        """Return the matrix from half-way voxels to the voxels of a visit's scan."""
        matrix = np.linalg.inv(volume.affine) @ self.to_visit[visit] @ self.affine
        matrix[3] = (0.0, 0.0, 0.0, 1.0)
        return np.asarray(matrix)

    def scan(self, visit: int, volume: Volume) -> FloatArray:
        """Interpolate a scan linearly on the half-way grid; 0 outside its field of view."""
        matrix = self.voxels_of(visit, volume)
        finite = volume.finite_data()
        sampled = ndimage.affine_transform(
            finite, matrix, output_shape=self.shape, order=1, mode="grid-constant"
        )
        return np.asarray(sampled, dtype=np.float32)

    def labels(self, visit: int, volume: Volume, labels: LabelArray) -> LabelArray:
        """Bring the labels of a scan's voxels to the half-way grid, without losing any.

        A half-way voxel has the label of the scan's voxel that it lies in, or that has its centre
        in it.
        """
        matrix = self.voxels_of(visit, volume)
        sampled = np.asarray(
            ndimage.affine_transform(
                labels, matrix, output_shape=self.shape, order=0, mode="grid-constant"
            ),
            dtype=np.int32,
        )
        native = np.nonzero(labels)
        back = np.linalg.inv(matrix)
        where = np.rint(back[:3, :3] @ np.stack(native) + back[:3, 3:]).astype(np.int64)
        inside = ((where >= 0) & (where < np.array(self.shape)[:, None])).all(axis=0)
        spots = tuple(where[:, inside])
        values = labels[native][inside]
        free = sampled[spots] == 0
        sampled[tuple(axis[free] for axis in spots)] = values[free]
        return sampled

    def in_view(self, visit: int, volume: Volume) -> BoolArray:
        """Mark the half-way voxels of which a visit's scan holds a measurement."""
        measured = (~find_background(volume.data)).astype(np.uint8)
        sampled = ndimage.affine_transform(
            measured,
            self.voxels_of(visit, volume),
            output_shape=self.shape,
            order=0,
            mode="grid-constant",
        )
        return np.asarray(sampled != 0, dtype=np.bool_)


def align_visits(
    volumes: Sequence[Volume],
    *,
    focus: Sequence[npt.NDArray[np.uint8] | None] | None = None,
    register: bool = True,
) -> Alignment:
    """Register the scans of several visits to the space half-way between them.

    Each visit is registered to the first and the first to it; half of the one movement and half of
    the inverse of the other are taken, so that the order of two visits does not matter. The
    half-way space is the mean of the visits' places (with two: the square root of the movement), as
    in Reuter et al., NeuroImage 61:1402 (2012).

    Parameters
    ----------
    volumes
        At least two scans.
    focus
        For each scan the part, such as the brain, that the movement is to fit, or None.
    register
        False takes the headers' word that all scans lie in one space already.

    Raises
    ------
    ConfigError
        If SimpleITK is not installed.
    DataError
        If scans cannot be registered, or their fields of view hardly overlap.
    """
    focus = focus or [None] * len(volumes)
    movements: list[DoubleArray] = [np.eye(4)]
    inconsistency: list[float | None] = [0.0 if register else None]
    for volume, part in zip(volumes[1:], focus[1:], strict=True):
        if not register:
            movements.append(np.eye(4))
            inconsistency.append(None)
            continue
        there = rigid_movement(volumes[0], volume, focus=focus[0])
        back = rigid_movement(volume, volumes[0], focus=part)
        again = np.asarray(np.linalg.inv(back), dtype=np.float64)
        movements.append(_mean_pose([there, again]))
        apart = _largest_difference_mm(there, again, _middle(volumes[0]))
        inconsistency.append(apart)
        if apart > _USUAL_INCONSISTENCY_MM:
            _log.warning(
                "%s: registration to the first visit is uncertain (forward and back differ by "
                "%.1f mm); look at the picture before using lesion changes.",
                volume.path or "a visit",
                apart,
            )
    middle = _mean_pose(movements)
    from_middle = np.linalg.inv(middle)
    # with M = P P for the movement M of two visits: first by the inverse of P, second by P
    to_visit = tuple(_rigid(movement @ from_middle) for movement in movements)
    affine, shape = _grid(volumes, to_visit)
    alignment = Alignment(affine, shape, to_visit, tuple(inconsistency))
    _check_overlap(alignment, volumes)
    return alignment


def _mean_pose(poses: Sequence[DoubleArray]) -> DoubleArray:
    """Return the mean of rigid movements on their group (of two: half-way along the screw)."""
    mean = np.asarray(poses[0], dtype=np.float64)
    for _ in range(20):
        inverse = np.linalg.inv(mean)
        step = np.mean([np.real(logm(inverse @ pose)) for pose in poses], axis=0)
        mean = mean @ expm(step)
        if np.abs(step).max() < 1e-10:
            break
    return _rigid(mean)


def _rigid(matrix: DoubleArray) -> DoubleArray:
    """Take rounding errors out of a rigid movement."""
    clean = np.array(matrix)
    clean[:3, :3] = _nearest_rotation(matrix[:3, :3])
    return clean


def _nearest_rotation(matrix: DoubleArray) -> DoubleArray:
    left, _, right = np.linalg.svd(matrix)
    return np.asarray(left @ np.diag([1.0, 1.0, np.linalg.det(left @ right)]) @ right)


def _middle(volume: Volume) -> DoubleArray:
    centre = (np.array(volume.shape) - 1) / 2
    return np.asarray(volume.affine[:3, :3] @ centre + volume.affine[:3, 3])


def _largest_difference_mm(one: DoubleArray, other: DoubleArray, middle: DoubleArray) -> float:
    """Return how far two movements take a point of the head apart at most."""
    difference = one - other
    shift = np.linalg.norm(difference[:3, :3] @ middle + difference[:3, 3])
    turn = np.linalg.norm(difference[:3, :3], ord=2)
    return float(shift + turn * _HEAD_RADIUS_MM)


def _grid(
    volumes: Sequence[Volume], to_visit: Sequence[DoubleArray]
) -> tuple[DoubleArray, tuple[int, int, int]]:
    """Lay a grid around all fields of view, along the mean of the scans' axes."""
    turns, edges, corners = [], [], []
    for volume, pose in zip(volumes, to_visit, strict=True):
        from_visit = np.linalg.inv(pose)
        axes = from_visit[:3, :3] @ volume.affine[:3, :3]
        order = io_orientation(volume.affine)
        native = [int(np.flatnonzero(order[:, 0] == world)[0]) for world in range(3)]
        spacing = np.linalg.norm(axes, axis=0)
        turns.append((axes / spacing * order[:, 1])[:, native])
        edges.append(spacing[native])
        ends = np.array(list(itertools.product(*((-0.5, n - 0.5) for n in volume.shape)))).T
        whole = from_visit @ volume.affine
        corners.append(whole[:3, :3] @ ends + whole[:3, 3:])
    axes = _nearest_rotation(np.mean(turns, axis=0))
    step = np.clip(np.min(edges, axis=0), _FINEST_MM, _COARSEST_MM)
    along = axes.T @ np.concatenate(corners, axis=1)
    low, high = along.min(axis=1), along.max(axis=1)
    counts = np.ceil((high - low) / step - 1e-6).astype(int)
    affine = np.eye(4)
    affine[:3, :3] = axes * step
    affine[:3, 3] = axes @ ((low + high) / 2 - step * (counts - 1) / 2)
    return affine, (int(counts[0]), int(counts[1]), int(counts[2]))


def _check_overlap(alignment: Alignment, volumes: Sequence[Volume]) -> None:
    """Refuse visits that do not show the same part of a head."""
    views = [alignment.in_view(i, volume)[::4, ::4, ::4] for i, volume in enumerate(volumes)]
    common = np.logical_and.reduce(views)
    share = float(common.sum()) / max(1.0, float(min(view.sum() for view in views)))
    if share < _SMALLEST_COMMON_SHARE:
        names = ", ".join(str(volume.path or "a scan") for volume in volumes)
        raise DataError(
            f"The visits share only {100 * share:.0f} % of their field of view, expected at least "
            f"{100 * _SMALLEST_COMMON_SHARE:.0f} %: {names}; check that they are of one person and "
            "show the same part of the head."
        )
