from __future__ import annotations

from pathlib import Path

import pytest

from tests.comparison_scans import CONFIG
from wmh_lora.comparators.settings import (
    DynUNetSettings,
    ThresholdSettings,
    UNet2dSettings,
    WMHLoraSettings,
    method_settings,
    read_comparison,
    training_settings,
)
from wmh_lora.errors import ConfigError


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "comparison.toml"
    path.write_text(CONFIG)
    return path


def test_methods_take_the_common_settings_and_their_own(config_file: Path) -> None:
    config = read_comparison(
        config_file, ["methods.unet-2d.training.batch_size=7", "comparison.against=unet-2d"]
    )
    assert config.names == ("compact", "unet-2d", "dynunet-t1", "threshold")
    assert config.against == "unet-2d"
    own = method_settings(config, "unet-2d")
    assert isinstance(own, UNet2dSettings)
    assert training_settings(config, own).batch_size == 7
    assert training_settings(config, own).crop == 32
    other = method_settings(config, "compact")
    assert isinstance(other, WMHLoraSettings)
    assert training_settings(config, other).batch_size == 2
    assert isinstance(method_settings(config, "dynunet-t1"), DynUNetSettings)
    assert isinstance(method_settings(config, "threshold"), ThresholdSettings)


def test_all_that_is_wrong_is_named_at_once(config_file: Path) -> None:
    overrides = [
        'comparison.methods=["compakt", "threshold"]',
        "methods.unet-2d.chanels=[4,4]",
        "methods.unetr.kind=unett",
        "methods.dynunet-t1.overlap=1.5",
        "methods.threshold.k=[0]",
        "data.split=",
    ]
    with pytest.raises(ConfigError) as caught:
        read_comparison(config_file, overrides)
    message = str(caught.value)
    for hint in ("'compact'", "'channels'", "'unetr'", "overlap", "'k'", "data.split"):
        assert hint in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("comparison.seconds=0", "seconds"),
        ("training.workers=2", "workers"),
        ("training.epochs=3", "comparison.seconds is the budget"),
        ("training.start_from=flair-compact-v1", "training.start_from has no effect"),
        ("training.gradient_checkpointing=true", "gradient_checkpointing has no effect"),
        ("data.fold=fold-1", "comparison.folds"),
        ("data.real_lanes=2", "real_lanes"),
        ("comparison.against=unetr", "not among comparison.methods"),
        ("methods.unetr.patch_px=[8,32,32]", "multiples of 16"),
        ("methods.unetr.num_heads=5", "num_heads"),
        ("methods.unet-2d.first_kernel=4", "odd"),
        ("methods.unet-2d.members=0", "members"),
        ("methods.dynunet-t1.filters=[4,8]", "filters"),
    ],
)
def test_wrong_settings_are_refused(config_file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_comparison(config_file, [override])


@pytest.mark.parametrize("name", ["challenge", "small"])
def test_the_presets_can_be_read(name: str) -> None:
    config = read_comparison(name)
    assert set(config.names) == set(config.methods)
    assert config.against == "litemedsam"
