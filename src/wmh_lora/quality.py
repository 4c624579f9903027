"""Whether a scan and its result can be trusted: checks with a verdict, a sentence and limits.

The limits were set on real scans with a margin and are tabulated in ``docs/quality.md``. A failed
check does not stop a segmentation; it tells the reader to look before using the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wmh_lora.quality_measures import ScanMeasures, measure_scan
from wmh_lora.structures import (
    BRAIN_RANGE_ML,
    CUT_LIMITS_CM2,
    Structure,
    border_areas_cm2,
    check_grid,
    find_brain,
    find_ventricles,
)
from wmh_lora.volume import Volume

__all__ = [
    "QualityCheck",
    "QualityReport",
    "Verdict",
    "assess_quality",
    "check_measures",
    "mean_uncertainty",
]

Verdict = Literal["pass", "warn", "fail"]
_ORDER: tuple[Verdict, ...] = ("pass", "warn", "fail")

_CUT_FAILS = 1.75  # times the area that is warned about
_T1_INDEX = {"warn_below": -0.02, "fail_below": -0.12}
_T2_CORE_P95, _T2_CORE_P25 = 1.8, 0.7
_BRIGHT_CORE_P95 = 2.0
_CT_BRIGHTEST, _CT_AIR_DEPTH, _CT_AIR_HU = 12.0, 8.0, -400.0
_THRESHOLD_BAND = 0.3
_CHANGE_FROM_ML = 0.5
_WHOLE_HEAD = 1.15


class _Rule(NamedTuple):
    """A check that compares one number with limits."""

    name: str
    found: str  # a sentence about {value}, without its stop
    limits: Mapping[str, float]
    missing: str = "too little of the head is in the image"


_MEASURED: tuple[tuple[_Rule, Callable[[ScanMeasures], float | None]], ...] = (
    (
        _Rule(
            "noise",
            "Noise in white matter is {value:.3f} of the step from fluid to white matter",
            {"warn_above": 0.09, "fail_above": 0.16},
        ),
        lambda measures: measures.noise,
    ),
    (
        _Rule(
            "sharpness",
            "Fine detail is {value:.2f} times as strong as coarse detail",
            {"warn_below": 2.2, "fail_below": 1.5},
        ),
        lambda measures: measures.sharpness,
    ),
    (
        _Rule(
            "ghosting",
            "The air above and below the head in its pictures is brighter than at their sides by "
            "{value:.3f} of white matter",
            {"warn_below": -0.06, "warn_above": 0.06, "fail_below": -0.15, "fail_above": 0.15},
            missing="the air around the head was blanked or is too narrow",
        ),
        lambda measures: measures.ghosting,
    ),
    (
        _Rule(
            "slice_steps",
            "Slices differ in brightness from their neighbours by {value:.3f} of the step from "
            "fluid to white matter",
            {"warn_above": 0.06, "fail_above": 0.15},
        ),
        lambda measures: measures.slice_step,
    ),
    (
        _Rule(
            "missing_values",
            "A share of {value:.2g} of the head holds no finite number",
            {"warn_above": 1e-4, "fail_above": 0.01},
        ),
        lambda measures: measures.missing_share,
    ),
)
_SLICES = _Rule(
    "voxel_size", "Slices are {value:.1f} mm apart", {"warn_above": 8.5, "fail_above": 12.0}
)
_PIXELS = _Rule(
    "voxel_size", "Pixels measure {value:.1f} mm", {"warn_above": 1.5, "fail_above": 3.0}
)
_FLUID = _Rule(
    "fluid_suppression",
    "The ventricles lie {value:.2f} of the way from the darkest fluid to white matter",
    {"warn_above": 0.6},
    missing="no ventricles were found",
)
_LESION_VOLUME = _Rule(
    "lesion_volume",
    "Lesions fill {value:.2f} % of the brain",
    {"warn_above": 6.0, "fail_above": 20.0},
    missing="the volume of the brain is not known",
)
_CONFIDENCE = _Rule(
    "confidence",
    f"Voxels whose probability is within {_THRESHOLD_BAND:.0%} of the threshold measure "
    "{value:.2f} of the lesions",
    {"warn_above": 0.65},
    missing=f"the lesions found measure less than {_CHANGE_FROM_ML:g} mL",
)
_AGREEMENT = _Rule(
    "agreement",
    "Looks at the same lesion voxel differ by {value:.3f} in probability (standard deviation)",
    {"warn_above": 0.2},
    missing="each slice was seen once, or nothing was found",
)


@dataclass(frozen=True)
class QualityCheck:
    """One thing that was looked at.

    Attributes
    ----------
    name : str
        ``brain``, ``field_of_view``, ...; stays the same from version to version.
    verdict : {"pass", "warn", "fail"}
        A check that could not be made passes, says so, and has no value.
    sentence : str
        What was found, for a reader.
    value : float or None
        The measured value, in the unit that the sentence names.
    limits : mapping of str to float
        ``warn_above``, ``fail_above``, ``warn_below`` or ``fail_below``.
    """

    name: str
    verdict: Verdict
    sentence: str
    value: float | None
    limits: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "name": self.name,
            "verdict": self.verdict,
            "sentence": self.sentence,
            "value": None if self.value is None else round(self.value, 6),
            "limits": dict(self.limits),
        }


@dataclass(frozen=True)
class QualityReport:
    """All checks of one scan."""

    checks: tuple[QualityCheck, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of all checks."""
        return max((check.verdict for check in self.checks), key=_ORDER.index, default="pass")

    @property
    def concerns(self) -> tuple[QualityCheck, ...]:
        """The checks that did not pass, the failed ones first."""
        found = [check for check in self.checks if check.verdict != "pass"]
        return tuple(sorted(found, key=lambda check: -_ORDER.index(check.verdict)))

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {"verdict": self.verdict, "checks": [check.as_dict() for check in self.checks]}


