"""Training from a finished model: the same weights, and T1 alone leaves FLAIR alone as it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from wmh_lora.config import InferenceConfig, ModelConfig, PreprocessConfig
from wmh_lora.errors import AdapterMismatchError, ConfigError
from wmh_lora.models.model_file import ModelCard, assemble_network, save_model
from wmh_lora.models.network import WMHNet, build_network
from wmh_lora.training.settings import RunConfig
from wmh_lora.training.start import start_from_model, train_t1_alone

FLAIR = ModelConfig("compact", adaptation="full", in_channels=3, decoder_channels=(8, 8, 8, 8))
BOTH = dataclasses.replace(FLAIR, t1_channels=3)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A FLAIR-only model whose running statistics and weights are not those of a new network."""
    net = build_network(FLAIR, None, for_training=True, seed=1)
    torch.manual_seed(0)
    net(torch.rand(2, 3, 64, 64))
    torch.nn.init.normal_(dict(net.adapter.named_parameters())["branch.3.weight"], std=0.1)
    path = tmp_path / "finished.safetensors"
    card = ModelCard("finished", FLAIR, PreprocessConfig(), InferenceConfig(), base_sha256="")
    save_model(path, net, card)
    return path


def test_a_network_with_t1_begins_as_the_model_without(finished: Path) -> None:
    net = build_network(BOTH, None, for_training=True, seed=2)
    start_from_model(net, RunConfig(BOTH), "", finished)
    flair, t1 = torch.rand(2, 2, 3, 64, 64)
    expected = assemble_network(finished)[0](flair)
    net.eval()
    torch.testing.assert_close(net(flair), expected, rtol=0, atol=0)
    torch.testing.assert_close(net(flair, t1), expected, rtol=0, atol=0)


def test_a_network_without_t1_begins_as_the_model_with_t1_is_without(
    finished: Path, tmp_path: Path
) -> None:
    both = build_network(BOTH, None, for_training=True, seed=2)
    start_from_model(both, RunConfig(BOTH), "", finished)
    torch.nn.init.normal_(both.adapter.t1_stem.weight)
    path = tmp_path / "both.safetensors"
    card = ModelCard("both", BOTH, PreprocessConfig(), InferenceConfig(), base_sha256="")
    save_model(path, both, card)
    net = build_network(FLAIR, None, for_training=True, seed=3)
    start_from_model(net, RunConfig(FLAIR), "", path)
    flair = torch.rand(2, 3, 64, 64)
    expected = assemble_network(finished)[0](flair)
    torch.testing.assert_close(net.eval()(flair), expected, rtol=0, atol=0)
    torch.nn.init.normal_(both.adapter.t1_missing)  # FLAIR alone is no longer what it was
    save_model(path, both, card, overwrite=True)
    with pytest.raises(ConfigError, match="be 0 where a missing T1 changes nothing"):
        start_from_model(net, RunConfig(FLAIR), "", path)


def test_training_t1_alone_changes_nothing_without_it(finished: Path) -> None:
    net = build_network(BOTH, None, for_training=True, seed=2)
    start_from_model(net, RunConfig(BOTH), "", finished)
    net = train_t1_alone(net).train()
    trained = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    assert trained == ["adapter.t1_stem.weight"]
    optimizer = torch.optim.Adam([net.adapter.t1_stem.weight], lr=1.0)  # the heads are near zero
    flair, t1 = torch.rand(2, 2, 3, 64, 64)
    before, statistics = net(flair).detach(), _statistics(net)
    for _ in range(3):
        optimizer.zero_grad()
        net.forward_train(flair, t1).fused_logits[:, 0].mean().backward()
        optimizer.step()
    torch.testing.assert_close(net(flair), before, rtol=0, atol=0)
    torch.testing.assert_close(_statistics(net), statistics, rtol=0, atol=0)
    assert (net(flair, t1) - before).abs().max() > 1e-4


def _statistics(net: WMHNet) -> torch.Tensor:
    return torch.cat([buffer.flatten().float() for buffer in net.buffers()]).clone()


def test_a_model_of_other_settings_is_refused(finished: Path) -> None:
    other = dataclasses.replace(FLAIR, adapter_width=8)
    with pytest.raises(ConfigError, match=r"not those of .*finished"):
        start_from_model(
            build_network(other, None, for_training=True), RunConfig(other), "", finished
        )
    net = build_network(FLAIR, None, for_training=True)
    with pytest.raises(AdapterMismatchError, match="was trained on base weights"):
        start_from_model(net, RunConfig(FLAIR), "ab" * 32, finished)


def test_other_preprocessing_is_told(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = build_network(FLAIR, None, for_training=True)
    start_from_model(net, RunConfig(FLAIR), "", finished)
    assert not caplog.records
    start_from_model(net, RunConfig(FLAIR, PreprocessConfig(version=2)), "", finished)
    assert "version=2" in caplog.text


def test_t1_alone_needs_t1(finished: Path) -> None:
    with pytest.raises(ConfigError, match="t1_channels"):
        train_t1_alone(build_network(FLAIR, None, for_training=True))
