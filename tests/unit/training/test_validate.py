from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.phantoms import BrightnessNet, head
from wmh_lora.config import ModelConfig, PreprocessConfig
from wmh_lora.errors import ConfigError
from wmh_lora.evaluation.sweep import THRESHOLDS
from wmh_lora.preprocess import preprocess
from wmh_lora.training.settings import RunConfig, TrainingConfig, ValidationCase
from wmh_lora.training.validate import Validator, best_dice, predict_probability
from wmh_lora.volume import Volume, write_nifti


class _Centre(nn.Module):
    """Logits that give back the slice itself in the second structure."""

    def forward(self, slices: Tensor) -> Tensor:
        return torch.logit(slices[:, [0, 1]], eps=1e-6)


@pytest.fixture
def volume(rng: np.random.Generator) -> Volume:
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (44, 52, 18)), indexing="ij"))
    head = (grid**2).sum(axis=0) < 0.8
    data = (100 * head + rng.normal(0, 3, head.shape)).clip(0).astype(np.float32)
    return Volume(data=data, affine=np.diag([3.0, 3.0, 5.0, 1.0]), path=None, header=None)


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("batch", [1, 4])
def test_every_slice_is_predicted_once(volume: Volume, stride: int, batch: int) -> None:
    prepared = preprocess(volume, PreprocessConfig())
    found = predict_probability(_Centre(), prepared, batch, ("ventricles", "wmh"), stride=stride)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, prepared.slices[::stride], atol=1e-5)


def test_best_dice_is_the_largest_over_the_thresholds(rng: np.random.Generator) -> None:
    reference = rng.random((6, 7, 8)) > 0.7
    probability = (0.4 * rng.random(reference.shape) + 0.4 * reference).astype(np.float32)
    score, threshold = best_dice(reference, probability)
    dices = []
    for limit in THRESHOLDS:
        found = probability >= limit
        dices.append(2 * (found & reference).sum() / (found.sum() + reference.sum()))
    assert score == pytest.approx(max(dices))
    assert threshold == THRESHOLDS[int(np.argmax(dices))]


def test_best_dice_of_nothing_is_undefined() -> None:
    empty = np.zeros((2, 2, 2), np.bool_)
    assert all(math.isnan(value) for value in best_dice(empty, np.zeros((2, 2, 2), np.float32)))


def test_an_absent_file_is_found_out_before_training() -> None:
    config = RunConfig(data={"root": "nowhere"}, validation=(ValidationCase("a.nii.gz"),))
    with pytest.raises(ConfigError, match=r"data\.root"):
        Validator(config)


@pytest.mark.parametrize("stride", [1, 2])
def test_other_pathology_counts_neither_as_lesion_nor_as_error(tmp_path: Path, stride: int) -> None:
    volume, labels = head()
    labels[24:28, 40:46, 2] = 2
    bright = np.where(labels == 2, 640, volume.data)
    for name, data in (("image", bright), ("labels", labels), ("lesion", labels == 1)):
        write_nifti(tmp_path / f"{name}.nii.gz", np.asarray(data, np.float32), volume)
    cases = [ValidationCase("image.nii.gz", f"{name}.nii.gz") for name in ("labels", "lesion")]
    config = RunConfig(
        model=ModelConfig(structures=("wmh",)),
        preprocess=PreprocessConfig(pixel_size_mm=4.0, margin_mm=8.0),
        data={"root": str(tmp_path)},
        training=TrainingConfig(validation_stride=stride),
        validation=tuple(cases),
    )
    ignoring, counting = Validator(config)(BrightnessNet(1))
    assert ignoring["score"] > 0.95
    assert counting["score"] < 0.8
    assert ignoring["reference_ml"] == pytest.approx(counting["reference_ml"])
