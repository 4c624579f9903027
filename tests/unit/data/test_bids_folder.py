"""Masks of a BIDS folder belong to one scan each."""

from __future__ import annotations

from pathlib import Path

import pytest

from wmh_lora.data.bids_folder import bids_images, bids_masks
from wmh_lora.errors import DataError


def _touch(root: Path, *places: str) -> None:
    for place in places:
        path = root / f"{place}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def _masks(root: Path) -> dict[str, list[str]]:
    return {
        image.name: [path.name for _, path in bids_masks(root, image)]
        for image in bids_images(root)
    }


def test_a_mask_has_the_name_of_its_scan_or_of_a_subject_with_one(tmp_path: Path) -> None:
    manual = "derivatives/manual"
    _touch(
        tmp_path,
        "sub-01/anat/sub-01_FLAIR",
        f"{manual}/sub-01/anat/sub-01_space-orig_label-WMH_mask",
        "sub-02/anat/sub-02_acq-3D_FLAIR",
        f"{manual}/sub-02/anat/sub-02_space-orig_label-WMH_mask",
        "sub-03/anat/sub-03_run-1_FLAIR",
        "sub-03/anat/sub-03_run-2_FLAIR",
        f"{manual}/sub-03/anat/sub-03_run-2_space-orig_label-WMH_mask",
        f"{manual}/sub-03/anat/sub-03_space-orig_label-WMH_mask",
    )
    assert _masks(tmp_path) == {
        "sub-01_FLAIR.nii.gz": ["sub-01_space-orig_label-WMH_mask.nii.gz"],
        "sub-02_acq-3D_FLAIR.nii.gz": ["sub-02_space-orig_label-WMH_mask.nii.gz"],
        "sub-03_run-1_FLAIR.nii.gz": [],
        "sub-03_run-2_FLAIR.nii.gz": ["sub-03_run-2_space-orig_label-WMH_mask.nii.gz"],
    }


def test_sessions_are_refused_rather_than_left_out(tmp_path: Path) -> None:
    _touch(tmp_path, "sub-01/anat/sub-01_FLAIR", "sub-02/ses-1/anat/sub-02_ses-1_FLAIR")
    with pytest.raises(DataError, match=r"sub-02_ses-1_FLAIR.*data prepare"):
        bids_images(tmp_path)
