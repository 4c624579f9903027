"""A site of a few labelled phantoms, and a model on an encoder of two layers that can learn there.

As a program (arguments: SCAN MODEL ADAPTER MASK COPY) it segments a scan, and is killed while it
writes a copy of the adapter.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tests.phantoms import head
from wmh_lora import segment
from wmh_lora.config import InferenceConfig, ModelConfig, PreprocessConfig
from wmh_lora.models.encoders import ENCODERS, EncoderSpec
from wmh_lora.models.model_file import ModelCard, save_model
from wmh_lora.models.network import WMHNet, build_network
from wmh_lora.models.site_adapter import load_adapter, save_adapter
from wmh_lora.preprocess import context_stack, preprocess, to_model_grid
from wmh_lora.training.adapt_network import Base, Record
from wmh_lora.training.losses import SegmentationLoss
from wmh_lora.training.tune_cases import TuningCase
from wmh_lora.volume import write_nifti

STRUCTURES = ("wmh", "ventricles")

#: Brightness of lesions that the trained base misses.
FAINT = 400.0


class TwoLayerEncoder(nn.Module):
    """A convolution, its mean over 4 x 4 pixels, and a linear layer beside the identity."""

    pyramid_channels = (8, 8)
    pyramid_strides = (1, 4)
    size_multiple = 4

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.qkv = nn.Linear(8, 8)

    def forward_pyramid(self, images: Tensor) -> tuple[Tensor, ...]:
        fine = torch.relu(self.norm(self.stem(images)))
        coarse = nn.functional.avg_pool2d(fine, 4).permute(0, 2, 3, 1)
        return fine, (coarse + self.qkv(coarse)).permute(0, 3, 1, 2)


TWO_LAYERS = {"two-layers": EncoderSpec(TwoLayerEncoder, None, lora_ranks={"qkv": 4})}


def write_base(path: Path, *, steps: int = 0, seed: int = 3) -> Path:
    """Write a model; `TWO_LAYERS` must be among the encoders.

    After 60 steps it finds lesions and ventricles of the phantoms.
    """
    model = ModelConfig(
        encoder="two-layers",
        adaptation="full",
        decoder_channels=(8, 8, 8, 8),
        structures=STRUCTURES,
    )
    preprocessing = PreprocessConfig(pixel_size_mm=4.0, margin_mm=8.0)
    net = build_network(model, None, for_training=True, seed=seed)
    if steps:
        _train(net, preprocessing, steps)
    card = ModelCard(path.stem, model, preprocessing, InferenceConfig(), base_sha256="")
    save_model(path, net, card)
    return path


def _train(net: WMHNet, preprocessing: PreprocessConfig, steps: int) -> None:
    volume, mask = head(seed=99)
    prepared = preprocess(volume, preprocessing)
    shown = range(1, len(prepared.slices) - 1)
    slices = torch.from_numpy(context_stack(prepared, shown, 3))
    ventricles = (volume.data > 30.0) & (volume.data < 150.0)
    target = torch.stack(
        [
            torch.from_numpy(to_model_grid(part.astype(np.float32), prepared)[list(shown)])
            for part in (mask, ventricles)
        ],
        dim=1,
    )
    valid = torch.ones(target.shape[:2], dtype=torch.bool)
    loss = SegmentationLoss(STRUCTURES)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-2)
    for _ in range(steps):
        loss(net.forward_train(slices), target, valid).total.backward()
        optimizer.step()
        optimizer.zero_grad()


def write_site(folder: Path, count: int = 4, lesion_level: float = 640.0) -> list[TuningCase]:
    """Write scans and masks of so many persons; white matter is 300."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = []
    for seed in range(count):
        volume, mask = head(seed)
        data = volume.data - (mask > 0) * np.float32(640.0 - lesion_level)
        image, reference = (folder / f"p{seed}_{kind}.nii.gz" for kind in ("FLAIR", "mask"))
        write_nifti(image, data, volume)
        write_nifti(reference, mask, volume)
        cases.append(TuningCase(f"p{seed}", f"p{seed}", image, reference))
    return cases


def write_adapter(base: Path, path: Path, seed: int = 0) -> Path:
    """Write an adapter of random changes, which nobody has trained."""
    source = Base(base, None, "lora")
    net = source.learning_net(seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    card = source.model().card
    record = Record(InferenceConfig(threshold=0.35, min_voxels=2), 1, {"seed": seed})
    source.save(net, card, path, record, overwrite=False)
    return path


if __name__ == "__main__":
    torch.set_num_threads(1)
    ENCODERS.update(TWO_LAYERS)
    scan, model, adapter, mask, copy = map(Path, sys.argv[1:])
    result = segment(scan, model=model, adapter=adapter)
    write_nifti(mask, result.mask, result.volume)
    loaded = load_adapter(adapter)
    os.fsync = lambda number: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    save_adapter(copy, loaded.tensors, loaded.card)
