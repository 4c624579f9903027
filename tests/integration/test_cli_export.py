"""`wmh-lora export` on a model file, through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from wmh_lora.cli import export as export_command
from wmh_lora.cli.main import _COMMANDS, cli
from wmh_lora.config import ModelConfig
from wmh_lora.models.export import FORMATS
from wmh_lora.models.export_runtime import OnnxNetwork, OpenVinoNetwork
from wmh_lora.models.init import init_model
from wmh_lora.models.registry import load_model


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    if "export" not in _COMMANDS:
        monkeypatch.setattr("wmh_lora.cli.main._COMMANDS", (*_COMMANDS, "export"))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "compact.safetensors"
    init_model(path, "compact", seed=3)
    return path


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["export", *map(str, arguments)])


def test_compact_model_becomes_onnx(model_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "compact.onnx"
    result = _run(model_file, "--format", "onnx", "-o", path)
    assert result.exit_code == 0, result.output
    assert str(path) in result.output
    source = load_model(model_file).net
    slices = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(OnnxNetwork(path, 8)(slices), source(slices))
    again = _run(model_file, "--format", "onnx", "-o", path)
    assert again.exit_code == 1
    assert "--overwrite" in again.output


def test_size_is_read_as_height_and_width(model_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "compact.onnx"
    assert _run(model_file, "--format", "onnx", "-o", path, "--size", "24-40").exit_code == 2
    refused = _run(model_file, "--format", "onnx", "-o", path, "--size", "25x40")
    assert refused.exit_code == 2
    assert "multiples of 8 pixels for this network, found 25x40" in refused.output


def test_formats_of_the_command_are_those_of_the_library() -> None:
    option = next(p for p in export_command.export.params if p.name == "kind")
    assert tuple(option.type.choices) == FORMATS  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_packaged_model_in_every_format(kind: str, tmp_path: Path) -> None:
    suffix = {"onnx": ".onnx", "openvino": ".xml", "torchscript": ".ts", "monai-bundle": ""}[kind]
    result = _run("--format", kind, "-o", tmp_path / f"net{suffix}")
    assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_sam_encoder_becomes_openvino(tmp_path: Path) -> None:
    init_model(tmp_path / "sam.safetensors", "medsam-vit-b", random_base=True)
    result = _run(tmp_path / "sam.safetensors", "--format", "openvino", "-o", tmp_path / "sam.xml")
    assert result.exit_code == 0, result.output
    assert OpenVinoNetwork(tmp_path / "sam.xml", 16).size_multiple == 16
    assert isinstance(load_model(tmp_path / "sam.safetensors").card.model, ModelConfig)
