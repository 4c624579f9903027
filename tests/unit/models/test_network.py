"""The assembled network on random encoder weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from wmh_lora.config import ModelConfig
from wmh_lora.errors import ConfigError
from wmh_lora.models.decoder import DecoderOutput
from wmh_lora.models.encoders import ENCODERS, EncoderSpec
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
    modules = dict(training_net.encoder.named_modules())
    adapted = tuple(name for name, module in modules.items() if hasattr(module, "lora_A"))
    active = {name for name, module in modules.items() if module.training}
    assert active
    assert all(name.startswith(adapted) for name in active)
    assert any(isinstance(modules[name], nn.Dropout) for name in active)
    training_net.eval()
    assert not any(module.training for module in training_net.modules())


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_of_the_adapters_acts_in_training_alone(
    dora: bool, torch_generator: torch.Generator
) -> None:
    config = dataclasses.replace(CONFIG, lora_dora=dora)
    net = build_network(config, None, for_training=True, seed=1)
    factors = [p for name, p in net.encoder.named_parameters() if "lora_B" in name]
    with torch.no_grad():
        for factor in factors:
            factor.normal_(std=0.1, generator=torch_generator)
    images = torch.rand(1, 3, 16, 24, generator=torch_generator)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = (net.train().encoder(images) for _ in range(2))
        assert not torch.equal(first, second)
        first, second = (net.eval().encoder(images) for _ in range(2))
        assert torch.equal(first, second)


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


class _Recorder(nn.Module):
    """An encoder at stride 16 that keeps the images it is given."""

    pyramid_channels = (4,)
    pyramid_strides = (16,)
    size_multiple = 16

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 16, stride=16)
        self.norm = nn.BatchNorm2d(4)
        self.seen: list[Tensor] = []

    def forward_pyramid(self, images: Tensor) -> tuple[Tensor]:
        self.seen.append(images.detach().clone())
        return (self.norm(self.conv(images)),)


MEAN, STD = (0.5, 0.25, 0.0), (0.5, 2.0, 1.0)
SMALL = ModelConfig(encoder="small", decoder="upsampling", decoder_channels=(8, 8, 4, 4))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = EncoderSpec(_Recorder, lambda _path: _Recorder(), mean=MEAN, std=STD)
    monkeypatch.setitem(ENCODERS, "small", spec)


def _small_net(
    adaptation: Literal["lora", "frozen", "full"] = "frozen", *, t1_channels: int = 0
) -> WMHNet:
    config = dataclasses.replace(SMALL, adaptation=adaptation, t1_channels=t1_channels)
    return build_network(config, None, for_training=True)


@pytest.mark.usefixtures("small")
def test_the_encoder_gets_its_own_intensities_and_the_decoder_the_picture(
    torch_generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = _small_net().eval()
    pictures: list[Tensor | None] = []
    decode = net.decoder.forward

    def note(pyramid: Sequence[Tensor], picture: Tensor | None) -> DecoderOutput:
        pictures.append(picture)
        return decode(pyramid, picture)

    monkeypatch.setattr(net.decoder, "forward", note)
    slices = torch.rand(2, 3, 32, 48, generator=torch_generator)
    centre = slices[:, 1:2].expand(-1, 3, -1, -1)
    with torch.no_grad():
        assert net(slices).shape == (2, 3, 32, 48)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    assert isinstance(net.encoder, _Recorder)
    assert torch.equal(net.encoder.seen[0], (centre - mean) / std)
    assert pictures[0] is not None
    assert torch.equal(pictures[0], centre)
    assert not any(name.startswith("input_") for name in net.state_dict())
    assert net.size_multiple == 16


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("adaptation", "trained"), [("frozen", False), ("full", True)])
def test_adaptation_decides_what_of_the_encoder_is_trained(
    adaptation: Literal["frozen", "full"], trained: bool
) -> None:
    net = _small_net(adaptation)
    assert all(p.requires_grad is trained for p in net.encoder.parameters())
    assert all(p.requires_grad for p in net.decoder.parameters())
    assert not any(".lora_" in name for name, _ in net.named_parameters())
    assert all(module.training is trained for module in net.encoder.modules())
    assert not any(module.training for module in net.eval().modules())
    config = dataclasses.replace(SMALL, adaptation=adaptation)
    inference = build_network(config, None, for_training=False)
    assert not any(p.requires_grad for p in inference.encoder.parameters())


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("fused", [False, True])
def test_one_model_takes_flair_alone_and_with_t1(
    fused: bool, torch_generator: torch.Generator
) -> None:
    net = _small_net(t1_channels=1)
    for tensor in net.adapter.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=torch_generator) + 0.2)
    _randomise_norms(net, torch_generator)
    net.eval()
    slices = torch.rand(2, 3, 32, 32, generator=torch_generator)
    t1 = torch.rand(2, 1, 32, 32, generator=torch_generator)
    with torch.no_grad():
        alone, both = net(slices), net(slices, t1)
        if fused:
            fuse_for_inference(net)
            torch.testing.assert_close(net(slices), alone, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(net(slices, t1), both, atol=1e-5, rtol=1e-5)
        assert (alone - both).abs().max() > 1e-3
        mixed = net(slices, t1, torch.tensor([True, False]))
    torch.testing.assert_close(mixed, torch.stack([both[0], alone[1]]), atol=1e-5, rtol=1e-5)


def test_an_encoder_without_base_weights_is_trained_in_full() -> None:
    with pytest.raises(ConfigError, match="adaptation = 'full', found 'lora'"):
        build_network(ModelConfig(encoder="compact"), None, for_training=False)


def test_the_base_seed_fixes_the_encoder_alone() -> None:
    first, same_base, other_base = (
        build_network(CONFIG, None, for_training=False, seed=seed, base_seed=base_seed)
        for seed, base_seed in ((1, 5), (2, 5), (1, 6))
    )
    name = "stages.3.blocks.0.attn.qkv.weight"
    weights = [net.encoder.get_parameter(name) for net in (first, same_base, other_base)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    heads = [net.decoder.heads[0].weight for net in (first, same_base, other_base)]
    assert not torch.equal(heads[0], heads[1])  # type: ignore[arg-type]
