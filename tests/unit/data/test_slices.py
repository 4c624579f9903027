"""Slices of labelled scans: fixed by seed and index, in complete epochs, with ignored pixels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.labelled_scans import write_labelled_scans
from wmh_lora.config import PreprocessConfig
from wmh_lora.config_reading import from_dict
from wmh_lora.data import slice_cache
from wmh_lora.data.dataset import TrainingStream, build_stream
from wmh_lora.data.slices import SliceStream, neighbours
from wmh_lora.data.sources import DataConfig, read_labelled, read_masks
from wmh_lora.data.variation import vary_geometry, vary_intensity
from wmh_lora.errors import ConfigError, DataError
from wmh_lora.preprocess import context_stack, preprocess, to_model_grid

GRID = PreprocessConfig(pixel_size_mm=4.0, margin_mm=8.0)
Make = Callable[..., SliceStream]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_labelled_scans(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def make(table: dict[str, str]) -> Make:
    def made(seed: int = 3, crop: int = 64, step: int = 4, **changes: Any) -> SliceStream:
        config = from_dict(DataConfig, {**table, "background_share": 0.5, **changes})
        cache = Path(table["root"]) / "cache"
        stream = SliceStream(config, seed, crop, GRID, ("wmh",), step, cache)
        stream.prepare()
        return stream

    return made


def test_a_sample_depends_on_seed_and_index_alone(make: Make) -> None:
    stream, fresh, other = make(), make(), make(seed=4)
    in_order = [stream.item(index) for index in range(3 * stream.epoch_samples)]
    for index in (len(in_order) - 1, 2, 7):
        again = fresh.item(index)
        np.testing.assert_array_equal(again.image, in_order[index].image)
        np.testing.assert_array_equal(again.target, in_order[index].target)
    assert any(not np.array_equal(other.item(i).image, in_order[i].image) for i in range(4))
    for sample in in_order:
        assert sample.image.shape == (3, 64, 64)
        assert sample.target.shape == (1, 64, 64)
        assert sample.image.dtype == sample.target.dtype == np.float32
        assert 0 <= sample.image.min() <= sample.image.max() <= 1
        assert sample.valid.tolist() == [True]


def test_an_epoch_shows_every_lesion_slice_once_and_a_share_of_the_others(make: Make) -> None:
    stream = make(step=3)
    # Of each head's six slices (two scans are trained on), two hold lesions.
    lesion, others = set(stream._lesion.tolist()), set(stream._others.tolist())
    assert (len(lesion), len(others)) == (4, 8)
    assert stream.epoch_samples == 9  # 4 + 8 / 2, filled up to three steps
    epochs = [stream._epoch(epoch).tolist() for epoch in range(6)]
    for shown in epochs:
        assert len(set(shown)) == 9
        assert lesion <= set(shown)
    assert len({tuple(sorted(shown)) for shown in epochs}) > 1, "which others is drawn anew"
    assert epochs[2] == make(step=3)._epoch(2).tolist()
    assert make(step=32).epoch_samples == 32, "slices are shown again where there are too few"


def test_other_pathology_is_neither_lesion_nor_background(make: Make) -> None:
    stream = make()
    part = stream.part
    for number, scan in enumerate(part.scans):
        case = read_masks(part.manifest.file(scan.image), [("wmh", part.manifest.file(scan.mask))])
        assert case.masks["wmh"].sum() == 28
        assert case.masks["ignored"].sum() == 4 * 6
        target = stream._scans[number].array("target")
        assert np.isnan(target).sum() == 24
        assert np.nansum(target) == 28
    samples = [stream.item(index) for index in range(4 * stream.epoch_samples)]
    with_ignored = [s for s in samples if np.isnan(s.target).any()]
    assert with_ignored
    assert all(0 <= np.nanmin(s.target) <= np.nanmax(s.target) <= 1 for s in samples)


def test_the_cache_holds_what_preprocessing_makes_and_is_used(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = make()
    manifest, scan = stream.part.manifest, stream.part.scans[1]
    case = read_masks(manifest.file(scan.image), [("wmh", manifest.file(scan.mask))])
    prepared = preprocess(case.volume, GRID)
    cached = stream._scans[1]
    image = cached.array("image")
    np.testing.assert_array_equal(image, prepared.slices)
    for index in range(len(image)):
        np.testing.assert_array_equal(
            neighbours(image, cached.context_offset, index),
            context_stack(prepared, [index], 3)[0],
        )
    target = cached.array("target").astype(np.float32)
    expected = to_model_grid(case.masks["wmh"], prepared)
    np.testing.assert_allclose(np.nan_to_num(target), expected, atol=1e-3)

    monkeypatch.setattr(slice_cache, "preprocess", lambda *_: pytest.fail("read again"))
    make()


def test_small_crops_lie_on_lesions_as_often_as_asked(make: Make) -> None:
    stream = make(crop=16, lesion_share=1.0, background_share=0.0)
    samples = [stream.item(index) for index in range(5 * stream.epoch_samples)]
    assert all(np.nanmax(sample.target) > 0 for sample in samples)


def test_labels_move_with_the_image() -> None:
    image = np.zeros((3, 72, 60), np.float32)
    ignored = np.zeros((1, 72, 60), np.bool_)
    image[:, 20:40, 15:35] = 0.8
    image[:, 50:60, 40:50] = 0.4
    ignored[0, 50:60, 40:50] = True
    turned = 0
    for seed in range(30):
        picture, target, left_out = vary_geometry(seed, image, image[1:2] == 0.8, ignored)
        turned += picture.shape[1] != 72
        assert picture.shape[1:] == target.shape[1:] == left_out.shape[1:]
        for bright, label in (
            (picture[1] > 0.6, target[0] > 0.5),
            (picture[1] > 0.2, (target[0] > 0.25) | left_out[0]),
        ):
            overlap = 2 * (bright & label).sum() / (bright.sum() + label.sum())
            assert overlap > 0.9
        assert set(np.unique(left_out)) <= {False, True}
    assert 5 < turned < 25
    varied = [vary_intensity(seed, image) for seed in range(30)]
    assert all(0 <= picture.min() <= picture.max() <= 1 for picture in varied)
    np.testing.assert_array_equal(varied[3], vary_intensity(3, image))
    assert any(not np.array_equal(picture, image) for picture in varied)


def test_changed_files_are_all_named(tmp_path: Path) -> None:
    table = write_labelled_scans(tmp_path)
    for name in ("p1_FLAIR.nii.gz", "p2_mask.nii.gz"):
        (tmp_path / "scans" / name).write_bytes(b"other")
    (tmp_path / "scans" / "p0_mask.nii.gz").unlink()
    with pytest.raises(DataError) as caught:
        build_stream(table, 0, 64, GRID, ("wmh",), 4, tmp_path)
    for part in ("p1_FLAIR.nii.gz (changed)", "p2_mask.nii.gz (changed)", "p0_mask.nii.gz (van"):
        assert part in str(caught.value)


def test_an_empty_training_part_is_an_error(tmp_path: Path) -> None:
    table = write_labelled_scans(tmp_path)
    path = tmp_path / "split.json"
    document = json.loads(path.read_text())
    document["splits"][0]["train"] = []
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"training part of split .* holds no usable scan"):
        build_stream(table, 0, 64, GRID, ("wmh",), 4, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": ""}, r"data\.manifest and data\.split"),
        ({"real": ["bids"]}, "keep one"),
        ({"background_share": 1.5}, "background_share"),
        ({"fold": "fold-9"}, "fold-9"),
        ({"manifset": "x"}, "did you mean 'manifest'"),
    ],
)
def test_wrong_settings_are_named(
    table: dict[str, str], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_stream({**table, **changes}, 0, 64, GRID, ("wmh",), 4, tmp_path)


def test_structures_that_nobody_labelled_are_refused(table: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.structures"):
        build_stream(table, 0, 64, GRID, ("wmh", "brain"), 4, tmp_path)


def test_real_lanes_take_scans_of_the_training_part(table: dict[str, str]) -> None:
    stream = build_stream({**table, "lanes": 2, "real_lanes": 2}, 0, 32, GRID, ("wmh", "brain"))
    assert isinstance(stream, TrainingStream)
    part = read_labelled(from_dict(DataConfig, table), "train")
    assert set(part.files()) <= set(stream.files())
    held_out = read_labelled(from_dict(DataConfig, table), "validation").files()
    assert not set(held_out) & set(stream.files())
    samples = [stream.item(index) for index in range(48)]
    assert all(sample.valid.tolist() == [True, False] for sample in samples)
    assert any(np.isnan(sample.target[0]).any() for sample in samples)
    assert not any(np.isnan(sample.target[1]).any() for sample in samples)
