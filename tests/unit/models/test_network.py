"""The assembled network on random encoder weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wmh_lora.config import ModelConfig
from wmh_lora.errors import ConfigError
from wmh_lora.models.lora import parameter_budget
from wmh_lora.models.network import WMHNet, build_network, fuse_for_inference

CONFIG = ModelConfig(lora_rank=2, decoder_channels=(16, 8, 8, 8), lora_dropout=0.5)


@pytest.fixture(scope="module")
def training_net() -> WMHNet:
    return build_network(CONFIG, None, for_training=True)


def _slices(generator: torch.Generator) -> torch.Tensor:
    return torch.rand(1, 3, 16, 24, generator=generator)


def _randomise_norms(net: nn.Module, generator: torch.Generator) -> None:
    """Give BatchNorm statistics that folding cannot get right by luck."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                assert tensor is not None
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)


def test_output_and_gradients(training_net: WMHNet, torch_generator: torch.Generator) -> None:
    output = training_net.train().forward_train(_slices(torch_generator))
    assert output.fused_logits.shape == (1, 3, 16, 24)
    output.fused_logits.sum().backward()
    for name, parameter in training_net.named_parameters():
        frozen = name.startswith("encoder.") and ".lora_" not in name
        assert parameter.requires_grad is not frozen
        assert (parameter.grad is None) is frozen, name
    training_net.zero_grad()


def test_forward_is_the_fused_output(
    training_net: WMHNet, torch_generator: torch.Generator
) -> None:
    slices = _slices(torch_generator)
    training_net.eval()
    with torch.no_grad():
        fused = training_net.forward_train(slices).fused_logits
        assert torch.equal(training_net(slices), fused)


def test_training_mode_reaches_only_the_dropout_of_the_encoder(training_net: WMHNet) -> None:
    training_net.train()
    assert training_net.decoder.training
    active = {name for name, m in training_net.encoder.named_modules() if m.training}
    assert active
    assert all(".lora_dropout" in name for name in active)
    assert any(isinstance(training_net.encoder.get_submodule(n), nn.Dropout) for n in active)
    training_net.eval()
    assert not any(module.training for module in training_net.modules())


def test_budget_matches_the_formula(training_net: WMHNet) -> None:
    budget = parameter_budget(training_net)
    blocks = {128: 2, 160: 6, 320: 2}  # encoder width: attention blocks
    # in + out of qkv, proj, fc1 and fc2 are 4, 2, 5 and 5 times the width
    assert budget["lora"] == CONFIG.lora_rank * sum(16 * c * n for c, n in blocks.items())
    assert budget["trainable"] == budget["lora"] + budget["adapter"] + budget["decoder"]
    assert budget["total"] == budget["trainable"] + budget["encoder"]


def test_the_seed_fixes_every_starting_value() -> None:
    state = torch.random.get_rng_state()
    nets = [build_network(CONFIG, None, for_training=False, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    first, same, other = (net.decoder.heads[0].weight for net in nets)
    assert torch.equal(first, same)  # type: ignore[arg-type]
    assert not torch.equal(first, other)  # type: ignore[arg-type]


def test_fusing_keeps_the_output(torch_generator: torch.Generator) -> None:
    net = build_network(CONFIG, None, for_training=False)
    nn.init.normal_(net.adapter.branch[3].weight, std=0.1, generator=torch_generator)  # type: ignore[arg-type]
    _randomise_norms(net, torch_generator)
    slices = _slices(torch_generator)
    with torch.inference_mode():
        before = net(slices)
        after = fuse_for_inference(net)(slices)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_an_unknown_encoder_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Unknown encoder 'resnet'.*litemedsam"):
        build_network(ModelConfig(encoder="resnet"), None, for_training=False)
