"""The quality checks and the regions on real scans; ``docs/quality.md`` quotes the table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import wmh_lora
from benchmarks.quality import CHANGES
from wmh_lora.quality import check_measures
from wmh_lora.quality_measures import measure_scan
from wmh_lora.volume import Volume

pytestmark = pytest.mark.realdata

CLINICAL = (
    "tabriz/sub-05/anat/sub-05_FLAIR.nii.gz",
    "ljubljana-longitudinal/sub-03/ses-2/anat/sub-03_ses-2_FLAIR.nii.gz",
)


def scans(folder: Path, suffix: str) -> list[Path]:
    return sorted(folder.rglob(f"*_{suffix}.nii.gz"))


def verdicts(volume: Volume) -> dict[str, str]:
    return {check.name: check.verdict for check in check_measures(measure_scan(volume))}


def test_every_flair_passes_what_needs_no_network(shared_data: Path) -> None:
    paths = scans(shared_data, "FLAIR")
    assert len(paths) == 23
    for path in paths:
        assert set(verdicts(Volume.read(path)).values()) == {"pass"}, path


@pytest.mark.parametrize(("suffix", "word"), [("T1w", "T1-weighted"), ("T2w", "T2-weighted")])
def test_every_other_contrast_fails_and_is_named(shared_data: Path, suffix: str, word: str) -> None:
    paths = scans(shared_data, suffix)
    assert len(paths) == 10
    for path in paths:
        contrast = check_measures(measure_scan(Volume.read(path)))[0]
        assert contrast.verdict == "fail", path
        assert word in contrast.sentence, path


@pytest.mark.parametrize("name", sorted(CHANGES))
@pytest.mark.parametrize("scan", CLINICAL)
def test_each_change_trips_its_check(shared_data: Path, scan: str, name: str) -> None:
    volume = Volume.read(shared_data / scan)
    change, check = CHANGES[name]
    changed = replace(volume, data=change(volume, np.random.default_rng(0)))
    assert verdicts(changed)[check] != "pass"


def test_regions_and_quality_of_a_clinical_scan(shared_data: Path) -> None:
    path = shared_data / CLINICAL[0]
    result = wmh_lora.segment(path)
    assert result.quality.verdict == "pass"
    manual = shared_data / "tabriz" / "derivatives" / "manual" / "sub-05" / "anat"
    ventricles = Volume.read(manual / "sub-05_space-orig_label-ventricles_mask.nii.gz").data > 0
    reference_ml = float(ventricles.sum()) * result.volume.voxel_volume_ml
    regions = result.regions
    assert regions.ventricles_ml == pytest.approx(reference_ml, rel=0.3)
    assert regions.icv_ml is not None
    for split in (regions.voxel_distance_10mm, regions.component_contact):
        assert split is not None
        assert split.periventricular_ml + split.deep_ml == pytest.approx(result.volume_ml)
        assert split.periventricular_ml > split.deep_ml


def test_cropped_scan_is_noticed(shared_data: Path) -> None:
    volume = Volume.read(shared_data / CLINICAL[0])
    cropped = Volume(np.ascontiguousarray(volume.data[:, :, :12]), volume.affine)
    result = wmh_lora.segment(cropped)
    check = next(c for c in result.quality.checks if c.name == "field_of_view")
    assert check.verdict == "fail"
    assert "superior" in check.sentence
    assert result.regions.icv_ml is None
