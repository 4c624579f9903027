"""SAM's image encoder out of every layout in which it is published, and out of nothing else."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from wmh_lora.errors import ConfigError, WeightsError
from wmh_lora.models import sam_checkpoint
from wmh_lora.models.foreign_checkpoint import checkpoint_file
from wmh_lora.models.sam_checkpoint import load_sam_vit, sam_encoder_state
from wmh_lora.models.sam_vit import SAM_VIT_SPECS, SamViT, SamViTSpec
from wmh_lora.models.unset_values import unset_values

State = dict[str, Tensor]

SMALL = {
    "vit_b": SamViTSpec(dim=32, depth=2, heads=2, global_blocks=(1,)),
    "vit_l": SamViTSpec(dim=48, depth=2, heads=2, global_blocks=(1,)),
}
OTHER_PARTS = {
    "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": torch.zeros(2, 128),
    "prompt_encoder.not_a_point_embed.weight": torch.zeros(1, 256),
    "mask_decoder.iou_token.weight": torch.zeros(1, 256),
}


@pytest.fixture(autouse=True)
def small_specs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of the real encoders at a size that is written and read in no time."""
    monkeypatch.setattr(sam_checkpoint, "SAM_VIT_SPECS", SMALL)


@pytest.fixture(scope="module")
def encoder() -> SamViT:
    torch.manual_seed(3)
    return SamViT(SMALL["vit_b"]).eval()


@pytest.fixture
def state(encoder: SamViT) -> State:
    return dict(encoder.state_dict())


def _sam(state: State) -> State:
    return {**{f"image_encoder.{key}": value for key, value in state.items()}, **OTHER_PARTS}


def _plain(state: State) -> State:
    return state


def _training(state: State) -> dict[str, object]:
    return {"model": _sam(state), "optimizer": {"param_groups": [{"lr": 1e-4}]}, "epoch": 3}


def _parallel(state: State) -> dict[str, object]:
    return {"state_dict": {f"module.{key}": value for key, value in _sam(state).items()}}


def _assert_same(loaded: SamViT, state: State) -> None:
    own = loaded.state_dict()
    assert own.keys() == state.keys()
    for key, value in own.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[key].float()), key


# --- layouts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [_sam, _plain, _training, _parallel])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_torch_files(
    tmp_path: Path, state: State, layout: Callable[[State], object], zipped: bool
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(layout(state), path, _use_new_zipfile_serialization=zipped)
    loaded = load_sam_vit(path, "vit_b")
    _assert_same(loaded, state)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_loaded_values_are_a_copy_of_the_file(tmp_path: Path, state: State) -> None:
    """Merging adapters writes into the weights; neither the file nor its mapping may change."""
    path = tmp_path / "weights.pth"
    torch.save(_sam(state), path)
    before = path.read_bytes()
    loaded = load_sam_vit(path, "vit_b")
    path.write_bytes(bytes(len(before)))
    _assert_same(loaded, state)


@pytest.mark.parametrize("name", ["model.safetensors", "weights.pth"])
def test_safetensors_is_known_by_its_content(tmp_path: Path, state: State, name: str) -> None:
    save_file(_sam(state), tmp_path / name)
    _assert_same(load_sam_vit(tmp_path / name, "vit_b"), state)


def test_half_precision_is_widened(tmp_path: Path, state: State) -> None:
    half = {key: value.half() for key, value in state.items()}
    torch.save(half, tmp_path / "weights.pth")
    _assert_same(load_sam_vit(tmp_path / "weights.pth", "vit_b"), half)


def test_folder(tmp_path: Path, state: State) -> None:
    torch.save(_sam(state), tmp_path / "pytorch_model.bin")
    _assert_same(load_sam_vit(tmp_path, "vit_b"), state)
    other = {key: value + 1 for key, value in state.items()}
    save_file(other, tmp_path / "model.safetensors")
    _assert_same(load_sam_vit(tmp_path, "vit_b"), other)


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"holds neither model\.safetensors nor pytorch_model"):
        checkpoint_file(tmp_path)
    with pytest.raises(WeightsError, match=r"absent\.pth do not exist"):
        load_sam_vit(tmp_path / "absent.pth", "vit_b")


