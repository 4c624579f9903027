"""``wmh-lora train`` on labelled scans: from manifest and split to a model, whatever happens."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from tests.labelled_scans import write_labelled_scans
from wmh_lora.cli.main import cli
from wmh_lora.data.sources import DataConfig, read_labelled
from wmh_lora.training.checkpoint import checkpoint_paths, load_newest_checkpoint
from wmh_lora.training.run import read_run_folder, train
from wmh_lora.training.settings import read_run_config

CONFIG = """
[model]
encoder = "compact"
adaptation = "full"
decoder_channels = [8, 8, 8, 8]
structures = ["wmh"]

[preprocess]
pixel_size_mm = 4.0
margin_mm = 8.0
multiple_px = 8

[training]
epochs = 5
warmup_epochs = 1
restart_epochs = 2
checkpoint_epochs = 2
validate_epochs = 3
schedule = "warm-restarts"
batch_size = 1
accumulation = 2
crop = 64
workers = 0
threads = 1
log_steps = 1

[data]
manifest = "manifest.json"
split = "split.json"
background_share = 0.25
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_labelled_scans(folder)
    (folder / "run.toml").write_text(CONFIG)
    return folder


def _arguments(project: Path, run_dir: Path) -> list[str]:
    cache = f"data.cache={project / 'cache'}"
    settings = ["--set", f"data.root={project}", "--set", cache]
    return ["train", str(project / "run.toml"), *settings, "-o", str(run_dir)]


def _train(project: Path, run_dir: Path, *options: str) -> Result:
    return CliRunner().invoke(cli, [*_arguments(project, run_dir), *options])


def _records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(project: Path) -> Path:
    """The folder of an uninterrupted run: 5 epochs of 3 steps."""
    threads = torch.get_num_threads()
    result = _train(project, project / "whole")
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(project / "whole" / "best.safetensors")
    return project / "whole"


def _assert_same_end(whole: Path, other: Path) -> None:
    expected = load_newest_checkpoint(whole / "checkpoints")
    found = load_newest_checkpoint(other / "checkpoints")
    assert expected is not None
    assert found is not None
    assert found.step == expected.step == 15
    assert found.best_score == expected.best_score
    assert all(torch.equal(expected.model[name], found.model[name]) for name in expected.model)
    losses = [
        [(r["step"], r["loss"]) for r in _records(folder) if r["kind"] == "train"]
        for folder in (whole, other)
    ]
    assert losses[0] == losses[1]


def test_a_run_folder_says_what_was_done(project: Path, whole: Path) -> None:
    config = read_run_folder(whole)
    settings = config.training
    assert (settings.steps, settings.warmup_steps, settings.restart_steps) == (15, 3, 6)
    assert (settings.checkpoint_steps, settings.keep_steps, settings.validate_steps) == (3, 6, 9)
    # every second epoch for good, and the two newest
    assert [int(p.stem[5:]) for p in checkpoint_paths(whole / "checkpoints")] == [15, 12, 6]

    part = read_labelled(
        DataConfig(root=str(project), manifest="manifest.json", split="split.json"), "validation"
    )
    assert [case.name for case in config.validation] == [scan.name for scan in part.scans]
    assert [config.resolve(case.image) for case in config.validation] == [
        project / "scans" / scan.image for scan in part.scans
    ]
    content = json.loads((whole / "data.json").read_text())
    assert content["split"]["name"] == "split"
    assert len(content["split"]["train"]) == 2
    assert len(content["training"]) == 2 + 2 * 2
    assert len(content["validation"]) == 2
    validated = [r["step"] for r in _records(whole) if r["kind"] == "validation_mean"]
    assert validated == [9, 15]
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    project: Path, whole: Path, tmp_path: Path
) -> None:
    overrides = [f"data.root={project}", f"data.cache={project / 'cache'}"]
    config = read_run_config(project / "run.toml", overrides)

    def stop(done: int, steps: int, _loss: float) -> None:
        assert steps == 15
        if done == 7:  # in the middle of an epoch
            os.kill(os.getpid(), signal.SIGTERM)

    assert not train(config, tmp_path / "run", on_step=stop)
    assert train(config, tmp_path / "run", resume=True)
    _assert_same_end(whole, tmp_path / "run")


