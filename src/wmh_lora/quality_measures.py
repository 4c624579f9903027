"""What can be measured on a scan itself: noise, sharpness, ghosts, steps between slices, contrast.

Everything is expressed on one scale that all scans share: 0 is fluid and 1 the highest peak, mostly
white matter, of what lies more than 20 mm inside the head. Only the head is looked at, so a scan
gives much the same values with its skull and without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from wmh_lora.preprocess_head import (
    HIGHEST_PEAK,
    coarse_scan,
    find_background,
    find_head,
    landmarks,
)
from wmh_lora.view import choose_view, superior_axis
from wmh_lora.volume import Volume

__all__ = ["ScanMeasures", "measure_scan"]

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

_SLICES = 14  # measured slices; more change the medians by less than scans differ
_CORE_MM = 20.0
_TISSUE_MM = 8.0
_EDGES_MM = 4.0
_AIR_MM = 8.0
_FINE_MM, _BROAD_MM = 1.0, 3.0
_TISSUE_LEVEL = 0.5
_WHITE_MATTER_BAND = 0.3
_SMALLEST_MM2 = 1500.0
_SMALLEST_AIR = 500
# Second differences along rows and columns; its response to noise of deviation s is 6 s.
_NOISE_KERNEL = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=np.float32)


@dataclass(frozen=True)
class ScanMeasures:
    """Measures of one scan; intensities in units of white matter above fluid.

    Attributes
    ----------
    noise : float or None
        Standard deviation of the noise in white matter (Immerkaer, CVIU 64:300, 1996).
    sharpness : float or None
        Gradients after smoothing by 1 mm over those after 3 mm, root mean square, within slices:
        about 1 for a picture that holds nothing finer than 3 mm.
    ghosting : float or None
        Signal of the air before and behind the head (in coronal and sagittal slices, above and
        below it) less that on both sides, per white matter's: ghosts lie along the phase-encoding
        direction. None where the air was set to one value.
    slice_step : float or None
        Root mean square deviation of a slice's median from the mean of its neighbours'.
    tissue_p25, tissue_p99 : float
        Percentiles of what is not fluid in the core of the head.
    core_p25, core_p95 : float
        Percentiles of the whole core.
    brightest : float
        99.9th percentile of the head.
    air_depth : float
        How far the outside lies below fluid.
    missing_share : float
        Share of voxels inside the head that hold no finite number.
    head_ml : float
        Volume of the head, or of what is left of it.
    fluid, white_matter, air : float
        The landmarks and the level outside the head, in the scan's own units.
    """

    noise: float | None
    sharpness: float | None
    ghosting: float | None
    slice_step: float | None
    tissue_p25: float
    tissue_p99: float
    core_p25: float
    core_p95: float
    brightest: float
    air_depth: float
    missing_share: float
    head_ml: float
    fluid: float
    white_matter: float
    air: float


@dataclass(frozen=True, eq=False)
class _Head:
    """A scan as slices, its head on the coarse grid, and the way from one to the other."""

    scan: FloatArray
    background: BoolArray
    spacing_mm: tuple[float, float, float]
    inside: BoolArray  # coarse
    depth_mm: NDArray[np.float64]  # coarse
    nearest: tuple[NDArray[np.int64], ...]  # coarse index of each slice, row and column
    floor: float
    gain: float

    def plane(self, index: int) -> FloatArray:
        """One slice on the common scale; what was not measured counts as fluid."""
        plane = np.where(self.background[index], self.floor, self.scan[index])
        return np.asarray(np.clip((plane - self.floor) * self.gain, -1.0, 4.0), dtype=np.float32)

    def on_plane(self, coarse: NDArray[Any], index: int) -> NDArray[Any]:
        """Show a coarse map on one slice of the scan."""
        slices, rows, columns = self.nearest
        return np.asarray(coarse[slices[index]][np.ix_(rows, columns)])


def measure_scan(volume: Volume) -> ScanMeasures:
    """Measure a scan.

    Parameters
    ----------
    volume : Volume
        Any orientation and spacing.

    Returns
    -------
    ScanMeasures

    Raises
    ------
    DataError
        If the scan shows no head, as in `wmh_lora.preprocess.preprocess`.
    """
    view = choose_view(volume, 1.0)
    scan = np.asarray(view.to_view(volume.data), dtype=np.float32)
    background = find_background(scan)
    coarse, spacing = coarse_scan(scan, background, view.spacing_mm, volume.path)
    inside = find_head(coarse, spacing, clean_first=HIGHEST_PEAK.clean_first)
    superior = next(i for i, axis in enumerate(view.axes) if axis == superior_axis(volume))
    floor, white_matter = landmarks(coarse, inside, spacing, superior, volume, HIGHEST_PEAK)
    # the edge of the image counts as outside: a cut head has no depth there
    depth = ndimage.distance_transform_edt(np.pad(inside, 1), sampling=spacing)[1:-1, 1:-1, 1:-1]
    nearest = tuple(
        np.minimum(np.arange(fine) * view.spacing_mm[axis] / spacing[axis], count - 1).astype(int)
        for axis, (fine, count) in enumerate(zip(scan.shape, coarse.shape))
    )
    gain = 1.0 / (white_matter - floor)
    head = _Head(scan, background, view.spacing_mm, inside, depth, nearest, floor, gain)

    scaled = (coarse - floor) * gain
    core = scaled[depth > _CORE_MM]
    if core.size == 0:
        core = scaled[inside]
    tissue = core[core > _TISSUE_LEVEL]
    tissue = tissue if tissue.size else core
    air = float(np.percentile(coarse[~inside], 10)) if not inside.all() else floor
    noise, sharpness, ghosting = _measure_slices(head)
    voxels = float(np.prod(np.divide(spacing, view.spacing_mm)))  # of the scan in a coarse one
    return ScanMeasures(
        noise=noise,
        sharpness=sharpness,
        ghosting=ghosting,
        slice_step=_slice_step(head),
        tissue_p25=float(np.percentile(tissue, 25)),
        tissue_p99=float(np.percentile(tissue, 99)),
        core_p25=float(np.percentile(core, 25)),
        core_p95=float(np.percentile(core, 95)),
        brightest=float(np.percentile(scaled[inside], 99.9)),
        air_depth=(floor - air) * gain,
        missing_share=_missing_share(head),
        head_ml=int(inside.sum()) * voxels * volume.voxel_volume_ml,
        fluid=floor,
        white_matter=white_matter,
        air=air,
    )


def _measure_slices(head: _Head) -> tuple[float | None, float | None, float | None]:
    """Noise, sharpness and ghosting: medians over slices spread through the core of the head."""
    deep = np.flatnonzero((head.depth_mm > _CORE_MM).any(axis=(1, 2)))
    usable = np.flatnonzero(np.isin(head.nearest[0], deep))
    if usable.size == 0:
        return None, None, None
    chosen = usable[np.unique(np.linspace(0, usable.size - 1, _SLICES).round().astype(int))]
    noise, sharpness, ghosting = [], [], []
    for index in chosen.tolist():
        plane, depth = head.plane(index), head.on_plane(head.depth_mm, index)
        noise.append(_noise(plane, depth, head.spacing_mm))
        sharpness.append(_sharpness(plane, depth, head.spacing_mm))
        ghosting.append(_ghosting(head, index))
    return _median(noise), _median(sharpness), _median(ghosting)


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def _noise(
    plane: FloatArray, depth: NDArray[Any], spacing_mm: tuple[float, float, float]
) -> float | None:
    size = [max(3, round(5.0 / step)) for step in spacing_mm[1:]]
    smooth = ndimage.uniform_filter(plane, size)
    white_matter = (depth > _TISSUE_MM) & (np.abs(smooth - 1.0) < _WHITE_MATTER_BAND)
    if int(white_matter.sum()) * spacing_mm[1] * spacing_mm[2] < _SMALLEST_MM2:
        return None
    second = np.abs(ndimage.convolve(plane, _NOISE_KERNEL))
    return float(np.sqrt(np.pi / 2.0) / 6.0 * second[white_matter].mean())


def _sharpness(
    plane: FloatArray, depth: NDArray[Any], spacing_mm: tuple[float, float, float]
) -> float | None:
    brain = depth > _EDGES_MM
    if int(brain.sum()) * spacing_mm[1] * spacing_mm[2] < _SMALLEST_MM2:
        return None
    energies = []
    for sigma_mm in (_FINE_MM, _BROAD_MM):
        sigma = [sigma_mm / step for step in spacing_mm[1:]]
        rows = ndimage.gaussian_filter(plane, sigma, order=(1, 0)) / spacing_mm[1]
        columns = ndimage.gaussian_filter(plane, sigma, order=(0, 1)) / spacing_mm[2]
        energies.append(float(np.mean(rows[brain] ** 2 + columns[brain] ** 2)))
    fine, broad = energies
    return float(np.sqrt(fine / broad)) if broad > 0 else None


def _ghosting(head: _Head, index: int) -> float | None:
    inside = head.on_plane(head.inside, index)
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    if rows.size == 0:
        return None
    margins = [int(_AIR_MM / step) + 1 for step in head.spacing_mm[1:]]
    along, across = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    ends = [
        (slice(0, max(0, rows[0] - margins[0])), across),
        (slice(rows[-1] + 1 + margins[0], None), across),
    ]
    sides = [
        (along, slice(0, max(0, columns[0] - margins[1]))),
        (along, slice(columns[-1] + 1 + margins[1], None)),
    ]
    strips = []
    for pair in (ends, sides):
        values = np.concatenate([head.scan[index][part].ravel() for part in pair])
        blank = np.concatenate([head.background[index][part].ravel() for part in pair])
        if values.size < _SMALLEST_AIR or blank.all():
            return None
        strips.append(float(np.mean(np.abs(np.where(np.isfinite(values), values, 0.0)))))
    white_matter = head.floor + 1.0 / head.gain
    return (strips[0] - strips[1]) / abs(white_matter) if white_matter else None


def _slice_step(head: _Head) -> float | None:
    medians = np.full(len(head.scan), np.nan)
    area_mm2 = head.spacing_mm[1] * head.spacing_mm[2]
    for index in range(len(head.scan)):
        deep = head.on_plane(head.depth_mm, index) > 10.0
        values = (head.scan[index][deep & ~head.background[index]] - head.floor) * head.gain
        values = values[np.abs(values - 1.0) < _TISSUE_LEVEL]
        if values.size * area_mm2 > _SMALLEST_MM2:
            medians[index] = np.median(values)
    steps = medians[1:-1] - 0.5 * (medians[:-2] + medians[2:])
    steps = steps[np.isfinite(steps)]
    return float(np.sqrt(np.mean(steps**2))) if steps.size > 3 else None


def _missing_share(head: _Head) -> float:
    missing = ~np.isfinite(head.scan)
    if not missing.any():
        return 0.0
    inside = total = 0
    for index in range(len(head.scan)):
        # not the outermost layer: the coarse head reaches beyond the real one by up to a step
        here = head.on_plane(head.depth_mm, index) > _EDGES_MM
        total += int(here.sum())
        inside += int((here & missing[index]).sum())
    return inside / max(1, total)
