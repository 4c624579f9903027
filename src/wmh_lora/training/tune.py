"""Tuning after training: threshold, smallest component and views, chosen on validation scans.

Each scan goes through the network once for each view; the scores of all settings follow from the
probability maps, which are kept (`wmh_lora.engine_maps`). Whole volumes are scored, and subjects
averaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from wmh_lora.config import TTA_MODES, InferenceConfig, TtaMode
from wmh_lora.engine_maps import MapProgress
from wmh_lora.errors import ConfigError, GridMismatchError
from wmh_lora.evaluation.masks import check_labels
from wmh_lora.evaluation.measures import Measure, measure
from wmh_lora.evaluation.selection import (
    Setting,
    choose,
    leave_one_out,
    mean_band,
    mean_interval,
    simplicity,
    subject_means,
)
from wmh_lora.evaluation.sweep import SWEPT_MEASURES, THRESHOLDS, sweep
from wmh_lora.files import file_sha256
from wmh_lora.logs import Progress
from wmh_lora.models.model_file import ModelCard
from wmh_lora.training.tune_cases import TuningCase
from wmh_lora.volume import Volume, grid_difference

__all__ = [
    "METRICS",
    "MIN_VOXELS",
    "MapSource",
    "Scope",
    "Tuning",
    "read_reference",
    "tune",
    "tuned_card",
]

FloatArray = NDArray[np.float64]

#: What can be tuned for, with its measure; defined wherever the reference holds a lesion.
METRICS: Mapping[str, str] = {"dice": "dice", "f1": "lesion_f1", "avd": "avd_percent"}
MIN_VOXELS: tuple[int, ...] = (1, 2, 3, 5, 8, 12, 20)

Scope = Literal["every scan", "one plane", "three planes"]
"""Of which scans a threshold is: all, or those that are seen in one plane or in three."""

_PLANES: Mapping[Scope, int] = {"every scan": 0, "one plane": 1, "three planes": 3}
"""As `InferenceConfig.with_threshold` counts them."""

_REFINED = tuple(0.01 * step for step in (-4, -3, -2, -1, 1, 2, 3, 4))


@dataclass(frozen=True)
class Tuning:
    """All settings with their scores, and the choice.

    Attributes
    ----------
    metric : Measure
        What was tuned for.
    settings : tuple of Setting
        G settings, by views, threshold and size.
    subjects : tuple of str
        N subjects whose references hold lesions, sorted.
    scores : dict of arrays (N, G)
        By the names of `wmh_lora.evaluation.sweep.SWEPT_MEASURES`.
    low, high : arrays (G,)
        95 % bootstrap interval over subjects of the mean of the metric; NaN for one subject.
    scans, healthy_scans : int
        With lesions in the reference, and without.
    false_positive_ml : array (G,)
        Mean volume found in the scans without; NaN if there are none.
    best, chosen : int
        Columns: the best mean, and the simplest setting within one standard error of it.
    present : int or None
        Column of the model's settings before; None if its views are not among those compared, or
        scans were seen in one plane and in three and it had a threshold for each.
    scope : Scope
        Which scans the chosen threshold is for; the model's other threshold stays.
    left_out : tuple of int
        For each subject, the column chosen without it; empty for one subject.
    """

    metric: Measure
    settings: tuple[Setting, ...]
    subjects: tuple[str, ...]
    scores: Mapping[str, FloatArray]
    low: FloatArray
    high: FloatArray
    scans: int
    healthy_scans: int
    false_positive_ml: FloatArray
    best: int
    chosen: int
    present: int | None
    scope: Scope
    left_out: tuple[int, ...]

    @property
    def setting(self) -> Setting:
        """The chosen setting."""
        return self.settings[self.chosen]

    @property
    def mean(self) -> FloatArray:
        """Mean (G,) of the metric over subjects."""
        return np.asarray(self.scores[self.metric.key].mean(axis=0), dtype=np.float64)

    @property
    def left_out_scores(self) -> FloatArray:
        """Score of each subject with what was chosen without it; empty for one subject."""
        rows = np.arange(len(self.left_out))
        return self.scores[self.metric.key][rows, list(self.left_out)]


class MapSource(Protocol):
    """Gives the probability maps of scans; see `wmh_lora.engine_maps.ProbabilityMaps`."""

    def planes_of(self, volume: Volume, /) -> int:
        """Return in how many planes a scan is seen."""

    def of(
        self,
        volume: Volume,
        image_sha256: str,
        views: Sequence[TtaMode],
        progress: MapProgress | None = None,
        /,
    ) -> Iterator[tuple[TtaMode, NDArray[np.float32]]]:
        """Yield each set of views with its map."""


# --- search -----------------------------------------------------------------------------------


def tune(
    cases: Sequence[TuningCase],
    maps: MapSource,
    present: InferenceConfig,
    *,
    metric: str = "dice",
    thresholds: Sequence[float] = (),
    min_voxels: Sequence[int] = (),
    views: Sequence[TtaMode] = TTA_MODES,
    progress: Progress | None = None,
) -> Tuning:
    """Score all settings on whole validation scans, and choose one.

    Parameters
    ----------
    cases : sequence of TuningCase
        Validation scans, at least one with lesions. Scans without have no score: what is found in
        them is reported.
    maps : MapSource
        Of the model.
    present : InferenceConfig
        The model's settings; they are always among those compared, with the threshold for scans
        that are seen in as many planes as these.
    metric : str
        A key of `METRICS`.
    thresholds : sequence of float
        In (0, 1). By default `THRESHOLDS`, then steps of 0.01 around the best of them.
    min_voxels : sequence of int
        Smallest components; by default `MIN_VOXELS`.
    views : sequence of str
        Sets of views to compare.
    progress : Progress, optional
        Called while the network runs.

    Raises
    ------
    ConfigError
        If a setting is out of range, or no reference holds a lesion.
    DataError
        If a scan or reference cannot be used: none is left out silently.
    """
    if metric not in METRICS:
        raise ConfigError(f"Unknown metric {metric!r}; choose one of {', '.join(METRICS)}.")
    if not cases:
        raise ConfigError("There is no validation scan to tune on; name images and references.")
    levels = sorted({*(thresholds or THRESHOLDS), *map(present.threshold_of, (1, 3))})
    sizes = sorted({*(min_voxels or MIN_VOXELS), present.min_voxels})
    for level, size in product(levels, sizes):
        replace(present, threshold=level, min_voxels=size)  # refuses what is out of range
    modes = [mode for mode in TTA_MODES if mode in views]
    search = _Search(cases, maps, modes, sizes, present.min_peak)
    scans = search.sweep(levels, progress)
    result = _choose(measure(METRICS[metric]), scans, (modes, levels, sizes), present)
    if thresholds:
        return result
    centre = result.settings[result.best].threshold
    near = {round(centre + step, 2) for step in _REFINED} - set(levels)
    added = sorted(level for level in near if 0.0 < level < 1.0)
    scans = [a.joined(b) for a, b in zip(scans, search.sweep(added, None), strict=True)]
    levels += added
    return _choose(result.metric, scans, (modes, levels, sizes), present)


@dataclass(frozen=True)
class _Swept:
    """Scores of one scan, arrays (views, thresholds, sizes)."""

    subject: str
    planes: int
    healthy: bool
    scores: Mapping[str, FloatArray]
    found_ml: FloatArray

    def joined(self, other: _Swept) -> _Swept:
        """Append the thresholds of another sweep of the scan."""
        scores = {
            key: np.concatenate([array, other.scores[key]], axis=1)
            for key, array in self.scores.items()
        }
        found_ml = np.concatenate([self.found_ml, other.found_ml], axis=1)
        return replace(self, scores=scores, found_ml=found_ml)


class _Search:
    """Sweeps thresholds and sizes on every scan, one scan in memory at a time."""

    def __init__(
        self,
        cases: Sequence[TuningCase],
        maps: MapSource,
        modes: Sequence[TtaMode],
        sizes: Sequence[int],
        min_peak: float,
    ) -> None:
        self._cases, self._maps, self._modes, self._sizes = cases, maps, modes, sizes
        self._min_peak = min_peak

    def sweep(self, levels: Sequence[float], progress: Progress | None) -> list[_Swept]:
        return [
            self._scan(case, levels, partial(self._show, progress, number))
            for number, case in enumerate(self._cases)
        ]

    def _scan(self, case: TuningCase, levels: Sequence[float], show: MapProgress) -> _Swept:
        volume = Volume.read(case.image)
        reference = read_reference(case, volume)
        digest = file_sha256(case.image)
        swept = [
            sweep(probability, reference, levels, self._sizes, min_peak=self._min_peak)
            for _, probability in self._maps.of(volume, digest, self._modes, show)
        ]
        stacked = {key: np.stack([one[key] for one in swept]) for key in swept[0]}
        found_ml = stacked.pop("prediction_voxels") * volume.voxel_volume_ml
        healthy = not (reference == 1).any()
        return _Swept(case.subject, self._maps.planes_of(volume), healthy, stacked, found_ml)

    def _show(
        self, progress: Progress | None, number: int, mode: TtaMode, done: int, total: int
    ) -> None:
        if progress is None:
            return
        share = number + (self._modes.index(mode) + done / total) / len(self._modes)
        text = f"{self._cases[number].name}, {mode}"
        progress(round(1000 * share), 1000 * len(self._cases), text)


def read_reference(case: TuningCase, volume: Volume) -> NDArray[np.uint8]:
    """Read labels 0, 1 and 2 on the grid of the scan.

    Raises
    ------
    GridMismatchError
        If scan and reference do not lie on one grid.
    DataError
        If the reference holds other values.
    """
    if case.reference is None:
        return np.zeros(volume.shape, dtype=np.uint8)
    reference = Volume.read(case.reference, allow_constant=True)
    if difference := grid_difference(volume, reference):
        raise GridMismatchError(
            f"{case.image} and its reference {case.reference}: {difference}; resample the "
            "reference to the grid of the image."
        )
    check_labels(case.reference, reference.data)
    return np.rint(reference.data).astype(np.uint8)


def _choose(
    metric: Measure,
    scans: Sequence[_Swept],
    axes: tuple[Sequence[TtaMode], Sequence[float], Sequence[int]],
    present: InferenceConfig,
) -> Tuning:
    scored = [scan for scan in scans if not scan.healthy]
    healthy = [scan for scan in scans if scan.healthy]
    if not scored:
        raise ConfigError(
            "No reference of the validation scans holds a lesion; tuning needs one scan with "
            "lesions at least."
        )
    modes, levels, sizes = axes
    # thresholds may come unsorted, the refined ones last
    order = np.argsort(levels)
    settings = tuple(
        Setting(levels[index], size, mode) for mode in modes for index in order for size in sizes
    )
    owners = [scan.subject for scan in scored]
    scores = {}
    for key in SWEPT_MEASURES:
        rows = np.stack([scan.scores[key][:, order].ravel() for scan in scored])
        scores[key], subjects = subject_means(rows, owners)
    found_ml = np.full(len(settings), np.nan)
    if healthy:
        found_ml = np.mean([scan.found_ml[:, order].ravel() for scan in healthy], axis=0)
    thresholds = {present.threshold_of(scan.planes) for scan in scans}
    before = Setting(min(thresholds), present.min_voxels, present.tta)
    known = len(thresholds) == 1 and before in settings
    ranks = simplicity(settings, before)
    gains = scores[metric.key] * (1.0 if metric.better == "higher" else -1.0)
    best, chosen = choose(gains, ranks)
    low, high = mean_band(scores[metric.key])
    return Tuning(
        metric=metric,
        settings=settings,
        subjects=subjects,
        scores=scores,
        low=low,
        high=high,
        scans=len(scored),
        healthy_scans=len(healthy),
        false_positive_ml=found_ml,
        best=best,
        chosen=chosen,
        present=settings.index(before) if known else None,
        scope=_scope(present, {scan.planes for scan in scans}),
        left_out=tuple(leave_one_out(gains, ranks)),
    )


def _scope(present: InferenceConfig, planes: Set[int]) -> Scope:
    if present.threshold_three_planes is None or len(planes) > 1:
        return "every scan"
    return "one plane" if planes == {1} else "three planes"


# --- result -----------------------------------------------------------------------------------


def tuned_card(card: ModelCard, tuning: Tuning) -> ModelCard:
    """Return the model's card with the chosen settings, and how they were found.

    Give it to `wmh_lora.models.model_file.rewrite_card`.
    """
    key = tuning.metric.key
    values = {
        key: float(tuning.mean[tuning.chosen]),
        f"{key}_low": float(tuning.low[tuning.chosen]),
        f"{key}_high": float(tuning.high[tuning.chosen]),
    }
    if tuning.left_out:
        mean, (low, high) = mean_interval(tuning.left_out_scores)
        left_out = {"": mean, "_low": low, "_high": high}
        values.update({f"{key}_left_out{end}": value for end, value in left_out.items()})
    setting = tuning.setting
    record: dict[str, Any] = {
        "metric": key,
        "subjects": len(tuning.subjects),
        "scans": tuning.scans,
        "healthy_scans": tuning.healthy_scans,
        "settings_compared": len(tuning.settings),
        "scope": tuning.scope,
        **asdict(setting),
    }
    inference = card.inference.changed(min_voxels=setting.min_voxels, tta=setting.tta)
    metrics = {name: value for name, value in card.metrics.items() if not name.startswith("tuned_")}
    metrics.update({f"tuned_{name}": round(v, 4) for name, v in values.items() if np.isfinite(v)})
    return replace(
        card,
        inference=inference.with_threshold(setting.threshold, _PLANES[tuning.scope]),
        training={**card.training, "tuning": record},
        metrics=metrics,
    )
