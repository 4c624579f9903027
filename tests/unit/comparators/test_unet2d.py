from __future__ import annotations

import pytest
import torch

from wmh_lora.comparators.unet2d import UNet2d


def _published_parameters(channels: tuple[int, ...], inputs: int) -> int:
    """Count the layers that Li et al. (2018) list, with 3 x 3 for their one 4 x 4 kernel."""
    layers = []
    before = inputs
    for level, width in enumerate(channels):
        kernel = 5 if level == 0 else 3
        layers += [(before, width, kernel), (width, width, kernel)]
        before = width
    for width in channels[-2::-1]:
        layers += [(before + width, width, 3), (width, width, 3)]
        before = width
    layers.append((before, 1, 1))
    return sum(k * k * a * b + b for a, b, k in layers)


def test_the_published_width_has_the_published_layers() -> None:
    with torch.device("meta"):
        net = UNet2d(batch_norm=False)
        normalised = UNet2d()
    expected = _published_parameters((64, 96, 128, 256, 512), 1)
    assert sum(p.numel() for p in net.parameters()) == expected
    assert 8_000_000 < expected < 9_500_000
    convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 19  # as in the publication
    # a BatchNorm replaces the bias by gain and offset
    plus = sum(m.out_channels for m in convolutions[:-1])
    assert sum(p.numel() for p in normalised.parameters()) == expected + plus


def test_only_the_middle_slice_is_looked_at(torch_generator: torch.Generator) -> None:
    net = UNet2d((4, 6, 8)).eval()
    slices = torch.rand(1, 3, 16, 24, generator=torch_generator)
    others = slices.clone()
    others[:, [0, 2]] = 0.5
    assert torch.equal(net(slices), net(others))
    assert torch.equal(net(slices), net(slices[:, 1:2]))
    assert net(slices).shape == (1, 1, 16, 24)


def test_every_parameter_learns(torch_generator: torch.Generator) -> None:
    net = UNet2d((4, 6, 8))
    net(torch.rand(2, 3, 16, 16, generator=torch_generator)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_sides_that_do_not_divide_are_refused() -> None:
    with pytest.raises(RuntimeError):
        UNet2d((4, 6, 8))(torch.zeros(1, 3, 18, 16))
