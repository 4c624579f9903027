"""bfloat16 inference: near float32, nothing else changed, and refused where it cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from wmh_lora.config import ModelConfig
from wmh_lora.errors import ConfigError
from wmh_lora.models.network import WMHNet, build_network, fuse_for_inference
from wmh_lora.models.precision import has_fast_bfloat16, to_precision
from wmh_lora.models.presets import model_preset


def _net(encoder: str) -> WMHNet:
    """A network whose heads make something of its features."""
    config, _ = model_preset(encoder)
    net = fuse_for_inference(build_network(config, None, for_training=False, seed=1))
    for head in net.decoder.heads:
        head.weight.mul_(20)  # type: ignore[operator]
    return net


def _slices(side: int = 48) -> Tensor:
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("encoder", ["litemedsam", "compact"])
def test_logits_stay_near_those_of_float32(encoder: str) -> None:
    net = _net(encoder)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    rounded = to_precision(net, "bfloat16")
    with torch.inference_mode():
        expected, found = net(_slices()), rounded(_slices())
    assert found.dtype == expected.dtype == torch.float32
    difference = (found - expected).abs()
    assert 0 < difference.mean() < 0.02 * expected.std()
    # The network itself is as it was.
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert all(tensor.dtype == torch.float32 for tensor in net.state_dict().values())


def test_the_encoder_of_sam_runs() -> None:
    from wmh_lora.models.adapter import ChannelAdapter
    from wmh_lora.models.decoder import build_decoder
    from wmh_lora.models.sam_vit import SamViT, SamViTSpec

    encoder = SamViT(SamViTSpec(dim=32, depth=2, heads=2, global_blocks=(1,)))
    config = ModelConfig(decoder="upsampling", decoder_skips=False, structures=("wmh",))
    net = WMHNet(ChannelAdapter(3), encoder, build_decoder(config, (256,), (16,)))
    fuse_for_inference(net)
    rounded = to_precision(net, "bfloat16")
    with torch.inference_mode():
        expected = net.encoder.forward_pyramid(_slices(64))[-1]  # type: ignore[operator]
        found = rounded.encoder.forward_pyramid(_slices(64))[-1]  # type: ignore[operator,union-attr]
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().mean() < 0.02 * expected.std()


def test_only_the_layers_that_do_the_work_are_rounded() -> None:
    rounded = to_precision(_net("litemedsam"), "bfloat16")
    names = {n for n, p in rounded.named_parameters() if p.dtype == torch.bfloat16}
    assert {n.split(".")[0] for n in names} == {"encoder"}
    assert not any("norm" in n or "local_conv" in n or "attention_biases" in n for n in names)
    assert "encoder.stages.2.blocks.0.mlp.fc1.weight" in names
    assert "encoder.stages.0.blocks.0.conv2.weight" in names


def test_float32_is_the_network_itself() -> None:
    net = nn.Identity()
    assert to_precision(net, "float32") is net


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="set precision to float32 or bfloat16"):
        to_precision(nn.Identity(), "float16")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="found Identity"):
        to_precision(nn.Identity(), "bfloat16")


def test_the_processor_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda told=answer: told)
        assert has_fast_bfloat16() is answer
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")  # as in torch 2.4
    assert has_fast_bfloat16() is False
