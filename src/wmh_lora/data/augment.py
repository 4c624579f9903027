"""Variation of scans and crops: what the generator does not vary, and all of it for real scans."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wmh_lora.data.fields import FloatArray, log_uniform, smooth_field, uniform
from wmh_lora.preprocess import WHITE_MATTER_LEVEL
from wmh_lora.preprocess_head import find_background

if TYPE_CHECKING:
    from wmh_lora.data.synthesis import Case

_LARGER = (0.85, 1.35)
"""By how much crops are enlarged: the second look at a scan is 1.2 times larger (ADR 9)."""

_SCALED = 0.35
"""Of the synthetic crops, those that are."""

_Scalar = TypeVar("_Scalar", bound=np.generic)


def augment_scan(rng: np.random.Generator, case: Case, *, extracted: bool = False) -> Case:
    """Vary a real scan as a whole: coil sensitivity, noise, curve, clipping.

    If it is to be ``extracted``, its labelled brain alone remains, tight or generous.
    """
    image = case.volume.data
    shape = case.volume.shape
    unit = _from_zero(image)
    coil = uniform(rng, 0.0, 0.25) * smooth_field(rng, shape, 90.0)
    unit = unit * np.exp(coil)
    if rng.random() < 0.5:
        unit = unit + uniform(rng, 0.0, 0.03) * rng.standard_normal(shape, dtype=np.float32)
    if rng.random() < 0.3:
        sigma = [uniform(rng, 0.3, 0.9) if s < 2.0 else 0.0 for s in case.volume.spacing_mm]
        unit = ndimage.gaussian_filter(unit, sigma)
    unit = np.clip(unit, 0.0, uniform(rng, 0.5, 1.0) if rng.random() < 0.3 else None)
    unit = unit ** np.exp(rng.normal(0.0, 0.2))
    if extracted:
        brain = case.masks["brain"] > 0
        in_plane = np.array(case.volume.spacing_mm) < 2.0
        disc = ndimage.generate_binary_structure(3, 1) & ~_off_plane(in_plane)
        if rng.random() < 0.6:
            grow = ndimage.binary_dilation if rng.random() < 0.5 else ndimage.binary_erosion
            brain = grow(brain, disc, iterations=int(rng.integers(1, 3)))
        unit = np.where(brain, unit, 0.0)
    data = (unit * uniform(rng, 100.0, 4000.0)).astype(np.float32)
    return replace(case, volume=replace(case.volume, data=data))


def _from_zero(image: FloatArray) -> FloatArray:
    """Scale a scan so that its darkest tissue lies at 0 or above and its brightest about 1.

    Below zero lies tissue where intensities are z-scores, and ringing of interpolation elsewhere.
    """
    top = float(np.percentile(image, 99.8))
    if image.min() >= 0.0:
        return np.asarray(image / top)
    background = find_background(image)
    bottom = min(0.0, float(np.percentile(image[~background], 0.1)))
    unit = np.clip((image - bottom) / (top - bottom), 0.0, None)
    return np.where(background, np.float32(0.0), unit)


def _off_plane(in_plane: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Mark the neighbours of a 3x3x3 element that lie in another slice."""
    offsets = np.stack(np.meshgrid(*(np.arange(-1, 2),) * 3, indexing="ij"), -1)
    return np.asarray(((offsets != 0) & ~in_plane).any(axis=-1))


def augment_crop(
    rng: np.random.Generator,
    image: FloatArray,
    target: FloatArray,
    centre: npt.NDArray[np.float64],
    size: int,
    *,
    real: bool,
    t1: FloatArray | None = None,
) -> tuple[FloatArray, FloatArray, FloatArray | None]:
    """Cut a square crop, and turn, mirror, blur and re-scale it.

    Parameters
    ----------
    rng
        Source of randomness.
    image, target
        (C, H, W) in [0, 1] and (n, H, W) in [0, 1].
    centre
        Row and column that the crop should hold, at a random place within it.
    size
        Side of the crop in pixels.
    real
        Real scans are also rotated and scaled; synthetic ones come posed, some are scaled.
    t1
        (T, H, W) in [0, 1], which moves with the image; its intensities stay.

    Returns
    -------
    image : array (C, size, size) float32
    target : array (n, size, size) float32
    t1 : array (T, size, size) float32, or None
    """
    centre = place_centre(rng, centre, image.shape[1:], size)
    whole = (*image, *target, *(() if t1 is None else t1))
    matrix = None
    if real:
        angle = np.deg2rad(uniform(rng, -15.0, 15.0))
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix = turn * rng.uniform(0.93, 1.07, 2) / log_uniform(rng, *_LARGER)
    elif rng.random() < _SCALED:
        matrix = np.eye(2) / log_uniform(rng, *_LARGER)
    stack = np.stack(
        [
            cut_square(plane, centre, size)
            if matrix is None
            else _sample(plane, matrix, centre, size)
            for plane in whole
        ]
    )
    if rng.random() < 0.5:
        stack = stack[:, :, ::-1]
    if rng.random() < 0.2:
        stack = np.rot90(stack, int(rng.integers(1, 4)), axes=(1, 2))
        if rng.random() < 0.5:
            stack = stack[:, ::-1]
    picture, labels, second = np.split(stack, np.cumsum([len(image), len(target)]))
    picture, second = _vary(rng, picture, second)
    return (
        np.ascontiguousarray(picture, np.float32),
        np.ascontiguousarray(labels, np.float32),
        None if t1 is None else np.ascontiguousarray(second, np.float32),
    )


