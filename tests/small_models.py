"""Small models whose probabilities vary, for tests of what is made from a model."""

from __future__ import annotations

from pathlib import Path

import torch

from wmh_lora.config import InferenceConfig, ModelConfig, PreprocessConfig
from wmh_lora.models.adapter import ChannelAdapter
from wmh_lora.models.decoder import UpsamplingDecoder
from wmh_lora.models.model_file import ModelCard
from wmh_lora.models.network import WMHNet, fuse_for_inference
from wmh_lora.models.registry import Model
from wmh_lora.models.sam_vit import SamViT, SamViTSpec


def small_model(seed: int = 0) -> Model:
    """SAM's architecture in small: windows of 3 x 3 tokens and a global block."""
    spec = SamViTSpec(dim=32, depth=2, heads=2, global_blocks=(1,), window=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = UpsamplingDecoder(256, (8, 8, 8, 8), 2, head_bias=0.0)
        net = WMHNet(ChannelAdapter(3), SamViT(spec), decoder)
        for parameter in net.decoder.parameters():
            if parameter.dim() == 4:  # large enough that the probabilities spread
                torch.nn.init.normal_(parameter, std=1.6 / parameter[0].numel() ** 0.5)
    card = ModelCard(
        name="small",
        model=ModelConfig("medsam-vit-b", structures=("wmh", "brain")),
        preprocess=PreprocessConfig(pixel_size_mm=4.0),
        inference=InferenceConfig(threshold=0.55),
        base_sha256="0" * 64,
        licence="MIT",
    )
    path = Path(f"small-{seed}.safetensors")
    return Model(fuse_for_inference(net), card, path, sha256=f"{seed:064x}")
