"""``wmh-lora train`` from the command line to a model file, on a small scan and made-up samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from wmh_lora.cli.main import cli
from wmh_lora.models import network
from wmh_lora.training import run
from wmh_lora.training.checkpoint import checkpoint_paths

CONFIG = """
[model]
lora_rank = 2
lora_targets = ["proj"]
decoder_channels = [8, 8, 8, 8]

[training]
steps = 2
batch_size = 1
crop = 32
warmup_steps = 1
workers = 0
validation_stride = 2
log_steps = 1

[[validation]]
image = "scan_FLAIR.nii.gz"
reference = "mask.nii.gz"

[[validation]]
name = "healthy"
image = "scan_FLAIR.nii.gz"
"""


class _TinyEncoder(nn.Module):
    """One stage at each end of the pyramid, with one linear layer to adapt."""

    pyramid_channels = (8, 16)
    pyramid_strides = (1, 4)
    size_multiple = 4

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 4, stride=4)
        self.proj = nn.Linear(16, 16)

    def forward_pyramid(self, images: Tensor) -> tuple[Tensor, ...]:
        fine = torch.relu(self.stem(images))
        deep = self.proj(self.down(fine).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return fine, deep


class _Sample(NamedTuple):
    image: npt.NDArray[np.float32]
    target: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]


class _Stream:
    def files(self) -> list[Path]:
        return []

    def item(self, index: int) -> _Sample:
        rng = np.random.default_rng(index)
        image = rng.random((3, 32, 32), dtype=np.float32)
        target = (rng.random((3, 32, 32)) > 0.8).astype(np.float32)
        return _Sample(image, target, np.array([True, True, False]))


def _write_scan(folder: Path) -> None:
    """Head of two tissues with one bright lesion, thick slices."""
    rng = np.random.default_rng(1)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (44, 52, 16)), indexing="ij"))
    radius = np.sqrt((grid**2).sum(axis=0))
    scan = np.where(radius < 0.9, 100.0, 0.0) + np.where(radius < 0.4, -40.0, 0.0)
    mask = np.sqrt(((grid - 0.3) ** 2).sum(axis=0)) < 0.2
    scan = (scan + 80 * mask + rng.normal(0, 3, scan.shape)).clip(0).astype(np.float32)
    affine = np.diag([3.0, 3.0, 6.0, 1.0])
    nib.save(nib.Nifti1Image(scan, affine), folder / "scan_FLAIR.nii.gz")
    nib.save(nib.Nifti1Image(mask.astype(np.uint8), affine), folder / "mask.nii.gz")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with configuration and scan; the encoder is a small one, samples are noise."""
    _write_scan(tmp_path)
    (tmp_path / "run.toml").write_text(CONFIG)
    (tmp_path / "base.pth").write_bytes(b"base")
    tiny = network.EncoderSpec(build=_TinyEncoder, load=lambda _path: _TinyEncoder())
    monkeypatch.setitem(network.ENCODERS, "litemedsam", tiny)
    monkeypatch.setattr(run, "build_stream", lambda *_, in_channels, t1_channels: _Stream())
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return tmp_path


def _train(project: Path, *arguments: str) -> Result:
    settings = (f"data.root={project}", "training.base_weights=base.pth")
    command = ["train", "run.toml", *arguments]
    for setting in settings:
        command += ["--set", setting]
    return CliRunner().invoke(cli, command)


def _records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_train_resume_and_export(project: Path) -> None:
    result = _train(project, "-o", "out")
    assert result.exit_code == 0, result.output
    folder = project / "out"
    kinds = [record["kind"] for record in _records(folder)]
    assert kinds == ["train", "train", "validation", "validation", "validation_mean"]
    scored, healthy = (r for r in _records(folder) if r["kind"] == "validation")
    assert scored["case"] == "scan"
    assert 0 <= scored["dice"] <= scored["best_dice"] <= 1
    assert healthy["false_positive_ml"] >= 0
    assert json.loads((folder / "config.json").read_text())["model"]["lora_rank"] == 2
    assert len(json.loads((folder / "data.json").read_text())["validation"]) == 2

    # The folder is protected, and goes on with --resume only.
    assert _train(project, "-o", "out").exit_code == 2
    result = _train(project, "-o", "out", "--resume", "--set", "training.steps=3")
    assert result.exit_code == 0, result.output
    assert checkpoint_paths(folder / "checkpoints")[0].name == "step_00000003.pt"
    assert _records(folder)[-1]["step"] == 3
    result = _train(project, "-o", "out", "--resume", "--set", "model.lora_rank=4")
    assert result.exit_code == 2
    assert "[model]" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "training.step=3"], "'step'"),
        (["--set", "training.steps=many"], "steps"),
        (["--set", "training.steps=0"], "steps"),
        (["--set", "training.steps"], "--set"),
        (["--set", "training.base_weights=absent.pth"], "absent.pth"),
        (["--set", "validation.0.reference=absent.nii.gz"], "absent.nii.gz"),
    ],
)
def test_wrong_settings_end_with_exit_code_2(
    project: Path, arguments: list[str], message: str
) -> None:
    base = ["--set", f"data.root={project}", "--set", "training.base_weights=base.pth"]
    result = CliRunner().invoke(cli, ["train", "run.toml", "-o", "out", *base, *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (project / "out").exists()


def test_an_absent_configuration_ends_with_exit_code_2(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["train", str(tmp_path / "absent.toml")])
    assert result.exit_code == 2
    assert "absent.toml" in result.output
