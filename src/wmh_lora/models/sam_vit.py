"""SAM's image encoder (ViT-B, ViT-L, ViT-H), written for inference and adapter training.

The architecture is a plain vision transformer with windowed attention in all but four blocks [1]_,
as published for Segment Anything [2]_; MedSAM [3]_ has the weights of a ViT-B of this kind. Beyond
the published implementation

* any height and width divisible by 16 is accepted, not 1024 pixels alone: position embeddings are
  interpolated;
* windows that reach beyond the map are neither projected nor queried there;
* memory grows with the number of tokens, not with its square.

References
----------
.. [1] Li et al., Exploring Plain Vision Transformer Backbones for Object Detection, ECCV 2022.
.. [2] Kirillov et al., Segment Anything, ICCV 2023, arXiv:2304.02643.
.. [3] Ma et al., Segment Anything in Medical Images, Nature Communications 15, 654 (2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wmh_lora.models.linear import Linear
from wmh_lora.models.sam_vit_attention import Attention
from wmh_lora.models.tiny_vit_blocks import ChannelNorm, PointwiseConv

__all__ = ["SAM_VIT_SPECS", "SamViT", "SamViTSpec"]

PATCH = 16  # pixels
STORED_SIDE = 64  # patches along the sides of the pictures that SAM was trained on: 1024 pixels
NECK_CHANNELS = 256
EXPANSION = 4  # hidden / outer channels in the MLPs
EPS = 1e-6  # of every layer normalisation


@dataclass(frozen=True)
class SamViTSpec:
    """Hyper-parameters of an encoder.

    Attributes
    ----------
    dim, depth, heads : int
        Token width, number of blocks, attention heads of each.
    global_blocks : tuple of int
        Indices of the blocks that attend to the whole map; the others attend in windows.
    window : int
        Side of a window in tokens.
    """

    dim: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    window: int = 14


SAM_VIT_SPECS: Mapping[str, SamViTSpec] = MappingProxyType(
    {
        "vit_b": SamViTSpec(dim=768, depth=12, heads=12, global_blocks=(2, 5, 8, 11)),
        "vit_l": SamViTSpec(dim=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23)),
        "vit_h": SamViTSpec(dim=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31)),
    }
)


class PatchEmbed(nn.Module):
    """Embed each patch of 16 x 16 pixels as a token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, stride=PATCH)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, H / 16, W / 16, dim)."""
        b, channels, height, width = images.shape
        patches = images.reshape(b, channels, height // PATCH, PATCH, width // PATCH, PATCH)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Mlp(nn.Module):
    """Two-layer perceptron on tokens of width ``dim``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.lin1 = Linear(dim, EXPANSION * dim)
        self.lin2 = Linear(EXPANSION * dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (..., dim) to the same shape."""
        out: Tensor = self.lin2(F.gelu(self.lin1(tokens)))
        return out


class Block(nn.Module):
    """Pre-normalised attention and MLP, each added to its input."""

    def __init__(self, spec: SamViTSpec, window: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.dim, eps=EPS)
        self.attn = Attention(spec.dim, spec.heads, window, STORED_SIDE)
        self.norm2 = nn.LayerNorm(spec.dim, eps=EPS)
        self.mlp = Mlp(spec.dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, h, w, dim) to the same shape."""
        tokens = tokens + self.attn(self.norm1(tokens))
        out: Tensor = tokens + self.mlp(self.norm2(tokens))
        return out


class SamViT(nn.Module):
    """SAM's image encoder: output of 256 channels at stride 16.

    Parameters and their names are those of the published checkpoints' ``image_encoder``, for
    pictures of 1024 pixels; at other sizes, position embeddings are interpolated on the way. The
    linear layers of attention and MLPs are ``nn.Linear`` submodules named ``qkv``, ``proj``,
    ``lin1`` and ``lin2``, e.g. ``blocks.0.attn.qkv``: the places where adapters attach. A new
    instance carries random weights.

    Parameters
    ----------
    spec : SamViTSpec
        Hyper-parameters, e.g. ``SAM_VIT_SPECS["vit_b"]``.

    Attributes
    ----------
    pyramid_channels, pyramid_strides : tuple of int
        Channels and strides of the maps that `forward_pyramid` returns.
    size_multiple : int
        Height and width in pixels must be positive multiples of this.
    gradient_checkpointing : bool
        Where gradients are wanted, keep only the input of each block and compute the block again in
        the backward pass: less memory, about a third more time. Off by default. The mode does not
        matter: a frozen encoder is trained through in eval mode.

    Examples
    --------
    >>> spec = SamViTSpec(dim=32, depth=2, heads=2, global_blocks=(1,))
    >>> tuple(SamViT(spec)(torch.zeros(1, 3, 64, 96)).shape)
    (1, 256, 4, 6)
    """

    pyramid_channels: ClassVar[tuple[int]] = (NECK_CHANNELS,)
    pyramid_strides: ClassVar[tuple[int]] = (PATCH,)
    size_multiple: ClassVar[int] = PATCH

    def __init__(self, spec: SamViTSpec) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.patch_embed = PatchEmbed(spec.dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, STORED_SIDE, STORED_SIDE, spec.dim))
        self.blocks = nn.ModuleList(
            Block(spec, window=0 if index in spec.global_blocks else spec.window)
            for index in range(spec.depth)
        )
        self.neck = nn.Sequential(
            PointwiseConv(spec.dim, NECK_CHANNELS, bias=False),
            ChannelNorm(NECK_CHANNELS, eps=EPS),
            nn.Conv2d(NECK_CHANNELS, NECK_CHANNELS, 3, padding=1, bias=False),
            ChannelNorm(NECK_CHANNELS, eps=EPS),
        )
        # Random positions, too: zeros would make an untrained encoder blind to its input's layout.
        for name, parameter in self.named_parameters():
            if name == "pos_embed" or "rel_pos" in name:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Neck features.

        Parameters
        ----------
        images : Tensor
            (B, 3, H, W) in the intensity convention of the weights; H and W positive multiples of
            16.

        Returns
        -------
        Tensor
            (B, 256, H / 16, W / 16), channels-last in memory.

        Raises
        ------
        ValueError
            If the shape is not as above.
        """
        _check_shape(images)
        tokens: Tensor = self.patch_embed(images)
        tokens = tokens + self._positions(tokens.shape[1], tokens.shape[2])
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            if recompute:
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        out: Tensor = self.neck(tokens.permute(0, 3, 1, 2))
        return out

    def forward_pyramid(self, images: Tensor) -> tuple[Tensor]:
        """Neck features as a pyramid of one level; see `forward`."""
        return (self.forward(images),)

    def _positions(self, rows: int, cols: int) -> Tensor:
        """Position embeddings of a map, (1, rows, cols, dim)."""
        if (rows, cols) == (STORED_SIDE, STORED_SIDE):
            return self.pos_embed
        stored = self.pos_embed.permute(0, 3, 1, 2)
        resized = F.interpolate(stored, size=(rows, cols), mode="bicubic", align_corners=False)
        return resized.permute(0, 2, 3, 1)


def _check_shape(images: Tensor) -> None:
    """Raise ValueError unless ``images`` is (B, 3, H, W) with H and W multiples of 16."""
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] != 3:
        raise ValueError(f"SamViT takes images of shape (B, 3, H, W), found {shape}.")
    if min(shape[2:]) < 1 or shape[2] % PATCH or shape[3] % PATCH:
        raise ValueError(
            f"SamViT takes a height and width that are positive multiples of {PATCH} pixels, "
            f"found {shape[2]} x {shape[3]}; pad or crop the images first."
        )
