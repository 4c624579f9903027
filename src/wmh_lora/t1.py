"""A T1-weighted scan beside the FLAIR: on the network's grid, and in its own intensity scale.

The headers of both files say where the T1 lies; it is sampled where the FLAIR's pixels are, and
averaged over their extent where they are coarser. Headers between which the head has moved are
corrected by `wmh_lora.t1_registration`. Nothing here changes the FLAIR.
"""

from __future__ import annotations

import itertools
import logging
from typing import Any

import numpy as np
import numpy.typing as npt
from nibabel.orientations import (
    apply_orientation,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)
from scipy import ndimage

from wmh_lora.errors import ConfigError, DataError, GridMismatchError
from wmh_lora.preprocess import Prepared
from wmh_lora.preprocess_head import (
    coarse_scan,
    coarse_steps,
    find_background,
    find_head,
    smooth_histogram,
)
from wmh_lora.view import View
from wmh_lora.volume import Volume, voxel_volume_ml

__all__ = [
    "SMALLEST_OVERLAP",
    "T1_VERSION",
    "T1_WHITE_MATTER_LEVEL",
    "overlap_of_heads",
    "prepare_t1",
    "require_t1_channels",
    "sample_on_grid",
    "share_in_view",
    "shared_head",
    "to_grid",
]

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

T1_VERSION = 2
"""Raised whenever `prepare_t1` makes something else of the same scans."""

T1_WHITE_MATTER_LEVEL = 0.7
"""Where the white matter of a T1 lands in [0, 1]. It is the brightest tissue of the brain there, so
less room is left above it than on FLAIR."""

SMALLEST_OVERLAP = 0.5
"""Of FLAIR and T1: with less, they are not scans of one head in one place."""

_USUAL_OVERLAP = 0.8
_COARSE_MM = 3.0
_CORE_HEIGHT_MM = 110.0
_CORE_ML = 300.0
_FLOOR_PERCENTILE = 1.0
_SUPERIOR_FIRST = np.array([[2, 1], [1, 1], [0, 1]])  # axes along S, A and R
_PEAK_SHARE = 0.4  # of the highest peak of a histogram, for a lower one to be a tissue
_log = logging.getLogger("wmh_lora")


def require_t1_channels(model_name: str | None, t1_channels: int) -> None:
    """Raise ConfigError unless a model takes a T1."""
    if not t1_channels:
        raise ConfigError(
            f"The model {model_name} takes FLAIR alone, as all exported ones do: leave the T1 out, "
            "or name a model that was trained with T1 (model.t1_channels)."
        )


def prepare_t1(t1: Volume, prepared: Prepared, flair: Volume) -> FloatArray:
    """Bring a T1 to the network's grid of its FLAIR, and to an intensity scale of its own.

    An affine map sends the first percentile of the intensities deep inside the head (fluid) to 0
    and white matter to `T1_WHITE_MATTER_LEVEL`; the rest is clipped to [0, 1]. White matter is the
    brightest clear peak of their histogram, as in WhiteStripe (Shinohara et al., NeuroImage:
    Clinical 6:9, 2014). Depth keeps skull and scalp out, so that brain-extracted scans get the same
    landmarks: on nine scans of one scanner they differ by 4 % at most.

    Parameters
    ----------
    t1
        The T1-weighted scan, on a grid of its own.
    prepared
        What `wmh_lora.preprocess.preprocess` made of the FLAIR.
    flair
        The FLAIR, for its affine.

    Returns
    -------
    array (S, H, W) float32 in [0, 1]
        As ``prepared.slices``; zero in the background and where the T1 shows nothing.

    Raises
    ------
    GridMismatchError
        If the headers say that the two hardly show the same region, see `overlap_of_heads`.
    DataError
        If no brain can be told from background.
    """
    background = find_background(t1.data)
    coarse = _coarse(t1, background)
    head = _head(coarse.data, coarse.spacing_mm)
    overlap = _overlap(t1, coarse, head, prepared, flair)
    _judge(overlap, t1, flair)
    floor, white_matter = _landmarks(coarse, head, t1)
    gain = np.float32(T1_WHITE_MATTER_LEVEL / (white_matter - floor))
    unit = np.where(background, np.float32(floor), t1.data)
    unit -= np.float32(floor)
    unit *= gain
    np.clip(unit, 0.0, 1.0, out=unit)
    to_voxels = np.linalg.inv(t1.affine) @ flair.affine @ _network_to_native(prepared.view)
    return sample_on_grid(unit, to_voxels, prepared.slices.shape)


