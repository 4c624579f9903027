"""Multi-scale decoder with skip features, heads at every scale and learned fusion.

It works like the decoder of the WMH-LoRA description (four levels, refinement convolutions, a head
at each level, learned fusion of the four upsampled heads), laid out for an encoder that returns a
pyramid: the levels lie at strides 8, 4, 2 and 1, and early encoder stages give them detail.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmh_lora.errors import ConfigError

__all__ = ["LEVEL_STRIDES", "DecoderOutput", "PyramidDecoder"]

LEVEL_STRIDES = (8, 4, 2, 1)  # pixels, coarse to fine
_DILATIONS = (1, 2, 4)  # of the coarsest level: a receptive field of 15 positions, 120 pixels
_REFINEMENTS = 2  # 3x3 layers of each finer level
_FUSION_START = (0.1, 0.1, 0.2, 0.6)  # untrained fusion trusts the finest head most


class DecoderOutput(NamedTuple):
    """What the decoder returns.

    Attributes
    ----------
    fused_logits : Tensor
        (B, n_outputs, H, W).
    head_logits : tuple of Tensor
        Of each level, coarse to fine: (B, n_outputs, H / s, W / s) for s in `LEVEL_STRIDES`.
    """

    fused_logits: Tensor
    head_logits: tuple[Tensor, ...]


def _projection(in_channels: int, out_channels: int) -> nn.Sequential:
    """1x1 convolution and BatchNorm, which brings features of any scale to a common one."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
    )


def _refinement(channels: int, dilation: int = 1) -> nn.Sequential:
    """3x3 convolution, BatchNorm, GELU."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False),
        nn.BatchNorm2d(channels),
        nn.GELU(),
    )


class ContextLevel(nn.Module):
    """The coarsest level: pooled deep features, then dilated convolutions for a wide view."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.project = nn.Sequential(*_projection(in_channels, channels), nn.GELU())
        self.refine = nn.ModuleList(_refinement(channels, dilation) for dilation in _DILATIONS)

    def forward(self, deep: Sequence[Tensor]) -> Tensor:
        """Map maps (B, c_i, h, w) to (B, channels, h / 2, w / 2)."""
        features: Tensor = self.project(F.avg_pool2d(torch.cat(list(deep), dim=1), 2))
        for layer in self.refine:
            features = features + layer(features)
        return features


