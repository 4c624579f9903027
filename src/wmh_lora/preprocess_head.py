"""Where the head is in a scan, and the two intensities that its scale is fixed by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wmh_lora.components import largest_component
from wmh_lora.errors import DataError
from wmh_lora.view import View
from wmh_lora.volume import Volume

__all__ = [
    "HEAD_RULES",
    "HIGHEST_PEAK",
    "HeadRule",
    "coarse_scan",
    "coarse_steps",
    "fill_head",
    "find_background",
    "find_head",
    "landmarks",
    "shows_head",
    "smooth_histogram",
]

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

_DISC = ndimage.generate_binary_structure(2, 1)[None]
_COARSE_MM = 3.0
_BEND_SHARE = 0.3  # of the strongest bend of a histogram, for a darker one to be a shoulder
_PEAK_BINS = 3.0
_BEND_BINS = 6.0  # a second derivative is noisier than the counts
_CORE_HEIGHT_MM = 110.0
_CORE_MINIMUM_ML = 20.0
_FLOOR_PERCENTILE = 1.0
_LEAST_CONTRAST = 1e-4  # of the values themselves; float32 tells 256 levels apart in a third of it


@dataclass(frozen=True)
class HeadRule:
    """How a head is found, and which mode of the histogram deep inside it is white matter.

    Attributes
    ----------
    clean_first
        See `find_head`.
    depths_mm
        From the surface of the head; the first below which enough voxels lie is taken.
    share
        Of the highest count, for a darker mode to be taken; 1 takes the highest peak.
    shoulders
        Whether a shoulder of a peak is a mode.
    """

    clean_first: bool
    depths_mm: tuple[float, ...]
    share: float
    shoulders: bool


HEAD_RULES = {
    2: HeadRule(True, (15.0, 10.0, 5.0, 0.0), 0.6, shoulders=False),
    3: HeadRule(False, (10.0, 5.0, 0.0), 0.6, shoulders=True),
}
"""Those of `wmh_lora.config.PREPROCESS_VERSIONS`."""

HIGHEST_PEAK = HeadRule(True, (20.0, 10.0, 5.0, 0.0), 1.0, shoulders=False)
"""Whatever there is most of, for scans that may be no FLAIR."""


def find_background(scan: FloatArray) -> BoolArray:
    """Mark voxels that hold no measurement: not finite, or the constant that fills the border.

    Brain-extracted, defaced and padded scans hold one exact value outside; whatever it is (0,
    -1000, a maximum), it must not be taken for tissue.
    """
    background = ~np.isfinite(scan)
    # views: np.take would copy the whole of a transposed array for one of its planes
    faces = [np.moveaxis(scan, axis, 0)[index].ravel() for axis in range(3) for index in (0, -1)]
    border = np.concatenate(faces)
    border = border[np.isfinite(border)]
    if border.size:
        values, counts = np.unique(border, return_counts=True)
        if counts.max() > 0.5 * border.size:
            background |= scan == values[counts.argmax()]
    if background.all():
        raise DataError("The image holds one value everywhere; it has no tissue to segment.")
    return background


def find_head(
    coarse: FloatArray, spacing_mm: tuple[float, float, float], *, clean_first: bool = False
) -> BoolArray:
    """Find the head (or the extracted brain) on a coarse grid.

    Otsu's threshold (IEEE Trans SMC 9:62, 1979), holes filled slice by slice, cleaned, largest
    component. With ``clean_first`` it is cleaned before holes are filled, which tears thin scalps,
    so that parts of the head are lost. Falls back to everything where the result is implausibly
    small.
    """
    smooth = ndimage.gaussian_filter(coarse, 0.7)
    bright = smooth > _otsu(smooth)
    if clean_first:
        head = fill_head(ndimage.binary_opening(bright, _DISC), 3)
    else:
        head = largest_component(ndimage.binary_opening(fill_head(bright, 3), _DISC))
    if head.sum() * np.prod(spacing_mm) / 1000.0 < _CORE_MINIMUM_ML:
        return np.ones_like(head)
    return np.asarray(head, dtype=np.bool_)


def fill_head(marked: BoolArray, closing: int) -> BoolArray:
    """Close and fill what is dark within the slices of a head, and keep its largest component.

    Parameters
    ----------
    marked : bool array (S, H, W)
        Tissue that is bright.
    closing : int
        Pixels by which borders grow and shrink again.
    """
    # a margin lets closing and filling work on a head that touches the border
    head = np.pad(marked, ((0, 0), (closing, closing), (closing, closing)))
    head = ndimage.binary_closing(head, _DISC, iterations=closing)
    inner = slice(closing, -closing)
    head = np.stack([ndimage.binary_fill_holes(plane) for plane in head])[:, inner, inner]
    return largest_component(head)


def coarse_steps(
    shape: Sequence[int], spacing_mm: tuple[float, float, float]
) -> tuple[list[int], list[int]]:
    """Return along each axis how many voxels lie about 3 mm apart, and which is taken first."""
    steps = [max(1, round(_COARSE_MM / s)) for s in spacing_mm]
    # as much is left over before the first sample as after the last
    starts = [(n - 1) % k // 2 for n, k in zip(shape, steps, strict=True)]
    return steps, starts


def coarse_scan(
    scan: FloatArray,
    background: BoolArray,
    spacing_mm: tuple[float, float, float],
    source: Path | None,
) -> tuple[FloatArray, tuple[float, float, float]]:
    """Take every n-th voxel (about 3 mm apart), background set to the darkest measured level."""
    steps, starts = coarse_steps(scan.shape, spacing_mm)
    sampled = tuple(slice(start, None, k) for start, k in zip(starts, steps, strict=True))
    values, outside = scan[sampled], background[sampled]
    if outside.all():
        name = source or "the image"
        raise DataError(f"{name} holds too few measured voxels to find a head.")
    dark = np.percentile(values[~outside], 0.5)
    spacing = tuple(s * k for s, k in zip(spacing_mm, steps, strict=True))
    return np.where(outside, dark, values).astype(np.float32), (spacing[0], spacing[1], spacing[2])


def landmarks(
    coarse: FloatArray,
    head: BoolArray,
    spacing_mm: tuple[float, float, float],
    superior: int,
    volume: Volume,
    rule: HeadRule,
) -> tuple[float, float]:
    """Return fluid and white matter: two landmarks among the intensities inside the upper head.

    Depth keeps scalp fat, bone and ragged extraction edges out, so that the same brain gets the
    same landmarks with its skull and without. Fluid is their first percentile. White matter is the
    darkest clear mode of their histogram: around the ventricles, lesions of 80 mL and more can
    outnumber it, but they are brighter. In version 2 a mode is a peak; in version 3 a peak or a
    shoulder, nearer the surface, where lesions are fewer.
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
    for minimum in rule.depths_mm:
        core = coarse[upper & (depth > minimum)]
        if core.size * np.prod(spacing_mm) / 1000.0 > _CORE_MINIMUM_ML:
            break
    if core.size == 0:
        core = coarse[head]
    floor = float(np.percentile(core, _FLOOR_PERCENTILE))
    white_matter = _darkest_mode(core, rule)
    if not white_matter > floor:  # more than half of the core is one dark value
        white_matter = float(core.max())
    if not white_matter > floor:
        source = volume.path or "the image"
        raise DataError(f"{source}: the head shows no contrast; is this a FLAIR image of a brain?")
    return floor, white_matter


