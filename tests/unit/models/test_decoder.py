"""The decoder: shapes, the meaning of its fusion, and how it starts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wmh_lora.config import ModelConfig
from wmh_lora.errors import ConfigError
from wmh_lora.models.decoder import PyramidDecoder, UpsamplingDecoder, build_decoder

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
    with pytest.raises(ConfigError, match=r"strides.*decoder = 'upsampling'"):
        PyramidDecoder((8,), (16,))
    with pytest.raises(ConfigError, match="strides"):
        PyramidDecoder((8, 8), (1, 2))
    with pytest.raises(ConfigError, match="head biases"):
        PyramidDecoder(n_outputs=2, head_bias=(0.0,))


def test_maps_at_stride_eight_are_the_coarsest_level(torch_generator: torch.Generator) -> None:
    decoder = PyramidDecoder((4, 5, 6), (1, 4, 8), (8, 6, 4, 4))
    fine, middle, deep = (
        torch.rand(1, c, 16 // s, 32 // s, generator=torch_generator)
        for c, s in ((4, 1), (5, 4), (6, 8))
    )
    decoder.eval()
    with torch.no_grad():
        output = decoder((fine, middle, deep))
        assert output.fused_logits.shape == (1, 1, 16, 32)
        other = decoder((fine, middle + 1, deep))
        # The coarsest head sees the deep map alone, the next one the map at its stride as well.
        assert torch.equal(other.head_logits[0], output.head_logits[0])
        assert not torch.equal(other.head_logits[1], output.head_logits[1])


def test_a_pyramid_without_skips_does_not_see_the_early_stages(
    torch_generator: torch.Generator,
) -> None:
    decoder = _decoder(skips=False).eval()
    pyramid = _pyramid(torch_generator)
    with torch.no_grad():
        output = decoder(pyramid).fused_logits
        blind = [torch.full_like(f, torch.nan) if i < 2 else f for i, f in enumerate(pyramid)]
        assert torch.equal(decoder(blind).fused_logits, output)
    names = [name for name, _ in decoder.named_parameters() if ".skips." in name]
    assert {name.split(".")[1] for name in names} == {"0"}  # the level at stride 4


@pytest.mark.parametrize("skips", [True, False])
def test_upsampling_from_stride_sixteen(skips: bool, torch_generator: torch.Generator) -> None:
    decoder = UpsamplingDecoder(6, (8, 6, 4, 4), 2, skips=skips)
    features = torch.rand(2, 6, 2, 3, generator=torch_generator, requires_grad=True)
    picture = torch.rand(2, 3, 32, 48, generator=torch_generator, requires_grad=True)
    output = decoder([features], picture)
    assert output.fused_logits.shape == (2, 2, 32, 48)
    sizes = [tuple(head.shape[-2:]) for head in output.head_logits]
    assert sizes == [(4, 6), (8, 12), (16, 24), (32, 48)]
    output.fused_logits.square().sum().backward()
    assert [n for n, p in decoder.named_parameters() if p.grad is None] == []
    assert features.grad is not None
    assert (picture.grad is not None) is skips


def test_the_published_decoder() -> None:
    """Heads at 64, 128, 256 and 512 pixels, from features of 32 x 32."""
    decoder = UpsamplingDecoder(skips=False).eval()
    with torch.inference_mode():
        output = decoder([torch.zeros(1, 256, 32, 32)])
    assert [head.shape[-1] for head in output.head_logits] == [64, 128, 256, 512]
    assert [level.refine[0][0].out_channels for level in decoder.levels] == [128, 64, 32, 16]  # type: ignore[index,union-attr]


def test_a_stem_shows_a_single_pixel(torch_generator: torch.Generator) -> None:
    """The features at stride 16 are the same: only the stem can tell the two pictures apart."""
    decoder = UpsamplingDecoder(6, (8, 6, 4, 4)).eval()
    features = torch.rand(1, 6, 2, 2, generator=torch_generator)
    picture = torch.rand(1, 3, 32, 32, generator=torch_generator)
    other = picture.clone()
    other[..., 9, 20] += 1
    with torch.no_grad():
        heads = [decoder([features], p).head_logits[-1] for p in (picture, other)]
    change = (heads[0] - heads[1]).abs()[0, 0]
    assert change[9, 20] > 0
    with pytest.raises(ValueError, match="needs the picture"):
        decoder([features])


class TestBuild:
    def test_kind_channels_and_bias_come_from_the_settings(self) -> None:
        config = ModelConfig(decoder_channels=(8, 6, 4, 4), structures=("wmh", "brain"))
        decoder = build_decoder(config, CHANNELS, (1, 2, 4, 4))
        assert isinstance(decoder, PyramidDecoder)
        head = decoder.heads[0]
        assert isinstance(head, torch.nn.Conv2d)
        assert head.bias is not None
        assert head.bias.tolist() == [-2.5, 0.0]
        published = ModelConfig(decoder="upsampling", decoder_skips=False)
        decoder = build_decoder(published, (256,), (16,))
        assert isinstance(decoder, UpsamplingDecoder)
        assert (decoder.stem, decoder.size_multiple) == (None, 16)

    @pytest.mark.parametrize(
        ("kind", "strides", "advice"),
        [("upsampling", (4,), "'pyramid'"), ("pyramid", (16,), "'upsampling'")],
    )
    def test_a_kind_that_does_not_fit_the_encoder(
        self, kind: str, strides: tuple[int, ...], advice: str
    ) -> None:
        with pytest.raises(ConfigError, match=f"set decoder = {advice}"):
            build_decoder(ModelConfig(decoder=kind), (8,), strides)  # type: ignore[arg-type]
