"""A small encoder without base weights: convolutions with a transformer at stride 8.

Convolutions carry detail at strides 1 to 4; a few blocks of global self-attention at stride 8 let
every position see the whole slice. It is a fraction of the work of a foundation encoder, and is
trained in full. Where the tokens stand is told by a depthwise convolution (conditional position
encoding [1]_), which ties the weights to no picture size.

References
----------
.. [1] Chu et al., Conditional Positional Encodings for Vision Transformers, ICLR 2023,
   arXiv:2102.10882.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmh_lora.models.linear import Linear, layer_gelu, layer_sum

__all__ = ["CompactEncoder"]

_CHANNELS = (16, 32, 64)  # at strides 1, 2, 4
_DEPTHS = (0, 2, 4)  # residual blocks at these strides
_WIDTH = 192  # of the tokens at stride 8
_HEADS = 6
_LAYERS = 6
_MLP_RATIO = 4
_NECK_CHANNELS = 256
_SIZE_MULTIPLE = 8


def _conv(in_channels: int, channels: int, stride: int = 1, size: int = 3) -> nn.Sequential:
    """Convolution and BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(channels),
    )


class _Residual(nn.Module):
    """Two 3x3 convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, channels)
        self.conv2 = _conv(channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        update: Tensor = self.conv2(F.gelu(self.conv1(features)))
        return F.gelu(features + update)


class _Layer(nn.Module):
    """Pre-normalised self-attention over all tokens and a two-layer perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = Linear(width, _MLP_RATIO * width)
        self.fc2 = Linear(_MLP_RATIO * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, n, width) to the same shape."""
        batch, count, width = tokens.shape
        qkv: Tensor = self.qkv(self.norm1(tokens))
        q, k, v = qkv.view(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        tokens = layer_sum(self.proj, mixed.reshape(batch, count, width), tokens)
        return layer_sum(self.fc2, layer_gelu(self.fc1, self.norm2(tokens)), tokens)


class CompactEncoder(nn.Module):
    """About 3 million parameters, trained from random values.

    Attributes
    ----------
    pyramid_channels, pyramid_strides : tuple of int
        Of the maps that `forward_pyramid` returns.
    size_multiple : int
        Height and width of the images must be multiples of it.

    Examples
    --------
    >>> encoder = CompactEncoder().eval()
    >>> [tuple(f.shape) for f in encoder.forward_pyramid(torch.zeros(1, 3, 8, 16))]
    [(1, 16, 8, 16), (1, 32, 4, 8), (1, 64, 2, 4), (1, 256, 1, 2)]
    """

    pyramid_channels: ClassVar[tuple[int, ...]] = (*_CHANNELS, _NECK_CHANNELS)
    pyramid_strides: ClassVar[tuple[int, ...]] = (1, 2, 4, 8)
    size_multiple: ClassVar[int] = _SIZE_MULTIPLE

    def __init__(self) -> None:
        super().__init__()
        widths = (3, *_CHANNELS)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *_conv(before, after, stride=1 if index == 0 else 2),
                nn.GELU(),
                *(_Residual(after) for _ in range(depth)),
            )
            for index, (before, after, depth) in enumerate(
                zip(widths[:-1], widths[1:], _DEPTHS, strict=True)
            )
        )
        self.to_tokens = _conv(_CHANNELS[-1], _WIDTH, stride=2)
        self.position = nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1, groups=_WIDTH)
        self.layers = nn.ModuleList(_Layer(_WIDTH, _HEADS) for _ in range(_LAYERS))
        self.norm = nn.LayerNorm(_WIDTH)
        self.neck = _conv(_WIDTH, _NECK_CHANNELS, size=1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward_pyramid(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features of the convolutional stages and of the neck.

        Parameters
        ----------
        images : Tensor
            (B, 3, H, W), intensities in [0, 1], H and W positive multiples of 8.

        Returns
        -------
        tuple of Tensor
            (B, 16, H, W), (B, 32, H/2, W/2), (B, 64, H/4, W/4) and the neck's
            (B, 256, H/8, W/8), each channels-last in memory.

        Raises
        ------
        ValueError
            If the shape is not as above.
        """
        _check_shape(images)
        features = images.contiguous(memory_format=torch.channels_last)
        maps = []
        for stage in self.stages:
            features = stage(features)
            maps.append(features)
        features = self.to_tokens(features)
        features = features + self.position(features)
        _, _, height, width = features.shape
        tokens = features.permute(0, 2, 3, 1).flatten(1, 2)
        for layer in self.layers:
            tokens = layer(tokens)
        features = self.norm(tokens).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return maps[0], maps[1], maps[2], self.neck(features)

    def forward(self, images: Tensor) -> Tensor:
        """Neck features, (B, 3, H, W) in [0, 1] -> (B, 256, H/8, W/8); see `forward_pyramid`."""
        return self.forward_pyramid(images)[-1]


def _check_shape(images: Tensor) -> None:
    """Raise ValueError unless ``images`` is (B, 3, H, W) with H and W multiples of 8."""
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] != 3:
        raise ValueError(f"CompactEncoder takes images of shape (B, 3, H, W), found {shape}.")
    if min(shape[2:]) < 1 or shape[2] % _SIZE_MULTIPLE or shape[3] % _SIZE_MULTIPLE:
        raise ValueError(
            f"CompactEncoder takes a height and width that are positive multiples of "
            f"{_SIZE_MULTIPLE} pixels, found {shape[2]} x {shape[3]}; pad or crop the images first."
        )
