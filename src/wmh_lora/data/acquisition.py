"""What a scanner and its software do to a painted head: slices, coils, motion, noise, export."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wmh_lora.data.fields import FloatArray, log_uniform, smooth_field, uniform


@dataclass(frozen=True)
class Acquired:
    """An acquired image with masks averaged over the same slices.

    Attributes
    ----------
    image
        (I, J, K) float32.
    masks
        (n, I, J, K) float32 in [0, 1]: the fraction of each voxel that each structure fills.
    affine
        (4, 4) voxel to RAS millimetres.
    """

    image: FloatArray
    masks: FloatArray
    affine: npt.NDArray[np.float64]


def acquire(
    rng: np.random.Generator, painted: FloatArray, masks: FloatArray, keep: FloatArray | None
) -> Acquired:
    """Turn a painted 1 mm head into a scan.

    Parameters
    ----------
    rng
        Source of randomness.
    painted
        (X, Y, Z) intensities, white matter about 1, on a 1 mm RAS grid.
    masks
        (n, X, Y, Z) structures to carry along; there may be none.
    keep
        (X, Y, Z) what brain extraction leaves (0 or 1), or None for the whole head.

    Returns
    -------
    Acquired
        Axial most often, 1 mm in plane, slices 1 to 8 mm apart.
    """
    blurred = ndimage.gaussian_filter(painted, _blur(rng))
    axis, step_mm = _slice_plan(rng)
    count = painted.shape[axis]
    weights, first_mm = _slice_profile(rng, count, step_mm)
    image = _average(weights, blurred, axis)
    averaged = np.stack([_average(weights, m, axis) for m in masks]) if len(masks) else masks
    kept = None if keep is None else _average(weights, keep, axis) > 0.5
    image = _scanner(rng, image, axis)
    if step_mm > 1.5 and rng.random() < 0.15:
        finer = np.arange(0.0, len(weights) - 1.0 + 1e-6, uniform(rng, 1.0, step_mm) / step_mm)
        image = _interpolate(image, finer, axis)
        averaged = _interpolate(averaged, finer, axis + 1) if len(averaged) else averaged
        kept = None if kept is None else _interpolate(kept.astype(np.float32), finer, axis) > 0.5
        step_mm *= float(finer[1])
    image = _export(rng, image, kept)
    affine = np.eye(4)
    affine[axis, axis] = step_mm
    affine[axis, 3] = first_mm - 0.5  # the first voxel's centre is at 0, its edge at -0.5
    return Acquired(image, averaged, affine)


def _blur(rng: np.random.Generator) -> tuple[float, float, float]:
    """Draw the point spread (standard deviation in mm) along each axis."""
    base = uniform(rng, 0.3, 0.8)
    return base, base * uniform(rng, 0.8, 1.3), base * uniform(rng, 0.8, 1.3)


def _slice_plan(rng: np.random.Generator) -> tuple[int, float]:
    """Choose the slice axis and the distance between slices in mm."""
    if rng.random() < 0.35:
        return 2, 1.0
    step_mm = log_uniform(rng, 1.5, 8.0)
    axis = int(rng.choice(3, p=[0.06, 0.06, 0.88])) if step_mm > 2.0 else 2
    return axis, step_mm


def _slice_profile(
    rng: np.random.Generator, count: int, step_mm: float
) -> tuple[FloatArray, float]:
    """Return (slices, count) weights, and where the first slice's centre lies from the edge.

    A slice is a box, with a gap to the next or none.
    """
    thickness = max(1.0, step_mm * uniform(rng, 0.75, 1.0))
    first = uniform(rng, 0.0, step_mm) if step_mm > 1.0 else 0.5
    centres = np.arange(first, count, step_mm)
    low = np.maximum(centres - thickness / 2, 0.0)[:, None]
    high = np.minimum(centres + thickness / 2, count)[:, None]
    edges = np.arange(count + 1)
    overlap = np.minimum(high, edges[1:]) - np.maximum(low, edges[:-1])
    weights = np.maximum(overlap, 0.0)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float32), first


def _average(weights: FloatArray, array: FloatArray, axis: int) -> FloatArray:
    if len(weights) == weights.shape[1]:
        return array
    return np.moveaxis(np.tensordot(weights, array, axes=(1, axis)), 0, axis)


def _interpolate(array: FloatArray, positions: npt.NDArray[np.float64], axis: int) -> FloatArray:
    """Resample along one axis, linearly: what a user's software did to thick slices."""
    low = np.minimum(positions.astype(int), array.shape[axis] - 2)
    shape = [1] * array.ndim
    shape[axis] = len(positions)
    share = (positions - low).astype(np.float32).reshape(shape)
    return np.asarray(
        np.take(array, low, axis) * (1.0 - share) + np.take(array, low + 1, axis) * share
    )


