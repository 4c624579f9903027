"""Two or more visits of one person, from their scans to what changed."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from wmh_lora.errors import ConfigError, GridMismatchError
from wmh_lora.logs import collect_warnings
from wmh_lora.longitudinal.align import Alignment, align_visits
from wmh_lora.longitudinal.changes import FollowedLesion, Rules, follow_lesions
from wmh_lora.longitudinal.repeatability import boundary_sd_ml, limit_ml
from wmh_lora.postprocess import label_lesions
from wmh_lora.preprocess_head import find_background
from wmh_lora.report.outputs import Segmentation
from wmh_lora.volume import Volume

__all__ = [
    "FollowUp",
    "TotalChange",
    "Visit",
    "VisitVolume",
    "compare_visits",
    "intervals_between",
]

_SIMILAR_VOXELS = 1.5
_log = logging.getLogger("wmh_lora")


@dataclass(frozen=True, eq=False)
class Visit:
    """One scan of the person and its lesions.

    Attributes
    ----------
    name : str
        Such as "ses-1"; used in file names.
    volume : Volume
        The FLAIR.
    mask : array (I, J, K)
        Lesions on its own voxels; non-zero is lesion.
    segmentation : Segmentation or None
        Where the mask comes from, if it was made here; its brain mask guides the registration, and
        its probability tells lesions that are new from those that were doubtful.
    warnings : tuple of str
        What is to be known of it.
    """

    name: str
    volume: Volume
    mask: npt.NDArray[Any]
    segmentation: Segmentation | None = None
    warnings: tuple[str, ...] = ()

    @property
    def probability(self) -> npt.NDArray[np.float32] | None:
        """Lesion probability on the scan's own voxels; None where only the mask is known."""
        return None if self.segmentation is None else self.segmentation.probability

    @classmethod
    def of(cls, name: str, segmentation: Segmentation) -> Visit:
        """Make a visit of what the engine found in its scan."""
        failed = [
            f"{name}: quality fail: {check.sentence}"
            for check in segmentation.quality.checks
            if check.verdict == "fail"
        ]
        for text in failed:
            _log.warning("%s", text)
        warnings = (*segmentation.warnings, *failed)
        return cls(name, segmentation.volume, segmentation.mask, segmentation, warnings)


@dataclass(frozen=True)
class VisitVolume:
    """Volumes of one visit, counted on its own voxels.

    Attributes
    ----------
    volume_ml : float
        Of all lesions.
    common_ml : float
        Of lesion voxels that lie in the field of view of every visit.
    sd_ml : float
        Estimated standard deviation of ``volume_ml`` from the lesions' surfaces.
    lesions : int
        26-connected lesions.
    """

    volume_ml: float
    common_ml: float
    sd_ml: float
    lesions: int


@dataclass(frozen=True)
class TotalChange:
    """Change of the lesion volume in the common field of view between two visits.

    Attributes
    ----------
    before, after : int
        Index of the visits.
    change_ml : float
        Later less earlier.
    percent : float or None
        Of the earlier volume; None where that is zero.
    limit_ml : float
        Limit of repeatability.
    """

    before: int
    after: int
    change_ml: float
    percent: float | None
    limit_ml: float

    @property
    def within_repeatability(self) -> bool:
        """Whether chance explains the change."""
        return abs(self.change_ml) <= self.limit_ml


@dataclass(frozen=True, eq=False)
class FollowUp:
    """What changed between the visits of a person.

    Attributes
    ----------
    visits : tuple of Visit
        In the order given.
    alignment : Alignment
        Their half-way space.
    volumes : tuple of VisitVolume
        One a visit.
    totals : tuple of TotalChange
        One an interval: each visit to the next, and with more than two the first to the last.
    lesions : tuple of FollowedLesion
        The largest first.
    labels : int32 array
        Numbers of the lesions on the half-way grid.
    rules : Rules
        By which lesions were judged.
    within_subject_cv_percent : float or None
        On which the limits of the totals rest; None if they rest on the lesions' surfaces.
    warnings : tuple of str
        What a reader should know before trusting the numbers.
    """

    visits: tuple[Visit, ...]
    alignment: Alignment
    volumes: tuple[VisitVolume, ...]
    totals: tuple[TotalChange, ...]
    lesions: tuple[FollowedLesion, ...]
    labels: npt.NDArray[np.int32]
    rules: Rules
    within_subject_cv_percent: float | None
    warnings: tuple[str, ...]


def intervals_between(visits: int) -> list[tuple[int, int]]:
    """Pair each visit with the next and, of more than two, the first with the last.

    Examples
    --------
    >>> intervals_between(3)
    [(0, 1), (1, 2), (0, 2)]
    """
    steps = [(i, i + 1) for i in range(visits - 1)]
    return steps if visits == 2 else [*steps, (0, visits - 1)]