def test_hugging_face_model_is_the_oracle(tmp_path: Path) -> None:
    """Its own implementation gives the same features: no two tensors were confused."""
    import transformers

    torch.manual_seed(0)
    vision: dict[str, Any] = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_dim=128
    )
    vision |= dict(global_attn_indexes=[1], image_size=1024, output_channels=256)
    model = transformers.SamModel(transformers.SamConfig(vision_config=vision)).eval()
    with torch.no_grad():
        for parameter in model.vision_encoder.parameters():  # ones and zeros would hide a swap
            parameter.copy_(parameter + 0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = load_sam_vit(tmp_path, "vit_b")
    images = torch.rand(1, 3, 1024, 1024)
    with torch.no_grad():
        expected = model.vision_encoder(images).last_hidden_state
        found = loaded(images)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", list(SAM_VIT_SPECS))
def test_hugging_face_keys_of_the_real_sizes(name: str) -> None:
    import transformers

    spec = SAM_VIT_SPECS[name]
    vision: dict[str, Any] = dict(hidden_size=spec.dim, num_hidden_layers=spec.depth)
    vision |= dict(num_attention_heads=spec.heads, mlp_dim=4 * spec.dim)
    vision |= dict(global_attn_indexes=list(spec.global_blocks))
    with torch.device("meta"):
        theirs = transformers.SamVisionModel(transformers.SamVisionConfig(**vision)).state_dict()
        ours = SamViT(spec).state_dict()
    renamed = {
        sam_checkpoint.encoder_key_of_hugging_face(key.removeprefix("vision_encoder.")): value.shape
        for key, value in theirs.items()
    }
    assert renamed == {key: value.shape for key, value in ours.items()}


def test_sizes_of_the_published_encoders() -> None:
    """Counts from the paper's own code: 89.7 M, 308.3 M and 637.0 M parameters."""
    counts = {}
    for name, spec in SAM_VIT_SPECS.items():
        with unset_values(), torch.device("meta"):
            counts[name] = sum(parameter.numel() for parameter in SamViT(spec).parameters())
    assert counts == {"vit_b": 89_670_912, "vit_l": 308_278_272, "vit_h": 637_026_048}


# --- refused ----------------------------------------------------------------------------------


def _refused(tmp_path: Path, content: object, match: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(WeightsError, match=match) as error:
        load_sam_vit(path, "vit_b")
    assert str(path) in str(error.value)


def test_missing_key(tmp_path: Path, state: State) -> None:
    del state["blocks.1.attn.rel_pos_h"]
    _refused(tmp_path, _sam(state), r"1 missing \(blocks\.1\.attn\.rel_pos_h\)")


def test_unexpected_key_in_the_encoder(tmp_path: Path, state: State) -> None:
    state["blocks.0.adapter.weight"] = torch.zeros(2)
    _refused(tmp_path, _sam(state), r"1 unexpected \(blocks\.0\.adapter\.weight\)")


def test_misshapen_key(tmp_path: Path, state: State) -> None:
    state["blocks.0.attn.rel_pos_w"] = torch.zeros(13, 16)
    _refused(tmp_path, _sam(state), r"rel_pos_w \(13, 16\) instead of \(27, 16\)")


def test_unknown_part(tmp_path: Path, state: State) -> None:
    content = _sam(state) | {"memory_encoder.weight": torch.zeros(2)}
    _refused(tmp_path, content, r"beside the image encoder it holds memory_encoder\.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(tmp_path: Path, state: State, value: float) -> None:
    damaged = state["blocks.0.mlp.lin1.weight"].clone()
    damaged[3, 5] = value
    state["blocks.0.mlp.lin1.weight"] = damaged
    _refused(tmp_path, _sam(state), r"blocks\.0\.mlp\.lin1\.weight holds NaN or infinite")


def test_integers(tmp_path: Path, state: State) -> None:
    state["neck.1.bias"] = torch.zeros(256, dtype=torch.int64)
    _refused(tmp_path, _sam(state), r"neck\.1\.bias is torch\.int64")


def test_another_size_is_named(tmp_path: Path) -> None:
    _refused(tmp_path, _sam(dict(SamViT(SMALL["vit_l"]).state_dict())), "encoder vit_l, expected")


def test_lite_medsam_is_named(tmp_path: Path) -> None:
    content = {"image_encoder.patch_embed.seq.0.c.weight": torch.zeros(32, 3, 1, 1)}
    _refused(tmp_path, content, "LiteMedSAM's TinyViT, expected vit_b")


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"epoch": 3}])
def test_nothing_of_use(tmp_path: Path, content: object) -> None:
    _refused(tmp_path, content, r"missing \(blocks\.0\.attn\.proj\.bias")


def test_list_of_tensors(tmp_path: Path) -> None:
    _refused(tmp_path, [torch.zeros(2)], "holds a list, expected a dictionary")


class _Malicious:
    """A pickle of it creates a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("save", ["torch", "torch legacy", "pickle"])
def test_code_in_a_file_is_not_run(tmp_path: Path, state: State, save: str) -> None:
    trace = tmp_path / "trace"
    content = {**_sam(state), "image_encoder.more": _Malicious(trace)}
    path = tmp_path / "weights.pth"
    if save == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=save == "torch")
    with pytest.raises(WeightsError, match="cannot be read as a PyTorch checkpoint"):
        load_sam_vit(path, "vit_b")
    assert not trace.exists()
    if save == "torch":  # the trap itself works
        torch.load(path, weights_only=False)
        assert trace.exists()


@pytest.mark.parametrize("keep", [0, 5, 1000, -20])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_truncated_file(tmp_path: Path, state: State, kind: str, keep: int) -> None:
    path = tmp_path / "weights"
    if kind == "pth":
        torch.save(_sam(state), path)
    else:
        save_file(_sam(state), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="cannot be read"):
        load_sam_vit(path, "vit_b")


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'vit_x'; known are vit_b, vit_l"):
        load_sam_vit(tmp_path / "weights.pth", "vit_x")


def test_keys_come_without_prefix(tmp_path: Path, state: State) -> None:
    torch.save(_sam(state), tmp_path / "weights.pth")
    assert sam_encoder_state(tmp_path / "weights.pth").keys() == state.keys()
