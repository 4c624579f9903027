"""Dice of held-out scans: their own labels have no part in the choice of settings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from wmh_lora.config import InferenceConfig
from wmh_lora.errors import ConfigError
from wmh_lora.evaluation.metrics import dice
from wmh_lora.postprocess import apply_threshold, remove_small_components
from wmh_lora.training.adapt_score import DiceTable, SettingGrid

GRID = SettingGrid(InferenceConfig(threshold=0.37, min_voxels=4))


def test_the_grid_holds_the_present_settings() -> None:
    present = GRID.settings[GRID.present]
    assert (present.threshold, present.min_voxels) == (0.37, 4)
    assert GRID.ranks[GRID.present] == 0


def test_dice_is_that_of_the_mask_with_each_setting(rng: np.random.Generator) -> None:
    probability = rng.random((9, 8, 7), dtype=np.float32)
    reference = (rng.random((9, 8, 7)) < 0.3).astype(np.uint8)
    scores = GRID.dice(probability, reference)
    assert scores.shape == (len(GRID.settings),)
    for column in (0, GRID.present, len(scores) - 1):
        setting = GRID.settings[column]
        mask = apply_threshold(probability, setting.threshold)
        mask = remove_small_components(mask, setting.min_voxels)
        assert scores[column] == pytest.approx(dice(reference > 0, mask > 0))


def test_settings_of_a_fold_are_chosen_without_it() -> None:
    good = GRID.present + 1
    scores = np.full((4, len(GRID.settings)), 0.2)
    scores[:, good] = 0.8
    folds = [(0, 3), (1, 2)]
    dice, settings = DiceTable(GRID, scores).held_out(folds)
    assert dice.tolist() == [0.8] * 4
    assert settings == [GRID.settings[good]] * 2
    # what is best for the held-out scans alone is not found
    lucky = scores.copy()
    lucky[[0, 3], good + 1] = 1.0
    dice, settings = DiceTable(GRID, lucky).held_out(folds)
    assert dice[[0, 3]].tolist() == [0.8, 0.8]
    assert settings[0] == GRID.settings[good]
    assert settings[1] == GRID.settings[good + 1]
    assert dice[[1, 2]].tolist() == [0.2, 0.2]


def test_scores_with_the_present_settings_are_told() -> None:
    scores = np.zeros((2, len(GRID.settings)))
    scores[:, GRID.present] = [0.3, 0.4]
    assert DiceTable(GRID, scores).present.tolist() == [0.3, 0.4]


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="threshold"):
        SettingGrid(replace(InferenceConfig(), threshold=1.5))