def compare_visits(
    visits: Sequence[Visit],
    *,
    rules: Rules | None = None,
    within_subject_cv_percent: float | None = None,
    register: bool = True,
) -> FollowUp:
    """Register the visits of one person, and say what changed in total and lesion by lesion.

    Parameters
    ----------
    visits
        At least two, in the order of time.
    rules
        When a lesion counts as changed.
    within_subject_cv_percent
        Coefficient of variation of the lesion volume between repeated scans of one person on the
        scanners in use, if it is known. The limit of a total change is then 1.96 sqrt(2) times this
        percentage of the mean volume; otherwise it is estimated from the lesions' surfaces.
    register
        False takes the headers' word that all scans lie in one space already.

    Returns
    -------
    FollowUp

    Raises
    ------
    ConfigError
        If there are fewer than two visits, names are not distinct, or SimpleITK is not installed.
    DataError
        If the scans cannot be registered, hardly overlap, or a mask does not fit its scan.
    """
    visits = tuple(visits)
    _check(visits, within_subject_cv_percent)
    rules = rules or Rules()
    scans = [visit.volume for visit in visits]
    with collect_warnings() as warnings:
        _compare_scans(visits)
        focus = [_brain(visit) for visit in visits]
        alignment = align_visits(scans, focus=focus, register=register)
        volumes = _measure(visits, alignment, rules)
        intervals = intervals_between(len(visits))
        lesions, labels = follow_lesions(
            scans,
            [visit.mask for visit in visits],
            [visit.probability for visit in visits],
            alignment,
            intervals,
            rules,
        )
    totals = tuple(
        _total(i, j, volumes[i], volumes[j], within_subject_cv_percent) for i, j in intervals
    )
    own = [text for visit in visits for text in visit.warnings]
    return FollowUp(
        visits,
        alignment,
        volumes,
        totals,
        tuple(lesions),
        labels,
        rules,
        within_subject_cv_percent,
        (*own, *warnings),
    )


def _check(visits: Sequence[Visit], cv_percent: float | None) -> None:
    if len(visits) < 2:
        raise ConfigError(f"Two or more visits are needed, found {len(visits)}.")
    names = [visit.name for visit in visits]
    if len(set(names)) < len(names):
        raise ConfigError(f"The visits need distinct names, found {', '.join(names)}.")
    if wrong := [name for name in names if not name or {*name} & {"/", "\\"}]:
        raise ConfigError(f"A visit's name is part of file names; {wrong[0]!r} cannot be.")
    if cv_percent is not None and not 0.0 <= cv_percent < math.inf:
        raise ConfigError(
            f"The within-subject coefficient of variation must be zero or more percent, found "
            f"{cv_percent}."
        )
    for visit in visits:
        if visit.mask.shape != visit.volume.shape:
            raise GridMismatchError(
                f"The mask of {visit.volume.path or visit.name} has shape {visit.mask.shape}, the "
                f"scan {visit.volume.shape}; give the mask on the scan's own grid."
            )


def _compare_scans(visits: Sequence[Visit]) -> None:
    """Warn where volumes differ, or do not, for a reason that is not the person."""
    for one, other in combinations(visits, 2):
        if np.array_equal(one.volume.data, other.volume.data):
            _log.warning("%s and %s show the same scan.", one.name, other.name)
    sizes = [visit.volume.voxel_volume_ml * 1000 for visit in visits]
    if max(sizes) > _SIMILAR_VOXELS * min(sizes):
        listed = ", ".join(f"{visit.name} {size:.2f} mm3" for visit, size in zip(visits, sizes))
        _log.warning(
            "the visits have voxels of different size (%s): part of a change can come from the "
            "acquisition.",
            listed,
        )


def _brain(visit: Visit) -> npt.NDArray[np.uint8] | None:
    """Return the brain that the network found, where it is plausible."""
    if visit.segmentation is None:
        return None
    brain = visit.segmentation.structure_masks.get("brain")
    if brain is None or brain.sum() * visit.volume.voxel_volume_ml < 200.0:
        return None
    return brain


def _measure(
    visits: Sequence[Visit], alignment: Alignment, rules: Rules
) -> tuple[VisitVolume, ...]:
    measured = [~find_background(visit.volume.data) for visit in visits]
    volumes = []
    for i, visit in enumerate(visits):
        labels, lesions = label_lesions(visit.mask, visit.volume.affine)
        where = np.stack(np.nonzero(labels))
        common = np.ones(where.shape[1], dtype=np.bool_)
        to_half_way = np.linalg.inv(alignment.voxels_of(i, visit.volume))
        for j, other in enumerate(visits):
            matrix = alignment.voxels_of(j, other.volume) @ to_half_way
            there = np.rint(matrix[:3, :3] @ where + matrix[:3, 3:]).astype(np.int64)
            inside = ((there >= 0) & (there < np.array(other.volume.shape)[:, None])).all(axis=0)
            common &= inside
            common[inside] &= measured[j][tuple(there[:, inside])]
        sd_ml = boundary_sd_ml(labels, len(lesions), visit.volume, rules.boundary_sd_voxels)
        voxel_ml = visit.volume.voxel_volume_ml
        volumes.append(
            VisitVolume(
                volume_ml=where.shape[1] * voxel_ml,
                common_ml=int(common.sum()) * voxel_ml,
                sd_ml=float(np.linalg.norm(sd_ml)),
                lesions=len(lesions),
            )
        )
    return tuple(volumes)


def _total(
    i: int, j: int, first: VisitVolume, second: VisitVolume, cv_percent: float | None
) -> TotalChange:
    change = second.common_ml - first.common_ml
    if cv_percent is None:
        limit = limit_ml(first.sd_ml, second.sd_ml)
    else:
        sd_ml = cv_percent / 100.0 * (first.common_ml + second.common_ml) / 2
        limit = limit_ml(sd_ml, sd_ml)
    percent = 100.0 * change / first.common_ml if first.common_ml > 0 else None
    return TotalChange(i, j, change, percent, limit)
