"""Layers and what follows them: always PyTorch's own result, whichever operator computes it."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmh_lora.models import linear
from wmh_lora.models.linear import Linear, PointwiseConv, layer_gelu, layer_sum


def _layers(bias: bool = True) -> tuple[Linear, nn.Linear]:
    fast, plain = Linear(24, 40, bias=bias), nn.Linear(24, 40, bias=bias)
    plain.load_state_dict(fast.state_dict())
    return fast, plain


def _tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[True, False], ids=["onednn", "mkl"], autouse=True)
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every test runs as on a processor whose products are oneDNN's, and as on another."""
    monkeypatch.setattr(linear, "_favours_onednn", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 5, 24), (0, 24)])
def test_inference_equals_a_plain_layer(shape: tuple[int, ...], bias: bool) -> None:
    fast, plain = _layers(bias)
    tokens = _tokens(*shape)
    with torch.no_grad():
        torch.testing.assert_close(fast(tokens), plain(tokens), atol=1e-6, rtol=1e-5)


def test_inference_takes_any_memory_layout() -> None:
    fast, plain = _layers()
    tokens = _tokens(24, 7, 2).permute(2, 1, 0)
    with torch.inference_mode():
        torch.testing.assert_close(fast(tokens), plain(tokens), atol=1e-6, rtol=1e-5)


def test_without_the_private_operator_the_layer_is_a_plain_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fast, plain = _layers()
    monkeypatch.setattr(linear, "_PRODUCT", "an_operator_that_does_not_exist")
    with torch.no_grad():
        assert torch.equal(fast(_tokens(5, 24)), plain(_tokens(5, 24)))


def test_gradients_are_those_of_a_plain_layer() -> None:
    fast, plain = _layers()
    for layer in (fast, plain):
        layer(_tokens(5, 24)).square().sum().backward()
    assert plain.weight.grad is not None
    assert fast.weight.grad is not None
    assert torch.equal(fast.weight.grad, plain.weight.grad)


def test_autocast_and_other_types_are_left_to_pytorch() -> None:
    fast, plain = _layers()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert fast(_tokens(5, 24)).dtype == torch.bfloat16
        tokens = _tokens(5, 24).double()
        assert torch.equal(fast.double()(tokens), plain.double()(tokens))


def _layer(kind: str) -> tuple[nn.Module, Tensor]:
    """One of the layers that may compute in one pass with what follows, and values for it."""
    layers: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "linear": (Linear(24, 40), (2, 5, 24)),
        "linear without bias": (Linear(24, 40, bias=False), (7, 24)),
        "pointwise": (PointwiseConv(24, 40), (2, 24, 5, 6)),
        "pointwise without bias": (PointwiseConv(24, 40, bias=False), (2, 24, 5, 6)),
        "convolution": (nn.Conv2d(24, 40, 3, stride=2, padding=1, dilation=2), (2, 24, 9, 8)),
        "depthwise": (nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), (2, 24, 9, 8)),
        "same padding": (nn.Conv2d(24, 40, 3, padding="same"), (1, 24, 9, 8)),
        "reflected": (nn.Conv2d(24, 40, 3, padding=1, padding_mode="reflect"), (1, 24, 9, 8)),
        "other": (nn.Sequential(nn.Linear(24, 40)), (3, 24)),
    }
    layer, shape = layers[kind]
    values = 3 * _tokens(*shape)
    return layer, values.contiguous(memory_format=_layout(values))


def _layout(values: Tensor) -> torch.memory_format:
    return torch.channels_last if values.dim() == 4 else torch.contiguous_format


KINDS = ["linear", "linear without bias", "pointwise", "pointwise without bias", "convolution"]
KINDS += ["depthwise", "same padding", "reflected", "other"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gradients", [False, True])
def test_a_layer_with_what_follows(kind: str, gradients: bool) -> None:
    layer, values = _layer(kind)
    plain = F.conv2d if isinstance(layer, PointwiseConv) else None
    with torch.set_grad_enabled(gradients):
        out = plain(values, layer.weight, layer.bias) if plain else layer(values)  # type: ignore[arg-type]
        other = _tokens(*out.shape).contiguous(memory_format=_layout(out))
        with_gelu, with_sum = layer_gelu(layer, values), layer_sum(layer, values, other)
        torch.testing.assert_close(with_gelu, F.gelu(out), atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(with_sum, out + other, atol=2e-6, rtol=1e-5)
    assert with_gelu.requires_grad is with_sum.requires_grad is gradients
    if values.dim() == 4:
        for maps in (with_gelu, with_sum):
            assert maps.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["linear", "pointwise", "convolution"])
def test_without_private_operators_what_follows_is_computed_after(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_PRODUCT", "an_operator_that_does_not_exist")
    monkeypatch.setattr(linear, "_CONVOLUTION", "an_operator_that_does_not_exist")
    layer, values = _layer(kind)
    with torch.no_grad():
        out = layer(values)
        torch.testing.assert_close(layer_gelu(layer, values), F.gelu(out))
        torch.testing.assert_close(layer_sum(layer, values, out), out + out)


def test_what_is_given_is_never_overwritten() -> None:
    layer, values = Linear(24, 24), _tokens(5, 24)
    before = values.clone()
    with torch.inference_mode():
        layer_sum(layer, values, values)
        layer_gelu(layer, values)
        layer_gelu(nn.Identity(), values)
    assert torch.equal(values, before)


def test_a_graph_holds_public_operators_alone() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = Linear(24, 24)
            self.convolution = nn.Conv2d(24, 24, 1)

        def forward(self, maps: Tensor) -> Tensor:
            maps = layer_gelu(self.convolution, maps)
            return layer_sum(self.linear, layer_gelu(self.linear, maps), maps)

    values = _tokens(1, 24, 3, 24)
    with torch.no_grad():
        graph = torch.export.export(Both(), (values,)).graph
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            traced = torch.jit.trace(Both(), values).graph
    assert "aten.gelu" in str(graph)
    assert "mkldnn" not in str(graph) + str(traced)


@pytest.mark.parametrize("kind", ["linear", "pointwise"])
def test_rounded_layers_take_float32_and_add_to_it(kind: str) -> None:
    layer, values = _layer(kind)
    with torch.no_grad():
        expected = layer(values)
        layer.to(torch.bfloat16)
        assert layer(values).dtype == layer_gelu(layer, values).dtype == torch.bfloat16
        total = layer_sum(layer, values, expected)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, 2 * expected, atol=0.05, rtol=0.05)
