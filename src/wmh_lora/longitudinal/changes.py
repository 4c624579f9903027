"""Lesions followed from visit to visit: new, grown, shrunk, stable, vanished or doubtful.

Lesions are the 26-connected components of each visit's own mask, and their volumes are counted on
its own voxels; the half-way space only tells which lesions of different visits are the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from wmh_lora.errors import ConfigError
from wmh_lora.longitudinal.align import Alignment
from wmh_lora.longitudinal.repeatability import boundary_sd_ml, limit_ml
from wmh_lora.postprocess import label_lesions
from wmh_lora.volume import Volume

__all__ = ["CHANGES", "FollowedLesion", "LesionChange", "Rules", "follow_lesions"]

BoolArray = npt.NDArray[np.bool_]
LabelArray = npt.NDArray[np.int32]
DoubleArray = npt.NDArray[np.float64]

CHANGES: dict[str, int] = {
    "stable": 1,
    "grown": 2,
    "shrunk": 3,
    "new": 4,
    "vanished": 5,
    "not assessable": 6,
    "too small": 7,
    "doubtful": 8,
    "absent": 0,
}
"""Kinds of change, and their numbers in the labelled map."""


@dataclass(frozen=True)
class Rules:
    """When a lesion counts as changed.

    Attributes
    ----------
    min_change_ml : float
        Grown and shrunk lesions change by at least this volume,
    min_change_percent : float
        and by at least this percentage of the smaller of both volumes.
    boundary_sd_voxels : float
        Standard deviation of the place of a boundary, from which limits of repeatability are
        estimated (see `wmh_lora.longitudinal.repeatability`); they do not decide on the kind.
    min_lesion_ml : float
        New and vanished lesions have at least this volume, a ball 3 mm across; smaller ones are
        "too small".
    min_share_in_view : float
        A lesion of which a visit's field of view holds less is not assessable there.
    min_evidence : float
        A lesion of one visit's mask is no news, but doubtful, where the other visit's lesion
        probability reaches this
    min_share_with_evidence : float
        in at least this share of the lesion.
    """

    min_change_ml: float = 0.05
    min_change_percent: float = 25.0
    boundary_sd_voxels: float = 0.29
    min_lesion_ml: float = 0.014
    min_share_in_view: float = 0.9
    min_evidence: float = 0.1
    min_share_with_evidence: float = 0.1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0.0 <= value < np.inf:
                raise ConfigError(f"{name} must be zero or more, found {value}.")
        for name in ("min_share_in_view", "min_evidence", "min_share_with_evidence"):
            if (value := getattr(self, name)) > 1.0:
                raise ConfigError(f"{name} must lie between 0 and 1, found {value}.")


@dataclass(frozen=True)
class LesionChange:
    """What became of one lesion between two visits.

    Attributes
    ----------
    before, after : int
        Index of the visits.
    kind : str
        A key of `CHANGES`; "absent" where neither visit shows the lesion.
    change_ml : float
        Later volume less earlier volume.
    limit_ml : float
        What chance may do to that, see `wmh_lora.longitudinal.repeatability`.
    event : str
        "merged" or "split" where the lesion had more parts before or after, otherwise empty.
    """

    before: int
    after: int
    kind: str
    change_ml: float
    limit_ml: float
    event: str

    @property
    def within_repeatability(self) -> bool:
        """Whether chance explains the change."""
        return abs(self.change_ml) <= self.limit_ml


@dataclass(frozen=True)
class FollowedLesion:
    """One lesion through all visits: the components of the visits' masks that touch each other.

    Attributes
    ----------
    index : int
        From 1, the largest first; its number in the labelled map.
    volume_ml : tuple of floats
        At each visit, on its own voxels.
    parts : tuple of ints
        How many components it has at each visit.
    share_in_view : tuple of floats
        How much of it lies in each visit's field of view, in [0, 1].
    share_with_evidence : tuple of floats
        In how much of it each visit's lesion probability reaches the rules' evidence, in [0, 1];
        0 where a visit has no probability.
    centroid_mm : three floats
        Centre of mass in the half-way space.
    changes : tuple of LesionChange
        One an interval.
    """

    index: int
    volume_ml: tuple[float, ...]
    parts: tuple[int, ...]
    share_in_view: tuple[float, ...]
    share_with_evidence: tuple[float, ...]
    centroid_mm: tuple[float, float, float]
    changes: tuple[LesionChange, ...]


@dataclass(frozen=True)
class _Found:
    """The lesions of one visit."""

    grid: LabelArray  # on the half-way grid
    volume_ml: DoubleArray
    sd_ml: DoubleArray


def follow_lesions(
    volumes: Sequence[Volume],
    masks: Sequence[npt.NDArray[Any]],
    probabilities: Sequence[npt.NDArray[np.float32] | None],
    alignment: Alignment,
    intervals: Sequence[tuple[int, int]],
    rules: Rules,
) -> tuple[list[FollowedLesion], LabelArray]:
    """Match the lesions of several visits, and say how each changed.

    Lesions of two visits are the same where half-way voxels of one lie on or beside (26 neighbours)
    voxels of the other: a lesion is new only if no voxel of the earlier mask is within one voxel of
    it. Lesions that merge, split or touch a common one are followed as one. A lesion that one mask
    misses by its threshold or peak alone has neither come nor gone: it is doubtful.

    Parameters
    ----------
    volumes, masks
        The scans, and their lesions on their own voxels.
    probabilities
        Of a lesion, in [0, 1] on the scans' own voxels; None for a visit of which only the mask is
        known.
    alignment
        From `wmh_lora.longitudinal.align.align_visits`.
    intervals
        Pairs of visits to compare.
    rules
        When a lesion counts as changed.

    Returns
    -------
    lesions : list of FollowedLesion
        The largest first.
    labels : int32 array
        `FollowedLesion.index` on the half-way grid, 0 elsewhere.
    """
    found = [
        _find(i, volume, mask, alignment, rules)
        for i, (volume, mask) in enumerate(zip(volumes, masks, strict=True))
    ]
    owner = _owners(found)
    labels = np.zeros(alignment.shape, np.int32)
    for visit, numbers in zip(found, owner, strict=True):
        labels = np.maximum(labels, np.concatenate([[0], numbers]).astype(np.int32)[visit.grid])
    total = max((int(numbers.max()) for numbers in owner if len(numbers)), default=0)
    where = np.nonzero(labels)
    shares = [
        _means(labels[where], alignment.in_view(i, volume)[where], total)
        for i, volume in enumerate(volumes)
    ]
    evidence = [
        _means(labels[where], _evidence(i, volume, map_, alignment, rules)[where], total)
        for i, (volume, map_) in enumerate(zip(volumes, probabilities, strict=True))
    ]
    centroids = np.stack([_means(labels[where], axis, total) for axis in where], axis=1)
    centroids = centroids @ alignment.affine[:3, :3].T + alignment.affine[:3, 3]
    lesions = []
    for n in range(total):
        members = [numbers == n + 1 for numbers in owner]
        ml = tuple(float(v.volume_ml[m].sum()) for v, m in zip(found, members))
        sd_ml = [float(np.linalg.norm(v.sd_ml[m])) for v, m in zip(found, members)]
        parts = tuple(int(m.sum()) for m in members)
        share = tuple(float(s[n]) for s in shares)
        seen = tuple(float(s[n]) for s in evidence)
        changes = tuple(
            _judge(before, after, ml, sd_ml, parts, share, seen, rules)
            for before, after in intervals
        )
        x, y, z = (float(c) for c in centroids[n])
        lesions.append(FollowedLesion(n + 1, ml, parts, share, seen, (x, y, z), changes))
    return _largest_first(lesions, labels)


def _find(
    visit: int, volume: Volume, mask: npt.NDArray[Any], alignment: Alignment, rules: Rules
) -> _Found:
    native, lesions = label_lesions(mask, volume.affine)
    return _Found(
        grid=alignment.labels(visit, volume, native),
        volume_ml=np.array([lesion.volume_ml for lesion in lesions]),
        sd_ml=boundary_sd_ml(native, len(lesions), volume, rules.boundary_sd_voxels),
    )


def _evidence(
    visit: int,
    volume: Volume,
    probability: npt.NDArray[np.float32] | None,
    alignment: Alignment,
    rules: Rules,
) -> LabelArray:
    """Mark half-way voxels with 1 where a visit's probability speaks for a lesion."""
    if probability is None:
        return np.zeros(alignment.shape, np.int32)
    enough = np.asarray(probability >= rules.min_evidence, dtype=np.int32)
    return alignment.labels(visit, volume, enough)


