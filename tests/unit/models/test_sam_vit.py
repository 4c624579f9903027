"""SAM's encoder: against the implementation of transformers, and on its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmh_lora.models import sam_vit_attention
from wmh_lora.models.sam_vit import SAM_VIT_SPECS, SamViT, SamViTSpec
from wmh_lora.models.sam_vit_attention import biased_attention, relative_positions

TINY = SamViTSpec(dim=32, depth=3, heads=2, global_blocks=(1,))

HF_NAMES = {
    "blocks.": "layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    "patch_embed.proj.": "patch_embed.projection.",
    "neck.0.": "neck.conv1.",
    "neck.1.": "neck.layer_norm1.",
    "neck.2.": "neck.conv2.",
    "neck.3.": "neck.layer_norm2.",
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """On a busy machine, threads that wait for each other make these tests many times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _build(spec: SamViTSpec, seed: int = 0) -> SamViT:
    """Random weights with strong positions and biases: small ones would hide their mistakes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SamViT(spec).requires_grad_(False).eval()
        for name, parameter in model.named_parameters():
            if name == "pos_embed" or "rel_pos" in name or name.endswith("bias"):
                nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def encoder() -> SamViT:
    return _build(TINY)


def _images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- agreement with the implementation of transformers ----------------------------------------


def _reference(model: SamViT, spec: SamViTSpec) -> Callable[[Tensor], Tensor]:
    """Neck features of transformers' eager implementation, as a function of our parameters."""
    from transformers.models.sam.configuration_sam import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    config = SamVisionConfig(
        hidden_size=spec.dim,
        mlp_dim=4 * spec.dim,
        num_hidden_layers=spec.depth,
        num_attention_heads=spec.heads,
        window_size=spec.window,
        global_attn_indexes=list(spec.global_blocks),
    )
    config._attn_implementation = "eager"
    with torch.device("meta"):
        reference: Any = SamVisionEncoder(config).eval()
    assert type(reference.layers[0].attn).__name__ == "SamVisionAttention"  # the eager one

    def features(images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        parameters: dict[str, Tensor] = {}
        for name, value in model.named_parameters():
            for ours, theirs in HF_NAMES.items():
                name = name.replace(ours, theirs)
            parameters[name] = value
        if (height, width) != (1024, 1024):  # it has no interpolation of its own
            stored = model.pos_embed.permute(0, 3, 1, 2)
            resized = F.interpolate(stored, (height // 16, width // 16), mode="bicubic")
            parameters["pos_embed"] = resized.permute(0, 2, 3, 1)
        reference.patch_embed.image_size = (height, width)
        out = torch.func.functional_call(reference, parameters, (images,), strict=True)
        hidden: Tensor = out.last_hidden_state
        return hidden

    return features


def _assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    difference = float((found - expected).abs().max())
    assert difference < tolerance * min(1.0, float(expected.abs().max()))


def _assert_gradients_agree(
    model: SamViT, reference: Callable[[Tensor], Tensor], images: Tensor, names: list[str]
) -> None:
    inputs = [images.requires_grad_(), *map(model.get_parameter, names)]
    for tensor in inputs:
        tensor.requires_grad_()
    found, expected = model(images), reference(images)
    weights = _images(*found.shape, seed=3)
    ours = torch.autograd.grad((found * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    _assert_near(found.detach(), expected.detach())
    for name, one, other in zip(["images", *names], ours, theirs):
        scale = max(1.0, float(other.abs().max()))  # zero where a softmax has one key
        difference = float((one - other).abs().max()) / scale
        assert difference < 1e-4, f"gradient of {name}: {difference}"


GRADIENTS_OF = [
    "pos_embed",
    "patch_embed.proj.weight",
    "blocks.0.attn.qkv.weight",
    "blocks.0.attn.qkv.bias",
    "blocks.0.attn.rel_pos_h",
    "blocks.1.attn.rel_pos_h",
    "blocks.1.attn.rel_pos_w",
    "blocks.2.attn.rel_pos_w",
    "blocks.2.mlp.lin2.weight",
    "neck.1.weight",
]

# 448: whole windows. 512: 14 + 14 + 4 tokens. (64, 48): smaller than a window. (336, 272): whole
# windows along one axis, 14 + 3 along the other.
SIZES = [(448, 448), (512, 512), (336, 272), (64, 48), (16, 16)]


@pytest.mark.parametrize("size", SIZES)
def test_features_and_gradients_agree_with_transformers(
    encoder: SamViT, size: tuple[int, int]
) -> None:
    images = _images(2 if max(size) < 400 else 1, 3, *size)
    _assert_gradients_agree(encoder, _reference(encoder, TINY), images, GRADIENTS_OF)


def test_features_agree_with_transformers_at_1024_px() -> None:
    spec = SamViTSpec(dim=16, depth=2, heads=1, global_blocks=(1,))
    model = _build(spec)
    with torch.no_grad():
        images = _images(1, 3, 1024, 1024)
        _assert_near(model(images), _reference(model, spec)(images))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1024, 1024), (512, 512), (448, 448), (512, 384)])
def test_vit_b_agrees_with_transformers(size: tuple[int, int]) -> None:
    spec = SAM_VIT_SPECS["vit_b"]
    model = _build(spec)
    reference, images = _reference(model, spec), _images(1, 3, *size)
    if max(size) < 1024:
        _assert_gradients_agree(model, reference, images, GRADIENTS_OF)
    else:  # gradients: see below
        with torch.no_grad():
            _assert_near(model(images), reference(images))


@pytest.mark.slow
def test_gradients_agree_with_transformers_at_1024_px() -> None:
    """Two of ViT-B's blocks: with all twelve, the reference would need more than 16 GB."""
    spec = SamViTSpec(dim=768, depth=2, heads=12, global_blocks=(1,))
    model = _build(spec)
    names = [name for name in GRADIENTS_OF if not name.startswith("blocks.2")]
    _assert_gradients_agree(model, _reference(model, spec), _images(1, 3, 1024, 1024), names)


# --- positions --------------------------------------------------------------------------------


def _interpolated(table: np.ndarray, length: int) -> np.ndarray:
    """Linear interpolation between the centres of cells, the first and last value extended."""
    places = (np.arange(length) + 0.5) * len(table) / length - 0.5
    columns = [np.interp(places, np.arange(len(table)), column) for column in table.T]
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("size", [14, 5, 1, 32])
def test_relative_positions_follow_the_published_rule(size: int) -> None:
    table = _images(27, 4)
    found = relative_positions(table, size).numpy()
    resized = table.numpy() if size == 14 else _interpolated(table.numpy(), 2 * size - 1)
    for query in range(size):
        for key in range(size):
            expected = resized[query - key + size - 1]
            np.testing.assert_allclose(found[query, key], expected, atol=1e-5)


def test_positions_are_the_stored_ones_at_1024_px_and_bicubic_elsewhere(encoder: SamViT) -> None:
    assert torch.equal(encoder._positions(64, 64), encoder.pos_embed)
    stored = encoder.pos_embed.permute(0, 3, 1, 2)
    for size in ((32, 32), (28, 70)):
        expected = F.interpolate(stored, size, mode="bicubic", align_corners=False, antialias=False)
        assert torch.equal(encoder._positions(*size).permute(0, 3, 1, 2), expected)


def test_changed_positions_count_at_once(encoder: SamViT) -> None:
    images = _images(1, 3, 48, 64)
    other = _build(TINY, seed=1)
    with torch.no_grad():
        before = encoder(images)
        encoder.load_state_dict(other.state_dict())
        assert torch.equal(encoder(images), other(images))
        encoder.get_parameter("blocks.1.attn.rel_pos_h").mul_(2)
        assert not torch.equal(encoder(images), other(images))
    assert not torch.equal(before, other(images))


# --- attention --------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [(1, (1, 2)), (40, (1, 4)), (2**22, (128, 256))])
def test_attention_in_pieces_has_exact_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, pieces: tuple[int, tuple[int, int]]
) -> None:
    monkeypatch.setattr(sam_vit_attention, "PIECE_SCORES", pieces[0])
    monkeypatch.setattr(sam_vit_attention, "PIECE_QUERIES", pieces[1])
    shapes = ((3, 2, 5, 4), (3, 2, 6, 4), (3, 2, 6, 4), (3, 2, 5, 2), (3, 2, 5, 3))
    inputs = [_images(*s, seed=i).double().requires_grad_() for i, s in enumerate(shapes)]
    q, k, v, rel_rows, rel_cols = inputs
    bias = (rel_rows[..., :, None] + rel_cols[..., None, :]).flatten(-2)
    expected = (q @ k.transpose(-2, -1) / 2 + bias).softmax(dim=-1) @ v
    torch.testing.assert_close(biased_attention(q, k, v, rel_rows, rel_cols), expected)
    assert torch.autograd.gradcheck(biased_attention, inputs)


# --- names, counts, shapes --------------------------------------------------------------------


def test_state_has_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        state = SamViT(SAM_VIT_SPECS["vit_b"]).state_dict()
    expected: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, 64, 64, 768),
        "patch_embed.proj.weight": (768, 3, 16, 16),
        "patch_embed.proj.bias": (768,),
        "neck.0.weight": (256, 768, 1, 1),
        "neck.1.weight": (256,),
        "neck.1.bias": (256,),
        "neck.2.weight": (256, 256, 3, 3),
        "neck.3.weight": (256,),
        "neck.3.bias": (256,),
    }
    linear = {
        "attn.qkv": (2304, 768),
        "attn.proj": (768, 768),
        "mlp.lin1": (3072, 768),
        "mlp.lin2": (768, 3072),
    }
    for index in range(12):
        block = f"blocks.{index}"
        offsets = 127 if index in (2, 5, 8, 11) else 27
        for axis in "hw":
            expected[f"{block}.attn.rel_pos_{axis}"] = (offsets, 64)
        for norm in ("norm1", "norm2"):
            expected[f"{block}.{norm}.weight"] = expected[f"{block}.{norm}.bias"] = (768,)
        for name, shape in linear.items():
            expected[f"{block}.{name}.weight"] = shape
            expected[f"{block}.{name}.bias"] = shape[:1]
    assert {name: tuple(value.shape) for name, value in state.items()} == expected


