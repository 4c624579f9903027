"""From a scan to what the network sees, and exactly back.

One path serves training, tuning, evaluation and inference:

1. *View*: the voxel array is flipped and permuted into a canonical stack of slices, axial unless
   the scan is clearly thicker along another axis.
2. *Head*: foreground found on a coarse grid gives a bounding box; nothing outside is computed.
3. *Intensity*: an affine map fixed by two landmarks deep inside the head (the dark end, which is
   cerebrospinal fluid, and the darkest clear peak, which is white matter), so neither the value
   outside the head nor the scanner's offset and gain matter.
4. *Pixels*: each slice is resampled to a physical pixel size by two small matrices, one per axis.

:func:`restore` applies the inverse of 4, 2 and 1 to a probability map. Geometry is separable and
aligned on the field of view, so a scan that already has the model's pixel size is not interpolated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from wmh_lora.config import PreprocessConfig
from wmh_lora.errors import GridMismatchError
from wmh_lora.preprocess_head import (
    HEAD_RULES,
    coarse_scan,
    find_background,
    find_head,
    landmarks,
    shows_head,
)
from wmh_lora.view import (
    Plane,
    View,
    choose_view,
    resample_pictures,
    resampling_matrix,
    superior_axis,
)
from wmh_lora.volume import Volume

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

WHITE_MATTER_LEVEL = 0.4
"""Where the white matter mode lands in [0, 1]: lesions up to 2.5 times as bright stay unclipped."""


@dataclass(frozen=True)
class Prepared:
    """A scan as the network sees it.

    Attributes
    ----------
    slices
        (S, H, W) float32 in [0, 1]; rows run from anterior to posterior and columns from the
        patient's right to left (radiological display) when slices are axial.
    context_offset
        Distance, in slices, of the neighbours shown beside each slice.
    view
        What :func:`restore` needs to go back.
    floor, white_matter
        Intensity landmarks in the scan's own units.
    config
        The settings used.
    shows_head
        (S,) whether a slice shows the head, or lies next to one that does; None if not known.
    """

    slices: FloatArray
    context_offset: int
    view: View
    floor: float
    white_matter: float
    config: PreprocessConfig
    shows_head: BoolArray | None = None


def preprocess(volume: Volume, config: PreprocessConfig, plane: Plane | None = None) -> Prepared:
    """Bring a scan to the network's grid and intensity scale.

    Parameters
    ----------
    volume
        Any orientation and voxel size; NaN and infinities count as background.
    config
        Pixel size, context distance and margins, in mm.
    plane
        Of the slices; see `wmh_lora.view.choose_view` for the default.

    Returns
    -------
    Prepared
        Slices (S, H, W) in [0, 1] with H and W multiples of ``config.multiple_px``.

    Raises
    ------
    DataError
        If no tissue can be told from background.
    """
    view = choose_view(volume, config.pixel_size_mm, plane)
    scan = np.asarray(view.to_view(volume.data), dtype=np.float32)
    background = find_background(scan)
    coarse, coarse_spacing = coarse_scan(scan, background, view.spacing_mm, volume.path)
    rule = HEAD_RULES[config.version]
    head = find_head(coarse, coarse_spacing, clean_first=rule.clean_first)
    superior = next(i for i, axis in enumerate(view.axes) if axis == superior_axis(volume))
    floor, white_matter = landmarks(coarse, head, coarse_spacing, superior, volume, rule)
    view = _crop(view, head, coarse_spacing, config)

    gain = WHITE_MATTER_LEVEL / (white_matter - floor)
    first, last = view.slices
    rows, columns = (resampling_matrix(view.field(a), view.window(a)) for a in (1, 2))
    slices = np.empty((last - first, len(rows), len(columns)), np.float32)
    for out, index in zip(slices, range(first, last), strict=True):
        picture = np.where(background[index], floor, scan[index])
        picture = np.clip((picture - floor) * gain, 0.0, 1.0).astype(np.float32)
        np.matmul(rows @ picture, columns.T, out=out)
    offset = max(1, round(config.context_mm / view.spacing_mm[0]))
    near = shows_head(view, head, coarse_spacing)
    return Prepared(slices, offset, view, floor, white_matter, config, near)


class SliceStack(Protocol):
    """Slices with the distance of the neighbours that are shown beside each."""

    @property
    def slices(self) -> FloatArray:
        """Return (S, H, W) float32 in [0, 1]."""

    @property
    def context_offset(self) -> int:
        """Return the distance in slices."""


def context_stack(
    prepared: SliceStack,
    indices: Sequence[int],
    channels: int,
    *,
    slices: FloatArray | None = None,
) -> FloatArray:
    """Give each slice its neighbours as channels (2.5-D input).

    Parameters
    ----------
    prepared
        A preprocessed scan, or its slices in another plane.
    indices
        Slices to show, length B.
    channels
        Slices in a stack, an odd number: 1 shows no neighbours, 3 one on each side.
    slices
        (S, H, W), another picture on the same grid (a T1), to show in place of the scan itself.

    Returns
    -------
    array (B, channels, H, W)
        Slices ``context_offset`` apart, from below to above, the slice itself in the middle; the
        outermost slice stands in for neighbours beyond the ends.
    """
    shown = prepared.slices if slices is None else slices
    centre = np.asarray(indices, dtype=np.int64)
    offsets = prepared.context_offset * (np.arange(channels) - channels // 2)
    stacked: FloatArray = shown[np.clip(centre[:, None] + offsets, 0, len(shown) - 1)]
    return stacked


def restore(probability: FloatArray, prepared: Prepared) -> FloatArray:
    """Bring a map from the network's grid back to the scan's own voxels.

    Parameters
    ----------
    probability
        (S, H, W), as ``prepared.slices``.
    prepared
        The scan that it belongs to.

    Returns
    -------
    array (I, J, K) float32
        Zero outside the window that the network saw.

    Raises
    ------
    GridMismatchError
        If the shapes differ.
    """
    if probability.shape != prepared.slices.shape:
        raise GridMismatchError(
            f"The map has shape {probability.shape} but the prepared scan has "
            f"{prepared.slices.shape}; restore maps onto the scan that they were computed from."
        )
    native = np.zeros(prepared.view.shape_native, dtype=np.float32, order="F")
    target = prepared.view.to_view(native)
    for index, plane in _native_planes(probability, prepared):
        target[index] = plane
    return native


def restore_mask(
    probability: npt.NDArray[np.generic], prepared: Prepared, level: float
) -> npt.NDArray[np.uint8]:
    """Bring a map back to the scan's own voxels as `restore` does, and mark those of some level.

    Parameters
    ----------
    probability
        (S, H, W), as ``prepared.slices``, of any type and scale.
    prepared
        The scan that it belongs to.
    level
        Restored values of at least this, on the map's scale, are marked; above zero.

    Returns
    -------
    array (I, J, K) uint8
        A quarter of the memory that the restored map would take.
    """
    native = np.zeros(prepared.view.shape_native, dtype=np.uint8, order="F")
    target = prepared.view.to_view(native)
    for index, plane in _native_planes(probability, prepared):
        target[index] = plane >= np.float32(level)
    return native


def _native_planes(
    maps: npt.NDArray[np.generic], prepared: Prepared
) -> Iterator[tuple[int, FloatArray]]:
    """Yield each slice of the view that was kept, by its index, at the scan's own resolution."""
    view = prepared.view
    rows, columns = (resampling_matrix(view.window(a), view.field(a)) for a in (1, 2))
    for index, plane in zip(range(*view.slices), maps, strict=True):
        if plane.any():
            yield index, rows @ np.asarray(plane, dtype=np.float32) @ columns.T


