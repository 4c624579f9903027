"""What the cross-validation of an adapted model found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmh_lora.evaluation.selection import Setting

__all__ = ["CrossValidation", "FoldResult"]


@dataclass(frozen=True)
class FoldResult:
    """One fold.

    Attributes
    ----------
    scans : tuple of int
        Held out.
    base_setting, setting : Setting
        Chosen on the other scans, for the base model and for the adapted one.
    steps : int
        Optimiser steps taken.
    """

    scans: tuple[int, ...]
    base_setting: Setting
    setting: Setting
    steps: int


@dataclass(frozen=True)
class CrossValidation:
    """Dice of scans that were held out.

    Attributes
    ----------
    names : tuple of str
        Of the N scans.
    default, base, adapted : array (N,)
        Dice of the base model with its own settings, of the base model with settings chosen on the
        other folds, and of adapted models, with settings chosen likewise.
    folds : tuple of FoldResult
    setting : Setting
        Chosen for the adapted model on all scans, each predicted by a network that had not seen it.
    seconds : float
        Taken so far.
    """

    names: tuple[str, ...]
    default: NDArray[np.float64]
    base: NDArray[np.float64]
    adapted: NDArray[np.float64]
    folds: tuple[FoldResult, ...]
    setting: Setting
    seconds: float

    @property
    def better(self) -> bool:
        """Whether the adapted model's mean is above both of the base model's."""
        return bool(self.adapted.mean() > max(self.base.mean(), self.default.mean()))

    def report(self) -> dict[str, Any]:
        """Return everything as plain values, for a file; scans by number, from 0, not by name."""

        def mean(values: NDArray[np.float64]) -> float:
            return round(float(values.mean()), 4)

        folds = []
        for fold in self.folds:
            held = list(fold.scans)
            folds.append(
                {
                    "scans": held,
                    "base_dice": [round(float(v), 4) for v in self.base[held]],
                    "adapted_dice": [round(float(v), 4) for v in self.adapted[held]],
                    "base_threshold": fold.base_setting.threshold,
                    "base_min_voxels": fold.base_setting.min_voxels,
                    "threshold": fold.setting.threshold,
                    "min_voxels": fold.setting.min_voxels,
                    "steps": fold.steps,
                }
            )
        return {
            "default_dice": mean(self.default),
            "base_dice": mean(self.base),
            "adapted_dice": mean(self.adapted),
            "scans_better": int((self.adapted > self.base).sum()),
            "better": self.better,
            "folds": folds,
        }
