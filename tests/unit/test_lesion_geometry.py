"""Distances and diameters of lesions, against the distance transform and known shapes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from wmh_lora.lesion_geometry import (
    axial_diameters_mm,
    distances_mm,
    gaps_mm,
    lesion_voxels,
    surface_distances_mm,
)

SPACING = (0.7, 1.1, 5.0)
AFFINE = np.diag([-SPACING[0], SPACING[1], SPACING[2], 1.0])


@pytest.fixture
def masks(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Lesions and a structure that overlaps some of them."""
    lesions = ndimage.gaussian_filter(rng.random((40, 36, 12)), (2, 2, 0.6)) > 0.55
    structure = np.zeros(lesions.shape, bool)
    structure[14:24, 10:22, 4:8] = True
    return lesions, structure


def test_distances_are_those_of_the_distance_transform(masks) -> None:
    lesions, structure = masks
    voxels = lesion_voxels(lesions, AFFINE)
    expected = ndimage.distance_transform_edt(~structure, sampling=SPACING)
    found = distances_mm(voxels, structure)
    np.testing.assert_allclose(found, expected[tuple(voxels.indices)], atol=6e-5)
    assert (expected[tuple(voxels.indices)] == 0).any()


def test_surface_distances_are_those_of_the_distance_transform(masks) -> None:
    lesions, structure = masks
    voxels = lesion_voxels(lesions, AFFINE)
    edge = structure & ~ndimage.binary_erosion(structure)
    expected = ndimage.distance_transform_edt(~edge, sampling=SPACING)
    expected[~structure] = 0.0
    found = surface_distances_mm(voxels, structure, 100.0)
    np.testing.assert_allclose(found, expected[tuple(voxels.indices)])
    near = surface_distances_mm(voxels, structure, 1.0)
    assert np.isinf(near[found > 1.0]).all()


def test_gaps_are_distances_between_boxes(masks) -> None:
    """Brute force over the corners' distances: no gap to the 26 neighbours."""
    lesions, structure = masks
    voxels = lesion_voxels(lesions, AFFINE)
    inside = np.argwhere(structure)
    apart = np.abs(voxels.indices.T[:, None] - inside[None])
    empty = np.maximum(apart - 1, 0) * SPACING
    expected = np.sqrt((empty**2).sum(axis=2)).min(axis=1)
    np.testing.assert_allclose(gaps_mm(voxels, structure), expected, atol=6e-5)


def test_voxels_of_a_lesion_lie_together_in_the_order_of_the_table(masks) -> None:
    voxels = lesion_voxels(masks[0], AFFINE)
    assert len(voxels.lesions) > 3
    sizes = voxels.reduce(np.add, np.ones(len(voxels.owner)))
    assert sizes.tolist() == [lesion.voxels for lesion in voxels.lesions]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((slice(3, 4), slice(3, 4), slice(1, 9)), (1.1, 1.31)),  # a column of single voxels
        ((slice(3, 13), slice(3, 4), slice(2, 3)), (7.0, 7.2)),
        ((slice(3, 13), slice(3, 13), slice(2, 3)), (13.04 * 0.97, 13.04)),  # its diagonal
    ],
)
def test_diameters_are_measured_within_a_slice(box, expected: tuple[float, float]) -> None:
    mask = np.zeros((30, 30, 10))
    mask[box] = 1
    (diameter,) = axial_diameters_mm(lesion_voxels(mask, AFFINE))
    assert expected[0] - 1e-6 <= diameter <= expected[1] + 1e-6


def test_no_lesions() -> None:
    voxels = lesion_voxels(np.zeros((5, 5, 5)), np.eye(4))
    target = np.zeros((5, 5, 5), bool)
    target[2, 2, 2] = True
    for found in (distances_mm(voxels, target), gaps_mm(voxels, target)):
        assert found.size == 0
    assert axial_diameters_mm(voxels).size == 0
    assert voxels.reduce(np.add, np.empty(0)).size == 0
