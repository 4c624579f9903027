"""Smooth random fields: the raw material of deformation, bias, texture and lesion shape."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

FloatArray = npt.NDArray[np.float32]


def interpolation_matrix(nodes: int, size: int) -> FloatArray:
    """Return the (size, nodes) matrix of linear interpolation between evenly spread nodes."""
    position = np.linspace(0.0, nodes - 1.0, size)
    return np.maximum(0.0, 1.0 - np.abs(position[:, None] - np.arange(nodes))).astype(np.float32)


def smooth_field(
    rng: np.random.Generator, shape: tuple[int, int, int], scale_voxels: float
) -> FloatArray:
    """Draw a field that varies over about ``scale_voxels``.

    Parameters
    ----------
    rng
        Source of randomness.
    shape
        (X, Y, Z) of the result.
    scale_voxels
        Distance between independent nodes; values between are interpolated linearly.

    Returns
    -------
    array (X, Y, Z) float32
        About standard normal at the nodes.
    """
    nodes = [max(2, round(n / scale_voxels) + 1) for n in shape]
    field = rng.standard_normal(nodes, dtype=np.float32)
    return upsample(field, shape)


def upsample(field: FloatArray, shape: tuple[int, int, int]) -> FloatArray:
    """Interpolate a coarse field (x, y, z) to ``shape``, corners on corners."""
    for axis in (2, 1, 0):  # the largest product last
        matrix = interpolation_matrix(field.shape[axis], shape[axis])
        field = np.moveaxis(np.tensordot(matrix, field, axes=(1, axis)), 0, axis)
    return np.ascontiguousarray(field, dtype=np.float32)


def fill_between(field: FloatArray, shape: tuple[int, int, int]) -> FloatArray:
    """Interpolate ``array[::2, ::2, ::2]`` back to the array's ``shape``, each voxel in its place.

    An even axis ends half a step behind its last known voxel, whose value is repeated there.
    """
    x, y, z = (2 * n - 1 for n in field.shape)
    ends = [(0, whole - known) for whole, known in zip(shape, (x, y, z))]
    return np.pad(upsample(field, (x, y, z)), ends, mode="edge")


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw one number."""
    return float(rng.uniform(low, high))


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw one number, evenly in the logarithm."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def tissue_variation(rng: np.random.Generator, shape: tuple[int, int, int]) -> FloatArray:
    """Draw factors about 1 by which a tissue differs from place to place: slowly, and as texture.

    Parameters
    ----------
    rng
        Source of randomness.
    shape
        (X, Y, Z), 1 mm voxels.
    """
    regional = 1.0 + uniform(rng, 0.01, 0.05) * smooth_field(rng, shape, uniform(rng, 15.0, 40.0))
    texture = ndimage.gaussian_filter(
        rng.standard_normal(shape, dtype=np.float32), uniform(rng, 0.7, 1.8)
    )
    texture *= uniform(rng, 0.01, 0.05) / texture.std()
    return np.asarray(regional + texture, dtype=np.float32)
