from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.comparison_scans import write_comparison_scans
from wmh_lora.comparators.scans import PatchStream, TrainingScans, channels_of, read_fold
from wmh_lora.config import PreprocessConfig
from wmh_lora.data.sources import DataConfig
from wmh_lora.errors import ConfigError, DataError
from wmh_lora.preprocess import preprocess
from wmh_lora.volume import Volume

GRID = PreprocessConfig(pixel_size_mm=4.0, margin_mm=8.0, multiple_px=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    write_comparison_scans(folder, count=4)
    return folder


@pytest.fixture
def data(folder: Path) -> DataConfig:
    return DataConfig(root=str(folder), manifest="manifest.json", split="split.json")


def test_a_fold_has_three_parts_of_different_people(data: DataConfig) -> None:
    fold = read_fold(data, "fold-2")
    parts = (fold.train, fold.validation, fold.test)
    people = [scan.subject for part in parts for scan in part.scans]
    assert sorted(people) == ["sub-0", "sub-1", "sub-2", "sub-3"]
    with pytest.raises(ConfigError, match="fold-1"):
        read_fold(data, "fold-9")


def test_a_fold_without_cases_is_refused(folder: Path, data: DataConfig) -> None:
    document = json.loads((folder / "split.json").read_text())
    document["splits"][0]["validation"] = []
    (folder / "empty.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"validation part of fold-1.*different people"):
        read_fold(replace(data, split="empty.json"), "fold-1")


def _stream(
    data: DataConfig, folder: Path, *, t1: bool = False, share: float = 1.0, depth: int = 4
) -> PatchStream:
    scans = TrainingScans.read(read_fold(data, "fold-1"), GRID, folder / "cache", t1=t1)
    return PatchStream(scans, (depth, 16, 16), 7, share)


def test_patches_depend_on_the_seed_and_the_number_alone(data: DataConfig, folder: Path) -> None:
    first, second = _stream(data, folder), _stream(data, folder)
    forwards = [first.item(i) for i in range(4)]
    backwards = [second.item(i) for i in reversed(range(4))][::-1]
    for a, b in zip(forwards, backwards):
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.target, b.target)
    assert not np.array_equal(forwards[0].image, forwards[1].image)


def test_the_order_of_scans_is_drawn_apart_from_the_patches(
    data: DataConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = _stream(data, folder)
    states: list[tuple[int, ...]] = []
    make = np.random.default_rng

    def noted(seed: Any) -> np.random.Generator:
        states.append(tuple(np.random.SeedSequence(seed).generate_state(4).tolist()))
        return make(seed)

    monkeypatch.setattr(np.random, "default_rng", noted)
    stream.item(0)
    assert len(states) >= 2
    assert len(set(states)) == len(states)


def test_patches_hold_what_was_asked_for(data: DataConfig, folder: Path) -> None:
    for index in range(6):
        sample = _stream(data, folder).item(index)
        assert sample.image.shape == sample.target.shape == (4, 16, 16)
        assert sample.valid.shape == (4,)
        assert 0 <= sample.image.min() <= sample.image.max() <= 1
        assert np.nanmax(sample.target) > 0.3  # a lesion, wherever the scan was turned
        # lesions are the brightest in the phantom: image and target were varied alike
        inside = sample.image[sample.target > 0.9]
        assert inside.size == 0 or inside.mean() > 1.3 * np.median(sample.image)


def test_a_patch_larger_than_the_scan_is_filled_up(data: DataConfig, folder: Path) -> None:
    sample = _stream(data, folder, depth=16).item(0)
    filled = np.flatnonzero(sample.image.any(axis=(1, 2)))
    assert len(filled) <= 6
    assert filled.min() >= 4
    assert not sample.target[: filled.min()].any()


def test_t1_is_a_second_channel_and_zero_where_it_is_missing(
    data: DataConfig, folder: Path
) -> None:
    stream = _stream(data, folder, t1=True)
    shown = [stream.item(i).image.reshape(2, 4, 16, 16) for i in range(8)]
    assert all(image[0].any() for image in shown)
    fold = read_fold(data, "fold-1")
    with_t1 = sum(bool(scan.t1) for scan in fold.train.scans)
    # every scan is shown equally often
    assert sum(image[1].any() for image in shown) == 8 * with_t1 // len(fold.train.scans)


def test_inference_sees_the_channels_of_training(data: DataConfig, folder: Path) -> None:
    fold = read_fold(data, "fold-1")
    scans = TrainingScans.read(fold, GRID, folder / "cache", t1=True)
    for index, scan in enumerate(fold.train.scans):
        volume = Volume.read(fold.file(scan.image))
        seen = channels_of(volume, preprocess(volume, GRID), fold.t1(scan), with_t1=True)
        np.testing.assert_allclose(scans.channels(index), seen, atol=1e-6)
    assert scans.spacing_mm == (10.0, 4.0, 4.0)
