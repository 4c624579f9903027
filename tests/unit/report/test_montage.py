"""The picture: the right way round, in proportion, with outlines that can be seen."""

from __future__ import annotations

import numpy as np
import pytest
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from numpy.typing import NDArray

from wmh_lora.errors import GridMismatchError
from wmh_lora.report import montage as module
from wmh_lora.report.montage import BAR_PX, choose_slices, montage
from wmh_lora.view import choose_view
from wmh_lora.volume import Volume

SPACING = (1.0, 1.0, 5.0)


def head(axes: str = "RAS") -> tuple[Volume, NDArray[np.uint8]]:
    """An ellipsoid with one lesion on the patient's right, anterior, and its mask."""
    shape = (60, 80, 12)
    x, y, z = np.meshgrid(*(np.linspace(-1.1, 1.1, n) for n in shape), indexing="ij")
    data = np.where(x**2 + y**2 + z**2 < 1.0, 100.0, 0.0).astype(np.float32)
    mask = np.zeros(shape, np.uint8)
    mask[40:46, 55:60, 6] = 1
    data[mask > 0] = 200.0
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = [-30.0, -40.0, -30.0]
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axes))
    affine = affine @ inv_ornt_aff(turn, shape)
    return Volume(apply_orientation(data, turn), affine), apply_orientation(mask, turn)


def pixels(
    volume: Volume, mask: NDArray[np.uint8], **extra: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    return np.asarray(montage(volume, mask, title="phantom: 0.75 mL in 1 lesion", **extra))


def coloured(picture: NDArray[np.uint8], colour: tuple[int, int, int]) -> NDArray[np.intp]:
    """Rows and columns of a colour below the title bar."""
    return np.argwhere((picture[BAR_PX:] == colour).all(axis=-1))


def test_shows_radiological_convention() -> None:
    picture = pixels(*head())
    height, width = module.TILE_PX, round(module.TILE_PX * 60 / 80)
    rows, columns = coloured(picture, module.PREDICTION_RGB).T
    # within its tile the lesion lies left of the middle (the patient's right) and above it
    assert len(rows) > 20
    assert np.all(columns % width < width / 2)
    assert np.all(rows % height < height / 2)


@pytest.mark.parametrize("axes", ["LPS", "PIR", "ASL", "SAR"])
def test_does_not_depend_on_the_storage_order(axes: str) -> None:
    np.testing.assert_array_equal(pixels(*head(axes)), pixels(*head()))


def test_line_breaks_of_a_name_are_spaces() -> None:
    volume, mask = head()
    one, two = (montage(volume, mask, title=title) for title in ("a\nb: 1 mL", "a b: 1 mL"))
    np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


def test_tiles_keep_physical_proportions() -> None:
    volume, mask = head()
    stretched = Volume(volume.data, volume.affine @ np.diag([2.0, 1.0, 1.0, 1.0]))
    sizes = []
    for scan in (volume, stretched):
        view = choose_view(scan, 1.0)
        panel = module._panel(view, scan, (slice(0, 80), slice(0, 60)), (0.0, 1.0))
        sizes.append(panel.size_px[0] / panel.size_px[1])
    assert sizes == pytest.approx([60 / 80, 120 / 80], rel=0.01)
    assert mask.shape == volume.shape


def test_outlines_run_around_the_lesion() -> None:
    volume, mask = head()
    without = pixels(volume, np.zeros_like(mask))
    picture = pixels(volume, mask)
    changed = (picture[BAR_PX:] != without[BAR_PX:]).any(axis=-1)
    orange = (picture[BAR_PX:] == module.PREDICTION_RGB).all(axis=-1)
    # nothing but the outline differs: the lesion itself stays visible
    np.testing.assert_array_equal(changed, orange)


def test_draws_a_reference_in_another_colour() -> None:
    volume, mask = head()
    picture = pixels(volume, mask, reference=np.roll(mask, 4, axis=1))
    assert len(coloured(picture, module.REFERENCE_RGB)) > 20
    assert len(coloured(picture, module.PREDICTION_RGB)) > 20
    other = pixels(volume, mask, reference=2 * np.roll(mask, 4, axis=1))
    assert len(coloured(other, module.REFERENCE_RGB)) < 20  # the key below alone


def test_copes_with_missing_values_and_no_lesion() -> None:
    volume, mask = head()
    data = volume.data.copy()
    data[:10] = np.nan
    picture = pixels(Volume(data, volume.affine), np.zeros_like(mask))
    assert picture[BAR_PX:].max() > 200


def test_refuses_a_mask_on_another_grid() -> None:
    volume, mask = head()
    with pytest.raises(GridMismatchError, match="one grid"):
        montage(volume, mask[1:], title="")


def test_positions_are_scanner_millimetres() -> None:
    for axes in ("RAS", "LPI", "SAR"):
        volume, _ = head(axes)
        view = choose_view(volume, 1.0)
        assert module.position_label(view, volume, 0) == "z -30 mm"
        assert module.position_label(view, volume, 11) == "z 25 mm"


class TestChooseSlices:
    def test_covers_the_head_evenly(self) -> None:
        tissue = np.zeros((40, 4, 4), bool)
        tissue[10:30] = True
        chosen = choose_slices(tissue, np.zeros_like(tissue), 5)
        assert chosen == [12, 16, 20, 24, 28]

    def test_takes_all_slices_of_a_short_stack(self) -> None:
        tissue = np.ones((3, 4, 4), bool)
        assert choose_slices(tissue, np.zeros_like(tissue), 20) == [0, 1, 2]

    def test_prefers_the_largest_lesion_area(self) -> None:
        tissue = np.ones((10, 4, 4), bool)
        lesions = np.zeros_like(tissue)
        lesions[1, 0, 0] = True
        lesions[2, 0, :2] = True
        assert choose_slices(tissue, lesions, 2) == [2, 7]

    def test_shows_lesions_outside_the_tissue(self) -> None:
        tissue = np.zeros((10, 4, 4), bool)
        tissue[:4] = True
        lesions = np.zeros_like(tissue)
        lesions[9] = True
        assert choose_slices(tissue, lesions, 5)[-1] == 9

    def test_works_without_any_tissue(self) -> None:
        nothing = np.zeros((6, 4, 4), bool)
        assert choose_slices(nothing, nothing, 3) == [1, 3, 5]


def test_frames_what_was_drawn_outside_the_head() -> None:
    volume, mask = head()
    mask[0, 0, 6] = 1
    assert len(coloured(pixels(volume, mask), module.PREDICTION_RGB)) > len(
        coloured(pixels(*head()), module.PREDICTION_RGB)
    )
