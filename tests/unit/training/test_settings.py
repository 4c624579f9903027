from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from wmh_lora.config_reading import from_dict, to_dict
from wmh_lora.errors import ConfigError
from wmh_lora.models.presets import model_preset
from wmh_lora.training.losses import LossConfig
from wmh_lora.training.settings import (
    RunConfig,
    TrainingConfig,
    ValidationCase,
    apply_overrides,
    read_run_config,
)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"workers": -1},
        {"grad_clip": 0.0},
        {"ema_decay": 1.0},
        {"betas": (0.9, 1.0)},
        {"schedule": "linear"},
        {"precision": "fp8"},
        {"schedule": "warm-restarts", "restart_steps": 0},
        {"lora_lr": 1e-7},
        {"checkpoint_minutes": -1.0},
        {"encoder_lr": 1e-7},
        {"t1_dropout": 1.5},
        {"epochs": -1},
        {"schedule": "warm-restarts", "epochs": 3, "restart_epochs": 0},
        {"keep_steps": -1},
        {"device": "gpu"},
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(reversed(changes))):
        TrainingConfig(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("training.steps=20", ("training", "steps"), 20),
        ("training.lora_lr=1e-3", ("training", "lora_lr"), 1e-3),
        ("data.root=/some/folder", ("data", "root"), "/some/folder"),
        ('data.root="with = sign"', ("data", "root"), "with = sign"),
        ("data.list=[1, 2]", ("data", "list"), [1, 2]),
        ("a.b.c=true", ("a", "b", "c"), True),
        ("data.text=1\nb = 2", ("data", "text"), "1\nb = 2"),
        ("validation.1.image=b.nii", ("validation", 1, "image"), "b.nii"),
    ],
)
def test_overrides_are_toml_values(
    override: str, place: tuple[str | int, ...], value: object
) -> None:
    table = {"training": {"steps": 1}, "validation": [{"image": "x"}, {"image": "y"}]}
    found: object = apply_overrides(table, [override])
    for key in place:
        found = found[key]  # type: ignore[index]
    assert found == value
    assert table["training"] == {"steps": 1}


@pytest.mark.parametrize(
    "override", ["training.steps", "=3", "training.=3", "training.steps.x=3", "validation.7.a=1"]
)
def test_overrides_that_lead_nowhere_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        apply_overrides({"training": {"steps": 1}, "validation": []}, [override])


def test_an_unknown_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[training]\nstep = 5\n")
    with pytest.raises(ConfigError, match="step"):
        read_run_config(path)


def test_relative_paths_start_at_the_root_of_the_data() -> None:
    config = RunConfig(data={"root": "some/root"})
    assert config.resolve("a/b.nii") == Path("some/root/a/b.nii")
    assert RunConfig().resolve("a/b.nii") == Path("a/b.nii")


def test_the_resolved_configuration_survives_writing() -> None:
    config = RunConfig(
        training=TrainingConfig(steps=7),
        data={"root": "r", "shares": {"real": 0.25}},
        validation=(ValidationCase("a.nii.gz", "b.nii.gz"),),
    )
    assert from_dict(RunConfig, to_dict(config)) == config


def test_the_published_training_is_a_configuration() -> None:
    config = read_run_config("medsam-vit-b")
    assert (config.model, config.preprocess) == model_preset("medsam-vit-b")
    assert config.loss == LossConfig()
    settings = config.training
    assert (settings.batch_size, settings.accumulation, settings.samples_per_step) == (4, 4, 16)
    assert {settings.lora_lr, settings.adapter_lr, settings.decoder_lr} == {3e-4}
    small = read_run_config("medsam-vit-b-small-gpu")
    assert (small.model, small.preprocess, small.loss) == (
        config.model,
        config.preprocess,
        config.loss,
    )
    assert small.training == replace(
        settings,
        batch_size=1,
        accumulation=16,
        gradient_checkpointing=True,
        workers=2,
        validation_batch=1,
    )


def test_epochs_become_steps() -> None:
    config = TrainingConfig(
        epochs=30, batch_size=2, accumulation=4, schedule="warm-restarts", restart_epochs=12
    )
    resolved = config.in_steps(epoch_samples=24)
    assert (resolved.steps, resolved.warmup_steps, resolved.restart_steps) == (90, 15, 36)
    assert (resolved.checkpoint_steps, resolved.keep_steps, resolved.validate_steps) == (3, 30, 3)
    assert resolved.in_steps(24) == resolved
    plain = TrainingConfig(steps=5)
    assert plain.in_steps(24) == plain


def test_steps_and_epochs_exclude_each_other(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[training]\nepochs = 5\nsteps = 100\n")
    with pytest.raises(ConfigError, match=r"training\.epochs are both given"):
        read_run_config(path)
    assert read_run_config(path, ["training.epochs=0"]).training.steps == 100


def test_everything_wrong_in_a_file_is_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[training]\nepochs = 5\nsteps = 1\nsede = 3\n[data]\nlains = 3\nsplit = 4\n")
    with pytest.raises(ConfigError) as caught:
        read_run_config(path)
    for part in ("both given", "did you mean 'seed'?", "did you mean 'lanes'?", "'split' must be"):
        assert part in str(caught.value)
