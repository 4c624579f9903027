"""Untrained model files: complete, reproducible in a process of their own, never by surprise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.phantoms import head
from tests.processes import fresh_python
from wmh_lora.config import PreprocessConfig
from wmh_lora.engine import segment
from wmh_lora.errors import ConfigError, DataError
from wmh_lora.files import file_sha256
from wmh_lora.models.encoders import ENCODERS
from wmh_lora.models.init import init_model
from wmh_lora.models.model_file import load_network, read_model_card
from wmh_lora.models.network import build_network
from wmh_lora.models.presets import model_preset
from wmh_lora.models.tiny_vit import TinyViT

_FRESH_PROCESS = """
import sys
import torch
from wmh_lora.models.model_file import load_network

torch.rand(5)  # whatever the state of the global generator
net, card = load_network(sys.argv[1])
with torch.inference_mode():
    torch.save(net(torch.load(sys.argv[2], weights_only=True)), sys.argv[3])
"""


def test_a_random_base_encoder_is_the_same_in_a_fresh_process(tmp_path: Path) -> None:
    path, slices, logits = (tmp_path / name for name in ("m.safetensors", "x.pt", "y.pt"))
    card = init_model(path, "litemedsam", seed=3, random_base=True)
    assert card == read_model_card(path)
    assert (card.name, card.base_seed, card.base_sha256) == ("m", 3, "")
    assert (card.model, card.preprocess) == model_preset("litemedsam")
    x = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    torch.save(x, slices)
    finished = fresh_python(_FRESH_PROCESS, path, slices, logits)
    assert finished.returncode == 0, finished.stderr
    net, _ = load_network(path)
    with torch.inference_mode():
        expected = net(x)
    found = torch.load(logits, weights_only=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    # ... and it is the untrained network of that seed: LoRA starts at zero.
    start = build_network(card.model, None, for_training=False, seed=3, base_seed=3)
    with torch.inference_mode():
        torch.testing.assert_close(found, start(x), atol=5e-3, rtol=5e-3)


def test_other_seeds_make_other_models(tmp_path: Path) -> None:
    for seed in (1, 2):
        init_model(tmp_path / f"{seed}.safetensors", "litemedsam", seed=seed, random_base=True)
    first, second = (load_file(tmp_path / f"{seed}.safetensors") for seed in (1, 2))
    assert first.keys() == second.keys()
    for name in ("decoder.heads.0.weight", "lora.stages.3.blocks.0.attn.qkv.lora_a"):
        assert not torch.equal(first[name], second[name])
    assert not any(t.any() for name, t in first.items() if name.endswith("lora_b"))


def test_the_compact_encoder_needs_no_base_and_segments(tmp_path: Path) -> None:
    path = tmp_path / "compact.safetensors"
    card = init_model(path, "compact", seed=1)
    assert (card.base_sha256, card.base_seed) == ("", None)
    volume, _ = head()
    result = segment(volume, model=path, device="cpu")
    assert result.probability.shape == volume.shape
    with pytest.raises(ConfigError, match="has no base weights"):
        init_model(path, "compact", base_weights=tmp_path / "any.pth", overwrite=True)


def test_the_base_weights_are_on_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base.pth"
    base.write_bytes(b"weights")
    spec = ENCODERS["litemedsam"]
    monkeypatch.setitem(
        ENCODERS, "litemedsam", type(spec)(spec.build, lambda _: TinyViT(), lora_ranks={"qkv": 2})
    )
    card = init_model(tmp_path / "m.safetensors", "litemedsam", base_weights=base)
    assert (card.base_sha256, card.base_seed) == (file_sha256(base), None)
    with pytest.raises(ConfigError, match="not both"):
        init_model(tmp_path / "n.safetensors", "litemedsam", base_weights=base, random_base=True)


def test_an_existing_file_stays_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "compact.safetensors"
    init_model(path, "compact", seed=1)
    before = path.read_bytes()
    with pytest.raises(DataError, match="--overwrite"):
        init_model(path, "compact", seed=2)
    assert path.read_bytes() == before
    init_model(path, "compact", seed=2, overwrite=True)
    assert path.read_bytes() != before


@pytest.mark.slow
def test_the_published_configuration(tmp_path: Path) -> None:
    """A trained file of ViT-B with LoRA and decoder stays below 25 MB, and segments a scan."""
    path = tmp_path / "vit-b.safetensors"
    card = init_model(path, "medsam-vit-b", random_base=True)
    assert path.stat().st_size < 25e6
    assert card.preprocess == PreprocessConfig(pixel_size_mm=0.5, multiple_px=16)
    volume, _ = head()
    probability = segment(volume, model=path, device="cpu").probability
    assert 0 < probability.max() < 1
