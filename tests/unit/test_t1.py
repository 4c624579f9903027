"""T1 beside FLAIR: one place whatever its grid, landmarks of its own, refused when elsewhere."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
from nibabel.affines import apply_affine
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform
from scipy import ndimage
from scipy.spatial.transform import Rotation

from tests.labelled_scans import t1_of
from tests.phantoms import head
from wmh_lora.config import PreprocessConfig
from wmh_lora.errors import DataError, GridMismatchError
from wmh_lora.preprocess import context_stack, preprocess, to_model_grid
from wmh_lora.t1 import (
    T1_WHITE_MATTER_LEVEL,
    overlap_of_heads,
    prepare_t1,
    share_in_view,
)
from wmh_lora.volume import Volume

GRID = PreprocessConfig(pixel_size_mm=4.0, margin_mm=8.0)
FINE = PreprocessConfig(pixel_size_mm=3.0)


SCALP, SKULL, GREY, WHITE, FLUID = range(1, 6)
LEVELS = np.array([0.0, 260.0, 20.0, 90.0, 140.0, 25.0])


def tissue(shape: tuple[int, ...], affine: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """What a head without any symmetry holds at the voxels of a grid; 0 is air."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")).astype(float)
    x, y, z = np.tensordot(affine[:3, :3], grid, 1) + affine[:3, 3, None, None, None]
    labels = np.zeros(shape, np.int64)
    radius = np.sqrt((x / 74) ** 2 + (y / 90) ** 2 + (z / 66) ** 2)
    for label, limit in ((SCALP, 1.0), (SKULL, 0.9), (GREY, 0.85)):
        labels[radius < limit] = label
    labels[((x - 4) / 42) ** 2 + (y / 56) ** 2 + ((z + 3) / 38) ** 2 < 1] = WHITE
    labels[(np.abs(x - 8) < 7) & (np.abs(y + 6) < 22) & (np.abs(z) < 14)] = FLUID
    return labels


def t1_phantom(
    shape: tuple[int, int, int] = (60, 70, 46),
    spacing: tuple[float, float, float] = (3.0, 3.0, 3.0),
) -> Volume:
    """A noisy T1 of `tissue`, the middle of its field of view at the origin."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -np.array(spacing) * (np.array(shape) - 1) / 2
    data = LEVELS[tissue(shape, affine)] + np.random.default_rng(1).normal(0.0, 3.0, shape)
    return Volume(np.maximum(data, 0.5).astype(np.float32), affine)


def stored_as(volume: Volume, codes: str) -> Volume:
    change = ornt_transform(
        axcodes2ornt(nib.aff2axcodes(volume.affine)), axcodes2ornt(tuple(codes))
    )
    data = nib.apply_orientation(volume.data, change)
    return Volume(data, volume.affine @ inv_ornt_aff(change, volume.shape))


def test_on_the_same_grid_it_is_where_the_flair_is() -> None:
    """The oracle is the FLAIR's own path: the same array differs by the intensity scale alone."""
    scan = t1_phantom()
    prepared = preprocess(scan, FINE)
    t1 = prepare_t1(scan, prepared, scan)
    assert t1.shape == prepared.slices.shape
    assert t1.dtype == np.float32
    inside = (t1 > 0) & (t1 < 1) & (prepared.slices > 0) & (prepared.slices < 1)
    assert inside.mean() > 0.2
    scale, offset = np.polyfit(prepared.slices[inside], t1[inside], 1)
    np.testing.assert_allclose(t1[inside], scale * prepared.slices[inside] + offset, atol=1e-4)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "IPR", "ASL", "SLP", "PIL"])
def test_the_order_of_the_axes_changes_nothing(codes: str) -> None:
    flair = t1_phantom((60, 70, 20), (3.0, 3.0, 7.0))
    expected = prepare_t1(t1_phantom(), preprocess(flair, FINE), flair)
    for other in ("RAS", "LPI"):
        stored = stored_as(flair, other)
        found = prepare_t1(stored_as(t1_phantom(), codes), preprocess(stored, FINE), stored)
        # coarse landmarks come from other voxels where a count of voxels is even
        np.testing.assert_allclose(found, expected, atol=0.02)


