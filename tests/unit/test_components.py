"""Components of masks, against SciPy's own ways of finding them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from wmh_lora.components import component_sizes, fill_holes, label_components, largest_component


@pytest.mark.parametrize("shape", [(30, 31), (14, 15, 16)])
def test_holes_and_the_largest_part_are_what_scipy_finds(
    rng: np.random.Generator, shape: tuple[int, ...]
) -> None:
    mask = rng.random(shape) < 0.65
    filled = ndimage.binary_fill_holes(mask)
    assert filled.sum() > mask.sum()
    np.testing.assert_array_equal(fill_holes(mask), filled)

    sparse = rng.random(shape) < 0.3
    labels, count = label_components(sparse)
    expected, expected_count = ndimage.label(sparse)
    np.testing.assert_array_equal(labels, expected)
    assert labels.dtype == np.uint16
    assert count == expected_count > 1
    sizes = ndimage.sum_labels(sparse, expected, np.arange(1, count + 1))
    np.testing.assert_array_equal(component_sizes(labels, count)[1:], sizes)
    largest = expected == 1 + int(np.argmax(sizes))
    np.testing.assert_array_equal(largest_component(sparse), largest)


def test_of_nothing_there_is_no_part_and_of_everything_it_is_all() -> None:
    for value in (False, True):
        mask = np.full((3, 4, 5), value)
        np.testing.assert_array_equal(largest_component(mask), mask)
        np.testing.assert_array_equal(fill_holes(mask), mask)


def test_more_components_than_two_bytes_can_number_are_told_apart() -> None:
    mask = np.zeros((84, 84, 84), dtype=np.bool_)
    mask[::2, ::2, ::2] = True  # 74,088 voxels on their own
    mask[-2:, -2:, -1] = True  # grows the last one to five
    largest = largest_component(mask)
    assert largest.sum() == 5
    assert largest[82:, 82:, 82:].sum() == 5
