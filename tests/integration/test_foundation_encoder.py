"""A SAM checkpoint becomes a trained model: two steps, a file, the same output elsewhere.

The checkpoint has the layout of the published ones, with fewer and narrower blocks.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from safetensors.torch import save_file

from tests.processes import fresh_python
from wmh_lora.config import ModelConfig, PreprocessConfig
from wmh_lora.errors import ConfigError
from wmh_lora.models import sam_checkpoint
from wmh_lora.models.encoders import ENCODERS, EncoderSpec
from wmh_lora.models.lora import load_lora_into_peft
from wmh_lora.models.model_file import load_model_file, load_network, load_trained_parts
from wmh_lora.models.network import build_network
from wmh_lora.models.presets import model_preset
from wmh_lora.models.sam_checkpoint import encoder_key_of_hugging_face
from wmh_lora.models.sam_vit import Block, SamViT, SamViTSpec
from wmh_lora.training import run
from wmh_lora.training.settings import RunConfig, TrainingConfig

SPEC: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 2, "global_blocks": (1,)}
CONVENTION: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
MODEL = ModelConfig(
    encoder="sam-vit-b",
    lora_rank=4,
    lora_alpha=4,
    lora_targets=("qkv", "proj", "lin1", "lin2"),
    lora_ranks={"lin1": 2, "lin2": 2},
    decoder="upsampling",
    decoder_channels=(16, 8, 8, 8),
    structures=("wmh",),
)


class _Sample(NamedTuple):
    image: npt.NDArray[np.float32]
    target: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]


class _Stream:
    def __init__(self, crop: int) -> None:
        self.crop = crop

    def files(self) -> list[Path]:
        return []

    def item(self, index: int) -> _Sample:
        rng = np.random.default_rng(index)
        image = rng.random((3, self.crop, self.crop), dtype=np.float32)
        target = (image[1:2] > 0.8).astype(np.float32)
        return _Sample(image, target, np.array([True]))


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def stream(
        _table: object, _seed: int, crop: int, *_: object, in_channels: int, t1_channels: int
    ) -> _Stream:
        assert (in_channels, t1_channels) == (3, 0)
        return _Stream(crop)

    monkeypatch.setattr(run, "build_stream", stream)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small encoder in the registry, and its weights in SAM's layout."""
    spec = SamViTSpec(**SPEC)
    monkeypatch.setattr(sam_checkpoint, "SAM_VIT_SPECS", {"small": spec})
    entry = EncoderSpec(
        lambda: SamViT(spec), partial(sam_checkpoint.load_sam_vit, name="small"), **CONVENTION
    )
    monkeypatch.setitem(ENCODERS, "sam-vit-b", entry)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return _write(tmp_path / "sam_small.pth", SamViT(spec))


def _write(path: Path, encoder: SamViT) -> Path:
    state = {f"image_encoder.{name}": value for name, value in encoder.state_dict().items()}
    torch.save({**state, "mask_decoder.iou_token.weight": torch.zeros(1, 256)}, path)
    return path


def _write_as_hugging_face(path: Path, encoder: SamViT) -> Path:
    """The same weights under the names of `transformers.SamModel`."""
    names = encoder.state_dict()
    blocks: Any = encoder.blocks
    with torch.device("meta"):
        theirs = transformers.SamVisionModel(
            transformers.SamVisionConfig(
                hidden_size=names["pos_embed"].shape[-1],
                num_hidden_layers=len(blocks),
                num_attention_heads=blocks[0].attn.heads,
                mlp_dim=len(names["blocks.0.mlp.lin1.bias"]),
                global_attn_indexes=[i for i, b in enumerate(blocks) if not b.attn.window],
            )
        ).state_dict()
    state = {
        key: names[encoder_key_of_hugging_face(key.removeprefix("vision_encoder."))]
        for key in theirs
    }
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


def _config(checkpoint: Path, model: ModelConfig = MODEL, **training: Any) -> RunConfig:
    settings: dict[str, Any] = dict(
        steps=2, batch_size=1, crop=32, warmup_steps=1, workers=0, log_steps=1, lora_lr=1e-2
    )
    settings |= {"base_weights": str(checkpoint), **training}
    return RunConfig(
        model=model,
        preprocess=PreprocessConfig(multiple_px=16),
        training=TrainingConfig(**settings),
    )


_FRESH_PROCESS = """
import json
import sys
from functools import partial
import torch
from wmh_lora.models import sam_checkpoint
from wmh_lora.models.encoders import ENCODERS, EncoderSpec
from wmh_lora.models.model_file import load_network
from wmh_lora.models.sam_vit import SamViT, SamViTSpec

injected = json.loads(sys.argv[1])
if injected:
    spec = SamViTSpec(**injected["spec"])
    sam_checkpoint.SAM_VIT_SPECS = {"small": spec}
    load = partial(sam_checkpoint.load_sam_vit, name="small")
    ENCODERS["sam-vit-b"] = EncoderSpec(lambda: SamViT(spec), load, **injected["convention"])
model, base, slices, logits = sys.argv[2:]
torch.set_num_threads(1)
net, _ = load_network(model, base)
with torch.inference_mode():
    torch.save(net(torch.load(slices, weights_only=True)), logits)
assert not {"peft", "transformers"} & set(sys.modules)
"""