def assess_quality(
    volume: Volume,
    *,
    probability: NDArray[Any],
    mask: NDArray[Any],
    threshold: float,
    structure_masks: Mapping[str, NDArray[Any]],
    uncertainty: NDArray[Any] | None = None,
    measures: ScanMeasures | None = None,
) -> QualityReport:
    """Check a scan and what was found in it.

    Parameters
    ----------
    volume : Volume
        The scan.
    probability, mask : array (I, J, K)
        Lesion probability in [0, 1] and the lesion mask made from it.
    threshold : float
        The threshold that was used.
    structure_masks : mapping of str to array (I, J, K)
        ``"brain"`` and ``"ventricles"``, non-zero inside; checks that need them say so where they
        are absent.
    uncertainty : array (I, J, K), optional
        Standard deviation of the probability over views and looks.
    measures : ScanMeasures, optional
        What `measure_scan` found in this scan; it is measured here otherwise.

    Returns
    -------
    QualityReport
        Its verdict is the worst of its checks.

    Raises
    ------
    DataError
        If the scan shows no head.
    GridMismatchError
        If an array has another shape than the scan.
    """
    maps = {"probability": probability, "mask": mask, **structure_masks}
    if uncertainty is not None:
        maps["uncertainty"] = uncertainty
    check_grid(volume.shape, maps)
    measures = measures or measure_scan(volume)
    brain = find_brain(structure_masks, volume.affine)
    ventricles = find_ventricles(structure_masks, volume.affine, brain.mask)
    lesion_ml = int(np.count_nonzero(mask)) * volume.voxel_volume_ml
    return QualityReport(
        (
            _brain(brain),
            _field_of_view(structure_masks.get("brain"), volume),
            _voxel_size(volume),
            *check_measures(measures),
            _fluid(volume, ventricles, measures),
            _lesion_volume(lesion_ml, brain),
            _confidence(probability, threshold, lesion_ml, volume),
            _agreement(uncertainty, mask),
            _head(measures, brain),
        )
    )


