"""The figures of the documents, counted on the networks themselves."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path

import pytest

from wmh_lora.config import ModelConfig
from wmh_lora.models.budget import model_budget, published_claim
from wmh_lora.models.encoders import ENCODERS
from wmh_lora.models.init import init_model
from wmh_lora.models.network import build_network
from wmh_lora.models.presets import model_preset

SMALL = ModelConfig(lora_rank=2, lora_alpha=2, decoder_channels=(16, 8, 8, 8))


def test_published_ranks_on_vit_b() -> None:
    """In each of 12 blocks, rank times inputs plus outputs of the layer."""
    budget = model_budget(model_preset("medsam-vit-b")[0])
    assert budget.encoder == 89_670_912
    assert budget.lora == {
        "qkv": 12 * 64 * (768 + 3 * 768),
        "proj": 12 * 64 * (768 + 768),
        "lin1": 12 * 32 * (768 + 4 * 768),
        "lin2": 12 * 32 * (768 + 4 * 768),
    }
    assert sum(budget.lora.values()) == 6_488_064 == 12 * 540_672
    assert budget.lora["qkv"] == 2_359_296
    assert budget.frozen == budget.encoder
    assert budget.trainable == 6_488_064 + budget.adapter + budget.decoder
    assert budget.file_bytes_fp16 < 25e6


def test_published_claim_is_set_right() -> None:
    config, _ = model_preset("medsam-vit-b")
    claim = published_claim(config, model_budget(config))
    assert claim is not None
    for figure in ("2.4 M", "3.5 %", "540,672 a block", "6,488,064 in all", "2,359,296, 2.6 %"):
        assert figure in claim


@pytest.mark.parametrize("change", [{"lora_dora": True}, {"lora_rank": 8, "lora_ranks": {}}])
def test_no_claim_about_other_settings(change: dict[str, object]) -> None:
    config = dataclasses.replace(model_preset("sam-vit-b")[0], **change)  # type: ignore[arg-type]
    assert published_claim(config, model_budget(config)) is None
    assert published_claim(SMALL, model_budget(SMALL)) is None


def test_counts_are_those_of_the_network_in_training() -> None:
    config = dataclasses.replace(SMALL, lora_ranks={"fc1": 3})
    net = build_network(config, None, for_training=True)
    budget = model_budget(config)
    parameters = list(net.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    assert budget.trainable == trainable
    assert budget.trainable + budget.frozen == sum(p.numel() for p in parameters)
    assert budget.trainable_percent == pytest.approx(
        100 * trainable / sum(p.numel() for p in parameters)
    )


@pytest.mark.parametrize("name", ["litemedsam", "compact"])
def test_size_is_that_of_a_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.safetensors"
    card = init_model(path, name, random_base=True)
    budget = model_budget(card.model)
    content = path.read_bytes()
    (header_bytes,) = struct.unpack("<Q", content[:8])
    assert json.loads(content[8 : 8 + header_bytes])
    assert budget.file_bytes_fp16 == len(content) - 8 - header_bytes
    assert budget.file_bytes_fp32 > 1.9 * budget.file_bytes_fp16
    assert budget.encoder_is_trained == (name == "compact")
    assert (budget.frozen == 0) == (name == "compact")


@pytest.mark.parametrize("name", list(ENCODERS))
def test_presets_can_be_counted(name: str) -> None:
    budget = model_budget(model_preset(name)[0])
    assert min(budget.encoder, budget.adapter, budget.decoder, budget.trainable) > 0
    assert bool(budget.lora) != budget.encoder_is_trained
    assert 0 < budget.trainable_percent <= 100
