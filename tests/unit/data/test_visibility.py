"""What of a painted lesion counts as visible: bright, doubtful and dark parts, and their limits."""

from __future__ import annotations

import numpy as np
import pytest

from wmh_lora.data.visibility import judge_visibility

SHAPE = (60, 60, 5)
SPACING_MM = (1.0, 1.0, 4.0)


def _scan(excess: float, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A slab of white matter with a square lesion of some brightness in three slices."""
    lesion = np.zeros(SHAPE, dtype=np.bool_)
    lesion[25:35, 25:35, 1:4] = True
    image = np.ones(SHAPE, dtype=np.float32) + excess * lesion
    image += noise * np.random.default_rng(0).standard_normal(SHAPE)
    return image.astype(np.float32), lesion, np.ones(SHAPE, dtype=np.bool_)


def test_a_bright_lesion_is_visible_to_its_border() -> None:
    image, lesion, normal = _scan(0.4, noise=0.03)
    visible, doubtful = judge_visibility(image, lesion, normal, SPACING_MM)
    np.testing.assert_array_equal(visible | doubtful, lesion)
    assert visible[26:34, 26:34, 1:4].all()  # only about the border may readers differ


@pytest.mark.parametrize(
    ("share", "expected"), [(0.25, "none"), (0.5, "doubtful"), (0.7, "visible")]
)
def test_a_lesion_is_judged_by_the_others_of_its_scan(share: float, expected: str) -> None:
    """What is a fair lesion on its own is haze beside others that are several times as bright."""
    image, bright, normal = _scan(0.5)
    other = np.zeros(SHAPE, dtype=np.bool_)
    other[5:14, 5:14, 2] = True
    image += np.float32(0.5 * share) * other
    visible, doubtful = judge_visibility(image, bright | other, normal, SPACING_MM)
    core = np.s_[7:12, 7:12, 2]
    assert visible[core].all() == visible[core].any() == (expected == "visible")
    assert doubtful[core].all() == doubtful[core].any() == (expected == "doubtful")
    alone, _ = judge_visibility(image, other, normal & ~bright, SPACING_MM)
    assert alone[core].all()


def test_a_faint_lesion_is_doubtful_and_a_dark_one_is_none() -> None:
    for excess, expected in ((0.055, True), (0.0, False), (-0.5, False)):
        image, lesion, normal = _scan(excess)
        visible, doubtful = judge_visibility(image, lesion, normal, SPACING_MM)
        assert not visible.any()
        core = np.s_[28:32, 28:32, 1:4]
        assert doubtful[core].all() == doubtful[core].any() == expected


def test_a_dark_rim_beside_a_bright_lesion_is_left_open_one_pixel_wide() -> None:
    image, lesion, normal = _scan(0.4)
    image[25:29, :, :] = 0.3  # fluid fills these voxels
    visible, doubtful = judge_visibility(image, lesion, normal, SPACING_MM)
    middle = (slice(None), 30, 2)
    # of the first bright pixel, smoothing leaves less than half of the lesion's brightness
    assert np.flatnonzero(visible[middle]).tolist() == [30, 31, 32, 33, 34]
    assert np.flatnonzero(doubtful[middle]).tolist() == [29]


@pytest.mark.parametrize("gain", [0.5, 3.0])
def test_lesions_are_compared_with_what_lies_around_them(gain: float) -> None:
    """Coil shading changes both alike; another slice's intensity does not matter."""
    image, lesion, normal = _scan(0.2)
    before = judge_visibility(image, lesion, normal, SPACING_MM)
    shaded = image * np.linspace(1.0, gain, SHAPE[2], dtype=np.float32)
    after = judge_visibility(shaded, lesion, normal, SPACING_MM)
    for first, second in zip(before, after, strict=True):
        np.testing.assert_array_equal(first, second)


def test_specks_are_doubtful_and_nothing_to_compare_with_leaves_the_label() -> None:
    image, _, normal = _scan(0.0)
    speck = np.zeros(SHAPE, dtype=np.bool_)
    speck[30, 30:32, 2] = True
    image[speck] = 3.0
    visible, doubtful = judge_visibility(image, speck, normal, SPACING_MM)
    assert not visible.any()
    np.testing.assert_array_equal(doubtful, speck)
    image, lesion, normal = _scan(0.0)
    visible, _ = judge_visibility(image, lesion, np.zeros_like(normal), SPACING_MM)
    np.testing.assert_array_equal(visible, lesion)
    none = np.zeros_like(lesion)
    assert not any(part.any() for part in judge_visibility(image, none, normal, SPACING_MM))
