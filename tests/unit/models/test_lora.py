"""LoRA: what peft trains and what we merge are the same function."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from wmh_lora.config import ModelConfig
from wmh_lora.errors import AdapterMismatchError, ConfigError
from wmh_lora.models.lora import (
    LoraSettings,
    add_lora,
    extract_lora,
    load_lora_into_peft,
    lora_budget,
    lora_settings,
    merge_lora,
    parameter_budget,
    unmerge_lora,
)
from wmh_lora.models.sam_vit import SAM_VIT_SPECS, SamViT, SamViTSpec
from wmh_lora.models.tiny_vit import TinyViT, random_tiny_vit
from wmh_lora.models.unset_values import unset_values

LORA = LoraSettings({"qkv": 2, "fc1": 2}, scale=1.5)
MIXED = LoraSettings({"qkv": 4, "fc1": 1}, scale=0.75)
RSLORA = LoraSettings({"qkv": 4, "fc1": 1}, scale=0.5, rslora=True)
DORA = LoraSettings({"qkv": 3, "fc1": 2}, scale=1.5, dora=True)
ALL = pytest.mark.parametrize("settings", [LORA, MIXED, RSLORA, DORA], ids=str)

PUBLISHED = LoraSettings({"qkv": 64, "proj": 64, "lin1": 32, "lin2": 32}, dropout=0.05)


class Encoder(nn.Module):
    """Two target layers, one linear layer that is none, one convolution named like a target."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"qkv": nn.Linear(4, 6), "head": nn.Linear(6, 5)})
        self.fc1 = nn.Linear(5, 3)
        # Ends like the target "fc1", on which peft's own matching of names would fall for it.
        self.conv = nn.ModuleDict({"qkv": nn.Conv2d(1, 1, 1), "fc1": nn.Conv2d(1, 1, 1)})

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc1(self.block["head"](self.block["qkv"](x)))
        return out


def _encoder() -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Encoder().eval()


def _adapted(
    encoder: nn.Module, settings: LoraSettings, generator: torch.Generator
) -> dict[str, Tensor]:
    """Attach adapters that do something; return them."""
    with torch.random.fork_rng(devices=[]):
        add_lora(encoder, settings)
    tensors = {
        # Starting values are of the right size; B, which starts at zero, gets that of A.
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in extract_lora(encoder).items()
    }
    load_lora_into_peft(encoder, tensors)
    encoder.eval()
    return tensors


# --- attaching ------------------------------------------------------------------------------


@ALL
def test_attaching_changes_nothing(settings: LoraSettings) -> None:
    x = torch.linspace(-1, 1, 12).view(3, 4)
    encoder = _encoder()
    before = encoder(x)
    add_lora(encoder, settings)
    if settings.dora:
        torch.testing.assert_close(encoder(x), before)
    else:
        assert torch.equal(encoder(x), before)


@ALL
def test_only_adapters_of_exactly_the_target_layers_get_gradients(settings: LoraSettings) -> None:
    encoder = _encoder()
    frozen = {name for name, _ in encoder.named_parameters()}
    add_lora(encoder, settings)
    encoder(torch.ones(1, 4)).sum().backward()
    with_gradient = {n for n, p in encoder.named_parameters() if p.grad is not None}
    factors = {f"{m}.lora_{f}.default.weight" for m in ("block.qkv", "fc1") for f in "AB"}
    if settings.dora:
        factors |= {f"{m}.lora_magnitude_vector.default.weight" for m in ("block.qkv", "fc1")}
    assert with_gradient == factors
    # Everything that was there before still is, under its name or peft's for a wrapped layer.
    rest = {n.replace(".base_layer", "") for n, _ in encoder.named_parameters()} - factors
    assert rest == frozen


def test_names_and_shapes_of_extracted_tensors() -> None:
    encoder = _encoder()
    assert extract_lora(encoder) == {}
    add_lora(encoder, DORA)
    assert {k: tuple(v.shape) for k, v in extract_lora(encoder).items()} == {
        "block.qkv.lora_a": (3, 4),
        "block.qkv.lora_b": (6, 3),
        "block.qkv.magnitude": (6,),
        "fc1.lora_a": (2, 5),
        "fc1.lora_b": (3, 2),
        "fc1.magnitude": (3,),
    }


def test_settings_without_ranks_leave_the_encoder_alone() -> None:
    encoder = _encoder()
    add_lora(encoder, LoraSettings({}))
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    assert lora_budget(encoder) == {}


def test_a_target_that_names_no_linear_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="'qvk'"):
        add_lora(_encoder(), LoraSettings({"fc1": 2, "qvk": 2}))


@pytest.mark.parametrize(
    "wrong",
    [{"ranks": {"fc1": 0}}, {"scale": 0.0}, {"scale": float("nan")}, {"dropout": 1.0}],
    ids=str,
)
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        LoraSettings(**{"ranks": {"fc1": 2}, **wrong})  # type: ignore[arg-type]