def test_a_turned_grid_of_other_voxels_shows_the_same() -> None:
    """Both scans are sampled from one head; one of them obliquely."""
    flair = t1_phantom((60, 70, 20), (3.0, 3.0, 7.0))
    prepared = preprocess(flair, FINE)
    straight = prepare_t1(t1_phantom((90, 105, 70), (2.0, 2.0, 2.0)), prepared, flair)
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("xyz", [8, -12, 15], degrees=True).as_matrix()
    source = t1_phantom((110, 120, 100), (2.0, 2.0, 2.0))
    back = np.linalg.inv(source.affine) @ turn @ source.affine
    turned = ndimage.affine_transform(source.data, back, order=1)
    oblique = Volume(np.asarray(turned, np.float32), turn @ source.affine)
    found = prepare_t1(oblique, prepared, flair)
    assert np.corrcoef(found.ravel(), straight.ravel())[0, 1] > 0.985


def test_coarse_slices_average_what_lies_in_them() -> None:
    flair = t1_phantom((60, 70, 20), (3.0, 3.0, 7.0))
    prepared = preprocess(flair, FINE)
    t1 = t1_phantom((60, 70, 140), (3.0, 3.0, 1.0))
    striped = t1.data.copy()
    striped[:, :, ::2] *= 1.4
    striped[:, :, 1::2] *= 0.6
    plain, found = (
        prepare_t1(replace(t1, data=data), prepared, flair) for data in (t1.data, striped)
    )
    middle = slice(6, 14)
    white = np.abs(plain[middle] - T1_WHITE_MATTER_LEVEL) < 0.02
    # The stripes are two peaks of intensity, and the landmark is the upper one.
    spread = found[middle][white].std() / found[middle][white].mean()
    assert spread < 0.12, "sampled at points, the spread would be 0.4"


def test_gain_and_offset_do_not_matter() -> None:
    flair, _ = head()
    prepared = preprocess(flair, GRID)
    t1 = t1_of(flair)
    expected = prepare_t1(t1, prepared, flair)
    found = prepare_t1(replace(t1, data=3.0 * t1.data + 200.0), prepared, flair)
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("outside", [0.0, -1000.0, np.nan])
def test_brain_extraction_and_what_stands_outside_do_not_matter(outside: float) -> None:
    scan = t1_phantom()
    flair = t1_phantom((60, 70, 20), (3.0, 3.0, 7.0))
    prepared = preprocess(flair, FINE)
    expected = prepare_t1(scan, prepared, flair)
    brain = tissue(scan.shape, scan.affine) >= GREY
    stripped = np.where(brain, scan.data, np.float32(outside))
    found = prepare_t1(replace(scan, data=stripped), prepared, flair)
    assert np.all(np.isfinite(found))
    labels = tissue(flair.shape, flair.affine)
    white = to_model_grid((labels == WHITE).astype(np.float32), prepared) == 1
    np.testing.assert_allclose(found[white], expected[white], atol=0.02)
    assert (found == 0).mean() > (expected == 0).mean() + 0.1


def test_brain_extraction_does_not_matter_below_a_coil_that_shades() -> None:
    scan = t1_phantom()
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in scan.shape), indexing="ij"))
    from_middle_mm = np.linalg.norm(apply_affine(scan.affine, np.moveaxis(grid, 0, -1)), axis=-1)
    shaded = (scan.data * np.exp(-((from_middle_mm / 70.0) ** 2))).astype(np.float32)
    prepared = preprocess(scan, FINE)
    brain = tissue(scan.shape, scan.affine) >= GREY
    whole, bare = (
        prepare_t1(replace(scan, data=data), prepared, scan) for data in (shaded, shaded * brain)
    )
    inside = (bare > 0.1) & (bare < 1.0)
    assert inside.mean() > 0.05
    np.testing.assert_allclose(bare[inside], whole[inside], rtol=0.08)


def test_white_matter_is_the_bright_peak_though_grey_matter_is_more() -> None:
    scan = t1_phantom()
    labels = tissue(scan.shape, scan.affine)
    assert (labels == GREY).sum() > (labels == WHITE).sum()
    prepared = preprocess(scan, FINE)
    found = prepare_t1(scan, prepared, scan)
    for label, level in ((WHITE, T1_WHITE_MATTER_LEVEL), (FLUID, 0.02)):
        where = to_model_grid((labels == label).astype(np.float32), prepared) == 1
        assert np.median(found[where]) == pytest.approx(level, abs=0.03)


