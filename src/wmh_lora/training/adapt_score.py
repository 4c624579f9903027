"""Dice of one site's scans at every threshold and lesion size, and of scans that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from wmh_lora.config import InferenceConfig
from wmh_lora.evaluation.selection import Setting, choose, simplicity
from wmh_lora.evaluation.sweep import THRESHOLDS, sweep
from wmh_lora.training.tune import MIN_VOXELS

__all__ = ["DiceTable", "SettingGrid"]

FloatArray = NDArray[np.float64]


class SettingGrid:
    """The G thresholds and lesion sizes that are compared.

    Parameters
    ----------
    present : InferenceConfig
        Settings of the base model; they are among those compared, and win ties.
    """

    def __init__(self, present: InferenceConfig) -> None:
        self._min_peak = present.min_peak
        self.levels = sorted({*THRESHOLDS, present.threshold})
        self.sizes = sorted({*MIN_VOXELS, present.min_voxels})
        self.settings = tuple(
            Setting(level, size, present.tta) for level, size in product(self.levels, self.sizes)
        )
        before = Setting(present.threshold, present.min_voxels, present.tta)
        self.present = self.settings.index(before)
        self.ranks = simplicity(self.settings, before)

    def dice(self, probability: NDArray[np.float32], reference: NDArray[np.uint8]) -> FloatArray:
        """Dice (G,) of one scan whose reference holds a lesion."""
        swept = sweep(probability, reference, self.levels, self.sizes, min_peak=self._min_peak)
        return swept["dice"].ravel()


@dataclass(frozen=True)
class DiceTable:
    """Dice of N scans with each setting.

    Attributes
    ----------
    grid : SettingGrid
        The settings.
    scores : array (N, G)
        Each row by a network that has not seen the scan.
    """

    grid: SettingGrid
    scores: FloatArray

    @property
    def present(self) -> FloatArray:
        """Dice (N,) with the settings of the base model."""
        return np.asarray(self.scores[:, self.grid.present])

    def chosen(self, scans: Sequence[int]) -> int:
        """Choose a setting on some scans, see `wmh_lora.evaluation.selection.choose`."""
        return choose(self.scores[list(scans)], self.grid.ranks)[1]

    def held_out(self, folds: Sequence[Sequence[int]]) -> tuple[FloatArray, list[Setting]]:
        """Dice (N,) of each scan with what was chosen on the scans of the other folds.

        Returns
        -------
        dice : array (N,)
        settings : list of Setting
            Chosen for each fold.
        """
        dice = np.full(len(self.scores), np.nan)
        settings = []
        for fold in folds:
            others = [scan for scan in range(len(self.scores)) if scan not in fold]
            column = self.chosen(others)
            dice[list(fold)] = self.scores[list(fold), column]
            settings.append(self.grid.settings[column])
        return dice, settings
