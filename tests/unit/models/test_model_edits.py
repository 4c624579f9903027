"""Changes of finished weights: what changes, what stays, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from wmh_lora.config import InferenceConfig, ModelConfig, PreprocessConfig
from wmh_lora.errors import ConfigError
from wmh_lora.models.model_edits import carry_t1, interpolate_weights, rescale_logits, scale_t1
from wmh_lora.models.model_file import (
    MODEL_FILE,
    ModelCard,
    load_network,
    read_model_card,
    save_model,
)
from wmh_lora.models.network import build_network

CONFIG = ModelConfig(encoder="compact", adaptation="full", decoder_channels=(16, 8, 8, 8))


@pytest.fixture
def card() -> ModelCard:
    return ModelCard(
        name="test",
        model=CONFIG,
        preprocess=PreprocessConfig(context_mm=2.0),
        inference=InferenceConfig(threshold=0.6),
        base_sha256="",
    )


def test_logits_of_one_structure_are_rescaled(tmp_path: Path, card: ModelCard) -> None:
    config = ModelConfig(
        "compact", "full", decoder_channels=(16, 8, 8, 8), structures=("wmh", "brain")
    )
    net = build_network(config, None, for_training=True, seed=5).eval()
    path, target = tmp_path / "model.safetensors", tmp_path / "calibrated.safetensors"
    save_model(path, net, dataclasses.replace(card, model=config))
    rescale_logits(path, target, "wmh", temperature=1.7, shift=-0.4)
    slices = torch.rand(1, 3, 16, 24)
    with torch.inference_mode():
        before, after = (load_network(file)[0](slices) for file in (path, target))
    torch.testing.assert_close(after[:, 0], before[:, 0] / 1.7 - 0.4, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after[:, 1], before[:, 1])
    assert read_model_card(target) == read_model_card(path)
    for structure, temperature in (("tumour", 1.0), ("wmh", 0.0)):
        with pytest.raises(ConfigError, match="structures"):
            rescale_logits(path, target, structure, temperature=temperature, shift=0.0)


def test_a_share_of_t1_scales_what_it_adds_and_leaves_flair_alone(
    tmp_path: Path, card: ModelCard
) -> None:
    config = ModelConfig(
        encoder="compact", adaptation="full", t1_channels=1, decoder_channels=(16, 8, 8, 8)
    )
    net = build_network(config, None, for_training=True, seed=5).eval()
    with torch.no_grad():
        for weight in net.adapter.parameters():  # its last layer starts at zero
            weight.normal_()
    path, target = tmp_path / "model.safetensors", tmp_path / "weaker.safetensors"
    save_model(path, net, dataclasses.replace(card, model=config, base_sha256=""))
    scale_t1(path, target, 0.25)
    slices, t1 = torch.rand(1, 3, 16, 24), torch.rand(1, 1, 16, 24)
    with torch.inference_mode():
        before, after = (load_network(file)[0] for file in (path, target))
        assert torch.equal(before(slices), after(slices))
        torch.testing.assert_close(after(slices, t1), before(slices, t1 * 0.25))
        assert not torch.equal(after(slices, t1), before(slices, t1))
    for refused, share in ((path, 1.1), (path, -0.1)):
        with pytest.raises(ConfigError, match="share"):
            scale_t1(refused, target, share, overwrite=True)


def test_t1_is_carried_to_another_state_of_a_model(tmp_path: Path, card: ModelCard) -> None:
    alone = ModelConfig(encoder="compact", adaptation="full", decoder_channels=(16, 8, 8, 8))
    both = dataclasses.replace(alone, t1_channels=1)
    files = {}
    for name, config, seed in (("later", alone, 6), ("earlier", both, 5)):
        net = build_network(config, None, for_training=True, seed=seed).eval()
        with torch.no_grad():
            for key, weight in net.adapter.named_parameters():
                weight.normal_()
                if key == "t1_missing":
                    weight.zero_()
        files[name] = tmp_path / f"{name}.safetensors"
        save_model(files[name], net, dataclasses.replace(card, model=config, base_sha256=""))
    target = tmp_path / "carried.safetensors"
    carry_t1(files["later"], files["earlier"], target)
    slices, t1 = torch.rand(1, 3, 16, 24), torch.rand(1, 1, 16, 24)
    (later, _), (carried, _) = (load_network(file) for file in (files["later"], target))
    with torch.inference_mode():
        assert torch.equal(carried(slices), later(slices))
        assert not torch.equal(carried(slices, t1), carried(slices))
    with pytest.raises(ConfigError, match="must take no T1"):
        carry_t1(target, files["earlier"], target, overwrite=True)
    coarser = tmp_path / "coarser.safetensors"
    other = dataclasses.replace(
        read_model_card(files["later"]), preprocess=PreprocessConfig(pixel_size_mm=1.25)
    )
    save_model(coarser, build_network(alone, None, for_training=True, seed=6), other)
    with pytest.raises(ConfigError, match="preprocess"):
        carry_t1(coarser, files["earlier"], target, overwrite=True)


def test_a_share_of_t1_needs_a_model_that_takes_one(tmp_path: Path, card: ModelCard) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, build_network(CONFIG, None, for_training=True, seed=5), card)
    with pytest.raises(ConfigError, match="0 channels of T1"):
        scale_t1(path, tmp_path / "weaker.safetensors", 0.5)


def test_weights_are_put_between_two_states(tmp_path: Path, card: ModelCard) -> None:
    alone = ModelConfig(encoder="compact", adaptation="full", decoder_channels=(16, 8, 8, 8))
    both = dataclasses.replace(alone, t1_channels=1)
    nets, files = {}, {}
    for name, config, seed, version in (("earlier", both, 5, 2), ("later", alone, 6, 3)):
        nets[name] = build_network(config, None, for_training=True, seed=seed).eval()
        files[name] = tmp_path / f"{name}.safetensors"
        shown = dataclasses.replace(card.preprocess, version=version)
        save_model(
            files[name], nets[name], dataclasses.replace(card, model=config, preprocess=shown)
        )
    target = tmp_path / "between.safetensors"
    interpolate_weights(files["earlier"], files["later"], target, 0.25)
    (found, one), (_, first), (_, last) = (
        MODEL_FILE.read(path) for path in (target, files["earlier"], files["later"])
    )
    # what was trained on with newer preprocessing gets it
    older, newer = (read_model_card(files[name]) for name in ("earlier", "later"))
    assert found == dataclasses.replace(older, preprocess=newer.preprocess)
    mixed = [name for name in first if name in last and first[name].is_floating_point()]
    assert any(not torch.equal(first[name], last[name]) for name in mixed)
    for name in mixed:
        torch.testing.assert_close(one[name], 0.75 * first[name] + 0.25 * last[name])
    apart = set(first) - set(last)
    assert apart
    assert all(torch.equal(one[name], first[name]) for name in apart)
    finer = tmp_path / "finer.safetensors"
    save_model(
        finer, nets["later"], dataclasses.replace(card, model=alone, preprocess=PreprocessConfig())
    )
    for other, share in ((files["later"], 1.5), (finer, 0.5)):
        with pytest.raises(ConfigError, match="share"):
            interpolate_weights(files["earlier"], other, target, share, overwrite=True)
