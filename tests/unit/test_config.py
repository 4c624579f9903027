"""Reading settings: strict about names and types, lossless both ways."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from wmh_lora.config import InferenceConfig, ModelConfig, PreprocessConfig
from wmh_lora.config_reading import from_dict, read_toml, to_dict
from wmh_lora.errors import ConfigError


@dataclass(frozen=True)
class Everything:
    model: ModelConfig
    folder: Path
    limit: int | None = None
    sides: tuple[int, float] = (1, 2.0)
    labels: dict[str, float] = field(default_factory=dict)
    inner: tuple[InferenceConfig, ...] = ()


@pytest.mark.parametrize(
    "config",
    [
        PreprocessConfig(context_mm=0.0),
        ModelConfig(lora_rank=4, structures=("brain", "wmh")),
        ModelConfig(lora_ranks={"fc1": 4}, adaptation="full", t1_channels=3, decoder="upsampling"),
        InferenceConfig(threshold=0.6, tta="d4"),
    ],
)
def test_json_round_trip_is_lossless(config: Any) -> None:
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


def test_nested_tables_tuples_paths_and_optional_values() -> None:
    plain = {
        "model": {"lora_rank": 2},
        "folder": "runs/a",
        "limit": 3,
        "sides": [1, 2],
        "labels": {"a": 1},
        "inner": [{"threshold": 0.25}],
    }
    config = from_dict(Everything, plain)
    assert config == Everything(
        ModelConfig(lora_rank=2),
        Path("runs/a"),
        3,
        (1, 2.0),
        {"a": 1.0},
        (InferenceConfig(threshold=0.25),),
    )
    assert isinstance(config.sides[1], float)
    assert from_dict(Everything, to_dict(config)) == config
    unlimited = from_dict(Everything, {**to_dict(config), "limit": None})
    assert unlimited.limit is None
    assert from_dict(Everything, to_dict(unlimited)) == unlimited


def test_settings_from_before_there_were_more_keep_their_meaning() -> None:
    old = {
        "encoder": "litemedsam",
        "in_channels": 3,
        "adapter_width": 16,
        "lora_rank": 16,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "lora_targets": ["qkv", "proj", "fc1", "fc2"],
        "decoder_channels": [128, 64, 32, 16],
        "structures": ["wmh", "ventricles", "brain"],
    }
    config = from_dict(ModelConfig, old)
    assert config == ModelConfig(lora_dropout=0.0)
    assert (config.adaptation, config.decoder, config.t1_channels) == ("lora", "pyramid", 0)


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"treshold": 0.5}, "Unknown setting 'treshold'.*threshold"),
        ({"threshold": "high"}, "'threshold' must be a number"),
        ({"threshold": True}, "'threshold' must be a number"),
        ({"threshold": 1.5}, "between 0 and 1"),
        ({"threshold": float("nan")}, "between 0 and 1"),
        ({"threshold_three_planes": 0.0}, "'threshold_three_planes' must be between 0 and 1"),
        ({"zoom": 0.8}, "'zoom' must be from 1 to 2"),
        ({"min_voxels": 2.5}, "whole number"),
        ({"tta": "rotate"}, "one of none, flip, d4"),
    ],
)
def test_wrong_values_are_refused(plain: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(InferenceConfig, plain)


def test_a_threshold_that_is_given_holds_for_three_planes_as_well() -> None:
    config = InferenceConfig(threshold=0.4, threshold_three_planes=0.2, min_peak=0.7)
    assert (config.threshold_of(1), config.threshold_of(3)) == (0.4, 0.2)
    assert config.changed(threshold=None, tta="flip") == dataclasses.replace(config, tta="flip")
    given = config.changed(threshold=0.3)
    assert (given.threshold_of(1), given.threshold_of(3), given.min_peak) == (0.3, 0.3, 0.7)
    both = config.changed(threshold=0.3, threshold_three_planes=0.1)
    assert (both.threshold_of(1), both.threshold_of(3)) == (0.3, 0.1)
    with pytest.raises(ConfigError, match="Unknown setting 'treshold'"):
        config.changed(treshold=0.3)


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"folder": "x"}, "'model' of Everything is missing"),
        ({"model": [], "folder": "x"}, "table of settings"),
        ({"model": {}, "folder": "x", "limit": "3"}, "'limit' must be a whole number"),
        ({"model": {}, "folder": "x", "sides": [1]}, "list of 2"),
        ({"model": {}, "folder": "x", "labels": {"a": "b"}}, r"'labels\.a'"),
    ],
)
def test_wrong_nested_values_are_refused(plain: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(Everything, plain)


def test_all_that_is_wrong_is_said_at_once() -> None:
    plain = {
        "model": {"lora_rnak": 8, "lora_dropout": 2.0, "lora_alpha": "x"},
        "inner": [{"treshold": 0.5}, {"min_voxels": -1, "colour": 3}],
        "limit": "many",
    }
    with pytest.raises(ConfigError) as caught:
        from_dict(Everything, plain)
    message = str(caught.value)
    for part in (
        "'lora_rnak' for ModelConfig; did you mean 'lora_rank'?",
        "'lora_dropout' must be in [0, 1)",
        "'lora_alpha' must be a whole number",
        "'treshold' for InferenceConfig; did you mean 'threshold'?",
        "'min_voxels' must be zero or more",
        "'colour' for InferenceConfig; known are adaptive, batch_size, max_memory, min_contrast,",
        "'limit' must be a whole number",
        "'folder' of Everything is missing",
    ):
        assert part in message
    assert len(message.splitlines()) == 8


@pytest.mark.parametrize(
    "changes",
    [
        {"in_channels": 2},
        {"lora_rank": 0},
        {"lora_dropout": 1.0},
        {"structures": ("brain",)},
        {"structures": ("wmh", "wmh")},
        {"adaptation": "some"},
        {"decoder": "unet"},
        {"t1_channels": 2},
        {"t1_channels": -1},
        {"lora_ranks": {"qkv": 0}},
        {"lora_ranks": {"lin1": 4}},
        {"decoder_channels": ()},
    ],
)
def test_impossible_models_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ModelConfig(**changes)


def test_read_toml(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[model]\nlora_rank = 8\n", encoding="utf-8")
    assert from_dict(ModelConfig, read_toml(path)["model"]).lora_rank == 8


def test_unreadable_toml_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    with pytest.raises(ConfigError, match=r"run\.toml"):
        read_toml(path)
    path.write_text("[model\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run\.toml is not valid TOML"):
        read_toml(path)
