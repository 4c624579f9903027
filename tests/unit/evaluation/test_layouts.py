"""Layouts of cohorts on trees that the tests write; files are never opened, so they are empty."""

from __future__ import annotations

from pathlib import Path

import pytest

from wmh_lora.errors import ConfigError, DataError
from wmh_lora.evaluation.layouts import LAYOUTS, Kind, find_scans, find_scans_and_rest


def tree(root: Path, *places: str) -> Path:
    for place in places:
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def names(root: Path, kind: Kind = "mask", layout: str = "auto") -> list[str]:
    return [scan.name for scan in find_scans(root, kind, layout)]


def test_bids_derivatives(tmp_path: Path) -> None:
    tree(
        tmp_path,
        "sub-01/ses-1/anat/sub-01_ses-1_space-orig_label-WMH_mask.nii.gz",
        "sub-01/ses-2/anat/sub-01_ses-2_run-2_label-lesion_desc-manual_mask.nii",
        "sub-02/anat/sub-02_space-orig_label-WMH_probseg.nii.gz",
        "sub-02/anat/sub-02_space-orig_label-brain_mask.nii.gz",
        "sub-02/anat/sub-02_desc-brain_mask.nii.gz",
        "sub-02/anat/sub-02_FLAIR.nii.gz",
        ".hidden/sub-03_mask.nii.gz",
    )
    assert names(tmp_path) == ["01_1", "01_2_run-2"]
    assert names(tmp_path, "image") == ["02"]


def test_challenge_tree(tmp_path: Path) -> None:
    tree(
        tmp_path,
        "training/Utrecht/0/wmh.nii.gz",
        "training/Utrecht/0/pre/FLAIR.nii.gz",
        "training/Utrecht/0/pre/T1.nii.gz",
        "test/Amsterdam/GE3T/101/wmh.nii.gz",
        "additional_annotations/observer_o3/training/Utrecht/0/result.nii.gz",
    )
    found = find_scans(tmp_path, "mask")
    assert [(s.site, s.subject) for s in found] == [("Amsterdam/GE3T", "101"), ("Utrecht", "0")]
    assert names(tmp_path, "image") == ["Utrecht/0"]


@pytest.mark.parametrize(
    "place",
    ["Utrecht/0/result.nii.gz", "Utrecht/0/pre/FLAIR_space-orig_label-WMH_mask.nii.gz"],
)
def test_predictions_of_the_challenge(tmp_path: Path, place: str) -> None:
    assert names(tree(tmp_path, place)) == ["Utrecht/0"]


def test_masks_that_a_layout_does_not_know_are_told(tmp_path: Path) -> None:
    tree(
        tmp_path,
        "sub-01_mask.nii.gz",
        "P02_mask.nii.gz",
        "sub-01_label-ventricles_mask.nii.gz",
        "sub-01_desc-aparcaseg_dseg.nii.gz",
        "sub-01_space-halfway_desc-change_dseg.nii.gz",
        "P02_FLAIR.nii.gz",
    )
    scans, rest = find_scans_and_rest(tmp_path, "mask")
    assert [scan.name for scan in scans] == ["01"]
    assert rest == [tmp_path / "P02_mask.nii.gz"]


def test_two_files_of_one_scan_are_refused(tmp_path: Path) -> None:
    tree(tmp_path, "sub-01_mask.nii", "sub-01_mask.nii.gz", "sub-02_mask.nii.gz")
    with pytest.raises(DataError, match="are files of one scan"):
        find_scans(tmp_path, "mask")


def test_uk_biobank(tmp_path: Path) -> None:
    folder = "1000001_20253_2_0/T2_FLAIR"
    tree(
        tmp_path,
        f"{folder}/lesions/final_mask.nii.gz",
        f"{folder}/lesions/final_prob.nii.gz",
        f"{folder}/T2_FLAIR.nii.gz",
        f"{folder}/T2_FLAIR_brain.nii.gz",
        "1000001_20253_3_0/T2_FLAIR/T2_space-orig_label-WMH_mask.nii.gz",
    )
    found = find_scans(tmp_path, "mask")
    assert [(s.subject, s.session) for s in found] == [("1000001", "2"), ("1000001", "3")]
    assert names(tmp_path, "image") == ["1000001_2_0"]


def test_adni_as_loni_serves_it(tmp_path: Path) -> None:
    series = "ADNI/002_S_0413/Sagittal_3D_FLAIR/2019-08-27_09_39_37.0/I1221051"
    tree(
        tmp_path,
        f"{series}/ADNI_002_S_0413_MR_Sagittal_3D_FLAIR_Br_20190828_S8_I1221051.nii",
        "ADNI/002_S_0413/Accelerated_MPRAGE/2019-08-27_09_39_37.0/I1221052/ADNI_I1221052.nii",
        "out/ADNI_002_S_0413_MR_3D_FLAIR_Br_2019_S8_I1221051_space-orig_label-WMH_mask.nii.gz",
    )
    (image,) = find_scans(tmp_path, "image")
    assert (image.subject, image.session, image.scan, image.site) == (
        "002_S_0413",
        "2019-08-27",
        "I1221051",
        "002",
    )
    (mask,) = find_scans(tmp_path, "mask")
    assert (mask.subject, mask.scan) == (image.subject, image.scan)


def test_flat_folder_of_pairs(tmp_path: Path) -> None:
    tree(tmp_path, "a_FLAIR.nii.gz", "a_mask.nii.gz", "b_FLAIR.nii.gz", "b_FLAIR_seg.nii.gz")
    assert names(tmp_path) == ["a", "b"]
    assert names(tmp_path, "image") == ["a", "b"]


def test_flat_folders_with_one_file_name(tmp_path: Path) -> None:
    tree(tmp_path, "p1/mask.nii", "p1/FLAIR.nii", "p2/FLAIR_space-orig_label-WMH_mask.nii.gz")
    assert names(tmp_path, "mask", "flat") == ["p1", "p2"]


def test_flat_masks_without_any_mark(tmp_path: Path) -> None:
    assert names(tree(tmp_path, "case1.nii.gz", "case2.mgz", "notes.txt")) == ["case1", "case2"]


def test_links_in_circles_end(tmp_path: Path) -> None:
    tree(tmp_path, "a_mask.nii.gz")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert names(tmp_path) == ["a"]


def test_an_empty_folder_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No WMH mask found") as caught:
        find_scans(tmp_path, "mask")
    assert all(layout.summary in str(caught.value) for layout in LAYOUTS)


def test_unknown_layout(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bids"):
        find_scans(tmp_path, "mask", "oasis")