class UpLevel(nn.Module):
    """A finer level: the coarser one upsampled, plus projected skip features, refined."""

    def __init__(self, coarse_channels: int, skip_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.reduce = _projection(coarse_channels, channels)
        self.skips = nn.ModuleList(_projection(c, channels) for c in skip_channels)
        self.refine = nn.Sequential(*(_refinement(channels) for _ in range(_REFINEMENTS)))

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


class PyramidDecoder(nn.Module):
    """Decode an encoder's feature pyramid into logits at full resolution.

    Parameters
    ----------
    pyramid_channels, pyramid_strides : sequence of int
        Of the maps the encoder returns. Strides 1 and 2 feed the levels of that stride; the maps
        at stride 4 feed the levels at 4 and, averaged over 2x2, at 8.
    channels : sequence of int
        Channels of the four levels, coarse to fine.
    n_outputs : int
        Output channels.
    head_bias : float or sequence of float
        Starting bias of the heads, one for all or for each output: the logit of the share of
        pixels that are foreground. Rare foreground otherwise dominates the first losses.

    Raises
    ------
    ConfigError
        If there are not four levels, or a stride other than 1, 2 or 4 (or none at 4).

    Examples
    --------
    >>> decoder = PyramidDecoder((8, 8), (1, 4), (16, 8, 8, 4), n_outputs=2)
    >>> pyramid = (torch.zeros(1, 8, 16, 24), torch.zeros(1, 8, 4, 6))
    >>> output = decoder(pyramid)
    >>> [tuple(t.shape) for t in (output.fused_logits, *output.head_logits[:2])]
    [(1, 2, 16, 24), (1, 2, 2, 3), (1, 2, 4, 6)]
    """

    def __init__(
        self,
        pyramid_channels: Sequence[int] = (64, 128, 160, 256),
        pyramid_strides: Sequence[int] = (1, 2, 4, 4),
        channels: Sequence[int] = (128, 64, 32, 16),
        n_outputs: int = 1,
        head_bias: float | Sequence[float] = -2.5,
    ) -> None:
        super().__init__()
        if len(channels) != len(LEVEL_STRIDES):
            raise ConfigError(
                f"The decoder has {len(LEVEL_STRIDES)} levels, found {len(channels)} channel "
                f"counts; correct the setting 'decoder_channels'."
            )
        if not {4} <= set(pyramid_strides) <= {1, 2, 4}:
            raise ConfigError(
                f"The decoder takes features at strides 1, 2 and 4, found {pyramid_strides}."
            )
        self.pyramid_strides = tuple(pyramid_strides)
        widths = {
            stride: [
                c for c, s in zip(pyramid_channels, pyramid_strides, strict=True) if s == stride
            ]
            for stride in LEVEL_STRIDES
        }
        self.context = ContextLevel(sum(widths[4]), channels[0])
        self.levels = nn.ModuleList(
            UpLevel(coarse, widths[stride], fine)
            for coarse, fine, stride in zip(
                channels[:-1], channels[1:], LEVEL_STRIDES[1:], strict=True
            )
        )
        self.heads = nn.ModuleList(_head(c, n_outputs, head_bias) for c in channels)
        self.fusion_weight = nn.Parameter(torch.tensor(_FUSION_START).repeat(n_outputs, 1))
        self.fusion_bias = nn.Parameter(torch.zeros(n_outputs))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pyramid: Sequence[Tensor]) -> DecoderOutput:
        """Logits of every head and their fusion.

        Parameters
        ----------
        pyramid : sequence of Tensor
            (B, c_i, H / s_i, W / s_i), with H and W multiples of 8.

        Returns
        -------
        DecoderOutput

        Raises
        ------
        ValueError
            If H or W is not a multiple of 8.
        """
        maps: dict[int, list[Tensor]] = {stride: [] for stride in LEVEL_STRIDES}
        for features, stride in zip(pyramid, self.pyramid_strides, strict=True):
            maps[stride].append(features)
        height, width = (4 * n for n in maps[4][0].shape[-2:])
        if height % 8 or width % 8:
            raise ValueError(
                f"The decoder takes images whose sides are multiples of 8 pixels, found "
                f"{height} x {width}; pad the images first."
            )
        features = self.context(maps[4])
        head_logits = [self.heads[0](features)]
        for level, head, stride in zip(self.levels, self.heads[1:], LEVEL_STRIDES[1:], strict=True):
            features = level(features, maps[stride])
            head_logits.append(head(features))
        return DecoderOutput(self._fuse(head_logits), tuple(head_logits))

    def _fuse(self, head_logits: Sequence[Tensor]) -> Tensor:
        """Weigh each head's logits, output by output, upsample them and sum.

        The weights are free (no softmax), like a grouped 1x1 convolution over the upsampled heads;
        weighing before upsampling is the same and cheaper.
        """
        size = head_logits[-1].shape[-2:]
        fused = self.fusion_bias[:, None, None]
        for weight, logits in zip(self.fusion_weight.unbind(1), head_logits, strict=True):
            weighted = weight[:, None, None] * logits
            if weighted.shape[-2:] != size:
                weighted = F.interpolate(weighted, size=size, mode="bilinear", align_corners=False)
            fused = fused + weighted
        return fused


def _head(channels: int, n_outputs: int, bias: float | Sequence[float]) -> nn.Conv2d:
    """1x1 convolution that at first returns little more than its bias."""
    head = nn.Conv2d(channels, n_outputs, 1)
    nn.init.normal_(head.weight, std=0.01)
    values = [float(bias)] * n_outputs if isinstance(bias, (int, float)) else list(bias)
    if len(values) != n_outputs:
        raise ConfigError(f"Expected {n_outputs} head biases, found {len(values)}.")
    with torch.no_grad():
        head.bias.copy_(torch.tensor(values))  # type: ignore[union-attr]
    return head
