"""Multi-scale decoders with skip features, heads at every scale and learned fusion.

Both work like the decoder of the WMH-LoRA description: four levels at strides 8, 4, 2 and 1,
refinement convolutions, a head at each level, learned fusion of the four upsampled heads.
`UpsamplingDecoder` is the published one: it begins from features at stride 16. `PyramidDecoder` is
laid out for encoders whose features are finer: its coarsest level looks far around instead, and
early encoder stages give the others detail.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmh_lora.config import ModelConfig
from wmh_lora.errors import ConfigError
from wmh_lora.models.decoder_levels import (
    STEM_CHANNELS,
    ContextLevel,
    SkipStem,
    UpLevel,
    logit_head,
)

__all__ = ["LEVEL_STRIDES", "DecoderOutput", "MultiScaleDecoder", "PyramidDecoder"]
__all__ += ["UpsamplingDecoder", "build_decoder"]

LEVEL_STRIDES = (8, 4, 2, 1)  # pixels, coarse to fine
_COARSE_STRIDE = 16  # of the features that are upsampled
_FUSION_START = (0.1, 0.1, 0.2, 0.6)  # untrained fusion trusts the finest head most

# Starting bias of the heads: the logit of about 8 % for rare structures, of a half for the brain,
# which fills about half of a cropped slice. Any other structure counts as rare.
_COMMON = {"brain": 0.0}
_RARE = -2.5


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


class MultiScaleDecoder(nn.Module):
    """Heads on features of four levels, and their fusion; subclasses supply the features.

    Attributes
    ----------
    size_multiple : int
        Height and width of the images must be multiples of it.
    """

    size_multiple: ClassVar[int] = LEVEL_STRIDES[0]

    def _add_heads(
        self, channels: Sequence[int], n_outputs: int, head_bias: float | Sequence[float]
    ) -> None:
        """Last step of building a decoder: what follows its levels."""
        self.heads = nn.ModuleList(logit_head(c, n_outputs, head_bias) for c in channels)
        self.fusion_weight = nn.Parameter(torch.tensor(_FUSION_START).repeat(n_outputs, 1))
        self.fusion_bias = nn.Parameter(torch.zeros(n_outputs))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def level_features(self, pyramid: Sequence[Tensor], picture: Tensor | None) -> list[Tensor]:
        """Features of the four levels, coarse to fine; arguments as in `forward`."""
        raise NotImplementedError

    def forward(self, pyramid: Sequence[Tensor], picture: Tensor | None = None) -> DecoderOutput:
        """Logits of every head and their fusion.

        Parameters
        ----------
        pyramid : sequence of Tensor
            (B, c_i, H / s_i, W / s_i), with H and W multiples of `size_multiple`.
        picture : Tensor, optional
            (B, 3, H, W), what the channel adapter made of the slices; only a decoder with a
            convolutional stem looks at it.

        Returns
        -------
        DecoderOutput

        Raises
        ------
        ValueError
            If H or W is not a multiple of `size_multiple`.
        """
        features = self.level_features(pyramid, picture)
        head_logits = [head(level) for head, level in zip(self.heads, features, strict=True)]
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


class PyramidDecoder(MultiScaleDecoder):
    """Decode an encoder's feature pyramid into logits at full resolution.

    Parameters
    ----------
    pyramid_channels, pyramid_strides : sequence of int
        Of the maps the encoder returns. Maps at strides 1, 2 and 4 feed the levels of that
        stride. The coarsest level takes the maps at stride 8 or, where there are none, those at
        stride 4 averaged over 2x2.
    channels : sequence of int
        Channels of the four levels, coarse to fine.
    n_outputs : int
        Output channels.
    head_bias : float or sequence of float
        Starting bias of the heads, one for all or for each output: the logit of the share of
        pixels that are foreground. Rare foreground otherwise dominates the first losses.
    skips : bool
        False leaves out the maps at strides 1 and 2.

    Raises
    ------
    ConfigError
        If there are not four levels, or a stride other than 1, 2, 4 or 8 (or neither 4 nor 8).

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
        *,
        skips: bool = True,
    ) -> None:
        super().__init__()
        _check_channels(channels)
        strides = set(pyramid_strides)
        if not strides & {4, 8} or not strides <= set(LEVEL_STRIDES):
            raise ConfigError(
                f"The pyramid decoder takes features at strides 1, 2, 4 and 8, found "
                f"{tuple(pyramid_strides)}; for features at stride 16 set decoder = 'upsampling'."
            )
        self.pyramid_strides = tuple(pyramid_strides)
        self.skipped = () if skips else (1, 2)
        widths: dict[int, list[int]] = {stride: [] for stride in LEVEL_STRIDES}
        for width, stride in zip(pyramid_channels, pyramid_strides, strict=True):
            if stride not in self.skipped:
                widths[stride].append(width)
        self.context = ContextLevel(sum(widths[8] or widths[4]), channels[0])
        self.levels = nn.ModuleList(
            UpLevel(coarse, widths[stride], fine)
            for coarse, fine, stride in zip(
                channels[:-1], channels[1:], LEVEL_STRIDES[1:], strict=True
            )
        )
        self._add_heads(channels, n_outputs, head_bias)

    def level_features(self, pyramid: Sequence[Tensor], picture: Tensor | None) -> list[Tensor]:
        """Features at strides 8, 4, 2 and 1."""
        height, width = (self.pyramid_strides[0] * n for n in pyramid[0].shape[-2:])
        if height % self.size_multiple or width % self.size_multiple:
            raise ValueError(
                f"The decoder takes images whose sides are multiples of {self.size_multiple} "
                f"pixels, found {height} x {width}; pad the images first."
            )
        maps: dict[int, list[Tensor]] = {stride: [] for stride in LEVEL_STRIDES}
        for features, stride in zip(pyramid, self.pyramid_strides, strict=True):
            if stride not in self.skipped:
                maps[stride].append(features)
        deep = torch.cat(maps[8], dim=1) if maps[8] else F.avg_pool2d(torch.cat(maps[4], dim=1), 2)
        levels = [self.context(deep)]
        for level, stride in zip(self.levels, LEVEL_STRIDES[1:], strict=True):
            levels.append(level(levels[-1], maps[stride]))
        return levels


