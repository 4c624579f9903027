from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wmh_lora.comparators.settings import DynUNetSettings, UnetrSettings
from wmh_lora.comparators.volumetric import build_dynunet, build_unetr, plan_network, slide
from wmh_lora.errors import ConfigError

FloatArray = NDArray[np.float32]


def test_even_voxels_give_the_cubic_network_of_nnunet() -> None:
    plan = plan_network((1.0, 1.0, 1.0), (128, 128, 128))
    assert plan.kernels == ((3, 3, 3),) * 6
    assert plan.strides == ((1, 1, 1), *((2, 2, 2),) * 5)
    with torch.device("meta"):
        net = build_dynunet(DynUNetSettings(), plan)
    # nnU-Net's 3-D network for such patches: 31.2 M with its output layers
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(31.2, abs=0.3)


@pytest.mark.parametrize("spacing", [(3.0, 1.0, 1.0), (6.0, 1.0, 1.0), (8.0, 0.9, 0.9)])
def test_thick_slices_are_mixed_when_pixels_have_grown(spacing: tuple[float, ...]) -> None:
    plan = plan_network(spacing, (16, 128, 128))
    assert plan.kernels[0] == (1, 3, 3)
    assert plan.kernels[-1] == (3, 3, 3)
    grown = np.array(spacing)
    for kernel, stride in zip(plan.kernels, plan.strides):
        grown = grown * stride
        similar = grown[0] < 2 * grown[1]
        assert kernel[0] == (3 if similar else 1)
    product = np.prod(plan.strides, axis=0)
    assert np.all(np.array((16, 128, 128)) // product >= 4)
    assert product[1] == product[2] > product[0]


def test_a_tiny_patch_is_refused() -> None:
    with pytest.raises(ConfigError, match="patch_px"):
        plan_network((1.0, 1.0, 1.0), (8, 8, 8))


def test_dynunet_returns_its_levels_while_it_is_trained() -> None:
    settings = DynUNetSettings(filters=(4, 6, 8, 8), patch_px=(4, 32, 32), t1=True)
    net = build_dynunet(settings, plan_network((8.0, 1.0, 1.0), settings.patch_px, 4))
    patch = torch.zeros(1, 2, 4, 32, 32)
    assert net.train()(patch).shape == (1, 3, 1, 4, 32, 32)
    assert net.eval()(patch).shape == (1, 1, 4, 32, 32)


def test_unetr_has_the_published_size() -> None:
    with torch.device("meta"):
        net = build_unetr(UnetrSettings(patch_px=(96, 96, 96)))
    # Hatamizadeh et al., 2022, table 4: 92.58 M
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(92.58, abs=0.3)
    small = UnetrSettings((16, 16, 32), feature_size=4, hidden_size=12, mlp_dim=12, num_heads=2)
    assert build_unetr(small)(torch.zeros(1, 1, 16, 16, 32)).shape == (1, 1, 16, 16, 32)


class _Pointwise(nn.Module):
    """A voxel's logit is a function of the voxel, or of the patch's first column too."""

    def __init__(self, *, lopsided: bool = False) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(3.0))
        self.lopsided = lopsided

    def forward(self, patch: Tensor) -> Tensor:
        logits = self.gain * patch[:, :1] - 1.0
        return logits + 5.0 * torch.linspace(0, 1, patch.shape[-1]) if self.lopsided else logits


@pytest.mark.parametrize("shape", [(6, 20, 24), (3, 7, 40)])
def test_windows_put_a_scan_together_again(
    shape: tuple[int, int, int], rng: np.random.Generator
) -> None:
    scan = rng.random((1, *shape), dtype=np.float32)
    for mirror in (False, True):
        found = slide([_Pointwise()], scan, (4, 16, 16), overlap=0.5, mirror=mirror)
        np.testing.assert_allclose(found, 1 / (1 + np.exp(1 - 3 * scan[0])), rtol=1e-4)


def test_mirroring_makes_left_and_right_equal(rng: np.random.Generator) -> None:
    scan = rng.random((1, 4, 16, 16), dtype=np.float32)
    nets = [_Pointwise(lopsided=True), _Pointwise()]

    def see(seen: FloatArray, mirror: bool) -> FloatArray:
        return slide(nets, seen, (4, 16, 16), overlap=0.5, mirror=mirror)

    plain, other = (see(s, False) for s in (scan, scan[..., ::-1]))
    assert not np.allclose(plain, other[..., ::-1], atol=1e-3)
    plain, other = (see(s, True) for s in (scan, scan[..., ::-1]))
    np.testing.assert_allclose(plain, other[..., ::-1], rtol=1e-5)
