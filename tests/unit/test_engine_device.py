"""A network on a device: devices, precision, and what happens where memory does not suffice."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.phantoms import brightness_model, head
from wmh_lora.config import ModelConfig
from wmh_lora.engine import WMHInferenceEngine
from wmh_lora.engine_device import NetworkOnDevice, choose_dtype
from wmh_lora.engine_views import VIEWS
from wmh_lora.errors import DeviceError
from wmh_lora.models import precision
from wmh_lora.models.network import build_network, fuse_for_inference

CPU = torch.device("cpu")


class SmallMemory(nn.Module):
    """Holds a few slices at once."""

    def __init__(self, most: int, error: Exception) -> None:
        super().__init__()
        self.most, self.error = most, error
        self.sizes: list[int] = []

    def forward(self, slices: Tensor) -> Tensor:
        self.sizes.append(len(slices))
        if len(slices) > self.most:
            raise self.error
        return 4.0 * slices[:, 1:2] - 2.0


ERRORS = (
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
)


class TestMemory:
    @pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
    def test_batch_is_halved_until_it_fits_and_stays_so(
        self, error: Exception, caplog: pytest.LogCaptureFixture
    ) -> None:
        net = SmallMemory(2, error)
        network = NetworkOnDevice(net, ("wmh",), CPU)
        slices = np.random.default_rng(0).random((9, 3, 4, 4), dtype=np.float32)
        with caplog.at_level(logging.WARNING, "wmh_lora"):
            seen = network.see(slices, (0, False))
        expected = torch.sigmoid(torch.from_numpy(4.0 * slices[:, 1] - 2.0)).numpy()
        np.testing.assert_array_equal(seen.lesion, expected)
        assert net.sizes == [9, 4, 2, 2, 2, 2, 1]
        assert network.batch_limit == 2
        assert caplog.text.count("no memory for") == 2
        net.sizes.clear()
        network.see(slices[:4], (0, True))
        assert net.sizes == [2, 2]

    def test_one_slice_too_many_is_an_error(self) -> None:
        engine = WMHInferenceEngine(SmallMemory(0, ERRORS[0]), "cpu")
        with pytest.raises(DeviceError, match="enough memory"):
            engine.predict(head()[0])

    def test_other_errors_are_not_tried_again(self) -> None:
        net = SmallMemory(1, RuntimeError("shapes do not fit"))
        with pytest.raises(RuntimeError, match="shapes do not fit"):
            NetworkOnDevice(net, ("wmh",), CPU).see(np.zeros((4, 3, 4, 4), np.float32), (0, False))
        assert net.sizes == [4]


class TestStructures:
    def test_come_with_the_plain_view_alone(self) -> None:
        class Three(nn.Module):
            def forward(self, slices: Tensor) -> Tensor:
                one = torch.zeros_like(slices[:, :1])
                return torch.cat([one, one + 20.0, one - 20.0], dim=1)

        network = NetworkOnDevice(Three(), ("wmh", "brain", "ventricles"), CPU)
        slices = np.zeros((2, 3, 4, 6), np.float32)
        seen = network.see(slices, (0, False))
        assert (seen.structures["brain"] == 255).all()
        assert (seen.structures["ventricles"] == 0).all()
        for view in VIEWS["d4"][1:]:
            seen = network.see(slices, view)
            assert not seen.structures
            assert seen.lesion.shape == (2, 4, 6)


class TestPrecision:
    def test_float32_is_float32_everywhere(self) -> None:
        for kind in ("cpu", "cuda", "mps"):
            assert choose_dtype(torch.device(kind), "float32") == torch.float32

    @pytest.mark.parametrize(("fast", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
    def test_auto_follows_the_processor(
        self, fast: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: fast)
        assert choose_dtype(CPU, "auto") == expected

    def test_gpus_take_the_half_precision_that_they_have(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        assert choose_dtype(torch.device("cuda"), "auto") == torch.bfloat16
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
        assert choose_dtype(torch.device("cuda"), "auto") == torch.float16
        assert choose_dtype(torch.device("mps"), "auto") == torch.float16

    def test_what_is_not_there_is_said(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: False)
        with caplog.at_level(logging.WARNING, "wmh_lora"):
            assert choose_dtype(CPU, "bfloat16") == torch.float32
        assert "float32 is used" in caplog.text

    def test_it_is_said_once_a_scan(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: False)
        with caplog.at_level(logging.WARNING, "wmh_lora"):
            engine = WMHInferenceEngine(brightness_model(), "cpu")
            result = engine.segment(head()[0], precision="bfloat16")
        assert sum("float32 is used" in record.message for record in caplog.records) == 1
        assert result.settings["used"]["precision"] == "float32"
        assert any("float32 is used" in text for text in result.warnings)

    def test_rounded_network_says_nearly_the_same_and_leaves_the_plain_one(self) -> None:
        config = ModelConfig(
            encoder="compact", adaptation="full", decoder_channels=(8, 8, 8, 8), structures=("wmh",)
        )
        net = fuse_for_inference(build_network(config, None, for_training=False))
        network = NetworkOnDevice(net, ("wmh",), CPU)
        slices = np.random.default_rng(0).random((1, 3, 32, 48), dtype=np.float32)
        plain = network.see(slices, (0, False)).lesion
        rounded = network.see(slices, (0, False), torch.bfloat16).lesion
        assert rounded.dtype == np.float32
        assert 0.0 < np.abs(rounded - plain).max() < 0.05
        np.testing.assert_array_equal(network.see(slices, (0, False)).lesion, plain)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_accelerators_agree_with_the_cpu(kind: str) -> None:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[kind]:
        pytest.skip(f"this machine has no {kind} device")
    config = ModelConfig(encoder="compact", adaptation="full", structures=("wmh",))
    slices = np.random.default_rng(0).random((3, 3, 32, 48), dtype=np.float32)
    found = []
    for device in (CPU, torch.device(kind)):
        net = fuse_for_inference(build_network(config, None, for_training=False))
        network = NetworkOnDevice(net, ("wmh",), device)
        found.append(network.see(slices, (1, True)).lesion)
    np.testing.assert_allclose(found[0], found[1], atol=1e-3)
    half = network.see(slices, (1, True), choose_dtype(torch.device(kind), "auto")).lesion
    np.testing.assert_allclose(found[0], half, atol=0.05)