def test_a_run_does_not_go_on_with_another_split(
    project: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    record = json.loads((folder / "data.json").read_text())
    split = record["split"]
    split["train"], split["validation"] = split["validation"], split["train"]
    (folder / "data.json").write_text(json.dumps(record))
    result = _train(project, folder, "--resume")
    assert result.exit_code == 2
    assert "Manifest or split are not those" in result.output
    assert json.loads((folder / "data.json").read_text()) == record


def test_a_validation_scan_is_not_trained_on(project: Path, tmp_path: Path) -> None:
    part = read_labelled(
        DataConfig(root=str(project), manifest="manifest.json", split="split.json"), "train"
    )
    scan = part.scans[0]
    shutil.copy(part.manifest.file(scan.image), tmp_path / "copy_FLAIR.nii.gz")
    mask = part.manifest.file(scan.mask)
    case = f'validation=[{{image="{tmp_path / "copy_FLAIR.nii.gz"}", reference="{mask}"}}]'
    result = _train(project, tmp_path / "run", "--set", case)
    assert result.exit_code == 2
    assert "is among the training scans" in result.output


@pytest.mark.slow
def test_a_killed_run_loses_an_epoch_at_most(project: Path, whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "wmh_lora", *_arguments(project, tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    metrics = tmp_path / "metrics.jsonl"
    with subprocess.Popen(command, env=environment) as process:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            assert process.poll() is None
            if metrics.exists() and metrics.read_text().count('"train"') >= 5:
                break
            time.sleep(0.005)
        process.kill()
    stopped_at = load_newest_checkpoint(tmp_path / "checkpoints")
    assert stopped_at is not None
    steps = max(r["step"] for r in _records(tmp_path) if r["kind"] == "train")
    assert stopped_at.step >= steps - steps % 3 - (3 if steps % 3 == 0 else 0)
    result = _train(project, tmp_path, "--resume")
    assert result.exit_code == 0, result.output
    _assert_same_end(whole, tmp_path)


@pytest.mark.slow
def test_lesions_of_scans_that_were_not_trained_on_are_found(project: Path, tmp_path: Path) -> None:
    rates = [f"training.{kind}_lr=2e-3" for kind in ("encoder", "adapter", "decoder")]
    settings = [*rates, "training.epochs=40", "training.validate_epochs=0"]
    result = _train(project, tmp_path, *(w for s in settings for w in ("--set", s)))
    assert result.exit_code == 0, result.output
    assert _records(tmp_path)[-1]["score"] > 0.8


@pytest.mark.parametrize(
    ("setting", "code", "messages"),
    [
        ("training.steps=20", 2, ["training.steps and training.epochs"]),
        ("data.real_lanes=1", 2, ["training.epochs", "manifest alone"]),
        ("data.split=absent.json", 1, ["absent.json"]),
        ("data.fold=third", 2, ["third"]),
        ("model.in_channels=2", 2, ["in_channels", "must be odd"]),
        ("training.crop=60", 2, ["training.crop", "multiples of 8"]),
    ],
)
def test_settings_that_contradict_each_other(
    project: Path, tmp_path: Path, setting: str, code: int, messages: list[str]
) -> None:
    result = _train(project, tmp_path / "run", "--set", setting)
    assert result.exit_code == code, result.output
    assert all(message in result.output for message in messages)
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_all_misspelt_settings_are_named_at_once(project: Path, tmp_path: Path) -> None:
    wrong = ("training.epoch=1", "model.lora_rnak=2", "data.manifset=x", "los.focal_alpha=1")
    options = [word for setting in wrong for word in ("--set", setting)]
    result = _train(project, tmp_path / "run", *options)
    assert result.exit_code == 2
    for meant in ("epochs", "lora_rank", "manifest", "loss"):
        assert f"did you mean '{meant}'?" in result.output
