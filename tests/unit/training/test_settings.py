from __future__ import annotations

from pathlib import Path

import pytest

from wmh_lora.config import from_dict, to_dict
from wmh_lora.errors import ConfigError
from wmh_lora.training.settings import (
    RunConfig,
    TrainingConfig,
    ValidationCase,
    apply_overrides,
    read_run_config,
)

CONFIGS = Path(__file__).parents[3] / "configs"


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
        {"precision": "fp16"},
        {"schedule": "warm-restarts", "restart_steps": 0},
        {"lora_lr": 1e-7},
        {"checkpoint_minutes": -1.0},
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


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_configurations_in_the_repository_are_valid(path: Path) -> None:
    assert read_run_config(path).training.steps > 0
