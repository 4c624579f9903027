"""Threshold, component filter and lesion table."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from nibabel.orientations import apply_orientation, inv_ornt_aff
from numpy.typing import NDArray

from wmh_lora.errors import ConfigError, DataError
from wmh_lora.postprocess import (
    apply_threshold,
    describe_lesions,
    label_lesions,
    lesion_mask,
    remove_faint_components,
    remove_small_components,
)

AFFINE = np.array(
    [[-0.5, 0.0, 0.0, 90.0], [0.0, 2.0, 0.0, -120.0], [0.0, 0.0, 4.0, -60.0], [0, 0, 0, 1.0]]
)


class TestThreshold:
    def test_is_inclusive_in_the_precision_of_the_map(self) -> None:
        probability = np.array([[[0.6, 0.5999, 0.6001, np.nan, 1.0]]], np.float32)
        mask = apply_threshold(probability, 0.6)
        assert mask.dtype == np.uint8
        assert mask.tolist() == [[[1, 0, 1, 0, 1]]]

    @pytest.mark.parametrize("threshold", [0.0, 1.0, -0.1, 1.5, float("nan")])
    def test_out_of_range(self, threshold: float) -> None:
        with pytest.raises(ConfigError, match="between 0 and 1"):
            apply_threshold(np.zeros((2, 2, 2), np.float32), threshold)


class TestSmallComponents:
    def test_keeps_components_of_exactly_the_minimum(self) -> None:
        mask = np.zeros((8, 8, 8), bool)
        mask[0, 0, :2] = True
        mask[4, 4, :3] = True
        filtered = remove_small_components(mask, 3)
        assert filtered.dtype == np.uint8
        assert filtered.sum() == 3
        assert filtered[4, 4, 0] == 1

    def test_corners_connect(self) -> None:
        mask = np.zeros((4, 4, 4), np.uint8)
        mask[0, 0, 0] = mask[1, 1, 1] = mask[2, 2, 2] = 1
        assert remove_small_components(mask, 3).sum() == 3

    @pytest.mark.parametrize("minimum", [0, 1])
    def test_smallest_minima_keep_everything(self, minimum: int) -> None:
        mask = np.zeros((3, 3, 3), np.uint8)
        mask[1, 1, 1] = 5
        assert remove_small_components(mask, minimum).sum() == 1

    def test_empty_and_full(self) -> None:
        assert remove_small_components(np.zeros((3, 3, 3)), 3).sum() == 0
        assert remove_small_components(np.ones((3, 3, 3)), 3).sum() == 27

    def test_does_not_change_its_input(self) -> None:
        mask = np.zeros((3, 3, 3), np.uint8)
        mask[1, 1, 1] = 1
        remove_small_components(mask, 2)
        assert mask.sum() == 1

    def test_negative_minimum(self) -> None:
        with pytest.raises(ConfigError, match="0 voxels or more"):
            remove_small_components(np.zeros((2, 2, 2)), -1)


class TestLesionTable:
    def test_numbers_of_known_lesions(self) -> None:
        mask = np.zeros((10, 10, 10), np.uint8)
        mask[1, 1, 1] = 1
        mask[4:6, 4:7, 4] = 1
        large, small = describe_lesions(mask, AFFINE)
        assert (large.index, large.voxels, small.index, small.voxels) == (1, 6, 2, 1)
        assert large.volume_ml == pytest.approx(6 * 4.0 / 1000.0)
        assert large.centroid_mm == pytest.approx((90 - 0.5 * 4.5, -120 + 2 * 5, -60 + 4 * 4))
        assert large.extent_mm == pytest.approx((1.0, 6.0, 4.0))
        assert small.centroid_mm == pytest.approx((89.5, -118.0, -56.0))

    def test_empty_mask(self) -> None:
        assert describe_lesions(np.zeros((3, 3, 3)), AFFINE) == []

    def test_needs_three_dimensions(self) -> None:
        with pytest.raises(DataError, match="3-D"):
            describe_lesions(np.zeros((3, 3)), AFFINE)

    def test_is_ready_for_json(self) -> None:
        mask = np.zeros((3, 3, 3), np.uint8)
        mask[1, 1, 1] = 1
        (lesion,) = describe_lesions(mask, AFFINE)
        assert lesion.to_dict() == {
            "index": 1,
            "voxels": 1,
            "volume_ml": 0.004,
            "centroid_mm": [89.5, -118.0, -56.0],
            "extent_mm": [0.5, 2.0, 4.0],
        }

    def test_labels_are_the_ranks_of_the_table(self) -> None:
        rng = np.random.default_rng(4)
        mask = (rng.random((9, 8, 7)) < 0.06).astype(np.uint8)
        labels, lesions = label_lesions(mask, AFFINE)
        assert lesions == describe_lesions(mask, AFFINE)
        np.testing.assert_array_equal(labels > 0, mask > 0)
        for lesion in lesions:
            voxels = np.argwhere(labels == lesion.index)
            assert len(voxels) == lesion.voxels
            centre = voxels.mean(axis=0) @ AFFINE[:3, :3].T + AFFINE[:3, 3]
            assert lesion.centroid_mm == pytest.approx(centre)
        assert label_lesions(np.zeros((3, 3, 3)), AFFINE)[0].max() == 0

    def test_does_not_depend_on_the_storage_order(self) -> None:
        """All 48 orientations of one volume list the same lesions, ties included."""
        rng = np.random.default_rng(3)
        mask = (rng.random((9, 8, 7)) < 0.06).astype(np.uint8)
        expected = describe_lesions(mask, AFFINE)
        assert len({lesion.voxels for lesion in expected}) < len(expected)
        for axes in itertools.permutations(range(3)):
            for signs in itertools.product((1, -1), repeat=3):
                orientation = np.array(list(zip(axes, signs, strict=True)), dtype=float)
                turned = apply_orientation(mask, orientation)
                affine = AFFINE @ inv_ornt_aff(orientation, mask.shape)
                for ours, theirs in zip(describe_lesions(turned, affine), expected, strict=True):
                    assert ours.voxels == theirs.voxels
                    assert ours.centroid_mm == pytest.approx(theirs.centroid_mm)
                    assert ours.extent_mm == pytest.approx(theirs.extent_mm)


class TestLesionMask:
    PROBABILITY = np.zeros((6, 5, 4), np.float32)
    PROBABILITY[0, 0, :3] = 0.7
    PROBABILITY[2, 2, :4] = (0.6, 0.95, 0.6, 0.5)
    PROBABILITY[5, 4, 3] = 0.99

    def test_keeps_what_has_a_peak_and_a_size(self) -> None:
        found = lesion_mask(self.PROBABILITY, 0.55, min_voxels=2, min_peak=0.9)
        assert np.argwhere(found).tolist() == [[2, 2, 0], [2, 2, 1], [2, 2, 2]]

    def test_is_the_steps_one_by_one(self) -> None:
        rng = np.random.default_rng(0)
        probability = rng.random((12, 13, 9), np.float32) ** 4
        for threshold, size, peak in ((0.3, 3, 0.0), (0.3, 3, 0.8), (0.5, 1, 0.99), (0.9, 5, 0.5)):
            whole = remove_small_components(
                remove_faint_components(apply_threshold(probability, threshold), probability, peak),
                size,
            )
            np.testing.assert_array_equal(lesion_mask(probability, threshold, size, peak), whole)

    def test_nothing_is_nothing(self) -> None:
        assert not lesion_mask(np.zeros((3, 3, 3), np.float32), 0.5, 3, 0.5).any()

    def test_refuses_a_peak_that_is_no_probability(self) -> None:
        with pytest.raises(ConfigError, match=r"between 0 and 1, found 1\.5"):
            remove_faint_components(np.ones((2, 2, 2)), np.ones((2, 2, 2)), 1.5)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, bool])
def test_maps_of_whole_numbers_are_compared_with_the_limits_as_they_are(dtype: type) -> None:
    marked: NDArray[Any] = np.array([[[0, 1, 0, 1, 1]]], dtype)
    np.testing.assert_array_equal(apply_threshold(marked, 0.5), marked)
    np.testing.assert_array_equal(lesion_mask(marked, 0.5, min_voxels=2, min_peak=0.9)[0, 0, 3:], 1)
