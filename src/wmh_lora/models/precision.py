"""Inference in bfloat16 where that is fast and does little harm.

bfloat16 has float32's range and eight bits of precision. Processors with matrix instructions for it
(AVX512_BF16, AMX) multiply about twice as fast. Rounding everything, the tokens that run through
all blocks included, moves masks far more than rounding the factors of the products alone. So only
the layers that do most of the work change; what runs through the blocks, normalisations, the
channel adapter and the decoder stay in float32.
"""

from __future__ import annotations

import copy
from typing import Literal, get_args

import torch
from torch import nn

from wmh_lora.errors import ConfigError
from wmh_lora.models import sam_vit_attention
from wmh_lora.models.linear import Linear
from wmh_lora.models.network import WMHNet
from wmh_lora.models.tiny_vit_blocks import ConvBlock, Merge

__all__ = ["Precision", "fast_dtype", "has_fast_bfloat16", "to_precision"]

Precision = Literal["float32", "bfloat16"]

_ROUNDED = (Linear, ConvBlock, Merge, sam_vit_attention.Attention)


def has_fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones."""
    # torch 2.4 cannot tell
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return supported is not None and bool(supported())


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return the type in which a device multiplies matrices fastest.

    bfloat16 on processors with instructions for it (AVX512-BF16, AMX) and on GPUs that have it,
    float16 on other GPUs, and float32 elsewhere: emulated, half precision is slower.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "mps":
        return torch.float16
    return torch.bfloat16 if has_fast_bfloat16() else torch.float32


def to_precision(net: nn.Module, precision: Precision) -> nn.Module:
    """Return the network for inference with products in this precision.

    Parameters
    ----------
    net : nn.Module
        A `WMHNet` as `fuse_for_inference` leaves it.
    precision : {"float32", "bfloat16"}
        ``"float32"`` returns ``net`` itself. ``"bfloat16"`` returns a changed copy; it runs
        everywhere, but is slower than float32 where `has_fast_bfloat16` is false.

    Returns
    -------
    nn.Module
        Takes float32 slices, returns float32 logits.

    Raises
    ------
    ConfigError
        If the precision is unknown or the network is not a `WMHNet`.
    """
    if precision not in get_args(Precision):
        known = " or ".join(get_args(Precision))
        raise ConfigError(f"Unknown precision {precision!r}; set precision to {known}.")
    if precision == "float32":
        return net
    if not isinstance(net, WMHNet):
        raise ConfigError(
            f"Only networks of this package can run in bfloat16, found {type(net).__name__}; "
            f"set precision = 'float32'."
        )
    rounded = copy.deepcopy(net)
    for module in rounded.encoder.modules():
        if isinstance(module, _ROUNDED):
            module.to(torch.bfloat16)
    return rounded
