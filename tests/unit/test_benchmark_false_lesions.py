"""False voxels are told apart by where they lie, and none is counted twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.false_lesions import FIGURES, PLACES, divide, main
from tests.phantoms import brightness_model, head
from wmh_lora.volume import write_nifti


def test_every_false_voxel_has_one_place() -> None:
    shape = (80, 80, 3)
    brain = np.zeros(shape, dtype=np.bool_)
    brain[10:70, 10:70] = True
    ventricles, lesion, false = (np.zeros(shape, dtype=np.bool_) for _ in range(3))
    ventricles[38:42, 38:42, 1] = True
    lesion[28:31, 28:31, 1] = True
    expected = {
        "around a lesion": (32, 30, 1),
        "near the ventricles": (46, 40, 1),
        "at the surface": (2, 40, 1),  # outside the brain
        "elsewhere": (30, 50, 1),
    }
    for place in expected.values():
        false[place] = True
    false[44, 40, 2] = True  # the next slice is 7 mm away: not near
    parts = dict(zip(PLACES, divide(false, lesion, ventricles, brain, (1.0, 1.0, 7.0))))
    np.testing.assert_array_equal(sum(part.astype(int) for part in parts.values()), false)
    for name, place in expected.items():
        assert parts[name][place]
    assert parts["elsewhere"][44, 40, 2]


def test_other_pathology_is_neither_marked_nor_false(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    volume, mask = head()
    ventricles = ((volume.data > 40) & (volume.data < 80)).astype(np.uint8)
    drawn = {"sub-1": mask, "sub-2": 2 * mask, "sub-3": 0 * mask}  # the last drew nothing
    for subject, lesion in drawn.items():
        anat = tmp_path / subject / "anat"
        manual = tmp_path / "derivatives" / "manual" / subject / "anat"
        anat.mkdir(parents=True)
        manual.mkdir(parents=True)
        write_nifti(anat / f"{subject}_FLAIR.nii.gz", volume.data, volume)
        labels = {"WMH": lesion, "ventricles": ventricles, "brain": np.ones_like(mask)}
        for name, data in labels.items():
            write_nifti(manual / f"{subject}_space-orig_label-{name}_mask.nii.gz", data, volume)
    monkeypatch.setattr("benchmarks.false_lesions.load_model", lambda name: brightness_model())
    main(["--data", str(tmp_path)])
    scans = json.loads(capsys.readouterr().out)["scans_ml"]
    found_ml = round(int(mask.sum()) * volume.voxel_volume_ml, 2)
    false_ml = {name: sum(scan[place] for place in PLACES) for name, scan in scans.items()}
    assert {scan["found"] for scan in scans.values()} == {found_ml}
    assert {name: scan[FIGURES[0]] for name, scan in scans.items()} == {
        "sub-1": found_ml,
        "sub-2": 0.0,
        "sub-3": 0.0,
    }
    assert false_ml == {"sub-1": 0.0, "sub-2": 0.0, "sub-3": pytest.approx(found_ml, abs=0.02)}
