"""Small scans with known lesions, and a network that finds them without any training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wmh_lora.config import InferenceConfig, ModelConfig, PreprocessConfig
from wmh_lora.models.model_file import ModelCard
from wmh_lora.models.registry import Model
from wmh_lora.volume import Volume, write_nifti

SHAPE = (48, 56, 6)
SPACING_MM = (4.0, 4.0, 10.0)


class BrightnessNet(nn.Module):
    """Lesion is what is clearly brighter than white matter, which preprocessing puts at 0.4."""

    def __init__(self, structures: int = 3, level: float = 0.7) -> None:
        super().__init__()
        self.structures, self.level = structures, level
        self.seen_shapes: list[tuple[int, ...]] = []

    def forward(self, slices: Tensor) -> Tensor:
        self.seen_shapes.append(tuple(slices.shape))
        logits = 40.0 * (slices[:, 1:2] - self.level)
        # ventricles nowhere, brain everywhere
        others = torch.tensor([-20.0, 20.0])[: self.structures - 1, None, None]
        others = others.expand(len(logits), -1, *logits.shape[-2:])
        return torch.cat([logits, others], dim=1)


def brightness_model(**inference: object) -> Model:
    card = ModelCard(
        name="brightness",
        model=ModelConfig(),
        preprocess=PreprocessConfig(pixel_size_mm=4.0, margin_mm=8.0),
        inference=InferenceConfig(**inference),  # type: ignore[arg-type]
        base_sha256="0" * 64,
    )
    return Model(net=BrightnessNet(), card=card, path=Path("brightness"), sha256="1" * 64)


class T1Net(nn.Module):
    """Lesion is what is bright on FLAIR, unless the T1 beside it is bright as well."""

    def forward(self, slices: Tensor, t1: Tensor | None = None) -> Tensor:
        logits = 40.0 * (slices[:, 1:2] - 0.7)
        if t1 is not None:
            assert t1.shape[1] == 1
            logits = logits - 80.0 * (t1[:, :1] > 0.85)
        return torch.cat([logits, logits * 0.0 - 20.0, logits * 0.0 + 20.0], dim=1)


def t1_model(**inference: object) -> Model:
    """A model that takes a T1, see `T1Net`."""
    model = brightness_model(**inference)
    card = replace(model.card, model=replace(model.card.model, t1_channels=1))
    return replace(model, net=T1Net(), card=card)


def t1_of_head(flair: Volume, bright: NDArray[np.uint8]) -> Volume:
    """White matter and dark ventricles; what is marked is bright, on a shifted grid."""
    data = np.where(flair.data > 150, 700.0, np.where(flair.data > 30, 150.0, 0.0))
    data[bright > 0] = 1400.0
    affine = flair.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [2.0, 0.0, 0.0]
    return Volume(data[2:].astype(np.float32), affine)


def head(seed: int = 0) -> tuple[Volume, NDArray[np.uint8]]:
    """A head-sized ellipsoid of white matter around dark ventricles, and its two lesions."""
    grids = (np.linspace(-1.2, 1.2, n) for n in SHAPE)
    x, y, z = np.meshgrid(*grids, indexing="ij")
    radius = np.sqrt(x**2 + y**2 + (0.8 * z) ** 2)
    data = np.where(radius < 1.0, 300.0, 0.0)
    data[(np.abs(x) < 0.15) & (np.abs(y) < 0.35) & (np.abs(z) < 0.6)] = 60.0
    mask = np.zeros(SHAPE, np.uint8)
    mask[16:19, 30:34, 2:4] = 1
    mask[32:34, 20:22, 3] = 1
    data[mask > 0] = 640.0
    noise = np.random.default_rng(seed).normal(0.0, 4.0, SHAPE)
    affine = np.diag([*SPACING_MM, 1.0])
    affine[:3, 3] = [-96.0, -112.0, -30.0]
    return Volume((data + noise).astype(np.float32), affine), mask


def write_head(path: Path, seed: int = 0) -> Path:
    """Write the scan of `head` as NIfTI, in a folder that is made if needed."""
    volume, _ = head(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nifti(path, volume.data, volume)
    return path
