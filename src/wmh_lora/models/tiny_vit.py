"""LiteMedSAM's image encoder (TinyViT), written for inference and adapter training.

The architecture is TinyViT [1]_ as distilled for MobileSAM [2]_ and LiteMedSAM [3]_: a 1x1 stem at
full resolution, one stage of inverted-residual convolutions, three stages of windowed attention
and the neck of SAM. Three things differ from the implementation that ships beside the weights:

* BatchNorm is folded into the convolutions when the weights are read, so that nothing here
  depends on train or eval mode;
* any height and width divisible by 4 is accepted: windows are cut from the real feature map. There
  is no absolute position embedding that would tie the weights to 256 pixels;
* feature maps stay channels-last, so that tokens are views of maps and the other way round.

References
----------
.. [1] Wu et al., TinyViT: Fast Pretraining Distillation for Small Vision Transformers, ECCV 2022.
.. [2] Zhang et al., Faster Segment Anything (MobileSAM), arXiv:2306.14289.
.. [3] Ma et al., Segment Anything in Medical Images, Nature Communications 15, 654 (2024);
   LiteMedSAM branch of the MedSAM repository.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from wmh_lora.models.foreign_checkpoint import (
    BATCH_NORM_KEYS,
    check_keys_and_shapes,
    fold_batch_norm,
    read_state,
)
from wmh_lora.models.linear import PointwiseConv, layer_gelu
from wmh_lora.models.tiny_vit_blocks import AttentionBlock, ChannelNorm, ConvBlock, Merge

__all__ = ["TinyViT", "load_litemedsam", "random_tiny_vit"]


@dataclass(frozen=True)
class StageSpec:
    """Hyper-parameters of one stage; ``stride`` is that of the merge that leads into it."""

    channels: int
    depth: int
    stride: int = 1
    heads: int = 0
    window: int = 0


# The last merge keeps the resolution: the neck works at stride 4.
STAGES = (
    StageSpec(channels=64, depth=2),
    StageSpec(channels=128, depth=2, stride=2, heads=4, window=7),
    StageSpec(channels=160, depth=6, stride=2, heads=5, window=14),
    StageSpec(channels=320, depth=2, stride=1, heads=10, window=7),
)
NECK_CHANNELS = 256
SIZE_MULTIPLE = 4  # pixels; product of the strides


class Stage(nn.Module):
    """The merge that leads into a stage (none before the first) and the stage's blocks."""

    def __init__(self, spec: StageSpec, previous: StageSpec | None) -> None:
        super().__init__()
        self.merge = Merge(previous.channels, spec.channels, spec.stride) if previous else None
        self.blocks = nn.ModuleList(
            AttentionBlock(spec.channels, spec.heads, spec.window)
            if spec.heads
            else ConvBlock(spec.channels)
            for _ in range(spec.depth)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map the previous stage's features to this stage's."""
        if self.merge is not None:
            features = self.merge(features)
        for block in self.blocks:
            features = block(features)
        return features


class TinyViT(nn.Module):
    """LiteMedSAM's image encoder: 5.7 M parameters once BatchNorm is folded, output at stride 4.

    The linear layers of attention and MLPs are ``nn.Linear`` submodules named ``qkv``, ``proj``,
    ``fc1`` and ``fc2``, e.g. ``stages.3.blocks.0.attn.qkv``: the places where adapters attach.
    A new instance carries default random weights; see `load_litemedsam` for the real ones.

    Attributes
    ----------
    pyramid_channels, pyramid_strides : tuple of int
        Channels and strides of the maps that `forward_pyramid` returns.
    size_multiple : int
        Height and width of the images must be multiples of it.

    Examples
    --------
    >>> encoder = random_tiny_vit(seed=0)
    >>> [tuple(f.shape) for f in encoder.forward_pyramid(torch.zeros(1, 3, 8, 12))]
    [(1, 64, 8, 12), (1, 128, 4, 6), (1, 160, 2, 3), (1, 256, 2, 3)]
    """

    pyramid_channels: ClassVar[tuple[int, int, int, int]] = (64, 128, 160, 256)
    pyramid_strides: ClassVar[tuple[int, int, int, int]] = (1, 2, 4, 4)
    size_multiple: ClassVar[int] = SIZE_MULTIPLE

    def __init__(self) -> None:
        super().__init__()
        width = STAGES[0].channels
        self.stem = nn.Sequential(
            PointwiseConv(3, width // 2), nn.GELU(), PointwiseConv(width // 2, width)
        )
        self.stages = nn.ModuleList(
            Stage(spec, previous) for spec, previous in zip(STAGES, (None, *STAGES), strict=False)
        )
        self.neck = nn.Sequential(
            PointwiseConv(STAGES[-1].channels, NECK_CHANNELS, bias=False),
            ChannelNorm(NECK_CHANNELS, eps=1e-6),
            nn.Conv2d(NECK_CHANNELS, NECK_CHANNELS, 3, padding=1, bias=False),
            ChannelNorm(NECK_CHANNELS, eps=1e-6),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                weight = module.weight.data
                module.weight.data = weight.contiguous(memory_format=torch.channels_last)

    def forward_pyramid(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features of the three early stages and of the neck.

        Parameters
        ----------
        images : Tensor
            (B, 3, H, W), intensities in [0, 1], H and W positive multiples of 4.

        Returns
        -------
        tuple of Tensor
            (B, 64, H, W), (B, 128, H/2, W/2), (B, 160, H/4, W/4) and the neck's
            (B, 256, H/4, W/4), each channels-last in memory.

        Raises
        ------
        ValueError
            If the shape is not as above.
        """
        _check_shape(images)
        first, _, last = self.stem
        images = images.contiguous(memory_format=torch.channels_last)
        features: Tensor = last(layer_gelu(first, images))
        maps = []
        for stage in self.stages:
            features = stage(features)
            maps.append(features)
        neck: Tensor = self.neck(features)
        return maps[0], maps[1], maps[2], neck

    def forward(self, images: Tensor) -> Tensor:
        """Neck features, (B, 3, H, W) in [0, 1] -> (B, 256, H/4, W/4); see `forward_pyramid`."""
        return self.forward_pyramid(images)[-1]


def _check_shape(images: Tensor) -> None:
    """Raise ValueError unless ``images`` is (B, 3, H, W) with H and W multiples of 4."""
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] != 3:
        raise ValueError(f"TinyViT takes images of shape (B, 3, H, W), found {shape}.")
    if min(shape[2:]) < 1 or shape[2] % SIZE_MULTIPLE or shape[3] % SIZE_MULTIPLE:
        raise ValueError(
            f"TinyViT takes a height and width that are positive multiples of {SIZE_MULTIPLE} "
            f"pixels, found {shape[2]} x {shape[3]}; pad or crop the images first."
        )


