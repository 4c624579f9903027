"""The benchmarks' own instruments: what they measure is known here."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.harness import Timings, count_flops, peak_memory_mb, time_in_turns
from wmh_lora.models.linear import Linear
from wmh_lora.models.sam_vit import SamViT, SamViTSpec


def test_contestants_run_in_turns_and_the_slow_one_is_slow() -> None:
    calls = []

    def fast() -> None:
        calls.append("fast")
        time.sleep(0.002)

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.02)

    timings = time_in_turns({"fast": fast, "slow": slow}, turns=3)
    assert calls == ["fast", "slow", "fast", "slow", "slow", "fast", "fast", "slow"]
    assert timings.median_s("slow") >= 0.02
    assert timings.ratio("slow", "fast") > 1.5


def test_ratios_are_formed_within_turns() -> None:
    # The machine is ten times slower in the second turn and three times in the third.
    timings = Timings({"a": [2.0, 20.0, 6.0], "b": [1.0, 10.0, 3.0]})
    assert timings.ratio("a", "b") == 2.0
    assert timings.median_s("a") == 6.0


def test_flops_of_products_are_counted_however_they_are_computed() -> None:
    layer, tokens = Linear(8, 12), torch.zeros(2, 5, 8)
    expected = 2 * 2 * 5 * 8 * 12
    with torch.no_grad():
        assert count_flops(lambda: layer(tokens)) == expected
    assert count_flops(lambda: layer(tokens)) == expected
    q, k = torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 7, 4)
    with torch.no_grad():
        found = count_flops(lambda: F.scaled_dot_product_attention(q, k, k))
    assert found == 2 * (2 * 2 * 3 * 5 * 7 * 4)


def test_flops_of_an_encoder_are_those_of_its_layers() -> None:
    spec = SamViTSpec(dim=32, depth=1, heads=2, global_blocks=(0,))
    model = SamViT(spec).requires_grad_(False).eval()
    tokens, dim = 4 * 6, 32
    linear = 2 * tokens * dim * (3 * dim + dim + 4 * dim + 4 * dim)
    patches = 2 * tokens * 768 * dim
    neck = 2 * tokens * 256 * (dim + 9 * 256)
    attention = 4 * tokens * tokens * dim + 2 * tokens * (4 + 6) * dim
    with torch.no_grad():
        found = count_flops(lambda: model(torch.zeros(1, 3, 64, 96)))
    assert found == linear + patches + neck + attention


def test_peak_memory_is_that_of_the_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [bytearray(b"1") * (300 * 2**20)]  # a large parent must not count
    (tmp_path / "probe.py").write_text(
        "from benchmarks.harness import report_peak_memory\n"
        "def prepare():\n"
        "    model = b'1' * (100 * 2**20)\n"
        "    return lambda: len(model + model)\n"
        "report_peak_memory(prepare)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = peak_memory_mb("probe")
    del held
    assert 95 < found["prepared_mb"] - found["imported_mb"] < 120
    assert 290 < found["above_imports_mb"] < 330


def test_matrix_product_has_the_flops_of_its_shape() -> None:
    assert count_flops(harness.matmul_run(2, 3, 5)) == 60


def test_machine_names_no_host_or_path() -> None:
    text = json.dumps(harness.machine())
    assert torch.__version__ in text
    assert str(Path.home()) not in text
    assert sys.prefix not in text
