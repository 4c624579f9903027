"""One head at several visits: known movement, known lesions, any grid."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from scipy.spatial.transform import Rotation

from wmh_lora.longitudinal.study import Visit
from wmh_lora.volume import Volume

Point = tuple[float, float, float]
Lesions = Mapping[Point, float]  # centre in mm -> radius in mm

FIRST: dict[Point, float] = {
    (25.0, 20.0, 10.0): 8.0,  # stable
    (-25.0, 20.0, 10.0): 6.0,  # grows
    (25.0, -30.0, 10.0): 10.0,  # shrinks
    (-25.0, -30.0, 10.0): 6.0,  # vanishes
}
SECOND: dict[Point, float] = {
    (25.0, 20.0, 10.0): 8.0,
    (-25.0, 20.0, 10.0): 10.0,
    (25.0, -30.0, 10.0): 6.0,
    (0.0, 50.0, 15.0): 6.0,  # new
}
LEVELS = np.array([5.0, 150.0, 120.0, 100.0, 15.0, 240.0])


def movement(angles_deg: Point = (0.0, 0.0, 0.0), shift_mm: Point = (0.0, 0.0, 0.0)):
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", angles_deg, degrees=True).as_matrix()
    matrix[:3, 3] = shift_mm
    return matrix


MOVED = movement((3.0, -4.0, 3.0), (5.0, -4.0, 3.0))


def visit(
    name: str,
    lesions: Lesions,
    moved: npt.NDArray[np.float64] | None = None,
    *,
    shape: tuple[int, int, int] = (64, 76, 56),
    spacing_mm: Point = (2.6, 2.6, 2.6),
    axes: tuple[int, int, int] = (0, 1, 2),
    flips: Point = (1.0, 1.0, 1.0),
    seed: int = 1,
) -> Visit:
    """Paint the head where it lies, on a grid whose axes run along ``axes`` of the world."""
    affine = np.zeros((4, 4))
    for column, (world, sign, step) in enumerate(zip(axes, flips, spacing_mm)):
        affine[world, column] = sign * step
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    affine[3, 3] = 1.0
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")).astype(float)
    x, y, z = np.tensordot(affine[:3, :3], grid, 1) + affine[:3, 3, None, None, None]
    labels = np.zeros(shape, np.int64)
    radius = np.sqrt((x / 74) ** 2 + (y / 90) ** 2 + (z / 66) ** 2)
    labels[radius < 1.0] = 1
    labels[radius < 0.9] = 2
    draw = np.random.default_rng(5)
    for label in (3, 4) * 12:  # folds, in place of a cortex
        centre, length = draw.uniform(-50, 50, 3), draw.uniform(8, 22, 3)
        offsets = ((p - c) / r for p, c, r in zip((x, y, z), centre, length))
        labels[(sum(offset**2 for offset in offsets) < 1) & (labels > 1)] = label
    mask = np.zeros(shape, np.uint8)
    for (a, b, c), r in lesions.items():
        mask[(x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2 < r**2] = 1
    labels[mask > 0] = 5
    noise = np.random.default_rng(seed).normal(0.0, 3.0, shape)
    data = (LEVELS[labels] + noise).astype(np.float32)
    place = np.eye(4) if moved is None else moved
    return Visit(name, Volume(data, place @ affine), mask)


def coarse_visit(
    name: str, lesions: Lesions, moved: npt.NDArray[np.float64] | None = None, *, seed: int = 1
) -> Visit:
    return visit(name, lesions, moved, shape=(42, 50, 36), spacing_mm=(4.0, 4.0, 4.0), seed=seed)


def kinds_at(result, lesions: Lesions, interval: int = 0) -> list[str]:
    """What became of the lesions around given points of the first visit's space."""
    found = []
    for point in lesions:
        world = np.linalg.inv(result.alignment.to_visit[0]) @ [*point, 1.0]
        i, j, k = np.rint(np.linalg.inv(result.alignment.affine) @ world)[:3].astype(int)
        number = int(result.labels[i, j, k])
        assert number > 0, f"no lesion at {point}"
        found.append(result.lesions[number - 1].changes[interval].kind)
    return found
