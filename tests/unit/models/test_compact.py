"""The compact encoder: any size, global context, its cost, and that all of it learns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from wmh_lora.models.compact import CompactEncoder
from wmh_lora.models.network import build_network
from wmh_lora.models.presets import model_preset


@pytest.fixture(scope="module")
def encoder() -> CompactEncoder:
    """An encoder whose BatchNorms have seen a batch, so that signals reach its end."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        encoder = CompactEncoder()
        for module in encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            encoder(torch.rand(2, 3, 64, 64))
        return encoder.eval()


def _pictures(generator: torch.Generator, height: int = 24, width: int = 40) -> Tensor:
    return torch.rand(1, 3, height, width, generator=generator)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 40), (64, 8)])
def test_any_multiple_of_eight(
    encoder: CompactEncoder, torch_generator: torch.Generator, height: int, width: int
) -> None:
    pictures = _pictures(torch_generator, height, width)
    with torch.inference_mode():
        maps = encoder.forward_pyramid(pictures)
        assert torch.equal(encoder(pictures), maps[-1])
    for features, channels, stride in zip(
        maps, encoder.pyramid_channels, encoder.pyramid_strides, strict=True
    ):
        assert features.shape == (1, channels, height // stride, width // stride)
        assert torch.isfinite(features).all()


@pytest.mark.parametrize("shape", [(1, 3, 12, 16), (1, 3, 16, 0), (1, 1, 16, 16), (3, 16, 16)])
def test_other_shapes_are_refused(encoder: CompactEncoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="CompactEncoder takes"):
        encoder(torch.zeros(shape))


def test_every_position_sees_the_whole_picture(
    encoder: CompactEncoder, torch_generator: torch.Generator
) -> None:
    picture = _pictures(torch_generator, 64, 96)
    other = picture.clone()
    other[..., :4, :4] = 1 - other[..., :4, :4]
    with torch.inference_mode():
        before, after = encoder(picture), encoder(other)
    assert (before - after)[0, :, -1, -1].abs().max() > 1e-6


def test_it_knows_where_things_are(encoder: CompactEncoder) -> None:
    """Without positions, attention would give equal tokens inside a flat picture equal answers."""
    with torch.inference_mode():
        tokens = encoder(torch.full((1, 3, 64, 64), 0.5))
    assert (tokens[0, :, 0, 0] - tokens[0, :, 4, 4]).abs().max() > 1e-3


def test_pictures_of_a_batch_do_not_mix(
    encoder: CompactEncoder, torch_generator: torch.Generator
) -> None:
    first, second = _pictures(torch_generator), _pictures(torch_generator)
    with torch.inference_mode():
        both = encoder(torch.cat([first, second]))
        torch.testing.assert_close(both[1:], encoder(second), atol=1e-5, rtol=1e-5)


def test_size_and_cost_of_the_whole_network() -> None:
    """About 110 thousand multiplications a pixel of a slice of 200 x 176."""
    config, _ = model_preset("compact")
    net = build_network(config, None, for_training=False)
    assert 2e6 < sum(p.numel() for p in net.encoder.parameters()) < 4e6
    # The counter knows neither the operators of inference nor the fused attention of the CPU.
    with (
        torch.enable_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        net(torch.zeros(1, 3, 64, 64))
    per_pixel = counter.get_total_flops() / 2 / 64**2
    # Attention is 2 n width multiplications a token and layer, one token in 64 pixels.
    more_tokens = 200 * 176 // 64 - 64**2 // 64
    per_pixel += 2 * more_tokens * 192 * 6 / 64
    assert 100e3 < per_pixel < 130e3


def test_all_of_it_learns(torch_generator: torch.Generator) -> None:
    encoder = CompactEncoder().train()
    maps = encoder.forward_pyramid(_pictures(torch_generator))
    torch.stack([features.square().mean() for features in maps]).sum().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None] == []
    assert sum(isinstance(module, nn.BatchNorm2d) for module in encoder.modules()) > 10
