"""Which scans a tuning uses."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from wmh_lora.errors import ConfigError, DataError
from wmh_lora.training.settings import RunConfig, ValidationCase
from wmh_lora.training.tune_cases import TuningCase, cases_of_folders, cases_of_run


def _touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_of_a_run(tmp_path: Path) -> None:
    flair, mask = _touch(tmp_path / "a/sub-1_FLAIR.nii.gz"), _touch(tmp_path / "a/mask.nii.gz")
    config = RunConfig(
        data={"root": str(tmp_path)},
        validation=(
            ValidationCase("a/sub-1_FLAIR.nii.gz", "a/mask.nii.gz", stride=5),
            ValidationCase("a/sub-1_FLAIR.nii.gz", name="sub-2_ses-b"),
            ValidationCase("a/sub-1_FLAIR.nii.gz", name="sub-3_run-2", subject="sub-3"),
        ),
    )
    assert cases_of_run(config) == [
        TuningCase("sub-1", "sub-1", flair, mask),
        TuningCase("sub-2_ses-b", "sub-2", flair, None),
        TuningCase("sub-3_run-2", "sub-3", flair, None),
    ]
    mask.unlink()
    with pytest.raises(ConfigError, match=r"mask\.nii\.gz.*--data-root"):
        cases_of_run(config)


def test_of_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images, masks = tmp_path / "images", tmp_path / "masks"
    for name in ("sub-1_ses-a", "sub-1_ses-b", "sub-2"):
        _touch(images / f"{name}_FLAIR.nii.gz")
        if name != "sub-2":
            _touch(masks / f"{name}_label-WMH_mask.nii.gz")
    with caplog.at_level(logging.WARNING, "wmh_lora"):
        cases = cases_of_folders(images, masks)
    assert [(case.image.name, case.subject) for case in cases] == [
        ("sub-1_ses-a_FLAIR.nii.gz", "1"),
        ("sub-1_ses-b_FLAIR.nii.gz", "1"),
    ]
    assert "sub-2_FLAIR" in caplog.text
    (masks / "sub-1_ses-a_label-WMH_mask.nii.gz").unlink()
    (masks / "sub-1_ses-b_label-WMH_mask.nii.gz").rename(masks / "sub-9_mask.nii.gz")
    with pytest.raises(DataError, match=r"belongs.*'1_a', '1_b', '2' and '9'"):
        cases_of_folders(images, masks)
    for rater in ("a", "b"):
        _touch(masks / f"sub-2_desc-{rater}_mask.nii.gz")
    (masks / "sub-9_mask.nii.gz").unlink()
    with pytest.raises(DataError, match="several files for one scan"):
        cases_of_folders(images, masks)