def augment_t1(rng: np.random.Generator, planes: FloatArray) -> FloatArray:
    """Vary blur, curve, gain and noise of T1 slices (T, h, w) in [0, 1]."""
    if rng.random() < 0.2:
        sigma = uniform(rng, 0.2, 0.8)
        planes = ndimage.gaussian_filter(planes, (0.0, sigma, sigma))
    # what is left of intensity error after normalisation
    varied = planes ** np.exp(rng.normal(0.0, 0.2)) * np.exp(rng.normal(0.0, 0.1))
    if rng.random() < 0.3:
        noise = rng.standard_normal(planes.shape, dtype=np.float32)
        varied = varied + uniform(rng, 0.0, 0.03) * noise
    return np.asarray(np.clip(varied, 0.0, 1.0), dtype=np.float32)


def place_centre(
    rng: np.random.Generator,
    centre: npt.NDArray[np.float64],
    shape: tuple[int, ...],
    size: int,
) -> npt.NDArray[np.float64]:
    """Move a square's centre about, and back until the square of ``size`` lies on the picture."""
    wander = 0.35 * size
    centre = centre + rng.uniform(-wander, wander, 2)
    half = size / 2
    limits = np.array(shape, dtype=np.float64)
    # small pictures sit in the middle of their crop
    return np.where(
        limits <= size, limits / 2, np.clip(centre, half, np.maximum(limits - half, half))
    )


def _vary(
    rng: np.random.Generator, picture: FloatArray, second: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Blur now and then, take or reverse neighbours, and scale the intensity of (C, h, w).

    The neighbours of the second contrast are treated alike.
    """
    if rng.random() < 0.2:
        sigma = uniform(rng, 0.2, 0.8)
        picture = ndimage.gaussian_filter(picture, (0.0, sigma, sigma))
    if rng.random() < 0.15:  # a scan of few slices has no true neighbours
        picture, second = (
            np.repeat(stack[len(stack) // 2 :][:1], len(stack), axis=0)
            for stack in (picture, second)
        )
    elif rng.random() < 0.3:
        picture, second = picture[::-1], second[::-1]
    # what is left of intensity error after normalisation: gain, and contrast about white matter
    picture = picture * np.exp(rng.normal(0.0, 0.06))
    if rng.random() < 0.5:
        contrast = np.exp(rng.normal(0.0, 0.2))
        picture = WHITE_MATTER_LEVEL * (picture / WHITE_MATTER_LEVEL) ** contrast
    return np.asarray(np.clip(picture, 0.0, 1.0)), second


def cut_square(
    plane: npt.NDArray[_Scalar], centre: npt.NDArray[np.float64], size: int
) -> npt.NDArray[_Scalar]:
    """Cut (size, size) around ``centre`` out of (H, W); zero outside the picture."""
    out = np.zeros((size, size), dtype=plane.dtype)
    start = np.rint(centre - size / 2).astype(int)
    low = np.maximum(start, 0)
    high = np.minimum(start + size, plane.shape)
    into = low - start
    length = high - low
    out[into[0] : into[0] + length[0], into[1] : into[1] + length[1]] = plane[
        low[0] : high[0], low[1] : high[1]
    ]
    return out


def _sample(
    plane: FloatArray,
    matrix: npt.NDArray[np.float64],
    centre: npt.NDArray[np.float64],
    size: int,
) -> FloatArray:
    offset = centre - matrix @ np.array([(size - 1) / 2, (size - 1) / 2])
    return np.asarray(
        ndimage.affine_transform(plane, matrix, offset, (size, size), order=1), dtype=np.float32
    )