def overlap_of_heads(t1: Volume, prepared: Prepared, flair: Volume) -> float:
    """Say how well a T1 covers the head of a FLAIR where their headers place them.

    The smaller of two shares: of the FLAIR's head that lies in the T1's field of view, and of the
    smaller head (one may be brain-extracted) that lies in the other.

    Returns
    -------
    float
        In [0, 1]; near 1 for two scans of one session.
    """
    coarse = _coarse(t1, find_background(t1.data))
    return _overlap(t1, coarse, _head(coarse.data, coarse.spacing_mm), prepared, flair)


def share_in_view(t1: Volume, flair: Volume) -> float:
    """Share of a FLAIR's field of view that lies in a T1's, by their headers alone, in [0, 1]."""
    ticks = [(np.arange(24) + 0.5) / 24 * n - 0.5 for n in flair.shape]
    points = np.stack(np.meshgrid(*ticks, indexing="ij")).reshape(3, -1)
    where = to_grid(np.linalg.inv(t1.affine) @ flair.affine, points)
    return float(_inside(where, t1.shape).mean())


# --- geometry ---------------------------------------------------------------------------------


def _network_to_native(view: View) -> DoubleArray:
    """Return the matrix from (slice, row, column) of the network's grid to the FLAIR's voxels."""
    pixel = view.pixel_size_mm
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1.0
    starts = (view.slices[0], view.rows[0], view.columns[0])
    for shown, (axis, flipped, spacing, start) in enumerate(
        zip(view.axes, view.flips, view.spacing_mm, starts)
    ):
        # centres: along slices whole voxels, in plane pixels of the model's size from the edge
        step = 1.0 if shown == 0 else pixel / spacing
        first = float(start) if shown == 0 else (start + 0.5) * step - 0.5
        if flipped:
            step, first = -step, view.shape_native[axis] - 1 - first
        matrix[axis, shown], matrix[axis, 3] = step, first
    return matrix


def sample_on_grid(data: FloatArray, to_voxels: DoubleArray, shape: tuple[int, ...]) -> FloatArray:
    """Sample ``data`` on a grid; a cell that spans several voxels gets the mean of that many."""
    extents = np.linalg.norm(to_voxels[:3, :3], axis=0)
    parts = [max(1, round(float(extent))) for extent in extents]
    offsets = [(np.arange(n) + 0.5) / n - 0.5 for n in parts]
    rows, columns = np.meshgrid(*(np.arange(n, dtype=np.float64) for n in shape[1:]), indexing="ij")
    sampled = np.zeros(shape, np.float32)
    for index in range(shape[0]):
        for ds, dr, dc in itertools.product(*offsets):
            points = np.stack([np.full_like(rows, index + ds), rows + dr, columns + dc])
            where = to_grid(to_voxels, points.reshape(3, -1))
            values = ndimage.map_coordinates(data, where, order=1, mode="nearest")
            values[~_inside(where, data.shape)] = 0.0
            sampled[index] += values.reshape(rows.shape)
    return sampled / np.float32(np.prod(parts))


def to_grid(affine: npt.NDArray[Any], points: npt.NDArray[Any]) -> DoubleArray:
    """Map points (3, N)."""
    mapped: DoubleArray = affine[:3, :3] @ points + affine[:3, 3:]
    return mapped


def _inside(where: DoubleArray, shape: tuple[int, ...]) -> BoolArray:
    """Whether voxel coordinates (3, N) lie in a field of view, its outer half voxels included."""
    ends = np.array(shape)[:, None] - 0.5
    margin = 1e-6
    return np.asarray(((where >= -0.5 - margin) & (where <= ends + margin)).all(axis=0))


# --- heads and landmarks ----------------------------------------------------------------------


def _coarse(volume: Volume, background: BoolArray) -> Volume:
    """Take voxels about 3 mm apart, slices from foot to head first, background at its darkest."""
    steps, starts = coarse_steps(volume.shape, volume.spacing_mm)
    values, _ = coarse_scan(volume.data, background, volume.spacing_mm, volume.path)
    stride = np.diag([*steps, 1.0])
    stride[:3, 3] = starts
    affine = volume.affine @ stride
    change = ornt_transform(io_orientation(affine), _SUPERIOR_FIRST)
    return Volume(
        np.ascontiguousarray(apply_orientation(values, change)),
        affine @ inv_ornt_aff(change, values.shape),
        volume.path,
    )


