"""What `benchmarks.inference` compares: networks with random weights, and a scan for them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.encoders import _reference
from wmh_lora.models.lora import lora_shapes, merge_lora
from wmh_lora.models.lora_settings import LoraSettings, lora_settings
from wmh_lora.models.network import WMHNet, build_network, fuse_for_inference, lesion_probability
from wmh_lora.models.presets import model_preset
from wmh_lora.models.sam_checkpoint import encoder_key_of_hugging_face
from wmh_lora.volume import Volume

__all__ = ["dynunet", "head_scan", "our_network", "published_and_merged", "stretched"]

_LORA_SCALE = 0.02
_DYNUNET_CHANNELS = (32, 64, 128, 256, 320, 320)
_HEAD_HALF_MM = (75.0, 95.0, 72.0)
_LESIONS_MM = ((20.0, 10.0, 15.0), (-24.0, -20.0, 12.0), (22.0, -30.0, 24.0), (-18.0, 25.0, 18.0))


def head_scan(
    shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], seed: int = 0
) -> Volume:
    """Make a head-sized ellipsoid with ventricles and lesions in the middle of a field of view."""
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing_mm, strict=True)]
    position = np.meshgrid(*axes, indexing="ij", sparse=True)

    def inside(centre_mm: tuple[float, ...], half_mm: tuple[float, ...]) -> Any:
        parts = zip(position, centre_mm, half_mm, strict=True)
        return sum(((x - c) / h) ** 2 for x, c, h in parts) < 1.0

    data = np.where(inside((0.0,) * 3, _HEAD_HALF_MM), 300.0, 0.0)
    data[inside((0.0, 0.0, 5.0), (14.0, 35.0, 14.0))] = 60.0
    for centre_mm in _LESIONS_MM:
        data[inside(centre_mm, (6.0, 8.0, 7.0))] = 600.0
    data += np.random.default_rng(seed).normal(0.0, 5.0, shape)
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = [axis[0] for axis in axes]
    return Volume(data.astype(np.float32), affine)


def our_network(encoder: str) -> WMHNet:
    """Make a network as a model file gives it, with random weights."""
    config, _ = model_preset(encoder)
    return fuse_for_inference(build_network(config, None, for_training=False))


class _UnmergedLinear(nn.Module):
    """A linear layer and its low-rank update side by side, as while training."""

    def __init__(self, linear: nn.Linear, a: Tensor, b: Tensor, factor: float) -> None:
        super().__init__()
        self.linear, self.factor = linear, factor
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, tokens: Tensor) -> Tensor:
        update = F.linear(F.linear(tokens, self.a), self.b)
        result: Tensor = self.linear(tokens) + self.factor * update
        return result


class _PublishedEncoder(nn.Module):
    """The encoder of transformers with eager attention and unmerged adapters."""

    def __init__(self, encoder: nn.Module, size: int) -> None:
        super().__init__()
        self.encoder = _reference(encoder, size)

    def forward_pyramid(self, images: Tensor) -> tuple[Tensor]:
        return (self.encoder(images).last_hidden_state,)

    def attach(self, lora: dict[str, Tensor], settings: LoraSettings) -> None:
        for name, layer in list(self.encoder.named_modules()):
            if not isinstance(layer, nn.Linear) or name.rpartition(".")[2] not in settings.ranks:
                continue
            key = encoder_key_of_hugging_face(f"{name}.weight").removesuffix(".weight")
            parent, _, own = name.rpartition(".")
            a, b = lora[f"{key}.lora_a"], lora[f"{key}.lora_b"]
            unmerged = _UnmergedLinear(layer, a, b, settings.factor(own))
            setattr(self.encoder.get_submodule(parent), own, unmerged)


def _spread_answers(net: WMHNet, seed: int) -> None:
    """Scale the heads' fusion so that logits of a random picture have mean 0 and deviation 2."""
    generator = torch.Generator().manual_seed(seed)
    picture = F.interpolate(torch.rand(1, 3, 8, 8, generator=generator), (128, 128))
    with torch.no_grad():
        logits = net(picture)
        gain = 2.0 / logits.std()
        net.decoder.fusion_weight.mul_(gain)
        net.decoder.fusion_bias.copy_(-gain * logits.mean().expand(1))