def _owners(found: Sequence[_Found]) -> list[npt.NDArray[np.int64]]:
    """Give every lesion of every visit the number (from 1) of the lesion that it is part of."""
    counts = [len(visit.volume_ml) for visit in found]
    starts = np.concatenate([[0], np.cumsum(counts)])
    links = [
        _touching(one.grid, other.grid) + starts[[i, j]] - 1
        for (i, one), (j, other) in itertools.combinations(enumerate(found), 2)
    ]
    pairs = np.concatenate(links).astype(np.int64)
    size = int(starts[-1])
    graph = sparse.coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), (size, size))
    if size == 0:
        return [np.zeros(0, np.int64) for _ in found]
    _, component = sparse.csgraph.connected_components(graph, directed=False)
    return [component[a:b].astype(np.int64) + 1 for a, b in itertools.pairwise(starts.tolist())]


def _touching(one: LabelArray, other: LabelArray) -> npt.NDArray[np.int64]:
    """Return pairs (n, 2) of labels whose voxels coincide or are neighbours."""
    padded = np.pad(other, 1)
    where = np.stack(np.nonzero(one))
    labels = one[tuple(where)]
    pairs = [np.zeros((0, 2), np.int64)]
    for offset in itertools.product(range(3), repeat=3):
        beside = padded[tuple(where + np.array(offset)[:, None])]
        both = np.stack([labels, beside], axis=1)[beside > 0]
        pairs.append(np.unique(both, axis=0))
    return np.unique(np.concatenate(pairs), axis=0).astype(np.int64)


