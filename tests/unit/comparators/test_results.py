from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from wmh_lora.comparators.results import (
    FoldResult,
    ScoredScan,
    case_of,
    read_result,
    write_result,
)
from wmh_lora.data.manifest import Manifest, Scan
from wmh_lora.errors import DataError
from wmh_lora.evaluation.metrics import ChallengeMetrics
from wmh_lora.training.records import finite

METRICS = ChallengeMetrics(0.5, math.nan, 3.0, 1.0, 0.5, 0.25, 0.5, 0.5, 2.0, 1.5, 3, 4)
RESULT = FoldResult(
    fold="fold-1",
    method="unetr",
    parameters=1200,
    members=2,
    steps=(30, 31),
    training_seconds=59.5,
    threshold=0.45,
    min_voxels=5,
    validation_dice=0.61,
    note="",
    scans=(ScoredScan("01", "masks/unetr/01_mask.nii.gz", 2.5, finite(METRICS.to_dict())),),
)
SCAN = Scan(
    subject="01",
    session="",
    run="",
    site="here",
    usable=True,
    image="01_FLAIR.nii.gz",
    image_sha256="",
    mask="01_mask.nii.gz",
    mask_sha256="",
    shape=None,
    spacing_mm=None,
    reference_ml=None,
    ignored_ml=None,
    labels=(0, 1),
    problems=(),
)


def test_a_result_comes_back_from_its_file(tmp_path: Path) -> None:
    write_result(RESULT, tmp_path / "result.json")
    assert read_result(tmp_path / "result.json") == RESULT
    write_result(replace(RESULT, members=3), tmp_path / "result.json")
    assert read_result(tmp_path / "result.json").members == 3


@pytest.mark.parametrize("text", ["", "[]", '{"format": 9}', '{"format": 1, "fold": "a"}'])
def test_a_damaged_result_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"result\.json.*--resume"):
        read_result(path)


def test_a_stored_scan_becomes_a_case_again(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path / "scans", "flat", (SCAN,))
    case = case_of("unetr", RESULT.scans[0], tmp_path / "out", manifest)
    assert case.pair.subject_key == "here/01"
    assert case.pair.prediction.path == tmp_path / "out" / "masks" / "unetr" / "01_mask.nii.gz"
    assert case.pair.reference.path == tmp_path / "scans" / "01_mask.nii.gz"
    assert math.isnan(case.metrics.hd95_mm)
    assert finite(case.metrics.to_dict()) == finite(METRICS.to_dict())
    with pytest.raises(DataError, match="no scan 01"):
        case_of("unetr", RESULT.scans[0], tmp_path, replace(manifest, scans=()))
