"""The inference benchmark compares like with like, and its sums are right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import inference
from benchmarks.inference import Size, scan_rows
from benchmarks.inference_networks import dynunet, head_scan, published_and_merged, stretched
from wmh_lora.config import PreprocessConfig
from wmh_lora.models.encoders import ENCODERS
from wmh_lora.models.sam_vit import SamViT, SamViTSpec
from wmh_lora.preprocess import preprocess


def test_published_and_merged_network_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters change the answer, and merging them does not."""
    small = SamViTSpec(dim=64, depth=2, heads=2, global_blocks=(1,))
    spec = replace(ENCODERS["medsam-vit-b"], build=lambda: SamViT(small))
    monkeypatch.setitem(ENCODERS, "medsam-vit-b", spec)
    published, merged = published_and_merged(64)
    plane = torch.rand(40, 48, generator=torch.Generator().manual_seed(0))
    reference, ours = stretched(published, plane, 64)(), stretched(merged, plane, 64)()
    assert reference.shape == plane.shape
    torch.testing.assert_close(ours, reference, atol=1e-4, rtol=0.0)
    with torch.no_grad():
        for module in published.modules():
            if hasattr(module, "factor"):
                module.factor = 0.0  # type: ignore[assignment]
    assert (stretched(published, plane, 64)() - reference).abs().max() > 1e-3


def test_three_dimensional_network_takes_its_patch() -> None:
    net, patch, count = dynunet((64, 64, 12), (1.0, 1.0, 4.0))
    assert isinstance(net, nn.Module)
    assert patch[:2] == (64, 64)
    assert patch[2] >= 12
    assert count == 1
    with torch.inference_mode():
        assert net(torch.zeros(1, 1, *patch)).shape == (1, 1, *patch)


def test_patches_overlap_by_half() -> None:
    _, patch, count = dynunet((256, 256, 40), (0.9, 0.9, 4.0))
    assert patch[:2] == (128, 128)
    assert count == 3 * 3


def test_phantom_is_a_head_with_lesions() -> None:
    prepared = preprocess(head_scan((96, 112, 20), (2.2, 2.2, 8.0)), PreprocessConfig())
    lesion_ml = (prepared.slices > inference.LESION_LEVEL).sum() * 8.0 / 1000.0
    assert 2.0 < lesion_ml < 20.0
    height, width = prepared.slices.shape[1:]
    assert 190 <= height <= 216
    assert 150 <= width <= 176


def test_rows_scale_the_parts_within_turns() -> None:
    counts = {"slices": 8, "shown": 6, "again": 2, "height": 1, "width": 1}
    parts: dict[str, Any] = {
        "seconds": {"published": [2.0, 4.0], "exact": [1.0, 2.0], "unet": [3.0, 3.0]},
        "patches": 5,
        "counts": {"compact": counts},
    }
    parts["seconds"] |= {"compact": [0.5, 1.0], "compact auto": [0.5, 0.5]}
    rows = {row["way"]: row for row in scan_rows(Size((4, 4, 10), (1.0, 1.0, 1.0)), parts, "d4")}
    assert rows["published"]["passes"] == 80
    assert rows["exact"]["times_faster"] == 2.0
    assert rows["unet"]["seconds"] == 3.0 * 5 * 8
    assert rows["compact"]["passes"] == 64
    assert rows["compact auto"]["passes"] == 6 + 2 * 7
    assert rows["compact auto"]["times_faster"] == pytest.approx(np.median([16.0, 32.0]))