def to_model_grid(mask: npt.NDArray[np.generic], prepared: Prepared) -> FloatArray:
    """Bring a mask of the scan's own grid to the network's: the training target.

    Parameters
    ----------
    mask
        (I, J, K), zero or one (or a fraction).
    prepared
        The scan that it belongs to.

    Returns
    -------
    array (S, H, W) float32 in [0, 1]
        Fractions of each pixel that the mask covers.

    Raises
    ------
    GridMismatchError
        If the mask does not have the shape of the scan.
    """
    view = prepared.view
    if mask.shape != view.shape_native:
        raise GridMismatchError(
            f"The mask has shape {mask.shape} but its scan has {view.shape_native}; "
            "resample the mask to the scan's grid first."
        )
    viewed = view.to_view(mask)
    rows, columns = (resampling_matrix(view.field(a), view.window(a)) for a in (1, 2))
    return resample_pictures(rows, columns, viewed[slice(*view.slices)])


def _crop(
    view: View, head: BoolArray, spacing_mm: tuple[float, float, float], config: PreprocessConfig
) -> View:
    """Fit the window of the view to the head, with a margin, in whole multiples of pixels."""
    bounds_mm = []
    for axis, step in enumerate(spacing_mm):
        present = np.flatnonzero(head.any(axis=tuple(a for a in range(3) if a != axis)))
        margin = config.margin_mm
        bounds_mm.append((present[0] * step - margin, (present[-1] + 1) * step + margin))
    slices, rows, columns = bounds_mm
    step = view.spacing_mm[0]
    first, last = max(0, int(np.floor(slices[0] / step))), int(np.ceil(slices[1] / step))
    in_plane = []
    for low_mm, high_mm in (rows, columns):
        low = int(np.floor(low_mm / view.pixel_size_mm))
        high = int(np.ceil(high_mm / view.pixel_size_mm))
        extra = -(high - low) % config.multiple_px
        in_plane.append((low - extra // 2, high + extra - extra // 2))
    return replace(
        view,
        slices=(first, min(view.shape[0], last)),
        rows=in_plane[0],
        columns=in_plane[1],
    )
