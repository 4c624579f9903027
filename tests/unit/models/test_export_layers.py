"""The forms of the layers that are traced compute what the layers compute, at every size."""

from __future__ import annotations

import pytest
import torch

from tests.small_models import small_model
from wmh_lora.models.export_layers import trace_network, traceable
from wmh_lora.models.network import WMHNet
from wmh_lora.models.tiny_vit import Stage, StageSpec

TINY = StageSpec(channels=16, depth=2, stride=1, heads=2, window=7)
SIZES = [(7, 14), (3, 5), (8, 13), (15, 7)]


@pytest.mark.parametrize("size", SIZES)
def test_tiny_vit_block_keeps_its_values(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    stage = Stage(TINY, StageSpec(channels=16, depth=1)).eval().requires_grad_(False)
    for parameter in stage.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    features = torch.randn(2, 16, *size, generator=generator)
    with torch.no_grad():
        expected = stage(features)
    plain = traceable(stage)
    assert [type(m) for m in plain.modules()] != [type(m) for m in stage.modules()]
    torch.testing.assert_close(plain(features), expected, rtol=1e-4, atol=1e-4)


def test_source_stays_as_it_is() -> None:
    net = small_model().net
    assert isinstance(net, WMHNet)
    before = [type(module) for module in net.modules()]
    traceable(net)
    assert [type(module) for module in net.modules()] == before


def test_trace_holds_at_other_batches_and_sizes() -> None:
    net = small_model().net
    assert isinstance(net, WMHNet)
    traced = trace_network(net, 3)
    generator = torch.Generator().manual_seed(1)
    # One window, whole windows, and windows that reach beyond the map; the traced size is 96 x 80.
    for batch, height, width in ((1, 16, 32), (3, 48, 96), (1, 112, 64)):
        slices = torch.rand(batch, 3, height, width, generator=generator)
        with torch.inference_mode():
            expected = net(slices).sigmoid()
            assert expected.std() > 0.05, "the comparison would show nothing"
            torch.testing.assert_close(traced(slices).sigmoid(), expected, rtol=0, atol=1e-5)


def test_trace_has_public_operators_alone() -> None:
    net = small_model().net
    assert isinstance(net, WMHNet)
    graph = str(trace_network(net, 3).inlined_graph)
    assert "aten::" in graph
    assert "mkldnn" not in graph
    assert "PythonOp" not in graph
