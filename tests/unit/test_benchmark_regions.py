"""The table of regions has the same columns for every scan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.regions import row
from tests.phantoms import brightness_model, head
from wmh_lora.engine import WMHInferenceEngine


def test_scans_without_ventricles_have_the_columns_of_grades(tmp_path: Path) -> None:
    path = tmp_path / "site" / "sub-1" / "anat" / "sub-1_FLAIR.nii.gz"
    volume, _ = head()
    without = WMHInferenceEngine(brightness_model(), "cpu").segment(volume)
    levels = {"brain": (30.0, 1000.0), "ventricles": (30.0, 100.0)}
    masks = {
        name: ((volume.data > low) & (volume.data < high)).astype(np.uint8)
        for name, (low, high) in levels.items()
    }
    given = replace(without, structure_masks=masks)
    rows = [row(result, tmp_path, path) for result in (without, given)]
    assert list(rows[0]) == list(rows[1])
    for part in ("periventricular", "deep"):
        assert rows[0][f"fazekas_{part}"] == "nan"
        assert rows[1][f"fazekas_{part}"] in ("0.000", "1.000", "2.000", "3.000")