def _scanner(rng: np.random.Generator, image: FloatArray, axis: int) -> FloatArray:
    """Add edge enhancement, coil sensitivity, slice drift, ghosts and Rician noise."""
    shape = (image.shape[0], image.shape[1], image.shape[2])
    if rng.random() < 0.3:
        sigma = [0.0 if a == axis else 1.0 for a in range(3)]
        image = image + uniform(rng, 0.2, 1.0) * (image - ndimage.gaussian_filter(image, sigma))
    coil = uniform(rng, 0.0, 0.25) * smooth_field(rng, shape, 70.0)
    if rng.random() < 0.3:
        coil += uniform(rng, 0.0, 0.08) * smooth_field(rng, shape, 30.0)
    image = image * np.exp(coil)
    if rng.random() < 0.3:
        drift = 1.0 + uniform(rng, 0.01, 0.08) * rng.standard_normal(shape[axis])
        image = image * np.expand_dims(drift, tuple(a for a in range(3) if a != axis))
    if rng.random() < 0.2:
        along = (axis + int(rng.integers(1, 3))) % 3
        shift = int(uniform(rng, 0.1, 0.5) * shape[along])
        ghost = np.roll(image, shift, along) + np.roll(image, -shift, along)
        image = image + uniform(rng, 0.01, 0.06) * ghost
    level = log_uniform(rng, 0.008, 0.09)
    smoothing = uniform(rng, 0.0, 0.7)
    sigma = [0.0 if a == axis else smoothing for a in range(3)]
    noise = [
        _unit(ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma))
        for _ in range(2)
    ]
    return np.asarray(np.hypot(image + level * noise[0], level * noise[1]), dtype=np.float32)


def _unit(noise: FloatArray) -> FloatArray:
    return np.asarray(noise / noise.std(), dtype=np.float32)


def _export(
    rng: np.random.Generator, image: FloatArray, kept: npt.NDArray[np.bool_] | None
) -> FloatArray:
    """Apply brain extraction, clipping, a monotone curve, units and rounding."""
    inside = image > 0.3 if kept is None else kept
    measured = image[inside] if inside.any() else image.ravel()
    top = float(np.percentile(measured, 99.95))
    if rng.random() < 0.35:  # winsorised: bright lesions and scalp saturate
        top = float(np.percentile(measured, uniform(rng, 98.0, 99.9)))
    bottom = 0.0
    if rng.random() < 0.25:
        bottom = float(np.percentile(measured, uniform(rng, 0.1, 2.0)))
    unit = np.clip((image - bottom) / max(top - bottom, 1e-3), 0.0, 1.0)
    unit = unit ** np.exp(rng.normal(0.0, 0.18))
    if kept is not None:
        unit = np.where(kept, unit, 0.0)
    if rng.random() < 0.5:
        levels = int(log_uniform(rng, 200, 4000))
        unit = np.round(unit * levels) / levels
    return np.asarray(unit * log_uniform(rng, 50.0, 5000.0), dtype=np.float32)
