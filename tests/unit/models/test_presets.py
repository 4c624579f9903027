"""Presets: every encoder has one that builds, and the published one is as published."""

from __future__ import annotations

import pytest

from wmh_lora.config import ModelConfig, PreprocessConfig
from wmh_lora.errors import ConfigError
from wmh_lora.models.encoders import ENCODERS, encoder_spec
from wmh_lora.models.lora import lora_settings, lora_shapes
from wmh_lora.models.network import build_network
from wmh_lora.models.presets import model_preset
from wmh_lora.models.unset_values import unset_values


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_every_preset_builds(name: str) -> None:
    model, preprocess = model_preset(name)
    net = build_network(model, None, for_training=False, unset_encoder=True)
    assert preprocess.multiple_px % net.size_multiple == 0


def test_the_published_settings() -> None:
    """ViT-B: 540,672 LoRA parameters a block, 6,488,064 in all."""
    model, preprocess = model_preset("medsam-vit-b")
    assert model == ModelConfig(
        encoder="medsam-vit-b",
        adapter_width=16,
        lora_rank=64,
        lora_alpha=64,
        lora_dropout=0.05,
        lora_targets=("qkv", "proj", "lin1", "lin2"),
        lora_ranks={"lin1": 32, "lin2": 32},
        decoder="upsampling",
        decoder_skips=False,
        decoder_channels=(128, 64, 32, 16),
        structures=("wmh",),
    )
    assert preprocess == PreprocessConfig(pixel_size_mm=0.5, multiple_px=16)
    settings = lora_settings(model)
    assert {settings.factor(layer) for layer in settings.ranks} == {1.0}  # alpha = rank
    with unset_values():
        shapes = lora_shapes(encoder_spec("medsam-vit-b").build(), settings)
    assert sum(a * b for a, b in shapes.values()) == 6_488_064


def test_the_compact_encoder_is_trained_in_full() -> None:
    assert model_preset("compact")[0].adaptation == "full"


def test_an_unknown_encoder() -> None:
    with pytest.raises(ConfigError, match="Unknown encoder"):
        model_preset("resnet")
