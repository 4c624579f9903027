"""From a scan to what the network sees, and exactly back.

One path serves training, tuning, evaluation and inference:

1. *View*: the voxel array is flipped and permuted into a canonical stack of slices, axial unless
   the scan is clearly thicker along another axis.
2. *Head*: foreground found on a coarse grid gives a bounding box; nothing outside is computed.
3. *Intensity*: an affine map fixed by two landmarks deep inside the head (the dark end, which is
   cerebrospinal fluid, and the mode, which is white matter), so neither the value outside the head
   nor the scanner's offset and gain matter.
4. *Pixels*: each slice is resampled to a physical pixel size by two small matrices, one per axis.

:func:`restore` applies the inverse of 4, 2 and 1 to a probability map. Geometry is separable and
aligned on the field of view, so a scan that already has the model's pixel size is not interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wmh_lora.config import PreprocessConfig
from wmh_lora.errors import DataError, GridMismatchError
from wmh_lora.view import View, choose_view, resampling_matrix, superior_axis
from wmh_lora.volume import Volume

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

PREPROCESS_VERSION = 1
"""Raised whenever the network's input changes for the same scan; stored in every model file."""

WHITE_MATTER_LEVEL = 0.4
"""Where the white matter mode lands in [0, 1]: lesions up to 2.5 times as bright stay unclipped."""

_COARSE_MM = 3.0
_CORE_DEPTHS_MM = (20.0, 10.0, 5.0, 0.0)
_CORE_HEIGHT_MM = 110.0
_CORE_MINIMUM_ML = 20.0
_FLOOR_PERCENTILE = 1.0


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
    """

    slices: FloatArray
    context_offset: int
    view: View
    floor: float
    white_matter: float
    config: PreprocessConfig


def preprocess(volume: Volume, config: PreprocessConfig) -> Prepared:
    """Bring a scan to the network's grid and intensity scale.

    Parameters
    ----------
    volume
        Any orientation and voxel size; NaN and infinities count as background.
    config
        Pixel size, context distance and margins, in mm.

    Returns
    -------
    Prepared
        Slices (S, H, W) in [0, 1] with H and W multiples of ``config.multiple_px``.

    Raises
    ------
    DataError
        If no tissue can be told from background.
    """
    view = choose_view(volume, config.pixel_size_mm)
    scan = np.asarray(view.to_view(volume.data), dtype=np.float32)
    background = find_background(scan)
    coarse, coarse_spacing = _coarse(scan, background, view.spacing_mm)
    head = find_head(coarse, coarse_spacing)
    superior = next(i for i, axis in enumerate(view.axes) if axis == superior_axis(volume))
    floor, white_matter = _landmarks(coarse, head, coarse_spacing, superior, volume)
    view = _crop(view, head, coarse_spacing, config)

    gain = WHITE_MATTER_LEVEL / (white_matter - floor)
    first, last = view.slices
    rows, columns = (resampling_matrix(view.field(a), view.window(a)) for a in (1, 2))
    slices = np.empty((last - first, len(rows), len(columns)), np.float32)
    for out, index in zip(slices, range(first, last), strict=True):
        plane = np.where(background[index], floor, scan[index])
        plane = np.clip((plane - floor) * gain, 0.0, 1.0).astype(np.float32)
        np.matmul(rows @ plane, columns.T, out=out)
    offset = max(1, round(config.context_mm / view.spacing_mm[0]))
    return Prepared(slices, offset, view, floor, white_matter, config)


def context_stack(prepared: Prepared, indices: Sequence[int]) -> FloatArray:
    """Give each slice its neighbours as channels (2.5-D input).

    Parameters
    ----------
    prepared
        A preprocessed scan.
    indices
        Slices to show, length B.

    Returns
    -------
    array (B, 3, H, W)
        The slice ``context_offset`` below, the slice itself, and the one above; the outermost
        slice stands in for neighbours beyond the ends.
    """
    count = len(prepared.slices)
    centre = np.asarray(indices, dtype=np.int64)
    offsets = np.array([-prepared.context_offset, 0, prepared.context_offset])
    stacked: FloatArray = prepared.slices[np.clip(centre[:, None] + offsets, 0, count - 1)]
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
    view = prepared.view
    native = np.zeros(view.shape_native, dtype=np.float32)
    target = view.to_view(native)
    rows, columns = (resampling_matrix(view.window(a), view.field(a)) for a in (1, 2))
    for index, plane in zip(range(*view.slices), probability, strict=True):
        target[index] = rows @ plane @ columns.T
    return native


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
    """
    view = prepared.view
    if mask.shape != view.shape_native:
        raise GridMismatchError(
            f"The mask has shape {mask.shape} but its scan has {view.shape_native}; "
            "resample the mask to the scan's grid first."
        )
    viewed = view.to_view(mask)
    rows, columns = (resampling_matrix(view.field(a), view.window(a)) for a in (1, 2))
    return np.stack([rows @ viewed[i].astype(np.float32) @ columns.T for i in range(*view.slices)])