@pytest.mark.parametrize(
    ("name", "count"),
    [("vit_b", 89_670_912), ("vit_l", 308_278_272), ("vit_h", 637_026_048)],
)
def test_parameters_are_as_many_as_published(name: str, count: int) -> None:
    with torch.device("meta"):
        model = SamViT(SAM_VIT_SPECS[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_output_is_a_pyramid_of_one_channels_last_level(encoder: SamViT) -> None:
    with torch.inference_mode():
        (neck,) = encoder.forward_pyramid(_images(2, 3, 32, 80))
    channels, stride = encoder.pyramid_channels, encoder.pyramid_strides
    assert (neck.shape[1], 32 // neck.shape[2], 80 // neck.shape[3]) == (*channels, *stride * 2)
    assert neck.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(24, 32), (32, 24), (0, 32)])
def test_other_sizes_are_refused(encoder: SamViT, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"multiples of 16 pixels, found {size[0]} x {size[1]}"):
        encoder(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32)])
def test_other_shapes_are_refused(encoder: SamViT, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), found"):
        encoder(torch.zeros(shape))


# --- behaviour --------------------------------------------------------------------------------


def test_images_of_a_batch_do_not_influence_each_other(encoder: SamViT) -> None:
    images = _images(3, 3, 240, 64)
    with torch.no_grad():
        together = encoder(images)
        alone = torch.cat([encoder(image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_values_are_the_same_with_and_without_gradients(encoder: SamViT) -> None:
    images = _images(1, 3, 256, 240)
    with torch.inference_mode():
        expected = encoder(images)
    found = encoder(images.requires_grad_())
    assert found.requires_grad
    torch.testing.assert_close(found.detach(), expected.clone(), atol=1e-5, rtol=1e-4)


def test_bfloat16_autocast_stays_near_float32(encoder: SamViT) -> None:
    images = _images(1, 3, 256, 64).requires_grad_()
    expected = encoder(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(images)
    assert (found - expected).abs().mean() < 0.05 * expected.std()
    (gradient,) = torch.autograd.grad(expected.square().mean(), images)
    (rough,) = torch.autograd.grad(found.float().square().mean(), images)
    cosine = F.cosine_similarity(gradient.flatten(), rough.flatten(), dim=0)
    assert cosine > 0.9


# --- adapters ---------------------------------------------------------------------------------


def _with_adapters(encoder: SamViT, **settings: Any) -> SamViT:
    import peft

    model = copy.deepcopy(encoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=4, lora_alpha=4, target_modules=["qkv", "proj", "lin1", "lin2"], **settings
        )
        # patch_embed.proj is a convolution; adapters are for the linear layers.
        config.exclude_modules = ["patch_embed.proj"]
        peft.inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_equal_merged_weights_where_windows_are_padded(
    encoder: SamViT, dora: bool
) -> None:
    adapted = _with_adapters(encoder, use_dora=dora).eval()
    merged = copy.deepcopy(encoder)
    wrapped = [(n, m) for n, m in adapted.named_modules() if hasattr(m, "lora_A")]
    assert len(wrapped) == 4 * TINY.depth
    images = _images(1, 3, 256, 64)
    found = adapted(images)
    for name, module in wrapped:
        layer: Any = module
        layer.merge()
        merged.get_submodule(name).load_state_dict(layer.base_layer.state_dict())
    with torch.no_grad():
        expected = merged(images)
        assert float((expected - encoder(images)).abs().max()) > 0.01  # the adapters do something
    _assert_near(found.detach(), expected)


def test_checkpointing_changes_neither_features_nor_gradients(encoder: SamViT) -> None:
    model = _with_adapters(encoder, lora_dropout=0.3).train()
    images = _images(1, 3, 256, 64)
    parameters = [p for p in model.parameters() if p.requires_grad]
    results = []
    for model.gradient_checkpointing in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            features = model(images)
            gradients = torch.autograd.grad(features.square().mean(), parameters)
        results.append((features.detach(), *gradients))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, atol=0, rtol=1e-6)


def test_checkpointing_keeps_little_more_than_the_inputs_of_blocks() -> None:
    model = _build(SamViTSpec(dim=256, depth=4, heads=4, global_blocks=(1,))).train()
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    images = _images(1, 3, 64, 64).requires_grad_()
    kept = []
    for model.gradient_checkpointing in (False, True):
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            if tensor.data_ptr() not in weights:
                sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            features = model(images)
        assert features.requires_grad
        kept.append(sum(sizes.values()))
    assert kept[1] < kept[0] / 3