def _moved(t1: Volume, *shift_mm: float) -> Volume:
    affine = t1.affine.copy()
    affine[:3, 3] += shift_mm
    return replace(t1, affine=affine, path=Path("far_T1.nii.gz"))


def test_a_t1_of_another_place_is_refused_and_a_doubtful_one_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    flair, _ = head()
    flair = replace(flair, path=Path("p_FLAIR.nii.gz"))
    prepared = preprocess(flair, GRID)
    t1 = t1_of(flair)
    assert overlap_of_heads(t1, prepared, flair) > 0.9
    with caplog.at_level(logging.WARNING, "wmh_lora"):
        prepare_t1(t1, prepared, flair)
        assert not caplog.messages
        prepare_t1(_moved(t1, 0, 50, 0), prepared, flair)
    assert "far_T1.nii.gz and p_FLAIR.nii.gz overlap by only" in caplog.text
    with pytest.raises(GridMismatchError, match=r"far_T1\.nii\.gz and p_FLAIR\.nii\.gz .* %"):
        prepare_t1(_moved(t1, 0, 110, 0), prepared, flair)
    with pytest.raises(GridMismatchError, match="overlap of 0 %"):
        prepare_t1(_moved(t1, 0, 0, 1000), prepared, flair)
    assert share_in_view(t1, flair) > 0.8
    assert share_in_view(_moved(t1, 0, 0, 1000), flair) == 0


def test_a_slab_of_a_head_is_refused() -> None:
    flair, _ = head()
    t1 = t1_of(flair)
    slab = Volume(np.ascontiguousarray(t1.data[:, :, 18:26]), t1.affine.copy())
    slab.affine[:3, 3] += t1.affine[:3, 2] * 18
    with pytest.raises(GridMismatchError):
        prepare_t1(slab, preprocess(flair, GRID), flair)


def test_what_it_does_not_show_is_background() -> None:
    flair, _ = head()
    t1 = t1_of(flair)
    cut = Volume(np.ascontiguousarray(t1.data[:, :, :20]), t1.affine)
    found = prepare_t1(cut, preprocess(flair, GRID), flair)
    whole = prepare_t1(t1, preprocess(flair, GRID), flair)
    missing = [not plane.any() for plane in found]
    assert missing[-1]
    assert not any(missing[:4])
    np.testing.assert_allclose(found[2], whole[2], atol=0.05)


def test_an_image_without_contrast_is_an_error() -> None:
    flair, _ = head()
    flat = Volume(np.full((30, 30, 30), 5.0, np.float32), np.diag([7.0, 7.0, 3.0, 1.0]))
    with pytest.raises(DataError):
        prepare_t1(flat, preprocess(flair, GRID), flair)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_stack_has_as_many_slices_as_asked_for(channels: int) -> None:
    flair, _ = head()
    prepared = preprocess(flair, GRID)
    prepared = replace(prepared, context_offset=2)
    other = prepared.slices + 1
    count = len(prepared.slices)
    stack = context_stack(prepared, range(count), channels)
    shown = context_stack(prepared, range(count), channels, slices=other)
    for index in range(count):
        for channel in range(channels):
            place = min(max(index + 2 * (channel - channels // 2), 0), count - 1)
            np.testing.assert_array_equal(stack[index, channel], prepared.slices[place])
            np.testing.assert_array_equal(shown[index, channel], other[place])


@pytest.mark.realdata
def test_a_real_t1_lies_on_its_flair(shared_data: Path) -> None:
    for number in ("01", "02", "04", "05", "06", "07", "08", "09", "10"):  # those with a brain mask
        folder = shared_data / "tabriz" / f"sub-{number}" / "anat"
        flair, t1 = (
            Volume.read(folder / f"sub-{number}_{name}.nii.gz") for name in ("FLAIR", "T1w")
        )
        prepared = preprocess(flair, PreprocessConfig())
        found = prepare_t1(t1, prepared, flair)
        assert overlap_of_heads(t1, prepared, flair) > 0.9
        manual = shared_data / f"tabriz/derivatives/manual/sub-{number}/anat"
        brain = Volume.read(manual / f"sub-{number}_space-orig_label-brain_mask.nii.gz").data > 0
        bare = prepare_t1(replace(t1, data=t1.data * brain), prepared, flair)
        inside = to_model_grid(brain.astype(np.float32), prepared) == 1
        assert np.median(np.abs(bare[inside] - found[inside])) < 0.05