def _darkest_mode(values: FloatArray, rule: HeadRule) -> float:
    """Return the darkest peak, or shoulder, of a histogram that reaches a share of the highest."""
    smooth, edges = smooth_histogram(values, _BEND_BINS if rule.shoulders else _PEAK_BINS)
    if smooth.size == 0:
        return float(edges[-1])
    # CSF can be the sharper peak where ventricles are large: look above the darkest quarter only
    start = len(smooth) // 4
    counts = smooth[start:]
    modes = _maxima(smooth)
    if rule.shoulders:
        bend = -np.gradient(np.gradient(smooth))
        modes = _maxima(bend) & (bend >= _BEND_SHARE * bend[start:].max())
    found = np.flatnonzero(modes[start:] & (counts >= rule.share * counts.max()))
    # where all falls from the quarter on, there is none
    mode = start + int(found[0] if found.size else np.argmax(counts))
    return float((edges[mode] + edges[mode + 1]) / 2)


def _maxima(curve: npt.NDArray[np.float64]) -> BoolArray:
    """Mark what is no lower than its neighbours."""
    padded = np.pad(curve, 1, constant_values=-np.inf)
    return np.asarray((curve >= padded[:-2]) & (curve >= padded[2:]), dtype=np.bool_)


def smooth_histogram(
    values: FloatArray, sigma_bins: float = _PEAK_BINS
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return 128 smoothed counts between the percentiles 0.5 and 99.5, and the edges of their bins.

    Where the percentiles are equal there are no counts, and they are the edges.
    """
    low, high = _contrast_range(values)
    if not high > low:
        return np.zeros(0), np.array([low, high])
    counts, edges = np.histogram(values, bins=128, range=(low, high))
    return ndimage.gaussian_filter1d(counts.astype(np.float64), sigma_bins, mode="constant"), edges


def _otsu(values: FloatArray) -> float:
    """Return the level that best separates two classes (largest between-class variance)."""
    low, high = _contrast_range(values)
    if not high > low:
        return low
    counts, edges = np.histogram(values, bins=256, range=(low, high))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts).astype(np.float64)
    above = below[-1] - below
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(edges[1:][np.nanargmax(variance[:-1])]) if np.isfinite(variance).any() else low


def _contrast_range(values: FloatArray) -> tuple[float, float]:
    """Return the percentiles 0.5 and 99.5; the first twice, if float32 tells no levels between."""
    low, high = (float(value) for value in np.percentile(values, [0.5, 99.5]))
    told_apart = high - low > _LEAST_CONTRAST * max(abs(low), abs(high))
    return (low, high) if told_apart else (low, low)


def shows_head(view: View, head: BoolArray, spacing_mm: tuple[float, float, float]) -> BoolArray:
    """Mark the kept slices of a view that show the head, or lie a coarse slice away from it."""
    present = ndimage.binary_dilation(head.any(axis=(1, 2)))
    centres = (np.arange(*view.slices) + 0.5) * view.spacing_mm[0] / spacing_mm[0]
    coarse = np.minimum(centres.astype(np.int64), len(head) - 1)
    return np.asarray(present[coarse], dtype=np.bool_)
