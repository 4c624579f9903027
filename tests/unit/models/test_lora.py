"""LoRA: what peft trains and what we merge are the same function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from wmh_lora.errors import AdapterMismatchError, ConfigError
from wmh_lora.models.lora import (
    add_lora,
    extract_lora,
    load_lora_into_peft,
    merge_lora,
    parameter_budget,
)

TARGETS = ("qkv", "fc1")
RANK, ALPHA = 2, 3


class Encoder(nn.Module):
    """Two target layers, one linear layer that is none, one convolution named like a target."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"qkv": nn.Linear(4, 6), "head": nn.Linear(6, 5)})
        self.fc1 = nn.Linear(5, 3)
        self.conv = nn.ModuleDict({"qkv": nn.Conv2d(1, 1, 1)})

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc1(self.block["head"](self.block["qkv"](x)))
        return out


def _encoder() -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Encoder().eval()


def _adapted(generator: torch.Generator) -> Encoder:
    """An encoder whose adapters do something."""
    encoder = _encoder()
    with torch.random.fork_rng(devices=[]):
        add_lora(encoder, RANK, ALPHA, 0.0, TARGETS)
    tensors = extract_lora(encoder)
    load_lora_into_peft(
        encoder, {k: torch.rand(v.shape, generator=generator) for k, v in tensors.items()}
    )
    return encoder


def _merge(encoder: nn.Module, tensors: dict[str, Tensor]) -> None:
    merge_lora(encoder, tensors, alpha=ALPHA, rank=RANK, targets=TARGETS)


def test_attaching_changes_nothing_and_leaves_only_the_adapters_trainable() -> None:
    x = torch.linspace(-1, 1, 12).view(3, 4)
    encoder = _encoder()
    before = encoder(x)
    add_lora(encoder, RANK, ALPHA, 0.0, TARGETS)
    assert torch.equal(encoder(x), before)
    trainable = [name for name, p in encoder.named_parameters() if p.requires_grad]
    assert len(trainable) == 4
    assert all(".lora_" in name for name in trainable)


def test_names_and_shapes_of_extracted_tensors(torch_generator: torch.Generator) -> None:
    shapes = {k: tuple(v.shape) for k, v in extract_lora(_adapted(torch_generator)).items()}
    assert shapes == {
        "block.qkv.lora_a": (2, 4),
        "block.qkv.lora_b": (6, 2),
        "fc1.lora_a": (2, 5),
        "fc1.lora_b": (3, 2),
    }
    assert extract_lora(_encoder()) == {}


def test_merging_gives_what_peft_computes(torch_generator: torch.Generator) -> None:
    x = torch.rand(3, 4, generator=torch_generator)
    adapted = _adapted(torch_generator)
    merged = _encoder()
    plain = merged(x)
    _merge(merged, extract_lora(adapted))
    torch.testing.assert_close(merged(x), adapted.eval()(x))
    assert not torch.allclose(merged(x), plain)


def test_differing_tensors_are_named(torch_generator: torch.Generator) -> None:
    tensors = extract_lora(_adapted(torch_generator))
    with pytest.raises(AdapterMismatchError, match=r"missing: fc1\.lora_a"):
        _merge(_encoder(), {k: v for k, v in tensors.items() if k != "fc1.lora_a"})
    with pytest.raises(AdapterMismatchError, match=r"unexpected: other\.lora_a"):
        _merge(_encoder(), {**tensors, "other.lora_a": torch.zeros(1)})
    wrong = {**tensors, "fc1.lora_a": torch.zeros(3, 5)}
    with pytest.raises(AdapterMismatchError, match=r"fc1\.lora_a is \(3, 5\) instead of \(2, 5\)"):
        _merge(_encoder(), wrong)
    with pytest.raises(AdapterMismatchError, match="attached adapters"):
        load_lora_into_peft(_adapted(torch_generator), wrong)


def test_a_refused_merge_leaves_the_encoder_alone(torch_generator: torch.Generator) -> None:
    encoder = _encoder()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    with pytest.raises(AdapterMismatchError):
        _merge(encoder, {"fc1.lora_a": torch.zeros(2, 5)})
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_a_target_that_names_no_linear_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="'qvk'"):
        add_lora(_encoder(), RANK, ALPHA, 0.0, ("fc1", "qvk"))


def test_budget_counts_the_live_model(torch_generator: torch.Generator) -> None:
    model = nn.ModuleDict({"encoder": _adapted(torch_generator), "decoder": nn.Linear(2, 1)})
    model["encoder"].requires_grad_(False)
    assert parameter_budget(model) == {
        "encoder": (4 * 6 + 6) + (6 * 5 + 5) + (5 * 3 + 3) + 2,
        "decoder": 3,
        "lora": 2 * (4 + 6) + 2 * (5 + 3),
        "total": 85 + 3 + 36,
        "trainable": 3,
    }
