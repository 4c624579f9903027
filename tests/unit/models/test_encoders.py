"""The registry of encoders: what each of them promises, and how one is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.processes import fresh_python
from wmh_lora.errors import ConfigError, WeightsError
from wmh_lora.models import build_encoder
from wmh_lora.models.encoders import ENCODERS, EncoderSpec, encoder_spec
from wmh_lora.models.unset_values import unset_values


@pytest.fixture(scope="module", params=sorted(ENCODERS))
def encoder(request: pytest.FixtureRequest) -> tuple[EncoderSpec, nn.Module]:
    spec = ENCODERS[request.param]
    with unset_values():
        return spec, spec.build()


def test_every_encoder_keeps_the_interface(encoder: tuple[EncoderSpec, nn.Module]) -> None:
    spec, module = encoder
    channels, strides = module.pyramid_channels, module.pyramid_strides
    assert isinstance(channels, tuple)
    assert isinstance(strides, tuple)
    assert len(channels) == len(strides)
    assert channels[-1] == 256
    assert isinstance(module.size_multiple, int)
    assert all(module.size_multiple % stride == 0 for stride in strides)
    assert callable(module.forward_pyramid)
    names = {n.rpartition(".")[2] for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    assert spec.lora_ranks.keys() <= names


@pytest.mark.parametrize("name", ["litemedsam", "compact"])
def test_maps_are_as_announced(name: str) -> None:
    module = build_encoder(name)
    size = 2 * int(module.size_multiple)  # type: ignore[arg-type]
    with torch.inference_mode():
        maps = module.forward_pyramid(torch.rand(1, 3, size, 2 * size))  # type: ignore[operator]
    announced = zip(module.pyramid_channels, module.pyramid_strides, strict=True)  # type: ignore[arg-type]
    assert [tuple(m.shape[1:]) for m in maps] == [
        (c, size // s, 2 * size // s) for c, s in announced
    ]


def test_plain_sam_takes_normalised_photographs_and_medsam_the_unit_range() -> None:
    """The published constants are for intensities in 0..255."""
    levels = torch.tensor([0.0, 17.0, 255.0])
    for name in ("sam-vit-b", "sam-vit-l", "sam-vit-h"):
        spec = ENCODERS[name]
        assert not spec.takes_unit_range
        published = zip((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), strict=True)
        for mean, std, (level, scale) in zip(spec.mean, spec.std, published, strict=True):
            ours = (levels / 255 - mean) / std
            torch.testing.assert_close(ours, (levels - level) / scale)
    assert all(ENCODERS[n].takes_unit_range for n in ("medsam-vit-b", "litemedsam", "compact"))


def test_built_encoders_are_frozen_and_in_eval_mode() -> None:
    module = build_encoder("compact")
    assert not any(m.training for m in module.modules())
    assert not any(p.requires_grad for p in module.parameters())


def test_unknown_names_and_unusable_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Unknown encoder 'resnet'.*compact.*litemedsam"):
        encoder_spec("resnet")
    with pytest.raises(ConfigError, match="no base weights"):
        build_encoder("compact", tmp_path / "any.pth")
    with pytest.raises(WeightsError, match=r"absent\.pth"):
        build_encoder("litemedsam", tmp_path / "absent.pth")


def test_unset_values_change_neither_shapes_nor_buffers_nor_the_random_state() -> None:
    state = torch.random.get_rng_state()
    with unset_values():
        unset = ENCODERS["litemedsam"].build()
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.random.fork_rng(devices=[]):
        normal = ENCODERS["litemedsam"].build()
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (unset, normal)]
    assert shapes[0] == shapes[1]
    buffers = dict(normal.named_buffers())
    assert buffers
    for name, buffer in unset.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    # Outside the context, values are drawn again.
    assert nn.Linear(4, 4).weight.abs().max() > 0


def test_the_package_offers_the_builder_without_waiting_for_torch() -> None:
    code = (
        "import sys; import wmh_lora.models; assert 'torch' not in sys.modules; "
        "from wmh_lora.models import build_encoder; "
        "assert build_encoder.__module__ == 'wmh_lora.models.encoders'"
    )
    finished = fresh_python(code)
    assert finished.returncode == 0, finished.stderr
