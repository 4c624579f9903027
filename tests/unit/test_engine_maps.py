"""Kept maps are the engine's own, are found again, and are not trusted once they are damaged."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.phantoms import brightness_model, head, write_head
from wmh_lora import engine_maps
from wmh_lora.config import TTA_MODES
from wmh_lora.engine import WMHInferenceEngine
from wmh_lora.engine_maps import ProbabilityMaps
from wmh_lora.files import file_sha256
from wmh_lora.models.model_file import ModelCard
from wmh_lora.models.registry import Model
from wmh_lora.volume import Volume


class LopsidedNet(nn.Module):
    """Every view gives another map, with sums that depend on their order in the last bit."""

    calls = 0

    def forward(self, slices: Tensor) -> Tensor:
        type(self).calls += 1
        weight = torch.linspace(0.3, 1.7, slices.shape[-1])
        logits = 9.0 * slices[:, 1:2] * weight - 4.0 + slices[:, :1].roll(1, -2)
        return torch.cat([logits, -logits, 20.0 + 0.0 * logits], dim=1)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """Stands for a model file, whose bytes are those of a small text."""
    path = tmp_path / "model.safetensors"
    path.write_text("weights")
    LopsidedNet.calls = 0
    model = dataclasses.replace(brightness_model(), net=LopsidedNet(), path=path)
    monkeypatch.setattr(engine_maps, "read_model_card", lambda _: model.card)
    monkeypatch.setattr(engine_maps, "weights_sha256", file_sha256)
    monkeypatch.setattr(engine_maps, "load_model", lambda *_, **__: model)
    return model


def _maps(model: Model, tmp_path: Path) -> ProbabilityMaps:
    return ProbabilityMaps(model.path, tmp_path / "maps", device="cpu")


def test_are_the_engines_maps_bit_for_bit(model: Model, tmp_path: Path) -> None:
    volume, _ = head()
    engine = WMHInferenceEngine(model, "cpu")
    expected = {tta: engine.predict(volume, tta=tta) for tta in TTA_MODES}
    assert not np.array_equal(expected["flip"], expected["d4"])
    for _ in ("computed", "read"):
        found = dict(_maps(model, tmp_path).of(volume, "0" * 64, TTA_MODES))
        for tta in TTA_MODES:
            np.testing.assert_array_equal(found[tta], expected[tta])
            assert found[tta].dtype == np.float32


def test_each_view_goes_through_the_network_once(model: Model, tmp_path: Path) -> None:
    volume, _ = head()
    WMHInferenceEngine(model, "cpu").predict(volume)
    batches, LopsidedNet.calls = LopsidedNet.calls, 0
    maps = _maps(model, tmp_path)
    steps: list[tuple[str, int, int]] = []
    for number in range(2):  # of the second scan, nothing is taken from the first
        found = dict(maps.of(volume, f"{number:064}", TTA_MODES, lambda *step: steps.append(step)))
        assert LopsidedNet.calls == 8 * batches * (number + 1)
        assert len(found) == 3
    assert {(tta, done) for tta, done, total in steps if done == total}
    assert all(0 < done <= total for _, done, total in steps)


def test_second_scan_is_not_the_first(model: Model, tmp_path: Path) -> None:
    maps = _maps(model, tmp_path)
    for seed in (0, 1):
        volume, _ = head(seed)
        [(_, found)] = maps.of(volume, f"{seed:064}", ["flip"])
        expected = WMHInferenceEngine(model, "cpu").predict(volume, tta="flip")
        np.testing.assert_array_equal(found, expected)


def test_a_search_that_was_killed_goes_on(model: Model, tmp_path: Path) -> None:
    volume, _ = head()
    for tta, _ in _maps(model, tmp_path).of(volume, "0" * 64, TTA_MODES):
        if tta == "flip":
            break
    LopsidedNet.calls = 0
    fresh = _maps(model, tmp_path)
    assert [tta for tta, _ in fresh.of(volume, "0" * 64, ["none", "flip"])] == ["none", "flip"]
    assert LopsidedNet.calls == 0


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "renamed"])
def test_a_damaged_map_is_computed_again(
    model: Model, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    volume, _ = head()
    [(_, expected)] = _maps(model, tmp_path).of(volume, "0" * 64, ["none"])
    [path] = (tmp_path / "maps").iterdir()
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "renamed":  # the map of another image under this one's name
        path.unlink()
        other, _ = head(1)
        list(_maps(model, tmp_path).of(other, "1" * 64, ["none"]))
        [wrong] = (tmp_path / "maps").iterdir()
        wrong.rename(path)
    else:
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"flipped": flipped, "cut": content[:middle], "empty": b""}[damage])
    with caplog.at_level(logging.WARNING, "wmh_lora"):
        [(_, found)] = _maps(model, tmp_path).of(volume, "0" * 64, ["none"])
    np.testing.assert_array_equal(found, expected)
    assert "damaged" in caplog.text
    assert path.read_bytes() == content


def test_another_model_image_or_setting_has_another_map(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = Volume.read(write_head(tmp_path / "sub-01_FLAIR.nii.gz"))

    def count() -> int:
        return len(list((tmp_path / "maps").iterdir()))

    def compute(image: str = "0" * 64) -> int:
        list(_maps(model, tmp_path).of(volume, image, ["none"]))
        return count()

    assert [compute(), compute()] == [1, 1]
    assert compute("1" * 64) == 2
    model.path.write_text("other weights")
    assert compute() == 3
    card: ModelCard = dataclasses.replace(
        model.card, preprocess=dataclasses.replace(model.card.preprocess, context_mm=20.0)
    )
    monkeypatch.setattr(engine_maps, "read_model_card", lambda _: card)
    assert compute() == 4
    # What only turns maps into masks, or describes the model, changes none.
    tuned = dataclasses.replace(
        card, inference=dataclasses.replace(card.inference, threshold=0.3), metrics={"dice": 0.7}
    )
    monkeypatch.setattr(engine_maps, "read_model_card", lambda _: tuned)
    assert compute() == 4
    assert all(path.name.startswith("sub-01_none_") for path in (tmp_path / "maps").iterdir())
