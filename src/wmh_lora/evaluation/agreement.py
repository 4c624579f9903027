"""Agreement of two measurements of one volume: Bland-Altman, correlation, ICC(2,1), Lin's CCC.

References
----------
J. M. Bland and D. G. Altman, "Measuring agreement in method comparison studies", Statistical
Methods in Medical Research 8(2), 1999, doi:10.1177/096228029900800204.

P. E. Shrout and J. L. Fleiss, "Intraclass correlations: uses in assessing rater reliability",
Psychological Bulletin 86(2), 1979, doi:10.1037/0033-2909.86.2.420.

L. I.-K. Lin, "A concordance correlation coefficient to evaluate reproducibility", Biometrics 45(1),
1989, doi:10.2307/2532051, with the corrections in Biometrics 56(1), 2000.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from wmh_lora.evaluation.statistics import LEVEL, UNDEFINED, Interval

__all__ = ["Agreement", "BlandAltman", "Estimate", "agree", "bland_altman", "ccc", "icc_2_1"]

# Half the width of a normal distribution's central 95 %.
_Z = float(stats.norm.ppf((1.0 + LEVEL) / 2.0))

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; NaN where undefined."""

    value: float
    interval: Interval = UNDEFINED


@dataclass(frozen=True)
class BlandAltman:
    """Differences of a prediction from the reference, in the unit of the measurements.

    Attributes
    ----------
    n : int
        Number of pairs.
    bias : Estimate
        Mean difference, prediction minus reference.
    sd : float
        Standard deviation of the differences, n - 1 in the denominator.
    lower, upper : Estimate
        95 % limits of agreement, bias -+ 1.96 sd.
    slope : Estimate
        Of the regression of the difference on the mean: proportional bias.
    slope_p : float
        Two-sided p-value of a slope of 0.
    """

    n: int
    bias: Estimate
    sd: float
    lower: Estimate
    upper: Estimate
    slope: Estimate
    slope_p: float


@dataclass(frozen=True)
class Agreement:
    """Every measure of agreement of one series of volumes, see the functions of this module."""

    bland_altman: BlandAltman
    pearson_r2: float
    icc: Estimate
    ccc: Estimate


def agree(reference: ArrayLike, prediction: ArrayLike) -> Agreement:
    """Compute every measure of agreement of two series of volumes.

    Scans count as independent; with several visits a subject the intervals are too narrow.

    Parameters
    ----------
    reference, prediction : arrays (N,)
        Finite numbers in one unit.

    Raises
    ------
    ValueError
        If the two differ in length or hold anything not finite.

    Examples
    --------
    >>> result = agree([1.0, 4.0, 9.0, 20.0], [1.5, 4.5, 9.5, 20.5])
    >>> result.bland_altman.bias.value, round(result.pearson_r2, 6)
    (0.5, 1.0)
    """
    x, y = _checked(reference, prediction)
    varying = len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
    r = float(np.corrcoef(x, y)[0, 1]) if varying else math.nan
    return Agreement(
        bland_altman=bland_altman(x, y),
        pearson_r2=r * r,
        icc=icc_2_1(np.column_stack([x, y])),
        ccc=ccc(x, y),
    )


def bland_altman(reference: ArrayLike, prediction: ArrayLike) -> BlandAltman:
    """Compute bias and limits of agreement with their 95 % intervals (Bland & Altman 1999).

    The interval of the bias is exact for normal differences. That of a limit is their
    approximation: its variance is sd^2 (1/n + 1.96^2 / (2 (n - 1))), with a quantile of t on n - 1
    degrees of freedom.

    Parameters
    ----------
    reference, prediction : arrays (N,)
        Finite numbers in one unit.

    Returns
    -------
    BlandAltman
        Limits need two pairs; the slope needs three, with differing means.
    """
    x, y = _checked(reference, prediction)
    n = len(x)
    differences, means = y - x, (x + y) / 2.0
    bias = float(differences.mean()) if n else math.nan
    if n < 2:
        nothing = Estimate(math.nan)
        return BlandAltman(n, Estimate(bias), math.nan, nothing, nothing, nothing, slope_p=math.nan)
    sd = float(differences.std(ddof=1))
    t = float(stats.t.ppf((1.0 + LEVEL) / 2.0, n - 1))
    error_of_limit = sd * math.sqrt(1.0 / n + _Z**2 / (2.0 * (n - 1)))
    slope, slope_p = _slope(means, differences)
    return BlandAltman(
        n=n,
        bias=_around(bias, t * sd / math.sqrt(n)),
        sd=sd,
        lower=_around(bias - _Z * sd, t * error_of_limit),
        upper=_around(bias + _Z * sd, t * error_of_limit),
        slope=slope,
        slope_p=slope_p,
    )


