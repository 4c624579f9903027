"""Means by lesion load, and known lesions found again at other slices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from benchmarks.painted import LEAST_SEEN, VASCULAR_ML, by_load, measure_scans, vascular
from wmh_lora.data.anatomy import mni_anatomy
from wmh_lora.data.real_painting import real_anatomy
from wmh_lora.data.synthesis import synthesize
from wmh_lora.engine import WMHInferenceEngine
from wmh_lora.evaluation.metrics import evaluate
from wmh_lora.volume import Volume, write_nifti


def test_scans_are_averaged_within_bands_of_load() -> None:
    lesion = np.zeros((20, 20, 20), np.uint8)
    lesion[5:10, 5:10, 5:10] = 1
    found = lesion.copy()
    found[5] = 0
    little = evaluate(lesion, lesion, (1.0, 1.0, 1.0))
    some, more = (
        replace(evaluate(lesion, found, (1.0, 1.0, 1.0)), reference_ml=ml) for ml in (5.0, 19.0)
    )
    bands = by_load([little, some, more])
    assert list(bands) == ["0 to 5 mL", "5 to 20 mL", "all"]
    assert bands["0 to 5 mL"] == {
        "scans": 1,
        "dice": 1.0,
        "lesion_f1": 1.0,
        "lesion_recall": 1.0,
        "recall": 1.0,
        "precision": 1.0,
        "found_ml": pytest.approx(0.125),
        "reference_ml": pytest.approx(0.125),
    }
    assert bands["5 to 20 mL"]["recall"] == pytest.approx(0.8)
    assert bands["all"]["scans"] == 3
    assert bands["all"]["recall"] == pytest.approx((1.0 + 0.8 + 0.8) / 3)


@pytest.mark.parametrize(("slices", "volume_ml"), [(1, 0.128), (4, 0.128)])
def test_scans_and_labels_are_averaged_alike(tmp_path: Path, slices: int, volume_ml: float) -> None:
    labels = np.zeros((16, 16, 16), np.uint8)
    labels[4:8, 4:8, 4:12] = 1
    labels[10:12, 4:8, 4:12] = 2
    scan = Volume((labels > 0).astype(np.float32) + 1.0, np.eye(4))
    write_nifti(tmp_path / "a_FLAIR.nii.gz", scan.data, scan)
    write_nifti(tmp_path / "a_label-WMH_mask.nii.gz", labels, scan)
    shown = []

    def segment(volume: Volume, *, zoom: float | None) -> Any:
        assert zoom == 1.0
        shown.append(volume)
        return SimpleNamespace(mask=(volume.data > 1.5).astype(np.uint8))

    engine = cast(WMHInferenceEngine, SimpleNamespace(segment=segment))
    (scores,) = measure_scans(engine, tmp_path, ["a"], slices, zoom=1.0)
    assert shown[0].spacing_mm == (1.0, 1.0, float(slices))
    assert shown[0].shape == (16, 16, 16 // slices)
    assert scores.dice == 1.0, "what is too faint to tell counts neither way"
    assert scores.reference_ml == pytest.approx(volume_ml)


def test_what_lies_outside_the_brain_is_not_shown_and_not_averaged_in(tmp_path: Path) -> None:
    labels = np.zeros((16, 16, 8), np.uint8)
    labels[3:5, 3:5, 3:5] = 1
    scan = Volume(np.full((16, 16, 8), 2.0, np.float32), np.eye(4))
    scan.data[0] = 5.0
    write_nifti(tmp_path / "a_FLAIR.nii.gz", scan.data, scan)
    write_nifti(tmp_path / "a_label-WMH_mask.nii.gz", labels, scan)
    brain = np.zeros((16, 16, 8), np.bool_)
    brain[2:6, 2:6, 1:7] = True
    shown = []

    def segment(volume: Volume, *, zoom: float | None) -> Any:
        shown.append(volume)
        return SimpleNamespace(mask=np.ones(volume.shape, np.uint8))

    engine = cast(WMHInferenceEngine, SimpleNamespace(segment=segment))
    list(measure_scans(engine, tmp_path, ["a"], 2, brain=brain))
    inside = shown[0].data[2:6, 2:6]
    np.testing.assert_array_equal(inside, np.broadcast_to([1.0, 2.0, 2.0, 1.0], (4, 4, 4)))
    assert shown[0].data.sum() == inside.sum()


def test_vascular_patterns_are_large_seen_and_the_same_again() -> None:
    made = synthesize(np.random.default_rng(3), mni_anatomy(), None)
    none = {"wmh": np.zeros(made.volume.shape, np.float32)}
    case = replace(made, masks={**made.masks, **none})
    anatomy = real_anatomy(case)
    assert anatomy is not None
    painted = vascular(np.random.default_rng(1), case, anatomy)
    added_ml = painted.masks["wmh"].sum() * case.volume.voxel_volume_ml
    assert LEAST_SEEN * VASCULAR_ML[0] <= added_ml <= VASCULAR_ML[1]
    seen = painted.masks["wmh"] > 0
    assert np.median(painted.volume.data[seen] - case.volume.data[seen]) > 0
    again = vascular(np.random.default_rng(1), case, anatomy)
    np.testing.assert_array_equal(painted.volume.data, again.volume.data)
