"""Islands in the scalp go, whatever touches the brain stays, and what is no brain is not judged."""

from __future__ import annotations

import numpy as np
import pytest

from wmh_lora.config import PreprocessConfig
from wmh_lora.engine_brain import below_skull, main_brain, within_brain
from wmh_lora.engine_views import SliceMaps
from wmh_lora.preprocess import Prepared, preprocess, to_model_grid
from wmh_lora.volume import Volume

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


class TestBelowSkull:
    """A round head of 85 mm: skin and fat for 6 mm, dark bone for 6 mm, brain of 73 mm."""

    SPACING_MM = (1.0, 1.0, 6.0)
    BRAIN_MM, BONE_MM, HEAD_MM = 73.0, 79.0, 85.0

    def radius_mm(self) -> np.ndarray:
        shape = (190, 190, 31)
        axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, self.SPACING_MM)]
        x, y, z = np.meshgrid(*axes, indexing="ij")
        return np.asarray(np.sqrt(x**2 + y**2 + z**2))

    def seen(
        self, data: np.ndarray, brain: np.ndarray, lesion: np.ndarray
    ) -> tuple[SliceMaps, Prepared]:
        affine = np.diag([*self.SPACING_MM, 1.0])
        prepared = preprocess(Volume(data.astype(np.float32), affine), PreprocessConfig())
        on_grid = [to_model_grid(m.astype(np.float32), prepared) for m in (brain, lesion)]
        structures = {"brain": np.where(on_grid[0] > 0.5, 200, 0).astype(np.uint8)}
        return SliceMaps(0.9 * (on_grid[1] > 0.5), None, structures), prepared

    def head(self) -> np.ndarray:
        """Fluid in the middle, white matter, bone, fat, air; with the noise of a scan."""
        r = self.radius_mm()
        data = np.select(
            [r < 12, r < self.BRAIN_MM, r < self.BONE_MM, r < self.HEAD_MM], [60, 300, 40, 500], 0
        )
        return data + np.random.default_rng(0).normal(0.0, 6.0, r.shape)

    def lesions(self) -> tuple[np.ndarray, np.ndarray]:
        """One just below the cortex, four millimetres deep; and scalp in the top slice of all."""
        r = self.radius_mm()
        inner = np.zeros(r.shape, np.bool_)
        inner[:, :, 14:17] = (r < self.BRAIN_MM - 4)[:, :, 14:17]
        inner[:156] = False
        inner &= np.abs(np.arange(190) - 94.5)[None, :, None] < 8
        flat = np.zeros(r.shape, np.bool_)
        flat[:, :, 28] = (r < self.HEAD_MM - 2)[:, :, 28]
        assert inner.any()
        assert flat.any()
        return inner, flat

    def test_scalp_goes_and_a_lesion_below_the_cortex_stays(self) -> None:
        inner, flat = self.lesions()
        r = self.radius_mm()
        brain = r < self.BRAIN_MM
        brain[:, :, 27:29] = (r < self.HEAD_MM - 2)[:, :, 27:29]  # the network is deceived
        found, prepared = self.seen(self.head(), brain, inner | flat)
        np.testing.assert_array_equal(within_brain(found, 1.0).probability, found.probability)
        left = below_skull(found, prepared).probability > 0
        np.testing.assert_array_equal(left, to_model_grid(inner.astype(np.float32), prepared) > 0.5)

    def test_an_extracted_brain_is_not_judged(self) -> None:
        inner, _ = self.lesions()
        r = self.radius_mm()
        edge = (r < self.BRAIN_MM) & (r > self.BRAIN_MM - 4)
        data = np.where(r < self.BRAIN_MM, self.head(), 0.0)
        found, prepared = self.seen(data, r < self.BRAIN_MM, inner | edge)
        assert below_skull(found, prepared) is found

    def test_where_a_head_was_cut_there_is_no_skin(self) -> None:
        top = 20
        lesion = np.zeros(self.radius_mm().shape, np.bool_)
        lesion[90:96, 60:66, top] = True
        brain = self.radius_mm() < self.BRAIN_MM
        data = self.head()
        brain[:, :, top + 1 :], data[:, :, top + 1 :] = False, 0.0
        found, prepared = self.seen(data, brain, lesion)
        np.testing.assert_array_equal(below_skull(found, prepared).probability, found.probability)
        assert found.probability.any()

    def test_maps_without_a_brain_come_back(self) -> None:
        inner, _ = self.lesions()
        found, prepared = self.seen(self.head(), self.radius_mm() < self.BRAIN_MM, inner)
        without = SliceMaps(found.probability, None, {})
        assert below_skull(without, prepared) is without
        nowhere = SliceMaps(
            found.probability, None, {"brain": np.zeros_like(found.structures["brain"])}
        )
        assert below_skull(nowhere, prepared) is nowhere
