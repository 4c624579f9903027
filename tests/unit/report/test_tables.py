"""The report of one scan and the table of a cohort."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wmh_lora import __version__
from wmh_lora.postprocess import describe_lesions
from wmh_lora.quality import QualityCheck, QualityReport
from wmh_lora.regions import locate_lesions
from wmh_lora.report.tables import (
    COHORT_COLUMNS,
    COHORT_DICTIONARY,
    cohort_row,
    cohort_table,
    failed_row,
    scan_report,
)
from wmh_lora.volume import Volume, write_nifti

SETTINGS = {"threshold": 0.5, "min_voxels": 3, "tta": "none", "device": "cpu"}
MODEL = {"name": "flair-v1", "sha256": "ab" * 32}


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    data = np.random.default_rng(1).random((20, 22, 5)).astype(np.float32)
    path = tmp_path / "sub-01_FLAIR.nii.gz"
    write_nifti(path, data, Volume(data, np.diag([-1.0, 1.0, 5.0, 1.0])))
    return Volume.read(path)


def report(volume: Volume, **changes: Any) -> dict[str, Any]:
    mask = np.zeros(volume.shape, np.uint8)
    mask[2:4, 2:4, 2] = 1
    mask[10, 10, 3] = 1
    values: dict[str, Any] = {
        "volume": volume,
        "lesions": describe_lesions(mask, volume.affine),
        "volume_ml": int(mask.sum()) * volume.voxel_volume_ml,
        "settings": SETTINGS,
        "model": MODEL,
    }
    return scan_report(**{**values, **changes})


def test_report_says_what_was_found_where_and_how(volume: Volume) -> None:
    found = report(volume, warnings=["left and right may be swapped."])
    assert found["file"] == "sub-01_FLAIR.nii.gz"
    assert volume.path is not None
    assert found["file_sha256"] == hashlib.sha256(volume.path.read_bytes()).hexdigest()
    assert found["wmh_volume_ml"] == 0.025
    assert found["lesion_count"] == 2
    assert [lesion["volume_ml"] for lesion in found["lesions"]] == [0.02, 0.005]
    assert found["grid"] == {
        "shape": [20, 22, 5],
        "spacing_mm": [1.0, 1.0, 5.0],
        "orientation": "LAS",
        "voxel_volume_mm3": 5.0,
    }
    assert found["settings"] == SETTINGS
    assert found["model"] == MODEL
    assert found["software"] == {"name": "wmh-lora", "version": __version__}
    assert found["warnings"] == ["left and right may be swapped."]


def test_report_is_json_and_repeatable(volume: Volume) -> None:
    text = json.dumps(report(volume))
    assert text == json.dumps(report(volume))
    assert json.loads(text) == report(volume)


def test_report_of_a_volume_in_memory() -> None:
    found = report(Volume(np.ones((20, 20, 5), np.float32), np.eye(4)))
    assert found["file"] is None
    assert found["file_sha256"] is None
    assert (found["t1_file"], found["t1_sha256"]) == (None, None)


def test_report_names_the_t1_and_not_where_it_lay(volume: Volume, tmp_path: Path) -> None:
    t1 = tmp_path / "sub-01_T1w.nii.gz"
    t1.write_bytes(b"a T1")
    found = report(volume, t1_path=t1, warnings=[f"{t1} covers 70 % of the head."])
    assert found["t1_file"] == t1.name
    assert found["t1_sha256"] == hashlib.sha256(b"a T1").hexdigest()
    assert found["warnings"] == ["sub-01_T1w.nii.gz covers 70 % of the head."]


def test_row_of_a_scan(volume: Volume) -> None:
    row = cohort_row("sub-01", report(volume))
    assert tuple(row) == COHORT_COLUMNS
    assert row["wmh_volume_ml"] == "0.0250"
    assert row["largest_lesion_ml"] == "0.0200"
    assert row["status"] == "done"
    assert row["message"] == "n/a"


def test_report_and_row_tell_regions_and_quality(volume: Volume) -> None:
    assert not {"regions", "quality"} & set(report(volume))
    brain, ventricles, mask = (np.zeros((80, 80, 40), np.uint8) for _ in range(3))
    brain[5:75, 5:75, 5:35] = 1
    ventricles[30:40, 30:40, 15:20] = 1
    mask[40:44, 30, 16] = mask[60:66, 30, 16] = 1
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    found = locate_lesions(mask, affine, {"brain": brain, "ventricles": ventricles})
    checks = [
        QualityCheck("noise", "warn", "It is noisy.", 0.1, {"warn_above": 0.09}),
        QualityCheck("brain", "pass", "It is there.", 1176.0, {}),
    ]
    full = report(volume, regions=found, quality=QualityReport(tuple(checks)))
    assert full["regions"] == found.as_dict()
    assert full["quality"]["verdict"] == "warn"
    row = cohort_row("sub-01", json.loads(json.dumps(full)))
    assert row["icv_ml"] == "1176.0"
    assert row["wmh_percent_icv"] == f"{100 * 0.08 / 1176:.4f}"
    assert (row["periventricular_ml"], row["deep_ml"]) == ("0.0320", "0.0480")
    assert (row["quality"], row["quality_concerns"]) == ("warn", "noise")
    unknown = cohort_row("sub-01", report(volume, regions=locate_lesions(mask, affine, {})))
    assert (unknown["icv_ml"], unknown["deep_ml"], unknown["quality"]) == ("n/a", "n/a", "n/a")


def test_every_column_is_explained() -> None:
    assert tuple(COHORT_DICTIONARY) == COHORT_COLUMNS
    assert all(entry["Description"] for entry in COHORT_DICTIONARY.values())
    json.dumps(dict(COHORT_DICTIONARY))


def test_row_of_a_scan_without_lesions(volume: Volume) -> None:
    row = cohort_row("sub-01", report(volume, lesions=[], volume_ml=0.0))
    assert (row["lesion_count"], row["largest_lesion_ml"]) == ("0", "0.0000")


def test_table_keeps_one_line_a_scan_whatever_a_message_holds() -> None:
    rows = [
        failed_row("a", "a.nii", "two\nlines\tand a tab"),
        failed_row("b", "b.nii", 'a "quote"'),
    ]
    lines = cohort_table(rows).splitlines()
    assert lines[0].split("\t") == list(COHORT_COLUMNS)
    assert len(lines) == 3
    assert all(len(line.split("\t")) == len(COHORT_COLUMNS) for line in lines)
    assert "two lines and a tab" in lines[1]
