"""Islands in the scalp go, whatever touches the brain stays, and what is no brain is not judged."""

from __future__ import annotations

import numpy as np
import pytest

from wmh_lora.engine_brain import main_brain, within_brain
from wmh_lora.engine_views import SliceMaps

SHAPE = (9, 120, 110)


def brain() -> np.ndarray:
    """A brain that shrinks towards both ends of the stack; the middle measures 78 cm²."""
    rows, columns = np.mgrid[: SHAPE[1], : SHAPE[2]]
    squared = (rows - 60.0) ** 2 + (columns - 55.0) ** 2
    radii = [20, 30, 40, 50, 50, 50, 40, 30, 20]
    return np.stack([squared <= radius**2 for radius in radii])


def maps(marked: np.ndarray, lesion: np.ndarray, deviation: np.ndarray | None = None) -> SliceMaps:
    structures = {"brain": marked.astype(np.uint8) * 200, "ventricles": np.zeros(SHAPE, np.uint8)}
    return SliceMaps(lesion.astype(np.float32), deviation, structures)


def test_a_scalp_in_the_last_slice_is_no_brain() -> None:
    marked = brain()
    marked[8, 5:30, 50:60] = True  # beside scalp, not beside the brain, of the slice before
    np.testing.assert_array_equal(main_brain(marked, 1.0), brain())


def test_parts_of_the_brain_that_lie_apart_in_their_slice_are_kept() -> None:
    marked = brain()
    marked[2, 55:65] = False  # as temporal lobes and cerebellum do
    np.testing.assert_array_equal(main_brain(marked, 1.0), marked)


def test_a_slice_without_brain_does_not_end_it() -> None:
    marked = brain()
    marked[6] = False
    np.testing.assert_array_equal(main_brain(marked, 1.0), marked)


@pytest.mark.parametrize(("pixel_size_mm", "judged"), [(1.0, True), (0.7, False)])
def test_nothing_is_judged_by_what_is_too_small_for_a_brain(
    pixel_size_mm: float, judged: bool
) -> None:
    assert (main_brain(brain(), pixel_size_mm) is not None) == judged
    lesion = np.zeros(SHAPE)
    lesion[8, 10:15, 50:58] = 0.9
    found = within_brain(maps(brain(), lesion), pixel_size_mm)
    assert bool(found.probability.any()) != judged


def test_islands_outside_the_brain_go_and_others_stay_as_they_are() -> None:
    lesion = np.full(SHAPE, 0.02)
    lesion[4, 60:64, 55:59] = 0.8  # in the brain
    lesion[4, 58:66, 104:109] = 0.7  # reaches out of it
    lesion[8, 10:15, 50:58] = 0.9  # scalp
    deviation = np.where(lesion > 0.5, 0.1, 0.0).astype(np.float32)
    found = within_brain(maps(brain(), lesion, deviation), 1.0)
    expected = lesion.copy()
    expected[8, 10:15, 50:58] = 0.0
    np.testing.assert_array_equal(found.probability, expected.astype(np.float32))
    assert found.deviation is not None
    np.testing.assert_array_equal(found.deviation > 0, expected > 0.5)


def test_a_lesion_in_a_hole_of_the_brain_stays() -> None:
    marked = brain()
    marked[4, 60:64, 55:59] = False
    lesion = np.zeros(SHAPE)
    lesion[4, 60:64, 55:59] = 0.8
    found = within_brain(maps(marked, lesion), 1.0)
    np.testing.assert_array_equal(found.probability, lesion.astype(np.float32))


def test_stray_brain_goes_and_faint_brain_keeps_its_value() -> None:
    marked = brain()
    marked[0, 100:110, 5:15] = True
    given = maps(marked, np.zeros(SHAPE))
    given.structures["brain"][5, 2, 2] = 90
    found = within_brain(given, 1.0).structures["brain"]
    assert not found[0, 100:110, 5:15].any()
    assert found[5, 2, 2] == 90
    np.testing.assert_array_equal(found > 127, brain())


def test_without_a_brain_maps_come_back_as_they_are() -> None:
    given = SliceMaps(np.ones(SHAPE, np.float32), None, {})
    assert within_brain(given, 1.0) is given
