"""The whole network: channel adapter, frozen encoder with LoRA, multi-scale decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from wmh_lora.config import ModelConfig
from wmh_lora.errors import ConfigError
from wmh_lora.models.adapter import ChannelAdapter
from wmh_lora.models.decoder import DecoderOutput, PyramidDecoder
from wmh_lora.models.lora import add_lora
from wmh_lora.models.tiny_vit import TinyViT, load_litemedsam

__all__ = ["ENCODERS", "EncoderSpec", "PyramidEncoder", "WMHNet", "build_network"]
__all__ += ["fuse_for_inference", "lesion_probability"]


class PyramidEncoder(Protocol):
    """What the network asks of an encoder, beside being a module."""

    pyramid_channels: tuple[int, ...]
    pyramid_strides: tuple[int, ...]

    def forward_pyramid(self, images: Tensor, /) -> tuple[Tensor, ...]:
        """Map images (B, 3, H, W) in [0, 1] to features (B, c_i, H / s_i, W / s_i)."""


@dataclass(frozen=True)
class EncoderSpec:
    """How to make an encoder: ``build()`` with random weights, ``load(path)`` with real ones."""

    build: Callable[[], nn.Module]
    load: Callable[[Path], nn.Module]


ENCODERS = {"litemedsam": EncoderSpec(build=TinyViT, load=load_litemedsam)}

# Starting bias of the heads: the logit of about 8 % for rare structures, of a half for the brain,
# which fills about half of a cropped slice. Any other structure counts as rare.
_COMMON = {"brain": 0.0}
_RARE = -2.5


def lesion_probability(logits: Tensor, structures: Sequence[str]) -> Tensor:
    """Turn logits (B, n, H, W) into the probability of lesion (B, H, W).

    A network that also knows the brain says how likely a pixel is lesion *and* brain, the product
    of the two: fat of the orbit and scalp is as bright as lesions, but not brain.

    Examples
    --------
    >>> logits = torch.tensor([4.0, -4.0]).reshape(1, 2, 1, 1)
    >>> round(lesion_probability(logits, ["wmh"]).item(), 3)
    0.982
    >>> round(lesion_probability(logits, ["wmh", "brain"]).item(), 3)
    0.018
    """
    probability = torch.sigmoid(logits[:, structures.index("wmh")].float())
    if "brain" in structures:
        probability = probability * torch.sigmoid(logits[:, structures.index("brain")].float())
    return probability


class WMHNet(nn.Module):
    """Segment white matter hyperintensities on a slice and its neighbours.

    Parameters
    ----------
    adapter : ChannelAdapter
        Input slices to the encoder's channels.
    encoder : nn.Module
        A `PyramidEncoder`, frozen; in training with LoRA attached.
    decoder : PyramidDecoder
        Feature pyramid to logits.
    """

    def __init__(
        self, adapter: ChannelAdapter, encoder: nn.Module, decoder: PyramidDecoder
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self.encoder = encoder
        self.decoder = decoder

    def forward_train(self, slices: Tensor) -> DecoderOutput:
        """Fused and per-level logits, for deep supervision; arguments as in `forward`."""
        images = self.adapter(slices)
        pyramid = cast(PyramidEncoder, self.encoder).forward_pyramid(images)
        output: DecoderOutput = self.decoder(pyramid)
        return output

    def forward(self, slices: Tensor) -> Tensor:
        """Fused logits.

        Parameters
        ----------
        slices : Tensor
            (B, in_channels, H, W), intensities in [0, 1], H and W multiples of 8.

        Returns
        -------
        Tensor
            (B, structures, H, W) logits.
        """
        return self.forward_train(slices).fused_logits

    def train(self, mode: bool = True) -> WMHNet:
        """Switch to training; the frozen encoder stays in eval mode but for LoRA's dropout."""
        super().train(mode)
        self.encoder.eval()
        for name, module in self.encoder.named_modules():
            if name.endswith(".lora_dropout"):
                module.train(mode)
        return self


def build_network(
    config: ModelConfig,
    base_weights: Path | None,
    *,
    for_training: bool,
    seed: int = 0,
) -> WMHNet:
    """Build the network with an untrained adapter and decoder.

    Parameters
    ----------
    config : ModelConfig
        Sizes and names.
    base_weights : Path or None
        Checkpoint of the base encoder. None leaves the encoder random, which is of use only for
        tests and for knowing shapes.
    for_training : bool
        True attaches LoRA through `peft` and returns the network in training mode; False leaves
        the plain encoder, ready for `merge_lora`, in eval mode.
    seed : int
        Fixes every random starting value. The global random state is left as it was.

    Raises
    ------
    ConfigError
        If the encoder is unknown or the settings do not fit it.
    WeightsError
        If the base weights cannot be read.
    """
    if config.encoder not in ENCODERS:
        known = ", ".join(sorted(ENCODERS))
        raise ConfigError(f"Unknown encoder {config.encoder!r}; known are {known}.")
    spec = ENCODERS[config.encoder]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = spec.build() if base_weights is None else spec.load(base_weights)
        encoder.requires_grad_(False)
        adapter = ChannelAdapter(config.in_channels, config.adapter_width)
        shape = cast(PyramidEncoder, encoder)
        decoder = PyramidDecoder(
            shape.pyramid_channels,
            shape.pyramid_strides,
            config.decoder_channels,
            n_outputs=len(config.structures),
            head_bias=[_COMMON.get(name, _RARE) for name in config.structures],
        )
        if for_training:
            add_lora(
                encoder,
                rank=config.lora_rank,
                alpha=config.lora_alpha,
                dropout=config.lora_dropout,
                targets=config.lora_targets,
            )
    return WMHNet(adapter, encoder, decoder).train(for_training)


def fuse_for_inference(net: WMHNet) -> WMHNet:
    """Fold each BatchNorm into the convolution before it, freeze, and lay out channels-last.

    Changes ``net`` in place and returns it, in eval mode. Outputs stay the same up to rounding.
    Adapters must have been merged before.
    """
    net.eval().requires_grad_(False)
    for module in list(net.modules()):
        if isinstance(module, nn.Sequential):
            _fold_sequence(module)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net


def _fold_sequence(sequence: nn.Sequential) -> None:
    """Fold the BatchNorms of one sequence that follow a convolution directly."""
    for index in range(len(sequence) - 1):
        conv, norm = sequence[index], sequence[index + 1]
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            sequence[index] = fuse_conv_bn_eval(conv, norm)
            sequence[index + 1] = nn.Identity()
