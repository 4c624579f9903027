"""What shortcuts change is counted and compared."""

from __future__ import annotations

from benchmarks.shortcuts import HEAD, shortcut_row
from tests.phantoms import brightness_model, head
from wmh_lora.engine import WMHInferenceEngine


def test_a_network_of_single_pixels_loses_nothing_by_seeing_evidence_alone() -> None:
    volume, mask = head()
    row = dict(zip(HEAD, shortcut_row(WMHInferenceEngine(brightness_model(), "cpu"), volume)))
    assert int(row["lesion, voxels"]) > 0.5 * mask.sum()
    assert 0.1 < float(row["slices shown"]) < 0.9
    assert row["Dice, adaptive"] == row["Dice, bfloat16"] == "1.0000"