def _means(labels: LabelArray, values: npt.NDArray[Any], total: int) -> DoubleArray:
    """Return the mean of values for each label from 1."""
    counts = np.bincount(labels, minlength=total + 1)[1:]
    sums = np.bincount(labels, weights=values.astype(np.float64), minlength=total + 1)[1:]
    return np.asarray(sums / np.maximum(counts, 1))


def _judge(
    before: int,
    after: int,
    ml: Sequence[float],
    sd_ml: Sequence[float],
    parts: Sequence[int],
    share: Sequence[float],
    seen: Sequence[float],
    rules: Rules,
) -> LesionChange:
    """Say what became of a lesion between two visits."""
    first, second = ml[before], ml[after]
    change = second - first
    limit = limit_ml(sd_ml[before], sd_ml[after])
    smaller, larger = min(first, second), max(first, second)
    event = ""
    if min(parts[before], parts[after]) > 0 and parts[before] != parts[after]:
        event = "merged" if parts[before] > parts[after] else "split"
    if larger == 0.0:
        kind = "absent"
    elif min(share[before], share[after]) < rules.min_share_in_view:
        kind = "not assessable"
    elif smaller == 0.0:
        kind = "new" if first == 0.0 else "vanished"
        missing = before if first == 0.0 else after
        if larger < rules.min_lesion_ml:
            kind = "too small"
        elif seen[missing] > 0.0 and seen[missing] >= rules.min_share_with_evidence:
            kind = "doubtful"
    elif abs(change) >= max(rules.min_change_ml, rules.min_change_percent / 100.0 * smaller):
        kind = "grown" if change > 0 else "shrunk"
    else:
        kind = "stable"
    return LesionChange(before, after, kind, change, limit, event)


def _largest_first(
    lesions: list[FollowedLesion], labels: LabelArray
) -> tuple[list[FollowedLesion], LabelArray]:
    """Number lesions by size; equal ones by place, from top to bottom."""
    ranked = sorted(
        lesions,
        key=lambda lesion: (
            -round(max(lesion.volume_ml), 9),
            *(-round(c, 1) for c in reversed(lesion.centroid_mm)),
        ),
    )
    number = np.zeros(len(lesions) + 1, np.int32)
    renamed = []
    for rank, lesion in enumerate(ranked, start=1):
        number[lesion.index] = rank
        fields = {name: getattr(lesion, name) for name in FollowedLesion.__dataclass_fields__}
        renamed.append(FollowedLesion(**{**fields, "index": rank}))
    return renamed, np.asarray(number[labels], dtype=np.int32)