def check_measures(measures: ScanMeasures) -> tuple[QualityCheck, ...]:
    """Make the checks that need nothing but the scan: contrast, noise, sharpness and the like."""
    judged = (_limited(rule, measure(measures)) for rule, measure in _MEASURED)
    return (_contrast(measures), *judged)


def _limited(rule: _Rule, value: float | None) -> QualityCheck:
    """Judge a value by the limits of its rule."""
    if value is None:
        sentence = f"Not measured: {rule.missing}."
        return QualityCheck(rule.name, "pass", sentence, None, rule.limits)
    verdict: Verdict = "pass"
    beyond = ""
    for key, limit in rule.limits.items():
        broken = value > limit if key.endswith("above") else value < limit
        severity: Verdict = "fail" if key.startswith("fail") else "warn"
        if broken and _ORDER.index(severity) > _ORDER.index(verdict):
            side = "above" if key.endswith("above") else "below"
            verdict, beyond = severity, f", {side} the limit of {limit:g}"
    sentence = f"{rule.found.format(value=value)}{beyond}."
    return QualityCheck(rule.name, verdict, sentence, value, rule.limits)


def _brain(brain: Structure) -> QualityCheck:
    low, high = BRAIN_RANGE_ML
    limits = {"fail_below": low, "warn_above": high}
    if brain.mask is not None:
        sentence = f"The brain measures {brain.volume_ml:.0f} mL."
        return QualityCheck("brain", "pass", sentence, brain.volume_ml, limits)
    reason = str(brain.reason)
    if brain.volume_ml is None and "does not mark" in reason:
        return QualityCheck("brain", "pass", f"Not measured: {reason}.", None, limits)
    volume_ml = brain.volume_ml or 0.0
    verdict: Verdict = "warn" if volume_ml > low else "fail"
    sentence = f"{reason[0].upper()}{reason[1:]}; is this a scan of a whole brain?"
    return QualityCheck("brain", verdict, sentence, volume_ml, limits)


def _field_of_view(brain: NDArray[Any] | None, volume: Volume) -> QualityCheck:
    if brain is None:
        sentence = "Not measured: the model does not mark the brain."
        return QualityCheck("field_of_view", "pass", sentence, None, {})
    areas = border_areas_cm2(brain, volume.affine)
    face = max(areas, key=lambda name: areas[name] / CUT_LIMITS_CM2[name])
    area, limit = areas[face], CUT_LIMITS_CM2[face]
    limits = {"warn_above": limit, "fail_above": _CUT_FAILS * limit}
    if area <= limit:
        sentence = "The brain lies within the image."
        return QualityCheck("field_of_view", "pass", sentence, area, limits)
    verdict: Verdict = "fail" if area > _CUT_FAILS * limit else "warn"
    sentence = f"The {face} edge of the image cuts the brain off, over {area:.0f} cm²."
    return QualityCheck("field_of_view", verdict, sentence, area, limits)


def _voxel_size(volume: Volume) -> QualityCheck:
    """Judge the longest edge as slice thickness and the middle one as pixel size."""
    _, pixel, thick = sorted(volume.spacing_mm)
    by_slice, by_pixel = _limited(_SLICES, thick), _limited(_PIXELS, pixel)
    return max(by_slice, by_pixel, key=lambda check: _ORDER.index(check.verdict))


