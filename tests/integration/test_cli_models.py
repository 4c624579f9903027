"""`wmh-lora models`, and a model file on the real base weights through a process of its own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tests.phantoms import write_head
from wmh_lora.cli.main import cli
from wmh_lora.config import InferenceConfig, ModelConfig, PreprocessConfig
from wmh_lora.engine import WMHInferenceEngine, load_model
from wmh_lora.errors import ConfigError, WeightsError
from wmh_lora.files import file_sha256
from wmh_lora.models import registry
from wmh_lora.models.base_weights import WebSource
from wmh_lora.models.model_file import ModelCard, save_model
from wmh_lora.models.network import build_network
from wmh_lora.models.registry import DEFAULT_MODEL
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
    saved = Volume.read(tmp_path / "out" / "sub-01_space-orig_label-WMH_probseg.nii.gz")
    engine = WMHInferenceEngine(load_model(model_file), "cpu")
    expected = engine.predict(Volume.read(scan))
    assert np.ptp(expected) > 0.0
    # a rounding step of the map is all that two processes may differ by
    np.testing.assert_allclose(saved.data, expected, atol=1.01 / 4096)
    report = json.loads((tmp_path / "out" / "sub-01_wmh.json").read_text(encoding="utf-8"))
    checks = report["quality"]["checks"]
    concerns = [check for check in checks if check["verdict"] != "pass"]
    assert concerns, "an untrained network on a phantom"
    assert finished.stderr.splitlines() == [
        f"wmh-lora: sub-01: quality {check['verdict']}: {check['sentence']}" for check in concerns
    ]
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
        (tmp_path / f"{DEFAULT_MODEL}.safetensors").write_bytes(model_file.read_bytes())
        return tmp_path

    def test_default_and_names(self, assets: Path) -> None:
        assert registry.model_path() == assets / f"{DEFAULT_MODEL}.safetensors"
        assert registry.model_path(DEFAULT_MODEL) == registry.model_path("default")
        assert registry.load_model().sha256 == file_sha256(registry.model_path())

    def test_a_path(self, assets: Path, model_file: Path) -> None:
        assert registry.model_path(model_file) == model_file

    @pytest.mark.parametrize("name", ["flair-v9", "some/file.safetensors"])
    def test_unknown(self, assets: Path, name: str) -> None:
        with pytest.raises(ConfigError, match=f"known names are default, {DEFAULT_MODEL}"):
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
        line = f"{DEFAULT_MODEL} (default): on litemedsam, threshold 0.1, licence MIT"
        assert line in result.stdout
        document = json.loads(CliRunner().invoke(cli, ["models", "list", "--json"]).stdout)
        assert document["models"][0]["metrics"] == {"dice": 0.0}
        assert document["base_weights"][0]["name"] == "litemedsam"


# --- list and show ----------------------------------------------------------------------------


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, nothing installed, and a package without models."""
    monkeypatch.setattr(registry, "_ASSETS", tmp_path / "assets")
    monkeypatch.setenv("WMH_LORA_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    return tmp_path


def _models(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["models", *map(str, arguments)])


def _document(*arguments: str | Path) -> dict[str, Any]:
    result = _models(*arguments, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert isinstance(document, dict)
    return document


def test_list_says_what_is_absent(empty: Path) -> None:
    result = _models("list")
    assert result.exit_code == 0
    assert "none in this installation" in result.stdout
    for name in BASE_WEIGHTS:
        assert f"absent, run `wmh-lora models pull {name}`" in result.stdout
    assert "sam-vit-l: SAM ViT-L, trained on photographs, 1250 MB, Apache-2.0" in result.stdout


def test_list_says_what_is_there(empty: Path) -> None:
    cache = empty / "cache"
    cache.mkdir()
    with (cache / "sam_vit_b_01ec64.pth").open("wb") as stream:
        stream.truncate(BASE_WEIGHTS["sam-vit-b"].size_bytes)  # takes no space
    (cache / "medsam_vit_b.pth").write_bytes(b"short")
    text = _models("list").stdout
    assert f"cached: {cache / 'sam_vit_b_01ec64.pth'}" in text
    assert f"damaged: {cache / 'medsam_vit_b.pth'}, run `wmh-lora models pull medsam-" in text
    states = {entry["name"]: entry["state"] for entry in _document("list")["base_weights"]}
    assert states["sam-vit-b"] == "cached"
    assert states["medsam-vit-b"] == "damaged"
    assert states["litemedsam"] == "absent"


def test_listing_does_not_load_torch() -> None:
    """Without trained models, whose cards need it; so that listing answers at once."""
    code = (
        "import sys; from wmh_lora.models.weights import *; "
        "[locate_base_weights(n) for n in BASE_WEIGHTS]; sys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    )


@pytest.mark.parametrize("name", list(BASE_WEIGHTS))
def test_show_base_weights(empty: Path, name: str) -> None:
    entry = BASE_WEIGHTS[name]
    text = _models("show", name).stdout
    for fact in (entry.sha256, entry.filename, str(entry.size_bytes), entry.homepage, "Apache-2.0"):
        assert fact in text
    document = _document("show", name)
    assert document["state"] == "absent"
    assert document["sha256"] == entry.sha256


def test_show_tells_what_medsam_has_seen(empty: Path) -> None:
    assert (
        "pre-training saw part of the MICCAI 2017 WMH cases"
        in _models("show", "medsam-vit-b").stdout
    )


def test_budget_of_the_published_model(empty: Path) -> None:
    text = _models("show", "medsam-vit-b", "--budget").stdout
    for label, count in (
        ("encoder (frozen)", "89,670,912"),
        ("LoRA on qkv", "2,359,296"),
        ("LoRA on lin2", "1,474,560"),
        ("trainable", "6,925,468"),
    ):
        assert re.search(rf"^ *{re.escape(label)} +{count}$", text, re.MULTILINE), label
    assert "540,672 a block and 6,488,064 in all" in text
    budget = _document("show", "medsam-vit-b", "--budget")["budget"]
    assert budget["file_bytes_fp16"] < 25e6
    assert sum(budget["lora"].values()) == 6_488_064
    assert budget["trainable_percent"] == pytest.approx(7.1695, abs=1e-3)


def test_show_an_encoder_without_base_weights(empty: Path) -> None:
    result = _models("show", "compact", "--budget")
    assert result.exit_code == 0, result.output
    assert "no base weights" in result.stdout
    assert "encoder (trained)" in result.stdout
    assert "Published" not in result.stdout


def test_show_a_model_file(model_file: Path) -> None:
    document = _document("show", model_file, "--budget")
    assert document["kind"] == "model"
    assert document["model"]["encoder"] == "litemedsam"
    assert document["licence"] == "MIT"
    assert set(document["budget"]["lora"]) == {"qkv", "proj", "fc1", "fc2"}
    text = _models("show", model_file).stdout
    assert "  lora_rank: 2\n" in text
    assert "budget" not in text


def test_show_something_unknown(empty: Path) -> None:
    result = _models("show", "nonsense")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "base encoders are compact, litemedsam" in line


# --- pull -------------------------------------------------------------------------------------


def test_pull_prints_where_the_weights_are(base_weights: Path) -> None:
    result = CliRunner().invoke(cli, ["models", "pull", "litemedsam"])
    assert result.exit_code == 0, result.output
    assert Path(result.stdout.strip()) == base_weights


def test_pull_of_an_unknown_name() -> None:
    result = CliRunner().invoke(cli, ["models", "pull", "nonsense"])
    assert result.exit_code == 2
    assert "litemedsam" in result.stderr


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file on a server of this machine that stands for SAM's."""
    content = os.urandom(50_000)
    folder = tmp_path / "web"
    folder.mkdir()
    (folder / "weights.pth").write_bytes(content)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WMH_LORA_HOME", str(tmp_path / "cache"))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        entry = dataclasses.replace(
            BASE_WEIGHTS["sam-vit-b"],
            size_bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            source=WebSource(urls=(f"http://127.0.0.1:{server.server_port}/weights.pth",)),
        )
        monkeypatch.setitem(BASE_WEIGHTS, "sam-vit-b", entry)
        yield folder / "weights.pth"
        server.shutdown()
        thread.join()


def test_pull_from_the_web(published: Path, tmp_path: Path) -> None:
    result = _models("pull", "sam-vit-b")
    assert result.exit_code == 0, result.output
    path = Path(result.stdout.strip())
    assert path == tmp_path / "cache" / "sam_vit_b_01ec64.pth"
    assert path.read_bytes() == published.read_bytes()
    assert result.stderr == ""  # progress is for terminals
    published.unlink()
    assert _models("pull", "sam-vit-b").stdout == result.stdout


def test_pull_of_another_file(published: Path, tmp_path: Path) -> None:
    published.write_bytes(published.read_bytes()[::-1])
    result = _models("pull", "sam-vit-b")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "served another file" in line
    assert not (tmp_path / "cache" / "sam_vit_b_01ec64.pth").exists()


def test_pull_of_a_file_that_is_gone(published: Path, tmp_path: Path) -> None:
    published.unlink()
    result = _models("pull", "sam-vit-b")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "404" in line
    assert f"copy sam_vit_b_01ec64.pth from another machine to {tmp_path / 'cache'}" in line


# --- init -------------------------------------------------------------------------------------


def test_init_on_random_weights_can_be_loaded(empty: Path) -> None:
    path = empty / "new.safetensors"
    result = _models("init", "litemedsam", "--random", "--seed", "5", "-o", path)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(path)
    assert load_model(path).card.base_seed == 5


def test_init_on_given_and_on_found_weights(tmp_path: Path, base_weights: Path) -> None:
    given, found = tmp_path / "given.safetensors", tmp_path / "found.safetensors"
    assert _models("init", "litemedsam", "--weights", base_weights, "-o", given).exit_code == 0
    assert _models("init", "litemedsam", "-o", found).exit_code == 0
    for path in (given, found):
        card = _document("show", path)
        assert card["base_sha256"] == BASE_WEIGHTS["litemedsam"].sha256
        assert card["base_seed"] is None


def test_init_without_weights_says_how_to_get_them(empty: Path) -> None:
    result = _models("init", "sam-vit-b", "-o", empty / "new.safetensors")
    assert result.exit_code == 2
    assert "wmh-lora models pull sam-vit-b" in result.stderr
    assert not (empty / "new.safetensors").exists()


def test_init_refuses_contradictions_and_existing_files(empty: Path) -> None:
    path = empty / "new.safetensors"
    both = _models("init", "litemedsam", "--random", "--weights", "x.pth", "-o", path)
    assert both.exit_code == 2
    assert "not both" in both.stderr
    path.write_bytes(b"precious")
    kept = _models("init", "compact", "-o", path)
    assert kept.exit_code == 1
    assert "--overwrite" in kept.stderr
    assert path.read_bytes() == b"precious"
    assert _models("init", "compact", "-o", path, "--overwrite").exit_code == 0
    assert path.read_bytes() != b"precious"


def test_the_adapters_of_a_model_leave_as_a_peft_folder(tmp_path: Path, model_file: Path) -> None:
    folder = tmp_path / "adapter"
    command = ["models", "export-adapter", str(model_file), "-o", str(folder)]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    described = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert described["r"] == CONFIG.lora_rank
    assert described["base_model_name_or_path"] == "litemedsam"
    assert (folder / "adapter_model.safetensors").is_file()
    again = CliRunner().invoke(cli, command)
    assert again.exit_code == 1
    assert "--overwrite" in again.stderr
