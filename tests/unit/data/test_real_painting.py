"""Lesions painted into a scan: where they were asked for, as bright as its own, nowhere else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from wmh_lora.config import PreprocessConfig
from wmh_lora.data import anatomy_cache
from wmh_lora.data.anatomy import Tissue, mni_anatomy
from wmh_lora.data.dataset import DataConfig, TrainingStream
from wmh_lora.data.lesions import draw_lesions, ventricle_distance
from wmh_lora.data.real_painting import RealAnatomy, paint_lesions, real_anatomy
from wmh_lora.data.synthesis import IGNORED, STRUCTURES, Case, synthesize
from wmh_lora.errors import ConfigError
from wmh_lora.evaluation.metrics import dice
from wmh_lora.volume import write_nifti

SEED = 3


@pytest.fixture(scope="module")
def case() -> Case:
    """A scan of thick slices with some lesions, whose every structure is known."""
    for seed in range(SEED, 100):
        made = synthesize(np.random.default_rng(seed), mni_anatomy(), None)
        thick = 3.0 < max(made.volume.spacing_mm) < 7.0
        lesion_ml = made.masks["wmh"].sum() * made.volume.voxel_volume_ml
        if thick and 1.0 < lesion_ml < 20.0:
            return made
    raise AssertionError("no such scan in a hundred")


@pytest.fixture(scope="module")
def anatomy(case: Case) -> RealAnatomy:
    """What it shows."""
    found = real_anatomy(case)
    assert found is not None
    return found


def on_the_scan(mask: np.ndarray, anatomy: RealAnatomy, case: Case) -> np.ndarray:
    """Sample a mask on the anatomy's grid at the middle of the scan's voxels."""
    inner = case.volume.data[anatomy.box].shape
    sampled = ndimage.affine_transform(
        mask.astype(np.float32), anatomy.from_box[:3, :3], anatomy.from_box[:3, 3], inner, order=1
    )
    whole = np.zeros(case.volume.shape, np.bool_)
    whole[anatomy.box] = sampled > 0.5
    return whole


def test_structures_keep_their_place_on_the_grid_of_the_anatomy(
    case: Case, anatomy: RealAnatomy
) -> None:
    ventricles = on_the_scan(anatomy.tissue == Tissue.VENTRICLE, anatomy, case)
    assert dice(case.masks["ventricles"] > 0, ventricles) > 0.85
    brain = on_the_scan(anatomy.tissue != Tissue.AIR, anatomy, case)
    assert dice(case.masks["brain"] > 0, brain) > 0.95


def test_white_matter_is_told_from_cortex_by_brightness(case: Case, anatomy: RealAnatomy) -> None:
    white = on_the_scan(anatomy.tissue == Tissue.WHITE_MATTER, anatomy, case)
    cortex = on_the_scan(anatomy.tissue == Tissue.CORTEX, anatomy, case)
    assert white.sum() * case.volume.voxel_volume_ml > 100.0
    plain = white & (case.masks["wmh"] == 0)
    assert np.median(case.volume.data[plain]) < np.median(case.volume.data[cortex])


def test_ventricles_lie_where_the_template_has_them(anatomy: RealAnatomy) -> None:
    here = np.argwhere(anatomy.tissue == Tissue.VENTRICLE).mean(axis=0)
    nodes = (
        here / (np.array(anatomy.tissue.shape) - 1) * (np.array(anatomy.to_mni_mm.shape[1:]) - 1)
    )
    found_mm = [ndimage.map_coordinates(c, nodes[:, None], order=1)[0] for c in anatomy.to_mni_mm]
    template = mni_anatomy()
    there = np.argwhere(template.tissue == Tissue.VENTRICLE).mean(axis=0)
    expected_mm = there + template.to_mni_mm[:, 0, 0, 0]
    np.testing.assert_allclose(found_mm, expected_mm, atol=6.0)


def drawn(anatomy: RealAnatomy, seed: int) -> np.ndarray:
    """Vascular lesions in this anatomy."""
    rng = np.random.default_rng(seed)
    distance_mm = ventricle_distance(anatomy.tissue)
    return draw_lesions(rng, anatomy.tissue, anatomy.to_mni_mm, distance_mm, None)


def test_a_painted_scan_differs_only_where_lesions_were_painted(
    case: Case, anatomy: RealAnatomy
) -> None:
    lesions = drawn(anatomy, 5)
    painted = paint_lesions(np.random.default_rng(1), case, anatomy, lesions)
    again = paint_lesions(np.random.default_rng(1), case, anatomy, lesions)
    np.testing.assert_array_equal(painted.volume.data, again.volume.data)

    changed = painted.volume.data != case.volume.data
    own = (case.masks["wmh"] > 0) | (case.masks[IGNORED] > 0)
    assert changed.any()
    assert not changed[own].any(), "the scan's own lesions stay as they are"
    assert not changed[case.masks["brain"] == 0].any()
    assert not changed[case.masks["ventricles"] > 0].any()
    assert (painted.volume.data >= case.volume.data).all(), "lesions are bright"
    far_mm = ndimage.distance_transform_edt(lesions == 0)
    near = on_the_scan(far_mm < 12.0, anatomy, case)
    # a slice of several millimetres holds lesions whose middle lies in its neighbour
    apart = painted.volume.data[~near], case.volume.data[~near]
    np.testing.assert_allclose(*apart, rtol=1e-3, atol=1e-6)  # white matter is about 1


def test_labels_grow_by_what_can_be_seen(case: Case, anatomy: RealAnatomy) -> None:
    painted = paint_lesions(np.random.default_rng(1), case, anatomy, drawn(anatomy, 8))
    new = (painted.masks["wmh"] > 0) & (case.masks["wmh"] == 0)
    assert new.sum() * case.volume.voxel_volume_ml > 1.0
    assert (painted.masks["wmh"] >= case.masks["wmh"]).all()
    assert (painted.masks[IGNORED] >= case.masks[IGNORED]).all()
    assert not ((painted.masks[IGNORED] > 0) & new).any()
    before, after = case.volume.data[new], painted.volume.data[new]
    own = case.volume.data[case.masks["wmh"] > 0]
    assert np.median(after) > 1.1 * np.median(before)
    assert 0.6 < np.median(after) / np.median(own) < 1.6, "about as bright as the scan's own"
    for name in ("brain", "ventricles"):
        np.testing.assert_array_equal(painted.masks[name], case.masks[name])


def test_no_lesions_change_nothing(case: Case, anatomy: RealAnatomy) -> None:
    none = np.zeros(anatomy.tissue.shape, np.float32)
    assert paint_lesions(np.random.default_rng(1), case, anatomy, none) is case


def test_a_stored_anatomy_is_the_same(anatomy: RealAnatomy, tmp_path: Path) -> None:
    anatomy.save(tmp_path / "scan.npz")
    loaded = RealAnatomy.load(tmp_path / "scan.npz")
    assert loaded.box == anatomy.box
    np.testing.assert_array_equal(loaded.tissue, anatomy.tissue)
    np.testing.assert_array_equal(loaded.to_mni_mm, anatomy.to_mni_mm)
    np.testing.assert_array_equal(loaded.from_box, anatomy.from_box)


@pytest.mark.parametrize("missing", ["brain", "ventricles", "wmh"])
def test_without_a_structure_there_is_no_anatomy(case: Case, missing: str) -> None:
    masks = {name: mask for name, mask in case.masks.items() if name != missing}
    assert real_anatomy(replace(case, masks=masks)) is None


def test_empty_structures_and_darkness_make_no_anatomy(case: Case) -> None:
    none = np.zeros_like(case.masks["brain"])
    assert real_anatomy(replace(case, masks=case.masks | {"ventricles": none})) is None
    assert real_anatomy(replace(case, masks=case.masks | {"brain": none})) is None
    little = none.copy()
    little[tuple(n // 2 for n in none.shape)] = 1.0
    assert real_anatomy(replace(case, masks=case.masks | {"brain": little})) is None


def bids_folder(case: Case, root: Path) -> Path:
    """A BIDS folder of this one labelled scan."""
    anat = root / "sub-01" / "anat"
    manual = root / "derivatives" / "manual" / "sub-01" / "anat"
    for folder in (anat, manual):
        folder.mkdir(parents=True)
    write_nifti(anat / "sub-01_FLAIR.nii.gz", case.volume.data, case.volume)
    labels = {name: case.masks[name].astype(np.uint8) for name in ("ventricles", "brain")}
    for name, mask in {"WMH": case.lesion_labels, **labels}.items():
        write_nifti(manual / f"sub-01_space-orig_label-{name}_mask.nii.gz", mask, case.volume)
    return root


def test_a_stream_paints_into_its_share_of_scans_and_keeps_their_anatomy(
    case: Case, anatomy: RealAnatomy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, cache = bids_folder(case, tmp_path / "scans"), tmp_path / "cache"
    asked = []

    def known(read: Case) -> RealAnatomy:
        asked.append(read)
        return anatomy

    monkeypatch.setattr(anatomy_cache, "real_anatomy", known)

    def stream(share: float) -> TrainingStream:
        config = DataConfig(
            root=str(root),
            real=(".",),
            lanes=1,
            real_lanes=1,
            crops_per_scan=1,
            cache=str(cache),
            painted_share=share,
            extracted_share=0.0,
            lesion_share=1.0,
        )
        made = TrainingStream(config, 7, 0, PreprocessConfig(pixel_size_mm=2.0), STRUCTURES)
        made.prepare()
        return made

    plain = stream(0.0)
    assert not cache.exists(), "anatomies are made only where they are asked for"
    painted = stream(1.0)
    assert len(list(cache.glob("scan-*.npz"))) == 1
    lesion_px = {
        name: sum(float(np.nansum(made.item(i).target[0])) for i in range(6))
        for name, made in (("plain", plain), ("painted", painted))
    }
    assert lesion_px["painted"] > 1.5 * lesion_px["plain"]
    again = stream(1.0)
    assert len(asked) == 1, "made once for a scan and its masks"
    np.testing.assert_array_equal(asked[0].masks["wmh"], case.masks["wmh"])
    np.testing.assert_array_equal(again.item(2).image, painted.item(2).image)


def test_painting_needs_a_place_for_anatomies() -> None:
    with pytest.raises(ConfigError, match=r"painted_share.*data\.cache"):
        DataConfig(real=("scans",), real_lanes=1, painted_share=0.5)
    with pytest.raises(ConfigError, match=r"painted_share = 1\.5"):
        DataConfig(real=("scans",), real_lanes=1, painted_share=1.5, cache="cache")