def find_background(scan: FloatArray) -> BoolArray:
    """Mark voxels that hold no measurement: not finite, or the constant that fills the border.

    Brain-extracted, defaced and padded scans hold one exact value outside; whatever it is (0,
    -1000, a maximum), it must not be taken for tissue.
    """
    background = ~np.isfinite(scan)
    faces = [np.take(scan, index, axis).ravel() for axis in range(3) for index in (0, -1)]
    border = np.concatenate(faces)
    border = border[np.isfinite(border)]
    if border.size:
        values, counts = np.unique(border, return_counts=True)
        if counts.max() > 0.5 * border.size:
            background |= scan == values[counts.argmax()]
    if background.all():
        raise DataError("The image holds one value everywhere; it has no tissue to segment.")
    return background


def find_head(coarse: FloatArray, spacing_mm: tuple[float, float, float]) -> BoolArray:
    """Find the head (or the extracted brain) on a coarse grid.

    Otsu's threshold (IEEE Trans SMC 9:62, 1979), cleaned, holes filled slice by slice, largest
    component. Falls back to everything where the result is implausibly small.
    """
    smooth = ndimage.gaussian_filter(coarse, 0.7)
    head = smooth > _otsu(smooth)
    disc = ndimage.generate_binary_structure(2, 1)[None]
    # a margin lets closing and filling work on a head that touches the border
    head = np.pad(ndimage.binary_opening(head, disc), ((0, 0), (3, 3), (3, 3)))
    head = ndimage.binary_closing(head, disc, iterations=3)
    head = np.stack([ndimage.binary_fill_holes(plane) for plane in head])[:, 3:-3, 3:-3]
    labels, count = ndimage.label(head)
    if count > 1:
        head = labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    if head.sum() * np.prod(spacing_mm) / 1000.0 < _CORE_MINIMUM_ML:
        return np.ones_like(head)
    return np.asarray(head, dtype=np.bool_)


def _coarse(
    scan: FloatArray, background: BoolArray, spacing_mm: tuple[float, float, float]
) -> tuple[FloatArray, tuple[float, float, float]]:
    """Take every n-th voxel (about 3 mm apart), background set to the darkest measured level."""
    steps = [max(1, round(_COARSE_MM / s)) for s in spacing_mm]
    # as much is left over before the first sample as after the last
    starts = [(n - 1) % k // 2 for n, k in zip(scan.shape, steps, strict=True)]
    sampled = tuple(slice(start, None, k) for start, k in zip(starts, steps, strict=True))
    values, outside = scan[sampled], background[sampled]
    if outside.all():
        raise DataError("The image holds too few measured voxels to find a head.")
    dark = np.percentile(values[~outside], 0.5)
    spacing = tuple(s * k for s, k in zip(spacing_mm, steps, strict=True))
    return np.where(outside, dark, values).astype(np.float32), (spacing[0], spacing[1], spacing[2])


def _landmarks(
    coarse: FloatArray,
    head: BoolArray,
    spacing_mm: tuple[float, float, float],
    superior: int,
    volume: Volume,
) -> tuple[float, float]:
    """Return the dark end and the mode of the intensities deep inside the upper head.

    Depth keeps scalp fat, bone and ragged extraction edges out, so that the same brain gets the
    same landmarks with its skull and without.
    """
    present = np.flatnonzero(head.any(axis=tuple(a for a in range(3) if a != superior)))
    height = int(_CORE_HEIGHT_MM / spacing_mm[superior])
    upper = np.zeros_like(head)
    along = [slice(None)] * 3
    # slices ascend to the top of the head; rows descend from it
    along[superior] = (
        slice(max(0, present[-1] - height), present[-1] + 1)
        if superior == 0
        else slice(present[0], present[0] + height + 1)
    )
    upper[tuple(along)] = head[tuple(along)]
    depth = ndimage.distance_transform_edt(head, sampling=spacing_mm)
    for minimum in _CORE_DEPTHS_MM:
        core = coarse[upper & (depth > minimum)]
        if core.size * np.prod(spacing_mm) / 1000.0 > _CORE_MINIMUM_ML:
            break
    if core.size == 0:
        core = coarse[head]
    floor = float(np.percentile(core, _FLOOR_PERCENTILE))
    mode = _mode(core)
    if not mode > floor:  # more than half of the core is one dark value
        mode = float(core.max())
    if not mode > floor:
        source = volume.path or "the image"
        raise DataError(f"{source}: the head shows no contrast; is this a FLAIR image of a brain?")
    return floor, mode


def _mode(values: FloatArray) -> float:
    """Return the most frequent level: the peak of a smoothed histogram."""
    low, high = np.percentile(values, [0.5, 99.5])
    if not high > low:
        return float(high)
    counts, edges = np.histogram(values, bins=128, range=(float(low), float(high)))
    smooth = ndimage.gaussian_filter1d(counts.astype(np.float64), 3.0, mode="constant")
    # CSF can be the sharper peak where ventricles are large: look above the darkest quarter only
    start = len(smooth) // 4
    peak = start + int(np.argmax(smooth[start:]))
    return float((edges[peak] + edges[peak + 1]) / 2)


def _otsu(values: FloatArray) -> float:
    """Return the level that best separates two classes (largest between-class variance)."""
    low, high = np.percentile(values, [0.5, 99.5])
    if not high > low:
        return float(low)
    counts, edges = np.histogram(values, bins=256, range=(float(low), float(high)))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts).astype(np.float64)
    above = below[-1] - below
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(edges[1:][np.nanargmax(variance[:-1])])


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