def test_settings_follow_the_configuration() -> None:
    config = ModelConfig(
        lora_rank=32,
        lora_alpha=16,
        lora_targets=("qkv", "fc1"),
        lora_ranks={"qkv": 64},
        lora_rslora=True,
    )
    settings = lora_settings(config)
    assert settings == LoraSettings(
        {"qkv": 64, "fc1": 32}, scale=0.5, dropout=0.05, rslora=True, dora=False
    )
    assert settings.factor("qkv") == pytest.approx(32 / 64**0.5)  # alpha_i / sqrt(rank_i)
    assert lora_settings(ModelConfig(adaptation="frozen")).ranks == {}


# --- merging --------------------------------------------------------------------------------


@ALL
def test_merging_gives_what_peft_computes(
    settings: LoraSettings, torch_generator: torch.Generator
) -> None:
    x = torch.rand(3, 4, generator=torch_generator)
    adapted, merged = _encoder(), _encoder()
    plain = merged(x)
    merge_lora(merged, _adapted(adapted, settings, torch_generator), settings)
    torch.testing.assert_close(merged(x), adapted(x))
    assert not torch.allclose(merged(x), plain, rtol=0.01)


def test_a_merged_layer_is_the_published_formula(torch_generator: torch.Generator) -> None:
    adapted, merged = _encoder(), _encoder()
    t = _adapted(adapted, DORA, torch_generator)
    merge_lora(merged, t, DORA)
    direction = _encoder().fc1.weight.detach() + 1.5 * t["fc1.lora_b"] @ t["fc1.lora_a"]
    lengths = torch.tensor([row.pow(2).sum().sqrt() for row in direction])
    expected = t["fc1.magnitude"].view(3, 1) * direction / lengths.view(3, 1)
    torch.testing.assert_close(merged.fc1.weight, expected)


TINY_VIT_CASES = {
    "lora": LoraSettings({"qkv": 16, "proj": 16, "fc1": 16, "fc2": 16}),
    "rslora": LoraSettings({"qkv": 8, "proj": 8, "fc1": 4, "fc2": 4}, scale=0.5, rslora=True),
    "dora": LoraSettings({"qkv": 8, "proj": 8, "fc1": 4, "fc2": 2}, dora=True),
}


@pytest.fixture(scope="module")
def tiny_vit() -> TinyViT:
    """Not to be changed."""
    return random_tiny_vit(2)


@pytest.mark.parametrize("settings", TINY_VIT_CASES.values(), ids=TINY_VIT_CASES)
def test_merged_equals_unmerged_on_tiny_vit(
    tiny_vit: TinyViT, settings: LoraSettings, torch_generator: torch.Generator
) -> None:
    images = torch.rand(1, 3, 20, 28, generator=torch_generator)
    merged, adapted = copy.deepcopy(tiny_vit), copy.deepcopy(tiny_vit)
    with torch.inference_mode():
        plain = merged(images)
        merge_lora(merged, _adapted(adapted, settings, torch_generator), settings)
        _assert_same_features(merged(images), adapted(images), plain)


SAM_VIT_CASES = {
    "lora": LoraSettings({"qkv": 8, "proj": 8, "lin1": 4, "lin2": 4}),
    "rslora": LoraSettings({"qkv": 8, "proj": 8, "lin1": 4, "lin2": 4}, scale=0.5, rslora=True),
    "dora": LoraSettings({"qkv": 8, "proj": 8, "lin1": 4, "lin2": 2}, dora=True),
}


