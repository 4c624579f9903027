"""Tuning on small scans with known maps: what is scored, what is chosen, and what is recorded."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from wmh_lora.config import InferenceConfig, ModelConfig, PreprocessConfig, TtaMode
from wmh_lora.engine_maps import MapProgress
from wmh_lora.errors import ConfigError, DataError, GridMismatchError
from wmh_lora.evaluation.metrics import evaluate
from wmh_lora.evaluation.selection import Setting
from wmh_lora.evaluation.sweep import THRESHOLDS
from wmh_lora.models.model_file import ModelCard
from wmh_lora.postprocess import apply_threshold, remove_small_components
from wmh_lora.training.tune import Tuning, tune, tuned_card
from wmh_lora.training.tune_cases import TuningCase
from wmh_lora.volume import Volume, write_nifti

Labels = NDArray[np.uint8]

SHAPE = (16, 18, 8)
CARD = ModelCard(
    name="test",
    model=ModelConfig(),
    preprocess=PreprocessConfig(),
    inference=InferenceConfig(batch_size=7, tta="d4"),
    base_sha256="0" * 64,
    training={"data": "phantoms"},
    metrics={"dice": 0.5, "tuned_avd_percent": 3.0},
)


class _Maps:
    """Gives back the image divided by 100 as the map; turned views blur nothing but scale it."""

    def __init__(self) -> None:
        self.calls = 0

    def planes_of(self, volume: Volume) -> int:
        return 3 if volume.path is not None and "iso" in volume.path.name else 1

    def of(
        self,
        volume: Volume,
        image_sha256: str,
        views: Sequence[TtaMode],
        progress: MapProgress | None = None,
    ) -> Iterator[tuple[TtaMode, NDArray[np.float32]]]:
        self.calls += 1
        scale = {"none": 1.0, "flip": 0.9, "d4": 0.8}
        for tta in views:
            if progress is not None:
                progress(tta, 1, 1)
            yield tta, volume.data / np.float32(100.0) * np.float32(scale[tta])


def _case(
    folder: Path, name: str, seed: int, *, labels: Labels | None = None, healthy: bool = False
) -> TuningCase:
    """Lesions of probability 0.45 to 0.8 in a noisy background of up to 0.4."""
    rng = np.random.default_rng(seed)
    data = rng.uniform(0.0, 40.0, SHAPE).astype(np.float32)
    mask = np.zeros(SHAPE, np.uint8)
    mask[3:7, 4:8, 2:5] = 1
    mask[10:12, 10:13, 4:6] = 1
    if not healthy:
        data[mask > 0] = rng.uniform(45.0, 80.0, int(mask.sum()))
    volume = Volume(data, np.diag([1.0, 2.0, 3.0, 1.0]))
    image, path = folder / f"{name}_FLAIR.nii.gz", folder / f"{name}_mask.nii.gz"
    write_nifti(image, data, volume)
    subject = name.partition("_ses-")[0]
    if healthy:
        return TuningCase(name, subject, image, None)
    write_nifti(path, mask if labels is None else labels, volume)
    return TuningCase(name, subject, image, path)


def _tune(cases: Sequence[TuningCase], **options: Any) -> Tuning:
    return tune(cases, _Maps(), InferenceConfig(), **options)


def test_scores_are_those_of_the_masks_that_the_engine_makes(tmp_path: Path) -> None:
    cases = [_case(tmp_path, f"sub-{n}", n) for n in range(2)]
    tuning = _tune(cases, thresholds=(0.3, 0.5), min_voxels=(1, 4), metric="f1")
    assert len(tuning.settings) == 3 * 2 * 3  # the present size, 3, is added
    for row, case in enumerate(cases):
        assert case.reference is not None
        labels = Volume.read(case.reference).data
        for column, setting in enumerate(tuning.settings):
            [(_, probability)] = _Maps().of(Volume.read(case.image), "", [setting.tta])
            mask = remove_small_components(
                apply_threshold(probability, setting.threshold), setting.min_voxels
            )
            expected = evaluate(labels, mask, (1, 2, 3))
            assert tuning.scores["dice"][row, column] == pytest.approx(expected.dice)
            assert tuning.scores["lesion_f1"][row, column] == pytest.approx(expected.lesion_f1)


def test_the_default_search_refines_around_the_best(tmp_path: Path) -> None:
    tuning = _tune([_case(tmp_path, "sub-1", 1)])
    levels = sorted({setting.threshold for setting in tuning.settings})
    assert set(THRESHOLDS) < set(levels)
    assert 1 < len(set(levels) - set(THRESHOLDS)) <= 8
    assert list(tuning.settings) == sorted(
        tuning.settings, key=lambda s: ("none flip d4".index(s.tta), s.threshold, s.min_voxels)
    )
    # Background ends at 0.40 and lesions begin at 0.45: all between is perfect, and the simplest
    # of it is the single view and the threshold nearest to the present 0.5.
    assert tuning.setting == Setting(0.45, 3, "none")
    assert tuning.mean[tuning.chosen] == pytest.approx(1.0)
    assert math.isnan(tuning.low[tuning.chosen])
    assert tuning.left_out == ()


@pytest.mark.parametrize(
    ("names", "scope", "before", "tuned"),
    [
        (("sub-1", "sub-2"), "one plane", 0.6, (0.4, 0.2)),
        (
            ("iso-1", "iso-2"),
            "three planes",
            0.2,
            (0.6, 0.4),
        ),
        (
            ("sub-1", "iso-2"),
            "every scan",
            None,
            (0.4, None),
        ),
    ],
)
def test_the_threshold_of_these_scans_is_compared_and_changed(
    tmp_path: Path,
    names: Sequence[str],
    scope: str,
    before: float | None,
    tuned: tuple[float, float | None],
) -> None:
    cases = [_case(tmp_path, name, number) for number, name in enumerate(names)]
    present = InferenceConfig(threshold=0.6, threshold_three_planes=0.2)
    tuning = tune(cases, _Maps(), present, thresholds=(0.4,), min_voxels=(3,), views=("none",))
    assert (tuning.scope, tuning.setting.threshold) == (scope, 0.4)
    was = None if tuning.present is None else tuning.settings[tuning.present].threshold
    assert was == before
    card = dataclasses.replace(CARD, inference=present)
    inference = tuned_card(card, tuning).inference
    assert (inference.threshold, inference.threshold_three_planes) == tuned


def test_the_present_settings_are_compared(tmp_path: Path) -> None:
    case = _case(tmp_path, "sub-1", 1)
    present = InferenceConfig(threshold=0.37, min_voxels=7, tta="flip")
    tuning = tune([case], _Maps(), present, thresholds=(0.5,))
    assert tuning.present is not None
    assert tuning.settings[tuning.present] == Setting(0.37, 7, "flip")
    single = tune([case], _Maps(), present, thresholds=(0.5,), views=("none",))
    assert single.present is None
    assert {setting.tta for setting in single.settings} == {"none"}


def test_lesion_free_scans_count_as_false_positive_volume_only(tmp_path: Path) -> None:
    cases = [_case(tmp_path, f"sub-{n}", n) for n in range(3)]
    without = _tune(cases, thresholds=(0.2, 0.5))
    empty = np.zeros(SHAPE, np.uint8)
    healthy = [
        _case(tmp_path, "healthy-1", 11, healthy=True),
        _case(tmp_path, "healthy-2", 12, labels=empty),
    ]
    tuning = _tune([*cases, *healthy], thresholds=(0.2, 0.5))
    assert (tuning.scans, tuning.healthy_scans) == (3, 2)
    assert tuning.subjects == ("sub-0", "sub-1", "sub-2")
    np.testing.assert_array_equal(tuning.mean, without.mean)
    column = tuning.settings.index(Setting(0.2, 1, "none"))
    found = np.count_nonzero(Volume.read(healthy[0].image).data >= np.float32(20.0))
    share = tuning.false_positive_ml[column] / (found * 0.006)
    assert 0.9 < share < 2.5  # the second one holds lesions that its reference denies
    assert np.isnan(without.false_positive_ml).all()


def test_visits_are_averaged_and_left_out_together(tmp_path: Path) -> None:
    names = ("sub-1_ses-1", "sub-1_ses-2", "sub-2")
    tuning = _tune([_case(tmp_path, name, n) for n, name in enumerate(names)])
    assert (tuning.scans, tuning.subjects) == (3, ("sub-1", "sub-2"))
    assert len(tuning.left_out) == len(tuning.left_out_scores) == 2
    assert tuning.low[tuning.chosen] <= tuning.mean[tuning.chosen] <= tuning.high[tuning.chosen]


def test_volume_difference_is_made_small(tmp_path: Path) -> None:
    tuning = _tune([_case(tmp_path, "sub-1", 1)], metric="avd", thresholds=(0.2, 0.42, 0.9))
    assert tuning.setting.threshold == 0.42
    assert tuning.mean[tuning.chosen] == pytest.approx(0.0)


def test_other_pathology_is_not_counted(tmp_path: Path) -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[3:7, 4:8, 2:5], labels[10:12, 10:13, 4:6] = 1, 2
    tuning = _tune([_case(tmp_path, "sub-1", 1, labels=labels)], thresholds=(0.42,))
    assert tuning.mean[tuning.chosen] == pytest.approx(1.0)


def test_wrong_scans_and_settings_are_refused(tmp_path: Path) -> None:
    good = _case(tmp_path, "sub-1", 1)
    healthy = _case(tmp_path, "healthy", 2, healthy=True)
    with pytest.raises(ConfigError, match="holds a lesion"):
        _tune([healthy], thresholds=(0.5,))
    with pytest.raises(ConfigError, match="no validation scan"):
        _tune([])
    for options in ({"thresholds": (0.0,)}, {"min_voxels": (-1,)}, {"metric": "hausdorff"}):
        with pytest.raises(ConfigError):
            _tune([good], **options)
    coded = _case(tmp_path, "sub-2", 2, labels=np.full(SHAPE, 255, np.uint8))
    with pytest.raises(DataError, match=r"sub-2_mask.*recode"):
        _tune([good, coded], thresholds=(0.5,))
    small = Volume(np.zeros((16, 16, 8), np.float32), np.eye(4))
    write_nifti(tmp_path / "small.nii.gz", small.data.astype(np.uint8), small)
    with pytest.raises(GridMismatchError, match="small"):
        _tune([dataclasses.replace(good, reference=tmp_path / "small.nii.gz")])


def test_the_card_says_what_was_done(tmp_path: Path) -> None:
    card = CARD
    cases = [_case(tmp_path, f"sub-{n}", n) for n in range(3)]
    tuning = tune(cases, _Maps(), card.inference)
    found = tuned_card(card, tuning)
    setting = tuning.setting
    assert found.inference == InferenceConfig(
        setting.threshold, setting.min_voxels, tta=setting.tta, batch_size=7
    )
    assert found.training["data"] == "phantoms"
    assert found.training["tuning"]["subjects"] == 3
    assert found.training["tuning"]["metric"] == "dice"
    assert found.metrics["dice"] == 0.5
    assert found.metrics["tuned_dice"] == pytest.approx(tuning.mean[tuning.chosen], abs=1e-4)
    assert found.metrics.keys() >= {"tuned_dice_low", "tuned_dice_left_out_high"}
    assert "tuned_avd_percent" not in found.metrics
    # One subject has no interval; what is undefined is left out, as JSON knows no NaN.
    alone = tuned_card(card, tune(cases[:1], _Maps(), card.inference))
    assert "tuned_dice_low" not in alone.metrics
    json.dumps(alone.metrics, allow_nan=False)
