"""Two cuts of a scan show the same head, in which nothing is new."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import unchanged
from benchmarks.unchanged import follow_pair, pairs
from tests.phantoms import brightness_model, head, write_head
from wmh_lora.engine import WMHInferenceEngine
from wmh_lora.volume import Volume


def test_thick_slices_lie_in_the_middle_of_those_that_they_hold() -> None:
    data = np.random.default_rng(0).uniform(50.0, 100.0, (12, 12, 20)).astype(np.float32)
    volume = Volume(data, np.diag([-1.0, 0.8, 1.2, 1.0]))
    (_, three), (_, five), (_, noise) = pairs(volume)
    for pair, count, start in ((three, 3, 1), (five, 5, 2)):
        for scan, first in zip(pair, (0, start), strict=True):
            thin = np.arange(first + count, first + 2 * count)  # the second slice's
            np.testing.assert_allclose(scan.data[..., 1], volume.data[..., thin].mean(-1))
            expected = volume.affine @ [7, 9, thin.mean(), 1]
            np.testing.assert_allclose(scan.affine @ [7, 9, 1, 1], expected)
    assert noise[0] is volume
    assert 0 < np.abs(noise[1].data - volume.data).mean() < 0.1 * volume.data.max()


def test_the_command_takes_a_scan_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unchanged, "pairs", lambda scan: [("the same", (scan, scan))])
    scan = write_head(tmp_path / "sub-01_FLAIR.nii.gz")
    unchanged.main([str(scan), "--json", str(tmp_path / "out.json")])
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["model"]["name"] == "flair-compact-v1"
    (row,) = document["rows"]
    assert row["pair"] == "the same"
    assert row["new or vanished, by the masks alone"] == row["with the rule"] == 0


def test_lesions_of_an_unchanged_head_are_counted() -> None:
    volume, _ = head()
    engine = WMHInferenceEngine(brightness_model(), "cpu")
    both, by_masks, by_rule, doubtful = follow_pair(engine, (volume, volume))
    assert both > 0
    assert by_masks == by_rule == doubtful == 0
