"""Haze goes, lesions stay, and what cannot be judged is left alone."""

from __future__ import annotations

import numpy as np
import pytest

from wmh_lora.engine_contrast import without_haze
from wmh_lora.engine_views import SliceMaps

SHAPE = (3, 90, 90)
HAZE, LESION, FAINT = np.s_[1, 20:26, 20:26], np.s_[1, 40:52, 40:52], np.s_[2, 60:66, 60:66]


def scan(lesion: float = 1.6) -> tuple[np.ndarray, SliceMaps]:
    """White matter at 0.4 with a bright and a faint lesion and a hazy patch, all found."""
    slices = np.full(SHAPE, 0.4, dtype=np.float32)
    probability = np.full(SHAPE, 0.02, dtype=np.float32)
    for place, brightness, certainty in (
        (HAZE, 1.12, 0.7),
        (LESION, lesion, 0.95),
        (FAINT, 1.4, 0.6),
    ):
        slices[place] *= brightness
        probability[place] = certainty
    structures = {
        "brain": np.full(SHAPE, 255, np.uint8),
        "ventricles": np.zeros(SHAPE, np.uint8),
    }
    return slices, SliceMaps(probability, (probability / 4).astype(np.float32), structures)


def inner(place: tuple[int, slice, slice]) -> tuple[int, slice, slice]:
    """The same without its border, which smoothing blurs."""
    index, rows, columns = place
    return index, slice(rows.start + 1, rows.stop - 1), slice(columns.start + 1, columns.stop - 1)


def test_haze_goes_and_lesions_stay() -> None:
    slices, maps = scan()
    found = without_haze(maps, slices, 1.0, 0.45)
    assert not found.probability[HAZE].any()
    for place in (LESION, FAINT):
        np.testing.assert_array_equal(
            found.probability[inner(place)], maps.probability[inner(place)]
        )
    assert found.deviation is not None
    np.testing.assert_array_equal(found.deviation, found.probability / 4)
    assert maps.probability[HAZE].all()  # what came in is untouched


def test_brighter_lesions_make_a_stricter_judge() -> None:
    slices, maps = scan(lesion=2.4)
    found = without_haze(maps, slices, 1.0, 0.45)
    assert not found.probability[FAINT].any()
    assert found.probability[inner(LESION)].all()


def test_without_certain_lesions_a_usual_brightness_is_assumed() -> None:
    slices, maps = scan()
    maps.probability[LESION] = 0.7
    found = without_haze(maps, slices, 1.0, 0.45)
    assert not found.probability[HAZE].any()
    assert found.probability[inner(FAINT)].all()


@pytest.mark.parametrize("gain", [0.5, 1.5])
def test_shading_from_slice_to_slice_changes_nothing(gain: float) -> None:
    slices, maps = scan()
    shaded = slices * np.linspace(1.0, gain, SHAPE[0], dtype=np.float32)[:, None, None]
    before, after = (without_haze(maps, s, 1.0, 0.45).probability for s in (slices, shaded))
    np.testing.assert_array_equal(before, after)


def test_what_cannot_be_judged_is_left_alone() -> None:
    slices, maps = scan()
    assert without_haze(maps, slices, 1.0, 0.0) is maps
    no_brain = SliceMaps(maps.probability, None, {})
    assert without_haze(no_brain, slices, 1.0, 0.45) is no_brain
    empty = SliceMaps(np.zeros(SHAPE, np.float32), None, maps.structures)
    assert without_haze(empty, slices, 1.0, 0.45) is empty
    nothing_around = SliceMaps(
        maps.probability, None, {**maps.structures, "brain": np.zeros(SHAPE, np.uint8)}
    )
    found = without_haze(nothing_around, slices, 1.0, 0.45)
    np.testing.assert_array_equal(found.probability, maps.probability)
