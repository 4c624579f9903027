"""``wmh-lora adapt`` from two folders to an adapter, and ``segment --adapter`` with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from tests.phantoms import head
from wmh_lora.cli.bids_run import RunOptions, describe_model
from wmh_lora.cli.main import cli
from wmh_lora.cli.options import Options
from wmh_lora.config import InferenceConfig, ModelConfig, PreprocessConfig
from wmh_lora.files import file_sha256
from wmh_lora.models.model_file import ModelCard, save_model
from wmh_lora.models.network import build_network
from wmh_lora.models.registry import load_model
from wmh_lora.models.site_adapter import LARGEST_BYTES, load_adapter
from wmh_lora.volume import write_nifti

MODEL = ModelConfig(
    encoder="compact", adaptation="full", decoder_channels=(8, 8, 8, 8), structures=("wmh",)
)


def _write_model(path: Path, seed: int) -> Path:
    net = build_network(MODEL, None, for_training=True, seed=seed)
    preprocess = PreprocessConfig(pixel_size_mm=4.0, margin_mm=8.0)
    save_model(path, net, ModelCard(path.stem, MODEL, preprocess, InferenceConfig(), ""))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained models, images and labels of two persons."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("adapt")
    for part in ("images", "labels"):
        (folder / part).mkdir()
    for seed in range(2):
        volume, mask = head(seed)
        write_nifti(folder / f"images/p{seed}_FLAIR.nii.gz", volume.data, volume)
        write_nifti(folder / f"labels/p{seed}_mask.nii.gz", mask, volume)
    _write_model(folder / "base.safetensors", 3)
    _write_model(folder / "other.safetensors", 4)
    return folder


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [*map(str, arguments)])


def _adapt(folder: Path, target: Path, *arguments: object) -> Result:
    return _run(
        "adapt",
        *("--images", folder / "images", "--labels", folder / "labels"),
        *("--model", folder / "base.safetensors", "--steps", 1, "-o", target),
        *arguments,
    )


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    """What one step taught, which is not of much use."""
    target = folder / "my-site.safetensors"
    done = _adapt(folder, target, "--force", "--seed", 7)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == str(target)
    assert "Dice on held-out scans" in done.stdout
    return target


def test_the_adapter_is_a_small_file_that_says_where_it_belongs(
    folder: Path, adapter: Path
) -> None:
    assert adapter.stat().st_size < LARGEST_BYTES
    card = load_adapter(adapter).card
    assert card.base_sha256 == file_sha256(folder / "base.safetensors")
    assert card.training["seed"] == 7
    assert card.scans[0]["image_sha256"] == file_sha256(folder / "images/p0_FLAIR.nii.gz")


def test_segment_uses_it_and_says_so(folder: Path, adapter: Path, tmp_path: Path) -> None:
    scan = folder / "images/p0_FLAIR.nii.gz"
    model = ("--model", folder / "base.safetensors")
    options = ("--report", "html", "--json", "--device", "cpu")
    done = _run("segment", scan, *model, "--adapter", adapter, "-o", tmp_path / "with", *options)
    assert done.exit_code == 0, done.output
    described = json.loads(done.stdout)["scans"][0]["model"]
    assert described["name"] == "base + my-site"
    assert described["adapter_sha256"] == file_sha256(adapter)
    page = (tmp_path / "with/p0_wmh.html").read_text(encoding="utf-8")
    assert "base + my-site" in page
    done = _run("segment", scan, *model, "-o", tmp_path / "without", *options)
    assert json.loads(done.stdout)["scans"][0]["model"]["name"] == "base"


def test_segment_refuses_another_base(folder: Path, adapter: Path, tmp_path: Path) -> None:
    other = folder / "other.safetensors"
    scan = folder / "images/p0_FLAIR.nii.gz"
    done = _run("segment", scan, "--model", other, "--adapter", adapter, "-o", tmp_path)
    assert done.exit_code == 2
    assert "was made for the model base" in done.stderr
    assert str(other) in done.stderr


def test_a_data_set_is_told_the_same_about_the_model(folder: Path, adapter: Path) -> None:
    model = folder / "base.safetensors"
    options = Options(folder, model=str(model), adapter=adapter)
    described, settings = describe_model(RunOptions(options))
    assert described == load_model(model, adapter=adapter).describe()
    assert settings.threshold == load_adapter(adapter).card.threshold


def test_what_does_not_help_is_refused(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "site.safetensors"
    done = _adapt(folder, target)
    assert done.exit_code == 1
    assert "Adaptation did not help" in done.stderr
    assert not target.exists()


def test_too_little_time_is_a_wrong_setting(folder: Path, tmp_path: Path) -> None:
    done = _adapt(folder, tmp_path / "site.safetensors", "--minutes", 0.01)
    assert done.exit_code == 2
    assert "--minutes" in done.stderr


def test_a_file_in_the_way_is_left_alone(folder: Path, adapter: Path) -> None:
    before = adapter.read_bytes()
    done = _adapt(folder, adapter)
    assert done.exit_code == 1
    assert "--overwrite" in done.stderr
    assert adapter.read_bytes() == before