@pytest.mark.parametrize("settings", SAM_VIT_CASES.values(), ids=SAM_VIT_CASES)
def test_merged_equals_unmerged_on_sam_vit_with_padded_windows(
    settings: LoraSettings, torch_generator: torch.Generator
) -> None:
    # 15 x 17 tokens: windows of 14 reach beyond the map, where keys are the bias of `qkv`.
    images = torch.rand(1, 3, 15 * 16, 17 * 16, generator=torch_generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        merged = SamViT(SamViTSpec(dim=32, depth=3, heads=2, global_blocks=(1,))).eval()
    adapted = copy.deepcopy(merged)
    with torch.inference_mode():
        plain = merged(images)
        merge_lora(merged, _adapted(adapted, settings, torch_generator), settings)
        _assert_same_features(merged(images), adapted(images), plain)


def _assert_same_features(merged: Tensor, adapted: Tensor, plain: Tensor) -> None:
    """Equal up to rounding, a thousand times closer than to the plain encoder."""
    difference = (merged - adapted).abs().max()
    assert difference < 2e-5 * adapted.abs().max()
    assert difference < 1e-3 * (plain - adapted).abs().max()


@ALL
def test_unmerging_gives_every_bit_of_the_base_back(
    settings: LoraSettings, torch_generator: torch.Generator
) -> None:
    encoder = _encoder()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    tensors = _adapted(_encoder(), settings, torch_generator)
    for _ in range(2):  # merging again works as the first time
        merge_lora(encoder, tensors, settings, keep_base=True)
        assert encoder.state_dict().keys() == before.keys()
        assert not torch.equal(encoder.fc1.weight, before["fc1.weight"])
        with pytest.raises(AdapterMismatchError, match=r"block\.qkv is merged already"):
            merge_lora(encoder, tensors, settings)
        unmerge_lora(encoder)
        assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_what_was_not_kept_cannot_be_unmerged(torch_generator: torch.Generator) -> None:
    encoder = _encoder()
    merge_lora(encoder, _adapted(_encoder(), LORA, torch_generator), LORA)
    with pytest.raises(AdapterMismatchError, match="keep_base=True"):
        unmerge_lora(encoder)


# --- refusing -------------------------------------------------------------------------------


def test_differing_tensors_are_named(torch_generator: torch.Generator) -> None:
    adapted = _encoder()
    tensors = _adapted(adapted, LORA, torch_generator)
    with pytest.raises(AdapterMismatchError, match=r"missing: fc1\.lora_a"):
        merge_lora(_encoder(), {k: v for k, v in tensors.items() if k != "fc1.lora_a"}, LORA)
    with pytest.raises(AdapterMismatchError, match=r"unexpected: other\.lora_a"):
        merge_lora(_encoder(), {**tensors, "other.lora_a": torch.zeros(1)}, LORA)
    wrong = {**tensors, "fc1.lora_a": torch.zeros(3, 5)}
    with pytest.raises(AdapterMismatchError, match=r"fc1\.lora_a is \(3, 5\) instead of \(2, 5\)"):
        merge_lora(_encoder(), wrong, LORA)
    with pytest.raises(AdapterMismatchError, match="attached adapters"):
        load_lora_into_peft(adapted, wrong)


def test_another_rank_or_encoder_is_said_in_words(torch_generator: torch.Generator) -> None:
    tensors = _adapted(_encoder(), LORA, torch_generator)
    other_rank = LoraSettings({"qkv": 2, "fc1": 16})
    with pytest.raises(AdapterMismatchError, match=r"fc1\.lora_b .* rank 2 found, rank 16 exp"):
        merge_lora(_encoder(), tensors, other_rank)
    other_encoder = _encoder()
    other_encoder.fc1 = nn.Linear(7, 3)
    with pytest.raises(AdapterMismatchError, match=r"fc1\.lora_a .* another width") as error:
        merge_lora(other_encoder, tensors, LORA)
    assert "rank" not in str(error.value)


def test_dora_and_lora_are_not_mistaken_for_each_other(torch_generator: torch.Generator) -> None:
    tensors = _adapted(_encoder(), DORA, torch_generator)
    plain = LoraSettings(DORA.ranks, DORA.scale)
    with pytest.raises(AdapterMismatchError, match=r"unexpected: block\.qkv\.magnitude"):
        merge_lora(_encoder(), tensors, plain)
    factors = {k: v for k, v in tensors.items() if not k.endswith("magnitude")}
    with pytest.raises(AdapterMismatchError, match=r"missing: block\.qkv\.magnitude"):
        merge_lora(_encoder(), factors, DORA)


def test_a_refused_merge_leaves_the_encoder_alone() -> None:
    encoder = _encoder()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    with pytest.raises(AdapterMismatchError):
        merge_lora(encoder, {"fc1.lora_a": torch.zeros(2, 5)}, LORA, keep_base=True)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    with pytest.raises(AdapterMismatchError, match="holds no base"):
        unmerge_lora(encoder)


# --- counting -------------------------------------------------------------------------------


def test_budget_counts_the_live_model() -> None:
    encoder = _encoder()
    add_lora(encoder, MIXED)
    model = nn.ModuleDict({"encoder": encoder, "decoder": nn.Linear(2, 1)})
    encoder.requires_grad_(False)
    assert parameter_budget(model) == {
        "encoder": (4 * 6 + 6) + (6 * 5 + 5) + (5 * 3 + 3) + 4,
        "decoder": 3,
        "lora": 4 * (4 + 6) + 1 * (5 + 3),
        "total": 87 + 3 + 48,
        "trainable": 3,
    }
    assert lora_budget(model) == {"qkv": 40, "fc1": 8}


def test_budget_of_dora_includes_the_magnitudes() -> None:
    encoder = _encoder()
    add_lora(encoder, DORA)
    assert lora_budget(encoder) == {"qkv": 3 * (4 + 6) + 6, "fc1": 2 * (5 + 3) + 3}
    assert parameter_budget(encoder)["trainable"] == sum(lora_budget(encoder).values())


def test_published_ranks_on_vit_b() -> None:
    with unset_values():
        encoder = SamViT(SAM_VIT_SPECS["vit_b"])
        add_lora(encoder, PUBLISHED)
    dim = 768
    block = {
        "qkv": 64 * (dim + 3 * dim),
        "proj": 64 * (dim + dim),
        "lin1": 32 * (dim + 4 * dim),
        "lin2": 32 * (4 * dim + dim),
    }
    assert sum(block.values()) == 540_672
    assert lora_budget(encoder) == {name: 12 * count for name, count in block.items()}
    assert lora_budget(encoder.blocks[7]) == block
    assert parameter_budget(encoder)["lora"] == 6_488_064
    assert parameter_budget(encoder)["trainable"] == 6_488_064
