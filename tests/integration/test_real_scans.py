"""The packaged model on real scans that it was not trained on, and what it costs to run it."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import wmh_lora
from tests.unit.test_preprocess import all_axis_codes, stored_as
from wmh_lora.evaluation.metrics import ChallengeMetrics, evaluate
from wmh_lora.volume import Volume, write_nifti

pytestmark = pytest.mark.realdata


def _scores_of_validation_scan(
    shared_data: Path, *, with_t1: bool = False, model: str = "default"
) -> ChallengeMetrics:
    folder = shared_data / "ljubljana"
    manual = folder / "derivatives" / "manual" / "sub-26" / "anat"
    reference = Volume.read(manual / "sub-26_space-orig_label-WMH_mask.nii.gz")
    scan = folder / "sub-26" / "anat" / "sub-26_FLAIR.nii.gz"
    t1 = scan.with_name("sub-26_T1w.nii.gz") if with_t1 else None
    result = wmh_lora.segment(scan, model=model, t1=t1)
    assert result.settings["t1"] is with_t1
    return evaluate(reference.data, result.mask, reference.spacing_mm)


# The least Dice on the validation scan, and the most mL where there is nothing, of each model.
@pytest.mark.parametrize(("model", "least"), [("flair-compact-v1", 0.78), ("flair-v1", 0.72)])
def test_validation_scan(shared_data: Path, model: str, least: float) -> None:
    scores = _scores_of_validation_scan(shared_data, model=model)
    print(f"\nsub-26, {model}: {scores}")  # noqa: T201 -- documentation quotes the figure
    assert scores.dice >= least


def test_a_t1_beside_the_validation_scan_does_no_harm(shared_data: Path) -> None:
    scores = _scores_of_validation_scan(shared_data, with_t1=True)
    print(f"\nsub-26 with T1: {scores}")  # noqa: T201 -- documentation quotes the figure
    assert scores.dice >= 0.78


@pytest.mark.parametrize(("model", "most_ml"), [("flair-compact-v1", 0.5), ("flair-v1", 0.5)])
def test_little_is_found_where_there_is_nothing(
    shared_data: Path, model: str, most_ml: float
) -> None:
    result = wmh_lora.segment(shared_data / "healthy" / "sub-01_FLAIR.nii.gz", model=model)
    print(f"\nhealthy, {model}: {result.volume_ml:.2f} mL found")  # noqa: T201 -- documentation quotes the figure
    assert result.volume_ml < most_ml


def test_every_orientation_gives_the_same_mask(shared_data: Path) -> None:
    volume = Volume.read(shared_data / "tabriz" / "sub-03" / "anat" / "sub-03_FLAIR.nii.gz")
    model = wmh_lora.load_model()
    expected = wmh_lora.segment(volume, model=model).mask
    assert expected.sum() > 100
    stored_codes = "".join(_axis_codes(volume))
    for codes in all_axis_codes():
        stored = stored_as(volume, codes)
        found = wmh_lora.segment(stored, model=model).mask
        back = stored_as(
            Volume(found.astype(np.float32), stored.affine),
            (stored_codes[0], stored_codes[1], stored_codes[2]),
        ).data
        overlap = 2 * np.sum((back > 0) & (expected > 0)) / (back.sum() + expected.sum())
        assert overlap >= 0.999, codes


def _axis_codes(volume: Volume) -> tuple[str, ...]:
    from nibabel.orientations import aff2axcodes

    return tuple(aff2axcodes(volume.affine))


def test_time_and_memory_of_a_clinical_scan(shared_data: Path, tmp_path: Path) -> None:
    """A whole head of 256 x 256 x 40 voxels, start-up included, on the cores there are."""
    source = shared_data / "ljubljana-longitudinal/sub-20/ses-2/anat/sub-20_ses-2_FLAIR.nii.gz"
    volume = Volume.read(source)
    cut = Volume(np.ascontiguousarray(volume.data[:, :, 2:42]), volume.affine)
    assert cut.shape == (256, 256, 40)
    scan = tmp_path / "scan_FLAIR.nii.gz"
    write_nifti(scan, cut.data, cut)
    command = [sys.executable, "-m", "wmh_lora", "segment", str(scan), "-o", str(tmp_path / "out")]
    started = time.monotonic()
    subprocess.run([*command, "--tta", "none"], check=True, capture_output=True)
    seconds = time.monotonic() - started
    peak_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(f"\n256 x 256 x 40: {seconds:.1f} s, {peak_gb:.2f} GB")  # noqa: T201 -- documentation quotes the figure
    assert seconds < 45
    assert peak_gb < 2.0
