"""Reading settings: strict about names and types, lossless both ways."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from wmh_lora.config import (
    InferenceConfig,
    ModelConfig,
    PreprocessConfig,
    from_dict,
    read_toml,
    to_dict,
)
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


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"treshold": 0.5}, "Unknown setting 'treshold'.*threshold"),
        ({"threshold": "high"}, "'threshold' must be a number"),
        ({"threshold": True}, "'threshold' must be a number"),
        ({"threshold": 1.5}, "between 0 and 1"),
        ({"threshold": float("nan")}, "between 0 and 1"),
        ({"min_voxels": 2.5}, "whole number"),
        ({"tta": "rotate"}, "one of none, flip, d4"),
    ],
)
def test_wrong_values_are_refused(plain: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(InferenceConfig, plain)


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


@pytest.mark.parametrize(
    "changes",
    [
        {"in_channels": 2},
        {"lora_rank": 0},
        {"lora_dropout": 1.0},
        {"structures": ("brain",)},
        {"structures": ("wmh", "wmh")},
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
