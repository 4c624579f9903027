"""Training configurations come with the package: they have names, and every one of them works."""

from __future__ import annotations

from pathlib import Path

import pytest

import wmh_lora
from wmh_lora.errors import ConfigError
from wmh_lora.models.network import build_network
from wmh_lora.training.presets import config_path, preset_summary, presets
from wmh_lora.training.settings import read_run_config


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_valid_and_says_what_it_is(name: str) -> None:
    config = read_run_config(name)
    assert config.training.steps > 0
    net = build_network(config.model, None, for_training=False, unset_encoder=True)
    for size in (config.training.crop, config.preprocess.multiple_px):
        assert size % net.size_multiple == 0
    assert len(preset_summary(presets()[name])) > 40


def test_the_presets_lie_in_the_package() -> None:
    package = Path(wmh_lora.__file__).parent
    assert {"compact", "litemedsam", "medsam-vit-b", "v1"} <= presets().keys()
    assert all(path.is_relative_to(package) for path in presets().values())


def test_a_name_is_the_preset_and_a_path_is_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("compact", "compact.toml"):
        Path(name).write_text("[training]\nsteps = 7\n")
    assert config_path("compact") == presets()["compact"]
    assert config_path("./compact").read_text() == Path("compact").read_text()
    assert read_run_config(tmp_path / "compact.toml").training.steps == 7


def test_the_former_path_of_a_preset_leads_to_its_name() -> None:
    with pytest.raises(ConfigError, match=r"configs/v1\.toml; for the preset, write v1 alone"):
        config_path("configs/v1.toml")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"tiny.*compact.*medsam-vit-b"):
        config_path("tiny")


def test_presets_of_other_commands_are_apart() -> None:
    assert not presets("train").keys() & presets("compare").keys()
    with pytest.raises(ConfigError, match="no preset of that name"):
        config_path("litemedsam", "compare")