class UpsamplingDecoder(MultiScaleDecoder):
    """Upsample an encoder's features at stride 16 in four stages, as published.

    At 512 pixels the features are 32 x 32 and the heads lie at 64, 128, 256 and 512.

    Parameters
    ----------
    in_channels : int
        Channels of the features.
    channels, n_outputs, head_bias
        As of `PyramidDecoder`.
    skips : bool
        Add a small convolutional stem that looks at the picture itself: a lesion of a few pixels
        is less than one position of the features.

    Raises
    ------
    ConfigError
        If there are not four levels.

    Examples
    --------
    >>> decoder = UpsamplingDecoder(8, (16, 8, 8, 4), skips=False)
    >>> output = decoder([torch.zeros(1, 8, 2, 3)])
    >>> [tuple(t.shape[-2:]) for t in (output.fused_logits, *output.head_logits[:2])]
    [(32, 48), (4, 6), (8, 12)]
    """

    size_multiple: ClassVar[int] = _COARSE_STRIDE

    def __init__(
        self,
        in_channels: int = 256,
        channels: Sequence[int] = (128, 64, 32, 16),
        n_outputs: int = 1,
        head_bias: float | Sequence[float] = -2.5,
        *,
        skips: bool = True,
    ) -> None:
        super().__init__()
        _check_channels(channels)
        self.stem = SkipStem() if skips else None
        widths = [[width] for width in reversed(STEM_CHANNELS)] if skips else [[]] * len(channels)
        self.levels = nn.ModuleList(
            UpLevel(coarse, skip, fine)
            for coarse, skip, fine in zip((in_channels, *channels[:-1]), widths, channels)
        )
        self._add_heads(channels, n_outputs, head_bias)

    def level_features(self, pyramid: Sequence[Tensor], picture: Tensor | None) -> list[Tensor]:
        """Features at strides 8, 4, 2 and 1."""
        skips: list[list[Tensor]] = [[] for _ in LEVEL_STRIDES]
        if self.stem is not None:
            if picture is None:
                raise ValueError("This decoder has a stem and needs the picture.")
            skips = [[features] for features in reversed(self.stem(picture))]
        levels: list[Tensor] = []
        for level, skip in zip(self.levels, skips, strict=True):
            levels.append(level(levels[-1] if levels else pyramid[-1], skip))
        return levels


def build_decoder(
    config: ModelConfig, encoder_channels: Sequence[int], encoder_strides: Sequence[int]
) -> PyramidDecoder | UpsamplingDecoder:
    """Build the decoder that the settings ask for, untrained.

    Parameters
    ----------
    config : ModelConfig
        Kind, channels, skips and structures.
    encoder_channels, encoder_strides : sequence of int
        Of the maps that the encoder returns, the deepest one last.

    Raises
    ------
    ConfigError
        If that kind of decoder does not fit the encoder's features.
    """
    outputs = len(config.structures)
    bias = [_COMMON.get(name, _RARE) for name in config.structures]
    channels, skips = config.decoder_channels, config.decoder_skips
    if config.decoder == "pyramid":
        return PyramidDecoder(
            encoder_channels, encoder_strides, channels, outputs, bias, skips=skips
        )
    if encoder_strides[-1] != _COARSE_STRIDE:
        raise ConfigError(
            f"The upsampling decoder takes features at stride {_COARSE_STRIDE}, the encoder "
            f"{config.encoder!r} returns stride {encoder_strides[-1]}; set decoder = 'pyramid'."
        )
    return UpsamplingDecoder(encoder_channels[-1], channels, outputs, bias, skips=skips)


def _check_channels(channels: Sequence[int]) -> None:
    """Raise ConfigError unless there is a channel count for every level."""
    if len(channels) != len(LEVEL_STRIDES):
        raise ConfigError(
            f"The decoder has {len(LEVEL_STRIDES)} levels, found {len(channels)} channel "
            f"counts; correct the setting 'decoder_channels'."
        )
