"""What of the network's brain and ventricles is used, and why the rest is not."""

from __future__ import annotations

import numpy as np
import pytest
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff

from wmh_lora.errors import GridMismatchError
from wmh_lora.structures import (
    border_areas_cm2,
    bounding_box,
    check_grid,
    cut_faces,
    find_brain,
    find_ventricles,
    surface,
)

AFFINE = np.diag([2.0, 2.0, 5.0, 1.0])  # 0.02 mL a voxel


def brain_mask() -> np.ndarray:
    """1080 mL with a hole in it, and a stray piece."""
    mask = np.zeros((64, 72, 32), np.uint8)
    mask[7:52, 6:66, 6:26] = 1
    mask[20:24, 20:24, 10:12] = 0
    mask[60:63, 2:5, 2] = 1
    return mask


class TestBrain:
    def test_is_the_largest_component_with_its_holes_filled(self) -> None:
        found = find_brain({"brain": brain_mask()}, AFFINE)
        assert found.volume_ml == pytest.approx(45 * 60 * 20 * 0.02)
        assert found.mask is not None
        assert found.mask[21, 21, 10]
        assert not found.mask[61, 3, 2]
        assert found.reason is None

    @pytest.mark.parametrize(
        ("masks", "scale", "reason"),
        [
            ({}, 1.0, "does not mark the brain"),
            ({"brain": np.zeros((64, 72, 32))}, 1.0, "found no brain"),
            ({"brain": brain_mask()}, 0.8, "553 mL, outside 600 to 2200"),
            ({"brain": brain_mask()}, 1.3, "2373 mL, outside 600 to 2200"),
            ({"brain": np.ones((64, 72, 32))}, 0.9, "fills the whole image"),
        ],
    )
    def test_is_left_out_with_a_reason(self, masks, scale: float, reason: str) -> None:
        found = find_brain(masks, AFFINE * scale)
        assert found.mask is None
        assert found.reason is not None
        assert reason in found.reason


class TestVentricles:
    def test_small_parts_and_parts_outside_the_brain_are_left_out(self) -> None:
        brain = find_brain({"brain": brain_mask()}, AFFINE).mask
        marked = np.zeros_like(brain_mask())
        marked[25:35, 25:45, 14:17] = 1  # 12 mL
        marked[12:14, 12:14, 10] = 1  # 0.08 mL
        marked[56:62, 30:40, 10:14] = 1  # outside the brain
        found = find_ventricles({"ventricles": marked}, AFFINE, brain)
        assert found.volume_ml == pytest.approx(12.0)
        assert found.mask is not None
        assert found.mask.sum() == 600
        everything = find_ventricles({"ventricles": marked}, AFFINE, None)
        assert everything.volume_ml == pytest.approx(12.0 + 240 * 0.02)

    def test_is_left_out_with_a_reason(self) -> None:
        empty = np.zeros((8, 8, 8))
        assert find_ventricles({}, AFFINE, None).reason == "the model does not mark the ventricles"
        none = find_ventricles({"ventricles": empty}, AFFINE, None)
        assert none.reason == "the model found no ventricles"
        stray = empty.copy()
        stray[2:6, 2:6, 2:4] = 1
        small = find_ventricles({"ventricles": stray}, AFFINE, None)
        assert small.mask is None
        assert small.reason is not None
        assert "0.6 mL, outside 2 to 300 mL" in small.reason


class TestFaces:
    def test_areas_follow_the_patient_in_every_orientation(self) -> None:
        mask = np.zeros((10, 12, 14))
        mask[3:5, 4:8, 10:] = 1  # on the superior face of an RAS image: 2 x 4 voxels
        affine = np.diag([1.0, 2.0, 3.0, 1.0])
        for codes in ("RAS", "LPS", "SAR", "PIL"):
            turn = axcodes2ornt(tuple(codes))
            stored = apply_orientation(mask, _from_ras(turn))
            areas = border_areas_cm2(stored, affine @ inv_ornt_aff(_from_ras(turn), mask.shape))
            assert areas["superior"] == pytest.approx(8 * 2.0 / 100)
            assert sum(areas.values()) == pytest.approx(areas["superior"])

    def test_cut_faces_are_those_beyond_the_limit(self) -> None:
        mask = brain_mask()
        assert cut_faces(mask, AFFINE) == {}
        assert set(cut_faces(mask[:, :, 8:], AFFINE)) == {"inferior"}
        assert cut_faces(mask[:, :, 8:], AFFINE)["inferior"] == pytest.approx(45 * 60 * 0.04 - 0.0)
        assert set(cut_faces(mask[10:], AFFINE)) == {"left"}


def _from_ras(ornt: np.ndarray) -> np.ndarray:
    """Return the orientation that brings an RAS array to the given codes."""
    result = np.empty_like(ornt)
    for stored, (axis, flip) in enumerate(ornt):
        result[int(axis)] = (stored, flip)
    return result


def test_bounding_box() -> None:
    mask = np.zeros((5, 6, 7))
    assert bounding_box(mask) is None
    mask[1, 2, 3] = mask[4, 2, 5] = 1
    assert bounding_box(mask) == (slice(1, 5), slice(2, 3), slice(3, 6))


def test_surface_is_what_an_erosion_removes(rng: np.random.Generator) -> None:
    from scipy import ndimage

    mask = ndimage.gaussian_filter(rng.random((20, 21, 22)), 2) > 0.5
    expected = mask & ~ndimage.binary_erosion(mask, border_value=1)
    assert 0 < expected.sum() < mask.sum()
    np.testing.assert_array_equal(surface(mask), expected)


def test_another_grid_is_refused() -> None:
    with pytest.raises(GridMismatchError, match=r"ventricles map has shape \(2, 2, 2\)"):
        check_grid((3, 3, 3), {"ventricles": np.zeros((2, 2, 2))})
