"""The encoders a network can be built on, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from wmh_lora.errors import ConfigError
from wmh_lora.models.compact import CompactEncoder
from wmh_lora.models.sam_checkpoint import load_sam_vit
from wmh_lora.models.sam_vit import SAM_VIT_SPECS, SamViT
from wmh_lora.models.tiny_vit import TinyViT, load_litemedsam

__all__ = ["ENCODERS", "EncoderSpec", "PyramidEncoder", "build_encoder", "encoder_spec"]

_PUBLISHED_RANKS = {"qkv": 64, "proj": 64, "lin1": 32, "lin2": 32}
_TINY_RANKS = {"qkv": 16, "proj": 16, "fc1": 16, "fc2": 16}


class PyramidEncoder(Protocol):
    """What the network asks of an encoder, beside being a module.

    Attributes
    ----------
    pyramid_channels, pyramid_strides : tuple of int
        Of the maps that `forward_pyramid` returns; the last one is the neck's.
    size_multiple : int
        Height and width of the images must be multiples of it.
    """

    pyramid_channels: tuple[int, ...]
    pyramid_strides: tuple[int, ...]
    size_multiple: int

    def forward_pyramid(self, images: Tensor, /) -> tuple[Tensor, ...]:
        """Map images (B, 3, H, W) to features (B, c_i, H / s_i, W / s_i)."""


@dataclass(frozen=True)
class EncoderSpec:
    """How to make an encoder and what it expects.

    Attributes
    ----------
    build : callable
        Makes one with random weights, drawn from torch's global generator.
    load : callable or None
        Reads one from a checkpoint; None if there are no base weights, so that all of the
        encoder is trained.
    mean, std : tuple of float
        Of each channel: the encoder takes ``(image - mean) / std``, the image in [0, 1].
    lora_ranks : mapping of str to int
        Published or default rank of the adapters, by the name of the linear layer.
    """

    build: Callable[[], nn.Module]
    load: Callable[[Path], nn.Module] | None
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    lora_ranks: Mapping[str, int] = field(default_factory=dict)

    @property
    def takes_unit_range(self) -> bool:
        """Whether images in [0, 1] go into the encoder as they are."""
        return not any(self.mean) and set(self.std) == {1.0}


def _sam_vit(name: str, **convention: Any) -> EncoderSpec:
    """Describe an encoder of SAM's architecture."""
    return EncoderSpec(
        build=lambda: SamViT(SAM_VIT_SPECS[name]),
        load=partial(load_sam_vit, name=name),
        lora_ranks=_PUBLISHED_RANKS,
        **convention,
    )


# SAM was trained on colour photographs, normalised as (x - [123.675, 116.28, 103.53]) /
# [58.395, 57.12, 57.375] with x in 0..255. MedSAM's authors feed images in [0, 1].
_PHOTOGRAPHS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

ENCODERS: dict[str, EncoderSpec] = {
    "litemedsam": EncoderSpec(TinyViT, load_litemedsam, lora_ranks=_TINY_RANKS),
    "medsam-vit-b": _sam_vit("vit_b"),
    "sam-vit-b": _sam_vit("vit_b", **_PHOTOGRAPHS),
    "sam-vit-l": _sam_vit("vit_l", **_PHOTOGRAPHS),
    "sam-vit-h": _sam_vit("vit_h", **_PHOTOGRAPHS),
    "compact": EncoderSpec(CompactEncoder, None),
}
"""Every encoder by name."""


def encoder_spec(name: str) -> EncoderSpec:
    """Look an encoder up.

    Raises
    ------
    ConfigError
        If the name is unknown.
    """
    if name not in ENCODERS:
        known = ", ".join(sorted(ENCODERS))
        raise ConfigError(f"Unknown encoder {name!r}; known are {known}.")
    return ENCODERS[name]


def build_encoder(name: str, weights: str | Path | None = None) -> nn.Module:
    """Make a plain encoder, without adapters: the module that a PEFT adapter folder is for.

    Parameters
    ----------
    name : str
        Key of `ENCODERS`.
    weights : path, optional
        Checkpoint of its base weights. Without it the weights are *random*, drawn from torch's
        global generator: of use for counting and for tests alone.

    Returns
    -------
    nn.Module
        A `PyramidEncoder` in eval mode, every parameter frozen, on the CPU. It takes images in its
        own intensity convention, see `EncoderSpec`.

    Raises
    ------
    ConfigError
        If the name is unknown, or weights are given for an encoder that has none.
    WeightsError
        If the checkpoint cannot be read or is not one of this encoder.
    """
    spec = encoder_spec(name)
    if weights is None:
        encoder = spec.build()
    elif spec.load is None:
        raise ConfigError(f"The encoder {name!r} has no base weights; leave out {weights}.")
    else:
        encoder = spec.load(Path(weights))
    return encoder.eval().requires_grad_(False)
