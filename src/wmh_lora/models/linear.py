"""Layers that compute, where no gradient is wanted, in one pass with what follows them.

PyTorch multiplies float32 matrices with MKL, and builds in oneDNN as well. With AVX512, oneDNN's
product takes about a fifth less time on processors that MKL was not written for, and applies an
activation or adds a second tensor while results are still in the processor's cache. Without AVX512
its product is no faster, and its GELU takes several times as long as PyTorch's, which then follows
in place; convolutions stay with oneDNN. Its operators have no public names; without them, with
gradients, under autocast, on other devices and while a graph is traced, PyTorch's usual layers do
the work. The results differ by rounding alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Linear", "PointwiseConv", "is_traced", "layer_gelu", "layer_sum"]

_PRODUCT = "_linear_pointwise"
_CONVOLUTION = "_convolution_pointwise"
# Of these operators: what follows, its numbers, its variant. GELU is the exact one.
_NOTHING: tuple[str, list[float], str] = ("none", [], "")
_GELU: tuple[str, list[float], str] = ("gelu", [], "none")


class Linear(nn.Linear):
    """``nn.Linear`` that uses oneDNN for inference on CPUs."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return _linear(tokens, self.weight, self.bias)


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution computed as a matrix product on channels-last tokens.

    With one thread, PyTorch's float32 CPU convolution takes a slow path that copies the map.
    """

    def __init__(self, dim: int, out_dim: int, bias: bool = True) -> None:
        super().__init__(dim, out_dim, 1, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, dim, h, w) to (B, out_dim, h, w)."""
        tokens = features.permute(0, 2, 3, 1)
        return _linear(tokens, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def layer_gelu(layer: nn.Module, values: Tensor) -> Tensor:
    """Compute ``F.gelu(layer(values))``, in one pass where that is possible.

    Parameters
    ----------
    layer : nn.Module
        A `Linear`, `PointwiseConv` or ``nn.Conv2d`` has the fast way; any other layer, such as one
        that an adapter wraps, is called.
    values : Tensor
        What the layer takes.
    """
    if isinstance(layer, Linear):
        return _linear_gelu(values, layer.weight, layer.bias)
    if isinstance(layer, PointwiseConv):
        tokens = values.permute(0, 2, 3, 1)
        return _linear_gelu(tokens, layer.weight.flatten(1), layer.bias).permute(0, 3, 1, 2)
    if _is_zero_padded(layer) and _has_operator(_CONVOLUTION, values, layer.weight):
        return _convolution_gelu(layer, values)
    return F.gelu(layer(values))


def layer_sum(layer: nn.Module, values: Tensor, other: Tensor) -> Tensor:
    """Compute ``other + layer(values)``, in one pass where that is possible.

    Parameters
    ----------
    layer : nn.Module
        A `Linear` or `PointwiseConv` has the fast way; any other layer is called.
    values : Tensor
        What the layer takes.
    other : Tensor
        Of the shape of the layer's result.
    """
    if isinstance(layer, Linear):
        return _linear_sum(values, other, layer.weight, layer.bias)
    if isinstance(layer, PointwiseConv):
        tokens, addend = values.permute(0, 2, 3, 1), other.permute(0, 2, 3, 1)
        weight = layer.weight.flatten(1)
        return _linear_sum(tokens, addend, weight, layer.bias).permute(0, 3, 1, 2)
    total: Tensor = other + layer(values)
    return total


def is_traced() -> bool:
    """Whether the calls at hand become a graph, which should hold public operators alone."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def _linear(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    tokens = _rounded(tokens, weight)
    if _has_product(tokens, weight):
        return _product(tokens, weight, bias, *_NOTHING)
    return F.linear(tokens, weight, bias)


def _linear_gelu(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    tokens = _rounded(tokens, weight)
    if _has_product(tokens, weight):
        return _product(tokens, weight, bias, *_GELU)
    out = F.linear(tokens, weight, bias)
    return torch.ops.aten.gelu_(out) if _may_overwrite(out) else F.gelu(out)


def _linear_sum(tokens: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    tokens = _rounded(tokens, weight)
    if not _has_product(tokens, weight, other):
        product = F.linear(tokens, weight, bias)
        in_place = _may_overwrite(product) and product.dtype == other.dtype
        return product.add_(other) if in_place else other + product
    operator = getattr(torch.ops.mkldnn, _PRODUCT).binary
    out: Tensor = operator(tokens, other, weight, bias, "add")
    return out


def _rounded(values: Tensor, weight: Tensor) -> Tensor:
    """Values for a layer whose weights have been rounded to bfloat16."""
    return values.to(weight.dtype) if weight.dtype == torch.bfloat16 else values


def _has_product(values: Tensor, weight: Tensor, other: Tensor | None = None) -> bool:
    return _favours_onednn() and _has_operator(_PRODUCT, values, weight, other)


@cache
def _favours_onednn() -> bool:
    """Whether its matrix products are the faster ones on this processor."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def _may_overwrite(values: Tensor) -> bool:
    """Whether nothing, no gradient and no graph, needs a result that has just been computed."""
    return not (values.requires_grad or torch.is_grad_enabled() or is_traced())


def _has_operator(name: str, values: Tensor, weight: Tensor, other: Tensor | None = None) -> bool:
    if torch.is_grad_enabled() or is_traced() or torch.is_autocast_enabled("cpu"):
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, name):
        return False
    tensors = (values, weight) if other is None else (values, weight, other)
    dtype = weight.dtype
    if any(t.device.type != "cpu" or t.dtype != dtype for t in tensors):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and _multiplies_bfloat16())


@cache
def _multiplies_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _product(tokens: Tensor, weight: Tensor, bias: Tensor | None, *then: Any) -> Tensor:
    out: Tensor = getattr(torch.ops.mkldnn, _PRODUCT)(tokens, weight, bias, *then)
    return out


def _is_zero_padded(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether this is a plain convolution, its padding zeros and given in pixels."""
    if type(layer) is not nn.Conv2d:
        return False
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _convolution_gelu(layer: nn.Conv2d, values: Tensor) -> Tensor:
    operator = getattr(torch.ops.mkldnn, _CONVOLUTION)
    geometry = (layer.padding, layer.stride, layer.dilation, layer.groups)
    out: Tensor = operator(values, layer.weight, layer.bias, *geometry, *_GELU)
    return out
