"""Backends: same probabilities, one conversion, and PyTorch where a backend is not to be had."""

from __future__ import annotations

import importlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.phantoms import head, write_head
from tests.small_models import small_model
from wmh_lora import engine
from wmh_lora.engine import WMHInferenceEngine
from wmh_lora.errors import ConfigError
from wmh_lora.models import backends, export_runtime, precision
from wmh_lora.models.backends import BACKENDS, cached_export, with_backend

MODEL = small_model()
EXPORTED = [name for name in BACKENDS if name != "torch"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WMH_LORA_HOME", str(tmp_path / "cache"))


def _slices(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(batch))


def test_torch_is_the_network_itself() -> None:
    assert with_backend(MODEL, "torch") is MODEL.net


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="known are torch, onnxruntime, openvino"):
        with_backend(MODEL, "tensorrt")


@pytest.mark.parametrize("name", EXPORTED)
def test_probabilities_are_those_of_torch(name: str, caplog: pytest.LogCaptureFixture) -> None:
    net = with_backend(MODEL, name)
    assert net is not MODEL.net
    assert net.size_multiple == 16
    results = []
    # More shapes than are kept compiled, the first one again at the end.
    shapes = [(2, 64, 48), (1, 64, 48), (2, 48, 64), (1, 48, 64), (1, 80, 48), (2, 64, 48)]
    with torch.inference_mode():
        for shape in shapes:
            slices = _slices(*shape)
            results.append((net(slices), MODEL.net(slices)))
        # A view that is not contiguous, as test-time augmentation makes them.
        turned = torch.rot90(_slices(1, 48, 64), 1, (-2, -1))
        results.append((net(turned), MODEL.net(turned)))
    for found, expected in results:
        torch.testing.assert_close(found.sigmoid(), expected.sigmoid(), rtol=0, atol=1e-5)
    assert not caplog.records


@pytest.mark.parametrize("name", EXPORTED)
def test_second_start_converts_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_backend(MODEL, name)
    assert cached_export(MODEL, name).is_file()

    def refuse(*_: object, **__: object) -> float:
        raise AssertionError("converted again")

    monkeypatch.setattr(backends, "export_model", refuse)
    assert with_backend(MODEL, name) is not MODEL.net


def test_place_depends_on_model_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    places = {cached_export(MODEL, "openvino"), cached_export(small_model(1), "openvino")}
    monkeypatch.setattr(backends, "__version__", "99")
    places.add(cached_export(MODEL, "openvino"))
    monkeypatch.setattr(importlib.import_module("openvino"), "__version__", "99")
    places.add(cached_export(MODEL, "openvino"))
    assert len(places) == 4


def test_what_another_network_left_in_the_cache_is_not_taken(
    caplog: pytest.LogCaptureFixture,
) -> None:
    exported = with_backend(MODEL, "onnxruntime")
    again = replace(MODEL, net=exported)  # of the same checksum
    assert with_backend(again, "onnxruntime") is exported
    assert "Only a network of this package" in caplog.text


@pytest.mark.parametrize("name", EXPORTED)
def test_reports_say_where_and_how_an_exported_network_computed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: True)
    monkeypatch.setattr(engine, "choose_device", lambda _: torch.device("meta"))
    exported = replace(MODEL, net=with_backend(MODEL, name))
    result = WMHInferenceEngine(exported).segment(head()[0], precision="auto")
    assert result.settings["device"] == "cpu"
    assert result.settings["used"]["precision"] == "float32"


@pytest.mark.parametrize("name", EXPORTED)
def test_damaged_file_in_the_cache_is_made_again(name: str) -> None:
    with_backend(MODEL, name)
    path = cached_export(MODEL, name)
    path.write_bytes(path.read_bytes()[:100])
    net = with_backend(MODEL, name)
    assert net is not MODEL.net
    assert path.stat().st_size > 100


@pytest.mark.parametrize("name", EXPORTED)
def test_missing_package_leaves_torch_with_one_warning(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nothing(package: str) -> Any:
        raise ModuleNotFoundError(f"No module named {package!r}")

    monkeypatch.setattr(export_runtime, "import_module", nothing)
    assert with_backend(MODEL, name) is MODEL.net
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "pip install wmh-lora[export]" in caplog.text


def test_cache_that_cannot_be_written_leaves_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WMH_LORA_HOME", str(tmp_path / "file"))
    assert with_backend(MODEL, "onnxruntime") is MODEL.net
    assert "onnxruntime cannot be used" in caplog.text


def test_exported_networks_take_no_t1(tmp_path: Path) -> None:
    card = replace(MODEL.card, model=replace(MODEL.card.model, t1_channels=1))
    exported = replace(MODEL, card=card, net=with_backend(MODEL, "onnxruntime"))
    path = write_head(tmp_path / "sub-01_FLAIR.nii.gz")
    runner = WMHInferenceEngine(exported, "cpu")
    assert runner.segment(path).probability.any()
    with pytest.raises(ConfigError, match="takes FLAIR alone, as all exported"):
        runner.segment(path, t1=path)