def _head(coarse: FloatArray, spacing_mm: tuple[float, float, float]) -> BoolArray:
    """Find a head as when the limits here were set, and the weights of T1 trained."""
    return find_head(coarse, spacing_mm, clean_first=True)


def _overlap(
    t1: Volume, coarse: Volume, head: BoolArray, prepared: Prepared, flair: Volume
) -> float:
    """See `overlap_of_heads`; ``head`` is that of the coarse T1."""
    pixel_mm = prepared.view.pixel_size_mm
    spacing = np.array([prepared.view.spacing_mm[0], pixel_mm, pixel_mm])
    steps = np.maximum(1, np.rint(_COARSE_MM / spacing)).astype(int)
    sampled = prepared.slices[:: steps[0], :: steps[1], :: steps[2]]
    along_s, along_r, along_c = (float(step) for step in steps * spacing)
    flair_head = _head(sampled, (along_s, along_r, along_c))
    to_world = flair.affine @ _network_to_native(prepared.view) @ np.diag([*steps, 1.0])
    return shared_head(flair_head, to_world, head, coarse.affine, t1)


def shared_head(
    flair_head: BoolArray,
    flair_affine: DoubleArray,
    t1_head: BoolArray,
    t1_affine: DoubleArray,
    t1: Volume,
) -> float:
    """Return the smaller of the two shares of `overlap_of_heads`, of heads with their affines."""
    world = to_grid(flair_affine, np.argwhere(flair_head).T)
    in_view = _inside(to_grid(np.linalg.inv(t1.affine), world), t1.shape).mean()
    where = np.rint(to_grid(np.linalg.inv(t1_affine), world)).astype(np.int64)
    known = _inside(where.astype(np.float64), t1_head.shape)
    common = float(t1_head[tuple(where[:, known])].sum()) * voxel_volume_ml(flair_affine)
    smaller = min(
        float(head.sum()) * voxel_volume_ml(affine)
        for head, affine in ((flair_head, flair_affine), (t1_head, t1_affine))
    )
    return min(float(in_view), common / smaller, 1.0)


def _judge(overlap: float, t1: Volume, flair: Volume) -> None:
    """Refuse a T1 of another place, and warn of one that may be."""
    names = f"{t1.path or 'the T1'} and {flair.path or 'the FLAIR'}"
    advice = (
        "check that they are of one person and session, register them (--register-t1, or "
        "wmh_lora.t1_registration), or leave the T1 out"
    )
    if overlap < SMALLEST_OVERLAP:
        raise GridMismatchError(
            f"{names} do not show one head in one place: their headers give an overlap of "
            f"{100 * overlap:.0f} %, expected at least {100 * SMALLEST_OVERLAP:.0f} %; {advice}."
        )
    if overlap < _USUAL_OVERLAP:
        _log.warning("%s overlap by only %.0f %%; %s.", names, 100 * overlap, advice)


def _landmarks(coarse: Volume, head: BoolArray, t1: Volume) -> tuple[float, float]:
    """Return the dark end and the white matter of the intensities deep inside the upper head.

    Taken are a number of millilitres that lie deepest: the same ones with skull and scalp or
    without them. Below a given depth lie others, which a coil shades otherwise.
    """
    present = np.flatnonzero(head.any(axis=(1, 2)))
    height = round(_CORE_HEIGHT_MM / coarse.spacing_mm[0])
    upper = np.zeros_like(head)
    top = slice(max(0, present[-1] - height), present[-1] + 1)
    upper[top] = head[top]
    depth_mm = ndimage.distance_transform_edt(head, sampling=coarse.spacing_mm)[upper]
    last = max(0, depth_mm.size - round(_CORE_ML / coarse.voxel_volume_ml))
    core = coarse.data[upper][depth_mm >= np.partition(depth_mm, last)[last]]
    floor = float(np.percentile(core, _FLOOR_PERCENTILE))
    white_matter = _brightest_peak(core)
    if not white_matter > floor:
        raise DataError(
            f"{t1.path or 'the T1'}: the head shows no contrast; is this a T1 image of a brain?"
        )
    return floor, white_matter


def _brightest_peak(values: FloatArray) -> float:
    """Return the brightest clear peak of a smoothed histogram."""
    smooth, edges = smooth_histogram(values)
    if smooth.size == 0:
        return float(edges[-1])
    padded = np.pad(smooth, 1)
    peaks = (smooth >= padded[:-2]) & (smooth > padded[2:]) & (smooth > _PEAK_SHARE * smooth.max())
    peak = int(np.flatnonzero(peaks)[-1])
    return float((edges[peak] + edges[peak + 1]) / 2)
