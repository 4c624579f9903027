"""Synthetic scans: reproducible, labelled where they are bright, and varied as they should be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from wmh_lora.data.acquisition import _interpolate, acquire
from wmh_lora.data.anatomy import Anatomy, Tissue, head_anatomy, mni_anatomy
from wmh_lora.data.fields import smooth_field, upsample
from wmh_lora.data.lesions import (
    MaskBank,
    confluent,
    draw_lesions,
    periventricular,
    punctate,
    ventricle_distance,
    within_hosts,
)
from wmh_lora.data.painting import LESION_CONTRAST, _scalp_fat, paint, tissue_contrast
from wmh_lora.data.synthesis import IGNORED, STRUCTURES, deform, demo_case, synthesize
from wmh_lora.errors import DataError


@pytest.fixture(scope="module")
def small_anatomy() -> Anatomy:
    """The MNI152 anatomy at every third voxel: the same shapes, a twenty-seventh of the work."""
    whole = mni_anatomy()
    return Anatomy("small", whole.tissue[::3, ::3, ::3], whole.to_mni_mm[:, ::3, ::3, ::3], False)


def test_the_packaged_anatomy_holds_every_tissue_that_lesions_need() -> None:
    anatomy = mni_anatomy()
    volume_ml = np.bincount(anatomy.tissue.ravel(), minlength=len(Tissue)) / 1000.0
    assert 400 < volume_ml[Tissue.WHITE_MATTER] < 800
    assert 600 < volume_ml[Tissue.CORTEX] < 1200
    assert 10 < volume_ml[Tissue.VENTRICLE] < 60
    middle = np.argwhere(anatomy.tissue == Tissue.VENTRICLE).mean(axis=0)
    node = np.rint(middle / 8).astype(int)
    where_mm = anatomy.to_mni_mm[:, node[0], node[1], node[2]]
    assert np.abs(where_mm - [0.0, -20.0, 12.0]).max() < 15.0, "ventricles lie about the origin"


def test_the_same_seed_makes_the_same_scan(small_anatomy: Anatomy) -> None:
    first, again, other = (
        synthesize(np.random.default_rng(seed), small_anatomy, None) for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first.volume.data, again.volume.data)
    for name in STRUCTURES:
        np.testing.assert_array_equal(first.masks[name], again.masks[name])
    assert first.volume.shape != other.volume.shape or not np.array_equal(
        first.volume.data, other.volume.data
    )


def test_scans_are_finite_and_share_a_grid_with_their_masks(small_anatomy: Anatomy) -> None:
    steps = set()
    for seed in range(12):
        case = synthesize(np.random.default_rng(seed), small_anatomy, None)
        assert np.isfinite(case.volume.data).all()
        assert case.volume.data.std() > 0
        assert set(case.masks) == {*STRUCTURES, IGNORED}
        assert not (case.masks["wmh"] * case.masks[IGNORED]).any()
        for mask in case.masks.values():
            assert mask.shape == case.volume.shape
            assert set(np.unique(mask)) <= {0.0, 1.0}
        steps.add(round(max(case.volume.spacing_mm), 2))
    assert min(steps) == 1.0, "some scans are isotropic"
    assert max(steps) > 3.0, "some have thick slices"


def test_lesions_are_brighter_than_the_white_matter_around_them() -> None:
    anatomy = mni_anatomy()
    tissue = anatomy.tissue[20:130, 40:150, 60:100]
    distance = ventricle_distance(tissue)
    far_from_tracts = np.full((3, 4, 4, 4), 100.0, dtype=np.float32)
    ratios = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        lesions = punctate(rng, distance, tissue)
        image, reference = paint(rng, tissue, lesions, distance, far_from_tracts)
        inside = (reference > 0) & (tissue == Tissue.WHITE_MATTER)
        if inside.sum() < 20:
            continue
        ring = ndimage.binary_dilation(inside, iterations=5) & ~ndimage.binary_dilation(
            lesions > 0, iterations=3
        )
        around = image[ring & (tissue == Tissue.WHITE_MATTER)]
        ratios.append(np.median(image[inside]) / np.median(around))
    assert len(ratios) >= 8
    assert min(ratios) > 1.02
    assert np.median(ratios) > LESION_CONTRAST[0]
    assert max(ratios) < LESION_CONTRAST[1] + 0.4


def test_flair_contrast_keeps_its_order() -> None:
    for seed in range(50):
        mean = tissue_contrast(np.random.default_rng(seed))
        assert mean[Tissue.WHITE_MATTER] == 1.0
        assert mean[Tissue.VENTRICLE] < 0.6, "fluid is dark"
        assert mean[Tissue.CORTEX] > 1.0, "grey matter is not darker than white"


def test_fat_lies_between_skin_and_skull_alone() -> None:
    away_mm = np.sqrt(sum((np.indices((90, 90, 90)) - 44.5) ** 2))
    tissue = np.full(away_mm.shape, Tissue.AIR, dtype=np.uint8)
    shells = ((42, Tissue.SKIN), (39, Tissue.SOFT), (30, Tissue.BONE), (25, Tissue.WHITE_MATTER))
    for radius_mm, name in shells:
        tissue[away_mm < radius_mm] = name
    brightest, outer, inner = [], [], []
    for seed in range(12):
        image = np.ones(tissue.shape, dtype=np.float32)
        _scalp_fat(np.random.default_rng(seed), image, tissue)
        changed = image != 1.0
        brightest.append(image.max())
        assert set(np.unique(tissue[changed])) <= {Tissue.SKIN, Tissue.SOFT}
        outer.append(changed[(away_mm >= 41) & (away_mm < 42)].mean())
        inner.append(changed[(away_mm >= 39) & (away_mm < 40)].mean())
    assert sum(value == 1.0 for value in brightest) in range(1, 9), "some heads have none"
    assert max(brightest) > 2.5
    assert np.mean(outer) < 0.7 * np.mean(inner), "skin stays as it is"


def test_lesions_keep_to_the_brain_and_bands_to_the_ventricles() -> None:
    tissue = mni_anatomy().tissue
    distance = ventricle_distance(tissue)
    anatomy = mni_anatomy()
    loads = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        mask = draw_lesions(rng, tissue, anatomy.to_mni_mm, distance, None)
        assert not mask[np.isin(tissue, (Tissue.AIR, Tissue.CSF, Tissue.VENTRICLE))].any()
        loads.append(mask.sum() / 1000.0)
    assert max(loads) > 5.0
    assert min(loads) < 2.0
    band = periventricular(np.random.default_rng(1), distance, tissue) > 0
    assert np.median(distance[band]) < 15.0


def test_confluent_patches_stay_in_white_matter_and_vary_in_load() -> None:
    tissue = mni_anatomy().tissue
    distance = ventricle_distance(tissue)
    white_ml = (tissue == Tissue.WHITE_MATTER).sum() / 1000.0
    loads = []
    for seed in range(6):
        patches = confluent(np.random.default_rng(seed), distance, tissue) > 0
        assert not patches[tissue != Tissue.WHITE_MATTER].any()
        loads.append(patches.sum() / 1000.0)
    assert min(loads) > 0.0
    assert 4.0 < max(loads) < 0.3 * white_ml


def test_drawn_lesions_reach_cortex_only_from_white_matter() -> None:
    """Cortex that no white matter lesion touches must not be taught as lesion."""
    tissue = np.full((20, 12, 12), Tissue.CORTEX, dtype=np.uint8)
    tissue[:8] = Tissue.WHITE_MATTER
    tissue[:, 10:] = Tissue.CSF
    mask = within_hosts(np.ones(tissue.shape, dtype=np.float32), tissue)
    assert mask[:10, :10].all()
    assert not mask[10:].any()
    assert not mask[:, 10:].any()


def test_the_wall_between_the_ventricles_is_no_lesion() -> None:
    tissue = np.full((40, 40, 20), Tissue.WHITE_MATTER, dtype=np.uint8)
    tissue[14:19, 10:30] = Tissue.VENTRICLE
    tissue[21:26, 10:30] = Tissue.VENTRICLE
    wall = (slice(19, 21), slice(14, 26), slice(4, 16))
    distance = ventricle_distance(tissue)
    none = np.zeros(tissue.shape, dtype=np.float32)
    brightness = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        image, reference = paint(rng, tissue, none, distance, np.full((3, 6, 6, 4), 99.0))
        assert not reference.any()
        brightness.append(image[wall].mean() / image[5, 20, 10])
    assert max(brightness) > 1.3, "sometimes as bright as a lesion"
    assert min(brightness) < 1.15


def test_masks_from_mni_space_land_where_they_were_drawn() -> None:
    anatomy = mni_anatomy()
    drawn = np.zeros((182, 218, 182), dtype=bool)
    drawn[100:110, 110:122, 95:105] = True
    affine = np.array([[-1.0, 0, 0, 90], [0, 1, 0, -126], [0, 0, 1, -72], [0, 0, 0, 1]])
    bank = MaskBank((drawn,), np.linalg.inv(affine))
    expected_mm = nib.affines.apply_affine(affine, [104.5, 115.5, 99.5])
    shape = (anatomy.tissue.shape[0], anatomy.tissue.shape[1], anatomy.tissue.shape[2])
    mm = np.stack([upsample(c, shape) for c in anatomy.to_mni_mm])
    laid = bank.draw(np.random.default_rng(2), anatomy.to_mni_mm, shape) > 0
    found_mm = mm[:, laid].mean(axis=1)
    found_mm[0] = np.sign(expected_mm[0]) * abs(found_mm[0])  # mirrored half of the time
    assert np.abs(found_mm - expected_mm).max() < 6.0


def write_mask(
    folder: Path, subject: str, shape: tuple[int, ...] = (16, 17, 4), step_mm: float = 1.0
) -> Path:
    """A lesion mask whose first plane is filled for sub-26 alone."""
    data = np.zeros(shape, dtype=np.uint8)
    data[0] = subject == "sub-26"
    path = folder / f"{subject}_label-WMH_mask.nii.gz"
    nib.save(nib.Nifti1Image(data, np.diag([step_mm, 1.0, 1.0, 1.0])), path)
    return path


def test_masks_of_excluded_subjects_are_not_read(tmp_path: Path) -> None:
    for subject in ("sub-01", "sub-26"):
        write_mask(tmp_path, subject)
    bank = MaskBank.read(tmp_path, exclude=("sub-26",))
    assert len(bank.masks) == 1
    assert not bank.masks[0].any()


def test_excluding_somebody_who_has_no_mask_is_an_error(tmp_path: Path) -> None:
    write_mask(tmp_path, "sub-01")
    with pytest.raises(DataError, match=r"no lesion mask of 26, sub-2 to exclude.*such as sub-01"):
        MaskBank.paths(tmp_path, exclude=("sub-2", "26"))
    for exclude in ((), ("sub-01",)):
        with pytest.raises(DataError, match=r"no lesion mask \(\*_mask\.nii\.gz\) to read"):
            MaskBank.read(tmp_path if exclude else tmp_path / "absent", exclude)


@pytest.mark.parametrize("grid", [{"shape": (16, 18, 4)}, {"step_mm": 1.1}])
def test_lesion_masks_of_different_grids_are_not_mixed(
    tmp_path: Path, grid: dict[str, Any]
) -> None:
    write_mask(tmp_path, "sub-01")
    MaskBank.read(tmp_path)
    path = write_mask(tmp_path, "sub-02", **grid)
    with pytest.raises(DataError) as caught:
        MaskBank.read(tmp_path)
    assert str(caught.value).startswith(f"{path} does not lie on the grid of {tmp_path}")


@pytest.mark.parametrize(("codes", "missing"), [((4, 41), "cerebellum"), ((8, 41), "ventricle")])
def test_label_maps_that_are_no_whole_heads_are_refused(
    tmp_path: Path, codes: tuple[int, int], missing: str
) -> None:
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[4:16, 4:16, 2:10], labels[4:16, 4:16, 10:18] = codes
    path = tmp_path / "half.nii.gz"
    nib.save(nib.Nifti1Image(labels, np.eye(4)), path)
    with pytest.raises(DataError, match=missing) as caught:
        head_anatomy(path)
    assert str(caught.value).startswith(f"{path} has no ")


def test_damaged_masks_and_label_maps_are_named(tmp_path: Path) -> None:
    path = write_mask(tmp_path, "sub-01", shape=(64, 64, 64))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:200] + b"\xff" * 50 + whole[250:]):
        path.write_bytes(content)
        for read in (MaskBank.read, lambda folder: head_anatomy(path)):
            with pytest.raises(DataError, match="compressed data") as caught:
                read(tmp_path)
            assert str(path) in str(caught.value)


def test_slices_average_what_they_cover() -> None:
    painted = np.full((20, 20, 64), 1.0, dtype=np.float32)
    masks = np.zeros((1, 20, 20, 64), dtype=np.float32)
    masks[0, :, :, 20:40] = 1.0
    for seed in range(20):
        scan = acquire(np.random.default_rng(seed), painted, masks, None)
        voxel_ml = abs(np.linalg.det(scan.affine))
        volume = scan.masks.sum() * voxel_ml
        assert scan.masks.shape[1:] == scan.image.shape
        assert volume == pytest.approx(masks.sum(), rel=0.35)


def test_slices_lie_where_their_affine_says() -> None:
    x, y, z = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in (60, 64, 70)), indexing="ij")
    centre_mm = np.array([28.0, 33.0, 36.0])
    away = (x - centre_mm[0]) ** 2 + (y - centre_mm[1]) ** 2 + (z - centre_mm[2]) ** 2
    blob = np.exp(-away / (2 * 8.0**2))[None]  # wide, so that no step between slices misses it
    for seed in range(30):
        scan = acquire(np.random.default_rng(seed), np.ones_like(x), blob, None)
        voxels = ndimage.center_of_mass(scan.masks[0])
        found_mm = nib.affines.apply_affine(scan.affine, voxels)
        assert np.abs(found_mm - centre_mm).max() < 0.2, seed


def test_no_brain_is_cut_off_at_its_sides() -> None:
    for seed in range(8):
        tissue, _ = deform(np.random.default_rng(seed), mni_anatomy())
        for side in (tissue[0], tissue[-1], tissue[:, 0], tissue[:, -1]):
            assert (side == Tissue.AIR).all(), seed


@pytest.mark.parametrize("length", [200, 201])
def test_the_distance_to_the_ventricles_is_right_to_the_end(length: int) -> None:
    tissue = np.full((length, 8, 8), Tissue.WHITE_MATTER, dtype=np.uint8)
    tissue[20:22] = tissue[170:172] = Tissue.VENTRICLE
    distance_mm = ventricle_distance(tissue)[:, 4, 4]
    voxel = np.arange(length)
    before, behind = slice(100, 171), slice(172, length)
    np.testing.assert_allclose(distance_mm[before], 170 - voxel[before], atol=1e-3)
    assert np.abs(distance_mm[behind] - (voxel[behind] - 171)).max() < 1.01  # a voxel of 2 mm


def test_interpolated_slices_lie_between_the_acquired_ones() -> None:
    ramp = np.arange(5, dtype=np.float32)[None, None, :] * np.ones((2, 2, 1), dtype=np.float32)
    finer = _interpolate(ramp, np.arange(0.0, 4.0 + 1e-6, 0.5), 2)
    np.testing.assert_allclose(finer[1, 1], np.arange(0.0, 4.5, 0.5), atol=1e-6)


def test_fields_are_smooth_and_of_unit_spread() -> None:
    rng = np.random.default_rng(0)
    field = smooth_field(rng, (60, 50, 40), 6.0)
    assert field.shape == (60, 50, 40)
    assert 0.4 < field.std() < 1.1
    assert np.abs(np.diff(field, axis=0)).mean() < 0.35 * field.std()


def test_a_t1_lies_on_its_flair_and_leaves_it_as_it_is() -> None:
    """Where the FLAIR's masks say ventricle, the T1 is dark by its own header; around, bright."""
    seed, dark, compared = 3, [], 0
    for number in range(4):
        alone, both = (
            synthesize(np.random.default_rng([seed, number]), mni_anatomy(), None, with_t1=with_t1)
            for with_t1 in (False, True)
        )
        assert alone.t1 is None
        assert both.t1 is not None
        np.testing.assert_array_equal(alone.volume.data, both.volume.data)
        np.testing.assert_array_equal(alone.volume.affine, both.volume.affine)
        to_t1 = np.linalg.inv(both.t1.affine) @ both.volume.affine
        ventricle = both.masks["ventricles"] > 0
        # 4 to 8 mm away lies tissue, mostly white matter
        away_mm = ndimage.distance_transform_edt(~ventricle, sampling=both.volume.spacing_mm)
        around = (away_mm > 4) & (away_mm < 8) & (both.masks["brain"] > 0)
        means = []
        for place in (ventricle, around):
            voxels = np.argwhere(place)
            where = to_t1[:3, :3] @ voxels.T + to_t1[:3, 3:]
            means.append(float(ndimage.map_coordinates(both.t1.data, where, order=1).mean()))
        dark.append(means[0] / means[1])
        compared += len(np.argwhere(ventricle)) > 100
    assert compared == 4
    assert max(dark) < 0.75


def test_the_demo_case_has_lesions() -> None:
    image, affine, reference = demo_case(45)
    assert image.shape == reference.shape
    assert set(np.unique(reference)) <= {0, 1, 2}
    assert (reference == 1).sum() * abs(np.linalg.det(affine[:3, :3])) / 1000.0 > 5.0