def icc_2_1(ratings: ArrayLike) -> Estimate:
    """Compute ICC(2,1): two-way random effects, absolute agreement, single measurement.

    Parameters
    ----------
    ratings : array (N, K)
        N targets, each measured by the same K raters or methods.

    Returns
    -------
    Estimate
        With the interval of Shrout & Fleiss (1979); NaN for fewer than two targets, or where
        nothing varies. Perfect agreement gives 1.

    Examples
    --------
    The worked example of Shrout & Fleiss (1979):

    >>> table = [
    ...     [9, 2, 5, 8],
    ...     [6, 1, 3, 2],
    ...     [8, 4, 6, 8],
    ...     [7, 1, 2, 6],
    ...     [10, 5, 6, 9],
    ...     [6, 2, 4, 7],
    ... ]
    >>> round(icc_2_1(table).value, 2)
    0.29
    """
    table = np.asarray(ratings, dtype=np.float64)
    n, k = table.shape
    if n < 2 or k < 2:
        return Estimate(math.nan)
    grand = table.mean()
    between = k * float(((table.mean(axis=1) - grand) ** 2).sum()) / (n - 1)
    raters = n * float(((table.mean(axis=0) - grand) ** 2).sum()) / (k - 1)
    residual = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + grand
    error = float((residual**2).sum()) / ((n - 1) * (k - 1))
    denominator = between + (k - 1) * error + k * (raters - error) / n
    scale = float((table**2).mean())
    if denominator <= np.finfo(float).eps * scale:
        return Estimate(math.nan)
    value = (between - error) / denominator
    if error <= np.finfo(float).eps * scale:  # no F ratio; rounding is all that differs
        return Estimate(value, Interval(1.0, 1.0) if value > 1.0 - 1e-12 else UNDEFINED)
    ratio = raters / error
    a, b = k * value, n * (1.0 + (k - 1) * value) - k * value
    freedom = (k - 1) * (n - 1) * (a * ratio + b) ** 2 / ((n - 1) * (a * ratio) ** 2 + b**2)
    quantile = (1.0 + LEVEL) / 2.0
    f_low = float(stats.f.ppf(quantile, n - 1, freedom))
    f_high = float(stats.f.ppf(quantile, freedom, n - 1))
    rest = k * raters + (k * n - k - n) * error
    low = n * (between - f_low * error) / (f_low * rest + n * between)
    high = n * (f_high * between - error) / (rest + n * f_high * between)
    return Estimate(value, Interval(low, high))


def ccc(reference: ArrayLike, prediction: ArrayLike) -> Estimate:
    """Compute Lin's concordance correlation coefficient, with moments over n as he defines it.

    Parameters
    ----------
    reference, prediction : arrays (N,)
        Finite numbers in one unit.

    Returns
    -------
    Estimate
        In [-1, 1]. The interval is asymptotic, through Fisher's z; it needs three pairs, and there
        is none at -1. NaN for
        fewer than two pairs, or where nothing varies. Perfect agreement gives 1.
    """
    x, y = _checked(reference, prediction)
    n = len(x)
    if n < 2:
        return Estimate(math.nan)
    covariance = float(((x - x.mean()) * (y - y.mean())).mean())
    shift = float(x.mean() - y.mean())
    total = float(x.var() + y.var()) + shift**2
    if total == 0.0:
        return Estimate(math.nan)
    value = 2.0 * covariance / total
    if value > 1.0 - 1e-12:
        return Estimate(1.0, Interval(1.0, 1.0))
    product = float(x.std() * y.std())
    if n < 3 or product == 0.0 or covariance == 0.0 or value < -1.0 + 1e-12:
        return Estimate(value)
    r, u2 = covariance / product, shift**2 / product
    c2 = value**2
    variance = (
        (1.0 - r**2) * c2 / ((1.0 - c2) * r**2)
        + 2.0 * value**3 * (1.0 - value) * u2 / (r * (1.0 - c2) ** 2)
        - value**4 * u2**2 / (2.0 * r**2 * (1.0 - c2) ** 2)
    ) / (n - 2)
    half = _Z * math.sqrt(max(0.0, variance))
    z = math.atanh(value)
    return Estimate(value, Interval(math.tanh(z - half), math.tanh(z + half)))


def _slope(means: FloatArray, differences: FloatArray) -> tuple[Estimate, float]:
    n = len(means)
    if n < 3 or np.ptp(means) == 0:
        return Estimate(math.nan), math.nan
    if np.ptp(differences) == 0:
        return Estimate(0.0, Interval(0.0, 0.0)), 1.0
    fit = stats.linregress(means, differences)
    half = float(stats.t.ppf((1.0 + LEVEL) / 2.0, n - 2)) * float(fit.stderr)
    return _around(float(fit.slope), half), float(fit.pvalue)


def _around(value: float, half: float) -> Estimate:
    return Estimate(value, Interval(value - half, value + half))


def _checked(reference: ArrayLike, prediction: ArrayLike) -> tuple[FloatArray, FloatArray]:
    x, y = np.asarray(reference, dtype=np.float64), np.asarray(prediction, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"two rows of equal length are needed, not {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("volumes must be finite numbers")
    return x, y
