"""Whether a probability of 0.7 is right seven times in ten, and the correction if it is not.

Everything is computed from counts: how many voxels have each probability, and how many of those are
lesion. The engine rounds probabilities to 1/4096, so counts hold all that there is to know.

References
----------
J. Platt, "Probabilistic outputs for support vector machines", Advances in Large Margin Classifiers,
1999 (scale and shift of the logit); C. Guo et al., "On calibration of modern neural networks", ICML
2017 (the scale alone as temperature, expected calibration error).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from wmh_lora.config import PROBABILITY_STEPS
from wmh_lora.errors import DataError

__all__ = ["Calibration", "ProbabilityCounts", "ReliabilityBin", "fit_calibration"]

FloatArray = NDArray[np.float64]

_LEVELS = np.arange(PROBABILITY_STEPS + 1) / PROBABILITY_STEPS
_HALF_STEP = 0.5 / PROBABILITY_STEPS


@dataclass(frozen=True)
class Calibration:
    """A correction of logits, ``logit / temperature + shift``; the default changes nothing."""

    temperature: float = 1.0
    shift: float = 0.0

    def apply(self, probability: FloatArray) -> FloatArray:
        """Correct probabilities in [0, 1]; 0 and 1 are taken for half a step inside."""
        inside = np.clip(probability, _HALF_STEP, 1.0 - _HALF_STEP)
        logit = np.log(inside / (1.0 - inside))
        corrected: FloatArray = 1.0 / (1.0 + np.exp(-logit / self.temperature - self.shift))
        return corrected


@dataclass(frozen=True)
class ReliabilityBin:
    """Voxels of similar probability: their mean probability, the share that is lesion, how many."""

    probability: float
    observed: float
    voxels: int


@dataclass(frozen=True)
class ProbabilityCounts:
    """Voxels and lesion voxels of each probability k/4096, arrays (4097,)."""

    voxels: NDArray[np.int64]
    lesion: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        probability: NDArray[np.float32],
        lesion: NDArray[np.bool_],
        counted: NDArray[np.bool_],
    ) -> ProbabilityCounts:
        """Count the voxels of one scan.

        Parameters
        ----------
        probability : array (I, J, K)
            In [0, 1].
        lesion : bool array (I, J, K)
            The reference.
        counted : bool array (I, J, K)
            Voxels that take part: the brain, say, less what is other pathology.
        """
        steps = np.rint(probability[counted] * PROBABILITY_STEPS).astype(np.int64)
        inside = lesion[counted]
        return cls(
            np.bincount(steps, minlength=len(_LEVELS)),
            np.bincount(steps[inside], minlength=len(_LEVELS)),
        )

    def __add__(self, other: ProbabilityCounts) -> ProbabilityCounts:
        return ProbabilityCounts(self.voxels + other.voxels, self.lesion + other.lesion)

    def loss(self, calibration: Calibration | None = None) -> float:
        """Mean cross-entropy of the corrected probabilities, in nats a voxel."""
        p = (calibration or Calibration()).apply(_LEVELS)
        others = self.voxels - self.lesion
        total = -(self.lesion * np.log(p) + others * np.log1p(-p)).sum()
        return float(total / self.voxels.sum())

    def reliability(
        self, calibration: Calibration | None = None, bins: int = 10
    ) -> list[ReliabilityBin]:
        """Compare probability and observed share in bins of equal width, without empty ones."""
        p = (calibration or Calibration()).apply(_LEVELS)
        owner = np.minimum((p * bins).astype(np.int64), bins - 1)
        voxels = np.bincount(owner, self.voxels, minlength=bins)
        lesion = np.bincount(owner, self.lesion, minlength=bins)
        mean = np.bincount(owner, self.voxels * p, minlength=bins)
        return [
            ReliabilityBin(float(m / n), float(k / n), int(n))
            for m, k, n in zip(mean, lesion, voxels, strict=True)
            if n > 0
        ]

    def calibration_error(self, calibration: Calibration | None = None, bins: int = 10) -> float:
        """Mean difference between probability and observed share over bins, weighted by voxels.

        Bins are those of `reliability` but for the lowest: sure background would hide the rest.
        """
        found = [b for b in self.reliability(calibration, bins) if b.probability >= 1.0 / bins]
        voxels = sum(b.voxels for b in found)
        if not voxels:
            return float("nan")
        return sum(b.voxels * abs(b.probability - b.observed) for b in found) / voxels


def fit_calibration(counts: ProbabilityCounts) -> Calibration:
    """Find scale and shift that minimise the cross-entropy.

    Raises
    ------
    DataError
        If there is no lesion voxel, or nothing else.
    """
    if not 0 < counts.lesion.sum() < counts.voxels.sum():
        raise DataError("Calibration needs voxels of both kinds, lesion and not.")

    def loss(at: FloatArray) -> float:
        return counts.loss(Calibration(float(np.exp(at[0])), float(at[1])))

    found = optimize.minimize(loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-4})
    return Calibration(float(np.exp(found.x[0])), float(found.x[1]))