def _outputs(
    tmp_path: Path, model: ModelConfig, checkpoint: Path, side: int, injected: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of the trained network here (adapters attached) and in a fresh process (merged)."""
    file, slices, logits = tmp_path / "run" / "last.safetensors", tmp_path / "x.pt", tmp_path / "y"
    _, tensors = load_model_file(file)
    net = build_network(model, checkpoint, for_training=True)
    lora = load_trained_parts(net, tensors)
    load_lora_into_peft(net.encoder, lora)
    x = torch.rand(1, 3, side, side + 16, generator=torch.Generator().manual_seed(1))
    torch.save(x, slices)
    arguments = [json.dumps(injected), *map(str, (file, checkpoint, slices, logits))]
    finished = fresh_python(_FRESH_PROCESS, *arguments, timeout_s=300)
    assert finished.returncode == 0, finished.stderr
    with torch.inference_mode():
        expected = net.eval()(x)
    return expected, torch.load(logits, weights_only=True), lora


@pytest.mark.parametrize("layout", ["original", "hugging face"])
def test_two_steps_on_a_sam_checkpoint(tmp_path: Path, checkpoint: Path, layout: str) -> None:
    if layout == "hugging face":
        encoder = sam_checkpoint.load_sam_vit(checkpoint, "small")
        checkpoint = _write_as_hugging_face(tmp_path / "model.safetensors", encoder)
    assert run.train(_config(checkpoint), tmp_path / "run")
    expected, found, lora = _outputs(
        tmp_path, MODEL, checkpoint, 48, {"spec": SPEC, "convention": CONVENTION}
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert all(tensor.any() for name, tensor in lora.items() if name.endswith("lora_b"))
    shapes = {name.rpartition(".")[0]: t.shape[0] for name, t in lora.items() if "lora_a" in name}
    assert {shapes["blocks.0.attn.qkv"], shapes["blocks.1.mlp.lin2"]} == {4, 2}


def test_gradient_checkpointing_computes_blocks_again_and_changes_nothing(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    forward = Block.forward

    def count(self: Block, tokens: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return forward(self, tokens)

    monkeypatch.setattr(Block, "forward", count)
    counted, files = [], []
    for recompute in (False, True):
        calls, folder = 0, tmp_path / f"recompute-{recompute}"
        run.train(_config(checkpoint, gradient_checkpointing=recompute), folder)
        counted.append(calls)
        files.append(load_model_file(folder / "last.safetensors")[1])
    assert counted == [4, 8]  # two blocks, two steps
    for name, tensor in files[0].items():
        torch.testing.assert_close(files[1][name], tensor, atol=1e-5, rtol=1e-4)


def test_a_crop_that_the_encoder_cannot_take(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"training.crop = 24.*multiples of 16"):
        run.train(_config(checkpoint, crop=24), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_checkpointing": True, "base_weights": ""}, "no gradient checkpointing"),
        ({"base_weights": "any.pth"}, "has no base weights"),
    ],
)
def test_settings_that_do_not_fit_the_encoder(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    model, _ = model_preset("compact")
    with pytest.raises(ConfigError, match=message):
        run.train(_config(Path(), model, **settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("encoder", ["sam-vit-b", "compact"])
def test_a_network_trained_in_full(tmp_path: Path, checkpoint: Path, encoder: str) -> None:
    """Its file alone is enough, and the run resumes."""
    base = model_preset("compact")[0] if encoder == "compact" else MODEL
    model = dataclasses.replace(base, adaptation="full", structures=("wmh",))
    weights = "" if encoder == "compact" else str(checkpoint)
    config = _config(checkpoint, model, base_weights=weights)
    assert run.train(config, tmp_path / "run")
    longer = _config(checkpoint, model, base_weights=weights, steps=3)
    assert run.train(longer, tmp_path / "run", resume=True)
    checkpoint.unlink()
    net, card = load_network(tmp_path / "run" / "last.safetensors")
    assert (card.model, card.training["step"]) == (model, 3)
    assert bool(card.base_sha256) is (encoder != "compact")
    with torch.inference_mode():
        assert torch.isfinite(net(torch.rand(1, 3, 32, 48))).all()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["original", "hugging face"])
def test_two_steps_on_a_whole_vit_b(tmp_path: Path, layout: str) -> None:
    encoder = ENCODERS["medsam-vit-b"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        built = encoder.build()
    assert isinstance(built, SamViT)
    if layout == "original":
        checkpoint = _write(tmp_path / "medsam_vit_b.pth", built)
    else:
        checkpoint = _write_as_hugging_face(tmp_path / "model.safetensors", built)
    model, _ = model_preset("medsam-vit-b")
    assert run.train(_config(checkpoint, model, crop=64), tmp_path / "run")
    expected, found, _ = _outputs(tmp_path, model, checkpoint, 64, {})
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