def _contrast(measures: ScanMeasures) -> QualityCheck:
    """Tell FLAIR from other contrasts by the order of intensities deep inside the head.

    FLAIR: fluid is darkest, and grey matter and lesions are brighter than white matter. T1: grey
    matter lies between fluid and white matter, so tissue spreads downward from the mode and hardly
    upward. T2: fluid is brightest by far, and the darkest end is white matter.
    """
    index = measures.tissue_p99 - 1.0 - 3.0 * (1.0 - measures.tissue_p25)
    found: tuple[Verdict, str]
    if (
        measures.brightest > _CT_BRIGHTEST
        or measures.air_depth > _CT_AIR_DEPTH
        or measures.air < _CT_AIR_HU  # Hounsfield units; magnitude images have no negative values
    ):
        found = ("fail", "Bone or air lies as far from the brain as in CT; a FLAIR is needed.")
    elif measures.core_p95 > _T2_CORE_P95 and measures.core_p25 < _T2_CORE_P25:
        found = ("fail", "Fluid is the brightest, as in T2-weighted images; a FLAIR is needed.")
    elif index < _T1_INDEX["fail_below"]:
        found = (
            "fail",
            "Grey matter is darker than white matter, as in T1-weighted images; a FLAIR is needed.",
        )
    elif index < _T1_INDEX["warn_below"]:
        found = ("warn", "Grey matter is hardly brighter than white matter; is this a FLAIR?")
    elif measures.core_p95 > _BRIGHT_CORE_P95:
        found = ("warn", "Much of the brain is far brighter than white matter; is this a FLAIR?")
    else:
        found = ("pass", "Fluid is dark and grey matter brighter than white matter, as in FLAIR.")
    return QualityCheck("contrast", found[0], found[1], index, _T1_INDEX)


def _fluid(volume: Volume, ventricles: Structure, measures: ScanMeasures) -> QualityCheck:
    if ventricles.mask is None:
        return _limited(_FLUID, None)
    values = volume.data[ventricles.mask]
    values = values[np.isfinite(values)]
    if values.size == 0:
        return _limited(_FLUID, None)
    above = float(np.median(values)) - measures.fluid
    return _limited(_FLUID, above / (measures.white_matter - measures.fluid))


def _lesion_volume(lesion_ml: float, brain: Structure) -> QualityCheck:
    if brain.mask is None or not brain.volume_ml:
        return _limited(_LESION_VOLUME, None)
    return _limited(_LESION_VOLUME, 100.0 * lesion_ml / brain.volume_ml)


def _confidence(
    probability: NDArray[Any], threshold: float, lesion_ml: float, volume: Volume
) -> QualityCheck:
    """How much of the volume hangs on the threshold."""
    if lesion_ml < _CHANGE_FROM_ML:
        return _limited(_CONFIDENCE, None)
    low, high = threshold * (1.0 - _THRESHOLD_BAND), threshold * (1.0 + _THRESHOLD_BAND)
    between = np.count_nonzero(probability >= low) - np.count_nonzero(probability >= high)
    return _limited(_CONFIDENCE, between * volume.voxel_volume_ml / lesion_ml)


def _agreement(uncertainty: NDArray[Any] | None, mask: NDArray[Any]) -> QualityCheck:
    return _limited(
        _AGREEMENT, None if uncertainty is None else mean_uncertainty(uncertainty, mask)
    )


def mean_uncertainty(uncertainty: NDArray[Any], mask: NDArray[Any]) -> float | None:
    """Average the standard deviation over the voxels of lesions that were seen more than once.

    Parameters
    ----------
    uncertainty : array (I, J, K)
        Standard deviation of the probability; zero where a slice was seen once.
    mask : array (I, J, K)
        Non-zero in lesions.

    Returns
    -------
    float or None
        None where no lesion was seen more than once.
    """
    seen = uncertainty[np.asarray(mask) != 0]
    seen = seen[seen > 0]
    return float(seen.mean()) if seen.size else None


def _head(measures: ScanMeasures, brain: Structure) -> QualityCheck:
    """Tell whole heads from extracted brains, for whoever passes scans on; never a fault."""
    if brain.mask is None or not brain.volume_ml:
        return QualityCheck("head", "pass", f"Not measured: {brain.reason}.", None, {})
    ratio = measures.head_ml / brain.volume_ml
    if ratio > _WHOLE_HEAD:
        sentence = "Skull and scalp are in the image; a face may be recognisable."
    else:
        sentence = "Little but the brain is in the image."
    return QualityCheck("head", "pass", sentence, ratio, {})
