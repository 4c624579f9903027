"""The levels of the decoders: what turns coarse features and skip features into finer ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmh_lora.errors import ConfigError
from wmh_lora.models.linear import layer_gelu

__all__ = ["STEM_CHANNELS", "ContextLevel", "SkipStem", "UpLevel", "logit_head"]

STEM_CHANNELS = (16, 32, 48, 64)
"""Of the convolutional stem at strides 1, 2, 4 and 8."""

_DILATIONS = (1, 2, 4)  # of the coarsest level: a receptive field of 15 positions, 120 pixels
_REFINEMENTS = 2  # 3x3 layers of each finer level


def _projection(in_channels: int, out_channels: int) -> nn.Sequential:
    """1x1 convolution and BatchNorm, which brings features of any scale to a common one."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
    )


class _Convolution(nn.Sequential):
    """Convolution, BatchNorm, GELU; in one pass once BatchNorm is folded into the convolution."""

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, channels, H / stride, W / stride)."""
        convolution, norm, _ = self
        if isinstance(norm, nn.Identity):
            return layer_gelu(convolution, features)
        out: Tensor = super().forward(features)  # type: ignore[no-untyped-call]
        return out


def _convolution(
    in_channels: int, channels: int, *, stride: int = 1, dilation: int = 1
) -> nn.Sequential:
    """3x3 convolution, BatchNorm, GELU."""
    return _Convolution(
        nn.Conv2d(
            in_channels, channels, 3, stride, padding=dilation, dilation=dilation, bias=False
        ),
        nn.BatchNorm2d(channels),
        nn.GELU(),
    )


class ContextLevel(nn.Module):
    """The coarsest level of a pyramid: deep features, then dilated convolutions for a wide view."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.project = _Convolution(*_projection(in_channels, channels), nn.GELU())
        self.refine = nn.ModuleList(
            _convolution(channels, channels, dilation=dilation) for dilation in _DILATIONS
        )

    def forward(self, deep: Tensor) -> Tensor:
        """Map (B, in_channels, h, w) to (B, channels, h, w)."""
        features: Tensor = self.project(deep)
        for layer in self.refine:
            features = features + layer(features)
        return features


class UpLevel(nn.Module):
    """A finer level: the coarser one upsampled, plus projected skip features, refined."""

    def __init__(self, coarse_channels: int, skip_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.reduce = _projection(coarse_channels, channels)
        self.skips = nn.ModuleList(_projection(c, channels) for c in skip_channels)
        self.refine = nn.Sequential(
            *(_convolution(channels, channels) for _ in range(_REFINEMENTS))
        )

    def forward(self, coarse: Tensor, skips: Sequence[Tensor]) -> Tensor:
        """Map (B, coarse_channels, h, w) and skips (B, c_i, 2h, 2w) to (B, channels, 2h, 2w)."""
        # Projecting before upsampling gives the same values as after, for a quarter of the work.
        features = F.interpolate(
            self.reduce(coarse), scale_factor=2, mode="bilinear", align_corners=False
        )
        for project, skip in zip(self.skips, skips, strict=True):
            features = features + project(skip)
        refined: Tensor = self.refine(features)
        return refined


class SkipStem(nn.Module):
    """Convolutions on the picture itself: detail for an encoder whose features are coarse."""

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        widths = (in_channels, *STEM_CHANNELS)
        self.stages = nn.ModuleList(
            _convolution(before, after, stride=1 if index == 0 else 2)
            for index, (before, after) in enumerate(itertools.pairwise(widths))
        )

    def forward(self, picture: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) to maps (B, c_i, H / s, W / s) at strides 1, 2, 4, 8."""
        maps = []
        for stage in self.stages:
            picture = stage(picture)
            maps.append(picture)
        return maps


def logit_head(channels: int, n_outputs: int, bias: float | Sequence[float]) -> nn.Conv2d:
    """1x1 convolution that at first returns little more than its bias."""
    head = nn.Conv2d(channels, n_outputs, 1)
    nn.init.normal_(head.weight, std=0.01)
    values = [float(bias)] * n_outputs if isinstance(bias, (int, float)) else list(bias)
    if len(values) != n_outputs:
        raise ConfigError(f"Expected {n_outputs} head biases, found {len(values)}.")
    with torch.no_grad():
        head.bias.copy_(torch.tensor(values))  # type: ignore[union-attr]
    return head
