"""The choice among settings that were all scored on the same few subjects, and what it is worth.

The best of many means is partly luck, so two things go with the choice. Among settings that the
data cannot tell from the best, the simplest is taken (one-standard-error rule, with the standard
error of the paired difference, because all settings were scored on the same subjects). And the
choice is made again without each subject in turn and scored on that subject: an estimate that the
choice has not seen.

References
----------
L. Breiman, J. H. Friedman, R. A. Olshen and C. J. Stone, "Classification and Regression Trees",
Wadsworth, 1984, section 3.4.3 (one-standard-error rule).

S. Varma and R. Simon, "Bias in error estimation when using cross-validation for model selection",
BMC Bioinformatics 7:91, 2006, doi:10.1186/1471-2105-7-91 (nested estimate).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wmh_lora.config import TTA_MODES, TtaMode
from wmh_lora.evaluation.statistics import (
    RESAMPLES,
    SEED,
    Interval,
    bootstrap_weights,
    percentile_interval,
    summarise,
)

__all__ = [
    "Setting",
    "choose",
    "leave_one_out",
    "mean_band",
    "mean_interval",
    "simplicity",
    "subject_means",
]

FloatArray = NDArray[np.float64]

# Means that differ by less are equal: sums of the same numbers in another order.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Setting:
    """What turns probabilities into a mask; see `wmh_lora.config.InferenceConfig`."""

    threshold: float
    min_voxels: int
    tta: TtaMode


def simplicity(settings: Sequence[Setting], present: Setting) -> list[int]:
    """Rank settings: fewer views first, then the smaller change of threshold, then of size.

    Returns
    -------
    list of int
        0 for the simplest.
    """

    def cost(index: int) -> tuple[float, ...]:
        setting = settings[index]
        return (
            TTA_MODES.index(setting.tta),
            round(abs(setting.threshold - present.threshold), 9),
            abs(setting.min_voxels - present.min_voxels),
            setting.threshold,
            setting.min_voxels,
        )

    ranks = [0] * len(settings)
    for rank, index in enumerate(sorted(range(len(settings)), key=cost)):
        ranks[index] = rank
    return ranks


def choose(gains: FloatArray, ranks: Sequence[int]) -> tuple[int, int]:
    """Find the setting with the best mean, and the simplest one within one standard error of it.

    Parameters
    ----------
    gains : array (N, G)
        Score of each subject with each setting, more is better, all defined.
    ranks : sequence of G ints
        From `simplicity`.

    Returns
    -------
    best, chosen : int
        Columns. A setting is within one standard error if its mean shortfall from the best is not
        above the standard error of that shortfall over subjects; with one subject, if it is equal.

    Examples
    --------
    >>> gains = np.array([[0.70, 0.71, 0.2], [0.61, 0.60, 0.1], [0.65, 0.66, 0.2]])
    >>> choose(gains, [0, 1, 2])
    (1, 0)
    """
    order = np.asarray(ranks)
    means = gains.mean(axis=0)
    best = int(_simplest(means >= means.max() - _ROUNDING, order))
    shortfall = gains[:, [best]] - gains
    error = np.zeros(gains.shape[1])
    if len(gains) > 1:
        error = shortfall.std(axis=0, ddof=1) / np.sqrt(len(gains))
    return best, _simplest(shortfall.mean(axis=0) <= error + _ROUNDING, order)


def leave_one_out(gains: FloatArray, ranks: Sequence[int]) -> list[int]:
    """For each subject, the column that `choose` takes without it; empty for one subject."""
    if len(gains) < 2:
        return []
    return [choose(np.delete(gains, subject, axis=0), ranks)[1] for subject in range(len(gains))]


def subject_means(
    values: FloatArray, subjects: Sequence[str]
) -> tuple[FloatArray, tuple[str, ...]]:
    """Average the scans (rows) of each subject; subjects come sorted."""
    names, owners = np.unique(np.asarray(subjects, dtype=np.str_), return_inverse=True)
    rows = [values[owners.ravel() == number].mean(axis=0) for number in range(len(names))]
    return np.stack(rows), tuple(str(name) for name in names)


def mean_band(scores: FloatArray) -> tuple[FloatArray, FloatArray]:
    """95 % percentile bootstrap intervals over subjects of the column means.

    The resamples are those of `wmh_lora.evaluation.statistics.summarise`, the same for all columns.

    Parameters
    ----------
    scores : array (N, G)
        One row a subject.

    Returns
    -------
    low, high : arrays (G,)
        NaN for one subject.
    """
    count = len(scores)
    if count < 2:
        undefined = np.full(scores.shape[1], np.nan)
        return undefined, undefined.copy()
    drawn = bootstrap_weights(count, RESAMPLES, SEED)
    # One column at a time: all means of all resamples at once would take a hundred megabytes.
    bands = [percentile_interval(drawn @ column / count) for column in scores.T]
    low, high = np.asarray(bands, dtype=np.float64).T
    return low, high


def mean_interval(scores: FloatArray) -> tuple[float, Interval]:
    """Mean of one value a subject and its 95 % interval; NaN where undefined."""
    summary = summarise(scores, [str(number) for number in range(len(scores))])
    return summary.mean, summary.mean_interval


def _simplest(allowed: NDArray[np.bool_], order: NDArray[np.int64]) -> int:
    candidates = np.flatnonzero(allowed)
    return int(candidates[np.argmin(order[candidates])])
