"""The one path to the network's grid and back: orientation, intensity, crop and resampling."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

from wmh_lora.config import PreprocessConfig
from wmh_lora.errors import DataError, GridMismatchError
from wmh_lora.preprocess import (
    WHITE_MATTER_LEVEL,
    context_stack,
    preprocess,
    restore,
    restore_mask,
    to_model_grid,
)
from wmh_lora.preprocess_head import find_head
from wmh_lora.volume import Volume

CONFIG = PreprocessConfig()


def head_phantom(
    shape: tuple[int, int, int] = (60, 70, 20),
    spacing: tuple[float, float, float] = (3.0, 3.0, 6.0),
) -> Volume:
    """Ellipsoid head: dark ventricle in the middle, brain 100, bright scalp, air 2, no symmetry."""
    rng = np.random.default_rng(3)
    centre = [(n - 1) / 2 for n in shape]
    position = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")).astype(float)
    half_mm = (80.0, 95.0, 70.0)
    radius = np.sqrt(
        sum(((position[a] - centre[a]) * spacing[a] / half_mm[a]) ** 2 for a in range(3))
    )
    data = np.full(shape, 2.0)
    data[radius < 1.0] = 250.0
    data[radius < 0.93] = 100.0
    data[radius < 0.25] = 20.0
    data[position[0] * 2 + position[1] < 40] += 3.0
    data += rng.normal(0.0, 2.0, shape)
    return Volume(data.astype(np.float32), np.diag([*spacing, 1.0]))


def all_axis_codes() -> list[tuple[str, str, str]]:
    """The 48 ways of storing a volume."""
    pairs = [("R", "L"), ("A", "P"), ("S", "I")]
    return [
        (first, second, third)
        for permutation in itertools.permutations(pairs)
        for first, second, third in itertools.product(*permutation)
    ]


def stored_as(volume: Volume, codes: tuple[str, str, str]) -> Volume:
    """Store the same volume with other axes."""
    change = ornt_transform(axcodes2ornt(nib.aff2axcodes(volume.affine)), axcodes2ornt(codes))
    data = nib.apply_orientation(volume.data, change)
    return Volume(data, volume.affine @ inv_ornt_aff(change, volume.shape))


def test_all_48_orientations_give_the_same_slices_and_restore_to_their_own_grid() -> None:
    reference = head_phantom()
    expected = preprocess(reference, CONFIG)
    back = restore(expected.slices, expected)
    assert len(set(all_axis_codes())) == 48
    for codes in all_axis_codes():
        stored = stored_as(reference, codes)
        prepared = preprocess(stored, CONFIG)
        np.testing.assert_allclose(prepared.slices, expected.slices, atol=1e-5)
        restored = Volume(restore(prepared.slices, prepared), stored.affine)
        np.testing.assert_allclose(stored_as(restored, ("R", "A", "S")).data, back, atol=1e-5)


def test_slices_are_shown_as_a_radiologist_sees_them() -> None:
    volume = head_phantom()
    data = volume.data.copy()
    data[12:18, 50:56, 9:12] = 400.0  # left-anterior is at high y; low x is the patient's left
    prepared = preprocess(Volume(data, volume.affine), CONFIG)
    middle = prepared.slices[len(prepared.slices) // 2]
    inner = middle.copy()
    row, column = np.argwhere(inner >= inner.max() * 0.999).mean(axis=0)
    assert row < middle.shape[0] / 2, "anterior is up"
    assert column > middle.shape[1] / 2, "the patient's left is on the right of the picture"


@pytest.mark.parametrize("thick", [0, 1, 2])
def test_slices_follow_the_plane_of_acquisition(thick: int) -> None:
    spacing, shape = [2.5, 2.5, 2.5], [70, 84, 60]
    spacing[thick], shape[thick] = 6.0, 30
    volume = head_phantom((shape[0], shape[1], shape[2]), (spacing[0], spacing[1], spacing[2]))
    prepared = preprocess(volume, CONFIG)
    assert prepared.view.axes[0] == thick
    assert prepared.view.spacing_mm[0] == 6.0


def test_white_matter_lands_on_its_level_whatever_gain_and_offset() -> None:
    volume = head_phantom()
    expected = preprocess(volume, CONFIG).slices
    for gain, offset in ((1.0, -500.0), (0.01, 0.0), (37.0, 1000.0)):
        changed = Volume((volume.data * gain + offset).astype(np.float32), volume.affine)
        np.testing.assert_allclose(preprocess(changed, CONFIG).slices, expected, atol=0.01)
    assert np.median(expected[expected > 0.3]) == pytest.approx(WHITE_MATTER_LEVEL, abs=0.03)


def extracted(volume: Volume, outside: float) -> Volume:
    """Replace everything outside the brain by one value."""
    scan = volume.data
    brain = preprocess(volume, CONFIG)
    inside = restore((brain.slices > 0).astype(np.float32), brain) > 0.5
    return Volume(np.where(inside, scan, np.float32(outside)).astype(np.float32), volume.affine)


@pytest.mark.parametrize("outside", [-1000.0, 0.0, 55.0, 5000.0, np.nan, np.inf])
def test_the_value_outside_the_head_does_not_matter(outside: float) -> None:
    volume = head_phantom()
    expected = preprocess(extracted(volume, 1.0), CONFIG)
    prepared = preprocess(extracted(volume, outside), CONFIG)
    assert np.isfinite(prepared.slices).all()
    np.testing.assert_allclose(prepared.slices, expected.slices, atol=1e-5)


def test_a_scan_at_the_model_s_pixel_size_is_not_interpolated() -> None:
    shape, spacing = (176, 200, 12), (1.0, 1.0, 6.0)
    volume = head_phantom(shape, spacing)
    prepared = preprocess(volume, CONFIG)
    gain = WHITE_MATTER_LEVEL / (prepared.white_matter - prepared.floor)
    expected = np.clip((volume.data - prepared.floor) * gain, 0.0, 1.0)
    viewed = prepared.view.to_view(expected)
    first, last = prepared.view.slices
    (top, bottom), (left, right) = prepared.view.rows, prepared.view.columns
    rows = np.arange(max(top, 0), min(bottom, shape[1]))
    columns = np.arange(max(left, 0), min(right, shape[0]))
    window = prepared.slices[:, rows - top][:, :, columns - left]
    np.testing.assert_allclose(window, viewed[first:last][:, rows][:, :, columns], atol=1e-6)


def test_a_mask_survives_the_way_there_and_back() -> None:
    volume = head_phantom((140, 160, 12), (1.2, 1.2, 6.0))
    mask = np.zeros(volume.shape, dtype=np.uint8)
    mask[60:80, 70:90, 4:8] = 1
    prepared = preprocess(volume, CONFIG)
    back = restore(to_model_grid(mask, prepared), prepared) > 0.5
    dice = 2 * np.sum(back & (mask > 0)) / (back.sum() + mask.sum())
    assert dice > 0.97


def test_neighbours_lie_a_physical_distance_away_and_ends_repeat() -> None:
    prepared = preprocess(head_phantom((60, 70, 60), (3.0, 3.0, 2.0)), CONFIG)
    assert prepared.context_offset == 2  # 3 mm is nearer to two slices than to one
    last = len(prepared.slices) - 1
    stack = context_stack(prepared, [0, 5, last], 3)
    np.testing.assert_array_equal(stack[1, 0], prepared.slices[3])
    np.testing.assert_array_equal(stack[1, 1], prepared.slices[5])
    np.testing.assert_array_equal(stack[1, 2], prepared.slices[7])
    np.testing.assert_array_equal(stack[0, 0], prepared.slices[0])
    np.testing.assert_array_equal(stack[2, 2], prepared.slices[last])


def test_the_window_holds_the_head_in_whole_multiples() -> None:
    volume = head_phantom()
    prepared = preprocess(volume, CONFIG)
    assert prepared.slices.shape[1] % CONFIG.multiple_px == 0
    assert prepared.slices.shape[2] % CONFIG.multiple_px == 0
    assert prepared.slices.shape[1] < volume.shape[1] * 3, "smaller than the field of view"
    kept = restore(np.ones_like(prepared.slices), prepared) > 0.5
    assert kept[volume.data > 50].mean() > 0.999


def test_a_head_that_fills_the_field_of_view_is_kept_whole() -> None:
    volume = head_phantom()
    cut = Volume(np.ascontiguousarray(volume.data[10:50, 12:58, 3:17]), volume.affine)
    prepared = preprocess(cut, CONFIG)
    assert (restore(np.ones_like(prepared.slices), prepared) > 0.5).all()


def test_shapes_that_do_not_match_are_refused() -> None:
    prepared = preprocess(head_phantom(), CONFIG)
    with pytest.raises(GridMismatchError, match="shape"):
        restore(prepared.slices[1:], prepared)
    with pytest.raises(GridMismatchError, match="shape"):
        to_model_grid(np.zeros((2, 2, 2)), prepared)


def test_an_image_without_tissue_is_refused() -> None:
    blank = np.zeros((32, 32, 8), dtype=np.float32)
    with pytest.raises(DataError, match="tissue"):
        preprocess(Volume(blank, np.eye(4)), CONFIG)
    with pytest.raises(DataError):
        preprocess(Volume(np.full_like(blank, np.nan), np.eye(4)), CONFIG)


def heavy_head(lesion_radius: float, noise: float) -> tuple[Volume, npt.NDArray[np.bool_]]:
    """A head of white matter about fluid, with a shell of lesion around the fluid; and the shell.

    A shell of radius 0.75 outnumbers white matter more than 15 mm inside the head.
    """
    grids = (np.linspace(-1.15, 1.15, n) for n in (64, 76, 50))
    radius = np.sqrt(sum(grid**2 for grid in np.meshgrid(*grids, indexing="ij")))
    lesion = (radius > 0.25) & (radius < lesion_radius)
    image = np.where(radius < 1, 100.0, 0.0)
    image[(radius > 0.93) & (radius < 1)] = 125.0  # cortex
    image[lesion], image[radius <= 0.25] = 130.0, 20.0
    grain = np.random.default_rng(0).normal(0.0, noise, image.shape)
    image = np.where(radius < 1, image + grain, 0.0).astype(np.float32)
    return Volume(image, np.diag([3.0, 3.0, 3.0, 1.0])), lesion


# noise of 10 leaves a shoulder of the peak of white matter
@pytest.mark.parametrize("noise", [4.0, 10.0])
@pytest.mark.parametrize(("lesion_radius", "version_2"), [(0.35, 0.4), (0.62, 0.4), (0.75, 0.29)])
def test_white_matter_is_found_where_lesions_outnumber_it(
    lesion_radius: float, version_2: float, noise: float
) -> None:
    volume, lesion = heavy_head(lesion_radius, noise)
    for version, expected in ((2, version_2), (3, 0.4)):
        prepared = preprocess(volume, PreprocessConfig(version=version))
        shown = np.median(prepared.slices[to_model_grid(lesion, prepared) > 0.9])
        # lesion is 1.375 times as far above fluid as white matter
        assert shown / ((130 - 20) / (100 - 20)) == pytest.approx(expected, abs=0.02)


def test_a_head_is_filled_below_a_thin_scalp_that_outshines_it() -> None:
    _, row, column = np.indices((20, 72, 60))
    radius = np.hypot((row - 36) / 33, (column - 30) / 27)
    scan = np.where(radius < 0.9, 100.0, 0.0).astype(np.float32)
    scan[(radius > 0.95) & (radius < 1)] = 600.0  # fat, little more than a pixel of it
    torn, whole = (find_head(scan, (5.0, 3.0, 3.0), clean_first=first) for first in (True, False))
    np.testing.assert_array_equal(whole, radius < 1)
    assert (torn != whole).mean() > 0.2


@pytest.mark.realdata
def test_the_same_brain_gets_the_same_landmarks_with_and_without_its_skull(
    shared_data: Path,
) -> None:
    folder = shared_data / "tabriz"
    for subject in ("sub-01", "sub-07"):
        volume = Volume.read(folder / subject / "anat" / f"{subject}_FLAIR.nii.gz")
        name = f"derivatives/manual/{subject}/anat/{subject}_space-orig_label-brain_mask.nii.gz"
        brain: npt.NDArray[np.bool_] = Volume.read(folder / name).data > 0
        whole = preprocess(volume, CONFIG)
        bare = preprocess(
            Volume(np.where(brain, volume.data, 0).astype(np.float32), volume.affine), CONFIG
        )
        span = whole.white_matter - whole.floor
        assert abs(whole.white_matter - bare.white_matter) < 0.1 * span
        assert abs(whole.floor - bare.floor) < 0.15 * span


def test_restored_mask_is_the_restored_map_above_the_level() -> None:
    prepared = preprocess(head_phantom(), PreprocessConfig(pixel_size_mm=2.0))
    level = 0.3
    expected = restore(prepared.slices, prepared) >= np.float32(level)
    np.testing.assert_array_equal(restore_mask(prepared.slices, prepared, level), expected)
    in_bytes = (prepared.slices * 255).round().astype(np.uint8)
    found = restore_mask(in_bytes, prepared, level * 255)
    assert found.dtype == np.uint8
    assert np.mean(found != expected) < 0.01


def test_slices_without_head_are_known() -> None:
    prepared = preprocess(head_in_air(), PreprocessConfig(margin_mm=40.0))
    assert prepared.shows_head is not None
    shown = np.flatnonzero(prepared.shows_head)
    bright = np.flatnonzero((prepared.slices > 0.3).mean(axis=(1, 2)) > 0.01)
    assert not prepared.shows_head.all()
    assert (np.diff(shown) == 1).all()
    assert shown[0] <= bright[0]
    assert shown[-1] >= bright[-1]


def head_in_air() -> Volume:
    """Two thirds of the slices show a head."""
    grids = (np.linspace(-1.2, 1.2, n) for n in (56, 64, 60))
    x, y, z = np.meshgrid(*grids, indexing="ij")
    inside = x**2 + y**2 + (1.5 * z) ** 2 < 1.0
    noise = np.random.default_rng(0).normal(0.0, 4.0, inside.shape)
    data = np.where(inside, 300.0 - 200.0 * (x**2 + y**2 < 0.1), 0.0) + noise
    return Volume(data.astype(np.float32), np.diag([3.5, 3.5, 4.0, 1.0]))


def test_a_scan_that_float32_tells_no_levels_of_apart_is_refused() -> None:
    volume = head_phantom()
    flat = Volume(np.float32(1e6) + volume.data / np.float32(3000.0), volume.affine)
    with pytest.raises(DataError, match="shows no contrast"):
        preprocess(flat, CONFIG)
