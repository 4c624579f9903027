"""The whole network: channel adapter, encoder (frozen with LoRA, or trained), decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from wmh_lora.config import Adaptation, ModelConfig
from wmh_lora.errors import ConfigError
from wmh_lora.models.adapter import ChannelAdapter
from wmh_lora.models.decoder import DecoderOutput, MultiScaleDecoder, build_decoder
from wmh_lora.models.encoders import ENCODERS, EncoderSpec, PyramidEncoder, encoder_spec
from wmh_lora.models.lora import add_lora, lora_settings
from wmh_lora.models.unset_values import unset_values

__all__ = ["ENCODERS", "EncoderSpec", "PyramidEncoder", "WMHNet", "build_network"]
__all__ += ["fuse_for_inference", "lesion_probability"]


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
        A `PyramidEncoder`; in training with LoRA attached, if that is how it is adapted.
    decoder : MultiScaleDecoder
        Features to logits.
    adaptation : {"lora", "frozen", "full"}
        What of the encoder is trained.
    mean, std : sequence of float
        Intensity convention of the encoder, see `EncoderSpec`; by default it takes [0, 1].
    """

    input_mean: Tensor | None
    input_std: Tensor | None

    def __init__(
        self,
        adapter: ChannelAdapter,
        encoder: nn.Module,
        decoder: MultiScaleDecoder,
        *,
        adaptation: Adaptation = "lora",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self.encoder = encoder
        self.decoder = decoder
        self.adaptation = adaptation
        for name, values in (("input_mean", mean), ("input_std", std)):
            column = None if values is None else torch.tensor(values)[:, None, None]
            self.register_buffer(name, column, persistent=False)

    @property
    def size_multiple(self) -> int:
        """Height and width of the slices must be multiples of it."""
        encoder = cast(PyramidEncoder, self.encoder)
        return math.lcm(encoder.size_multiple, self.decoder.size_multiple)

    def forward_train(
        self, slices: Tensor, t1: Tensor | None = None, t1_present: Tensor | None = None
    ) -> DecoderOutput:
        """Fused and per-level logits, for deep supervision; arguments as in `forward`."""
        picture: Tensor = self.adapter(slices, t1, t1_present)
        images = picture
        if self.input_mean is not None and self.input_std is not None:
            images = (picture - self.input_mean) / self.input_std
        pyramid = cast(PyramidEncoder, self.encoder).forward_pyramid(images)
        output: DecoderOutput = self.decoder(pyramid, picture)
        return output

    def forward(
        self, slices: Tensor, t1: Tensor | None = None, t1_present: Tensor | None = None
    ) -> Tensor:
        """Fused logits.

        Parameters
        ----------
        slices : Tensor
            FLAIR, (B, in_channels, H, W), intensities in [0, 1], H and W multiples of
            `size_multiple`.
        t1 : Tensor, optional
            T1, (B, t1_channels, H, W) in [0, 1]; None if it is missing throughout.
        t1_present : Tensor, optional
            (B,) bool, whether T1 is there; by default it is for all.

        Returns
        -------
        Tensor
            (B, structures, H, W) logits.
        """
        return self.forward_train(slices, t1, t1_present).fused_logits

    def train(self, mode: bool = True) -> WMHNet:
        """Switch to training; a frozen encoder stays in eval mode but for LoRA's dropout."""
        super().train(mode)
        if self.adaptation != "full":
            self.encoder.eval()
            for module in self.encoder.modules():
                if hasattr(module, "lora_A"):  # peft's wrapper: DoRA's dropout asks for its mode
                    module.train(mode)
        return self


def build_network(
    config: ModelConfig,
    base_weights: Path | None,
    *,
    for_training: bool,
    seed: int = 0,
    base_seed: int | None = None,
    unset_encoder: bool = False,
) -> WMHNet:
    """Build the network with an untrained adapter and decoder.

    Parameters
    ----------
    config : ModelConfig
        Sizes and names.
    base_weights : Path or None
        Checkpoint of the base encoder. None leaves the encoder random: as an encoder without base
        weights begins, and otherwise of use only for tests and for knowing shapes.
    for_training : bool
        True attaches LoRA through `peft` and returns the network in training mode; False leaves
        the plain encoder, ready for `merge_lora`, in eval mode.
    seed : int
        Fixes every random starting value. The global random state is left as it was.
    base_seed : int, optional
        Fixes the random encoder's values by itself, whatever ``seed`` is.
    unset_encoder : bool
        Do not even draw the encoder's values: they are loaded next, or do not matter.

    Raises
    ------
    ConfigError
        If the encoder is unknown or the settings do not fit it.
    WeightsError
        If the base weights cannot be read.
    """
    spec = encoder_spec(config.encoder)
    if spec.load is None and config.adaptation != "full":
        raise ConfigError(
            f"The encoder {config.encoder!r} has no base weights, so all of it is trained; set "
            f"adaptation = 'full', found {config.adaptation!r}."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = _base_encoder(spec, base_weights, base_seed, unset_encoder)
        encoder.requires_grad_(config.adaptation == "full" and for_training)
        adapter = ChannelAdapter(
            config.in_channels, config.adapter_width, t1_channels=config.t1_channels
        )
        shape = cast(PyramidEncoder, encoder)
        decoder = build_decoder(config, shape.pyramid_channels, shape.pyramid_strides)
        if for_training:
            add_lora(encoder, lora_settings(config))
    unit_range = spec.takes_unit_range
    net = WMHNet(
        adapter,
        encoder,
        decoder,
        adaptation=config.adaptation,
        mean=None if unit_range else spec.mean,
        std=None if unit_range else spec.std,
    )
    return net.train(for_training)


def _base_encoder(
    spec: EncoderSpec, base_weights: Path | None, base_seed: int | None, unset: bool
) -> nn.Module:
    """Make the encoder before adapters."""
    if unset:
        with unset_values():
            return spec.build()
    if base_seed is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(base_seed)
            return spec.build()
    if base_weights is None or spec.load is None:
        return spec.build()
    return spec.load(base_weights)


def fuse_for_inference(net: WMHNet) -> WMHNet:
    """Fold each BatchNorm into the convolution before it, freeze, and lay out channels-last.

    Changes ``net`` in place and returns it, in eval mode. Outputs stay the same up to rounding.
    Adapters must have been merged before.
    """
    net.eval().requires_grad_(False)
    net.adapter.fold_batch_norm()
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