def random_tiny_vit(seed: int) -> TinyViT:
    """Build an untrained encoder whose weights depend on ``seed`` alone, frozen, in eval mode.

    For tests and for checking shapes; the global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyViT().requires_grad_(False).eval()


def load_litemedsam(path: str | Path) -> TinyViT:
    """Read the image encoder of a LiteMedSAM checkpoint, folding BatchNorm.

    Parameters
    ----------
    path : str or Path
        ``lite_medsam.pth``: a state dictionary of tensors. The keys of the prompt encoder and the
        mask decoder are ignored.

    Returns
    -------
    TinyViT
        On the CPU, float32, in eval mode, every parameter frozen.

    Raises
    ------
    WeightsError
        If the file cannot be read or its image encoder is not exactly this architecture.
    """
    path = Path(path)
    source = read_state(path, prefix="image_encoder.")
    model = random_tiny_vit(seed=0)  # the values do not matter, all of them are replaced
    own = model.state_dict()
    check_keys_and_shapes(
        path, source, _litemedsam_shapes(own), layout="a LiteMedSAM checkpoint of this encoder"
    )
    state: dict[str, Tensor] = {}
    for key in own:
        name = _litemedsam_key(key)
        if not _has_batch_norm(key):
            state[key] = source[name]
        elif key.endswith(".weight"):
            module, own_module = name.removesuffix(".weight"), key.removesuffix(".weight")
            norm = {leaf: source[f"{module}.bn.{leaf}"] for leaf in BATCH_NORM_KEYS}
            weight, bias = fold_batch_norm(source[f"{module}.c.weight"], norm)
            state[f"{own_module}.weight"], state[f"{own_module}.bias"] = weight, bias
    model.load_state_dict(state)
    return model


def _litemedsam_key(key: str) -> str:
    """Name in LiteMedSAM's checkpoint of one of our parameters, BatchNorm aside."""
    parts = key.split(".")
    if parts[0] == "stem":
        parts[:1] = ["patch_embed", "seq"]
    elif parts[0] == "stages":
        parts[0] = "layers"
        if parts[2] == "merge":  # there, a merge belongs to the stage that it leaves
            parts[1:3] = [str(int(parts[1]) - 1), "downsample"]
    return ".".join(parts)


def _has_batch_norm(key: str) -> bool:
    """Whether BatchNorm follows the parameter's layer in the checkpoint."""
    return key.startswith("stem.") or "conv" in key


def _litemedsam_shapes(own: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the checkpoint that has our parameters."""
    shapes: dict[str, tuple[int, ...]] = {}
    for key, value in own.items():
        name = _litemedsam_key(key)
        if not _has_batch_norm(key):
            shapes[name] = tuple(value.shape)
        elif key.endswith(".weight"):
            module = name.removesuffix(".weight")
            shapes[f"{module}.c.weight"] = tuple(value.shape)
            shapes.update({f"{module}.bn.{leaf}": (len(value),) for leaf in BATCH_NORM_KEYS})
    return shapes
