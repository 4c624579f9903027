"""Means with intervals, and the paired comparison of two methods.

Subjects are resampled and tested, not scans: visits of one person are no independent evidence. An
undefined value is NaN; it is counted, and left out of the rest.

References
----------
B. Efron and R. J. Tibshirani, "An Introduction to the Bootstrap", Chapman & Hall, 1993, chapter 13
(percentile intervals).

D. S. Kerby, "The simple difference formula: an approach to teaching nonparametric correlation",
Comprehensive Psychology 3, 2014, doi:10.2466/11.IT.3.1 (matched-pairs rank-biserial correlation).

S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
Statistics 6(2), 1979.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

__all__ = [
    "RESAMPLES",
    "SEED",
    "Interval",
    "PairedComparison",
    "Summary",
    "bootstrap_weights",
    "compare_paired",
    "holm_adjusted",
    "mean_shift",
    "percentile_interval",
    "summarise",
]

RESAMPLES = 10_000
SEED = 42
LEVEL = 0.95

# Resamples made at a time: bounds memory to some tens of MB for a thousand scans.
_CHUNK = 1000

FloatArray = NDArray[np.float64]


class Interval(NamedTuple):
    """A 95 % interval; NaN where it is undefined."""

    low: float
    high: float


UNDEFINED = Interval(math.nan, math.nan)


@dataclass(frozen=True)
class Summary:
    """One measure over a group of scans.

    Attributes
    ----------
    scans, subjects : int
        Defined values, and the subjects that they come from.
    undefined : int
        Values that are NaN, left out.
    mean, median, sd, minimum, maximum : float
        NaN where no value is defined; ``sd`` with n - 1 in the denominator.
    mean_interval, median_interval : Interval
        Percentile bootstrap over subjects; NaN for fewer than two.
    """

    scans: int
    subjects: int
    undefined: int
    mean: float
    mean_interval: Interval
    median: float
    median_interval: Interval
    sd: float
    minimum: float
    maximum: float


@dataclass(frozen=True)
class PairedComparison:
    """The second of two methods against the first on the same scans, for one measure.

    Attributes
    ----------
    scans, subjects, undefined : int
        Pairs of defined values, their subjects, and scans left out because either value is NaN.
    mean_first, mean_second, mean_difference : float
        Means over scans; the difference is second minus first.
    interval : Interval
        Of the mean difference, percentile bootstrap over subjects.
    nonzero : int
        Subjects whose mean difference is not 0: what the test rests on.
    p_value : float
        Two-sided Wilcoxon signed-rank test of the subjects' mean differences; 1 when all are 0.
    smallest_p : float
        The smallest value that the exact test can give with so many subjects.
    rank_biserial : float
        Matched-pairs rank-biserial correlation in [-1, 1]: positive when the second is larger.
    """

    scans: int
    subjects: int
    undefined: int
    mean_first: float
    mean_second: float
    mean_difference: float
    interval: Interval
    nonzero: int
    p_value: float
    smallest_p: float
    rank_biserial: float


def summarise(
    values: ArrayLike, subjects: Sequence[str], *, resamples: int = RESAMPLES, seed: int = SEED
) -> Summary:
    """Summarise one measure, with bootstrap intervals over subjects.

    Parameters
    ----------
    values : array (N,)
        One value a scan; NaN is undefined.
    subjects : sequence of N str
        Whose scan it is.
    resamples, seed : int
        Of the bootstrap; equal input gives equal intervals.

    Returns
    -------
    Summary

    Examples
    --------
    >>> summary = summarise([0.5, 0.7, 0.9, float("nan")], ["a", "b", "c", "d"])
    >>> summary.scans, summary.undefined, round(summary.mean, 3)
    (3, 1, 0.7)
    """
    defined, owners, undefined = _defined(np.asarray(values, dtype=np.float64), subjects)
    count = int(owners.max()) + 1 if len(owners) else 0
    if len(defined) == 0:
        nan = math.nan
        return Summary(0, 0, undefined, nan, UNDEFINED, nan, UNDEFINED, nan, nan, nan)
    means, medians = UNDEFINED, UNDEFINED
    if count > 1:
        weights = bootstrap_weights(count, resamples, seed)
        means = percentile_interval(_weighted_means(defined, owners, weights))
        medians = percentile_interval(_weighted_medians(defined, owners, weights))
    return Summary(
        scans=len(defined),
        subjects=count,
        undefined=undefined,
        mean=float(defined.mean()),
        mean_interval=means,
        median=float(np.median(defined)),
        median_interval=medians,
        sd=float(defined.std(ddof=1)) if len(defined) > 1 else math.nan,
        minimum=float(defined.min()),
        maximum=float(defined.max()),
    )


def mean_shift(
    first: ArrayLike,
    first_subjects: Sequence[str],
    second: ArrayLike,
    second_subjects: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> tuple[float, Interval]:
    """Difference of the means of two cohorts of different people, second minus first.

    Each cohort's subjects are resampled on their own.

    Returns
    -------
    difference : float
        NaN where a cohort has no defined value.
    interval : Interval
        95 % percentile bootstrap; NaN where a cohort has fewer than two subjects.
    """
    means, resampled = [], []
    sides = ((first, first_subjects), (second, second_subjects))
    for number, (values, subjects) in enumerate(sides):
        defined, owners, _ = _defined(np.asarray(values, dtype=np.float64), subjects)
        count = int(owners.max()) + 1 if len(owners) else 0
        means.append(float(defined.mean()) if count else math.nan)
        if count > 1:
            weights = bootstrap_weights(count, resamples, seed + number)
            resampled.append(_weighted_means(defined, owners, weights))
    difference = means[1] - means[0]
    if len(resampled) < 2:
        return difference, UNDEFINED
    return difference, percentile_interval(resampled[1] - resampled[0])


def compare_paired(
    first: ArrayLike,
    second: ArrayLike,
    subjects: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> PairedComparison:
    """Compare two methods on the same scans.

    A subject with several visits enters the test once, with the mean of its differences. Zero
    differences are left out of the test and of the effect size, as Wilcoxon did.

    Parameters
    ----------
    first, second : arrays (N,)
        Values of the two methods on the same scans; NaN is undefined.
    subjects : sequence of N str
        Whose scan it is.
    resamples, seed : int
        Of the bootstrap.

    Returns
    -------
    PairedComparison

    Examples
    --------
    >>> same = compare_paired([0.5, 0.6], [0.5, 0.6], ["a", "b"])
    >>> same.mean_difference, same.p_value, same.nonzero
    (0.0, 1.0, 0)
    """
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    differences, owners, undefined = _defined(two - one, subjects)
    both = np.isfinite(two - one)
    count = int(owners.max()) + 1 if len(owners) else 0
    if count == 0:
        nan = math.nan
        return PairedComparison(0, 0, undefined, nan, nan, nan, UNDEFINED, 0, nan, nan, nan)
    per_subject = np.bincount(owners, differences) / np.bincount(owners)
    nonzero = per_subject[per_subject != 0]
    interval = UNDEFINED
    if count > 1:
        weights = bootstrap_weights(count, resamples, seed)
        interval = percentile_interval(_weighted_means(differences, owners, weights))
    return PairedComparison(
        scans=len(differences),
        subjects=count,
        undefined=undefined,
        mean_first=float(one[both].mean()),
        mean_second=float(two[both].mean()),
        mean_difference=float(differences.mean()),
        interval=interval,
        nonzero=len(nonzero),
        p_value=_wilcoxon_p(nonzero),
        smallest_p=min(1.0, 2.0 ** (1 - len(nonzero))),
        rank_biserial=_rank_biserial(nonzero),
    )


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number by Holm's procedure; NaN stays, and does not count.

    Examples
    --------
    >>> [round(p, 3) for p in holm_adjusted([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[i] = largest
    return adjusted


def _defined(
    values: FloatArray, subjects: Sequence[str]
) -> tuple[FloatArray, NDArray[np.intp], int]:
    """Return defined values, the number of the subject that each belongs to, and how many are not.

    Infinite values cannot occur in measures; they would count as undefined.
    """
    if len(values) != len(subjects):
        raise ValueError(f"{len(values)} values need as many subjects, not {len(subjects)}")
    finite = np.isfinite(values)
    _, owners = np.unique(np.asarray(subjects, dtype=np.str_)[finite], return_inverse=True)
    return values[finite], np.asarray(owners, dtype=np.intp).ravel(), int((~finite).sum())


@lru_cache(maxsize=2)  # every measure of a group of subjects is resampled alike
def bootstrap_weights(subjects: int, resamples: int, seed: int) -> FloatArray:
    """How often each resample holds each subject (resamples, subjects)."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(subjects, np.full(subjects, 1.0 / subjects), size=resamples)
    weights = counts.astype(np.float64)
    weights.flags.writeable = False
    return weights


