"""`wmh-lora models`, and a model file on the real base weights through a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tests.phantoms import write_head
from wmh_lora.cli.main import cli
from wmh_lora.config import InferenceConfig, ModelConfig, PreprocessConfig
from wmh_lora.engine import WMHInferenceEngine, load_model
from wmh_lora.errors import ConfigError, WeightsError
from wmh_lora.files import file_sha256
from wmh_lora.models import registry
from wmh_lora.models.model_file import ModelCard, save_model
from wmh_lora.models.network import build_network
from wmh_lora.models.weights import BASE_WEIGHTS, resolve_base_weights
from wmh_lora.volume import Volume

SOURCE = Path(__file__).resolve().parents[2] / "src"
CONFIG = ModelConfig(lora_rank=2, decoder_channels=(16, 8, 8, 8))


@pytest.fixture(scope="module")
def base_weights() -> Path:
    try:
        return resolve_base_weights("litemedsam")
    except WeightsError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory, base_weights: Path) -> Path:
    """An untrained network on the real encoder: its maps mean nothing, but are its own."""
    path = tmp_path_factory.mktemp("models") / "untrained.safetensors"
    card = ModelCard(
        name="untrained",
        model=CONFIG,
        preprocess=PreprocessConfig(pixel_size_mm=4.0, margin_mm=8.0),
        inference=InferenceConfig(threshold=0.1, min_voxels=1),
        base_sha256=BASE_WEIGHTS["litemedsam"].sha256,
        licence="MIT",
        metrics={"dice": 0.0},
    )
    save_model(path, build_network(CONFIG, base_weights, for_training=True, seed=3), card)
    return path


def test_fresh_process_gives_the_same_result(tmp_path: Path, model_file: Path) -> None:
    scan = write_head(tmp_path / "sub-01_FLAIR.nii.gz")
    options = ["--model", str(model_file), "--device", "cpu", "--threads", "1"]
    command = ["segment", str(scan), "-o", str(tmp_path / "out"), *options]
    finished = subprocess.run(
        [sys.executable, "-m", "wmh_lora", *command],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    saved = Volume.read(tmp_path / "out" / "sub-01_space-orig_label-WMH_probseg.nii.gz")
    engine = WMHInferenceEngine(load_model(model_file), "cpu")
    expected = engine.predict(Volume.read(scan))
    assert np.ptp(expected) > 0.0
    # a rounding step of the map is all that two processes may differ by
    np.testing.assert_allclose(saved.data, expected, atol=1.01 / 4096)
    report = json.loads((tmp_path / "out" / "sub-01_wmh.json").read_text(encoding="utf-8"))
    assert report["model"]["name"] == "untrained"
    assert report["model"]["base_encoder"] == "litemedsam"
    assert report["settings"]["threshold"] == 0.1


def test_absent_base_weights_are_one_sentence(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WMH_LORA_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    scan = write_head(tmp_path / "a.nii.gz")
    arguments = ["segment", str(scan), "-o", str(tmp_path / "out"), "--model", str(model_file)]
    result = CliRunner().invoke(cli, [*arguments, "--device", "cpu"])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "wmh-lora models pull litemedsam" in line
    assert not (tmp_path / "out").exists()


class TestModelNames:
    @pytest.fixture
    def assets(self, tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(registry, "_ASSETS", tmp_path)
        (tmp_path / "flair-v1.safetensors").write_bytes(model_file.read_bytes())
        return tmp_path

    def test_default_and_names(self, assets: Path) -> None:
        assert registry.model_path() == assets / "flair-v1.safetensors"
        assert registry.model_path("flair-v1") == registry.model_path("default")
        assert registry.load_model().sha256 == file_sha256(registry.model_path())

    def test_a_path(self, assets: Path, model_file: Path) -> None:
        assert registry.model_path(model_file) == model_file

    @pytest.mark.parametrize("name", ["flair-v9", "some/file.safetensors"])
    def test_unknown(self, assets: Path, name: str) -> None:
        with pytest.raises(ConfigError, match="known names are default, flair-v1"):
            registry.model_path(name)

    def test_a_package_without_its_model(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(registry, "_ASSETS", tmp_path)
        with pytest.raises(WeightsError, match="install wmh-lora again"):
            registry.model_path()

    def test_an_unknown_model_on_the_command_line(self, tmp_path: Path) -> None:
        scan = write_head(tmp_path / "a.nii.gz")
        arguments = ["segment", str(scan), "-o", str(tmp_path / "out"), "--model", "flair-v9"]
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 2
        assert "flair-v9" in result.stderr
        assert not (tmp_path / "out").exists()

    def test_list(self, assets: Path) -> None:
        result = CliRunner().invoke(cli, ["models", "list"])
        assert result.exit_code == 0, result.output
        assert "flair-v1 (default): on litemedsam, threshold 0.1, licence MIT" in result.stdout
        document = json.loads(CliRunner().invoke(cli, ["models", "list", "--json"]).stdout)
        assert document["models"][0]["metrics"] == {"dice": 0.0}
        assert document["base_weights"][0]["name"] == "litemedsam"


def test_list_says_what_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ASSETS", tmp_path)
    monkeypatch.setenv("WMH_LORA_HOME", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(cli, ["models", "list"])
    assert result.exit_code == 0
    assert "none in this installation" in result.stdout
    assert "absent, run `wmh-lora models pull litemedsam`" in result.stdout


def test_pull_prints_where_the_weights_are(base_weights: Path) -> None:
    result = CliRunner().invoke(cli, ["models", "pull", "litemedsam"])
    assert result.exit_code == 0, result.output
    assert Path(result.stdout.strip()) == base_weights


def test_pull_of_an_unknown_name() -> None:
    result = CliRunner().invoke(cli, ["models", "pull", "nonsense"])
    assert result.exit_code == 2
    assert "litemedsam" in result.stderr