def published_and_merged(size: int, seed: int = 0) -> tuple[nn.Module, WMHNet]:
    """Make the published network and ours with the same weights.

    ViT-B with adapters that do something, and heads scaled so that probabilities spread: untrained
    ones answer much the same everywhere, and would hide any error. The first computes as
    published, the second is what loading a model file gives: adapters merged, BatchNorm folded,
    our encoder.
    """
    config, _ = model_preset("medsam-vit-b")
    net = build_network(config, None, for_training=False, seed=seed)
    _spread_answers(net, seed)
    encoder: Any = net.encoder
    settings = lora_settings(config)
    generator = torch.Generator().manual_seed(seed)
    lora = {
        name: _LORA_SCALE * torch.randn(shape, generator=generator)
        for name, shape in lora_shapes(encoder, settings).items()
    }
    published = WMHNet(copy.deepcopy(net.adapter), encoder, copy.deepcopy(net.decoder)).eval()
    reference = _PublishedEncoder(copy.deepcopy(encoder), size)
    reference.attach(lora, settings)
    published.encoder = reference
    merge_lora(encoder, lora, settings)
    return published.requires_grad_(False).eval(), fuse_for_inference(net)


def stretched(net: nn.Module, plane: Tensor, size: int) -> Callable[[], Tensor]:
    """Show a slice (H, W) stretched to a square, and bring the probability back to it."""

    def run() -> Tensor:
        with torch.inference_mode():
            square = F.interpolate(plane[None, None], (size, size), mode="bilinear")
            logits = net(square.expand(-1, 3, -1, -1).contiguous())
            probability = lesion_probability(logits, ("wmh",))[None]
            back: Tensor = F.interpolate(probability, plane.shape, mode="bilinear")[0, 0]
        return back

    return run


def dynunet(
    shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> tuple[nn.Module, tuple[int, int, int], int]:
    """Make a 3-D U-Net with the channels of nnU-Net, its patch, and how many patches a scan takes.

    Patches of at most 128 voxels a side, half of which overlap; an axis is halved as long as its
    voxels are not longer than twice the finest and eight or more are left.
    """
    from monai.data.utils import dense_patch_slices
    from monai.networks.nets.dynunet import DynUNet

    levels = len(_DYNUNET_CHANNELS)
    spacing, side = list(spacing_mm), [min(128, n) for n in shape]
    strides, kernels, divisor = [(1, 1, 1)], [], [1, 1, 1]
    for _ in range(levels - 1):
        finest = min(spacing)
        kernels.append(tuple(3 if s <= 2.0 * finest else 1 for s in spacing))
        halved = [
            2 if s <= 2.0 * finest and n // d >= 8 else 1
            for s, n, d in zip(spacing, side, divisor, strict=True)
        ]
        strides.append((halved[0], halved[1], halved[2]))
        divisor = [d * h for d, h in zip(divisor, halved, strict=True)]
        spacing = [s * h for s, h in zip(spacing, halved, strict=True)]
    kernels.append((3, 3, 3))
    net = DynUNet(3, 1, 1, kernels, strides, strides[1:], filters=_DYNUNET_CHANNELS)
    patch = tuple(math.ceil(n / d) * d for n, d in zip(side, divisor, strict=True))
    interval = [max(1, p // 2) if p < n else p for p, n in zip(patch, shape, strict=True)]
    padded = [max(p, n) for p, n in zip(patch, shape, strict=True)]
    count = len(dense_patch_slices(padded, patch, interval))
    return net.eval().requires_grad_(False), (patch[0], patch[1], patch[2]), count