def _weighted_means(
    values: FloatArray, owners: NDArray[np.intp], weights: FloatArray
) -> FloatArray:
    sums, counts = np.bincount(owners, values), np.bincount(owners)
    means = (weights @ sums) / (weights @ counts)
    return np.asarray(means, dtype=np.float64)


def _weighted_medians(
    values: FloatArray, owners: NDArray[np.intp], weights: FloatArray
) -> FloatArray:
    """Medians of the multisets in which each value occurs as often as its subject was drawn."""
    order = np.argsort(values)
    ranked, ranked_owners = values[order], owners[order]
    medians = []
    for start in range(0, len(weights), _CHUNK):
        reached = np.cumsum(weights[start : start + _CHUNK, ranked_owners], axis=1)
        total = reached[:, -1:]
        # The two middle places, which are one where the total is odd.
        lower = (reached < (total + 1) // 2).sum(axis=1)
        upper = (reached < total // 2 + 1).sum(axis=1)
        medians.append((ranked[lower] + ranked[upper]) / 2.0)
    return np.concatenate(medians)


def percentile_interval(resampled: FloatArray) -> Interval:
    """95 % interval of a statistic from its values in the resamples."""
    tail = 100.0 * (1.0 - LEVEL) / 2.0
    low, high = np.percentile(resampled, (tail, 100.0 - tail))
    return Interval(float(low), float(high))


def _wilcoxon_p(nonzero: FloatArray) -> float:
    if len(nonzero) == 0:
        return 1.0
    with warnings.catch_warnings():
        # Ties in a small sample make SciPy approximate, and say so: the report states n instead.
        warnings.simplefilter("ignore", UserWarning)
        return float(stats.wilcoxon(nonzero).pvalue)


def _rank_biserial(nonzero: FloatArray) -> float:
    if len(nonzero) == 0:
        return 0.0
    ranks = stats.rankdata(np.abs(nonzero))
    return float((ranks * np.sign(nonzero)).sum() / ranks.sum())
