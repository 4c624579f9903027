"""The decoder: shapes, the meaning of its fusion, and how it starts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wmh_lora.errors import ConfigError
from wmh_lora.models.decoder import PyramidDecoder

CHANNELS = (4, 5, 6, 7)


def _decoder(**options: object) -> PyramidDecoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return PyramidDecoder(CHANNELS, channels=(8, 6, 4, 4), n_outputs=2, **options)  # type: ignore[arg-type]


def _pyramid(generator: torch.Generator, height: int = 24, width: int = 16) -> list[Tensor]:
    return [
        torch.rand(2, c, height // s, width // s, generator=generator)
        for c, s in zip(CHANNELS, (1, 2, 4, 4), strict=True)
    ]


def test_logits_of_every_level(torch_generator: torch.Generator) -> None:
    output = _decoder()(_pyramid(torch_generator))
    assert output.fused_logits.shape == (2, 2, 24, 16)
    sizes = [tuple(head.shape[-2:]) for head in output.head_logits]
    assert sizes == [(3, 2), (6, 4), (12, 8), (24, 16)]


def test_fusion_is_a_grouped_1x1_convolution_over_the_upsampled_heads(
    torch_generator: torch.Generator,
) -> None:
    decoder = _decoder().eval()
    with torch.no_grad():
        decoder.fusion_weight.copy_(torch.rand(2, 4, generator=torch_generator))
        decoder.fusion_bias.copy_(torch.tensor([0.5, -1.0]))
        output = decoder(_pyramid(torch_generator))
    upsampled = torch.stack(
        [
            F.interpolate(head, size=(24, 16), mode="bilinear", align_corners=False)
            for head in output.head_logits
        ],
        dim=2,
    )
    expected = F.conv2d(
        upsampled.flatten(1, 2),
        decoder.fusion_weight.view(2, 4, 1, 1),
        decoder.fusion_bias,
        groups=2,
    )
    torch.testing.assert_close(output.fused_logits, expected)


def test_untrained_logits_are_near_the_given_bias(torch_generator: torch.Generator) -> None:
    output = _decoder(head_bias=(-3.0, 0.0))(_pyramid(torch_generator))
    means = output.fused_logits.mean(dim=(0, 2, 3))
    torch.testing.assert_close(means, torch.tensor([-3.0, 0.0]), atol=0.2, rtol=0)


def test_every_parameter_and_every_level_takes_part(torch_generator: torch.Generator) -> None:
    decoder = _decoder()
    pyramid = [features.requires_grad_() for features in _pyramid(torch_generator)]
    decoder(pyramid).fused_logits.square().sum().backward()
    assert [n for n, p in decoder.named_parameters() if p.grad is None] == []
    assert all(f.grad is not None and bool(f.grad.abs().max() > 0) for f in pyramid)


def test_sides_must_be_multiples_of_eight(torch_generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="multiples of 8 pixels, found 20 x 16"):
        _decoder()(_pyramid(torch_generator, height=20))


def test_impossible_layouts_are_refused() -> None:
    with pytest.raises(ConfigError, match="decoder_channels"):
        PyramidDecoder(channels=(8, 4))
    with pytest.raises(ConfigError, match="strides"):
        PyramidDecoder((8,), (16,))
    with pytest.raises(ConfigError, match="head biases"):
        PyramidDecoder(n_outputs=2, head_bias=(0.0,))
